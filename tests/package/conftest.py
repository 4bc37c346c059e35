"""A finished run on real handwritten digits of uneven sizes, and the kit made of it."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional

import bevel
from bevel import build_model, load_data
from bevel.core import recipe as recipes

NET = """
from torch import nn

def small(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, num_classes),
    )
"""
STEPS = 40
CLASSES = (0, 1, 3, 6, 7)
IMAGES = {"train": 60, "test": 12}


@dataclass(frozen=True)
class Unpacked:
    """A kit as it lies on a device."""

    folder: Path

    def run(self, *arguments: object, python: tuple[str, ...] = (sys.executable, "-I")) -> Any:
        """The finished process of its program."""
        command = [*python, str(self.folder / "run.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def json(self, *arguments: object, **options: Any) -> dict[str, Any]:
        done = self.run(*arguments, "--json", **options)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return json.loads(done.stdout)

    @property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "meta.json").read_text())


def write_digits(root: Path) -> Path:
    values, targets = load_digits(return_X_y=True)
    random = np.random.default_rng(0)
    for digit in CLASSES:
        members = iter(np.flatnonzero(targets == digit))
        for split, count in IMAGES.items():
            folder = root / split / f"digit {digit}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = (values[next(members)].reshape(8, 8) * (255 / 16)).astype(np.uint8)
                size = tuple(int(side) for side in random.integers(20, 40, 2))
                Image.fromarray(pixels).convert("RGB").resize(size).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def recipe(images: Path) -> dict[str, Any]:
    """A small network, trained for a moment, that loses a few channels."""
    folder = images.parent
    (folder / "net.py").write_text(NET)
    found = {
        "version": 1,
        "name": "digits5",
        "model": {
            "name": f"{folder / 'net.py'}:small",
            "arguments": {"num_classes": len(CLASSES)},
            "checkpoint": str(folder / "net.pt"),
        },
        "data": {
            "name": "imagefolder",
            "root": str(images),
            "size": 16,
            "resize": 18,
            "normalize": {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.3, 0.35]},
        },
        "steps": [{"prune": {"ratio": 0.2, "align": 4}}],
        "calibration": {"images": 64},
        "targets": [
            {"runtime": "onnxruntime", "precision": "float32"},
            {"runtime": "onnxruntime", "precision": "int8"},
        ],
    }
    data = load_data(recipes.validate({**found, "model": {"name": "any"}}).data, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_model(found["model"]["name"], found["model"]["arguments"])
        pixels, labels = next(iter(data.batches("train", batch_size=1000)))
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(STEPS):
            optimizer.zero_grad()
            functional.cross_entropy(net(pixels), labels).backward()
            optimizer.step()
    torch.save(net.state_dict(), folder / "net.pt")
    return found


@pytest.fixture(scope="session")
def finished(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits5"
    bevel.run(recipes.validate(recipe), out=folder)
    return folder


@pytest.fixture(scope="session")
def kit(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Unpacked:
    folder = tmp_path_factory.mktemp("kit")
    bevel.package(finished, folder / "kit.zip", target="onnxruntime:int8")
    with zipfile.ZipFile(folder / "kit.zip") as archive:
        archive.extractall(folder / "kit")
    return Unpacked(folder / "kit")
