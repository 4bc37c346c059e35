"""Accuracy of an exported file, and how far its outputs are from the torch network's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bevel.core.errors import MeasurementError
from bevel.core.modes import evaluating
from bevel.core.progress import track
from bevel.core.records import Accuracy, Artifact, Parity
from bevel.measurement.runner import run_batch as run_batch
from bevel.runtimes import load_runtime


@dataclass
class _Tally:
    """Running sums over the images of one artifact."""

    correct: int = 0
    agreed: int = 0
    images: int = 0
    largest: float = 0.0
    total: float = 0.0
    elements: int = 0

    def add(self, outputs: np.ndarray, expected: np.ndarray | None, labels: np.ndarray) -> None:
        winners = outputs.argmax(axis=1)
        self.correct += int((winners == labels).sum())
        self.images += len(labels)
        if expected is not None:
            difference = np.abs(outputs.astype(np.float64) - expected)
            self.largest = max(self.largest, float(difference.max()))
            self.total += float(difference.sum())
            self.elements += difference.size
            self.agreed += int((winners == expected.argmax(axis=1)).sum())


Predictions = Callable[[np.ndarray], Sequence[np.ndarray]]
"""First output of every file for images (N, C, H, W)."""


def evaluate_artifacts(
    artifacts: Sequence[tuple[Artifact, nn.Module | None]],
    batches: Iterable[tuple[Tensor, Tensor]],
    split: str,
    predict: Predictions | None = None,
) -> list[tuple[Accuracy, Parity | None]]:
    """Run the files over all images, each beside the float torch network it came from.

    Args:
        artifacts: exported classifiers, and their reference networks or None.
        batches: images (N, C, H, W) and labels (N,); read once.
        split: what the images are, for the record.
        predict: runs the files elsewhere; None: in this process, with all processors.

    Raises:
        MeasurementError: a file does not run on these images, or there are none.
    """
    predict = predict or _here([artifact for artifact, _ in artifacts])
    tallies = [_Tally() for _ in artifacts]
    total = len(batches) if isinstance(batches, Sized) else None
    for images, labels in track(batches, f"{split} images through the exported files", total):
        expected: dict[int, np.ndarray] = {}
        found = predict(images.numpy())
        for (_, reference), outputs, tally in zip(artifacts, found, tallies, strict=True):
            if reference is not None and id(reference) not in expected:
                expected[id(reference)] = _reference(reference, images)
            tally.add(outputs, expected.get(id(reference)), labels.numpy())
    if not tallies or not tallies[0].images:
        raise MeasurementError(f"there are no {split} images to measure accuracy on")
    return [_results(tally, split) for tally in tallies]


def _here(artifacts: Sequence[Artifact]) -> Predictions:
    """Run the files in this process."""
    threads = os.cpu_count() or 1
    sessions = [
        load_runtime(artifact.runtime).open_session(Path(artifact.path), threads)
        for artifact in artifacts
    ]
    return lambda images: [run_batch(session, images) for session in sessions]


def _reference(net: nn.Module, images: Tensor) -> np.ndarray:
    """First output, as of the file."""
    with evaluating(net), torch.no_grad():
        first: np.ndarray = tree_leaves(net(images))[0].numpy()
    return first


def _results(tally: _Tally, split: str) -> tuple[Accuracy, Parity | None]:
    accuracy = Accuracy(top1=tally.correct / tally.images, images=tally.images, split=split)
    if not tally.elements:
        return accuracy, None
    parity = Parity(
        max_difference=tally.largest,
        mean_difference=tally.total / tally.elements,
        top1_agreement=tally.agreed / tally.images,
        images=tally.images,
    )
    return accuracy, parity
