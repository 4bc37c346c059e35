"""What each surgery rule saves on a target: a network rewritten by that rule alone, measured."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from bevel.core.errors import MeasurementError
from bevel.core.recipe import Target
from bevel.measurement.bench import Subject, measure_all
from bevel.rewriting.apply import chosen, rule_name, surgery
from bevel.rewriting.rule import Rule
from bevel.runtimes import export, load_runtime

WORTH = 0.02
"""Share of the time for one image that a rule has to save to be worth its retraining."""


@dataclass(frozen=True)
class Payoff:
    """One rule on one network and target.

    Attributes:
        rule: as it was asked for.
        before_ms: median time for one image of the original, timed in turn with the other.
        after_ms: of the network rewritten by this rule alone; None where it rewrites nothing.
    """

    rule: str | Rule
    before_ms: float
    after_ms: float | None

    @property
    def name(self) -> str:
        """What the rule is called."""
        return rule_name(self.rule)

    @property
    def saved(self) -> float:
        """Share of the time that it saves; negative where it costs time."""
        return 0.0 if self.after_ms is None else 1 - self.after_ms / self.before_ms


def payoffs(
    net: nn.Module,
    example: Tensor,
    target: Target,
    *,
    rules: str | Sequence[str | Rule] = "lite",
    calibration: Iterable[Tensor] = (),
) -> list[Payoff]:
    """Measure every rule by itself, all files in turn in one process of the device.

    Args:
        net: the original.
        example: images (N, C, H, W).
        target: runtime, precision, device and threads.
        rules: a set or names of rules.
        calibration: batches for what is fitted, and for int8.

    Raises:
        BevelError: a rule, an export or the measurement fails.
    """
    batches = list(calibration) or [example]
    wanted = {rule_name(rule): rule for rule in chosen(rules)}
    lites = {  # what is fitted are numbers, and takes no other time
        name: surgery(net, example, rules=[rule], calibration=batches, fit=False)
        for name, rule in wanted.items()
    }
    changed = {name: lite.net for name, lite in lites.items() if lite.log.actions}
    with tempfile.TemporaryDirectory(prefix="bevel-") as folder:
        subjects = []
        for label, variant in {"original": net, **changed}.items():
            path = Path(folder) / f"{label}{load_runtime(target.runtime).SUFFIX}"
            artifact = export(
                variant,
                example,
                runtime=target.runtime,
                precision=target.precision,
                calibration=batches,
                path=path,
            )
            subjects.append(Subject(label, artifact, variant))
        found = measure_all(subjects, device=target.device, threads=target.threads)
    times = {m.label: m.latency.p50_ms for m in found if m.latency is not None}
    if "original" not in times:
        raise MeasurementError(f"{target.device} is emulated and has no times: name a real device")
    return [Payoff(rule, times["original"], times.get(name)) for name, rule in wanted.items()]


def worthwhile(found: Iterable[Payoff]) -> list[str | Rule]:
    """The rules that save enough, in their order."""
    return [payoff.rule for payoff in found if payoff.saved > WORTH]
