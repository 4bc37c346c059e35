"""Devices: where an artifact is run. One file each; the file name is the device's name.

A target's device is an address, `NAME` or `NAME:REST`: `local`, `ssh:pi@raspberrypi.local`,
`qemu-aarch64`, `adb:SERIAL`. The name finds the file (`qemu_aarch64.py` is `qemu-aarch64`), whose
`connect(rest)` gives a `Device`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol

from bevel.core import plugins
from bevel.core.errors import MeasurementError
from bevel.core.records import DeviceFacts

TIMEOUT_S = 1800
"""No job takes longer: then it is ended."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Device(ABC):
    """A machine that runs the runner's jobs; a context manager, closed at its end.

    Attributes:
        address: as in the recipe, such as `ssh:pi@raspberrypi.local`.
        emulated: its answers are true and its times mean nothing, so none is reported.
        tasks: what it can do of the runner's tasks, see `bevel.measurement.runner`.
    """

    address: str
    emulated: ClassVar[bool] = False
    tasks: ClassVar[frozenset[str]] = frozenset({"latency", "memory", "predict"})

    @abstractmethod
    def run(
        self, job: Mapping[str, Any], files: Mapping[str, Path], *, threads: int = 1
    ) -> dict[str, Any]:
        """Do one job in a fresh process on the device, and give back its result.

        Args:
            job: what `bevel.measurement.runner` reads, less `threads` and `files`.
            files: what the job needs, by the name it has in the job. The subjects' files stay on
                the device under their hash, so that they are pushed once; others, such as images,
                go with the job.
            threads: what the runtime may use.

        Raises:
            MeasurementError: the device does not answer, or the job failed; one line says why.
        """

    def facts(self, runtime: str | None = None) -> DeviceFacts:
        """The hardware, as far as its system tells, and the version of a runtime there."""
        found = self.run({"task": "facts", "runtime": runtime}, {})
        return DeviceFacts(device=self.address, emulated=self.emulated, **found)

    def busy_cores(self) -> float | None:
        """Processors that something else keeps busy right now; None if the system does not tell."""
        busy: float | None = self.run({"task": "busy"}, {})["busy_cores"]
        return busy

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Give back what is held: nothing of it runs or lies about on the device any more."""

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Place(Protocol):
    """What a device's module offers."""

    def connect(self, rest: str) -> Device:
        """The device at an address, less its name: "" for `local`.

        Raises:
            MeasurementError: the rest is no address, or nothing answers there.
        """
        ...


def split_address(address: str) -> tuple[str, str]:
    """The name of a device, and the rest of its address: `ssh`, `pi@raspberrypi.local`."""
    name, _, rest = address.partition(":")
    return name, rest


def open_device(address: str) -> Device:
    """The device at this address.

    Raises:
        UnknownNameError: there is no such kind of device.
        MissingDependencyError: it needs a package that is not installed.
        MeasurementError: the address is none, or nothing answers there.
    """
    name, rest = split_address(address)
    place: Place = plugins.load("devices", name)
    return place.connect(rest)


def result_of(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a job's result holds, unless that is the reason why there is none.

    Args:
        found: the JSON object that the runner wrote.
        where: the device in words, such as "this machine".

    Raises:
        MeasurementError: the job failed.
    """
    if "error" in found:
        raise MeasurementError(f"the measurement failed on {where}: {found['error']}")
    return dict(found)
