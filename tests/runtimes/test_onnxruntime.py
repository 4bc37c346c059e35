"""ONNX Runtime's files: what runs in integers, what is stored, and what the runtime tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from bevel.core.errors import ExportError
from bevel.core.recipe import Quantization
from bevel.runtimes import export, onnxruntime
from bevel.runtimes._onnx_forms import pad_in_integers, pool_globally, saturate_hard_sigmoids
from bevel.testing.plugin import assert_readable
from bevel.testing.runtimes import images, small_network

MACS = 256 * (3 * 16 * 9 + 16 * 9 + 16 * 16 * 9) + 160
"""Of the contract's small network."""
COLOUR = 256 * 16 * 9
"""Of the first layer with the fourth colour that an int8 file gives an image."""


class Gated(nn.Module):
    """The activation functions of lite networks, and a squeeze-and-excitation block."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Hardswish())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU())
        self.excite = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Hardsigmoid())
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.second(self.first(x))
        x = x * self.excite(self.squeeze(x))
        return self.head(x.mean((2, 3), keepdim=True).flatten(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The small network in each precision and by each quantizer, by name."""
    folder = tmp_path_factory.mktemp("files")
    wanted = {
        "float": ("float32", Quantization()),
        "torch": ("int8", Quantization()),
        "native": ("int8", Quantization(quantizer="native", keep_float=["wide"])),
        "kept": ("int8", Quantization(keep_float=["wide"])),
        "auto": ("int8", Quantization(quantizer="auto")),
        "weights": ("int8-weights", Quantization()),
        "some weights": ("int8-weights", Quantization(keep_float=["stem*"])),
    }
    return {
        name: export(
            small_network(),
            images(2),
            precision=precision,
            calibration=[images(16, 1), images(16, 2)],
            quantization=options,
            path=folder / f"{name}.onnx",
        )
        for name, (precision, options) in wanted.items()
    }


def outputs(artifact):
    session = onnxruntime.open_session(Path(artifact.path), 1)
    return session.run([images(16, seed=3).numpy()])[0]


def listed(artifact):
    return onnxruntime.operators(Path(artifact.path))


def test_gates_and_squeeze_and_excitation_run_in_integers(tmp_path):
    torch.manual_seed(0)
    net = Gated().eval()
    batch = images(32, 1)
    artifact = export(net, batch, precision="int8", calibration=[batch], path=tmp_path / "g.onnx")
    operators = listed(artifact)
    assert {o.precision for o in operators} == {"int8", "none"}, operators
    conversions = [o.kind for o in operators if o.kind.endswith("quantizeLinear")]
    assert len(conversions) <= 2, conversions
    assert "QLinearGlobalAveragePool" in {o.kind for o in operators}
    with torch.no_grad():
        expected = net(images(16, seed=3)).numpy()
    assert np.abs(outputs(artifact) - expected).max() <= 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["float", "torch", "weights"])
def test_operators_have_the_networks_macs_and_distinct_names(files, name):
    operators = listed(files[name])
    assert sum(operator.macs for operator in operators) == MACS + (COLOUR if name == "torch" else 0)
    assert len({operator.name for operator in operators}) == len(operators)
    weighted = [operator for operator in operators if operator.macs]
    assert [operator.channels for operator in weighted] == [16, 16, 16, 10]
    expected = {"torch": "int8"}.get(name, "float32")
    assert {operator.precision for operator in weighted} == {expected}
    names = {operator.name for operator in operators}
    assert all(set(operator.inputs) <= names for operator in operators)


