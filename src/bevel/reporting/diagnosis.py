"""What the doctor found, as rows of text."""

from __future__ import annotations

from collections.abc import Sequence

from bevel.core.records import Diagnosis, Operator, RunRecord
from bevel.reporting.summary import NONE, count, milliseconds, percent

KINDS = ("operator", "precision", "how many", "MACs", "time, ms", "share of time")
"""Headings of `kinds`, in order."""

SLOWEST = ("slowest operators", "kind", "precision", "channels", "MACs", "time, ms", "share")
"""Headings of `slowest`, in order."""


def title(diagnosis: Diagnosis) -> str:
    """Whose file it is."""
    artifact = diagnosis.artifact
    return f"{diagnosis.label} {artifact.precision}, {artifact.runtime}"


def facts(diagnosis: Diagnosis) -> list[list[str]]:
    """The numbers as key and value."""
    undelegated = sum(not operator.delegated for operator in diagnosis.operators)
    found = [
        ["MACs in int8", percent(diagnosis.int8_macs)],
        ["operators", str(len(diagnosis.operators))],
        ["left to the slow path", str(undelegated)],
        ["float-integer conversions", str(diagnosis.conversions)],
        ["of them pairs that undo each other", str(diagnosis.stray_pairs)],
        ["transposes", str(diagnosis.transposes)],
        ["widths the runtime likes", f"multiples of {diagnosis.channel_step}"],
    ]
    if not diagnosis.operators:
        found = found[-1:]
    if diagnosis.profiled_ms is not None:
        threads = f"{diagnosis.threads} thread{'s' if diagnosis.threads > 1 else ''}"
        found.append([f"profiled, {threads}", f"{milliseconds(diagnosis.profiled_ms)} ms"])
    if (parity := diagnosis.parity) is not None:
        found.append(
            [
                f"agreement on {parity.images} images",
                f"{percent(parity.top1_agreement, 2)} same top-1, largest difference "
                f"{parity.max_difference:.2g}, mean {parity.mean_difference:.2g}",
            ]
        )
    return found


def kinds(diagnosis: Diagnosis) -> list[list[str]]:
    """Operators by kind and precision, dearest first."""
    groups: dict[tuple[str, str], list[Operator]] = {}
    for operator in diagnosis.operators:
        groups.setdefault((operator.kind, operator.precision), []).append(operator)
    dearest = sorted(groups.items(), key=lambda item: _cost(item[1]), reverse=True)
    return [
        [
            kind,
            precision,
            str(len(part)),
            count(sum(operator.macs for operator in part) or None),
            *_time(diagnosis, part),
        ]
        for (kind, precision), part in dearest
    ]


def slowest(diagnosis: Diagnosis, most: int = 10) -> list[list[str]]:
    """The operators that take most time; none if nothing was profiled."""
    if diagnosis.profiled_ms is None:
        return []
    ordered = sorted(diagnosis.operators, key=lambda operator: _cost([operator]), reverse=True)
    return [
        [
            operator.name,
            operator.kind,
            operator.precision,
            str(operator.channels or NONE),
            count(operator.macs or None),
            *_time(diagnosis, [operator]),
        ]
        for operator in ordered[:most]
    ]


def findings(diagnosis: Diagnosis) -> list[str]:
    """The reasons, dearest first."""
    return [finding.message for finding in diagnosis.findings]


def shipments(record: RunRecord) -> list[list[str]]:
    """Per target: the file to ship, its precision, and why."""
    return [[s.target, s.path, s.precision, s.reason] for s in record.shipments]


SHIPMENTS = ("target", "ship", "precision", "because")
"""Headings of `shipments`, in order."""


def _time(diagnosis: Diagnosis, part: Sequence[Operator]) -> list[str]:
    """Milliseconds and share of the profiled time."""
    if not diagnosis.profiled_ms or all(operator.latency_ms is None for operator in part):
        return [NONE, NONE]
    spent = _cost(part)[0]
    return [milliseconds(spent), percent(spent / diagnosis.profiled_ms)]


def _cost(part: Sequence[Operator]) -> tuple[float, int]:
    """Time, then MACs."""
    spent = sum(operator.latency_ms or 0.0 for operator in part)
    return spent, sum(operator.macs for operator in part)
