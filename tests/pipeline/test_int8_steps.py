"""A recipe with training for int8 and a limit on what int8 may lose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bevel
from bevel.core import recipe as recipes
from bevel.core.errors import RecipeError

PLAIN = {"precision": "float32", "compile": "never"}
RECIPE = {
    "version": 1,
    "name": "int8",
    "model": {"name": "bevel:resnet20", "arguments": {"in_channels": 1}},
    "data": {"name": "digits", "batch_size": 64},
    "steps": [
        {"train": {"epochs": 2, **PLAIN}},
        {"prune": {"budget": {"macs": 0.5}, "align": 4}},
        {"qat": {"epochs": 2, "distill": {"weight": 0.5}, **PLAIN}},
    ],
    "calibration": {"images": 64},
    "quantization": {"accuracy_drop": 0.02},
    "targets": [{"runtime": "onnxruntime", "precision": "int8"}],
}


def test_the_report_splits_the_change_of_accuracy(tmp_path):
    folder = tmp_path / "run"
    bevel.run(recipes.validate(RECIPE), out=folder)
    record = json.loads((folder / "run.json").read_text())
    steps = {step["verb"]: step["numbers"] for step in record["steps"]}
    assert 0 < steps["qat"]["validation_top1_int8"] <= 1
    first, last = (epoch["loss"] for epoch in steps["qat"]["history"])
    assert last < 0.7 * first  # it learns: less than half is left of it with the seeds tried
    # An image of the split is 0.7 %; a training that broke the network would cost tens of them.
    assert steps["qat"]["validation_top1"] >= steps["prune"]["validation_top1"] - 0.03
    exports = [s["numbers"] for s in record["steps"] if s["verb"] == "export"]
    (int8,) = [n for n in exports if n["artifact"]["precision"] == "int8"]
    assert int8["validation_top1"] >= steps["qat"]["validation_top1"] - 0.03
    fallback = int8["fallback"]
    assert fallback["accuracy"] >= fallback["limit"] or fallback["keep_float"]
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        assert "export compressed int8 (onnxruntime)" in text
        assert "Layers that stay in float" in text
        assert fallback["summary"] in text
    assert Path(folder / "compressed.safetensors").exists()


def test_qat_needs_to_know_whose_int8_it_is():
    targets = [{"runtime": "onnxruntime", "precision": "float32"}]
    with pytest.raises(RecipeError, match="int8 target"):
        recipes.validate(RECIPE | {"targets": targets})
    steps = [{"qat": {"epochs": 1, "runtime": "onnxruntime"}}]
    assert recipes.validate(RECIPE | {"targets": targets, "steps": steps}).steps[0].verb == "qat"
