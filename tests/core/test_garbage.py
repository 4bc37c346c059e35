"""Collections are put off, and everything is as it was afterwards."""

import gc

import pytest

from bevel.core.garbage import without_collection


def test_nothing_is_collected_inside_only():
    with without_collection():
        assert not gc.isenabled()
        with without_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_ends_it_too():
    with pytest.raises(KeyError), without_collection():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_the_caller_stopped_stays_stopped():
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_garbage_of_before_is_still_found_afterwards():
    class Node:
        alive = 0

        def __init__(self) -> None:
            self.self = self
            Node.alive += 1

        def __del__(self) -> None:
            Node.alive -= 1

    for _ in range(200_000):
        with without_collection():
            Node()
    assert Node.alive < 200_000  # nothing was hidden from the collector
