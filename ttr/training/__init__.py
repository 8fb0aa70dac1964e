"""Training: LightningModules around the models, trained models as files, and sweeps."""

from ttr.training.export import export, load_checkpoint, load_exported
from ttr.training.study import Config, Override, Run, Study
from ttr.training.sweep import run_study
from ttr.training.token_prediction import TokenPrediction, TokenReconstruction
from ttr.training.training import Training
from ttr.training.value_regression import ValueRegression

__all__ = [
    "Config",
    "Override",
    "Run",
    "Study",
    "TokenPrediction",
    "TokenReconstruction",
    "Training",
    "ValueRegression",
    "export",
    "load_checkpoint",
    "load_exported",
    "run_study",
]
