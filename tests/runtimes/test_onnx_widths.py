"""Channels added to int8 ONNX files: where, and that nothing that a file computes changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import numpy_helper
from torch import nn

import bevel
from bevel.core.recipe import Quantization
from bevel.runtimes import _onnx_int8, _onnx_native, onnxruntime
from bevel.runtimes._onnx_file import save
from bevel.runtimes._onnx_widths import INPUTS, OUTPUTS, widen
from networks import randomise

SIZE = 16


class Mixed(nn.Module):
    """A stem, a depthwise convolution, a gate and a residual; all widths can be anything."""

    def __init__(self, wide, narrow, squeezed):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, wide, 3, 2, 1), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(wide, wide, 3, 1, 1, groups=wide), nn.ReLU())
        self.project = nn.Conv2d(wide, narrow, 1)
        self.squeeze = nn.Sequential(nn.Conv2d(narrow, squeezed, 1), nn.ReLU())
        self.excite = nn.Sequential(nn.Conv2d(squeezed, narrow, 1), nn.Hardsigmoid())
        self.last = nn.Conv2d(narrow, narrow, 3, padding=1, bias=False)
        self.head = nn.Conv2d(narrow, 5, 1)

    def forward(self, x):
        x = self.project(self.depthwise(self.stem(x)))
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = x + self.last(x)
        return self.head(x).mean((2, 3))


class Joined(nn.Module):
    """Widths that something needs as they are: a concatenation, a reshape, a linear layer."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)
        self.shuffled = nn.Conv2d(16, 12, 1)
        self.flat = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.shuffled(torch.cat([self.one(x), self.other(x)], 1))
        x = self.flat(nn.functional.pixel_shuffle(x, 2))
        return self.head(x.mean((2, 3)))


def images(channels, count, seed=0, size=SIZE):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def both(tmp_path, monkeypatch):
    """Exports a network without added channels, and adds them: the files, and their outputs."""

    def export(net, quantizer="torch", channels=3, size=SIZE):
        plain, wide = tmp_path / "plain.onnx", tmp_path / "wide.onnx"
        with monkeypatch.context() as patch:
            for module in (_onnx_int8, _onnx_native):
                patch.setattr(module, "widen", bool)
            bevel.export(
                net.eval(), images(channels, 2, size=size), runtime="onnxruntime",
                precision="int8", calibration=[images(channels, 16, 1, size)],
                quantization=Quantization(quantizer=quantizer), path=plain,
            )  # fmt: skip
        model = onnx.load(str(plain))
        widen(model)
        save(model, wide)
        shown = images(channels, 5, 2, size).numpy()
        outputs = [onnxruntime.open_session(path, 1).run([shown])[0] for path in (plain, wide)]
        return (plain, wide), outputs

    return export


def convolutions(path: Path) -> list[tuple[tuple[int, ...], int]]:
    """Shape of the weights, and groups."""
    model = onnx.load(str(path))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        if node.op_type == "Conv":
            name = node.input[1]
            weight = stored[made[name].input[0] if name in made else name]
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            found.append((numpy_helper.to_array(weight).shape, groups))
    return found


@pytest.mark.parametrize("quantizer", ["torch", "native"])
@pytest.mark.parametrize("widths", [(24, 8, 2), (17, 1, 5), (40, 24, 8), (3, 12, 16)])
def test_every_bit_stays_and_kernels_get_what_they_take(widths, quantizer, both):
    (_, wide), (plain_gives, wide_gives) = both(randomise(Mixed(*widths)), quantizer)
    assert np.array_equal(plain_gives, wide_gives)
    assert np.abs(plain_gives).max() > 0
    (stem, _), (depthwise, groups), *others = convolutions(wide)
    assert stem[1] == INPUTS
    assert (
        stem[0] == depthwise[0] == groups == others[0][0][1] == -(-widths[0] // OUTPUTS) * OUTPUTS
    )
    for width, (shape, _) in zip((widths[1], widths[2], widths[1]), others, strict=False):
        assert shape[0] == (width if width > OUTPUTS else OUTPUTS)


def test_widths_that_are_needed_as_they_are_stay(both):
    (plain, wide), (plain_gives, wide_gives) = both(randomise(Joined()), channels=4)
    assert np.array_equal(plain_gives, wide_gives)
    assert convolutions(wide) == convolutions(plain)
    assert wide.read_bytes() == plain.read_bytes()


def test_a_pruned_network_of_torchvision_stays_what_it_was(both):
    blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 40, 2, 2]]
    net = torchvision.models.mobilenet_v2(num_classes=10, inverted_residual_setting=blocks)
    randomise(net)
    plan = bevel.plan_pruning(net, images(3, 1, size=32), criterion="l2", ratio=0.3, align=4)
    (plain, wide), (plain_gives, wide_gives) = both(bevel.prune(net, plan), size=32)
    assert np.array_equal(plain_gives, wide_gives)
    depthwise = [(shape[0], groups) for shape, groups in convolutions(wide) if groups > 1]
    assert len(depthwise) == 5
    assert all(rows == groups and groups % OUTPUTS == 0 for rows, groups in depthwise)
    assert any(groups % OUTPUTS for _, groups in convolutions(plain) if groups > 1)


def test_an_exported_file_has_them(tmp_path):
    path = tmp_path / "net.onnx"
    for quantizer in ("torch", "native"):
        bevel.export(
            randomise(Mixed(24, 8, 2)), images(3, 2), runtime="onnxruntime", precision="int8",
            calibration=[images(3, 16, 1)], quantization=Quantization(quantizer=quantizer),
            path=path,
        )  # fmt: skip
        assert [shape[:2] for shape, _ in convolutions(path)][:2] == [(32, INPUTS), (32, 1)]
