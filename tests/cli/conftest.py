from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from bevel.cli import main

NET = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, num_classes=2, channels=3):
        super().__init__()
        self.one = nn.Conv2d(channels, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, num_classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.one(x)))
        x = torch.relu(self.two(x))
        return self.linear(x.mean((2, 3)))

class Stubborn(Tiny):
    def forward(self, x):
        y = super().forward(x)
        return y if float(y.sum()) > 0 else 2 * y

def tiny(num_classes=2, channels=3):
    return Tiny(num_classes, channels)

def stubborn():
    return Stubborn()

def broken():
    raise ValueError("no such luck")

def nothing():
    return 3
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def bevel(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command line in this process."""

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def write_images(folder: Path, classes: int, images: int) -> Path:
    """Train and test folders of small noisy images whose brightness tells the class."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(classes):
            where = folder / split / f"class{label}"
            where.mkdir(parents=True)
            for number in range(images):
                pixels = rng.integers(0, 100, (8, 8, 3)) + 150 * label // max(1, classes - 1)
                Image.fromarray(pixels.astype(np.uint8)).save(where / f"{number:03d}.png")
    return folder


@dataclass(frozen=True)
class Workplace:
    """A folder with a small network's file, images, and a recipe about them."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def recipe(self, **changes: Any) -> Path:
        """Write a recipe that is valid but for the changes; keys of sections are merged."""
        raw: dict[str, Any] = {
            "version": 1,
            "name": "tiny",
            "model": {"name": f"{self.folder / 'net.py'}:tiny"},
            "data": {
                "name": "imagefolder",
                "root": str(self.folder / "images"),
                "size": 8,
                "validation": 0.25,
                "batch_size": 8,
            },
            "steps": [
                {"prune": {"ratio": 0.5, "align": 1}},
                {"finetune": {"epochs": 1, "precision": "float32", "compile": "never"}},
            ],
            "calibration": {"images": 8},
            "targets": [{"runtime": "onnxruntime", "precision": "float32"}],
        }
        for key, value in changes.items():
            merge = isinstance(value, dict) and isinstance(raw.get(key), dict)
            raw[key] = raw[key] | value if merge else value
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    (tmp_path / "net.py").write_text(NET, encoding="utf-8")
    write_images(tmp_path / "images", classes=2, images=12)
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path)
