"""Which of several int8 files of one network is better, measured on calibration images."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

import numpy as np

from bevel.quantization.pt2e import inputs_of
from bevel.runtimes import Session

FASTER = 1.05
"""A file this many times faster is the better one where both agree equally with float."""

AGREEMENT_STEP = 0.005
"""Agreements that differ by no more than this share of the images count as equal."""

IMAGES = 256
"""Compared at most: an image more or less is then no more than a step of agreement."""

WARMUP_TURNS = 1
TIMED_TURNS = 6
TURN_RUNS = 5
"""Timed runs of a file's turn, after one that fills the caches with what is the file's own."""

Inputs = Sequence[np.ndarray]
"""One image, as the arrays of the network's inputs."""


@dataclass(frozen=True)
class _Trial:
    name: str
    agreement: float
    error: float
    latency_ms: float


def single_images(calibration: Iterable[Any], count: int) -> Iterable[tuple[np.ndarray, ...]]:
    """Calibration batches, one image at a time, as the arrays of the network's `count` inputs."""
    for batch in calibration:
        inputs = [tensor.numpy() for tensor in inputs_of(batch, count)]
        for index in range(len(inputs[0])):
            yield tuple(array[index : index + 1] for array in inputs)


def choose(
    sessions: Mapping[str, Session], reference: Session, calibration: Iterable[Any], count: int
) -> tuple[str, str]:
    """The name of the best file, and why: agreement with float first, then time, then error.

    Agreement is the share of rows whose largest value is in the same place. Times differ from run
    to run, so the choice between files that agree equally may as well.

    Args:
        sessions: the files by name.
        reference: the float file.
        calibration: batches with at least one image; no more of them are read than are compared.
        count: inputs of the network.
    """
    images = list(islice(single_images(calibration, count), IMAGES))
    expected = [reference.run(image)[0] for image in images]
    times = _times(sessions, images[0])
    trials = []
    for name, session in sessions.items():
        pairs = [(session.run(i)[0], e) for i, e in zip(images, expected, strict=True)]
        agreement = float(np.mean([_agreement(got, exact) for got, exact in pairs]))
        error = float(np.mean([np.abs(got - exact).mean() for got, exact in pairs]))
        trials.append(_Trial(name, agreement, error, times[name]))
    return _best(trials)


def _best(trials: Sequence[_Trial]) -> tuple[str, str]:
    most = max(trial.agreement for trial in trials)
    equal = [trial for trial in trials if most - trial.agreement <= AGREEMENT_STEP]
    fastest = min(equal, key=lambda trial: trial.latency_ms)
    close = [trial for trial in equal if trial.latency_ms <= FASTER * fastest.latency_ms]
    best = min(close, key=lambda trial: trial.error)
    others = "; ".join(_told(trial) for trial in trials if trial is not best)
    return best.name, f"chosen on calibration images: {_told(best)}, against {others}"


def _told(trial: _Trial) -> str:
    return (
        f"{trial.name} {100 * trial.agreement:.1f} % agreement with float, mean error "
        f"{trial.error:.3g}, {trial.latency_ms:.3g} ms"
    )


def _agreement(got: np.ndarray, expected: np.ndarray) -> float:
    if got.ndim < 2 or got.shape[1] < 2:
        return 1.0  # nothing is chosen among; the error decides
    return float((got.argmax(axis=1) == expected.argmax(axis=1)).mean())


def _times(sessions: Mapping[str, Session], image: Inputs) -> dict[str, float]:
    """Median milliseconds for one image, all files in turn."""
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(WARMUP_TURNS + TIMED_TURNS):
        for name, session in sessions.items():
            session.run(image)
            times = [_time(session, image) for _ in range(TURN_RUNS)]
            if turn >= WARMUP_TURNS:
                samples[name] += times
    return {name: median(values) for name, values in samples.items()}


def _time(session: Session, image: Inputs) -> float:
    begun = time.perf_counter_ns()
    session.run(image)
    return (time.perf_counter_ns() - begun) / 1e6
