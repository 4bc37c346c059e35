"""What an Android phone tells of itself: scripts for its shell, and what their output means."""

from __future__ import annotations

import re
from typing import Any

FACTS_SCRIPT = r"""
echo "maker=$(getprop ro.product.manufacturer) $(getprop ro.product.model)"
echo "chip=$(getprop ro.soc.manufacturer) $(getprop ro.soc.model)"
echo "board=$(getprop ro.board.platform)"
echo "release=$(getprop ro.build.version.release)"
echo "kernel=$(uname -r)"
echo "machine=$(uname -m)"
echo "cores=$(ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l)"
grep MemTotal /proc/meminfo
for f in /sys/devices/system/cpu/cpu[0-9]*/cpufreq; do
  echo "clock=$(cat $f/cpuinfo_max_freq) $(cat $f/scaling_max_freq) $(cat $f/scaling_cur_freq) \
$(cat $f/scaling_governor)"
done 2>/dev/null
for z in /sys/class/thermal/thermal_zone*; do
  echo "heat=$(cat $z/type) $(cat $z/temp)"
done 2>/dev/null
dumpsys thermalservice 2>/dev/null | grep 'Thermal Status'
true
"""

STAT_SCRIPT = (
    "head -n 1 /proc/stat; sleep 0.5; head -n 1 /proc/stat; ls -d /sys/devices/system/cpu/cpu[0-9]*"
)

THERMAL_STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
"""Android's own words for its thermal status."""


def facts(output: str) -> dict[str, Any]:
    """The fields of `DeviceFacts` in what `FACTS_SCRIPT` printed; None for what it did not tell.

    Clock and governor are those of the core that can run fastest.
    """
    told: dict[str, str] = {}
    clocks, heats = [], []
    for line in output.splitlines():
        name, _, value = line.partition("=")
        if name == "clock":
            clocks.append(value.split())
        elif name == "heat":
            heats.append(value.split())
        elif value.strip():
            told[name] = value.strip()
    memory = re.search(r"MemTotal:\s+(\d+) kB", output)
    clock = max((c for c in clocks if len(c) == 4), key=lambda c: int(c[0]), default=None)
    chip = " ".join(filter(None, (told.get("maker"), told.get("chip") or told.get("board"))))
    return {
        "system": f"Android {told.get('release', '?')}, Linux {told.get('kernel', '?')}",
        "architecture": told.get("machine", "unknown"),
        "processor": chip or None,
        "cores": int(told.get("cores", "1")),
        "memory_bytes": int(memory[1]) * 1024 if memory else None,
        "governor": clock[3] if clock else None,
        "frequency_mhz": int(clock[2]) / 1000 if clock else None,
        "temperature_c": _temperature(heats),
        "throttling": _throttling(output, clock),
    }


def _temperature(heats: list[list[str]]) -> float | None:
    """The warmest sensor of the processor, in degrees; some count thousandths of them."""
    found = [
        float(value[1])
        for value in heats
        if len(value) == 2 and "cpu" in value[0].lower() and value[1].lstrip("-").isdigit()
    ]
    degrees = [value / 1000 if abs(value) > 200 else value for value in found]
    return max((value for value in degrees if -60 < value < 150), default=None)


def _throttling(output: str, clock: list[str] | None) -> str | None:
    """What holds the clock down, "none", or None where the phone does not tell."""
    status = re.search(r"Thermal Status: (\d+)", output)
    if status and 0 < int(status[1]) < len(THERMAL_STATUS):
        return f"thermal status {THERMAL_STATUS[int(status[1])]}"
    if clock and int(clock[1]) < int(clock[0]):
        return f"frequency capped at {int(clock[1]) / 1000:.0f} of {int(clock[0]) / 1000:.0f} MHz"
    return "none" if status or clock else None


def busy_cores(output: str) -> float | None:
    """Processors that were busy between the two readings that `STAT_SCRIPT` printed."""
    lines = output.splitlines()
    readings = [[int(t) for t in line.split()[1:9]] for line in lines if line.startswith("cpu ")]
    cores = sum(line.startswith("/sys/") for line in lines)
    if len(readings) != 2 or not cores:
        return None
    spent = [after - before for before, after in zip(*readings, strict=True)]
    total = sum(spent)
    return (1 - (spent[3] + spent[4]) / total) * cores if total else 0.0
