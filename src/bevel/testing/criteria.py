"""The contracts of criteria: a score per row of weights, or per unit that is seen on images.

class TestMine(CriterionContract):  # or DataCriterionContract
    name = "mine"
"""
# ruff: noqa: S101  a contract is stated in assertions

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from bevel.core.errors import PruningError
from bevel.graph.couplings import analyze
from bevel.pruning.apply import prune
from bevel.pruning.criteria import DataCriterion, Statistic, WeightCriterion
from bevel.pruning.planning import plan_pruning
from bevel.pruning.scoring import score_groups
from bevel.pruning.verify import verify_pruning
from bevel.testing.plugin import PluginContract, assert_readable
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
    """Of a criterion of weights: inherit, and set `name`."""

    kind = "criteria"

    def weight(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Random weights, always the same."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def score(self, plugin: WeightCriterion, weight: Tensor, over: tuple[int, ...]) -> Tensor:
        """Scores of the rows, always with the same random numbers."""
        return plugin.score(weight, over, torch.Generator().manual_seed(0))

    def test_says_what_it_looks_at(self, plugin: WeightCriterion) -> None:
        """Whether its scores mean the same everywhere, and sets of roles that exist."""
        assert plugin.NEEDS == "weights"
        assert isinstance(plugin.COMPARABLE, bool)
        assert plugin.ROLES
        assert all(roles and roles <= KNOWN for roles in plugin.ROLES)

    @pytest.mark.parametrize(("shape", "over"), SHAPES)
    def test_one_finite_score_per_row(
        self, plugin: WeightCriterion, shape: tuple[int, ...], over: tuple[int, ...]
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
        self, plugin: WeightCriterion, dtype: torch.dtype
    ) -> None:
        """Within what the precision holds."""
        for shape, over in SHAPES:
            weight = self.weight(shape, dtype)
            expected = self.score(plugin, weight.double(), over).double()
            assert torch.allclose(self.score(plugin, weight, over).double(), expected, rtol=1e-4)

    def test_scores_can_be_made_comparable(self, plugin: WeightCriterion) -> None:
        """Those that mean something else in each tensor are divided by their mean."""
        if not plugin.COMPARABLE:
            for shape, over in SHAPES:
                assert bool((self.score(plugin, self.weight(shape), over) >= 0).all())

    def test_same_weights_and_seed_give_the_same_scores(self, plugin: WeightCriterion) -> None:
        """Bit for bit; the weights stay as they are."""
        for shape, over in SHAPES:
            weight = self.weight(shape)
            assert torch.equal(self.score(plugin, weight, over), self.score(plugin, weight, over))
            assert torch.equal(weight, self.weight(shape))

    def test_network_pruned_by_it_is_proven(self, plugin: WeightCriterion) -> None:  # noqa: ARG002
        """The whole way: plan, prune, verify."""
        net = small_network()
        plan = plan_pruning(
            net, images(2), criterion=self.name, allocate="uniform", budget={"macs": 0.7}, align=1
        )
        pruned = prune(net, plan)
        verify_pruning(net, pruned, plan, images(2))
        assert plan.after.macs <= 0.7 * plan.before.macs


class DataCriterionContract(PluginContract):
    """Of a criterion that looks at images: inherit, and set `name`."""

    kind = "criteria"

    def observed(self, plugin: DataCriterion, images: int = 12) -> Tensor:
        """What a statistic is given: maps (N, 6, 5, 4) as a ReLU leaves them, or gradients."""
        random = torch.Generator().manual_seed(0)
        if plugin.NEEDS == "labels":
            return torch.randn(images, 6, generator=random)
        scale = torch.linspace(0.1, 3, 6)[:, None, None]  # more of one unit than of another
        return (scale * torch.randn(images, 6, 5, 4, generator=random) + scale - 1.5).relu()

    def calibration(self) -> list[tuple[Tensor, Tensor]]:
        """Two batches for the small network."""
        return [(images(8, seed), torch.arange(8) % 10) for seed in (1, 2)]

    def given(self, plugin: DataCriterion, *parts: Tensor) -> Statistic:
        """A statistic that was given these."""
        statistic = plugin.start()
        for part in parts:
            statistic.update(part)
        return statistic

    def test_says_what_it_looks_at(self, plugin: DataCriterion) -> None:
        """What it is given, and whether its scores mean the same everywhere."""
        assert plugin.NEEDS in ("images", "labels")
        assert isinstance(plugin.COMPARABLE, bool)

    def test_one_finite_score_per_unit(self, plugin: DataCriterion) -> None:
        """They differ, or there would be nothing to choose by; and can be made comparable."""
        scores = self.given(plugin, self.observed(plugin)).scores()
        assert scores.shape == (6,)
        assert scores.is_floating_point()
        assert bool(torch.isfinite(scores).all())
        assert len(scores.unique()) > 1
        assert plugin.COMPARABLE or bool((scores >= 0).all())

    def test_batches_make_no_difference(self, plugin: DataCriterion) -> None:
        """One by one, in parts of unequal size, or all at once."""
        observed = self.observed(plugin)
        whole = self.given(plugin, observed).scores()
        for sizes in (1, [5, 1, 6]):
            parts = self.given(plugin, *observed.split(sizes)).scores()
            assert torch.allclose(parts, whole, rtol=1e-9, atol=1e-12)

    def test_memory_does_not_grow_with_the_images(self, plugin: DataCriterion) -> None:
        """All that a statistic holds, after 24 images and after 240."""
        parts = [self.observed(plugin) for _ in range(20)]
        few, many = (len(pickle.dumps(self.given(plugin, *parts[:n]))) for n in (2, 20))
        assert many - few < 16  # a larger count may take some bytes more

    def test_what_is_seen_stays_as_it_is(self, plugin: DataCriterion) -> None:
        """The network goes on with it."""
        observed = self.observed(plugin)
        self.given(plugin, observed)
        assert torch.equal(observed, self.observed(plugin))

    def test_network_is_left_as_it_was(self, plugin: DataCriterion) -> None:  # noqa: ARG002
        """Weights, gradients, modes, hooks and the caller's random numbers; same scores again."""
        net = small_network()
        net.train()
        net.requires_grad_(True)
        state, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
        analysis = analyze(net, images(2))
        first, second = (
            score_groups(net, analysis, self.name, calibration=self.calibration()) for _ in "ab"
        )
        assert first.keys() == second.keys() != set()
        assert all((first[group] == second[group]).all() for group in first)
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in net.parameters())
        assert all(module.training for module in net.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        assert torch.equal(torch.get_rng_state(), random)

    def test_without_images_it_is_one_line(self, plugin: DataCriterion) -> None:  # noqa: ARG002
        """That says what would be possible."""
        with pytest.raises(PruningError, match="without images: ") as caught:
            plan_pruning(small_network(), images(2), criterion=self.name, ratio=0.5)
        assert_readable(caught.value)

    def test_network_pruned_by_it_is_proven(self, plugin: DataCriterion) -> None:  # noqa: ARG002
        """The whole way: plan, prune, verify."""
        net = small_network()
        plan = plan_pruning(
            net,
            images(2),
            criterion=self.name,
            allocate="uniform",
            budget={"macs": 0.7},
            align=1,
            calibration=self.calibration(),
        )
        verify_pruning(net, prune(net, plan), plan, images(2))
        assert plan.after.macs <= 0.7 * plan.before.macs
