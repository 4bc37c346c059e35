"""Prove that a pruned network equals its original with the removed slices set to zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bevel.core.errors import FORWARD_FAULTS, ProofError, one_line
from bevel.core.modes import evaluating
from bevel.core.records import Record
from bevel.graph.copying import copy_with
from bevel.graph.couplings import Analysis, ChannelGroup, analyze
from bevel.graph.record import ExampleInputs, map_inputs, run
from bevel.pruning.allocate import rank
from bevel.pruning.apply import mask, prune
from bevel.pruning.plan import PruningPlan, indices, make_plan

TOLERANCE = 1e-9
"""Largest accepted difference in float64, relative to the output's largest magnitude."""


class Proof(Record):
    """The comparison of a pruned network with its masked original, in float64."""

    max_relative_difference: list[float]
    """Per output tensor, over all inputs tried."""
    inputs: int
    tolerance: float
    unproven: list[str] = Field(default_factory=list)
    """Channel groups for which setting to zero is not the same as removing, with the reason: for
    them only the shapes of the outputs and that these are finite were checked."""
    skipped: list[str] = Field(default_factory=list)
    """Random inputs that were left out, as the original network cannot run them, and why."""

    @property
    def worst(self) -> float:
        """The largest difference of all outputs."""
        return max(self.max_relative_difference, default=0.0)

    @property
    def passed(self) -> bool:
        """Whether every output is equal within the tolerance."""
        return self.worst <= self.tolerance


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Random numbers that are drawn in the function leave those outside as they would be."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield


@_own_randomness()
def verify_pruning(
    net: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    example_inputs: ExampleInputs,
    *,
    images: Iterable[Tensor] = (),
) -> Proof:
    """Compare with the masked original on the example inputs, two random inputs and `images`.

    Random inputs that mean nothing to the original, as random boxes may, are skipped.

    A statistic across channels (layer norm, the scale of an attention head) changes with the
    channels that are left, so there the masked original is no reference: those cuts are left out
    of the comparison, and for them the network is run as a whole, and the shapes of its outputs
    and that they are finite are checked.

    Args:
        net: the original network.
        pruned: what `prune(net, plan)` gave, before any training.
        plan: the plan.
        example_inputs: as for `analyze`.
        images: further input batches (N, C, H, W), for networks with one input.

    Raises:
        ProofError: an output differs; the message names the channel group that is at fault.
    """
    random, skipped = _that_run(net, _random_like(example_inputs, 2))
    inputs = [example_inputs, *random, *((batch,) for batch in images)]
    inexact = {group.name: group.inexact for group in plan.groups if group.cut and group.inexact}
    proven, reference = plan, pruned
    try:
        if inexact:
            _check_runs(net, pruned, plan, inputs)
            proven = without_groups(analyze(net, example_inputs), plan, set(inexact))
            reference = prune(net, proven)
        differences = compare(mask(net, proven), reference, inputs)
    except FORWARD_FAULTS as error:
        raise ProofError(
            f"the pruned network does not run: {one_line(error)}; {_culprits(net, plan, inputs)}"
        ) from error
    proof = Proof(
        max_relative_difference=differences,
        inputs=len(inputs),
        tolerance=TOLERANCE,
        unproven=[f"{name}: {reason}" for name, reason in inexact.items()],
        skipped=skipped,
    )
    if not proof.passed:
        raise ProofError(
            f"the pruned network differs from its masked original by {proof.worst:.1e} of the "
            f"output's magnitude (allowed: {TOLERANCE:.0e}); {_culprits(net, proven, inputs)}"
        )
    return proof


def without_groups(analysis: Analysis, plan: PruningPlan, names: set[str]) -> PruningPlan:
    """The plan without the cuts of these groups."""
    keep: dict[int, np.ndarray] = {}
    for index, group in enumerate(analysis.groups):
        if group.frozen is None and group.name not in names:
            mask = kept_units(plan, group)
            if not mask.all():
                keep[index] = mask
    return make_plan(analysis, keep)


def kept_units(plan: PruningPlan, group: ChannelGroup) -> np.ndarray:
    """Which units of a group a plan keeps: those of which any index stays."""
    mask = np.zeros(group.size, dtype=bool)
    for axis in group.axes:
        cut = plan.tensors.get(axis.tensor)
        runs = cut.keep.get(axis.dim) if cut is not None else None
        if runs is None:
            return np.ones(group.size, dtype=bool)
        rows = axis.units.reshape(-1, axis.units.shape[-1])
        blocks = runs if isinstance(runs, list) else [runs] * len(rows)
        for row, block in zip(rows, blocks, strict=True):
            units = row[indices(block)]
            mask[units[units >= 0]] = True
    return mask


