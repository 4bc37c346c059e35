"""Which of a run's files goes into the kit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bevel.core.errors import RunFolderError
from bevel.core.recipe import Recipe
from bevel.core.records import Measurement, RunRecord
from bevel.measurement.shipping import choose


def select(record: RunRecord, recipe: Recipe, target: str | None) -> Measurement:
    """The measurement of the file to pack.

    Args:
        record: a finished run.
        recipe: of that run.
        target: `RUNTIME`, `RUNTIME:PRECISION`, either with `@DEVICE`, as the recipe's targets are
            written; None for a run whose targets share a runtime. Without a precision it is the
            file that the report says to ship.

    Raises:
        RunFolderError: no file, or files of several runtimes, fit the target.
    """
    compressed = [found for found in record.measurements if found.label != "original"]
    runtime, precision, device = _parts(target)
    fitting = [
        found
        for found in compressed
        if runtime in (None, found.artifact.runtime)
        and precision in (None, found.artifact.precision)
        and device in (None, found.device.device)
    ]
    if not fitting:
        problem = f"no file for '{target}'" if target else "no measured file"
        raise RunFolderError(f"the run has {problem}; it has {_list(compressed) or 'none'}")
    if precision is None:
        fitting = _shipped(fitting, record, recipe)
    if len({Path(found.artifact.path).name for found in fitting}) > 1:
        raise RunFolderError(
            f"the run has files for several targets: name one with --target, such as "
            f"{_name(fitting[0])}; it has {_list(compressed)}"
        )
    return fitting[0]


def _shipped(
    fitting: Sequence[Measurement], record: RunRecord, recipe: Recipe
) -> list[Measurement]:
    """Of these the files that the report says to ship: one for each place."""
    shipments = record.shipments or choose(
        record.measurements, record.diagnoses, recipe.quantization.accuracy_drop
    )
    names = {Path(shipment.path).name for shipment in shipments}
    return [found for found in fitting if Path(found.artifact.path).name in names]


def _parts(target: str | None) -> tuple[str | None, str | None, str | None]:
    """Runtime, precision and device; a device's address may hold colons of its own."""
    what, _, device = (target or "").partition("@")
    runtime, _, precision = what.partition(":")
    return runtime or None, precision or None, device or None


def _name(found: Measurement) -> str:
    return f"{found.artifact.runtime}:{found.artifact.precision}@{found.device.device}"


def _list(found: Sequence[Measurement]) -> str:
    return ", ".join(dict.fromkeys(map(_name, found)))
