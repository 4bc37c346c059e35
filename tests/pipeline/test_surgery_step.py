"""A recipe that operates before it prunes."""

from __future__ import annotations

import json

import pytest
import torch

import bevel
from bevel.core import recipe as recipes
from bevel.core.errors import RecipeError
from bevel.models import build
from bevel.models.fading import fades
from bevel.testing.plugin import assert_readable

NET = """
import torch
from torch import nn

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU())
        self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.second = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.first(x)
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        x = self.norm(self.second(x * gate))
        x = x * torch.sigmoid(x)
        return self.head(x.mean((2, 3)))
"""
PLAIN = {"precision": "float32", "compile": "never"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("net") / "gated.py"
    file.write_text(NET)
    return {
        "version": 1,
        "name": "lite",
        "model": {"name": f"{file}:Gated"},
        "data": {"name": "digits", "batch_size": 64},
        "steps": [
            {"train": {"epochs": 4, **PLAIN}},
            {"surgery": {"rules": "lite"}},
            {"finetune": {"epochs": 1, "distill": {}, **PLAIN}},
            {"prune": {"budget": {"macs": 0.6}, "align": 4}},
        ],
        "calibration": {"images": 128},
        "targets": [{"runtime": "onnxruntime", "precision": "int8"}],
    }


def test_the_lite_network_is_trained_pruned_and_reloaded(recipe, tmp_path):
    folder = tmp_path / "run"
    bevel.run(recipes.validate(recipe), out=folder)
    record = json.loads((folder / "run.json").read_text())
    surgery, finetune = (
        s["numbers"] for s in record["steps"] if s["verb"] in ("surgery", "finetune")
    )
    assert [site["rule"] for site in surgery["sites"]] == ["squeeze_excite", "silu", "silu"]
    assert surgery["params"] < surgery["params_before"]
    assert surgery["validation_top1"] > 0.5 * surgery["validation_top1_before"]
    assert finetune["validation_top1"] > 0.5
    assert record["original"]["params"] == surgery["params_before"]
    report = (folder / "report.md").read_text()
    assert "step 2, squeeze_excite: 1 of 1 places; mean error there" in report
    name = recipe["model"]["name"]
    net = bevel.load_pruned(lambda: build(name, {}), folder / "compressed.safetensors")
    x = torch.randn(2, 1, 8, 8)
    called = [str(node.target) for node in torch.export.export(net, (x,)).graph.nodes]
    assert any("relu" in name for name in called)
    assert not any("sigmoid" in name for name in called)


def test_surgery_comes_before_pruning(recipe):
    steps = [{"prune": {"ratio": 0.2}}, {"surgery": {}}]
    with pytest.raises(RecipeError, match="surgery comes before"):
        recipes.validate({**recipe, "steps": steps})


def test_progressive_surgery_ends_in_relu(recipe, tmp_path):
    steps = [
        {"surgery": {"rules": ["silu"], "progressive": True}},
        {"finetune": {"epochs": 2, **PLAIN}},
    ]
    folder = tmp_path / "run"
    bevel.run(recipes.validate(recipe | {"steps": steps}), out=folder)
    between = bevel.load_pruned(
        lambda: build(recipe["model"]["name"]), folder / "steps/01-surgery/model.safetensors"
    )
    assert fades(between)
    result = bevel.load_pruned(
        lambda: build(recipe["model"]["name"]), folder / "compressed.safetensors"
    )
    assert not fades(result)
    assert isinstance(result.first[2], torch.nn.ReLU)
    with pytest.raises(RecipeError, match="finetune step") as caught:
        recipes.validate(recipe | {"steps": steps[:1]})
    assert_readable(caught.value)
