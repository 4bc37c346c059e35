"""Training: one plain loop, distillation, and batch-norm statistics."""

from bevel.finetune.batchnorm import recalibrate
from bevel.finetune.train import Trained, TrainingData, finetune

__all__ = ["Trained", "TrainingData", "finetune", "recalibrate"]
