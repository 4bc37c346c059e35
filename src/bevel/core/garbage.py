"""Python's garbage collector, during work that makes many objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection inside the block, or the function it decorates.

    A full collection walks every object of torch and its like. That takes 0.1 to 0.2 s, more than
    the analysis of many a network, and finds nothing of what the block makes, since that is in use.
    It is put off, not left out: the collector counts on, and does it when the block is over.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
