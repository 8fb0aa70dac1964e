"""Retentions: what holds a memory near the one before while it fits the new pair."""

from __future__ import annotations

from dataclasses import dataclass

from ttr._choices.choice import Choice


class Retention(Choice):
    """The geometry in which a memory keeps what it knew."""


@dataclass(frozen=True)
class L2(Retention):
    """The squared distance: the old memory fades by the weights' factor, and the step is the plain gradient."""
