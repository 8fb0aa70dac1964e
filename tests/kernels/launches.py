"""What the public functions launch on a GPU, recorded without one.

Run without TRITON_INTERPRET, which turns kernels into Python functions. The recorder takes the place of
`JITFunction.run`: it binds and specialises the arguments as a launch on the target would (divisibility by 16, ones,
absent tensors) and launches nothing, so that outputs stay uninitialised.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import ttr_kernels
from cases import Case
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Launch(NamedTuple):
    """What is compiled for a launch."""

    source: ASTSource
    options: Any
    forward: bool

    @property
    def kernel(self) -> str:
        return self.source.fn.__name__


@contextlib.contextmanager
def replaced(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """With other attributes, (owner, name, value), for a while."""
    before = [getattr(owner, name) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(changes, before, strict=True):
            setattr(owner, name, value)


def on_target(target: str) -> list[tuple[Any, str, Any]]:
    """What makes the package choose its settings for a GPU, and take tensors on the CPU."""
    instead = {"architecture": lambda device: target, "interpreted": lambda: True}
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == ttr_kernels.__name__]
    return [(module, name, instead[name]) for module in modules for name in instead if hasattr(module, name)]


def is_forward() -> bool:
    """Whether autograd is not going back right now."""
    return torch._C._current_graph_task_id() < 0


@contextlib.contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """The launches of what is called inside, as they would be on this target; in order."""
    launches: list[Launch] = []
    backend = make_backend(TARGETS[target])

    def run(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
        launches.append(Launch(ASTSource(kernel, signature, constants, attributes), options, is_forward()))

    with replaced([(JITFunction, "run", run), *on_target(target)]):
        yield launches


def call(case: Case, inputs: dict[str, Any]) -> None:
    """A case's function forwards, and backwards from all that it returns and that has a gradient."""
    found = tree_leaves(getattr(ttr_kernels, case.function)(**inputs))
    outputs = [y for y in found if y is not None and y.requires_grad]
    if case.backward:
        leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs], allow_unused=True)


def of_case(case: Case, target: str, dtype: torch.dtype, size: int) -> list[Launch]:
    with recorded(target) as launches, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of solvers, about numbers that nothing computed
        call(case, case.inputs(dtype, size))
    return launches
