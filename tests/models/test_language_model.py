"""The backbone: hybrids, generation from the cache, errors."""

from __future__ import annotations

import re

import pytest
import torch
from sampling import relative_error

from ttr import Decay, Design
from ttr.models import RegressionLM

PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def small(**options: object) -> RegressionLM:
    torch.manual_seed(0)
    return RegressionLM(**({"vocab_size": 11, "d_model": 16, "num_layers": 2, "num_heads": 2} | options))


def test_blocks_may_differ() -> None:
    model = small(design=["delta_net", Design(Decay())])
    assert [block.mixer.design.name for block in model.backbone.blocks] == ["DeltaNet", None]
    assert model(PROMPT).shape == (2, 5, 11)


def test_a_list_of_designs_repeats() -> None:
    model = small(design=["delta_net", "softmax_attention"], num_layers=4)
    names = [block.mixer.design.name for block in model.backbone.blocks]
    assert names == ["DeltaNet", "Softmax attention"] * 2


@pytest.mark.parametrize("design", ["gated_delta_net", "mesa_net", "ttt_mlp", "softmax_attention", "kda"])
def test_checkpointed_blocks_keep_less_and_have_the_same_gradients(design: str) -> None:
    def trained(checkpoint_activations: bool) -> tuple[int, list[torch.Tensor]]:
        model = small(design=design, d_model=32, num_layers=4, checkpoint_activations=checkpoint_activations)
        kept = 0

        def count(x: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = model(PROMPT.repeat(1, 6)).logsumexp(-1).sum()
        loss.backward()
        return kept, [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    (much, expected), (little, got) = trained(False), trained(True)
    assert all(x.equal(y) for x, y in zip(got, expected, strict=True))
    assert little < much / 5


def test_greedy_generation_equals_the_whole_sequence_form() -> None:
    model = small()
    generated = model.generate(PROMPT, 6, temperature=0.0)
    assert generated[:, :5].equal(PROMPT)
    expected = PROMPT
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert generated.equal(expected)


def test_sampling_repeats_with_its_generator_and_top_one_is_greedy() -> None:
    model = small()
    one, two = (model.generate(PROMPT, 8, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.equal(two)
    assert model.generate(PROMPT, 8, top_k=1).equal(model.generate(PROMPT, 8, temperature=0.0))


def test_the_cache_keeps_its_size() -> None:
    model = small()
    sizes = []
    _, caches = model.extend(PROMPT)
    for _ in range(3):
        _, caches = model.extend(PROMPT[:, :1], caches)
        sizes.append([c.state.memory.numel() + sum(x.numel() for x in c.past.values()) for c in caches])
    assert sizes[0] == sizes[1] == sizes[2]


def test_the_future_does_not_leak() -> None:
    model = small(design="linear_attention")
    changed = PROMPT.clone()
    changed[:, 3:] = 0
    assert relative_error(model(changed)[:, :3], model(PROMPT)[:, :3]) <= 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: small(design=["delta_net"] * 3),
            "design: expected one, or a list whose length divides num_layers=2, got 3",
        ),
        (lambda: small().generate(PROMPT[:, :0], 1), "prompt: expected at least one token"),
        (lambda: small().generate(PROMPT, 1, temperature=-1.0), "temperature: expected at least 0, got -1.0"),
        (lambda: small().generate(PROMPT, 1, top_k=0), "top_k: expected at least 1, got 0"),
    ],
)
def test_errors_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()  # type: ignore[operator]
