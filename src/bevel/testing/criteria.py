"""The contract of criteria: a score per row, from the weights alone.

class TestMine(CriterionContract):
    name = "mine"
"""
# ruff: noqa: S101  a contract is stated in assertions

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bevel.pruning.apply import prune
from bevel.pruning.criteria import Criterion
from bevel.pruning.planning import plan_pruning
from bevel.pruning.verify import verify_pruning
from bevel.testing.plugin import PluginContract
from bevel.testing.runtimes import images, small_network

KNOWN = {"filter", "input", "norm", "bias", "other", "unit"}
SHAPES = [
    ((12, 27), (1,)),  # filters of a linear layer
    ((9, 12), (0,)),  # what reads a channel
    ((12, 5, 3, 3), (1, 2, 3)),
    ((5, 12, 3, 3), (0, 2, 3)),
    ((3, 8, 4, 3, 3), (1, 3, 4)),  # what reads a channel in each block of a grouped convolution
    ((12, 1), (1,)),  # scales
]
"""Weights, and the dimensions over which they are reduced."""


class CriterionContract(PluginContract):
    """Inherit, and set `name`."""

    kind = "criteria"

    def weight(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Random weights, always the same."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def score(self, plugin: Criterion, weight: Tensor, over: tuple[int, ...]) -> Tensor:
        """Scores of the rows, always with the same random numbers."""
        return plugin.score(weight, over, torch.Generator().manual_seed(0))

    def test_says_what_it_looks_at(self, plugin: Criterion) -> None:
        """Whether its scores mean the same everywhere, and sets of roles that exist."""
        assert isinstance(plugin.COMPARABLE, bool)
        assert plugin.ROLES
        assert all(roles and roles <= KNOWN for roles in plugin.ROLES)

    @pytest.mark.parametrize(("shape", "over"), SHAPES)
    def test_one_finite_score_per_row(
        self, plugin: Criterion, shape: tuple[int, ...], over: tuple[int, ...]
    ) -> None:
        """They differ, or there would be nothing to choose by."""
        scores = self.score(plugin, self.weight(shape), over)
        rows = [size for dim, size in enumerate(shape) if dim not in over]
        assert list(scores.shape) == rows
        assert scores.is_floating_point()
        assert bool(torch.isfinite(scores).all())
        assert len(scores.unique()) > 1

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_scores_of_other_precisions_are_near(
        self, plugin: Criterion, dtype: torch.dtype
    ) -> None:
        """Within what the precision holds."""
        for shape, over in SHAPES:
            weight = self.weight(shape, dtype)
            expected = self.score(plugin, weight.double(), over).double()
            assert torch.allclose(self.score(plugin, weight, over).double(), expected, rtol=1e-4)

    def test_scores_can_be_made_comparable(self, plugin: Criterion) -> None:
        """Those that mean something else in each tensor are divided by their mean."""
        if not plugin.COMPARABLE:
            for shape, over in SHAPES:
                assert bool((self.score(plugin, self.weight(shape), over) >= 0).all())

    def test_same_weights_and_seed_give_the_same_scores(self, plugin: Criterion) -> None:
        """Bit for bit; the weights stay as they are."""
        for shape, over in SHAPES:
            weight = self.weight(shape)
            assert torch.equal(self.score(plugin, weight, over), self.score(plugin, weight, over))
            assert torch.equal(weight, self.weight(shape))

    def test_network_pruned_by_it_is_proven(self, plugin: Criterion) -> None:  # noqa: ARG002
        """The whole way: plan, prune, verify."""
        net = small_network()
        plan = plan_pruning(
            net, images(2), criterion=self.name, allocate="uniform", budget={"macs": 0.7}, align=1
        )
        pruned = prune(net, plan)
        verify_pruning(net, pruned, plan, images(2))
        assert plan.after.macs <= 0.7 * plan.before.macs
