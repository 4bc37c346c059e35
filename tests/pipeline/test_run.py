"""The whole flow on digits: what it leaves, and that a killed run ends with the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import bevel
from bevel.core import recipe as recipes
from bevel.core.errors import RunFolderError, UnknownNameError
from bevel.core.files import sha256
from bevel.core.progress import Reporter, reporting
from bevel.pipeline.folder import RunFolder
from bevel.pipeline.running import compress
from bevel.pipeline.sharing import adopt
from bevel.runtimes import open_artifact
from bevel.runtimes.onnxruntime import open_session

RECIPE = {
    "version": 1,
    "name": "short",
    "model": {"name": "bevel:resnet20", "arguments": {"in_channels": 1}},
    "data": {"name": "digits", "batch_size": 64},
    "steps": [
        {"train": {"epochs": 2, "lr": 0.1, "precision": "float32", "compile": "never"}},
        {"prune": {"criterion": "l2", "allocate": "global", "budget": {"macs": 0.5}, "align": 4}},
        {
            "finetune": {
                "epochs": 2,
                "precision": "float32",
                "compile": "never",
                "distill": {"weight": 0.5},
            }
        },
    ],
    "calibration": {"images": 64},
    "targets": [
        {"runtime": "onnxruntime", "precision": "float32"},
        {"runtime": "onnxruntime", "precision": "int8"},
    ],
}
FILES = (
    "compressed.safetensors",
    "artifacts/original-onnxruntime-float32.onnx",
    "artifacts/compressed-onnxruntime-float32.onnx",
    "artifacts/compressed-onnxruntime-int8.onnx",
)


def digests(folder: Path) -> dict[str, str]:
    return {name: sha256(folder / name) for name in FILES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    bevel.run(recipes.validate(RECIPE), out=folder)
    return folder


def test_a_run_leaves_everything_it_promises(finished):
    record = json.loads((finished / "run.json").read_text())
    assert record["finished"] is not None
    verbs = [step["verb"] for step in record["steps"]]
    assert verbs == ["train", "prune", "finetune", "export", "export", "export"]
    prune = record["steps"][1]["numbers"]
    assert prune["proof"]["passed"]
    assert prune["proof"]["max_relative_difference"] < 1e-12
    assert prune["macs"] <= 0.5 * prune["macs_before"]
    assert record["compressed"]["macs"] == prune["macs"]
    assert {(m["label"], m["artifact"]["precision"]) for m in record["measurements"]} == {
        ("original", "float32"),
        ("compressed", "float32"),
        ("compressed", "int8"),
    }
    for measurement in record["measurements"]:
        assert measurement["accuracy"]["images"] == 359
        assert len(measurement["latency"]["samples_ms"]) >= 100
        assert measurement["peak_memory_bytes"] > 1e6
    for name in ("recipe.yaml", "report.html", "report.md", *FILES):
        assert (finished / name).stat().st_size > 0
    assert recipes.load(finished / "recipe.yaml") == recipes.validate(RECIPE)


def test_the_reported_accuracy_is_that_of_the_exported_file(finished):
    data = bevel.load_data(recipes.validate(RECIPE).data, seed=0)
    record = json.loads((finished / "run.json").read_text())
    for measurement in record["measurements"]:
        session = open_session(
            finished / "artifacts" / Path(measurement["artifact"]["path"]).name, 1
        )
        right = [
            session.run([images.numpy()])[0].argmax(1) == labels.numpy()
            for images, labels in data.batches("test")
        ]
        assert np.concatenate(right).mean() == pytest.approx(measurement["accuracy"]["top1"])


def test_a_finished_run_is_not_run_again(finished):
    before = (finished / "run.json").read_bytes()

    def written() -> dict[Path, int]:
        files = (path for path in finished.rglob("*") if path.is_file() and path.name != ".lock")
        return {path: path.stat().st_mtime_ns for path in files}

    times = written()
    bevel.run(recipes.validate(RECIPE), out=finished)
    assert written() == times
    assert (finished / "run.json").read_bytes() == before


def test_the_compressed_file_loads_by_itself(finished):
    from bevel.models import build
    from bevel.pruning.apply import read_metadata

    plan, model = read_metadata(finished / "compressed.safetensors")
    net = bevel.load_pruned(
        lambda: build(model["name"], model["arguments"]), finished / "compressed.safetensors"
    )
    assert sum(p.numel() for p in net.parameters()) == plan.after.params
    assert model["input_shape"] == [1, 1, 8, 8]
    assert open_artifact(finished / FILES[3]).quantizer is not None


def kill_when(folder: Path, recipe: Path, ready) -> None:
    """Start a run and SIGKILL it as soon as `ready()` holds."""
    command = [sys.executable, "-m", "bevel", "run", str(recipe), "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it could be killed"
        assert ready()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_killed_in_finetuning_and_in_export_it_ends_with_the_same_bytes(finished, tmp_path):
    recipe, folder = tmp_path / "recipe.json", tmp_path / "killed"
    recipe.write_text(json.dumps(RECIPE))  # JSON is YAML
    epoch = folder / "steps/03-finetune/training/epoch.safetensors"
    kill_when(folder, recipe, epoch.exists)
    steps = json.loads((folder / "run.json").read_text())["steps"]
    assert [step["verb"] for step in steps] == ["train", "prune"]

    def exporting() -> bool:
        text = (folder / "run.json").read_text()
        return "04-export" in text and "06-export" not in text

    kill_when(folder, recipe, exporting)
    record = bevel.run(recipes.load(recipe), out=folder)
    assert record.finished is not None
    assert digests(folder) == digests(finished)


def test_a_damaged_file_is_made_again(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / FILES[3]).write_bytes(b"damaged")
    compress(recipes.validate(RECIPE), out=folder)
    assert digests(folder) == digests(finished)


def test_another_recipe_in_the_same_folder_is_refused(finished):
    other = json.loads(json.dumps(RECIPE))
    other["steps"][1]["prune"]["align"] = 8
    with pytest.raises(RunFolderError, match=r"another recipe \(steps.1.prune.align: 4 there, 8"):
        bevel.run(recipes.validate(other), out=finished)


def test_another_recipe_takes_over_the_steps_that_are_the_same(finished, tmp_path):
    other = RECIPE | {"targets": [{"runtime": "eager"}]}
    done = compress(recipes.validate(other), out=tmp_path / "run", leading=[finished])
    before = json.loads((finished / "run.json").read_text())["steps"][:3]
    assert [step.model_dump(mode="json") for step in done.steps[:3]] == before  # with their seconds
    assert done.steps[3].verb == "export"
    assert sha256(tmp_path / "run/compressed.safetensors") == digests(finished)[FILES[0]]


def test_a_finished_run_takes_nothing_over_and_says_so(finished):
    told = Mock(spec=Reporter)
    with reporting(told):
        bevel.run(recipes.validate(RECIPE), out=finished, leading=finished)
    told.note.assert_called_once_with(
        f"{finished} is finished: nothing is taken over from {finished}"
    )


def test_a_step_whose_file_is_gone_is_not_taken_over(finished, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    (old / "steps/02-prune/model.safetensors").unlink()
    with RunFolder(tmp_path / "new", recipes.validate(RECIPE)) as folder:
        adopt(folder, [old])
        assert [step.name for step in folder.record.steps] == ["01-train"]


def test_a_folder_of_a_version_that_had_fewer_keys_goes_on(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    record = json.loads((folder / "run.json").read_text())
    del record["recipe"]["data"]["augment"]["scale"]
    (folder / "run.json").write_text(json.dumps(record))
    bevel.run(recipes.validate(RECIPE), out=folder)
    assert digests(folder) == digests(finished)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="holds other files"):
        bevel.run(recipes.validate(RECIPE), out=tmp_path)


def test_a_folder_in_use_is_refused(tmp_path):
    recipe = recipes.validate(RECIPE)
    with (
        RunFolder(tmp_path / "run", recipe),
        pytest.raises(RunFolderError, match="another process"),
        RunFolder(tmp_path / "run", recipe),
    ):
        pass


def test_unknown_names_are_found_before_any_work(tmp_path):
    wrong = json.loads(json.dumps(RECIPE))
    wrong["targets"][0]["runtime"] = "onnxruntme"
    with pytest.raises(UnknownNameError, match="Did you mean 'onnxruntime'"):
        bevel.run(recipes.validate(wrong), out=tmp_path / "run")


def test_explain_says_what_can_be_pruned_and_what_it_costs():
    explanation = bevel.explain(recipes.validate(RECIPE))
    assert explanation.original.params == 269_434
    assert explanation.planned.macs <= 0.5 * explanation.original.macs
    lines = {group.name: group for group in explanation.groups}
    assert lines["linear"].reason == "network output"
    assert lines["layer3.0.conv1"].widths[0] == 60
    assert [step.verb for step in explanation.steps] == ["train", "prune", "finetune", "measure"]
    text = str(explanation)
    assert "can be pruned: " in text
    assert "network output" in text


def test_explain_works_on_a_timm_network_without_its_data():
    pytest.importorskip("timm")
    recipe = json.loads(json.dumps(RECIPE))
    recipe["model"] = {"name": "timm:mobilenetv3_small_100"}
    recipe["data"] = {"name": "imagefolder", "root": "nowhere", "size": 64}
    recipe["steps"][1]["prune"]["align"] = 8
    explanation = bevel.explain(recipes.validate(recipe))
    assert "without the data" in explanation.warnings[0]
    assert len([group for group in explanation.groups if group.reason is None]) > 20
