"""Training: LightningModules around the models, trained models as files, and sweeps."""

from ttr.training.export import export, load_checkpoint, load_exported
from ttr.training.study import Override, Run, Study
from ttr.training.sweep import run_study
from ttr.training.token_prediction import TokenPrediction

__all__ = ["Override", "Run", "Study", "TokenPrediction", "export", "load_checkpoint", "load_exported", "run_study"]
