"""Sparse training: what is to go has lost its weight by then."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import bevel
import residual
from bevel.core import recipe as recipes
from bevel.core.errors import RecipeError
from bevel.pipeline.running import compress
from bevel.pruning.apply import mask
from bevel.pruning.sparsity import growing, slimming

PLAIN = {"precision": "float32", "compile": "never"}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4),
        nn.ReLU(), nn.Conv2d(16, 8, 1),
    )  # fmt: skip


def test_a_growing_penalty_is_on_what_goes_and_on_nothing_else():
    own, x = net(), torch.randn(2, 3, 8, 8)
    plan = bevel.plan_pruning(own, x, ratio=0.5, align=1)
    masked = dict(mask(own, plan).named_parameters())
    penalty = growing(own, plan, strength=3.0)
    for over in (0.0, 0.25, 1.0):
        for parameter in own.parameters():
            parameter.grad = torch.ones_like(parameter)
        penalty(own, over=over)
        for name, parameter in own.named_parameters():
            removed = parameter - masked[name]  # what is set to zero
            torch.testing.assert_close(parameter.grad, 1 + 3.0 * over * removed)
    assert any(not torch.equal(p, masked[n]) for n, p in own.named_parameters())


def test_slimming_draws_scales_of_batch_norms_only():
    own = net()
    with torch.no_grad():
        own[1].weight[:8] *= -1
    for parameter in own.parameters():
        parameter.grad = torch.zeros_like(parameter)
    slimming(0.5)(own, over=0.3)
    assert torch.equal(own[1].weight.grad, 0.5 * own[1].weight.sign())
    assert all(not p.grad.any() for n, p in own.named_parameters() if n != "1.weight")


def recipe(**sparsify: object) -> dict[str, object]:
    return {
        "version": 1,
        "name": "sparse",
        "model": {"name": residual.FACTORY},
        "data": {"name": "digits", "batch_size": 64},
        "steps": [
            {"train": {"epochs": 1, **PLAIN}},
            {"sparsify": {"epochs": 3, **PLAIN, **sparsify}},
            {"prune": {"ratio": 0.25, "align": 4, "reconstruct": False}},
        ],
        "calibration": {"images": 64},
        "targets": [{"runtime": "eager"}],
    }


def test_removing_what_was_held_down_costs_next_to_nothing(tmp_path):
    lost = {}
    for strength in (1e-6, 30.0):
        compress(recipes.validate(recipe(strength=strength)), out=tmp_path / str(strength), steps=3)
        record = json.loads((tmp_path / str(strength) / "run.json").read_text())
        numbers = record["steps"][2]["numbers"]
        lost[strength] = numbers["validation_top1_before"] - numbers["validation_top1"]
    assert lost[30.0] <= 0.02
    assert lost[30.0] < lost[1e-6]


def test_a_growing_penalty_needs_something_to_remove():
    steps = recipe()["steps"][:2]
    with pytest.raises(RecipeError, match="sparsify step needs a prune step"):
        recipes.validate(recipe() | {"steps": steps})
    recipes.validate(recipe(penalty="slimming") | {"steps": [steps[0], {"sparsify": {
        "epochs": 1, "penalty": "slimming"}}]})  # fmt: skip
