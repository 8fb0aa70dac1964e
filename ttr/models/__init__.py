"""Backbones around the layers."""

from ttr.models.language_model import RegressionLM

__all__ = ["RegressionLM"]
