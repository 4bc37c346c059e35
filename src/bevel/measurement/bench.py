"""Measure artifacts on a device: time in turn, memory alone, accuracy and parity on images."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bevel.core.progress import track
from bevel.core.records import Artifact, DeviceFacts, Latency, Measurement
from bevel.devices import Device, open_device
from bevel.measurement.parity import evaluate_artifacts
from bevel.measurement.runner import decoded
from bevel.runtimes import open_artifact

NOISY = 1.5
"""A p90 this many times the median means that the machine was busy with something else."""

BUSY = 0.5
"""More processors than this busy with other work make a time uncertain."""

DEVICE_IMAGES = 500
"""Accuracy on a device other than this machine is taken on so many images: they are sent there."""

PIECE_BYTES = 32 * 2**20
"""Images go to a device in pieces of about this size."""

EMULATED = (
    "emulated: another machine imitates this device; its answers are true, its times would mean "
    "nothing, so none is given"
)


@dataclass(frozen=True, eq=False)
class Subject:
    """A file to measure.

    Attributes:
        label: what its network is called.
        artifact: the file.
        reference: the float torch network it came from, if at hand.
        batches: its own images (N, C, H, W) and labels (N,), where files see images of other sizes.
    """

    label: str
    artifact: Artifact
    reference: nn.Module | None = None
    batches: Iterable[tuple[Tensor, Tensor]] | None = None


def measure(
    artifact: Artifact | Path | str,
    *,
    label: str = "artifact",
    reference: nn.Module | None = None,
    device: str = "local",
    threads: int = 1,
    batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    split: str = "test",
) -> Measurement:
    """Measure one exported file; see `measure_all`."""
    described = artifact if isinstance(artifact, Artifact) else open_artifact(artifact)
    subject = Subject(label, described, reference)
    return measure_all([subject], device=device, threads=threads, batches=batches, split=split)[0]


def measure_all(
    subjects: Sequence[Subject],
    *,
    device: str = "local",
    threads: int = 1,
    batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    split: str = "test",
) -> list[Measurement]:
    """Measure exported files side by side.

    The time for one image is taken in one fresh process that runs all files in turn, at least 100
    times each after warm-up, so that their ratio is fair. Peak memory is that of a process that
    runs one file alone. Accuracy and parity are of the files themselves over all images, as the
    device computes them. An emulated device has no times and no memory of its own.

    Args:
        subjects: what to measure.
        device: its address, such as `local` or `ssh:pi@raspberrypi.local`.
        threads: threads the runtime may use for the timing.
        batches: images (N, C, H, W) and labels (N,) for accuracy; None leaves it out.
        split: what the images are, for the record.

    Raises:
        MeasurementError: a file does not run, or the device does not answer.
        UnknownNameError: there is no such device or runtime.
    """
    with open_device(device) as place:
        timed = not place.emulated
        busy = place.busy_cores() if timed else None
        latencies = _latencies(place, subjects, threads)
        memory = _memory(place, subjects, threads)
        scores: list[Any] = [(None, None)] * len(subjects)
        if "predict" in place.tasks:
            for images, indices in _by_images(subjects, batches):
                some = [subjects[index] for index in indices]
                found = _scores(place, some, images, split, threads)
                for index, score in zip(indices, found, strict=True):
                    scores[index] = score
        runtimes = dict.fromkeys(subject.artifact.runtime for subject in subjects)
        facts = {runtime: place.facts(runtime) for runtime in runtimes}
    return [
        Measurement(
            label=subject.label,
            artifact=subject.artifact,
            threads=threads,
            device=facts[subject.artifact.runtime],
            latency=latency,
            peak_memory_bytes=peak,
            accuracy=accuracy,
            parity=parity,
            warnings=[
                *_warnings(facts[subject.artifact.runtime], latency, busy),
                *_slower_int8(index, subjects, latencies),
            ],
        )
        for index, (subject, latency, peak, (accuracy, parity)) in enumerate(
            zip(subjects, latencies, memory, scores, strict=True)
        )
    ]


def _by_images(
    subjects: Sequence[Subject], batches: Iterable[tuple[Tensor, Tensor]] | None
) -> list[tuple[Iterable[tuple[Tensor, Tensor]], list[int]]]:
    """Images, and the positions of the subjects that are run over them together."""
    found: dict[int, tuple[Iterable[tuple[Tensor, Tensor]], list[int]]] = {}
    for index, subject in enumerate(subjects):
        images = batches if subject.batches is None else subject.batches
        if images is not None:
            found.setdefault(id(images), (images, []))[1].append(index)
    return list(found.values())


def images_for(device: str) -> int | None:
    """How many test images a device gets; None: all."""
    return None if device == "local" else DEVICE_IMAGES


def _latencies(
    place: Device, subjects: Sequence[Subject], threads: int
) -> Sequence[Latency | None]:
    """All files in turn; none from a device whose times mean nothing."""
    if place.emulated or "latency" not in place.tasks:
        return [None] * len(subjects)
    for _ in track([None], "time for one image", 1):
        found = time_in_turn(place, subjects, threads)
    return found


def time_in_turn(
    place: Device, subjects: Sequence[Subject], threads: int, seconds: float | None = None
) -> list[Latency]:
    """The time for one image of each file, in one fresh process that runs all in turn.

    Args:
        place: where.
        subjects: the files.
        threads: that the runtime may use.
        seconds: for each file, though it runs at least 100 times; None: as the runner has it.
    """
    job, files = _job("latency", subjects)
    result = place.run(job | ({"seconds": seconds} if seconds else {}), files, threads=threads)
    return [
        Latency(samples_ms=[round(ms, 6) for ms in samples], warmup_runs=result["warmup_runs"])
        for samples in result["samples_ms"]
    ]


def _memory(place: Device, subjects: Sequence[Subject], threads: int) -> list[int | None]:
    """Peak bytes of each file alone; an emulator's would be its own, but the files must run."""
    if "memory" not in place.tasks:
        return [None] * len(subjects)
    peaks = [
        int(place.run(*_job("memory", [subject]), threads=threads)["peak_memory_bytes"])
        for subject in track(subjects, "peak memory", len(subjects))
    ]
    return [None] * len(peaks) if place.emulated else [*peaks]


