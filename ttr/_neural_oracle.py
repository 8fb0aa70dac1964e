"""What a network as a memory means: its definition, by differentiating the stated objective, one token at a time.

`ttr.oracle` says what these definitions are for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from ttr._choices import Loss, Muon, Network, OnlineEM
from ttr._design import Design
from ttr._inputs import Prepared, forgetting
from ttr._state import State

Named = dict[str, Tensor]

# That of the code of Sun et al. (2024).
NORM_EPSILON = 1e-6


def neural(design: Design, tensors: Prepared, state: State) -> tuple[Tensor, State]:
    """A memory that is a network, a mixture of maps, or a linear map learned in mini-batches or by Muon."""
    return (_mixture if isinstance(design.optimizer, OnlineEM) else _network)(design, tensors, state)


def _network(design: Design, tensors: Prepared, state: State) -> tuple[Tensor, State]:
    """Decay, differentiate the pairs' losses at what is left of the batch's first weights, step, read.

    The state is the memory with which the started batch began, and that batch's tokens: going on takes them again.
    """
    _, k, v, inputs, raw_q, *_ = tensors
    optimizer, muon = design.optimizer, isinstance(design.optimizer, Muon)
    batch, window = getattr(optimizer, "batch", 1), getattr(optimizer, "window", 1)
    average, has_momentum = getattr(optimizer, "average", False), getattr(optimizer, "momentum", muon)
    network = isinstance(design.regressor, Network)
    norm = (inputs["norm_scale"], inputs["norm_shift"]) if network else None

    tokens, pair = _tokens(design, tensors, window)
    earlier = state.network or {}
    started = {name: earlier.get(f"started.{name}", x[:, :0]) for name, x in tokens.items()}
    waiting = started["k"].shape[1]
    tokens = {name: torch.cat([started[name], x], dim=1) for name, x in tokens.items()}
    zeros = {"w1": k.new_zeros(*k.shape[-2:], v.shape[-1])}
    first = {name: inputs[name] for name in design.regressor.weights} if network else zeros  # type: ignore[attr-defined]
    accumulated = {name: earlier.get(name, x.expand(k.shape[0], *x.shape)) for name, x in first.items()}
    momentum = {name: earlier.get(f"momentum.{name}", torch.zeros_like(x)) for name, x in accumulated.items()}
    before = {name: tokens[name].new_zeros(k.shape[0], window - 1, *tokens[name].shape[2:]) for name in pair}
    before = {name: earlier.get(f"window.{name}", x) for name, x in before.items()}

    expected = [*accumulated, *(f"momentum.{name}" for name in momentum if has_momentum)]
    expected += [f"window.{name}" for name in before if window > 1]
    expected += [f"started.{name}" for name in tokens if batch > 1]
    if earlier and set(earlier) != set(expected):
        raise ValueError(f"state: expected a network of {', '.join(expected)}, got {', '.join(earlier)}")

    outputs: list[Tensor] = []
    for t in range(tokens["k"].shape[1] + 1):
        if t % batch == 0:
            begun = t
            at_start = accumulated, momentum, before
            left = accumulated
            written = {name: torch.zeros_like(x) for name, x in left.items()}
        if t == tokens["k"].shape[1]:
            break
        now = {name: x[:, t] for name, x in tokens.items()}
        pairs = {name: torch.cat([x, now[name].unsqueeze(1)], dim=1) for name, x in before.items()}
        before = {name: x[:, 1:] for name, x in pairs.items()}
        decay, keep = (
            now[name].exp()[..., None, None] if name in now else 1.0 for name in ("log_decay", "log_momentum")
        )
        size = now["step_size"][..., None, None]
        left = {name: decay * x for name, x in left.items()}

        def objective(weights: Named, pairs: Named = pairs) -> Tensor:
            return _weighted_loss(design.loss, pairs["v"] - _answer(weights, pairs["k"], norm), pairs)

        gradient = torch.func.grad(objective)({name: design.retention(x) for name, x in left.items()})
        step = {name: -x if muon else -size * x for name, x in gradient.items()}
        if has_momentum:
            momentum = step = {name: keep * momentum[name] + x for name, x in step.items()}
        if muon:
            step = {name: size * _newton_schulz(x, optimizer.iterations) for name, x in step.items()}  # type: ignore[attr-defined]
        written = {name: decay * x + step[name] for name, x in written.items()}
        share = 1 / (t % batch + 1) if average else 1.0
        accumulated = {name: x + share * written[name] for name, x in left.items()}
        if t >= waiting:
            query = tensors.q[:, t - waiting].unsqueeze(1)
            y = _answer({name: design.retention(x) for name, x in accumulated.items()}, query, norm).squeeze(1)
            outputs.append(y + raw_q[:, t - waiting] if network else y)

    accumulated, momentum, before = at_start
    after = dict(accumulated)
    after |= {f"momentum.{name}": x for name, x in momentum.items() if has_momentum}
    after |= {f"window.{name}": x for name, x in before.items() if window > 1}
    after |= {f"started.{name}": x[:, begun:] for name, x in tokens.items() if batch > 1}
    return torch.stack(outputs, dim=1) if outputs else v, State(network=after)


def _tokens(design: Design, tensors: Prepared, window: int) -> tuple[Named, list[str]]:
    """What comes with every token, by the names of `ttr.ops.neural_memory`, and which of it a pair's loss needs."""
    _, k, v, inputs, _, raw_k, _ = tensors
    log_decay, weight = forgetting(design.weights, inputs, k)
    if window > 1 and weight is None:
        weight = torch.ones_like(inputs["step_size"])
    # A network is fitted to what the key, which is carried around it, leaves of the value.
    target = v - raw_k if isinstance(design.regressor, Network) else v
    tokens = {"k": k, "v": target, "step_size": inputs["step_size"], "log_decay": log_decay, "weight": weight}
    tokens |= {name: inputs.get(name) for name in ("log_momentum", *design.loss.inputs)}
    given = {name: x for name, x in tokens.items() if x is not None}
    return given, [name for name in ("k", "v", "weight", *design.loss.inputs) if name in given]


