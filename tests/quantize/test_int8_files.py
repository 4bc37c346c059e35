"""int8 files: what PT2E computes in torch, in integers, as good as float on real digits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2

import bevel
from bevel.graph.program import export_program
from bevel.quantization.annotate import FusingQuantizer
from bevel.quantization.pt2e import inputs_of, quantize
from bevel.quantization.ranges import SMALLEST_SCALE, ChannelObserver, u8s8
from bevel.runtimes.onnxruntime import open_session
from networks import EXAMPLE, Concat, Grouped, Padded, Plain, Projection, randomise

SHORT = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 1))
"""First stages of MobileNetV2: expansion, channels, blocks, stride."""


def random_images(count: int, side: int = 8, seed: int = 11) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def operators(path: str, folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime really runs, after its own fusions."""
    optimized = folder / "optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(optimized).graph.node)


def int8(net: nn.Module, example: torch.Tensor, folder: Path, calibration=None):
    return bevel.export(
        net,
        example,
        precision="int8",
        calibration=calibration or [example],
        path=folder / "int8.onnx",
    )


def convolutions(net: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in net.modules())


@pytest.mark.parametrize("network", [Plain, Projection, Grouped, Concat, Padded])
def test_file_computes_what_its_torch_reference_does(network, tmp_path):
    net, calibration = randomise(network()), [random_images(32, seed=seed) for seed in (1, 2)]
    artifact = int8(net, EXAMPLE, tmp_path, calibration)
    program = export_program(net, (EXAMPLE,))
    reference = quantize(program, FusingQuantizer(u8s8()), calibration)
    x = random_images(64)
    with torch.no_grad():
        expected, exact = reference(x).numpy(), net(x).numpy()
    got = open_session(Path(artifact.path), 1).run([x.numpy()])[0]
    spread = exact.max() - exact.min()
    assert np.abs(got - expected).max() <= 0.03 * spread  # a rounding that went the other way
    assert np.abs(got - expected).mean() <= 0.003 * spread
    assert 0 < np.abs(got - exact).mean() <= 0.03 * spread
    ran = operators(artifact.path, tmp_path)
    assert ran["QLinearConv"] == convolutions(net), ran
    assert not {name for name in ran if name in ("Conv", "FusedConv", "Gemm", "MatMul")}, ran


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet20"])
def test_whole_networks_run_in_integers(name, tmp_path):
    torch.manual_seed(0)
    if name == "resnet20":
        net = randomise(bevel.build_model("bevel:resnet20"))
        plan = bevel.plan_pruning(net, random_images(2, 16), budget={"macs": 0.5}, align=4)
        net = bevel.prune(net, plan)
    else:
        net = mobilenet_v2(width_mult=0.25, num_classes=10, inverted_residual_setting=SHORT).eval()
    artifact = int8(net, random_images(4, 16), tmp_path)
    ran = operators(artifact.path, tmp_path)
    assert ran["QLinearConv"] == convolutions(net), ran
    assert ran["Conv"] == ran["FusedConv"] == 0, ran
    assert ran["QLinearAdd"] > 0, ran


def test_digits_are_told_apart_as_well_as_in_float(digits, tmp_path):
    net, train, test, labels = digits
    artifact = int8(net, train[:2], tmp_path, [train[:128], train[128:256]])
    got = open_session(Path(artifact.path), 1).run([test.numpy()])[0].argmax(1)
    with torch.no_grad():
        expected = net(test).argmax(1).numpy()
    accuracy = (expected == labels.numpy()).mean()
    assert accuracy > 0.9
    assert (got == expected).mean() > 0.985
    assert (got == labels.numpy()).mean() > accuracy - 0.01


def test_calibration_images_decide_the_ranges_and_labels_beside_them_do_not(digits, tmp_path):
    net, train, _, labels = digits
    alone = int8(net, train[:2], tmp_path / "a", [train[:64]])
    beside = int8(net, train[:2], tmp_path / "b", [(train[:64], labels[:64])])
    other = int8(net, train[:2], tmp_path / "c", [3 * train[:64]])
    assert alone.sha256 == beside.sha256 != other.sha256


def test_types_are_those_that_the_runtime_is_fast_with(digits, tmp_path):
    net, train, _, _ = digits
    artifact = int8(net, train[:2], tmp_path, [train[:64]])
    model = onnx.load(artifact.path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = [tensor for tensor in stored.values() if len(tensor.dims) == 4]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.INT8}
    quantized = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    zeros = {stored[node.input[2]].data_type for node in quantized}
    assert zeros == {onnx.TensorProto.UINT8}
    assert "uint8 activations" in artifact.quantizer
    assert "int8 weights" in artifact.quantizer


def test_a_channel_of_almost_zero_weights_keeps_a_usable_scale(tmp_path):
    """Its bias would overflow int32 in units of input scale times weight scale."""
    observer = ChannelObserver(
        ch_axis=0,
        dtype=torch.int8,
        qscheme=torch.per_channel_symmetric,
        quant_min=-127,
        quant_max=127,
    )
    weight = torch.stack([torch.full((9,), 1.0), torch.full((9,), 1e-12), torch.zeros(9)])
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    assert torch.all(scale >= scale.max() * SMALLEST_SCALE)
    assert torch.all(zero_point == 0)

    net = randomise(Plain())
    with torch.no_grad():
        net.features[0][0].weight[3] *= 1e-12
    got = open_session(Path(int8(net, EXAMPLE, tmp_path).path), 1).run([EXAMPLE.numpy()])[0]
    with torch.no_grad():
        exact = net(EXAMPLE).numpy()
    assert np.abs(got - exact).max() <= 0.05 * np.abs(exact).max()


def test_inputs_of_a_batch():
    a, b = torch.zeros(2, 3), torch.ones(2)
    assert inputs_of(a, 1) == (a,)
    assert inputs_of((a, b), 1) == (a,)
    assert inputs_of([a, b, 5], 2) == (a, b)
