"""The deployment kit: what is in it, and that it answers as the report says."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest

import bevel
from bevel.cli import main
from bevel.core.errors import BevelError, DataError, MeasurementError, RunFolderError
from bevel.packaging.program import program, runtimes
from bevel.testing.plugin import assert_readable

IMAGES = 60


def reported(finished: Path, precision: str) -> dict:
    record = json.loads((finished / "run.json").read_text())
    return next(
        m
        for m in record["measurements"]
        if (m["label"], m["artifact"]["precision"]) == ("compressed", precision)
    )


def refused(kind: type[BevelError], *words: str, **arguments) -> None:
    with pytest.raises(kind) as caught:
        bevel.package(**arguments)
    assert_readable(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_the_kit_is_whole(kit, finished):
    names = {path.relative_to(kit.folder).as_posix() for path in kit.folder.rglob("*.*")}
    samples = {f"samples/{number:03}.png" for number in range(8)}
    assert names == {"README.md", "meta.json", "model.onnx", "run.py", *samples}
    meta, artifact = kit.meta, reported(finished, "int8")["artifact"]
    assert meta["schema"] == 1
    assert meta["artifact"]["sha256"] == artifact["sha256"]
    assert meta["artifact"]["quantizer"] == artifact["quantizer"]
    assert meta["artifact"]["quantization"]["quantizer"] == "torch"
    for file in (meta["artifact"], *meta["samples"]):
        content = (kit.folder / file["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    assert meta["input"]["shape"] == [1, 3, 16, 16]
    assert (meta["input"]["layout"], meta["input"]["colour"]) == ("NCHW", "RGB")
    assert meta["preprocessing"]["resize"] == 18
    assert meta["preprocessing"]["crop"] == 16
    assert meta["preprocessing"]["std"] == [0.25, 0.3, 0.35]
    assert meta["labels"] == ["digit 0", "digit 1", "digit 3", "digit 6", "digit 7"]
    assert meta["output"]["activation"] == "softmax"
    assert meta["versions"]["bevel"] == bevel.__version__
    readme = (kit.folder / "README.md").read_text()
    assert "pip install numpy pillow onnxruntime" in readme
    assert "$" not in readme
    assert str(finished.parent) not in readme + json.dumps(meta)


def test_the_program_gives_the_reports_accuracy(kit, finished, images):
    found = kit.json(images / "test", "--check")
    expected = reported(finished, "int8")["accuracy"]
    assert found["summary"]["labelled_images"] == found["summary"]["images"] == IMAGES
    assert expected["images"] == IMAGES
    assert found["summary"]["top1"] == pytest.approx(expected["top1"])
    assert found["summary"]["top5"] == 1.0  # of five labels
    assert found["check"]["passed"]
    assert found["check"]["agreed"] == 8
    for result in found["images"]:
        chances = [best["probability"] for best in result["top"]]
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) == pytest.approx(1, abs=1e-4)
        assert result["ms"] > 0


def test_lines_for_people(kit, images):
    one = images / "test/digit 3/0.png"
    done = kit.run(one)
    first, last, rated = done.stdout.splitlines()
    assert first.startswith(f"{one}: digit ")
    assert first.endswith(" ms")
    assert last.startswith("1 images, ")
    assert rated.startswith("top-1 ")
    done = kit.run("--check")
    assert done.stdout.strip() == "check passed: 8 of 8 samples get the label that they should"
    assert (done.returncode, done.stderr) == (0, "")


def test_the_check_fails_where_it_should(kit, tmp_path):
    broken = type(kit)(Path(shutil.copytree(kit.folder, tmp_path / "kit")))
    meta = broken.meta
    first = meta["samples"][0]
    first["top1"] = next(label for label in meta["labels"] if label != first["top1"])
    (broken.folder / "meta.json").write_text(json.dumps(meta))
    shutil.copy(broken.folder / "samples/001.png", broken.folder / "samples/002.png")
    done = broken.run("--check")
    assert done.returncode == 1
    assert f"samples/000.png: {kit.meta['samples'][0]['top1']}, expected" in done.stdout
    assert "damaged: samples/002.png" in done.stdout
    assert "check FAILED" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder"], "there is no no/such/folder"),
        (["{kit}/meta.json"], "holds no images"),
        (["{broken}"], "cannot be read as an image"),
        (["--check", "--threads", "0"], "--threads 0"),
    ],
)
def test_mistakes_on_the_device_are_one_line(kit, tmp_path, arguments, message):
    (tmp_path / "broken.png").write_text("no image")
    places = {"kit": kit.folder, "broken": tmp_path / "broken.png"}
    done = kit.run(*(argument.format(**places) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_missing_runtime_and_newer_meta(kit, tmp_path):
    copy = type(kit)(Path(shutil.copytree(kit.folder, tmp_path / "kit")))
    text = (copy.folder / "run.py").read_text()
    (copy.folder / "run.py").write_text(text.replace("onnxruntime\n", "onnxruntime_absent\n"))
    done = copy.run("--check")
    assert (done.returncode, done.stderr) == (
        2,
        "run.py: onnxruntime_absent is not installed: see README.md\n",
    )
    (copy.folder / "meta.json").write_text(json.dumps(copy.meta | {"schema": 2}))
    assert "schema 2" in copy.run("--check").stderr
    (copy.folder / "meta.json").unlink()
    assert "meta.json" in copy.run("--check").stderr


@pytest.mark.parametrize("runtime", runtimes())
def test_the_program_is_python_3_9_without_bevel(runtime):
    source = program(runtime)
    tree = ast.parse(source, feature_version=(3, 9))
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert "bevel" not in modules
    assert {"numpy", "PIL"} < modules
    compile(source, "run.py", "exec")
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert classes.count("Session") == 1


def test_the_same_run_makes_the_same_bytes(finished, tmp_path):
    for name in ("a.zip", "b.zip"):
        bevel.package(finished, tmp_path / name, target="onnxruntime:float32")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_which_file_is_packed(finished, tmp_path, capsys):
    assert main(["package", str(finished), "-o", str(tmp_path / "kit.zip"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    record = json.loads((finished / "run.json").read_text())
    if record["shipments"]:
        assert said["meta"]["artifact"]["precision"] == record["shipments"][0]["precision"]
    with zipfile.ZipFile(tmp_path / "kit.zip") as archive:
        assert json.loads(archive.read("meta.json")) == said["meta"]
    float32 = bevel.package(finished, tmp_path / "kit.zip", target="onnxruntime:float32@local")
    assert float32.meta.artifact.precision == "float32"
    assert float32.meta.artifact.quantization is None


def test_requests_that_cannot_be_met(finished, tmp_path):
    out = tmp_path / "kit.zip"
    refused(RunFolderError, "no file for 'litert'", "onnxruntime:int8@local", run=finished,
            out=out, target="litert")  # fmt: skip
    refused(RunFolderError, "holds no run", run=tmp_path, out=out)
    (tmp_path / "file").touch()
    refused(RunFolderError, "cannot write", "-o", run=finished, out=tmp_path / "file/kit.zip")
    assert not out.exists()


def test_runs_that_are_not_whole(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"finished": None}))
    refused(RunFolderError, "not finished", run=folder, out=tmp_path / "kit.zip")
    moved = record | {"recipe": record["recipe"] | {}}
    moved["recipe"]["data"] = record["recipe"]["data"] | {"root": str(tmp_path / "gone")}
    (folder / "run.json").write_text(json.dumps(moved))
    refused(DataError, "gone", run=folder, out=tmp_path / "kit.zip")
    record = json.loads((finished / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record))
    for file in (folder / "artifacts").glob("*.onnx"):
        file.write_bytes(b"damaged")
    refused(MeasurementError, "hash", run=folder, out=tmp_path / "kit.zip")
