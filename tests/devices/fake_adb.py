#!/usr/bin/env python3
"""A stand-in for the program adb: one scripted phone whose files lie in the folder FAKE_PHONE.

Its shell runs the scripts that it gets with this machine's sh, in a world where the phone's own
programs are imitated after what real ones are known to print. FAKE_PHONE/devices is what
`adb devices` lists, FAKE_PHONE/calls what was asked, FAKE_PHONE/fault makes something go wrong.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PHONE = Path(os.environ["FAKE_PHONE"])
ON_PHONE = "/data/local/tmp"

PROPERTIES = {
    "ro.product.manufacturer": "Google",
    "ro.product.model": "Pixel 6",
    "ro.soc.manufacturer": "Google",
    "ro.soc.model": "Tensor",
    "ro.board.platform": "gs101",
    "ro.build.version.release": "14",
}

KNOWN = [f"{name}) echo '{value}';;" for name, value in PROPERTIES.items()]

PROGRAMS = {
    "getprop": "case $1 in "
    + " ".join(f"{k}) echo '{v}';;" for k, v in PROPERTIES.items())
    + " esac",
    "uname": "case $1 in -r) echo 5.10.198-android13-4-00050;; -m) echo aarch64;; esac",
    "dumpsys": 'echo "IsStatusOverride: false"; echo "Thermal Status: ${FAKE_THERMAL:-0}"',
    "logcat": "true",
    "sleep": "true",
}

CLUSTERS = {0: (1803000, "1328000"), 4: (2253000, "1491000"), 6: (2802000, "2401000")}
STAT = ("cpu  1000 0 1000 8000 0 0 0 0 0 0", "cpu  1050 0 1050 8300 0 0 0 0 0 0")


def make_phone() -> None:
    """The phone's file system and programs, as far as the scripts look at them."""
    (PHONE / ON_PHONE[1:]).mkdir(parents=True)
    (PHONE / "proc").mkdir()
    (PHONE / "proc/meminfo").write_text("MemTotal:        7657816 kB\nMemFree:   232040 kB\n")
    for core in range(8):
        (PHONE / f"sys/devices/system/cpu/cpu{core}").mkdir(parents=True)
    for core, (highest, now) in CLUSTERS.items():
        clock = PHONE / f"sys/devices/system/cpu/cpu{core}/cpufreq"
        clock.mkdir()
        (clock / "cpuinfo_max_freq").write_text(f"{highest}\n")
        (clock / "scaling_max_freq").write_text(f"{highest}\n")
        (clock / "scaling_cur_freq").write_text(f"{now}\n")
        (clock / "scaling_governor").write_text("sched_pixel\n")
    for number, (kind, heat) in enumerate(
        (("battery", 30100), ("BIG-cpu", 52000), ("cpu1", 48000))
    ):
        zone = PHONE / f"sys/class/thermal/thermal_zone{number}"
        zone.mkdir(parents=True)
        (zone / "type").write_text(f"{kind}\n")
        (zone / "temp").write_text(f"{heat}\n")
    (PHONE / "bin").mkdir()
    for name, body in PROGRAMS.items():
        program = PHONE / "bin" / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)


def on_phone(text: str) -> str:
    """A script with the phone's paths as this machine has them."""
    return re.sub(r"(?<![\w./])/(data|proc|sys)/", rf"{PHONE}/\1/", text)


def shell(script: str) -> int:
    """Run a script as the phone's shell would."""
    for line in STAT:  # each reading of the clock ticks is later than the one before
        script = script.replace("head -n 1 /proc/stat", f"echo '{line}'", 1)
    path = f"{PHONE / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", on_phone(script)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    sys.stdout.write(done.stdout.replace(str(PHONE), ""))
    sys.stderr.write(done.stderr.replace(str(PHONE), ""))
    return done.returncode


def fail(message: str) -> int:
    sys.stderr.write(f"{message}\n")
    return 1


def main(arguments: list[str]) -> int:
    if not (PHONE / "bin").exists():
        make_phone()
    with (PHONE / "calls").open("a") as calls:
        calls.write(" ".join(arguments) + "\n")
    fault = (PHONE / "fault").read_text() if (PHONE / "fault").exists() else ""
    if arguments == ["devices"]:
        listed = (PHONE / "devices").read_text()
        sys.stdout.write(f"List of devices attached\n{listed}\n")
        return 0
    if fault == "gone":
        return fail(f"error: device '{arguments[1]}' not found")
    verb, *rest = arguments[2:]
    if verb == "push":
        if fault == "full":
            reason = "remote write failed: No space left on device"
            return fail(f"adb: error: failed to copy '{rest[0]}' to '{rest[1]}': {reason}")
        shutil.copy(rest[0], on_phone(rest[1]))
        sys.stdout.write(
            f"{rest[0]}: 1 file pushed, 0 skipped. 62.1 MB/s (3739344 bytes in 0.1s)\n"
        )
        return 0
    if verb == "shell":
        return shell(rest[0])
    return fail(f"adb: unknown command {verb}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
