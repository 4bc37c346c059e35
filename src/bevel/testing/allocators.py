"""The contract of allocators: limits are met, with widths that are allowed.

class TestMine(AllocatorContract):
    name = "mine"
"""
# ruff: noqa: S101  a contract is stated in assertions

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from bevel.core.errors import PruningError
from bevel.pruning.allocate import Allocator
from bevel.pruning.apply import prune
from bevel.pruning.plan import PruningPlan
from bevel.pruning.planning import plan_pruning
from bevel.testing.plugin import PluginContract, assert_readable
from bevel.testing.runtimes import images, small_network


def batches() -> list[tuple[Tensor, Tensor]]:
    """Images with the labels that the unpruned network gives them."""
    net = small_network()
    with torch.no_grad():
        return [(batch, net(batch).argmax(dim=1)) for batch in (images(32, 1), images(32, 2))]


class AllocatorContract(PluginContract):
    """Inherit, and set `name`."""

    kind = "allocators"

    def plan(self, plugin: Allocator, budget: Mapping[str, float], align: int = 1) -> PruningPlan:
        """A plan for the small network."""
        calibration = batches() if plugin.NEEDS_CALIBRATION else None
        return plan_pruning(
            small_network(),
            images(2),
            criterion="l1",
            allocate=self.name,
            budget=budget,
            align=align,
            calibration=calibration,
        )

    @pytest.mark.parametrize(
        "budget", [{"macs": 0.6}, {"params": 0.5}, {"macs": 0.8, "params": 0.6}]
    )
    def test_meets_the_budget(self, plugin: Allocator, budget: Mapping[str, float]) -> None:
        """Every limit of it, and the network is really smaller."""
        plan = self.plan(plugin, budget)
        for quantity, limit in budget.items():
            assert getattr(plan.after, quantity) <= limit * getattr(plan.before, quantity)
        assert plan.after.params > 0

    def test_widths_are_aligned(self, plugin: Allocator) -> None:
        """Multiples of `align`, in the network that is built by the plan."""
        net = small_network()
        pruned = prune(net, self.plan(plugin, {"macs": 0.6}, align=4))
        widths = {
            module.out_channels
            for module in pruned.modules()
            if isinstance(module, torch.nn.Conv2d)
        }
        assert widths != {16}
        assert all(width % 4 == 0 for width in widths)

    def test_same_problem_gives_the_same_plan(self, plugin: Allocator) -> None:
        """Bit for bit."""
        first, second = (self.plan(plugin, {"macs": 0.6}) for _ in range(2))
        assert first == second

    def test_says_what_it_needs(self, plugin: Allocator) -> None:
        """Calibration data or none; without what it needs it is one line."""
        assert isinstance(plugin.NEEDS_CALIBRATION, bool)
        if plugin.NEEDS_CALIBRATION:
            with pytest.raises(PruningError) as caught:
                plan_pruning(small_network(), images(2), allocate=self.name, ratio=0.5)
            assert_readable(caught.value)

    def test_refuses_what_cannot_be_reached(self, plugin: Allocator) -> None:
        """One line that says what can be, and the numbers of it."""
        with pytest.raises(PruningError) as caught:
            self.plan(plugin, {"macs": 0.001})
        assert_readable(caught.value)
        assert 0.001 < caught.value.reachable["macs"] < 1

    def test_finds_room_for_every_group(self, plugin: Allocator) -> None:
        """No group is emptied by a harsh budget."""
        pruned = prune(small_network(), self.plan(plugin, {"macs": 0.2}))
        smallest = np.min([parameter.shape[0] for parameter in pruned.parameters()])
        assert smallest >= 1
