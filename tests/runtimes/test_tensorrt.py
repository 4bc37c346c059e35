"""TensorRT's files: their structure, and what they compute in ONNX Runtime."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bevel.core.errors import BevelError, ExportError, MeasurementError, MissingDependencyError
from bevel.core.recipe import Quantization
from bevel.models import build
from bevel.runtimes import export, onnxruntime, tensorrt
from bevel.testing.plugin import assert_readable
from bevel.testing.runtimes import RuntimeContract, images, small_network

needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is None, reason="another process needs TensorRT itself"
)


class TestTensorrt(RuntimeContract):
    """Its files run in ONNX Runtime here: the numbers are TensorRT's up to rounding."""

    name = "tensorrt"

    @pytest.fixture(scope="class")
    @classmethod
    def plugin(cls):
        own = {name: getattr(tensorrt, name) for name in dir(tensorrt) if name[0] != "_"}
        return SimpleNamespace(**{**own, "open_session": onnxruntime.open_session})

    @needs_tensorrt
    def test_a_process_of_its_own_is_silent_and_writes_the_same_bytes(
        self, plugin, artifacts, tmp_path
    ):
        super().test_a_process_of_its_own_is_silent_and_writes_the_same_bytes(
            plugin, artifacts, tmp_path
        )

    @needs_tensorrt
    def test_files_run_where_bevel_is_not_installed(self, plugin, artifacts, tmp_path):
        super().test_files_run_where_bevel_is_not_installed(plugin, artifacts, tmp_path)

    def test_states_its_version(self, plugin):
        """It has none where it is not installed, and says so."""
        assert plugin.version().startswith("tensorrt")


@pytest.fixture(scope="module")
def form():
    return pytest.importorskip("bevel.runtimes._tensorrt_form")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """ResNet-20 in int8, with biases in its batch norms."""
    torch.manual_seed(0)
    net = build("bevel:resnet20", {}).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias)
    batch = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("trt") / "net.onnx"
    export(net, batch, runtime="tensorrt", precision="int8", calibration=[batch], path=path)
    return onnx.load(str(path))


def of_kind(model, kind):
    return [node for node in model.graph.node if node.op_type == kind]


def stored(model):
    return {tensor.name: tensor for tensor in model.graph.initializer}


def makers(model):
    return {name: node for node in model.graph.node for name in node.output}


def test_every_scale_is_symmetric_int8(model):
    constants = stored(model)
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        assert of_kind(model, kind)
        for node in of_kind(model, kind):
            zero = numpy_helper.to_array(constants[node.input[2]])
            assert zero.dtype == np.int8
            assert not zero.any()
            assert node.input[1] in constants


def test_convolutions_have_quantized_inputs_and_float_biases(model):
    made, constants = makers(model), stored(model)
    convolutions = of_kind(model, "Conv")
    assert len(convolutions) == 19
    for node in convolutions:
        assert made[node.input[0]].op_type == "DequantizeLinear"
        weight = made[node.input[1]]
        assert weight.op_type == "DequantizeLinear"
        scale = constants[weight.input[1]]
        assert list(scale.dims) == [constants[weight.input[0]].dims[0]]
        assert constants[node.input[2]].data_type == TensorProto.FLOAT


def test_a_residual_addition_takes_the_convolution_directly_and_the_rest_quantized(model):
    made = makers(model)
    additions = of_kind(model, "Add")
    assert len(additions) == 9
    for node in additions:
        assert sorted(made[name].op_type for name in node.input) == ["Conv", "DequantizeLinear"]


def with_damage(model, damage):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    damage(copy)
    return copy


def shift_zero_point(model):
    node = of_kind(model, "QuantizeLinear")[0]
    tensor = numpy_helper.from_array(np.array(3, dtype=np.int8), "three")
    model.graph.initializer.append(tensor)
    node.input[2] = "three"


def use_uint8(model):
    node = of_kind(model, "QuantizeLinear")[0]
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, dtype=np.uint8), "u8"))
    node.input[2] = "u8"


