"""Prove that a pruned network equals its original with the removed slices set to zero."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bevel.core.errors import FORWARD_FAULTS, ProofError, one_line
from bevel.core.modes import evaluating
from bevel.core.records import Record
from bevel.graph.couplings import analyze
from bevel.graph.record import ExampleInputs, as_arguments
from bevel.pruning.allocate import rank
from bevel.pruning.apply import mask, prune
from bevel.pruning.plan import PruningPlan, make_plan

TOLERANCE = 1e-9
"""Largest accepted difference in float64, relative to the output's largest magnitude."""


class Proof(Record):
    """The comparison of a pruned network with its masked original, in float64."""

    max_relative_difference: list[float]
    """Per output tensor, over all inputs tried."""
    inputs: int
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest difference of all outputs."""
        return max(self.max_relative_difference, default=0.0)

    @property
    def passed(self) -> bool:
        """Whether every output is equal within the tolerance."""
        return self.worst <= self.tolerance


def verify_pruning(
    net: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    example_inputs: ExampleInputs,
    *,
    images: Iterable[Tensor] = (),
) -> Proof:
    """Compare with the masked original on the example inputs, two random inputs and `images`.

    Args:
        net: the original network.
        pruned: what `prune(net, plan)` gave, before any training.
        plan: the plan.
        example_inputs: a tensor or the forward's positional arguments.
        images: further input batches (N, C, H, W), for networks with one input.

    Raises:
        ProofError: an output differs; the message names the channel group that is at fault.
    """
    inputs = [as_arguments(example_inputs), *_random_like(example_inputs, 2)]
    inputs += [(batch,) for batch in images]
    try:
        differences = compare(mask(net, plan), pruned, inputs)
    except FORWARD_FAULTS as error:
        raise ProofError(
            f"the pruned network does not run: {one_line(error)}; {_culprits(net, plan, inputs)}"
        ) from error
    proof = Proof(max_relative_difference=differences, inputs=len(inputs), tolerance=TOLERANCE)
    if not proof.passed:
        raise ProofError(
            f"the pruned network differs from its masked original by {proof.worst:.1e} of the "
            f"output's magnitude (allowed: {TOLERANCE:.0e}); {_culprits(net, plan, inputs)}"
        )
    return proof


def compare(
    masked: nn.Module, pruned: nn.Module, inputs: Sequence[tuple[object, ...]]
) -> list[float]:
    """Largest relative difference per output tensor, both networks run in float64."""
    worst: list[float] = []
    left, right = _double(masked), _double(pruned)
    with evaluating(left), evaluating(right), torch.no_grad():
        for arguments in inputs:
            exact = tree_map(_to_double, arguments)
            expected = [t for t in tree_leaves(left(*exact)) if isinstance(t, Tensor)]
            got = [t for t in tree_leaves(right(*exact)) if isinstance(t, Tensor)]
            worst = worst or [0.0] * len(expected)
            for index, (a, b) in enumerate(zip(expected, got, strict=True)):
                worst[index] = max(worst[index], _relative(a, b))
    return worst


def faulty_groups(
    net: nn.Module, example_inputs: ExampleInputs, suspects: Sequence[str]
) -> dict[str, str]:
    """Of these groups, those that cannot be pruned even alone -> what happens when they are."""
    analysis = analyze(net, example_inputs)
    inputs = [as_arguments(example_inputs)]
    faults: dict[str, str] = {}
    for index, group in enumerate(analysis.groups):
        if group.frozen is not None or group.name not in suspects:
            continue
        ranked = rank(index, group, torch.arange(group.size).double().numpy(), 1)
        if len(ranked.levels) < 2:
            continue
        plan = make_plan(analysis, {index: ranked.keep_mask(int(ranked.levels[1]))})
        try:
            differences = compare(mask(net, plan), prune(net, plan), inputs)
        except FORWARD_FAULTS as error:
            faults[group.name] = one_line(error, 160)
            continue
        if max(differences, default=0.0) > TOLERANCE:
            faults[group.name] = f"the output changes by {max(differences):.1e}"
    return faults


def _culprits(net: nn.Module, plan: PruningPlan, inputs: Sequence[tuple[object, ...]]) -> str:
    cut = [group.name for group in plan.groups if group.after < group.before]
    faults = faulty_groups(net, inputs[0], cut)
    if not faults:
        return f"no single group of {', '.join(cut[:5])} is at fault alone"
    name, reason = next(iter(faults.items()))
    return f"the channel group '{name}' is at fault: {reason}"


def _double(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).double()


def _to_double(leaf: object) -> object:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _relative(expected: Tensor, got: Tensor) -> float:
    if expected.shape != got.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    a, b = expected.double(), got.double()
    difference = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
    return difference if difference == difference else float("inf")  # NaN is a failure


def _random_like(example_inputs: ExampleInputs, count: int) -> list[tuple[object, ...]]:
    generator = torch.Generator().manual_seed(0)

    def fresh(leaf: object) -> object:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        return leaf

    return [tree_map(fresh, as_arguments(example_inputs)) for _ in range(count)]
