"""How steps run on this machine: chosen by measuring a few real ones.

Which type and memory format is fastest differs between processors by large factors, in both
directions, so nothing is assumed: every candidate takes real steps, on copies. A candidate
is given up within a step as soon as it is several times slower than the best. Compiling is tried
only where its cost is a small share of what remains to be done.
"""

from __future__ import annotations

import logging
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bevel.core.errors import RunFolderError, one_line
from bevel.core.progress import note, track
from bevel.core.steps import TrainStep
from bevel.finetuning.features import feature_sites
from bevel.finetuning.step import MEMORY_FORMATS, Execution, Stepper

SHORT_SECONDS = 20.0
"""A training estimated to be shorter runs in the plain way: measuring would cost more."""

MARGIN = 0.95
"""Another way must take at most this share of the plain way's time to be chosen."""

COMPILE_SHARE = 0.1
"""Compiling is tried where it is estimated to take at most this share of the training."""

DTYPES = ("float32", "bfloat16")

ROUNDS = 3
"""Measured steps of each candidate, after one that warms up."""

PINNED = {
    "float32": Execution("float32", "channels_last"),
    "bfloat16": Execution("bfloat16", "contiguous"),
}
"""How a pinned precision runs: nothing is timed, so two runs take the same steps, bit for bit.

Of float32's formats channels_last was the faster on every processor tried; bfloat16's channels_last
is a little faster on some and pathologically slow on others.
"""

Batch = tuple[Tensor, Tensor]


