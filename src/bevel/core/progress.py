"""Progress of long work, without tying the stages to a terminal.

A stage wraps its loop in `track`; whoever runs the stage decides with `reporting` how that is
shown. With no reporter the loop runs silently.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Reporter(Protocol):
    """Shows progress to whoever watches."""

    def start(self, label: str, total: int | None) -> Callable[[int], None]:
        """Begin; the returned function is called with the number of items done."""
        ...

    def finish(self, label: str) -> None:
        """The loop is over, finished or not."""
        ...

    def note(self, message: str) -> None:
        """Show one line."""
        ...


_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Send all progress inside the block to this reporter."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


def track(
    items: Iterable[Item], label: str, total: int | None = None
) -> Generator[Item, None, None]:
    """Yield the items while reporting how many of `total` are done."""
    reporter = _reporter.get()
    if reporter is None:
        yield from items
        return
    advance = reporter.start(label, total)
    try:
        for done, item in enumerate(items, start=1):
            yield item
            advance(done)
    finally:
        reporter.finish(label)


def note(message: str) -> None:
    """Say one line to whoever watches."""
    reporter = _reporter.get()
    if reporter is not None:
        reporter.note(message)
