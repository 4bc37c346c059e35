"""The Pareto front: the points that no other point beats."""

from __future__ import annotations

from collections.abc import Sequence


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one point is at least as low everywhere, and lower somewhere."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Positions of the points that none dominates, all coordinates being best low, lowest first.

    Equal points are all on the front or all off it.
    """
    front: list[int] = []
    # In this order a point can only be dominated by an earlier one, and if by any, then by one of
    # the front: domination is transitive.
    for position in sorted(range(len(points)), key=lambda position: tuple(points[position])):
        if not any(dominates(points[better], points[position]) for better in front):
            front.append(position)
    return front
