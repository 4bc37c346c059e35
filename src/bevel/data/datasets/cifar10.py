"""CIFAR-10 in torchvision's format: 60,000 colour images, 10 classes (Krizhevsky 2009)."""

from __future__ import annotations

from torchvision.datasets import CIFAR10

from bevel.core.recipe import DataSection
from bevel.data.cifar import load_cifar
from bevel.data.splits import Splits


def load(section: DataSection) -> Splits:
    """The official 50,000 and 10,000 images below `root`, fetched first if `download` is set."""
    return load_cifar(section, CIFAR10, "CIFAR-10")
