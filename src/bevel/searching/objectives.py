"""What a search looks for: numbers of a trial, and which way they are better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bevel.core.errors import SearchError
from bevel.reporting.summary import count, milliseconds, percent, size
from bevel.searching.trial import Verdict


@dataclass(frozen=True)
class Objective:
    """A number of a trial: which way it is better, where it is found, how it is written."""

    direction: Literal["maximize", "minimize"]
    title: str
    of: Callable[[Verdict], float | None]
    text: Callable[[float], str]

    def cost(self, value: float) -> float:
        """The value with the sign that makes low better."""
        return -value if self.direction == "maximize" else value


def _accuracy(verdict: Verdict) -> float | None:
    accuracy = verdict.measurement.accuracy
    return accuracy.top1 if accuracy else None


def _latency(verdict: Verdict) -> float | None:
    latency = verdict.measurement.latency
    return latency.p50_ms if latency else None


OBJECTIVES: Mapping[str, Objective] = {
    "accuracy": Objective(
        "maximize", "validation accuracy", _accuracy, lambda value: percent(value, 2)
    ),
    "latency_ms": Objective("minimize", "latency p50, ms", _latency, milliseconds),
    "size_bytes": Objective(
        "minimize", "size", lambda verdict: verdict.measurement.artifact.size_bytes, size
    ),
    "macs": Objective("minimize", "MACs", lambda verdict: verdict.cost.macs, count),
    "params": Objective("minimize", "params", lambda verdict: verdict.cost.params, count),
}
"""By the name that a recipe gives."""


def numbers(verdict: Verdict, names: Sequence[str]) -> dict[str, float]:
    """A trial's objectives.

    Raises:
        SearchError: one of them was not measured.
    """
    found: dict[str, float] = {}
    for name in names:
        value = OBJECTIVES[name].of(verdict)
        if value is None:
            device = verdict.measurement.device.device
            raise SearchError(f"no {name} is measured on {device}; leave it out of the objectives")
        found[name] = value
    return found


def costs(objectives: Mapping[str, float]) -> tuple[float, ...]:
    """A trial's objectives with low better, for the front."""
    return tuple(OBJECTIVES[name].cost(value) for name, value in objectives.items())
