"""Training: ``Trainer`` does a step, ``train`` is the loop around it, ``evaluate`` measures what came out."""

from sparsekern.training.checkpoint import CheckpointError
from sparsekern.training.config import TrainConfig, TrainerConfig
from sparsekern.training.evaluate import Evaluation, evaluate, pca_fvu
from sparsekern.training.loggers import read_metrics
from sparsekern.training.loop import TrainResult, train, versions
from sparsekern.training.trainer import StepStats, Trainer

__all__ = [
    "CheckpointError",
    "Evaluation",
    "StepStats",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TrainerConfig",
    "evaluate",
    "pca_fvu",
    "read_metrics",
    "train",
    "versions",
]
