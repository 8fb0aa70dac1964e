"""State tracking: the running product of a group's elements, which no sum of independent terms can follow."""

from itertools import permutations
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ttr.tasks.task import Batch, Task, require, require_at_least

Group = Literal["parity", "S3", "S4", "A5"]

_LETTERS: dict[str, int] = {"parity": 2, "S3": 3, "S4": 4, "A5": 5}
_NEIGHBOURS = {n: [(*range(i), i + 1, i, *range(i + 2, n)) for i in range(n - 1)] for n in (2, 3, 4)}
_GENERATORS: dict[str, list[tuple[int, ...]]] = {
    "parity": _NEIGHBOURS[2],
    "S3": _NEIGHBOURS[3],
    "S4": _NEIGHBOURS[4],
    "A5": [(1, 2, 0, 3, 4), (1, 2, 3, 4, 0)],  # (0 1 2) and (0 1 2 3 4)
}


def group_elements(group: Group) -> list[tuple[int, ...]]:
    """The permutations of a group in lexicographic order, the identity first: what token n stands for.

    `"parity"` is S2, whose product is the number of ones modulo two; `"A5"` has the even permutations of five letters.
    """
    require(group in _LETTERS, "group", f"one of {', '.join(_LETTERS)}", group)
    elements = permutations(range(_LETTERS[group]))
    return [element for element in elements if not group.startswith("A") or _is_even(element)]


def multiplication_table(group: Group) -> Int[Tensor, "order order"]:
    """The token of a∘b in row a and column b, where (a∘b)(i) = a(b(i))."""
    elements = group_elements(group)
    token = {element: number for number, element in enumerate(elements)}
    return torch.tensor([[token[tuple(a[i] for i in b)] for b in elements] for a in elements])


def _is_even(permutation: tuple[int, ...]) -> bool:
    size = len(permutation)
    inversions = sum(permutation[i] > permutation[j] for i in range(size) for j in range(i + 1, size))
    return inversions % 2 == 0


class StateTracking(Task):
    """Random elements of a permutation group; the target at every token is the product of all up to it.

        tokens     g₁    g₂      g₃        …        g_T
        targets    g₁    g₁g₂    g₁g₂g₃    …    g₁g₂ ⋯ g_T

    A5 is the smallest group that is not solvable: its word problem is complete for NC¹, hence believed to be out of
    reach of a fixed number of layers whose states transform diagonally; parity already needs a negative eigenvalue.

    Shapes: two int64 tensors (batch, length) of numbers of `group_elements`, of which vocab_size has as many.

    Args:
        group: "parity", "S3", "S4" or "A5".
        length: tokens in a sequence to train on.
        val_length: tokens in a sequence to validate and test on; as many as in training if None.
        elements: draw from "all" elements, or from the identity and "generators" alone (for a symmetric group the
            exchanges of neighbours, for A5 a cycle of three and one of five), each as likely.
        **task: the arguments of `Task`.

    Raises ValueError for an unknown group or a length below one.

    Source: Merrill, Petty and Sabharwal, arXiv 2404.08819; Grazzi et al., arXiv 2411.12537.
    """

    def __init__(
        self,
        group: Group = "parity",
        length: int = 32,
        val_length: int | None = None,
        elements: Literal["all", "generators"] = "all",
        **task: Any,
    ):
        super().__init__(**task)
        self.length, self.val_length = length, length if val_length is None else val_length
        require_at_least(1, length=length, val_length=self.val_length)
        require(elements in ("all", "generators"), "elements", "'all' or 'generators'", elements)
        everything = group_elements(group)
        drawn = everything if elements == "all" else [everything[0], *_GENERATORS[group]]
        self.table = multiplication_table(group)
        self.drawn = torch.tensor([everything.index(element) for element in drawn])
        self.vocab_size = len(everything)

    def draw(self, split: str, index: int) -> Batch:
        length = self.length if split == "train" else self.val_length
        choice = torch.randint(len(self.drawn), (self.batch_size, length), generator=self.generator(split, index))
        tokens = self.drawn[choice]
        products, reach = tokens.clone(), 1
        while reach < length:  # a scan: after every round, the product of the last 2 · reach tokens
            products[:, reach:] = self.table[products[:, :-reach], products[:, reach:]]
            reach *= 2
        return tokens, products
