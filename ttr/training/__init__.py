"""Training: LightningModules around the models."""

from ttr.training.token_prediction import TokenPrediction

__all__ = ["TokenPrediction"]
