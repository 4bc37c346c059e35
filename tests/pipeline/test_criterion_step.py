"""A prune step whose criterion looks at images: it gets them, and keeps what it found."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import bevel
from bevel.core import recipe as recipes
from bevel.pipeline.flow import Flow
from bevel.pipeline.folder import RunFolder
from bevel.pipeline.running import compress
from bevel.pruning.scoring import score_groups

RECIPE = {
    "version": 1,
    "name": "taylor",
    "model": {"name": "bevel:resnet20", "arguments": {"in_channels": 1}},
    "data": {"name": "digits", "batch_size": 64},
    "steps": [
        {"train": {"epochs": 1, "lr": 0.1, "precision": "float32", "compile": "never"}},
        {"prune": {"criterion": "taylor", "budget": {"macs": 0.6}, "align": 4}},
    ],
    "calibration": {"images": 96},
    "targets": [{"runtime": "onnxruntime"}],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "taylor"
    compress(recipes.validate(RECIPE), out=folder, steps=2)
    return folder


def test_a_recipe_prunes_by_taylor(finished):
    step = json.loads((finished / "run.json").read_text())["steps"][1]["numbers"]
    assert step["proof"]["passed"]
    assert step["macs"] <= 0.6 * step["macs_before"]
    assert step["notes"]  # of what stays whole; nothing of it for want of a score
    assert not [note for note in step["notes"] if "nothing to score" in note]


def test_the_scores_that_a_step_keeps_are_those_of_its_calibration_images(finished, monkeypatch):
    """Found again by another attempt at the step, which runs no pass for them."""
    (kept,) = (finished / "steps/02-prune/scores").iterdir()
    recipe = recipes.validate(RECIPE)
    with RunFolder(finished, recipe) as folder:
        flow = Flow(recipe, folder)
    trained = flow._restore(finished / "steps/01-train/model.safetensors", flow._data())
    analysis = bevel.analyze(trained.net, trained.example)
    images = trained.data.batches("validation", limit=96)
    expected = score_groups(trained.net, analysis, "taylor", calibration=images)
    for name, rows in load_file(kept).items():
        assert rows[0] == pytest.approx(expected[int(name)], rel=1e-4, abs=1e-12)
    assert len(load_file(kept)) == len(expected)

    def refuse(*_):
        raise AssertionError("a pass for scores that are known")

    monkeypatch.setattr("bevel.pruning.scoring.observe", refuse)
    again, _ = flow._prune(trained, recipe.steps[1].prune, finished / "steps/02-prune")
    for mine, theirs in zip(
        again.net.state_dict().values(),
        flow._restore(finished / "steps/02-prune/model.safetensors", trained.data)
        .net.state_dict()
        .values(),
        strict=True,
    ):
        assert np.array_equal(mine.numpy(), theirs.numpy())


def test_explain_needs_no_scores():
    explanation = bevel.explain(recipes.validate(RECIPE))
    assert explanation.planned is None  # it depends on the images
    assert all(group.widths for group in explanation.groups)
    prune = next(step for step in explanation.steps if step.verb == "prune")
    assert prune.what.startswith("taylor / global")
    assert prune.seconds > 0