def _check_runs(
    net: nn.Module, pruned: nn.Module, plan: PruningPlan, inputs: Sequence[ExampleInputs]
) -> None:
    """The whole pruned network gives finite outputs of the original's shapes.

    Raises:
        ProofError: it does not, or it is not what the plan makes of the network.
    """
    expected = prune(net, plan).state_dict()
    for name, tensor in pruned.state_dict().items():
        if name not in expected or not torch.equal(tensor, expected[name]):
            raise ProofError(f"'{name}' is not what the plan leaves of it: verify before training")
    with evaluating(net), evaluating(pruned), torch.no_grad():
        for arguments in inputs[:2]:
            for a, b in zip(_outputs(net, arguments), _outputs(pruned, arguments), strict=True):
                if a.shape != b.shape or (a.isfinite().all() and not b.isfinite().all()):
                    raise ProofError(
                        f"an output of the pruned network is {_described(b)}, expected "
                        f"{_described(a)}; {_culprits(net, plan, inputs)}"
                    )


def _described(tensor: Tensor) -> str:
    finite = "finite" if bool(tensor.isfinite().all()) else "not finite"
    return f"{'x'.join(map(str, tensor.shape))}, {finite}"


def _outputs(net: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(run(net, inputs)) if isinstance(leaf, Tensor)]


def _drawn(net: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """The outputs; a forward that draws random numbers draws the same ones each time."""
    torch.manual_seed(0)
    return _outputs(net, inputs)


@_own_randomness()
def compare(masked: nn.Module, pruned: nn.Module, inputs: Sequence[ExampleInputs]) -> list[float]:
    """Largest relative difference per output tensor, both networks run in float64."""
    worst: list[float] = []
    left, right = _double(masked), _double(pruned)
    with evaluating(left), evaluating(right), torch.no_grad(), _InDouble():
        for arguments in inputs:
            exact = map_inputs(arguments, _to_double)
            expected, got = _drawn(left, exact), _drawn(right, exact)
            worst = worst or [0.0] * len(expected)
            for index, (a, b) in enumerate(zip(expected, got, strict=True)):
                worst[index] = max(worst[index], _relative(a, b))
    return worst


def faulty_groups(
    net: nn.Module, example_inputs: ExampleInputs, suspects: Sequence[str]
) -> dict[str, str]:
    """Of these groups, those that cannot be pruned even alone -> what happens when they are."""
    analysis = analyze(net, example_inputs)
    faults: dict[str, str] = {}
    for index, group in enumerate(analysis.groups):
        if group.frozen is not None or group.name not in suspects:
            continue
        ranked = rank(index, group, torch.arange(group.size).double().numpy(), 1)
        if len(ranked.levels) < 2:
            continue
        plan = make_plan(analysis, {index: ranked.keep_mask(int(ranked.levels[1]))})
        try:
            differences = compare(mask(net, plan), prune(net, plan), [example_inputs])
        except FORWARD_FAULTS as error:
            faults[group.name] = one_line(error, 160)
            continue
        if not group.inexact and max(differences, default=0.0) > TOLERANCE:
            faults[group.name] = f"the output changes by {max(differences):.1e}"
    return faults


def _culprits(net: nn.Module, plan: PruningPlan, inputs: Sequence[ExampleInputs]) -> str:
    cut = [group.name for group in plan.groups if group.cut]
    faults = faulty_groups(net, inputs[0], cut)
    if not faults:
        return f"no single group of {', '.join(cut[:5])} is at fault alone"
    name, reason = next(iter(faults.items()))
    return f"the channel group '{name}' is at fault: {reason}"


class _InDouble(TorchFunctionMode):
    """Code that asks for float32 by name gets float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.float:
            return args[0].double()
        if any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values())):
            args = tuple(_wide(x) for x in args)
            kwargs = {name: _wide(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)


def _wide(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def _double(net: nn.Module) -> nn.Module:
    return copy_with(net, {}).double()


def _to_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _relative(expected: Tensor, got: Tensor) -> float:
    if expected.shape != got.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    a, b = expected.double(), got.double()
    difference = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
    return difference if difference == difference else float("inf")  # NaN is a failure


def _that_run(
    net: nn.Module, candidates: Sequence[ExampleInputs]
) -> tuple[list[ExampleInputs], list[str]]:
    """Those that a network gives finite outputs for; and why not, for each of the others."""
    net = copy_with(net, {})  # a forward may change what it finds on its modules
    good: list[ExampleInputs] = []
    reasons = []
    with evaluating(net), torch.no_grad():
        for number, inputs in enumerate(candidates, 1):
            try:
                finite = all(bool(output.isfinite().all()) for output in _outputs(net, inputs))
            except FORWARD_FAULTS as error:
                reasons.append(f"random input {number}: {one_line(error, 160)}")
                continue
            if finite:
                good.append(inputs)
            else:
                reasons.append(f"random input {number}: an output of the original is not finite")
    return good, reasons


def _random_like(example_inputs: ExampleInputs, count: int) -> list[ExampleInputs]:
    generator = torch.Generator().manual_seed(0)

    def fresh(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        return leaf

    return [map_inputs(example_inputs, fresh) for _ in range(count)]
