"""Scores that were found before, for the same network, criterion and images.

What is hashed: every parameter and buffer; what the modules are, their settings, and the source of
those that are not torch's; the channel groups; the files that compute the scores; the images, and
the labels where the criterion looks at them. How the images are split into batches does not count,
since no statistic depends on it.
"""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from bevel.core import plugins
from bevel.core.files import atomic, sha256
from bevel.graph.couplings import Analysis
from bevel.pruning import criteria, members, observing, places
from bevel.pruning.criteria import DataCriterion
from bevel.pruning.observing import Calibration, parted

PLAIN = (bool, int, float, str, tuple, type(None))
"""Attributes of these types are a module's settings."""


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
    found = _Digest()
    found.text(torch.__version__)
    for file in (plugin, criteria, members, places, observing):
        found.text(sha256(Path(inspect.getfile(file))))  # type: ignore[arg-type]  # are modules
    _add_network(found, net)
    for group in analysis.groups:
        found.text(f"{group.name} {group.size} {group.frozen is None}")
        for axis in group.axes:
            found.text(f"{axis.tensor} {axis.dim} {axis.units.shape}")
            found.hash.update(np.ascontiguousarray(axis.units).tobytes())
    seen, told = _Digest(), _Digest()  # apart, so that it does not matter how they take turns
    for batch in calibration:
        images, labels = parted(batch)
        seen.each(images)
        if plugin.NEEDS == "labels":
            told.each(labels)
    found.text(seen.hash.hexdigest() + told.hash.hexdigest())
    return found.hash.hexdigest()[:32]


def _add_network(found: _Digest, net: nn.Module) -> None:
    sources = set()
    for name, module in net.named_modules():
        kind = type(module)
        settings = {k: v for k, v in vars(module).items() if isinstance(v, PLAIN)}
        settings.pop("training", None)
        found.text(f"{name} {kind.__module__}.{kind.__qualname__} {sorted(settings.items())}")
        if not kind.__module__.startswith("torch."):
            sources.add(kind)
    for kind in sorted(sources, key=lambda kind: (kind.__module__, kind.__qualname__)):
        try:
            found.text(inspect.getsource(kind))
        except (OSError, TypeError):  # typed into a shell
            found.text(kind.__qualname__)
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        found.text(f"{name} {tuple(tensor.shape)}")
        found.each(tensor)


class _Digest:
    """A hash of texts and tensors."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.row = ""

    def text(self, text: str) -> None:
        """Add a text."""
        self.hash.update(f"{len(text)}:{text}".encode())

    def each(self, given: Any) -> None:
        """Add a tensor's rows, or tensors one by one: the same rows in two parts count alike."""
        if isinstance(given, list | tuple):
            for item in given:
                self.each(item)
        elif isinstance(given, Tensor):
            rows = given.detach().cpu().contiguous()
            row = f"{tuple(rows.shape[1:])} {rows.dtype}"
            if row != self.row:
                self.text(row)
                self.row = row
            self.hash.update(rows.reshape(-1).view(torch.uint8).numpy().tobytes())
