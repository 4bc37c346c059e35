"""The export doctor: what a file is made of, how exact it is, and why it is not faster.

It asks the runtime for the file's operators and for its own profiler's times (`operators` and
`profile` of a runtime's module; both may be absent) and turns them into lines for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bevel.core.errors import FORWARD_FAULTS, MeasurementError, one_line
from bevel.core.modes import evaluating
from bevel.core.progress import track
from bevel.core.records import Artifact, Diagnosis, Measurement, Operator, Parity
from bevel.measurement.findings import (
    OTHER,
    count_conversions,
    count_stray_pairs,
    count_transposes,
    explain,
    int8_share,
    verdict,
)
from bevel.runtimes import CHANNEL_STEP, Session, load_runtime

COUNT = 32
"""Random images that parity is taken on where none are given."""


def diagnose(
    artifact: Artifact,
    *,
    label: str | None = None,
    threads: int = 1,
    images: Tensor | None = None,
    count: int = COUNT,
    against: Artifact | nn.Module | None = None,
    speedup: float | None = None,
) -> Diagnosis:
    """Say what an exported file is made of, how exact it is, and why it is not faster.

    Args:
        artifact: the file.
        label: what it is called; default: its path.
        threads: threads that the runtime's profiler may use.
        images: inputs (N, C, H, W) for parity and the profiler; default: normal random numbers.
        count: how many random inputs.
        against: the float file or the torch network that it should agree with. With a float file
            of the same runtime, the times by kind of operator are compared as well.
        speedup: time of the float file divided by this one's, if it was measured.

    Raises:
        MeasurementError: a file does not run on these images, or the outputs have other shapes.
        MissingDependencyError: the runtime is not installed.
    """
    arrays = [images.numpy()] if images is not None else random_inputs(artifact, count)
    beside = against if isinstance(against, Artifact) else None
    found = _examine(artifact, [array[:1] for array in arrays], threads, beside, speedup)
    agreement = None if against is None else parity(artifact, against, arrays)
    return found.model_copy(
        update={"label": label or artifact.path, "parity": agreement},
    )


def diagnose_all(measurements: Sequence[Measurement], image: Tensor) -> list[Diagnosis]:
    """A diagnosis for each measured file of the compressed network, beside its float32 file.

    The runtime's profiler runs on this machine, so it is asked only about files measured here.

    Args:
        measurements: of all files of a run.
        image: an input (1, C, H, W) for the profiler.
    """
    found = []
    for own in track([m for m in measurements if m.label != "original"], "doctor"):
        base = next((m for m in measurements if _is_base(m, own)), None)
        speedup = None
        if base is not None and base.latency and own.latency:
            speedup = base.latency.p50_ms / own.latency.p50_ms
        here = own.device.device == "local"
        diagnosis = _examine(
            own.artifact,
            [image.numpy()] if here else None,
            own.threads,
            base.artifact if base is not None else None,
            speedup,
        )
        found.append(diagnosis.model_copy(update={"label": own.label, "parity": own.parity}))
    return found


def _is_base(other: Measurement, own: Measurement) -> bool:
    """Whether it is the float32 file of the same network, measured at the same place."""
    return (
        other is not own
        and other.artifact.precision == "float32"
        and (other.label, other.artifact.runtime, other.device.device, other.threads)
        == (own.label, own.artifact.runtime, own.device.device, own.threads)
    )


def _examine(
    artifact: Artifact,
    arrays: Sequence[np.ndarray] | None,
    threads: int,
    float_file: Artifact | None,
    speedup: float | None,
) -> Diagnosis:
    """A diagnosis without parity; without arrays nothing is profiled."""
    runtime: Any = load_runtime(artifact.runtime)
    operators = _operators(artifact, arrays, threads)
    times = [operator.latency_ms for operator in operators if operator.latency_ms is not None]
    beside: list[Operator] = []
    if float_file is not None and float_file.runtime == artifact.runtime and times:
        beside = _operators(float_file, arrays, threads)
    step = getattr(runtime, "channel_step", lambda _: CHANNEL_STEP)(artifact.precision)
    findings = explain(artifact, operators, beside, step)
    return Diagnosis(
        label=artifact.path,
        artifact=artifact,
        threads=threads,
        verdict=verdict(artifact, operators, findings, speedup),
        findings=findings,
        operators=operators,
        profiled_ms=sum(times) if times else None,
        int8_macs=int8_share(operators),
        channel_step=step,
        conversions=count_conversions(operators),
        stray_pairs=count_stray_pairs(operators),
        transposes=count_transposes(operators),
        speedup=speedup,
    )


def random_inputs(artifact: Artifact, count: int) -> list[np.ndarray]:
    """Normal random numbers for every input of a file, `count` images each; always the same."""
    random = np.random.default_rng(0)
    return [
        random.standard_normal(
            (count, *(size if isinstance(size, int) else 1 for size in signature.shape[1:]))
        ).astype(signature.dtype)
        for signature in artifact.inputs
    ]


def parity(
    artifact: Artifact, against: Artifact | nn.Module, arrays: Sequence[np.ndarray]
) -> Parity:
    """How far the file's first output is from another file's or a network's, image by image.

    Args:
        artifact: the file.
        against: what it should agree with.
        arrays: inputs, each with the images first.

    Raises:
        MeasurementError: one does not run on these images, or the outputs have other shapes.
    """
    session = _open(artifact)
    other = against if isinstance(against, nn.Module) else _open(against)
    largest, total, elements, agreed = 0.0, 0.0, 0, 0
    images = len(arrays[0])
    for index in track(range(images), "parity", images):
        one = [array[index : index + 1] for array in arrays]
        got, expected = session.run(one)[0], _expected(other, one)
        if got.shape != expected.shape:
            raise MeasurementError(
                f"{artifact.path} gives outputs of shape {got.shape} and what it is compared with "
                f"{expected.shape}: they are not of the same network"
            )
        difference = np.abs(got.astype(np.float64) - expected.astype(np.float64))
        largest = max(largest, float(difference.max()))
        total, elements = total + float(difference.sum()), elements + difference.size
        agreed += bool((got.argmax(axis=1) == expected.argmax(axis=1)).all())
    return Parity(
        max_difference=largest,
        mean_difference=total / elements,
        top1_agreement=agreed / images,
        images=images,
    )


def _open(artifact: Artifact) -> Session:
    return load_runtime(artifact.runtime).open_session(Path(artifact.path), 1)


def _expected(other: Session | nn.Module, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """First output for one image."""
    if not isinstance(other, nn.Module):
        return other.run(arrays)[0]
    try:
        with evaluating(other), torch.no_grad():
            outputs = other(*(torch.from_numpy(array) for array in arrays))
    except FORWARD_FAULTS as error:
        raise MeasurementError(
            f"the network it is compared with does not run on these images: {one_line(error, 160)}"
        ) from error
    first: np.ndarray = tree_leaves(outputs)[0].numpy()
    return first


def profiled(artifact: Artifact, threads: int = 1) -> list[Operator]:
    """The file's operators in order, with times where its runtime has a profiler here."""
    return _operators(artifact, random_inputs(artifact, 1), threads)


def _operators(
    artifact: Artifact, arrays: Sequence[np.ndarray] | None, threads: int
) -> list[Operator]:
    """The file's operators; with arrays and a profiler, its times. None if it does not say.

    What the profiler saw and the file does not name is kept as an operator of kind "other".
    """
    runtime: Any = load_runtime(artifact.runtime)
    if not hasattr(runtime, "operators"):
        return []
    path = Path(artifact.path)
    operators: list[Operator] = runtime.operators(path)
    if arrays is None or not hasattr(runtime, "profile"):
        return operators
    times: dict[str, float] = dict(runtime.profile(path, arrays, threads))
    timed = [
        operator.model_copy(update={"latency_ms": times.pop(operator.name, None)})
        for operator in operators
    ]
    rest = [
        Operator(name=name, kind=OTHER, precision="none", latency_ms=latency)
        for name, latency in times.items()
    ]
    return timed + rest
