"""The machine that this process runs on, from /proc and /sys where there are any.

Standard library only: the runner takes this file along to devices that have no bevel.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

CPU = Path("/sys/devices/system/cpu/cpu0")
FIRMWARE_THROTTLING = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")
FIRMWARE_WORDS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "too warm"}
"""Bits of a Raspberry Pi's firmware that tell of this moment; the higher ones are of the past."""


def describe() -> dict[str, Any]:
    """The fields of `DeviceFacts` that the machine itself can tell; None for what it does not."""
    frequency = _number(CPU / "cpufreq/scaling_cur_freq")
    temperature = _number(Path("/sys/class/thermal/thermal_zone0/temp"))
    memory = _field(Path("/proc/meminfo"), "MemTotal")
    mhz = _field(Path("/proc/cpuinfo"), "cpu MHz")
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": int(memory.split()[0]) * 1024 if memory else None,
        "governor": _text(CPU / "cpufreq/scaling_governor"),
        "frequency_mhz": frequency / 1000 if frequency else float(mhz) if mhz else None,
        "temperature_c": temperature / 1000 if temperature else None,
        "throttling": throttling(),
    }


def throttling() -> str | None:
    """What holds the clock down right now, "none", or None where the system does not tell."""
    flags = _text(FIRMWARE_THROTTLING)
    if flags is not None:
        bits = int(flags, 16)
        return ", ".join(word for bit, word in FIRMWARE_WORDS.items() if bits >> bit & 1) or "none"
    highest = _number(CPU / "cpufreq/cpuinfo_max_freq")
    allowed = _number(CPU / "cpufreq/scaling_max_freq")
    if highest is None or allowed is None:
        return None
    capped = f"frequency capped at {allowed / 1000:.0f} of {highest / 1000:.0f} MHz"
    return capped if allowed < highest else "none"


def usable_cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def _processor() -> str | None:
    """The processor's name; an Arm board tells its own in the device tree."""
    board = _text(Path("/proc/device-tree/model"))
    name = _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or None
    return name or (board.rstrip("\0") if board else None)


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
