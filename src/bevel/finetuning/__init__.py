"""Training: one plain loop, with distillation."""

from bevel.finetuning.train import Trained, TrainingData, finetune

__all__ = ["Trained", "TrainingData", "finetune"]
