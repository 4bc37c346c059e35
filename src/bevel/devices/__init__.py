"""Devices: where an artifact is run. One file each; the file name is the device's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from bevel.core.records import DeviceFacts


class Device(Protocol):
    """What a device's module offers."""

    def facts(self, runtime_version: str | None = None) -> DeviceFacts:
        """The hardware, as far as the system tells."""
        ...

    def busy_cores(self) -> float | None:
        """Processors that something else keeps busy right now; None if the system does not tell."""
        ...

    def run_module(self, module: str, arguments: Sequence[str], *, threads: int) -> None:
        """Run a Python module in a fresh process with this many threads, until it is done.

        Raises:
            MeasurementError: it failed; the last line it printed says why.
        """
        ...
