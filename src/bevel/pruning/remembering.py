"""Scores that were found before, for the same network, criterion and images.

What is hashed: the network (`contents.py`); the channel groups; the files that compute the scores;
the images, and the labels where the criterion looks at them. How the images are split into
batches does not count, since no statistic depends on it.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from bevel.core import plugins
from bevel.core.files import atomic, sha256
from bevel.graph.couplings import Analysis
from bevel.pruning import criteria, members, observing, places
from bevel.pruning.contents import ContentHash
from bevel.pruning.criteria import DataCriterion
from bevel.pruning.observing import Calibration, parted


class Remembered:
    """The file of one network, criterion and set of images; without a folder there is none.

    Args:
        folder: where such files are.
        net: the network.
        analysis: its groups.
        criterion: the criterion's name.
        calibration: the images.
    """

    def __init__(
        self,
        folder: Path | None,
        net: nn.Module,
        analysis: Analysis,
        criterion: str,
        calibration: Calibration,
    ) -> None:
        self.path: Path | None = None
        if folder is not None:
            digest = _digest(net, analysis, criterion, calibration)
            self.path = folder / f"{criterion}-{digest}.safetensors"

    def get(self) -> dict[int, np.ndarray] | None:
        """What `put` was given, or None; a file that cannot be read is as good as none."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            return {int(group): rows for group, rows in load_file(self.path).items()}
        except (SafetensorError, ValueError, OSError):
            return None

    def put(self, scores: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Keep scores (members, size) per group, and hand them back."""
        if self.path is not None:
            with atomic(self.path) as temporary:
                held = {str(group): np.ascontiguousarray(rows) for group, rows in scores.items()}
                save_file(held, temporary)
        return scores


def _digest(net: nn.Module, analysis: Analysis, criterion: str, calibration: Calibration) -> str:
    """Hex digest of all that the scores depend on."""
    plugin: DataCriterion = plugins.load("criteria", criterion)
    found = ContentHash()
    found.text(torch.__version__)
    for file in (plugin, criteria, members, places, observing):
        found.text(sha256(Path(inspect.getfile(file))))  # type: ignore[arg-type]  # are modules
    found.network(net)
    for group in analysis.groups:
        found.text(f"{group.name} {group.size} {group.frozen is None}")
        for axis in group.axes:
            found.text(f"{axis.tensor} {axis.dim} {axis.units.shape}")
            found.array(axis.units)
    seen, told = ContentHash(), ContentHash()  # apart: how they take turns does not matter
    for batch in calibration:
        images, labels = parted(batch)
        seen.each(images)
        if plugin.NEEDS == "labels":
            told.each(labels)
    found.text(seen.hexdigest() + told.hexdigest())
    return found.hexdigest()[:32]