def _weighted_loss(loss: Loss, error: Tensor, pairs: Named) -> Tensor:
    losses = loss(error, **{name: pairs[name].unsqueeze(-1) for name in loss.inputs})
    return (losses * pairs["weight"].unsqueeze(-1) if "weight" in pairs else losses).sum()


def _answer(weights: Named, x: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor:
    """The network at x, (batch, pairs, heads, key): matrices with gelu between, then the norm."""
    for name, matrix in weights.items():
        entering = x if name == "w1" else gelu(x, approximate="tanh")
        x = torch.einsum("bnhk,bhkv->bnhv", entering, matrix)
    if norm is None:
        return x
    scale, shift = norm
    return layer_norm(x, x.shape[-1:], eps=NORM_EPSILON) * scale + shift


def _newton_schulz(x: Tensor, iterations: int) -> Tensor:
    """Jordan et al. (2024): a quintic of the singular values of x over its norm, iterated; it takes them near one."""
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        cube = x @ x.mT @ x
        x = 3.4445 * x - 4.7750 * cube + 2.0315 * x @ x.mT @ cube
    return x


def _mixture(design: Design, tensors: Prepared, state: State) -> tuple[Tensor, State]:
    """One step up the newest pair's log-likelihood, from the decayed maps; Lee et al. (2026), eq. 3.2 and 3.8."""
    q, k, v, inputs, *_ = tensors
    log_decay, weight = forgetting(design.weights, inputs, k)
    maps = state.memory
    if maps is None:
        maps = k.new_zeros(k.shape[0], *inputs["key_logits"].shape[2:4], k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        prior, chosen = inputs["key_logits"][:, t].log_softmax(-2), inputs["query_logits"][:, t].softmax(-2)
        if log_decay is not None:
            maps = log_decay[:, t].exp()[..., None, None, None] * maps

        def log_likelihood(maps: Tensor, t: int = t, prior: Tensor = prior) -> Tensor:
            error = v[:, t].unsqueeze(2) - torch.einsum("bhjkv,bhk->bhjv", maps, k[:, t])
            return (prior - error.square() / 2).logsumexp(-2).sum()

        size = inputs["step_size"][:, t] if weight is None else inputs["step_size"][:, t] * weight[:, t]
        maps = maps + size[..., None, None, None] * torch.func.grad(log_likelihood)(maps)
        outputs.append((chosen * torch.einsum("bhjkv,bhk->bhjv", maps, q[:, t])).sum(-2))
    return torch.stack(outputs, dim=1) if outputs else v, State(memory=maps)
