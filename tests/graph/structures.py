"""What must hold of a network that shows one structure, and what of it must be prunable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import bevel
from bevel.graph.couplings import Analysis, ChannelGroup
from bevel.graph.record import ExampleInputs, run
from bevel.pruning.plan import make_plan
from networks import conv, randomise

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Structure:
    """A network and what must be prunable in it.

    A tensor stands for its first axis, `name@1` for another. Every index of that axis is
    - exact: in a group that can be cut, and cutting it is the same as setting it to zero;
    - inexact: in a group that can be cut, and is not the same as zero;
    - heads: in a run of indices that can go as a whole;
    - frozen: in no group that can be cut, for a reason with these words.
    """

    build: Callable[[], nn.Module]
    inputs: ExampleInputs = field(default_factory=lambda: IMAGE)
    exact: Sequence[str] = ()
    inexact: Sequence[str] = ()
    heads: Sequence[str] = ()
    frozen: Mapping[str, str] = field(default_factory=dict)


class Net(nn.Module):
    """A stem, the structure to be shown, a layer behind it and a classifier."""

    def __init__(self, body: nn.Module, width: int = 16, after: int = 16) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.body = body
        self.after = nn.Conv2d(after, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.body(self.stem(x))).relu().mean((2, 3)))


class Apply(nn.Module):
    """A function of the features."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def touching(analysis: Analysis, tensor: str) -> Iterator[tuple[ChannelGroup, np.ndarray]]:
    """The groups that touch an axis, and which indices of it."""
    name, _, dim = tensor.partition("@")
    for group in analysis.groups:
        for axis in group.axes:
            if (axis.tensor, axis.dim) == (name, int(dim or 0)):
                units = axis.units.reshape(-1, axis.units.shape[-1])
                yield group, (units >= 0).any(axis=0)


def covered(analysis: Analysis, tensor: str, wanted: Callable[[ChannelGroup], bool]) -> np.ndarray:
    """Which indices of an axis are in a group that can be cut and is as wanted."""
    size = analysis.shapes[tensor.partition("@")[0]][int(tensor.partition("@")[2] or 0)]
    found = np.zeros(size, dtype=bool)
    for group, indices in touching(analysis, tensor):
        if group.frozen is None and group.size > 1 and wanted(group):
            found |= indices
    return found


def reasons(analysis: Analysis, tensor: str) -> list[str]:
    """Why an axis cannot be cut."""
    return [group.frozen for group, _ in touching(analysis, tensor) if group.frozen]


def check_expected(analysis: Analysis, expected: Structure) -> None:
    """What must be prunable is, and what must not be is not."""
    for tensor in expected.exact:
        found = covered(analysis, tensor, lambda group: group.inexact is None)
        why = [*reasons(analysis, tensor), *(g.inexact for g, _ in touching(analysis, tensor))]
        assert found.all(), f"{tensor} is not exact: {why}"
    for tensor in expected.inexact:
        found = covered(analysis, tensor, lambda group: group.inexact is not None)
        assert found.all(), f"{tensor} is not inexact: {reasons(analysis, tensor)}"
        wrong = covered(analysis, tensor, lambda g: g.inexact is None and not g.runs)
        assert not wrong.any(), f"{tensor} is called exact"
    for tensor in expected.heads:
        found = covered(analysis, tensor, lambda group: group.runs)
        assert found.all(), f"{tensor} has no heads that can go: {reasons(analysis, tensor)}"
    for tensor, words in expected.frozen.items():
        assert not covered(analysis, tensor, lambda _: True).any(), f"{tensor} can be cut"
        found = reasons(analysis, tensor)
        assert any(words in reason for reason in found), f"{tensor}: {found}"


def masks(analysis: Analysis, random: np.random.Generator) -> dict[int, np.ndarray]:
    """Cuts every group that can shrink, equally much in each of its blocks.

    Of three or more, two stay: torch computes an einsum over one index another way.
    """
    keep: dict[int, np.ndarray] = {}
    for number, group in enumerate(analysis.groups):
        rows = np.arange(group.size)[None] if group.blocks is None else group.blocks
        if group.frozen is not None or rows.shape[1] < 2:
            continue
        mask = np.zeros(group.size, dtype=bool)
        kept = random.integers(min(2, rows.shape[1] - 1), rows.shape[1])
        for row in rows:
            mask[random.permutation(row)[:kept]] = True
        keep[number] = mask
    return keep


def with_gradient(net: nn.Module, inputs: ExampleInputs) -> set[str]:
    """The parameters that get a gradient from a pass in train mode."""
    net.train()
    torch.manual_seed(0)
    outputs = [x for x in tree_leaves(run(net, inputs)) if isinstance(x, Tensor)]
    sum(x.square().mean() for x in outputs).backward()
    return {name for name, parameter in net.named_parameters() if parameter.grad is not None}


def check_cut(
    net: nn.Module, inputs: ExampleInputs, analysis: Analysis, keep: dict[int, np.ndarray]
) -> nn.Module:
    """A cut does what the plan says; returns the pruned network."""
    plan = make_plan(analysis, keep)
    pruned = bevel.prune(net, plan)
    bevel.verify_pruning(net, pruned, plan, inputs)
    assert plan.after.params == sum(p.numel() for p in pruned.parameters())
    assert plan.after == bevel.analyze(pruned, inputs).cost()
    return pruned


def check(structure: Structure, seeds: int = 2) -> Analysis:
    """Everything above: expectations, all groups at once, and each group alone."""
    net = randomise(structure.build())
    inputs = structure.inputs
    analysis = bevel.analyze(net, inputs)
    check_expected(analysis, structure)
    everything = masks(analysis, np.random.default_rng(0))
    for seed in range(seeds):
        keep = masks(analysis, np.random.default_rng(seed))
        pruned = check_cut(net, inputs, analysis, keep)
        if keep:
            assert sum(p.numel() for p in pruned.parameters()) < sum(
                p.numel() for p in net.parameters()
            )
    for number, mask in list(everything.items())[:12]:
        check_cut(net, inputs, analysis, {number: mask})
    assert with_gradient(pruned, inputs) == with_gradient(structure.build(), inputs)
    return analysis
