"""Values: predict the vector that the task asks for."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ttr.models import RegressionModel
from ttr.training.training import Training


class ValueRegression(Training):
    """Trains a `RegressionModel` by the mean squared error wherever the target is a number.

        loss = 1/N Σ_t ‖model(x)_t − target_t‖²        (over the N entries of targets that are not NaN)

    Args:
        **training: the arguments of `Training` and of `RegressionModel`; the command line takes input_size and
            output_size from the task.

    Raises ValueError for a cosine over a run without an end.
    """

    def make_model(self, input_size: int, output_size: int, **model: Any) -> nn.Module:
        return RegressionModel(input_size, output_size, **model)

    def measure(
        self, batch: tuple[Float[Tensor, "batch time input"], Float[Tensor, "batch time output"]]
    ) -> tuple[dict[str, Tensor], int]:
        inputs, targets = batch
        asked = ~targets.isnan()
        loss = (self(inputs)[asked] - targets[asked]).square().mean()
        return {"loss": loss}, int(asked.sum())
