"""Training on real images: scikit-learn's handwritten digits."""

from tiny_training import Digits

from bevel.core.recipe import DataSection
from bevel.core.steps import TrainStep
from bevel.data import load
from bevel.finetuning import finetune


def test_digits_are_learned_in_seconds():
    data = load(DataSection(name="digits", batch_size=64), seed=0)
    trained = finetune(Digits(data.input_shape), data, TrainStep(epochs=5, lr=0.1), seed=0)
    assert trained.history[-1]["validation_top1"] > 0.93
    assert trained.execution["reason"].startswith("short")
