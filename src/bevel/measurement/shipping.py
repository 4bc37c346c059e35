"""Which of the measured files to ship: the fastest whose accuracy is within the budget."""

from __future__ import annotations

from collections.abc import Sequence

from bevel.core.records import Diagnosis, Measurement, Shipment

ACCURACY_DROP = 0.02
"""Accuracy that a file may lose against float32 where the recipe states no budget."""


def choose(
    measurements: Sequence[Measurement],
    diagnoses: Sequence[Diagnosis],
    accuracy_drop: float | None = None,
) -> list[Shipment]:
    """One file for each runtime, device and number of threads, and why that one.

    It is the fastest file of the compressed network that loses at most `accuracy_drop` against
    its float32 file; where nothing was timed, as under emulation, the smallest. The float32 file
    always qualifies.

    Args:
        measurements: of original and compressed files.
        diagnoses: of the compressed files; they say why int8 is not the faster one.
        accuracy_drop: budget, as a share of all images; None: `ACCURACY_DROP`.
    """
    allowed = ACCURACY_DROP if accuracy_drop is None else accuracy_drop
    places: dict[tuple[str, str, int], list[Measurement]] = {}
    for measurement in measurements:
        if measurement.label != "original":
            place = (measurement.artifact.runtime, measurement.device.device, measurement.threads)
            places.setdefault(place, []).append(measurement)
    return [
        _shipment(f"{runtime}@{device}, threads {threads}", files, diagnoses, allowed)
        for (runtime, device, threads), files in places.items()
    ]


def _shipment(
    target: str, files: Sequence[Measurement], diagnoses: Sequence[Diagnosis], allowed: float
) -> Shipment:
    """The choice for one place."""
    base = next((file for file in files if file.artifact.precision == "float32"), None)
    fit = [file for file in files if base is None or _lost(file, base) <= allowed]
    timed = all(file.latency for file in fit)
    best = min(fit, key=_time if timed else lambda file: file.artifact.size_bytes)
    if base is None or len(files) == 1:
        reason = "the only file of this network here"
    elif best is base:
        others = [file for file in files if file is not base]
        first = min(others, key=lambda file: _time(file) if file.latency else 0.0)
        reason = _why_float(first, base, diagnoses, allowed)
    else:
        reason = _why_other(best, base)
    artifact = best.artifact
    return Shipment(target=target, path=artifact.path, precision=artifact.precision, reason=reason)


def _why_other(best: Measurement, base: Measurement) -> str:
    """Why a file that is not float32 is shipped."""
    if best.latency and base.latency:
        said = f"{_time(base) / _time(best):.2f}x faster than float32"
    else:
        said = f"{best.artifact.size_bytes / base.artifact.size_bytes:.0%} of the size of float32"
    if best.accuracy and base.accuracy:
        said += f", accuracy {-100 * _lost(best, base):+.2f} points"
    return said


def _why_float(
    other: Measurement, base: Measurement, diagnoses: Sequence[Diagnosis], allowed: float
) -> str:
    """Why the float32 file is shipped and not the fastest other one."""
    precision = other.artifact.precision
    if _lost(other, base) > allowed:
        return (
            f"{precision} loses {100 * _lost(other, base):.2f} points of accuracy, more than the "
            f"{100 * allowed:.2f} allowed"
        )
    if not (other.latency and base.latency):
        return f"{precision} was not timed here and its file is no smaller"
    said = f"{precision} is {_time(other) / _time(base):.2f}x slower than float32"
    findings = next((d.findings for d in diagnoses if d.artifact == other.artifact), [])
    return f"{said}: {findings[0].message}" if findings else said


def _time(measurement: Measurement) -> float:
    """Median in milliseconds; without one, endless."""
    return measurement.latency.p50_ms if measurement.latency else float("inf")


def _lost(file: Measurement, base: Measurement) -> float:
    """Accuracy lost against the float32 file; 0 where it was not measured."""
    if file.accuracy is None or base.accuracy is None:
        return 0.0
    return base.accuracy.top1 - file.accuracy.top1
