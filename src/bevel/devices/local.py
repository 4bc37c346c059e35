"""This machine: artifacts run in a fresh process of the same Python."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bevel.core.errors import MeasurementError, one_line
from bevel.core.records import DeviceFacts

TIMEOUT_S = 1800
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def facts(runtime_version: str | None = None) -> DeviceFacts:
    """Processor, memory, clock and temperature, from /proc and /sys where there are any."""
    frequency = _number(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"))
    temperature = _number(Path("/sys/class/thermal/thermal_zone0/temp"))
    governor = _text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"))
    memory = _field(Path("/proc/meminfo"), "MemTotal")
    mhz = _field(Path("/proc/cpuinfo"), "cpu MHz")
    return DeviceFacts(
        device="local",
        system=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        processor=_field(Path("/proc/cpuinfo"), "model name") or platform.processor() or None,
        cores=os.cpu_count() or 1,
        memory_bytes=int(memory.split()[0]) * 1024 if memory else None,
        governor=governor,
        frequency_mhz=frequency / 1000 if frequency else float(mhz) if mhz else None,
        temperature_c=temperature / 1000 if temperature else None,
        runtime_version=runtime_version,
    )


def busy_cores() -> float | None:
    """Processors that are busy while this process sleeps for half a second, from /proc/stat.

    The load average would count what this process itself did in the minute before.
    """
    before = _processor_times()
    time.sleep(0.5)
    after = _processor_times()
    if before is None or after is None:
        return None
    idle, total = after[0] - before[0], after[1] - before[1]
    return (1 - idle / total) * (os.cpu_count() or 1) if total else 0.0


def run_module(module: str, arguments: Sequence[str], *, threads: int) -> None:
    """Run a Python module in a fresh process; see `Device.run_module`."""
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"{module} was not done after {TIMEOUT_S} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = one_line(lines[-1]) if lines else f"it ended with {done.returncode}"
        raise MeasurementError(f"the measurement failed on this machine: {reason}")


def _processor_times() -> tuple[int, int] | None:
    """Idle and total time of all processors since the start, in ticks."""
    line = (_text(Path("/proc/stat")) or "").partition("\n")[0]
    if not line.startswith("cpu "):
        return None
    ticks = [int(field) for field in line.split()[1:9]]  # guest time is part of user time
    return ticks[3] + ticks[4], sum(ticks)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:  # not every system has the file: then the fact is unknown
        return None


def _number(path: Path) -> float | None:
    text = _text(path)
    return float(text) if text is not None and text.lstrip("-").isdigit() else None


def _field(path: Path, name: str) -> str | None:
    """The value of the first `name : value` line."""
    for line in (_text(path) or "").splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip() or None
    return None
