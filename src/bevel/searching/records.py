"""What a search and a comparison leave behind, as plain data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from bevel.core.records import Record


class TrialRecord(Record):
    """One trial of a search.

    Attributes:
        number: from 0, in the order they began.
        values: what its recipe has at the varied keys.
        state: running is one that a killed search had begun, and that it takes up again.
        objectives: by name, once it is finished.
        folder: its run folder, relative to that of the search.
        reason: why it failed.
    """

    number: int
    values: dict[str, Any]
    state: Literal["running", "finished", "failed"]
    objectives: dict[str, float] = Field(default_factory=dict)
    folder: str
    reason: str | None = None


class SearchRecord(Record):
    """A search so far: `search.json` in its folder. `front` are numbers of trials, best first."""

    version: int = 1
    recipe: dict[str, Any]
    objectives: list[str]
    trials: list[TrialRecord]
    front: list[int]


class Outcome(Record):
    """One cell of a comparison with one seed.

    Attributes:
        accuracy: of the file on validation images; None where the run failed.
        test_accuracy: of the file on test images, where that was asked for.
        folder: its run folder, relative to that of the comparison.
        reason: why it failed.
    """

    seed: int
    accuracy: float | None = None
    test_accuracy: float | None = None
    latency_ms: float | None = None
    size_bytes: int | None = None
    macs: int | None = None
    folder: str
    reason: str | None = None


class Cell(Record):
    """One combination of varied values, with every seed."""

    values: dict[str, Any]
    outcomes: list[Outcome]


class Duel(Record):
    """How often one value of the first varied key is ahead of another.

    Counted over all (other values, seed) in which both have an accuracy.
    """

    one: str
    other: str
    wins: int
    losses: int
    ties: int


class Comparison(Record):
    """A grid under one recipe: `compare.json` in its folder. `compared` is the first varied key."""

    version: int = 1
    recipe: dict[str, Any]
    compared: str
    split: str
    seeds: list[int]
    cells: list[Cell]
    duels: list[Duel]
