"""What the command line shows: errors, progress, tables. Results to stdout, the rest to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from bevel.core.errors import one_line
from bevel.core.progress import reporting

WIDE = 160
"""Columns assumed where the output is no terminal, so that tables do not wrap in logs."""

SPARSE_SECONDS = 15.0
"""Without a terminal a long loop says how far it is this often."""


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else WIDE, highlight=False)


def say(message: str) -> None:
    """One line for whoever watches."""
    _console(stderr=True).print(message, markup=False, soft_wrap=True)


def say_error(message: str) -> None:
    """The one line of a failure."""
    print(f"bevel: {one_line(message, 1000)}", file=sys.stderr)  # noqa: T201


def interrupted(arguments: Sequence[str]) -> None:
    """The line after Ctrl-C."""
    resumes = arguments[:1] and arguments[0] in ("run", "search", "compare")
    resume = f"; the same command continues the {arguments[0]}" if resumes else ""
    say_error(f"interrupted{resume}")


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def print_text(text: str) -> None:
    """A result as text on stdout."""
    sys.stdout.write(text.rstrip("\n") + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A result as a table on stdout; the first column is a name, the others are numbers."""
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    _console(stderr=False).print(table)


def print_list(rows: Sequence[Sequence[str]]) -> None:
    """Names and descriptions on stdout, aligned."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*row)
    _console(stderr=False).print(grid)


@contextlib.contextmanager
def working(*, quiet_stdout: bool = False) -> Iterator[None]:
    """Show the progress of the work inside the block on stderr.

    With `quiet_stdout`, what libraries print goes to stderr too, so that stdout holds the result.
    """
    console = _console(stderr=True)
    with contextlib.ExitStack() as stack:
        reporter: Bars | Lines
        reporter = stack.enter_context(Bars(console)) if console.is_terminal else Lines(console)
        stack.enter_context(reporting(reporter))
        if quiet_stdout:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


class Bars:
    """Progress bars with the time that remains, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
        )
        self._tasks: dict[str, list[TaskID]] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, label: str, total: int | None) -> Callable[[int], None]:
        """Add a bar and return what moves it."""
        task = self._progress.add_task(label, total=total)
        self._tasks.setdefault(label, []).append(task)
        return lambda done: self._progress.update(task, completed=done)

    def finish(self, label: str) -> None:
        """Take the bar away."""
        if self._tasks.get(label):
            self._progress.remove_task(self._tasks[label].pop())

    def note(self, message: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(message, markup=False, soft_wrap=True)


class Lines:
    """Progress as occasional plain lines, where there is no terminal."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._said = clock()

    def start(self, label: str, total: int | None) -> Callable[[int], None]:
        """Return what is told the number of items done; it speaks seldom."""
        began = self._clock()

        def advance(done: int) -> None:
            now = self._clock()
            if now - max(self._said, began) < SPARSE_SECONDS:
                return
            self._said = now
            if total:
                left = (now - began) / done * (total - done)
                self.note(f"{label}: {done}/{total}, about {left:.0f} s left")
            else:
                self.note(f"{label}: {done}")

        return advance

    def finish(self, label: str) -> None:
        """Nothing: what a step reached is said in its note."""

    def note(self, message: str) -> None:
        """Print one line."""
        self._console.print(message, markup=False, soft_wrap=True)
