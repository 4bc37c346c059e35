"""float32 files compute what the network does, whatever its structure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported import OneImage, TwoViews, assert_same, file_outputs, net_outputs
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torchvision.models import mobilenet_v2

import bevel
from bevel.measurement.parity import run_batch
from bevel.runtimes.onnxruntime import open_session
from networks import ALL, EXAMPLE, Concat, Grouped, Plain, Shared, randomise


def fresh(count: int, *shape: int) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("network", ALL)
def test_parity_with_any_batch(network, tmp_path):
    net = randomise(network())
    artifact = bevel.export(net, EXAMPLE, path=tmp_path / "net.onnx")
    assert artifact.inputs[0].shape == ["batch", 3, 8, 8]
    assert all(output.shape[0] == "batch" for output in artifact.outputs)
    for batch in (1, 3):
        x = fresh(batch, 3, 8, 8)
        assert_same(file_outputs(artifact, x), net_outputs(net, x))


@pytest.mark.parametrize("network", [Concat, Grouped])
def test_parity_of_pruned_networks(network, tmp_path):
    net = randomise(network())
    plan = bevel.plan_pruning(net, EXAMPLE, budget={"macs": 0.5}, align=4)
    pruned = bevel.prune(net, plan)
    small = bevel.export(pruned, EXAMPLE, path=tmp_path / "small.onnx")
    whole = bevel.export(net, EXAMPLE, path=tmp_path / "whole.onnx")
    x = fresh(2, 3, 8, 8)
    assert_same(file_outputs(small, x), net_outputs(pruned, x))
    assert small.size_bytes < whole.size_bytes


def test_torchs_table_of_operators_is_built_once(tmp_path, monkeypatch):
    built = []

    def build(opset_version: int) -> ONNXRegistry:
        built.append(opset_version)
        return whole(opset_version)

    whole = ONNXRegistry.from_torchlib
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", staticmethod(build))
    net = randomise(Plain())
    for name in ("one.onnx", "two.onnx"):
        bevel.export(net, EXAMPLE, path=tmp_path / name)
    assert len(built) == 1
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    assert ONNXRegistry.from_torchlib is build  # other exports of the process get their own


FLOAT_THEN_INT8 = """
import sys, torch, bevel
net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
image = torch.randn(1, 3, 16, 16)
bevel.export(net, image, path=sys.argv[1] + "/float.onnx")
bevel.export(net, image, precision="int8", calibration=[image], path=sys.argv[1] + "/int8.onnx")
"""


def test_int8_after_float_in_a_process_that_had_not_quantized(tmp_path):
    command = [sys.executable, "-c", FLOAT_THEN_INT8, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    operators = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators


def test_parity_of_resnet20_with_padded_shortcuts_pruned(tmp_path):
    torch.manual_seed(0)
    net = randomise(bevel.build_model("bevel:resnet20"))
    example = fresh(2, 3, 32, 32)
    plan = bevel.plan_pruning(net, example, budget={"macs": 0.5}, align=4)
    pruned = bevel.prune(net, plan)
    artifact = bevel.export(pruned, example, path=tmp_path / "resnet20.onnx")
    assert_same(file_outputs(artifact, example), net_outputs(pruned, example))


def test_parity_of_mobilenet_v2(tmp_path):
    torch.manual_seed(0)
    net = mobilenet_v2(width_mult=0.25, num_classes=10).eval()
    example = fresh(2, 3, 32, 32)
    artifact = bevel.export(net, example, path=tmp_path / "mobilenet.onnx")
    assert_same(file_outputs(artifact, example), net_outputs(net, example))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_network_that_takes_one_image(precision, tmp_path):
    net = randomise(OneImage())
    artifact = bevel.export(
        net, EXAMPLE, precision=precision, calibration=[EXAMPLE], path=tmp_path / "one.onnx"
    )
    assert artifact.inputs[0].shape == [1, 3, 8, 8]
    expected = np.concatenate([net_outputs(net, EXAMPLE[i : i + 1])[0] for i in range(2)])
    measured = run_batch(open_session(tmp_path / "one.onnx", 1), EXAMPLE.numpy())
    assert_same([measured], [expected], 1e-5 if precision == "float32" else 0.05)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_several_inputs_and_outputs(precision, tmp_path):
    net = randomise(TwoViews())
    example = (EXAMPLE, fresh(2, 1, 8, 8))
    artifact = bevel.export(
        net, example, precision=precision, calibration=[example], path=tmp_path / "two.onnx"
    )
    assert [signature.name for signature in artifact.inputs] == ["x", "y"]
    assert [signature.name for signature in artifact.outputs] == ["output", "output_1", "output_2"]
    assert [signature.shape for signature in artifact.outputs] == [
        ["batch", 4, 6, 6],
        ["batch", 4],
        ["batch", 4],
    ]
    tolerance = 1e-5 if precision == "float32" else 0.05
    assert_same(file_outputs(artifact, *example), net_outputs(net, *example), tolerance)


def test_dictionary_keeps_its_order(tmp_path):
    net = randomise(Shared())
    artifact = bevel.export(net, EXAMPLE, path=tmp_path / "shared.onnx")
    assert [output.shape[1] for output in artifact.outputs] == [4, 6]
    with torch.no_grad():
        expected = net(EXAMPLE)
    assert_same(file_outputs(artifact, EXAMPLE), [expected["one"].numpy(), expected["two"].numpy()])


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_file_tells_nothing_of_where_it_was_made(precision, tmp_path):
    path = tmp_path / "clean.onnx"
    bevel.export(
        randomise(Concat()), EXAMPLE, precision=precision, calibration=[EXAMPLE], path=path
    )
    content = path.read_bytes()
    for trace in (str(Path.cwd()), sys.prefix, str(tmp_path), ".py", 'File "', "site-packages"):
        assert trace.encode() not in content, trace
    model = onnx.load(path)
    assert not model.doc_string
    assert not model.metadata_props
    assert not model.graph.doc_string
    for item in [*model.graph.node, *model.graph.value_info, *model.graph.initializer]:
        assert not item.doc_string
        assert not item.metadata_props
    assert list(tmp_path.iterdir()) == [path, path.with_name("clean.onnx.json")] or {
        file.name for file in tmp_path.iterdir()
    } == {"clean.onnx", "clean.onnx.json"}


def test_mode_of_every_module_is_kept(tmp_path):
    net = randomise(Plain()).train()
    net.head.eval()
    bevel.export(net, EXAMPLE, path=tmp_path / "net.onnx")
    assert net.training
    assert net.features.training
    assert not net.head.training


def test_a_network_that_mixes_images_takes_one_at_a_time(tmp_path):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x).view(1, -1)[:, :10]

    net = Mixing().eval()
    artifact = bevel.export(net, torch.randn(2, 3, 8, 8), path=tmp_path / "mixing.onnx")
    assert artifact.inputs[0].shape == [1, 3, 8, 8]
    assert artifact.outputs[0].shape == [1, 10]
