"""Pruning and fine-tuning in turns: on a schedule to a budget, or for as long as accuracy holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from bevel.core.errors import PruningError
from bevel.core.limits import parse_limit
from bevel.core.progress import note
from bevel.core.steps import Budget, IterateStep, PruneStep

GENTLEST = 0.95
"""A round that may leave more than this share is not worth its training."""

ROUNDS, MOST_ROUNDS = 3, 10
"""Of a schedule, and while accuracy holds, if the recipe names none."""

Network = TypeVar("Network")


@dataclass(frozen=True)
class Round(Generic[Network]):
    """One turn.

    Attributes:
        number: from 1.
        network: what came out of it.
        accuracy: on the validation images, after fine-tuning.
        macs: of one image.
        params: stored parameters.
        accepted: whether the next round went on from it.
    """

    number: int
    network: Network
    accuracy: float
    macs: int
    params: int
    accepted: bool = True

    def record(self) -> dict[str, float]:
        """Its numbers, without the network."""
        names = ("number", "accuracy", "macs", "params", "accepted")
        return {name: getattr(self, name) for name in names}


Turn = Callable[[int, PruneStep, Network], Round[Network]]
"""Prunes and fine-tunes a network: number of the round, what to cut, and what."""


def on_schedule(settings: IterateStep) -> Iterator[PruneStep]:
    """The prune step of each round, each relative to what the round before left.

    With f the share of the whole cut that is made after round k of n: f = k / n (linear), or
    f = 1 - (1 - k / n)^3 (cubic: most at first; Zhu and Gupta, "To Prune, or Not to Prune", 2017).
    """
    total = settings.rounds or ROUNDS
    left = 0.0
    for number in range(1, total + 1):
        part = number / total
        done = part if settings.schedule == "linear" else 1 - (1 - part) ** 3
        yield _part(settings.prune, left, done)
        left = done


def _part(whole: PruneStep, before: float, after: float) -> PruneStep:
    """A prune step that goes from one share of a cut to a larger one."""

    def remaining(limit: float) -> float:
        return (1 - after * (1 - limit)) / (1 - before * (1 - limit))

    if whole.ratio is not None:
        return whole.model_copy(update={"ratio": 1 - remaining(1 - whole.ratio)})
    budget = {name: remaining(share) for name, share in shares(whole).items()}
    return whole.model_copy(update={"budget": Budget(**budget)})


def shares(settings: PruneStep) -> dict[str, float]:
    """The limits of a prune step's budget, which have to be shares of the original.

    Raises:
        PruningError: one is an amount, or there is no budget.
    """
    limits = settings.budget.limits() if settings.budget is not None else {}
    parsed = {name: parse_limit(name, value) for name, value in limits.items()}
    for name, limit in parsed.items():
        if not limit.share:
            raise PruningError(f"iterate cuts by shares: {name} is an amount; give it in per cent")
    if not parsed:
        raise PruningError("iterate needs a prune step with a budget or a ratio")
    return {name: limit.value for name, limit in parsed.items()}


def while_accuracy_holds(
    settings: IterateStep, network: Network, turn: Turn[Network], floor: float
) -> list[Round[Network]]:
    """Rounds until none helps: the last accepted one holds the smallest network.

    Each round leaves the shares that the prune step's budget names of what the last accepted round
    left. One that falls below the floor is taken back, and the next is gentler: the square root
    of the shares.
    """
    found: list[Round[Network]] = []
    limits = shares(settings.prune)
    for number in range(1, (settings.rounds or MOST_ROUNDS) + 1):
        if min(limits.values()) > GENTLEST:
            break
        cut = settings.prune.model_copy(update={"budget": Budget(**limits)})
        try:
            tried = turn(number, cut, network)
        except PruningError as error:  # nothing of that size is left to be cut
            note(f"round {number}: {error}")
            limits = _gentler(limits)
            continue
        accepted = tried.accuracy >= floor
        found.append(
            Round(number, tried.network, tried.accuracy, tried.macs, tried.params, accepted)
        )
        if accepted:
            network = tried.network
        else:
            limits = _gentler(limits)
    return found


def _gentler(limits: dict[str, float]) -> dict[str, float]:
    return {name: limit**0.5 for name, limit in limits.items()}
