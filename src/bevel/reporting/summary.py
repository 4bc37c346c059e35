"""The summary table: what was measured of the original and of the compressed network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bevel.core.records import Cost, Measurement, RunRecord

COLUMNS = (
    "network",
    "accuracy",
    "MACs",
    "params",
    "file",
    "latency p50 (p90), ms",
    "memory",
    "agreement",
)
"""Headings of `table`, in order."""

NONE = "-"
"""Shown where a number was not measured."""


def rows(record: RunRecord) -> list[dict[str, Any]]:
    """The summary as plain numbers, one mapping per measured file, originals first.

    Units are in the keys. `speedup` is the p50 latency of the original's file divided by this
    file's, `macs_ratio` and the like are this network's number divided by the original's. None
    stands for what was not measured.
    """
    return [
        _row(measurement, cost(record, measurement), record)
        for measurement in ordered(record.measurements)
    ]


def ordered(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Measurements by runtime; the original before the compressed, float before int8."""
    return sorted(
        measurements,
        key=lambda m: (
            m.artifact.runtime,
            m.device.device,
            m.threads,
            m.label != "original",
            m.label,
            m.artifact.precision,
        ),
    )


def cost(record: RunRecord, measurement: Measurement) -> Cost | None:
    """MACs and parameters of the network that a measured file holds."""
    return record.original if measurement.label == "original" else record.compressed


def baseline(record: RunRecord, measurement: Measurement) -> Measurement | None:
    """The original's file on the same runtime, device and threads; float32 where there is one."""
    same = [
        other
        for other in record.measurements
        if other.label == "original"
        and other.artifact.runtime == measurement.artifact.runtime
        and other.device.device == measurement.device.device
        and other.threads == measurement.threads
    ]
    return min(same, key=lambda other: other.artifact.precision, default=None)


def _row(measurement: Measurement, own: Cost | None, record: RunRecord) -> dict[str, Any]:
    """One row of `rows`."""
    before, whole = baseline(record, measurement), record.original
    latency, accuracy, parity = measurement.latency, measurement.accuracy, measurement.parity
    p50 = latency.p50_ms if latency else None
    p50_before = before.latency.p50_ms if before and before.latency else None
    return {
        "label": measurement.label,
        "precision": measurement.artifact.precision,
        "runtime": measurement.artifact.runtime,
        "device": measurement.device.device,
        "threads": measurement.threads,
        "accuracy": accuracy.top1 if accuracy else None,
        "images": accuracy.images if accuracy else None,
        "macs": own.macs if own else None,
        "macs_ratio": _ratio(own.macs, whole.macs) if own and whole else None,
        "params": own.params if own else None,
        "params_ratio": _ratio(own.params, whole.params) if own and whole else None,
        "size_bytes": measurement.artifact.size_bytes,
        "size_ratio": _ratio(
            measurement.artifact.size_bytes, before.artifact.size_bytes if before else None
        ),
        "latency_p50_ms": p50,
        "latency_p90_ms": latency.p90_ms if latency else None,
        "latency_p99_ms": latency.p99_ms if latency else None,
        "speedup": _ratio(p50_before, p50),
        "peak_memory_bytes": measurement.peak_memory_bytes,
        "top1_agreement": parity.top1_agreement if parity else None,
        "max_difference": parity.max_difference if parity else None,
        "mean_difference": parity.mean_difference if parity else None,
        "file": measurement.artifact.path,
    }


def _ratio(part: float | None, whole: float | None) -> float | None:
    """`part / whole`, or None where either is unknown or the whole is zero."""
    return part / whole if part is not None and whole else None


def table(record: RunRecord) -> list[list[str]]:
    """The summary as text, one list per row with the cells of `COLUMNS`."""
    numbers = rows(record)
    places = {(row["runtime"], row["device"], row["threads"]) for row in numbers}
    return [_cells(row, several=len(places) > 1) for row in numbers]


def _cells(row: dict[str, Any], *, several: bool) -> list[str]:
    """One row of `table`; the place is named where the rows come from several."""
    name = f"{row['label']} {row['precision']}"
    if several:
        name += f", {row['runtime']}@{row['device']}, threads {row['threads']}"
    compressed = row["label"] != "original"
    latency = NONE
    if row["latency_p50_ms"] is not None:
        latency = f"{milliseconds(row['latency_p50_ms'])} ({milliseconds(row['latency_p90_ms'])})"
        if row["speedup"] is not None and not is_baseline(row):
            latency += _speed(row["speedup"])
    return [
        name,
        percent(row["accuracy"], 2),
        _with_ratio(count(row["macs"]), row["macs_ratio"] if compressed else None),
        _with_ratio(count(row["params"]), row["params_ratio"] if compressed else None),
        _with_ratio(size(row["size_bytes"]), None if is_baseline(row) else row["size_ratio"]),
        latency,
        size(row["peak_memory_bytes"]),
        percent(row["top1_agreement"], 2),
    ]


def is_baseline(row: dict[str, Any]) -> bool:
    """Whether a row is the one that the ratios of its runtime refer to."""
    return bool(row["label"] == "original" and row["precision"] == "float32")


def _with_ratio(text: str, ratio: float | None) -> str:
    return text if ratio is None else f"{text} ({ratio:.0%})"


MEASURED = ("file", "accuracy", "size", "latency p50 (p90, p99), ms", "memory", "threads")
"""Headings of `measured`, in order."""


def measured(measurements: Sequence[Measurement]) -> list[list[str]]:
    """Files measured side by side, as text; latency ratios refer to the first."""
    first = measurements[0].latency if measurements else None
    found = []
    for position, measurement in enumerate(measurements):
        latency = NONE
        if own := measurement.latency:
            p50, p90, p99 = (milliseconds(own.percentile(q)) for q in (50, 90, 99))
            latency = f"{p50} ({p90}, {p99})"
            if position and first:
                latency += _speed(first.p50_ms / own.p50_ms)
        accuracy = measurement.accuracy
        found.append(
            [
                measurement.label,
                percent(accuracy.top1 if accuracy else None, 2),
                size(measurement.artifact.size_bytes),
                latency,
                size(measurement.peak_memory_bytes),
                str(measurement.threads),
            ]
        )
    return found


def _speed(ratio: float) -> str:
    """A latency ratio in words, so that nobody has to guess which way round it is."""
    return f" {ratio:.2f}x faster" if ratio >= 1 else f" {1 / ratio:.2f}x slower"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def milliseconds(value: float) -> str:
    """Milliseconds with three digits that mean something."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """Seconds for a reader: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: float | None) -> str:
    """A count with a decimal prefix: 125 M."""
    return NONE if value is None else _scaled(value, ("", " k", " M", " G", " T"))


def size(value: float | None) -> str:
    """Bytes with a decimal prefix: 3.4 MB."""
    return NONE if value is None else _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def _scaled(value: float, prefixes: Sequence[str]) -> str:
    """The value in thousands, millions, ...: as many as leave it below 1000."""
    power = 0
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    digits = 1 if power and value < 99.95 else 0
    return f"{value:.{digits}f}{prefixes[power]}"
