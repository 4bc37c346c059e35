"""`bevel doctor` as a user calls it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bevel as library
from networks import Projection, randomise

from .conftest import Result

Bevel = Callable[..., Result]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """float32.onnx and int8.onnx of one network that takes 3x8x8 images."""
    folder = tmp_path_factory.mktemp("files")
    net, images = randomise(Projection()), torch.randn(32, 3, 8, 8)
    for precision in ("float32", "int8"):
        path = folder / f"{precision}.onnx"
        library.export(net, images[:2], precision=precision, calibration=[images], path=path)
    return folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing that says nothing instead of seconds of it."""
    from bevel.core.records import Latency
    from bevel.measurement import bench

    milliseconds = iter([2.0, 1.0])
    monkeypatch.setattr(
        bench,
        "_latencies",
        lambda _, subjects, __: [
            Latency(samples_ms=[next(milliseconds)], warmup_runs=0) for _ in subjects
        ],
    )


@pytest.mark.usefixtures("short")
def test_against_the_float_file(bevel: Bevel, files: Path) -> None:
    result = bevel("doctor", files / "int8.onnx", "--against", files / "float32.onnx")
    assert result.code == 0
    first = result.out.splitlines()[0]
    assert "2.00x faster than the float file" in first
    assert "agreement on 32 images" in result.out
    assert "multiples of 16" in result.out


def test_json_is_the_record(bevel: Bevel, files: Path, tmp_path: Path) -> None:
    from bevel.core.records import Diagnosis

    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    result = bevel("doctor", files / "int8.onnx", "--images", tmp_path, "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert found.pop("warnings") == []
    diagnosis = Diagnosis.model_validate(found)
    assert diagnosis.parity is None
    assert diagnosis.artifact.precision == "int8"


def test_against_a_network_on_images(bevel: Bevel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = library.build_model("bevel:resnet20")
    saved, out = tmp_path / "pruned.safetensors", tmp_path / "net.onnx"
    image = torch.randn(1, 3, 32, 32)
    plan = library.plan_pruning(net, image, budget={"macs": 0.5})
    pruned = library.prune(net, plan)
    library.save_pruned(pruned, plan, saved)
    library.export(pruned, image, path=out)
    Image.new("RGB", (40, 40), (10, 200, 30)).save(tmp_path / "one.png")
    result = bevel(
        "doctor",
        out,
        "--against",
        saved,
        "--model",
        "bevel:resnet20",
        "--images",
        tmp_path,
        "--json",
    )
    assert result.code == 0, result.err
    parity = json.loads(result.out)["parity"]
    assert parity["images"] == 1
    assert parity["max_difference"] < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.onnx"], "no exported file at absent.onnx"),
        (["{}/int8.onnx", "--images", "absent"], "absent is not a folder of images"),
        (["{}/int8.onnx", "--against", "{}/int8.onnx.json"], "has no description"),
        (["{}/int8.onnx", "--against", "bevel:resnet999"], "resnet999"),
        (["{}/int8.onnx", "--set", "seed=1"], "give it with --recipe"),
        (["{}/int8.onnx", "--count", "0"], "--count"),
    ],
)
def test_mistakes_are_one_line(
    bevel: Bevel, files: Path, arguments: list[str], message: str
) -> None:
    result = bevel("doctor", *(a.format(files) for a in arguments))
    assert result.code == 2
    assert message in result.err
    assert result.err.startswith("bevel: ")
    assert len(result.err.splitlines()) == 1
    assert result.out == ""
