"""What a memory costs: operations, state and working space of one head, as functions of its sizes.

T is the number of tokens, d the size of a key and of a value, f the number of features that a key has, C a chunk, n the
steps of an iterative solver. Leading terms only; a multiplication and an addition are two operations.
"""

from __future__ import annotations