def drop_zero_point(model):
    del of_kind(model, "QuantizeLinear")[0].input[2:]


def quantize_bias(model):
    node = of_kind(model, "Conv")[0]
    count = stored(model)[node.input[2]].dims[0]
    for value, name in (
        (np.zeros(count, dtype=np.int32), "bias32"),
        (np.ones(count, dtype=np.float32), "bias_scale"),
        (np.zeros(count, dtype=np.int32), "bias_zero"),
    ):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    restored = helper.make_node(
        "DequantizeLinear", ["bias32", "bias_scale", "bias_zero"], ["bias"], name="bias_dq", axis=0
    )
    model.graph.node.insert(0, restored)
    node.input[2] = "bias"


def compute_scale(model):
    node = of_kind(model, "QuantizeLinear")[0]
    model.graph.node.insert(0, helper.make_node("Abs", [node.input[1]], ["computed"], name="abs"))
    node.input[1] = "computed"


def wrong_axis(model):
    made = makers(model)
    weight = made[of_kind(model, "Conv")[1].input[1]]
    del weight.attribute[:]
    weight.attribute.append(helper.make_attribute("axis", 1))


def float_weight(model):
    node = of_kind(model, "Conv")[0]
    shape = stored(model)[makers(model)[node.input[1]].input[0]].dims
    tensor = numpy_helper.from_array(np.ones(shape, dtype=np.float32), "float_weight")
    model.graph.initializer.append(tensor)
    node.input[1] = "float_weight"


def float_residual(model):
    made = makers(model)
    node = of_kind(model, "Add")[0]
    index = [made[name].op_type for name in node.input].index("DequantizeLinear")
    node.input[index] = made[made[node.input[index]].input[0]].input[0]


def contrib_operator(model):
    of_kind(model, "Relu")[0].domain = "com.microsoft"


DAMAGES = {
    shift_zero_point: "its zero point is 3",
    use_uint8: "uint8",
    drop_zero_point: "no zero point",
    quantize_bias: "bias",
    compute_scale: "not a constant",
    wrong_axis: "axis 1",
    float_weight: "its weight is in float",
    float_residual: "its residual input is in float",
    contrib_operator: "com.microsoft",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_check_names_the_node_that_breaks_a_rule(form, model, damage):
    form.check_structure(model)
    damaged = with_damage(model, damage)
    with pytest.raises(ExportError) as caught:
        form.check_structure(damaged)
    assert_readable(caught.value)
    assert DAMAGES[damage] in str(caught.value)
    named = str(caught.value).split("'")[1]
    assert named in {node.name for node in damaged.graph.node}


def test_a_session_says_that_the_file_was_not_run(tmp_path):
    try:
        import tensorrt as package  # noqa: F401
    except ModuleNotFoundError:
        expected: type[BevelError] = MissingDependencyError
    else:
        if torch.cuda.is_available():
            pytest.skip("TensorRT runs here")
        expected = MeasurementError
    artifact = export(small_network(), images(2), runtime="tensorrt", path=tmp_path / "net.onnx")
    with pytest.raises(expected, match="was not run") as caught:
        tensorrt.open_session(Path(artifact.path), 1)
    assert_readable(caught.value)


def test_an_engine_computes_what_the_network_does(tmp_path):
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU")
    for precision, tolerance in (("float32", 1e-2), ("int8", 0.1)):
        artifact = export(
            small_network(),
            images(2),
            runtime="tensorrt",
            precision=precision,
            calibration=[images(32, 1)],
            path=tmp_path / f"{precision}.onnx",
        )
        (got,) = tensorrt.open_session(Path(artifact.path), 1).run([images(16, seed=3).numpy()])
        with torch.no_grad():
            expected = small_network()(images(16, seed=3)).numpy()
        assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def test_it_has_no_native_quantizer(tmp_path):
    with pytest.raises(ExportError, match="quantizer: torch"):
        export(
            small_network(),
            images(2),
            runtime="tensorrt",
            precision="int8",
            calibration=[images(8)],
            quantization=Quantization(quantizer="native"),
            path=tmp_path / "net.onnx",
        )
