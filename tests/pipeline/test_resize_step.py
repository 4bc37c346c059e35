"""A recipe that shows the compressed network smaller images than the original."""

from __future__ import annotations

import copy
import json

import pytest

import bevel
from bevel.core import recipe as recipes
from bevel.core.errors import ModelError
from bevel.finetuning.train import finetune
from bevel.pipeline.running import compress
from bevel.runtimes import open_artifact
from bevel.testing.plugin import assert_readable

NET = """
from torch import nn


def net(num_classes=10, pooled=True):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4) if pooled else nn.Identity(), nn.Flatten(),
        nn.Linear(256 if pooled else 1024, num_classes),
    )
"""
PLAIN = {"precision": "float32", "compile": "never"}


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "plain.py"
    file.write_text(NET)
    return {
        "version": 1,
        "name": "smaller",
        "model": {"name": f"{file}:net"},
        "data": {"name": "digits", "batch_size": 64, "size": 16},
        "steps": [
            {"train": {"epochs": 2, **PLAIN}},
            {"resize": {"size": 8}},
            {"finetune": {"epochs": 2, "distill": {}, **PLAIN}},
        ],
        "calibration": {"images": 64},
        "targets": [{"runtime": "onnxruntime", "precision": "int8"}],
    }


def test_files_of_both_sizes_are_measured_on_images_of_their_own(recipe, tmp_path):
    folder = tmp_path / "run"
    recipe = recipes.validate(recipe)
    bevel.run(recipe, out=folder)
    record = json.loads((folder / "run.json").read_text())
    resized = record["steps"][1]["numbers"]
    assert resized["input_shape"] == [1, 8, 8]
    convolutions = 16 * 9 * 256 + 16 * 16 * 9 * 64
    assert resized["macs_before"] == record["original"]["macs"] == convolutions + 2560
    assert resized["macs"] == record["compressed"]["macs"] == convolutions / 4 + 2560
    sizes = {
        (m["label"], m["artifact"]["precision"]): m["artifact"]["inputs"][0]["shape"][-1]
        for m in record["measurements"]
    }
    assert sizes == {
        ("original", "float32"): 16,
        ("compressed", "float32"): 8,
        ("compressed", "int8"): 8,
    }
    for measurement in record["measurements"]:
        assert measurement["accuracy"]["images"] == 359
        assert measurement["accuracy"]["top1"] > 0.8
        assert measurement["parity"]["top1_agreement"] > 0.95
    meta = bevel.package(folder, tmp_path / "kit").meta
    assert meta.input.shape == [1, 1, 8, 8]
    assert meta.preprocessing.crop == 8
    modified = (folder / "artifacts/compressed-onnxruntime-int8.onnx").stat().st_mtime_ns
    bevel.run(recipe, out=folder)  # finished: nothing is done again
    assert (folder / "artifacts/compressed-onnxruntime-int8.onnx").stat().st_mtime_ns == modified
    assert open_artifact(folder / "artifacts/compressed-onnxruntime-int8.onnx").runtime


@pytest.mark.parametrize("features", [0.0, 1.0])
def test_the_teacher_sees_its_own_size_unless_feature_maps_are_compared(
    recipe, tmp_path, monkeypatch, features
):
    seen = []
    recipe["steps"][0]["train"]["epochs"] = recipe["steps"][2]["finetune"]["epochs"] = 1
    recipe["steps"][2]["finetune"]["distill"] = {"features": features}

    def watched(net, *arguments, teacher=None, **options):
        if teacher is not None:
            teacher = copy.deepcopy(teacher)
            teacher[0].register_forward_pre_hook(lambda _, images: seen.append(images[0].shape))
        return finetune(net, *arguments, teacher=teacher, **options)

    monkeypatch.setattr("bevel.pipeline.flow.finetune", watched)
    compress(recipes.validate(recipe), out=tmp_path / "run", steps=3)
    assert {tuple(shape[2:]) for shape in seen} == {(8, 8) if features else (16, 16)}


def test_a_network_that_takes_one_size_only_is_refused_in_a_line(recipe, tmp_path):
    recipe["model"]["arguments"] = {"pooled": False}
    with pytest.raises(ModelError) as caught:
        bevel.run(recipes.validate(recipe), out=tmp_path / "run")
    assert_readable(caught.value)