@dataclass
class Choice:
    """The way steps run and why, as it is recorded. Times are the best step of each candidate."""

    execution: Execution
    reason: str
    device: str
    threads: int
    step_ms: dict[str, float] = field(default_factory=dict)
    compile_seconds: float | None = None
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        chosen = self.execution
        return {
            "dtype": chosen.dtype,
            "memory_format": chosen.memory_format,
            "compiled": chosen.compiled,
            "reason": self.reason,
            "device": self.device,
            "threads": self.threads,
            "step_ms": self.step_ms,
            "compile_seconds": self.compile_seconds,
            "notes": self.notes,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Choice:
        """The inverse of `record`.

        Raises:
            RunFolderError: the record is not one that `record` made.
        """
        plain = dict(record)
        try:
            way = Execution(plain.pop("dtype"), plain.pop("memory_format"), plain.pop("compiled"))
            return cls(execution=way, **plain)
        except (KeyError, TypeError) as error:
            raise RunFolderError(
                f"the recorded choice of execution cannot be used ({one_line(error)}); "
                "remove the step's folder and start it again"
            ) from error


class _TooSlowError(Exception):
    """A measured step passed its time limit."""


class _Candidate:
    """A way to step that takes measured steps on the same batch, from the same weights."""

    def __init__(self, stepper: Stepper, batch: Batch) -> None:
        self.stepper = stepper
        self.batch = batch
        self.best = float("inf")
        self.first_loss: float | None = None

    def measure(self, limit: float | None = None) -> float:
        """Take a step; returns and remembers its seconds.

        Raises:
            _TooSlowError: the step took longer than `limit` seconds; it was left in the middle.
        """
        torch.manual_seed(0)  # every candidate draws the same dropout
        start = time.perf_counter()
        if limit is None:
            loss = self.stepper.step(*self.batch)
        else:
            with _limited(self.stepper.net, limit):
                loss = self.stepper.step(*self.batch)
        if self.first_loss is None:
            self.first_loss = float(loss)
        _synchronize(self.stepper.device)
        seconds = time.perf_counter() - start
        self.best = min(self.best, seconds)
        return seconds


def choose(
    net: nn.Module,
    teacher: nn.Module | None,
    settings: TrainStep,
    batch: Batch,
    *,
    steps: int,
    device: torch.device,
    may_compile: bool = True,
) -> tuple[Stepper, Choice]:
    """Measure the candidates and return a fresh stepper of the best.

    Args:
        net: the starting weights; unchanged.
        teacher: runs in every step, in the same way, where `settings.distill` is given.
        settings: a `precision` other than auto pins type and format, `compile: never` keeps to
            eager; with both, nothing is timed.
        batch: real images (N, C, H, W) and labels (N,).
        steps: how many the training has, to weigh the cost of compiling.
        device: where steps run.
        may_compile: False where the process group forbids it.

    Raises:
        TrainingError: feature maps are to be compared, and none can be.
    """
    if settings.precision == "auto":
        ways = [Execution(dtype, memory) for dtype in DTYPES for memory in MEMORY_FORMATS]  # type: ignore[arg-type]
    else:
        ways = [PINNED[settings.precision]]
    sites = _sites(net, teacher, settings, batch)
    base = _Candidate(Stepper(net, teacher, ways[0], settings, device, sites), batch)
    choice = Choice(ways[0], "", str(device), torch.get_num_threads())
    if sites:
        choice.notes.append(f"not compiled: distill.features reads {', '.join(sites)} by hooks")
    if settings.precision != "auto" and settings.compile == "never":
        choice.reason = "pinned by the recipe"
        return base.stepper, choice
    for _ in range(2):  # the first also sets kernels up
        base.measure()
        if base.best * steps < SHORT_SECONDS:
            choice.reason = f"short: at most {SHORT_SECONDS:.0f} s in the plain way"
            choice.step_ms = {str(ways[0]): round(base.best * 1e3, 2)}
            base.stepper.reset(net)
            return base.stepper, choice
    candidates = [base]
    for way in track(ways[1:], "measuring ways to step", len(ways) - 1):
        candidate = _Candidate(Stepper(net, teacher, way, settings, device, sites), batch)
        problem = _first(candidate, base, min(c.best for c in candidates))
        if problem is None:
            candidates.append(candidate)
        else:
            choice.notes.append(f"{way}: {problem}")
    best = _race(candidates, base, steps)
    choice.step_ms = {str(c.stepper.execution): round(c.best * 1e3, 2) for c in candidates}
    choice.execution = best.stepper.execution
    choice.reason = "fastest of the measured" if best is not base else "nothing was clearly faster"
    if settings.compile == "auto" and may_compile and not sites:
        _consider_compiling(best, choice, steps)
    best.stepper.reset(net)
    note(f"steps run as {choice.execution} ({choice.reason})")
    return best.stepper, choice


def resume(
    net: nn.Module,
    teacher: nn.Module | None,
    settings: TrainStep,
    batch: Batch,
    *,
    choice: Choice,
    device: torch.device,
) -> Stepper:
    """A fresh stepper of a choice made earlier; eager, with a note, where it no longer compiles."""
    if choice.threads != torch.get_num_threads() or choice.device != str(device):
        note(
            f"the training began with {choice.threads} threads on {choice.device} and goes on with "
            f"{torch.get_num_threads()} on {device}: the last bits of its weights may differ"
        )
    wanted = choice.execution
    eager = Execution(wanted.dtype, wanted.memory_format)
    sites = _sites(net, teacher, settings, batch)
    stepper = Stepper(net, teacher, eager, settings, device, sites)
    if wanted.compiled:
        problem = _compile(_Candidate(stepper, batch))
        if problem is not None:
            note(f"{problem}; the last bits of the weights may differ")
        stepper.reset(net)
    return stepper


def _sites(
    net: nn.Module, teacher: nn.Module | None, settings: TrainStep, batch: Batch
) -> tuple[str, ...]:
    """Where feature maps are compared; nowhere unless `settings.distill` asks for it."""
    if teacher is None or settings.distill is None or settings.distill.features == 0:
        return ()
    return feature_sites(net, teacher, batch[0][:1])


def _first(candidate: _Candidate, base: _Candidate, best: float) -> str | None:
    """Take the first two steps under a time limit; returns why the candidate is out, if it is."""
    # A first step also sets kernels up. On an accelerator that may take many times a step, and no
    # way is so slow there that it has to be stopped.
    processor = candidate.stepper.device.type == "cpu"
    try:
        candidate.measure(limit=max(2.0, 4 * best) if processor else None)
        candidate.measure(limit=max(0.5, 3 * best))
    except _TooSlowError:
        return f"given up, a step took more than three times {best * 1e3:.0f} ms"
    except RuntimeError as error:  # torch has no kernel for this type or format, or no memory
        return f"does not run here: {one_line(error, 120)}"
    return _doubt(candidate, base)


def _doubt(candidate: _Candidate, base: _Candidate) -> str | None:
    """Why the candidate's first loss cannot be right, if so: it must be near the plain one."""
    expected, got = base.first_loss, candidate.first_loss
    if expected is None or got is None:
        return None
    if abs(got - expected) <= 0.1 + 0.25 * abs(expected):  # not-a-number fails too
        return None
    return f"its first loss is {got:.4g} where float32 gives {expected:.4g}"


def _race(candidates: list[_Candidate], base: _Candidate, steps: int) -> _Candidate:
    """Interleaved rounds, so that a passing load hits all alike; returns the winner."""
    start = time.perf_counter()
    quickest = min(candidate.best for candidate in candidates)
    runners = [candidate for candidate in candidates if candidate.best < 1.5 * quickest]
    if len(runners) > 1:
        for _ in range(ROUNDS):
            if time.perf_counter() - start > 0.01 * steps * quickest:
                break
            for candidate in runners:
                candidate.measure()
    best = min(candidates, key=lambda candidate: candidate.best)
    return best if best.best < MARGIN * base.best else base


def _consider_compiling(eager: _Candidate, choice: Choice, steps: int) -> None:
    """Compile the winner in place where that pays; record the times, and why not otherwise."""
    cost = _estimated_compile_seconds(eager.stepper)
    remaining = eager.best * steps
    if cost > COMPILE_SHARE * remaining:
        choice.notes.append(
            f"not compiled: about {cost:.0f} s of compiling for {remaining:.0f} s of steps"
        )
        return
    compiled = _Candidate(eager.stepper, eager.batch)
    start = time.perf_counter()
    problem = _compile(compiled)
    choice.compile_seconds = round(time.perf_counter() - start, 1)
    if problem is not None:
        choice.notes.append(problem)
        note(problem)
        return
    for _ in range(ROUNDS):
        compiled.measure()
    choice.step_ms[str(eager.stepper.execution)] = round(compiled.best * 1e3, 2)
    if compiled.best < MARGIN * eager.best:
        choice.execution = eager.stepper.execution
        choice.reason = "fastest of the measured"
    else:
        eager.stepper.uncompile()
        choice.notes.append("compiling made the steps no faster")


def _estimated_compile_seconds(stepper: Stepper) -> float:
    """From a ResNet-56 on two cores: a second per layer with weights, half that for a teacher."""

    def layers(net: nn.Module | None) -> int:
        return 0 if net is None else sum(parameter.ndim >= 2 for parameter in net.parameters())

    return 5.0 + layers(stepper.net) + 0.5 * layers(stepper.teacher)


def _compile(candidate: _Candidate) -> str | None:
    """Compile and take the first step; on failure go back to eager and return why.

    The same step ran eagerly before, so what fails now is the compiler: Dynamo's and Inductor's
    errors and a missing or failing C++ compiler are RuntimeErrors, an unwritable cache folder or
    a program that cannot be started an OSError, and one that fails a SubprocessError.
    """
    images = candidate.batch[0]
    candidate.stepper.compile(images.shape)
    try:
        with _quiet():
            for _ in track([0], "compiling the network", 1):
                candidate.measure()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        candidate.stepper.uncompile()
        return f"compiling failed, steps run eagerly: {one_line(error, 160)}"
    candidate.best = float("inf")
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings from the compiler: they are not about anything a user can mend."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _limited(net: nn.Module, seconds: float) -> Iterator[None]:
    """Raise _TooSlowError between two layers, forward or backward, once the time is up."""
    deadline = time.perf_counter() + seconds

    def check(*_: Any) -> None:
        if time.perf_counter() > deadline:
            raise _TooSlowError

    handles: list[Any] = [
        module.register_forward_hook(check)
        for module in net.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    handles += [
        parameter.register_post_accumulate_grad_hook(check)
        for parameter in net.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
        check()
    finally:
        for handle in handles:
            handle.remove()


def _synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
