"""MobileNetV3-Small on Caltech-101: the original, and lite networks made in three ways.

    python benchmarks/surgery.py --shared FOLDER --out benchmarks/results/surgery.json --work DIR

All start from the same ImageNet weights and the same new head, and are trained in the same way; the
lite ones are operated on before: naively, with what bevel fits, and progressively, where activation
functions turn into ReLU in the first half of the same training. Then each is exported in float32
and int8 for every runtime that is installed, all files are timed in turn (one thread, one image),
and run over the test images. `--work` keeps what is finished: the same command goes on where it
was. Test images are looked at once, at the end. The JSON holds no path of the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import zipfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import bevel
from bevel.core import plugins
from bevel.core.errors import MissingDependencyError
from bevel.core.files import write_json
from bevel.core.recipe import DataSection, Normalize
from bevel.core.steps import FinetuneStep
from bevel.data import Data
from bevel.data.metrics import evaluate
from bevel.finetuning.train import finetune
from bevel.measurement.bench import Subject, measure_all
from bevel.models.batchnorm import recalibrate, unfold

MODEL = "timm:tf_mobilenetv3_small_100"
WEIGHTS = "timm.tf_mobilenetv3_small_100.safetensors"
HEAD = "classifier."
CLASSES = 101
SIZE = 112
CALIBRATION = 256
VARIANTS = ("original", "naive", "lite", "progressive")
PACKAGES = ("bevel", "torch", "timm", "onnxruntime", "openvino", "ai-edge-litert", "executorch")


def start(shared: Path, seed: int) -> nn.Module:
    """ImageNet's weights under a new head."""
    torch.manual_seed(seed)
    net = bevel.build_model(MODEL, {"num_classes": CLASSES})
    weights = load_file(shared / "weights" / WEIGHTS)
    own = {name: value for name, value in weights.items() if not name.startswith(HEAD)}
    missing, unexpected = net.load_state_dict(own, strict=False)
    if unexpected or any(not name.startswith(HEAD) for name in missing):
        raise SystemExit(f"the weights do not fit: {[*unexpected, *missing][:3]}")
    return net


def variant(name: str, net: nn.Module, data: Data) -> nn.Module:
    """The network that is trained."""
    images = [batch for batch, _ in data.batches("train", limit=CALIBRATION)]
    unfold(net, images)  # this checkpoint's batch norms are folded, and would not survive a step
    if name != "original":
        lite = bevel.surgery(
            net,
            images[0][:2],
            calibration=images,
            fit=name != "naive",
            progressive=name == "progressive",
        )
        net = lite.net
        recalibrate(net, images)
    return net


def trained(name: str, seed: int, data: Data, given: argparse.Namespace) -> dict[str, Any]:
    """Train one variant; its validation accuracy before and after, and where its weights are."""
    folder = given.work / f"{name}-{seed}-{given.epochs}"
    done = folder / "done.json"
    if done.exists():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    folder.mkdir(parents=True, exist_ok=True)
    net = variant(name, start(given.shared, seed), data)
    settings = FinetuneStep(epochs=given.epochs, lr=given.lr, precision="float32", compile="never")
    result = finetune(net, data, settings, seed=seed, folder=folder / "training", label=name)
    torch.save(result.net.state_dict(), folder / "weights.pt")
    entry = {
        "variant": name,
        "seed": seed,
        "validation": [line["validation_top1"] for line in result.history],
        "test": evaluate(result.net, data.batches("test")).top1,
    }
    write_json(done, entry)
    return entry


def files(seed: int, data: Data, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every variant of one seed as every runtime runs it."""
    images = [batch for batch, _ in data.batches("train", limit=CALIBRATION)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        subjects = []
        for name in VARIANTS:
            net = variant(name, start(given.shared, seed), data).eval()
            bevel.settle(net)
            state = given.work / f"{name}-{seed}-{given.epochs}" / "weights.pt"
            net.load_state_dict(torch.load(state, weights_only=True))
            for runtime in _runtimes():
                suffix = plugins.load("runtimes", runtime).SUFFIX
                for precision in ("float32", "int8"):
                    artifact = bevel.export(
                        net,
                        images[0][:2],
                        runtime=runtime,
                        precision=precision,
                        calibration=images,
                        path=Path(folder) / f"{name}-{precision}-{runtime}{suffix}",
                    )
                    subjects.append(Subject(name, artifact, net))
        for found in measure_all(subjects, batches=data.batches("test")):
            assert found.latency is not None  # noqa: S101 - this machine times what it runs
            assert found.accuracy is not None  # noqa: S101 - there are test images
            rows.append(
                {
                    "variant": found.label,
                    "runtime": found.artifact.runtime,
                    "precision": found.artifact.precision,
                    "p50_ms": found.latency.p50_ms,
                    "size_bytes": found.artifact.size_bytes,
                    "top1": found.accuracy.top1,
                }
            )
            print(rows[-1], flush=True)
    return rows


def _runtimes() -> list[str]:
    found = []
    for name in ("onnxruntime", "openvino", "litert", "executorch"):
        try:
            plugins.load("runtimes", name)
        except MissingDependencyError:
            continue
        found.append(name)
    return found


def main() -> None:
    """Train, export, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="checkpoints and caltech101.zip")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--work", type=Path, required=True, help="data and finished trainings")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--files", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    root = given.work / "caltech101"
    if not root.exists():
        with zipfile.ZipFile(given.shared / "caltech101.zip") as archive:
            archive.extractall(given.work)
    half = [0.5, 0.5, 0.5]
    section = DataSection(
        name="imagefolder",
        root=root,
        size=SIZE,
        normalize=Normalize(mean=half, std=half),
        batch_size=64,
    )
    data = bevel.load_data(section, seed=0)
    runs = []
    for seed in range(given.seeds):
        for name in VARIANTS:
            runs.append(trained(name, seed, data, given))
            print(runs[-1], flush=True)
            write_json(given.out, _results(given, runs, []))
    rows = files(0, data, given) if given.files else []
    write_json(given.out, _results(given, runs, rows))


def _results(
    given: argparse.Namespace, runs: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "model": MODEL,
        "data": f"Caltech-101, {SIZE} pixels",
        "epochs": given.epochs,
        "lr": given.lr,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "runs": runs,
        "files": rows,
    }


if __name__ == "__main__":
    main()
