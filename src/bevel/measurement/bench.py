"""Measure artifacts on a device: time in turn, memory alone, accuracy and parity on images."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bevel.core import plugins
from bevel.core.progress import track
from bevel.core.records import Artifact, Latency, Measurement
from bevel.devices import Device
from bevel.measurement.parity import evaluate_artifacts
from bevel.runtimes import load_runtime, open_artifact

RUNNER = "bevel.measurement.runner"
NOISY = 1.5
"""A p90 this many times the median means that the machine was busy with something else."""

BUSY = 0.5
"""More processors than this busy with other work make a time uncertain."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A file to measure: its label, and the float torch network it came from, if at hand."""

    label: str
    artifact: Artifact
    reference: nn.Module | None = None


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
    runs one file alone. Accuracy and parity are of the files themselves over all images.

    Args:
        subjects: what to measure.
        device: see `bevel list devices`.
        threads: threads the runtime may use for the timing.
        batches: images (N, C, H, W) and labels (N,) for accuracy; None leaves it out.
        split: what the images are, for the record.

    Raises:
        MeasurementError: a file does not run, or the device does not answer.
        UnknownNameError: there is no such device or runtime.
    """
    place: Device = plugins.load("devices", device)
    busy = place.busy_cores()
    latencies = _latencies(place, subjects, threads)
    memory = [
        _run(place, "memory", [subject], threads)["peak_memory_bytes"]
        for subject in track(subjects, "peak memory", len(subjects))
    ]
    scores: Sequence[Any] = [(None, None)] * len(subjects)
    if batches is not None:
        pairs = [(subject.artifact, subject.reference) for subject in subjects]
        scores = evaluate_artifacts(pairs, batches, split)
    return [
        Measurement(
            label=subject.label,
            artifact=subject.artifact,
            threads=threads,
            device=place.facts(load_runtime(subject.artifact.runtime).version()),
            latency=latency,
            peak_memory_bytes=peak,
            accuracy=accuracy,
            parity=parity,
            warnings=_warnings(index, subjects, latencies, busy),
        )
        for index, (subject, latency, peak, (accuracy, parity)) in enumerate(
            zip(subjects, latencies, memory, scores, strict=True)
        )
    ]


def _latencies(place: Device, subjects: Sequence[Subject], threads: int) -> list[Latency]:
    for _ in track([None], "time for one image", 1):
        result = _run(place, "latency", subjects, threads)
    return [
        Latency(samples_ms=[round(ms, 6) for ms in samples], warmup_runs=result["warmup_runs"])
        for samples in result["samples_ms"]
    ]


def _run(place: Device, task: str, subjects: Sequence[Subject], threads: int) -> dict[str, Any]:
    """Let the runner do a task on the device."""
    described = [
        {"runtime": subject.artifact.runtime, "path": str(Path(subject.artifact.path).resolve())}
        for subject in subjects
    ]
    with tempfile.TemporaryDirectory(prefix="bevel-") as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write_text(json.dumps({"task": task, "threads": threads, "subjects": described}))
        place.run_module(RUNNER, [str(job), str(result)], threads=threads)
        outcome: dict[str, Any] = json.loads(result.read_text())
        return outcome


def _warnings(
    index: int,
    subjects: Sequence[Subject],
    latencies: Sequence[Latency],
    busy: float | None,
) -> list[str]:
    """What makes a number less than it seems."""
    own, latency = subjects[index], latencies[index]
    found = []
    if latency.p90_ms > NOISY * latency.p50_ms:
        found.append(
            f"noisy timing: p90 {latency.p90_ms:.3g} ms against p50 {latency.p50_ms:.3g} ms; "
            "the machine was busy, measure again"
        )
    if busy is not None and busy > BUSY:
        found.append(f"other work kept {busy:.1f} processors busy just before the timing")
    if own.artifact.precision == "int8":
        for other, theirs in zip(subjects, latencies, strict=True):
            beside = other.artifact.runtime == own.artifact.runtime
            float32 = other.artifact.precision == "float32"
            if beside and float32 and theirs.p50_ms < latency.p50_ms:
                found.append(
                    f"int8 is slower than {other.label} float32 here ({latency.p50_ms:.3g} "
                    f"against {theirs.p50_ms:.3g} ms): ship the float32 file"
                )
    return found
