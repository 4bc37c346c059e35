"""The program that runs on the device: times artifacts, or states the memory of one.

    python -m bevel.measurement.runner JOB.json RESULT.json

It needs numpy and the artifacts' runtimes, nothing else of bevel's stages.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bevel.core import plugins
from bevel.core.errors import BevelError

WARMUP_RUNS = 20
LEAST_RUNS = 100
MOST_RUNS = 1000
LEAST_SECONDS = 3.0
MEMORY_RUNS = 5


def main(job_path: str, result_path: str) -> None:
    """Carry out a job and write its result as JSON."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    result = {"latency": _latency, "memory": _memory}[job["task"]](job)
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


def _latency(job: dict[str, Any]) -> dict[str, Any]:
    """Time every artifact once per round, so that all meet the same moods of the machine."""
    subjects = [_open(subject, job["threads"]) for subject in job["subjects"]]
    for session, inputs in subjects:
        for _ in range(WARMUP_RUNS):
            session.run(inputs)
    samples: list[list[float]] = [[] for _ in subjects]
    begun = time.perf_counter()
    for rounds in range(MOST_RUNS):
        if rounds >= LEAST_RUNS and time.perf_counter() - begun >= LEAST_SECONDS * len(subjects):
            break
        for (session, inputs), times in zip(subjects, samples, strict=True):
            start = time.perf_counter_ns()
            session.run(inputs)
            times.append((time.perf_counter_ns() - start) / 1e6)
    return {"samples_ms": samples, "warmup_runs": WARMUP_RUNS}


def _memory(job: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of this process after loading and running the only artifact."""
    session, inputs = _open(job["subjects"][0], job["threads"])
    for _ in range(MEMORY_RUNS):
        session.run(inputs)
    return {"peak_memory_bytes": _peak_bytes()}


def _open(subject: dict[str, Any], threads: int) -> tuple[Any, list[np.ndarray]]:
    """A session, and random inputs for one image."""
    session = plugins.load("runtimes", subject["runtime"]).open_session(
        Path(subject["path"]), threads
    )
    random = np.random.default_rng(0)
    inputs = []
    for signature in session.inputs:
        shape = [size if isinstance(size, int) else 1 for size in signature.shape]
        inputs.append(random.standard_normal(shape).astype(signature.dtype))
    return session, inputs


def _peak_bytes() -> int:
    """High-water mark of the resident set. `ru_maxrss` would count the parent's before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BevelError as error:
        sys.exit(str(error))
