"""The contract of criteria: a score per unit, from the weights alone.

class TestMine(CriterionContract):
    name = "mine"
"""
# ruff: noqa: S101  a contract is stated in assertions

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bevel.pruning.apply import prune
from bevel.pruning.criteria import Criterion, Member
from bevel.pruning.planning import plan_pruning
from bevel.pruning.verify import verify_pruning
from bevel.testing.plugin import PluginContract
from bevel.testing.runtimes import images, small_network

SIZE = 12


def members() -> list[Member]:
    """A group of 12 units: two filters (one makes half of the units, in another order), what
    reads them, scale and bias.
    """
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(SIZE)

    def rows(count: int, width: int) -> Tensor:
        return torch.randn(count, width, generator=generator)

    return [
        Member("conv.weight", "filter", rows(SIZE, 27), every),
        Member("half.weight", "filter", rows(6, 9), torch.tensor([9, 7, 5, 3, 1, 0])),
        Member("next.weight", "input", rows(SIZE, 18), every),
        Member("norm.weight", "norm", rows(SIZE, 1), every),
        Member("norm.bias", "bias", rows(SIZE, 1), every),
    ]


class CriterionContract(PluginContract):
    """Inherit, and set `name`."""

    kind = "criteria"

    def score(self, plugin: Criterion, group: Sequence[Member]) -> Tensor | None:
        """Scores of the group, always with the same random numbers."""
        return plugin.score(group, SIZE, torch.Generator().manual_seed(0))

    def test_one_finite_score_per_unit(self, plugin: Criterion) -> None:
        """They differ, or there would be nothing to choose by."""
        scores = self.score(plugin, members())
        assert scores is not None
        assert scores.shape == (SIZE,)
        assert scores.is_floating_point()
        assert bool(torch.isfinite(scores).all())
        assert len(scores.unique()) > 1

    def test_scores_can_be_made_comparable(self, plugin: Criterion) -> None:
        """Those that mean something else in each layer are divided by their mean."""
        assert isinstance(plugin.COMPARABLE, bool)
        if not plugin.COMPARABLE:
            scores = self.score(plugin, members())
            assert scores is not None
            assert bool((scores >= 0).all())

    def test_same_weights_and_seed_give_the_same_scores(self, plugin: Criterion) -> None:
        """Bit for bit; the weights stay as they are."""
        group = members()
        first, second = self.score(plugin, group), self.score(plugin, group)
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)
        for before, after in zip(members(), group, strict=True):
            assert torch.equal(before.rows, after.rows)

    def test_nothing_to_score(self, plugin: Criterion) -> None:
        """A group without weights has scores for all units or none at all."""
        scores = self.score(plugin, [])
        assert scores is None or scores.shape == (SIZE,)

    def test_network_pruned_by_it_is_proven(self, plugin: Criterion) -> None:  # noqa: ARG002
        """The whole way: plan, prune, verify."""
        net = small_network()
        plan = plan_pruning(
            net, images(2), criterion=self.name, allocate="uniform", budget={"macs": 0.7}, align=1
        )
        pruned = prune(net, plan)
        verify_pruning(net, pruned, plan, images(2))
        assert plan.after.macs <= 0.7 * plan.before.macs
