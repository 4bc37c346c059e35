"""The program that runs on the device: times artifacts, states memory, runs images through them.

    python3 runner.pyz JOB.json RESULT.json

A job is {"task", "threads", "files": {name: path}} and what its task needs. It needs the standard
library, numpy and the artifacts' runtimes, and Python 3.10; `bevel.devices._bundle` packs it.

| task | needs | result |
| --- | --- | --- |
| latency | subjects; seconds for each, if not 3 | samples_ms: a list per subject, warmup_runs |
| memory | one subject | peak_memory_bytes |
| predict | subjects, images: name of a .npy file (N, C, H, W) | outputs: an array per subject |
| facts | runtime, or null | the hardware, and the runtime's version |
| busy | | busy_cores |

A subject is {"runtime", "file": name}. Where it fails the result is {"error": one line}.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import random
import resource
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bevel.core import hardware
from bevel.core.errors import BevelError, MeasurementError, one_line

if TYPE_CHECKING:
    import numpy as np

WARMUP_RUNS = 20
LEAST_RUNS = 100
MOST_RUNS = 1000
TURN_RUNS = 5
LEAST_SECONDS = 3.0
MEMORY_RUNS = 5
WATCH_SECONDS = 2.0

PIECE_IMAGES = 32
"""A file gets no more at once: what the layers of more make leaves the processor's caches."""

Job = dict[str, Any]
Result = dict[str, Any]


def run() -> None:
    """Carry out the job that the command line names; a failure is the result, and exit code 1."""
    job_path, result_path = map(Path, sys.argv[1:3])
    result = outcome(json.loads(job_path.read_text(encoding="utf-8")))
    part = result_path.with_name(result_path.name + ".part")
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(result_path)  # so that whoever waits for it finds it whole
    sys.exit("error" in result)


def outcome(job: Job) -> Result:
    """The result of a job, or why there is none."""
    try:
        if "watch" in job:
            threading.Thread(target=_watch, args=(job["watch"],), daemon=True).start()
        return TASKS[job["task"]](job)
    except BevelError as error:
        return {"error": str(error)}
    except ModuleNotFoundError as error:
        package = (error.name or "?").split(".")[0].replace("_", "-")
        return {
            "error": f"the package '{package}' is not installed for {sys.executable} there: "
            f"{sys.executable} -m pip install {package}"
        }
    except Exception as error:  # noqa: BLE001 - whatever it was, its reason must reach the host
        return {"error": one_line(f"{type(error).__name__}: {error}")}


def _watch(watch: dict[str, Any]) -> None:
    """End this process, and remove the job's folder, once nobody asks for the job any more.

    `watch` has the folder, the file in it whose time whoever waits renews, and for how many seconds
    that may be left out.
    """
    folder = Path(watch["folder"])
    while True:
        time.sleep(WATCH_SECONDS)
        try:
            idle = time.time() - (folder / watch["file"]).stat().st_mtime
        except FileNotFoundError:  # whoever waited has cleaned up
            idle = float("inf")
        if idle > watch["seconds"]:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(1)


def _latency(job: Job) -> Result:
    """Time every artifact a few times per round, so that all meet the same moods of the machine.

    One more run begins each turn and is not counted: it finds the caches filled with another file,
    which a device that runs one network again and again does not meet. Each round has another
    order, because a large file may leave the processor hotter than a small one.
    """
    subjects = [(session, _inputs(session)) for session in _sessions(job)]
    for session, inputs in subjects:
        for _ in range(WARMUP_RUNS):
            session.run(inputs)
    samples: list[list[float]] = [[] for _ in subjects]
    turns, generator = list(range(len(subjects))), random.Random(0)  # noqa: S311  # no secret
    enough = job.get("seconds", LEAST_SECONDS) * len(subjects)
    begun = time.perf_counter()
    for runs in range(0, MOST_RUNS, TURN_RUNS):
        if runs >= LEAST_RUNS and time.perf_counter() - begun >= enough:
            break
        generator.shuffle(turns)
        for turn in turns:
            session, inputs = subjects[turn]
            session.run(inputs)
            for _ in range(TURN_RUNS):
                start = time.perf_counter_ns()
                session.run(inputs)
                samples[turn].append((time.perf_counter_ns() - start) / 1e6)
    return {"samples_ms": samples, "warmup_runs": WARMUP_RUNS}


def _memory(job: Job) -> Result:
    """Peak memory of this process after loading and running the only artifact."""
    (session,) = _sessions(job)
    inputs = _inputs(session)
    for _ in range(MEMORY_RUNS):
        session.run(inputs)
    return {"peak_memory_bytes": _peak_bytes()}


def _predict(job: Job) -> Result:
    """First output of every artifact for the images, as base64 of its bytes."""
    import numpy as np

    images = np.load(job["files"][job["images"]], allow_pickle=False)
    return {"outputs": [_encoded(run_batch(session, images)) for session in _sessions(job)]}


def _facts(job: Job) -> Result:
    name = job["runtime"]
    version = load_runtime(name).version() if name is not None else None
    return {**hardware.describe(), "runtime_version": version}


def _busy(_: Job) -> Result:
    return {"busy_cores": hardware.busy_cores()}


TASKS = {
    "latency": _latency,
    "memory": _memory,
    "predict": _predict,
    "facts": _facts,
    "busy": _busy,
}


def load_runtime(name: str) -> Any:
    """The runtime's module, as it was packed."""
    return importlib.import_module(f"bevel.runtimes.{name}")


def run_batch(session: Any, images: np.ndarray) -> np.ndarray:
    """First output for a batch of images; a file with a fixed batch size gets them in turn."""
    import numpy as np

    size = session.inputs[0].shape[0]
    if isinstance(size, int) and size not in (1, len(images)):
        raise MeasurementError(f"the file takes {size} images at a time, got {len(images)}")
    piece = size if isinstance(size, int) else PIECE_IMAGES
    if piece >= len(images):
        first: np.ndarray = session.run([images])[0]
        return first
    starts = range(0, len(images), piece)
    return np.concatenate([session.run([images[i : i + piece]])[0] for i in starts])


def _encoded(array: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(array.tobytes()).decode("ascii")
    return {"shape": array.shape, "dtype": str(array.dtype), "data": data}


def decoded(output: dict[str, Any]) -> np.ndarray:
    """An array of a result."""
    import numpy as np

    flat = np.frombuffer(base64.b64decode(output["data"]), dtype=output["dtype"])
    return flat.reshape(output["shape"])


def _sessions(job: Job) -> list[Any]:
    """A session per subject."""
    return [
        load_runtime(subject["runtime"]).open_session(
            Path(job["files"][subject["file"]]), job["threads"]
        )
        for subject in job["subjects"]
    ]


def _inputs(session: Any) -> list[Any]:
    """Random inputs for one image."""
    import numpy as np  # not at the top: the facts can be told without it

    random = np.random.default_rng(0)
    shapes = [[s if isinstance(s, int) else 1 for s in known.shape] for known in session.inputs]
    return [
        random.standard_normal(shape).astype(known.dtype)
        for shape, known in zip(shapes, session.inputs, strict=True)
    ]


def _peak_bytes() -> int:
    """High-water mark of the resident set. `ru_maxrss` would count the parent's before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
