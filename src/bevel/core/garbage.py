"""Python's garbage collector, during work that makes many objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_sparing: ContextVar[bool] = ContextVar("sparing", default=False)


@contextmanager
def sparing_old_objects() -> Iterator[None]:
    """Collections inside the block, or the function it decorates, look at younger objects only.

    A full one walks every object of torch and its like. That takes 0.1 to 0.2 s, more than the
    analysis of many a network, and finds nothing.
    """
    if _sparing.get() or gc.get_freeze_count():  # the caller may have frozen objects for good
        yield
        return
    token = _sparing.set(True)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        _sparing.reset(token)
