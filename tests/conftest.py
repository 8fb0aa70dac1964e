"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)  # the suite runs in parallel processes


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Without the type checker of the tests, so that wrong arguments reach the checks that users meet."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
