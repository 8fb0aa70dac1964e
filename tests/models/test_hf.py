"""RegressionLM through transformers: configuration, files, labels and generation with the cache."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from sampling import relative_error

from ttr import NLMS, Decay, Design, GradientDescent
from ttr.models import RegressionLM

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("ttr.models.hf")

PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
COMPOSED = Design(Decay(per="channel"), optimizer=GradientDescent(gain=NLMS()))
DESIGNS = ["gated_delta_net", "retnet", "softmax_attention", ["kda", COMPOSED]]


def make(design: object = "gated_delta_net", **options: object) -> hf.RegressionForCausalLM:
    torch.manual_seed(0)
    arguments = {"d_model": 16, "num_layers": 2, "num_heads": 2, "design": design, **options}
    return transformers.AutoModelForCausalLM.from_config(hf.RegressionConfig(11, arguments)).eval()


@pytest.mark.parametrize("design", DESIGNS)
def test_the_model_is_the_plain_one_and_comes_back_from_its_files(design: object, tmp_path: object) -> None:
    model = make(design)
    torch.manual_seed(0)
    plain = RegressionLM(11, d_model=16, num_layers=2, num_heads=2, design=design)
    assert model(PROMPT).logits.equal(plain(PROMPT))
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "test_time_regression"
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.arguments == model.config.arguments
    assert again.model.head.weight is again.model.embedding.weight
    assert [b.mixer.design for b in again.model.backbone.blocks] == [b.mixer.design for b in plain.backbone.blocks]
    assert again(PROMPT).logits.equal(plain(PROMPT))


@pytest.mark.parametrize("design", DESIGNS)
def test_greedy_generation_is_that_of_the_plain_model(design: object) -> None:
    model = make(design)
    expected = model.model.generate(PROMPT, 7, temperature=0.0)
    assert model.generate(PROMPT, max_new_tokens=7, do_sample=False).equal(expected)
    assert model.generate(PROMPT, max_new_tokens=7, do_sample=False, use_cache=False).equal(expected)


@pytest.mark.parametrize("design", DESIGNS)
def test_cached_logits_are_those_without(design: object) -> None:
    model = make(design)
    whole = model(PROMPT).logits
    first = model(PROMPT[:, :2], use_cache=True)
    second = model(PROMPT[:, 2:], cache=first.cache)
    assert second.cache.get_seq_length() == 5
    assert relative_error(torch.cat([first.logits, second.logits], dim=1), whole) <= 1e-5


def test_beams_with_the_cache_are_those_without() -> None:
    model = make()
    search = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert model.generate(PROMPT, **search).equal(model.generate(PROMPT, **search, use_cache=False))


def test_labels_are_shifted_and_padding_at_the_end_changes_nothing() -> None:
    model = make()
    logits = model(PROMPT).logits
    loss = model(PROMPT, labels=PROMPT).loss
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), PROMPT[:, 1:].flatten()))
    padded, mask = F.pad(PROMPT, (0, 3)), F.pad(torch.ones_like(PROMPT), (0, 3))
    torch.testing.assert_close(model(padded, mask, labels=F.pad(PROMPT, (0, 3), value=-100)).loss, loss)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_padding_that_a_memory_would_read_is_an_error() -> None:
    model = make()
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask: expected padding at the end"):
        model(PROMPT, mask)
    with pytest.raises(ValueError, match="attention_mask: expected no padding in generate"):
        model.generate(PROMPT, attention_mask=mask, max_new_tokens=1)


def test_an_unknown_argument_or_choice_is_an_error() -> None:
    with pytest.raises(TypeError, match="depth"):
        make(depth=3)
    with pytest.raises(ValueError, match=r"weights: expected class_path and init_args"):
        hf.RegressionConfig(11, {"design": {"weights": {"class_path": "os.system"}}})
