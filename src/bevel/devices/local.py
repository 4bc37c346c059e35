"""This machine: artifacts run in a fresh process of the same Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bevel.core import hardware, plugins
from bevel.core.errors import MeasurementError, one_line
from bevel.core.records import DeviceFacts
from bevel.devices import THREAD_VARIABLES, TIMEOUT_S, Device, result_of
from bevel.devices._bundle import bundle, runtimes_of


def connect(rest: str) -> Device:
    """This machine; see `bevel.devices.Place`."""
    if rest:
        raise MeasurementError(f"local:{rest}: this machine has no address, write local")
    return LocalDevice()


class LocalDevice(Device):
    """The machine that bevel itself runs on."""

    address = "local"

    def run(
        self, job: Mapping[str, Any], files: Mapping[str, Path], *, threads: int = 1
    ) -> dict[str, Any]:
        """Do a job in a fresh process; see `Device.run`."""
        described = {name: str(path.resolve()) for name, path in files.items()}
        with tempfile.TemporaryDirectory(prefix="bevel-") as name:
            folder = Path(name)
            (folder / "runner.pyz").write_bytes(bundle(runtimes_of(job)))
            (folder / "job.json").write_text(
                json.dumps({**job, "threads": threads, "files": described}), encoding="utf-8"
            )
            return result_of(run_in([sys.executable], folder, threads), "this machine")

    def facts(self, runtime: str | None = None) -> DeviceFacts:
        """The hardware; see `Device.facts`."""
        version = plugins.load("runtimes", runtime).version() if runtime is not None else None
        return DeviceFacts(device="local", runtime_version=version, **hardware.describe())

    def busy_cores(self) -> float | None:
        """What else this machine does; see `Device.busy_cores`."""
        return hardware.busy_cores()


def run_in(python: list[str], folder: Path, threads: int) -> dict[str, Any]:
    """Run `runner.pyz` on `job.json` in a folder of this machine, and read the result.

    Args:
        python: the command that is Python, such as one under an emulator.
        folder: where the two files are, and the result is written.
        threads: for the libraries that read them from the environment.

    Raises:
        MeasurementError: it ended without a result, or was not done in time.
    """
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    result = folder / "result.json"
    command = [*python, str(folder / "runner.pyz"), str(folder / "job.json"), str(result)]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and program
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"the measurement was not done after {TIMEOUT_S} s") from error
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    lines = done.stderr.strip().splitlines()
    return {"error": one_line(lines[-1]) if lines else f"it ended with {done.returncode}"}
