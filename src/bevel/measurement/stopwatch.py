"""Times a network against its original on a target, both exported and run in turn there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from torch import Tensor, nn

from bevel.core.errors import MeasurementError
from bevel.core.recipe import Quantization, Target
from bevel.core.records import Artifact, Operator
from bevel.devices import open_device
from bevel.measurement.bench import Subject, time_in_turn
from bevel.measurement.doctor import profiled
from bevel.measurement.runner import TURN_RUNS
from bevel.runtimes import export, load_runtime

PROFILED = "local"
"""A runtime's own profiler runs in this process, so it tells of this device only."""


class Stopwatch:
    """A context manager; what it exports is gone at its end.

    Args:
        original: the network that others are compared with.
        example: images (N, C, H, W).
        target: runtime, precision, device and threads.
        calibration: batches of images, or tuples that start with them, for int8.
        quantization: how float becomes int8.
    """

    def __init__(
        self,
        original: nn.Module,
        example: Tensor,
        target: Target,
        calibration: Iterable[object] = (),
        quantization: Quantization | None = None,
    ) -> None:
        self.original, self.example, self.target = original, example, target
        self.calibration, self.quantization = list(calibration) or [example], quantization
        self._artifact: Artifact | None = None

    def __enter__(self) -> Stopwatch:
        self._holder = tempfile.TemporaryDirectory(prefix="bevel-")
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.cleanup()

    @property
    def folder(self) -> Path:
        """For what is of use only until the end."""
        return Path(self._holder.name)

    def about(self) -> dict[str, str]:
        """What a time depends on besides the network: the device, its processor, versions."""
        target = self.target
        with open_device(target.device) as place:
            if place.emulated:
                raise MeasurementError(
                    f"{target.device} is emulated: its times mean nothing, so no latency can be "
                    "budgeted there; name a real device"
                )
            facts = place.facts(target.runtime)
        return {
            "target": str(target),
            "threads": str(target.threads),
            "processor": str(facts.processor),
            "system": facts.system,
            "runtime": str(facts.runtime_version),
            "bevel": version("bevel"),
            "runs of a turn": str(TURN_RUNS),
            "quantization": (self.quantization or Quantization()).model_dump_json(),
        }

    def compare(self, net: nn.Module, *, seconds: float | None = None) -> tuple[float, float]:
        """Median milliseconds for one image of the original and of this network, timed in turn.

        Args:
            net: exported anew at every call.
            seconds: for each of the two; None: as `bevel measure` takes.
        """
        if self._artifact is None:
            self._artifact = self._exported("original", self.original)
        files = [self._artifact]
        if net is not self.original:
            files.append(self._exported("other", net))
        subjects = [Subject(Path(file.path).stem, file) for file in files]
        with open_device(self.target.device) as place:
            found = time_in_turn(place, subjects, self.target.threads, seconds)
        return found[0].p50_ms, found[-1].p50_ms

    def operators(self, net: nn.Module) -> list[Operator]:
        """The operators of the file that was compared last, timed where the runtime can tell."""
        has_profiler = hasattr(load_runtime(self.target.runtime), "profile")
        if self.target.device != PROFILED or not has_profiler:
            return []
        if net is self.original and self._artifact is not None:
            return profiled(self._artifact, self.target.threads)
        return profiled(self._last, self.target.threads)

    def _exported(self, name: str, net: nn.Module) -> Artifact:
        runtime = load_runtime(self.target.runtime, self.target.precision)
        self._last = export(
            net,
            self.example,
            runtime=self.target.runtime,
            precision=self.target.precision,
            calibration=self.calibration if self.target.precision == "int8" else None,
            quantization=self.quantization,
            path=self.folder / f"{name}{runtime.SUFFIX}",
        )
        return self._last
