"""A real search and a real comparison on digits, as short as they can be, by the command line."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import bevel
import residual
from bevel.cli import main
from bevel.core import recipe as recipes
from bevel.data import Data

TRAINING = {"epochs": 1, "precision": "float32", "compile": "never"}
RECIPE = {
    "version": 1,
    "name": "small",
    "model": {"name": residual.FACTORY},
    "data": {"name": "digits", "batch_size": 64},
    "steps": [
        {"train": TRAINING},
        {"prune": {"budget": {"macs": 0.5}, "align": 1}},
        {"finetune": TRAINING},
    ],
    "calibration": {"images": 64},
    "targets": [{"runtime": "onnxruntime"}],
    "search": {
        "objectives": ["accuracy", "latency_ms", "size_bytes", "macs", "params"],
        "space": {"steps.prune.budget.macs": [0.5, 0.25]},
    },
}


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Splits that were read in this process."""
    seen: set[str] = set()
    batches = Data.batches

    def spied(self: Data, split: str, *arguments: object, **more: object) -> object:
        seen.add(split)
        return batches(self, split, *arguments, **more)

    monkeypatch.setattr(Data, "batches", spied)
    yield seen


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return path


def test_search_prints_its_front_and_a_run_goes_on_from_a_point(
    recipe: Path, looked_at: set[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(recipe), "--trials", "2", "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert "test" not in looked_at
    folder = recipe.parent / "runs/small-search"
    assert json.loads((folder / "search.json").read_text()) == record
    base = json.loads((folder / "base/run.json").read_text())
    assert [step["verb"] for step in base["steps"]] == ["train"]
    for trial, limit in zip(record["trials"], (0.5, 0.25), strict=True):
        run = json.loads((folder / trial["folder"] / "run.json").read_text())
        assert run["steps"][0] == base["steps"][0]  # trained once, with the same bytes
        assert run["measurements"] == []
        assert trial["objectives"]["macs"] == run["compressed"]["macs"]
        assert trial["objectives"]["macs"] <= limit * run["original"]["macs"]
        measured = json.loads((folder / trial["folder"] / "validation.json").read_text())
        assert measured["measurement"]["accuracy"]["split"] == "validation"
        assert trial["objectives"]["accuracy"] == measured["measurement"]["accuracy"]["top1"]
    assert record["trials"][1]["objectives"]["macs"] < record["trials"][0]["objectives"]["macs"]

    assert main(["search", str(recipe), "--trials", "2"]) == 0
    assert "the front" in capfd.readouterr().out
    trial = folder / record["trials"][record["front"][0]]["folder"]
    before = json.loads((trial / "run.json").read_text())["steps"]
    found = bevel.run(recipes.load(folder / "front/00.yaml"), out=trial)
    assert "test" in looked_at
    assert found.finished is not None
    steps = [step.model_dump(mode="json") for step in found.steps]
    assert steps[: len(before)] == before  # nothing done again
    exported = [step["name"].partition("-")[2] for step in steps if step["verb"] == "export"]
    assert exported[0].startswith("export-compressed-")  # what the trial was judged by
    assert len(exported) > 1 and {step["verb"] for step in steps[len(before) :]} == {"export"}
    assert found.measurements


def test_compare_prints_both_tables(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [
        "compare",
        str(recipe),
        "--vary=steps.prune.criterion=l2,random",
        "--seeds=1",
        "--test",
    ]
    assert main(command) == 0
    out = capfd.readouterr().out
    assert "ahead - behind" in out
    folder = recipe.parent / "runs/small-compare"
    found = json.loads((folder / "compare.json").read_text())
    data = bevel.load_data(recipes.validate(RECIPE).data, seed=0)
    images = sum(len(labels) for _, labels in data.batches("test"))
    for cell in found["cells"]:
        (outcome,) = cell["outcomes"]
        right = outcome["test_accuracy"] * images
        assert right == pytest.approx(round(right))  # of so many images
        assert outcome["macs"] < 1e9
    before = (folder / "compare.json").read_bytes()
    assert main(command) == 0  # nothing is carried out or measured again
    assert (folder / "compare.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "{}", "--set", "search=null"], "no section 'search'"),
        (["search", "{}", "--set", "search.space={a: 1}"], "expected a list of choices"),
        (["search", "{}", "--storage", "nonsense"], "does not open"),
        (["search", "{}", "--trials", "0"], "--trials"),
        (["compare", "{}", "--vary", "steps.prune.criterion"], "expected KEY=VALUE,VALUE"),
        (["compare", "{}", "--vary", "steps.prune.criterion="], "there is no value"),
        (["compare", "{}", "--vary", "a=[1"], "no list of values"),
        (["compare", "{}", "--vary", "a=1", "--vary", "a=2"], "a key is there twice"),
        (["compare", "{}", "--vary", "steps.prune.aling=1"], "Did you mean 'align'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    recipe: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([argument.replace("{}", str(recipe)) for argument in arguments]) == 2
    said = capfd.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
