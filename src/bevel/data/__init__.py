"""Labelled images, from a recipe's data section to batches of tensors, and how well a net does."""

from bevel.data.classes import check_classes
from bevel.data.collection import Data, load
from bevel.data.splits import Source, Splits

__all__ = ["Data", "Source", "Splits", "check_classes", "load"]
