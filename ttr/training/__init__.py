"""Training: LightningModules around the models."""

from ttr.training.token_prediction import TokenPrediction, TokenReconstruction
from ttr.training.training import Training
from ttr.training.value_regression import ValueRegression

__all__ = ["TokenPrediction", "TokenReconstruction", "Training", "ValueRegression"]
