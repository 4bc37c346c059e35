"""Who carries out tasks: this process in turn, processes side by side, or a Ray cluster.

Each takes a function and tasks, and yields (position, the function's result) as tasks end. A result
is the reason of a failure or None; a process that dies is such a reason.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bevel.core.errors import MissingDependencyError, SearchError, one_line
from bevel.core.hardware import usable_cores

if TYPE_CHECKING:  # Windows has no such class
    from multiprocessing.context import ForkServerContext, SpawnContext

Task = TypeVar("Task")
Function = Callable[[Task], str | None]
Workers = Callable[[Callable[[Any], str | None], Sequence[Any]], Iterator[tuple[int, str | None]]]


def workers(jobs: int, ray: str | None) -> Workers:
    """Who carries out `jobs` tasks at once.

    Raises:
        MissingDependencyError: a Ray cluster is named and ray is not installed.
        SearchError: jobs below 1, or the cluster does not answer.
    """
    if jobs < 1:
        raise SearchError(f"jobs: expected a whole number from 1, got {jobs}")
    if ray is not None:
        return Cluster(ray, jobs)
    return in_turn if jobs == 1 else Processes(jobs)


def in_turn(function: Function[Task], tasks: Sequence[Task]) -> Iterator[tuple[int, str | None]]:
    """One after the other in this process, with every processor."""
    for position, task in enumerate(tasks):
        yield position, function(task)


@dataclass(frozen=True)
class Processes:
    """Each task in a process of its own; together they have as many threads as processors."""

    jobs: int

    @property
    def threads(self) -> int:
        """Threads of one process."""
        return max(1, usable_cores() // self.jobs)

    def __call__(
        self, function: Function[Task], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, str | None]]:
        """Carry out the tasks; those that run end with this process."""
        waiting = list(enumerate(tasks))
        running: dict[Connection, tuple[int, BaseProcess]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    position, task = waiting.pop(0)
                    receiver, process = self._start(function, task)
                    running[receiver] = position, process
                ready = wait(list(running))
                for receiver in [receiver for receiver in running if receiver in ready]:
                    position, process = running.pop(receiver)
                    yield position, _result(receiver, process)
        finally:
            for _, process in running.values():
                process.terminate()
                process.join()

    def _start(self, function: Function[Task], task: Task) -> tuple[Connection, BaseProcess]:
        context = _context(function.__module__)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_serve, args=(sender, function, task, self.threads, dict(os.environ))
        )
        process.start()
        sender.close()
        return receiver, process


def _context(module: str) -> ForkServerContext | SpawnContext:
    """Processes start as copies of one that has imported a task's module and run nothing.

    Importing takes seconds. This process itself is not copied: torch's threads do not survive it,
    nor do macOS's own libraries anywhere.
    """
    if not sys.platform.startswith("linux"):
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def _serve(
    sender: Connection,
    function: Function[Task],
    task: Task,
    threads: int,
    environment: dict[str, str],
) -> None:
    """Carry out one task in a process of its own."""
    import torch

    os.environ.clear()  # the copied process has that of when it started
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # stdout is for the result
    torch.set_num_threads(threads)
    sender.send(function(task))


def _end_with_parent() -> None:
    """End this process when the one that started it has been killed: its folder must be free."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _result(receiver: Connection, process: BaseProcess) -> str | None:
    """What a process sent; if it died before, how."""
    try:
        result: str | None = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        if code < 0:
            name = signal.Signals(-code).name
            return f"its process was ended by {name}; out of memory? try fewer --jobs"
        return f"its process ended with exit code {code}; its traceback is above"
    process.join()
    return result


class Cluster:
    """Each task is a Ray task with one processor; all machines see the folders under one path.

    Raises:
        MissingDependencyError: ray is not installed.
        SearchError: the cluster does not answer.
    """

    def __init__(self, address: str, jobs: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingDependencyError(
                "a Ray cluster needs the package ray: pip install ray; or leave out --ray"
            ) from error
        self._ray, self._jobs = ray, jobs
        try:
            ray.init(
                address=address,
                ignore_reinit_error=True,
                log_to_driver=False,
                logging_level="ERROR",
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SearchError(
                f"no Ray cluster at '{address}': {one_line(error, 160)}; 'local' starts one here"
            ) from error

    def __call__(
        self, function: Function[Task], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, str | None]]:
        """Carry out the tasks, at most `jobs` at once."""
        directory = Path.cwd()

        def there(task: Task) -> str | None:
            os.chdir(directory)  # relative paths of a recipe mean the same
            return function(task)

        remote = self._ray.remote(there)
        waiting = list(enumerate(tasks))
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and len(running) < self._jobs:
                position, task = waiting.pop(0)
                running[remote.remote(task)] = position
            done, _ = self._ray.wait(list(running))
            for reference in done:
                yield running.pop(reference), self._result(reference)

    def _result(self, reference: Any) -> str | None:
        try:
            result: str | None = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return f"Ray: {one_line(error)}"
        return result
