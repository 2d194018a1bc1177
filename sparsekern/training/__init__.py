"""Training: ``Trainer`` does a step, ``train`` is the loop around it, ``evaluate`` measures what came out,
and ``loss_recovered`` what it does to a language model.
"""

from sparsekern.training.checkpoint import CheckpointError
from sparsekern.training.config import TrainConfig, TrainerConfig
from sparsekern.training.evaluate import Evaluation, evaluate, pca_fvu
from sparsekern.training.loggers import read_metrics
from sparsekern.training.loop import TrainResult, train, versions
from sparsekern.training.recovered import LossRecovered, loss_recovered
from sparsekern.training.trainer import StepStats, Trainer

__all__ = [
    "CheckpointError",
    "Evaluation",
    "LossRecovered",
    "StepStats",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TrainerConfig",
    "evaluate",
    "loss_recovered",
    "pca_fvu",
    "read_metrics",
    "train",
    "versions",
]
