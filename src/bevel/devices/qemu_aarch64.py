"""An emulated Armv8 processor: the real aarch64 builds of the runtimes, run by QEMU's user mode.

It proves that an artifact runs on Armv8 and what it answers there. An emulator's times say nothing
about silicon (float is far slower, and integers less so), so none is ever taken.

The address is `qemu-aarch64`, or `qemu-aarch64:FOLDER` for another place of the aarch64 Python and
its packages than the user's cache folder. They are fetched on first use.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bevel.core.cache import cache_folder
from bevel.core.errors import MeasurementError
from bevel.core.records import DeviceFacts
from bevel.devices import Device, result_of
from bevel.devices._arm64_root import PYTHON, Root, run
from bevel.devices._bundle import bundle, runtimes_of
from bevel.devices.local import run_in

PROCESSOR = "cortex-a72"
"""Armv8.0, as in a Raspberry Pi 4: what runs there runs on every newer one."""

PACKAGES = {"onnxruntime": "onnxruntime", "litert": "ai-edge-litert"}
"""The runtimes whose wheels for aarch64 run in the emulator, and what pip calls them."""


def connect(rest: str) -> Device:
    """The emulator with its files in the folder `rest`; see `bevel.devices.Place`."""
    folder = Path(rest).expanduser() if rest else cache_folder() / "qemu-aarch64"
    if set(str(folder.absolute())) & set(",:"):  # they part the emulator's variables and paths
        raise MeasurementError(f"qemu-aarch64 needs a folder without commas and colons: {folder}")
    return QemuDevice(f"qemu-aarch64:{rest}" if rest else "qemu-aarch64", folder)


class QemuDevice(Device):
    """Python for aarch64 on an emulated processor.

    Args:
        address: as in the recipe.
        folder: holds the emulator, Python and the runtimes; made on first use.

    Raises:
        MeasurementError: this machine is no x86-64 Linux.
    """

    emulated = True
    tasks = frozenset({"memory", "predict"})

    def __init__(self, address: str, folder: Path) -> None:
        here = f"{platform.system()} {platform.machine()}"
        if here != "Linux x86_64":
            raise MeasurementError(
                f"qemu-aarch64 emulates Armv8 on an x86-64 Linux, this is {here}"
                + ("; 'local' is an Armv8 already" if here == "Linux aarch64" else "")
            )
        self.address = address
        self._root = Root(folder.absolute())
        self._emulator: Path | None = None

    def run(
        self, job: Mapping[str, Any], files: Mapping[str, Path], *, threads: int = 1
    ) -> dict[str, Any]:
        """Do a job in a fresh emulated process; see `Device.run`."""
        runtimes = runtimes_of(job)
        python = self.python(_requirement(name) for name in sorted(runtimes))
        described = {name: str(path.resolve()) for name, path in files.items()}
        with tempfile.TemporaryDirectory(prefix="bevel-") as name:
            folder = Path(name)
            (folder / "runner.pyz").write_bytes(bundle(runtimes))
            (folder / "job.json").write_text(
                json.dumps({**job, "threads": threads, "files": described}), encoding="utf-8"
            )
            return result_of(run_in(python, folder, threads), "the emulated Armv8")

    def python(self, requirements: Iterable[str]) -> list[str]:
        """The command that is Python for aarch64, with these packages.

        Raises:
            MeasurementError: something cannot be fetched.
        """
        if self._emulator is None:
            self._emulator = self._root.prepare()
        paths = [str(self._root.install(requirement)) for requirement in requirements]
        system = self._root.system
        command = [str(self._emulator), "-cpu", PROCESSOR, "-L", str(system), "-U", "PYTHONHOME"]
        command += ["-E", f"PYTHONPATH={':'.join(paths)}"]
        return [*command, str(system / f"usr/bin/python{PYTHON}"), "-s"]

    def facts(self, runtime: str | None = None) -> DeviceFacts:
        """The emulated processor; clock, heat and memory are the host's, so they are None."""
        found = super().facts(runtime)
        version = re.search(r"version (\S+)", run([str(self._emulator), "--version"], "QEMU"))
        return found.model_copy(
            update={
                "processor": f"{PROCESSOR}, emulated by QEMU {version[1] if version else '?'}",
                "memory_bytes": None,
                "governor": None,
                "frequency_mhz": None,
                "temperature_c": None,
                "throttling": None,
            }
        )

    def busy_cores(self) -> float | None:
        """Unknown: nothing is timed here."""
        return None


def _requirement(runtime: str) -> str:
    """The wheel of a runtime, of the version that is installed here, so that both can be compared.

    Raises:
        MeasurementError: no wheel of it runs in the emulator.
    """
    package = PACKAGES.get(runtime)
    if package is None:
        raise MeasurementError(
            f"qemu-aarch64 runs {' and '.join(PACKAGES)}, not the runtime '{runtime}'"
        )
    try:
        return f"{package}=={importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package
