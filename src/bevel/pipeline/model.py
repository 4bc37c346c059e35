"""The noun that a recipe's steps hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bevel.data import Data
from bevel.pruning.plan import PruningPlan
from bevel.rewriting.log import SurgeryLog


@dataclass(frozen=True)
class Model:
    """What flows from step to step: a network, and what leads to it from the factory.

    `data` are the images as it sees them; a resize step makes them another size from there on.
    """

    net: nn.Module
    data: Data
    plan: PruningPlan
    surgery: SurgeryLog = field(default_factory=SurgeryLog)

    @property
    def example(self) -> Tensor:
        """Two images of the validation split, (2, C, H, W)."""
        return example_of(self.data)

    def calibration(self, count: int) -> Any:
        """Training images without augmentation, for statistics and int8 ranges."""
        return self.data.batches("train", limit=count)


def example_of(data: Data) -> Tensor:
    """Two images of the validation split, (2, C, H, W)."""
    images, _ = next(iter(data.batches("validation", batch_size=2, limit=2)))
    return images