@pytest.mark.parametrize("name", ["float", "torch"])
def test_profile_times_the_operators_and_leaves_no_file(files, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = Path(files[name].path)
    times = onnxruntime.profile(path, [images(1).numpy()], 1)
    assert set(times) == {operator.name for operator in onnxruntime.operators(path)}
    assert all(value >= 0 for value in times.values())
    assert sum(times.values()) > 0
    assert list(tmp_path.iterdir()) == []


def test_weights_alone_make_a_smaller_file_that_runs_the_same_operators(files):
    whole, packed = files["float"], files["weights"]
    assert packed.size_bytes < 0.6 * whole.size_bytes
    expected = outputs(whole)
    difference = np.abs(outputs(packed) - expected).max()
    assert 0 < difference <= 0.05 * np.abs(expected).max()
    assert [o.kind for o in listed(packed)] == [o.kind for o in listed(whole)]
    assert "arithmetic in float32" in packed.quantizer
    kept = {t.name for t in onnx.load(files["some weights"].path).graph.initializer}
    assert "stem.0.weight" in kept
    assert "wide.weight" not in kept


@pytest.mark.parametrize(
    ("name", "text"), [("native", "quantize_static"), ("kept", "torchao PT2E")]
)
def test_a_named_layer_stays_in_float_when_it_runs(files, name, text):
    """ONNX Runtime would quantize it again while it loads the file."""
    artifact = files[name]
    assert text in artifact.quantizer
    by_precision = {o.precision: o for o in listed(artifact) if o.macs == 256 * 16 * 16 * 9}
    assert set(by_precision) == {"float32"}
    assert by_precision["float32"].reason
    assert {"int8"} == {o.precision for o in listed(artifact) if o.macs == 256 * 4 * 16 * 9}
    expected = outputs(files["float"])
    assert np.abs(outputs(artifact) - expected).max() <= 0.1 * np.abs(expected).max()


def test_auto_says_which_quantizer_was_used_and_why(files):
    text = files["auto"].quantizer
    assert text.startswith(("torchao PT2E", "onnxruntime quantize_static"))
    assert "chosen on calibration images" in text
    assert "native" in text
    assert "torch" in text


@pytest.mark.parametrize(
    ("options", "calibration", "match"),
    [
        (Quantization(quantizer="native", observer="mse"), [images(4)], "observer: mse"),
        (Quantization(quantizer="native", correct_bias=True), [images(4)], "correct_bias"),
        (Quantization(quantizer="native"), [], "calibration images"),
    ],
)
def test_native_refusals(options, calibration, match, tmp_path):
    with pytest.raises(ExportError, match=match) as caught:
        export(
            small_network(),
            images(2),
            precision="int8",
            calibration=calibration,
            quantization=options,
            path=tmp_path / "net.onnx",
        )
    assert_readable(caught.value)
    assert list(tmp_path.iterdir()) == []


def model_of(nodes, constants, shape, kind=TensorProto.UINT8, rank=4):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("x", kind, shape)],
        [value("y", kind, ["a", "b", "c", "d"][:rank])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def run(model, array, tmp_path):
    onnx.checker.check_model(model)
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    session = onnxruntime.load(path, onnxruntime.session_options(1))
    return session.run(None, {"x": array})[0]


def pair(kind, scale):
    """Dequantize x, one operator, Quantize; the scale is the result's."""
    node, *rest = kind
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["a"], name="dq"),
        helper.make_node(node, ["a", *rest], ["b"], name="middle", **HARD.get(node, {})),
        helper.make_node("QuantizeLinear", ["b", "t", "v"], ["y"], name="q"),
    ]
    constants = {"s": np.float32(0.05), "z": np.uint8(120), "t": np.float32(scale)}
    constants["v"] = np.uint8(0 if node == "HardSigmoid" else 120)
    return nodes, {name: np.asarray(value) for name, value in constants.items()}


HARD = {"HardSigmoid": {"alpha": 1 / 6, "beta": 0.5}}


@pytest.mark.parametrize(("scale", "replaced"), [(1 / 255, True), (0.8 / 255, True), (0.01, False)])
def test_hard_sigmoid_becomes_an_addition_that_saturates(scale, replaced, tmp_path):
    nodes, constants = pair(["HardSigmoid"], scale)
    model = model_of(nodes, constants, [1, 4, 8, 8])
    every = np.arange(256, dtype=np.uint8).reshape(1, 4, 8, 8)
    before = run(model, every, tmp_path)
    saturate_hard_sigmoids(model)
    assert ("Add" in {node.op_type for node in model.graph.node}) == replaced
    after = run(model, every, tmp_path)
    assert np.abs(after.astype(int) - before).max() <= 1  # a tie may round the other way
    assert (after != before).mean() < 0.02


@pytest.mark.parametrize(("scale", "replaced"), [(0.05, True), (0.04, False)])
def test_padding_of_integers_with_their_zero(scale, replaced, tmp_path):
    nodes, constants = pair(["Pad", "pads"], scale)
    constants["pads"] = np.array([0, 1, 0, 0, 0, 2, 0, 0], dtype=np.int64)
    model = model_of(nodes, constants, [1, 4, 8, 8])
    every = np.arange(256, dtype=np.uint8).reshape(1, 4, 8, 8)
    before = run(model, every, tmp_path)
    pad_in_integers(model)
    assert ([node.op_type for node in model.graph.node] == ["Pad"]) == replaced
    assert np.array_equal(run(model, every, tmp_path), before)


@pytest.mark.parametrize(
    ("axes", "keep", "pooled"),
    [([2, 3], 1, True), ([-1, -2], 1, True), ([1], 1, False), ([2, 3], 0, False)],
)
def test_a_mean_over_the_image_becomes_global_pooling(axes, keep, pooled, tmp_path):
    mean = helper.make_node("ReduceMean", ["x", "axes"], ["y"], name="mean", keepdims=keep)
    constants = {"axes": np.array(axes, dtype=np.int64)}
    rank = 4 if keep else 2
    model = model_of([mean], constants, [2, 4, 8, 8], TensorProto.FLOAT, rank)
    array = images(2)[:, :1].repeat(1, 4, 1, 1)[:, :, :8, :8].numpy()
    before = run(model, array, tmp_path)
    pool_globally(model)
    assert (model.graph.node[0].op_type == "GlobalAveragePool") == pooled
    assert np.allclose(run(model, array, tmp_path), before, atol=1e-6)
