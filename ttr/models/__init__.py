"""Backbones around the layers."""

from ttr.models.backbone import Backbone
from ttr.models.language_model import RegressionLM
from ttr.models.vector_models import RegressionAutoencoder, RegressionModel

__all__ = ["Backbone", "RegressionAutoencoder", "RegressionLM", "RegressionModel"]
