import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from bevel import __version__
from bevel.cli import listing
from bevel.cli.console import Bars, Lines, say_error
from bevel.core import recipe as recipes
from bevel.core.progress import note, reporting, track

from .conftest import Result, Workplace

Bevel = Callable[..., Result]


def test_version_and_help(bevel: Bevel) -> None:
    assert bevel("--version") == Result(0, f"bevel {__version__}\n", "")
    help_ = bevel()
    assert help_.code == 0
    for command in ("run", "init", "explain", "list", "report", "schema", "prune", "measure"):
        assert command in help_.out
    assert bevel("-h").out == help_.out


@pytest.mark.parametrize("kind", listing.KINDS)
def test_list_names_every_plugin(bevel: Bevel, kind: str) -> None:
    result = bevel("list", kind)
    assert result.code == 0
    assert result.err == ""
    listed = json.loads(bevel("list", kind, "--json").out)[kind]
    for entry in listed:
        assert entry["name"] in result.out
        assert entry["description"]


def test_list_says_what_is_not_listed(bevel: Bevel) -> None:
    models = bevel("list", "models").out
    assert "bevel:resnet56" in models
    assert "timm:NAME" in models


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from bevel.cli import main\n"
        "from bevel.core import plugins\n"
        "for kind in ('models', *plugins.PACKAGES):\n"
        "    main(['list', kind])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_pruning_starts_without_what_it_does_not_need(tmp_path: Path) -> None:
    # torch's compiler and torchvision take seconds to import, more than the pruning itself.
    out = tmp_path / "p.safetensors"
    code = (
        "import sys; from bevel.cli import main\n"
        f"line = 'prune bevel:resnet20 --input 1x3x32x32 --ratio 0.5 --out {out}'\n"
        "assert main(line.split()) == 0\n"
        "assert not {'torch._dynamo', 'sympy', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert out.exists()


def test_init_writes_a_recipe_that_validates(
    bevel: Bevel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bevel("init").code == 0
    text = Path("recipe.yaml").read_text(encoding="utf-8")
    assert recipes.load("recipe.yaml").name == "my-network"
    assert text.count("#") > 15
    Path("recipe.yaml").write_text("mine")
    assert bevel("init").code == 2
    assert Path("recipe.yaml").read_text() == "mine"
    assert bevel("init", "--force").code == 0
    assert Path("recipe.yaml").read_text(encoding="utf-8") == text
    assert bevel("init", "deep/other.yaml").code == 0


def test_schema_is_the_recipes(bevel: Bevel) -> None:
    schema = json.loads(bevel("schema").out)
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"version", "name", "model", "data", "steps", "targets"}


def complete(words: str) -> list[str]:
    """What the shell is offered after these words."""
    environment = os.environ | {
        "_BEVEL_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    result = subprocess.run(
        [sys.executable, "-m", "bevel"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.split()


def test_the_shell_completes_commands_kinds_and_names() -> None:
    assert complete("bevel sch") == ["schema"]
    assert complete("bevel list run") == ["runtimes"]
    assert "mean_weight" in complete("bevel prune --criterion mean")
    assert "bevel:resnet56" in " ".join(complete("bevel prune bevel:resnet5")) or complete(
        "bevel prune resnet5"
    ) == ["resnet56"]


def test_completion_can_be_installed(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bevel", "--show-completion", "bash"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert "_BEVEL_COMPLETE" in result.stdout


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m bevel schema | head -1"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert result.stdout == "{\n"
    assert result.stderr == ""


def test_prune_and_verify_files(place: Workplace, bevel: Bevel) -> None:
    import torch

    from bevel.models import build

    torch.save(build("net.py:tiny").state_dict(), "trained.pt")
    model = ["net.py:tiny", "--checkpoint", "trained.pt", "--input", "1x3x8x8"]
    pruned = bevel(
        "prune", *model, "--ratio", 0.5, "--align", 1, "--out", "p.safetensors", "--json"
    )
    assert pruned.code == 0, pruned
    content = json.loads(pruned.out)
    assert content["after"]["params"] < content["before"]["params"]
    assert content["size_bytes"] == (place.folder / "p.safetensors").stat().st_size
    assert max(content["proof"]["max_relative_difference"]) <= 1e-9

    # A file says which code it needs; only the person at the keyboard lets it run.
    refused = bevel("verify", "p.safetensors", "--checkpoint", "trained.pt")
    assert refused.code == 2
    assert "which is code; if you trust it, give --model 'net.py:tiny'" in refused.err
    proven = ["--model", "net.py:tiny", "--checkpoint", "trained.pt"]
    assert bevel("verify", "p.safetensors", *proven).out.startswith("proof: ")

    again = ["--model", "net.py:tiny", "--ratio", 0.5, "--align", 1, "--out", "q.safetensors"]
    assert bevel("prune", "p.safetensors", *again).code == 0
    assert bevel("verify", "q.safetensors", *proven).code == 0, "plans compose"

    untrained = bevel("verify", "p.safetensors", "--model", "net.py:tiny")
    assert untrained.code == 1
    assert "give --checkpoint" in untrained.err


@pytest.mark.parametrize("criterion", ["taylor", "apoz"])
def test_prune_looks_at_the_data_it_is_given(
    place: Workplace, bevel: Bevel, criterion: str
) -> None:
    model = ["net.py:tiny", "--input", "1x3x8x8", "--ratio", 0.5, "--align", 1]
    how = ["--criterion", criterion, "--recipe", place.recipe(), "--out", "p.safetensors"]
    pruned = bevel("prune", *model, *how, "--json")
    assert pruned.code == 0, pruned
    content = json.loads(pruned.out)
    assert content["after"]["params"] < content["before"]["params"]


def test_prune_takes_a_reduction_and_aligns_to_the_targets(place: Workplace, bevel: Bevel) -> None:
    from bevel.pruning.apply import read_metadata

    model = ["net.py:tiny", "--input", "1x3x8x8", "--macs", 1]
    refused = bevel("prune", *model, "--align", "auto", "--out", "p.safetensors")
    assert refused.code == 2
    assert "--align auto asks the targets of a recipe: give --recipe, or a number" in refused.err
    for option, value, message in (
        ("--align", "often", "--align: expected a whole number from 1, or auto, got often"),
        (
            "--reduction",
            "median",
            "--reduction: Input should be 'mean', 'max', 'product' or 'first'",
        ),
    ):
        refused = bevel("prune", *model, option, value, "--out", "p.safetensors")
        assert refused.code == 2
        assert message in refused.err
    recipe = place.recipe(targets=[{"precision": "int8"}, {"precision": "float32"}])
    options = ["--align", "auto", "--reduction", "max", "--recipe", recipe]
    pruned = bevel("prune", *model, *options, "--out", "p.safetensors")
    assert pruned.code == 0, pruned
    assert "is a multiple of 16" in pruned.err
    request = read_metadata("p.safetensors")[0].request
    assert (request["align"], request["reduction"]) == (16, "max")


def test_finetune_export_and_measure_files(place: Workplace, bevel: Bevel) -> None:
    recipe = place.recipe()
    model = ["net.py:tiny", "--input", "1x3x8x8", "--ratio", 0.5, "--align", 1]
    assert bevel("prune", *model, "--out", "p.safetensors").code == 0
    trust = ["--model", "net.py:tiny"]
    tuned = bevel("finetune", "p.safetensors", *trust, "--recipe", recipe, "--out", "f.safetensors")
    assert tuned.code == 0, tuned
    assert "validation accuracy" in tuned.out
    export = ["export", "f.safetensors", *trust, "--recipe", recipe]
    assert bevel(*export, "--out", "f.onnx").code == 0
    int8 = bevel(*export, "--precision", "int8", "--out", "i.onnx", "--json")
    assert int8.code == 0, int8
    assert json.loads(int8.out)["precision"] == "int8"
    measured = bevel("measure", "f.onnx", "i.onnx", "--recipe", recipe, "--json")
    assert measured.code == 0, measured
    found = json.loads(measured.out)["measurements"]
    assert [entry["label"] for entry in found] == ["f.onnx", "i.onnx"]
    assert all(entry["accuracy"]["images"] == 24 for entry in found)
    assert all(len(entry["latency"]["samples_ms"]) >= 100 for entry in found)


def test_files_of_two_sizes_get_images_of_their_own(place: Workplace, bevel: Bevel) -> None:
    training = {"epochs": 1, "precision": "float32", "compile": "never", "distill": {}}
    recipe = place.recipe(
        steps=[{"resize": {"size": 6}}, {"prune": {"ratio": 0.5}}, {"finetune": training}]
    )
    model = ["net.py:tiny", "--input", "1x3x6x6", "--ratio", 0.5, "--align", 1]
    assert bevel("prune", *model, "--recipe", recipe, "--out", "p.safetensors").code == 0
    trust = ["--model", "net.py:tiny", "--recipe", recipe]
    tuned = bevel("finetune", "p.safetensors", *trust, "--out", "f.safetensors")
    assert tuned.code == 0, tuned
    export = bevel("export", "f.safetensors", *trust, "--precision", "int8", "--out", "i.onnx")
    assert export.code == 0, export
    assert bevel("export", "net.py:tiny", "--input", "1x3x8x8", "--out", "o.onnx").code == 0
    measured = bevel("measure", "o.onnx", "i.onnx", "--recipe", recipe, "--json")
    assert measured.code == 0, measured
    found = json.loads(measured.out)["measurements"]
    assert [entry["artifact"]["inputs"][0]["shape"][-1] for entry in found] == [8, 6]
    assert all(entry["accuracy"]["images"] == 24 for entry in found)
    doctor = bevel("doctor", "i.onnx", "--recipe", recipe)
    assert doctor.code == 0, doctor


def test_explain_says_what_can_be_pruned(place: Workplace, bevel: Bevel) -> None:
    recipe = place.recipe()
    text = bevel("explain", recipe)
    assert text.code == 0, text
    assert "one" in text.out
    content = json.loads(bevel("explain", recipe, "--json").out)
    assert {group["name"] for group in content["groups"]} >= {"one", "two", "linear"}
    assert not place.out.exists()


def test_a_run_its_report_and_its_repetition(place: Workplace, bevel: Bevel) -> None:
    recipe = place.recipe()
    first = bevel("run", recipe, "--out", place.out, "--json")
    assert first.code == 0, first
    record = json.loads(first.out)
    assert record["finished"]
    assert [m["label"] for m in record["measurements"]] == ["original", "compressed"]
    assert yaml.safe_load((place.out / "recipe.yaml").read_text())["name"] == "tiny"
    for name in ("report.html", "report.md", "run.json", "compressed.safetensors"):
        assert (place.out / name).exists()

    second = bevel("run", recipe, "--out", place.out)
    assert second.code == 0
    assert "original float32" in second.out
    assert "compressed float32" in second.out
    assert json.loads((place.out / "run.json").read_text()) == record, "nothing was done twice"
    (place.out / "report.md").unlink()
    report = bevel("report", place.out)
    assert report.out == second.out
    assert (place.out / "report.md").exists()


def test_what_a_run_leaves_is_a_file_like_any_other(place: Workplace, bevel: Bevel) -> None:
    recipe = place.recipe(steps=[{"resize": {"size": 6}}, {"prune": {"ratio": 0.5, "align": 1}}])
    assert bevel("run", recipe, "--out", place.out).code == 0
    file = place.out / "compressed.safetensors"
    trust = ["--model", f"{place.folder / 'net.py'}:tiny"]
    int8 = ["--recipe", recipe, "--precision", "int8", "--json"]
    exported = bevel("export", file, *trust, *int8, "--out", "c.onnx")
    assert exported.code == 0, exported
    assert json.loads(exported.out)["inputs"][0]["shape"][1:] == [3, 6, 6]
    again = bevel("prune", file, *trust, "--ratio", 0.5, "--align", 1, "--out", "p.safetensors")
    assert again.code == 0, again


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(
    bevel: Bevel, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bevel.pipeline import running

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run", interrupt)
    result = bevel("run", place.recipe())
    assert result == Result(130, "", "bevel: interrupted; the same command continues the run\n")


def test_json_keeps_what_libraries_print_off_stdout(
    bevel: Bevel, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bevel.core.records import RunRecord
    from bevel.pipeline import running

    def chatter(*_: object, **__: object) -> RunRecord:
        print("loading!")  # noqa: T201
        note("a step")
        return RunRecord(recipe={}, started="now", versions={}, machine={})

    monkeypatch.setattr(running, "run", chatter)
    result = bevel("run", place.recipe(), "--json")
    assert json.loads(result.out)["started"] == "now"
    assert result.err.splitlines()[:2] == ["loading!", "a step"]


def test_without_a_terminal_progress_is_sparse() -> None:
    stream, time = io.StringIO(), [0.0]
    lines = Lines(Console(file=stream, width=100), clock=lambda: time[0])
    with reporting(lines):
        for _ in track(range(100), "training", 100):
            time[0] += 1
        list(track(range(5), "short", 5))
        note("done [with] this")
    said = stream.getvalue().splitlines()
    assert said[-1] == "done [with] this"
    assert 4 <= len(said) <= 8
    assert said[0] == "training: 15/100, about 85 s left"


def test_bars_nest_and_disappear() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with Bars(console) as bars, reporting(bars):
        for _ in track(range(2), "epoch", 2):
            for _ in track(range(3), "batch", 3):
                pass
            bars._progress.refresh()
        assert bars._progress.tasks == []
        note("over")
    assert "epoch" in stream.getvalue()
    assert "over" in stream.getvalue()


def test_an_error_is_one_line_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    say_error("first\nsecond [bold]third[/bold]")
    assert capsys.readouterr().err == "bevel: first second [bold]third[/bold]\n"


@pytest.mark.usefixtures("place")
def test_pruning_by_size_memory_and_layer(bevel: Callable[..., Result]) -> None:
    model = ["net.py:tiny", "--input", "1x3x8x8", "--align", 1, "--out", "a.safetensors", "--json"]
    limits = ["--budget", "size_kb=60%", "--budget", "peak_memory_kb=90 %"]
    found = bevel("prune", *model, *limits, "--target", "onnxruntime:int8@local")
    assert found.code == 0, found.err
    assert (
        json.loads(found.out)["after"]["params"] < 0.7 * json.loads(found.out)["before"]["params"]
    )
    found = bevel("prune", *model, "--ratios", "one=0.5", "--ratios", "two=0.25")
    groups = {group["name"]: group["after"] for group in json.loads(found.out)["groups"]}
    assert groups == {"one": 4, "two": 6}


def test_a_run_keeps_its_sensitivity_map(place: Workplace, bevel: Callable[..., Result]) -> None:
    step = {"prune": {"allocate": "t_sensitive", "budget": {"size_kb": "70 %"}, "align": 1}}
    result = bevel("run", place.recipe(steps=[step]), "--out", place.out)
    assert result.code == 0, result.err
    stored = json.loads((place.out / "steps/01-prune/sensitivity.json").read_text())
    (prune, *_) = json.loads((place.out / "run.json").read_text())["steps"]
    assert prune["numbers"]["sensitivity"] == stored
    assert {point["group"] for point in stored["points"]} == {"one", "two"}
    assert "Sensitivity" in (place.out / "report.html").read_text()