def _scores(
    place: Device,
    subjects: Sequence[Subject],
    batches: Iterable[tuple[Tensor, Tensor]],
    split: str,
    threads: int,
) -> Sequence[Any]:
    """Accuracy and parity of each file, as this device computes them."""
    pairs = [(subject.artifact, subject.reference) for subject in subjects]
    if place.address == "local":
        return evaluate_artifacts(pairs, batches, split)

    def predict(images: np.ndarray) -> list[np.ndarray]:
        with tempfile.TemporaryDirectory(prefix="bevel-") as folder:
            pushed = Path(folder) / "images.npy"
            np.save(pushed, images)
            job, files = _job("predict", subjects)
            result = place.run(
                {**job, "images": pushed.name}, {**files, pushed.name: pushed}, threads=threads
            )
        return [decoded(output) for output in result["outputs"]]

    return evaluate_artifacts(pairs, _pieces(batches), split, predict)


def _pieces(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same images in batches of about `PIECE_BYTES`: each costs a start of the runtime."""
    held: list[tuple[Tensor, Tensor]] = []
    size = 0
    for images, labels in batches:
        share = max(1, PIECE_BYTES // (images[0].nbytes or 1)) if len(images) else 1
        for piece in zip(images.split(share), labels.split(share), strict=True):
            if held and size + piece[0].nbytes > PIECE_BYTES:
                yield _joined(held)
                held, size = [], 0
            held.append(piece)
            size += piece[0].nbytes
    if held:
        yield _joined(held)


def _joined(pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*pieces, strict=True)
    return torch.cat(images), torch.cat(labels)


def _job(task: str, subjects: Sequence[Subject]) -> tuple[dict[str, Any], dict[str, Path]]:
    """A job of the runner, and the files that it names."""
    paths = [Path(subject.artifact.path) for subject in subjects]
    names = [f"{index}-{path.name}" for index, path in enumerate(paths)]
    described = [
        {"runtime": subject.artifact.runtime, "file": name}
        for subject, name in zip(subjects, names, strict=True)
    ]
    return {"task": task, "subjects": described}, dict(zip(names, paths, strict=True))


def _warnings(device: DeviceFacts, latency: Latency | None, busy: float | None) -> list[str]:
    """What makes a number less than it seems."""
    found = [EMULATED] if device.emulated else []
    if latency is None:
        return found
    if latency.p90_ms > NOISY * latency.p50_ms:
        found.append(
            f"noisy timing: p90 {latency.p90_ms:.3g} ms against p50 {latency.p50_ms:.3g} ms; "
            "the machine was busy, measure again"
        )
    if busy is not None and busy > BUSY:
        found.append(f"other work kept {busy:.1f} processors busy just before the timing")
    if device.throttling not in (None, "none"):
        found.append(f"the device was throttled after the timing: {device.throttling}")
    return found


def _slower_int8(
    index: int, subjects: Sequence[Subject], latencies: Sequence[Latency | None]
) -> list[str]:
    """Float32 files of the same runtime that are faster than this int8 file."""
    own, latency = subjects[index].artifact, latencies[index]
    if latency is None or not own.precision.startswith("int8"):
        return []
    found = []
    for other, theirs in zip(subjects, latencies, strict=True):
        beside = other.artifact.runtime == own.runtime
        float32 = other.artifact.precision == "float32"
        if beside and float32 and theirs is not None and theirs.p50_ms < latency.p50_ms:
            found.append(
                f"{own.precision} is slower than {other.label} float32 here "
                f"({latency.p50_ms:.3g} against {theirs.p50_ms:.3g} ms): ship the float32 file"
            )
    return found
