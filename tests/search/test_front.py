"""The Pareto front against its definition."""

from hypothesis import given
from hypothesis import strategies as st

from bevel.searching.front import pareto_front

POINTS = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.tuples(*[st.integers(0, 4) | st.floats(0, 4)] * width), max_size=30)
)


def undominated(points: list[tuple[float, ...]]) -> list[int]:
    """By the definition: no point is nowhere worse and somewhere better."""
    found = []
    for position, point in enumerate(points):
        beaten = False
        for other in points:
            nowhere_worse = all(other[axis] <= point[axis] for axis in range(len(point)))
            somewhere_better = any(other[axis] < point[axis] for axis in range(len(point)))
            beaten = beaten or (nowhere_worse and somewhere_better)
        if not beaten:
            found.append(position)
    return found


@given(POINTS)
def test_the_front_is_what_no_other_point_beats(points: list[tuple[float, ...]]) -> None:
    found = pareto_front(points)
    assert sorted(found) == undominated(points)
    assert [points[position] for position in found] == sorted(points[p] for p in found)


def test_equal_points_are_all_on_the_front() -> None:
    assert sorted(pareto_front([(1, 2), (2, 1), (1, 2), (2, 2)])) == [0, 1, 2]
