"""The doctor on a runtime whose files say what the test wants, and on real ONNX files."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bevel
from bevel.core import plugins
from bevel.core.errors import DataError, MeasurementError
from bevel.core.recipe import Normalize
from bevel.core.records import (
    Accuracy,
    Artifact,
    DeviceFacts,
    Diagnosis,
    Finding,
    Latency,
    Measurement,
    Operator,
    TensorSignature,
)
from bevel.data.unlabelled import folder_images
from bevel.measurement import findings
from bevel.measurement.doctor import diagnose, diagnose_all, parity, random_inputs
from bevel.measurement.shipping import choose
from bevel.testing.plugin import assert_readable
from networks import EXAMPLE, Plain, Projection, Shared, randomise


def op(name: str, kind: str = "Conv", precision: str = "int8", **more) -> Operator:
    return Operator(name=name, kind=kind, precision=precision, **more)


def file(precision: str = "int8", path: str = "net.fake", runtime: str = "fake") -> Artifact:
    ends = {
        "inputs": [TensorSignature(name="x", shape=["batch", 3], dtype="float32")],
        "outputs": [TensorSignature(name="y", shape=["batch", 3], dtype="float32")],
    }
    return Artifact(
        path=path, runtime=runtime, precision=precision, size_bytes=1, sha256="", **ends
    )


@pytest.fixture
def fake(monkeypatch):
    """A runtime called fake; `holds` are its files' operators, `takes` their times, by path."""
    module = types.ModuleType("fake_runtime")
    module.SUFFIX, module.PRECISIONS = ".fake", ("float32", "int8")
    module.holds, module.takes = {}, {}
    module.channel_step = lambda precision: 16 if precision == "int8" else 8
    module.operators = lambda path: module.holds[str(path)]
    module.profile = lambda path, *_: module.takes[str(path)]
    bias = {"net.fake": 0.5}

    class Session:
        def __init__(self, path: Path) -> None:
            self.bias = bias.get(str(path), 0.0)

        def run(self, arrays):
            assert arrays[0].shape == (1, 3)
            return [arrays[0] + self.bias]

    module.open_session = lambda path, _: Session(path)
    monkeypatch.setitem(sys.modules, "fake_runtime", module)
    real = plugins.discover
    found = {"fake": plugins.Plugin("runtimes", "fake", "fake_runtime")}
    monkeypatch.setattr(
        plugins, "discover", lambda kind: found if kind == "runtimes" else real(kind)
    )
    return module


MIXED = [
    op("in", "QuantizeLinear", "none"),
    op("c1", "QLinearConv", macs=600, channels=16, inputs=["in"]),
    op("d1", "DequantizeLinear", "none", inputs=["c1"]),
    op("h1", "HardSwish", "float32", inputs=["d1"]),
    op("h2", "HardSwish", "float32", inputs=["h1"]),
    op("q1", "QuantizeLinear", "none", inputs=["h2"]),
    op("c2", "QLinearConv", macs=300, channels=12, inputs=["q1"]),
    op("d2", "DequantizeLinear", "none", inputs=["c2"]),
    op("move", "Reshape", "none", inputs=["d2"]),
    op("q2", "QuantizeLinear", "none", inputs=["move"]),
    op("t", "Transpose", "none", inputs=["q2"]),
    op("fc", "Gemm", "float32", macs=100, channels=10, reason="its weights are not quantized"),
    op("out", "DequantizeLinear", "none", inputs=["fc"]),
]
TIMES = {"c1": 2.0, "h1": 2.0, "h2": 1.1, "q1": 0.3, "d1": 0.1, "c2": 3.0, "t": 0.9, "fc": 0.4}
TIMES |= {"q2": 0.1, "d2": 0.05, "out": 0.03, "in": 0.02}


def test_what_is_dear_comes_first(fake):
    fake.holds["net.fake"], fake.takes["net.fake"] = MIXED, TIMES
    found = diagnose(file())
    assert found.profiled_ms == pytest.approx(10.0)
    assert [round(f.share, 3) for f in found.findings] == [0.31, 0.3, 0.09, 0.06, 0.04]
    swish, narrow, transpose, conversions, gemm = (f.message for f in found.findings)
    assert swish == (
        "31 % of the time is in 2 HardSwish operators that run in float: ReLU in its place runs "
        "in integers: change it in the network and fine-tune"
    )
    assert narrow == (
        "30 % of the time is in 1 operator whose width is no multiple of 16 (12): prune with "
        "align: 16"
    )
    assert transpose == "9 % of the time is in 1 operator that only changes the order of the axes"
    assert conversions.startswith(
        "6 % of the time is in 6 operators that convert between float and integers, 1 pair of "
        "which undo each other"
    )
    assert gemm == (
        "4 % of the time is in 1 Gemm operator that runs in float: its weights are not quantized"
    )
    assert (found.conversions, found.stray_pairs, found.transposes) == (6, 1, 1)
    assert found.int8_macs == pytest.approx(0.9)
    assert found.verdict == f"90 % of the MACs run in int8; {swish}"
    assert found.parity is None
    assert Diagnosis.model_validate_json(found.model_dump_json()) == found


def test_without_a_profiler_the_macs_count(fake):
    del fake.profile
    fake.holds["net.fake"] = MIXED
    found = diagnose(file())
    assert found.profiled_ms is None
    assert all(finding.share is None for finding in found.findings)
    assert found.findings[0].message.startswith("30 % of the MACs are in 1 operator whose width")
    assert found.findings[1].message.startswith("10 % of the MACs are in 1 Gemm operator")
    assert found.findings[2].message.startswith("it has 2 HardSwish operators that run in float")


def test_without_operators_it_says_so(fake):
    del fake.operators
    found = diagnose(file(), speedup=0.5)
    assert found.operators == []
    assert found.int8_macs is None
    assert found.verdict == (
        "2.00x slower than the float file; fake does not say which operators its files hold"
    )


def test_what_only_the_profiler_knows_is_kept(fake):
    fake.holds["net.fake"] = [op("c", channels=16, macs=5)]
    fake.takes["net.fake"] = {"c": 1.0, "ReorderInput_7": 3.0}
    found = diagnose(file())
    assert [(o.kind, o.latency_ms) for o in found.operators] == [("Conv", 1.0), ("other", 3.0)]
    assert found.profiled_ms == 4.0
    narrow = [op("a", channels=10, macs=5), op("b", channels=16, macs=15)]
    fake.holds["net.fake"] = narrow  # most of the time is under other names: the MACs count
    fake.takes["net.fake"] = {"a": 0.9, "Convolution (NHWC, QC8)": 1.1}
    assert diagnose(file()).findings[0].message.startswith("25 % of the MACs are in 1 operator")
    fake.takes["net.fake"] = {"a": 0.9, "ReorderInput_7": 0.1}
    assert diagnose(file()).findings[0].message.startswith("90 % of the time is in 1 operator")


def test_stray_pairs_by_order_where_the_file_names_no_inputs():
    chain = [
        op("a", "dequantize_per_tensor", "none"),
        op("b", "quantize_per_tensor", "none"),
        op("c", "dequantize_per_tensor", "none"),
        op("d", "add", "float32"),
        op("e", "quantize_per_tensor", "none"),
    ]
    assert findings.count_stray_pairs(chain) == 1
    assert findings.count_conversions(chain) == 4
    circle = [op("a", "Reshape", "none", inputs=["b"]), op("b", "Quantize", "none", inputs=["a"])]
    assert findings.count_stray_pairs(circle) == 0


@pytest.mark.parametrize(
    ("kind", "conversion", "transpose"),
    [
        ("QuantizeLinear", True, False),
        ("DequantizeLinear", True, False),
        ("DEQUANTIZE", True, False),
        ("FakeQuantize", True, False),
        ("quantized_decomposed::quantize_per_tensor.out", True, False),
        ("Convert (NC, F32, QS8)", True, False),
        ("QLinearConv", False, False),
        ("quantized::linear", False, False),
        ("TRANSPOSE_CONV", False, False),
        ("ConvTranspose", False, False),
        ("TRANSPOSE", False, True),
        ("aten.permute_copy", False, True),
        ("Reorder", False, True),
    ],
)
def test_kinds_in_the_words_of_four_runtimes(kind, conversion, transpose):
    assert findings.is_conversion(op("x", kind)) == conversion
    assert findings.is_transpose(op("x", kind)) == transpose


def test_slower_than_in_the_float_file(fake):
    fake.holds["net.fake"] = [op("c", "QLinearConv", macs=9, channels=16), op("a", "QLinearAdd")]
    fake.takes["net.fake"] = {"c": 1.5, "a": 0.5}
    fake.holds["float.fake"] = [op("f", "FusedConv", "float32", macs=9), op("g", "Add", "float32")]
    fake.takes["float.fake"] = {"f": 1.2, "g": 0.6}
    found = diagnose(file(), against=file("float32", "float.fake"), speedup=0.9)
    assert [finding.share for finding in found.findings] == [pytest.approx(0.15)]
    assert found.verdict == (
        "1.11x slower than the float file; 100 % of the MACs run in int8; Conv takes 1.5 ms here "
        "and 1.2 ms in the float file: these layers are too narrow or too small for integers to pay"
    )
    assert found.parity.max_difference == pytest.approx(0.5)
    assert found.parity.mean_difference == pytest.approx(0.5)
    assert (found.parity.top1_agreement, found.parity.images) == (1.0, 32)


def test_slower_and_nothing_stands_out(fake):
    fake.holds["net.fake"], fake.takes["net.fake"] = [op("c", macs=9, channels=10)], {"c": 1.0}
    assert diagnose(file(), speedup=0.5).verdict.endswith("ship the float file")
    assert diagnose(file(), speedup=1.5).verdict == (
        "1.50x faster than the float file; 100 % of the MACs run in int8"
    )


def test_operators_that_the_delegate_does_not_take(fake):
    fake.holds["net.fake"] = [
        op("c", macs=9, channels=16),
        op("g", "aten.gather", "int8", delegated=False, reason="no kernel"),
        op("r", "aten.roll", "int8", delegated=False),
    ]
    fake.takes["net.fake"] = {"c": 1.0, "g": 2.0, "r": 1.0}
    assert diagnose(file()).findings[0].message == (
        "75 % of the time is in 2 operators that the delegate does not take (aten.gather, "
        "aten.roll): no kernel"
    )


def test_a_float_file_is_not_blamed_for_being_float(fake):
    fake.holds["net.fake"] = [op("c", "Conv", "float32", macs=9, channels=12), op("h", "Swish")]
    fake.takes["net.fake"] = {"c": 1.0, "h": 1.0}
    found = diagnose(file("float32"))
    assert found.findings == []
    assert found.verdict == "2 operators, float32 by design"


@pytest.mark.usefixtures("fake")
def test_parity_with_another_network():
    with pytest.raises(MeasurementError, match="not of the same network") as caught:
        parity(file(), nn.Linear(3, 7), [np.zeros((2, 3), np.float32)])
    assert_readable(caught.value)
    with pytest.raises(MeasurementError, match="does not run on these images") as caught:
        parity(file(), nn.Linear(4, 3), [np.zeros((2, 3), np.float32)])
    assert_readable(caught.value)


HERE = DeviceFacts(
    device="local",
    system="Linux",
    architecture="x86_64",
    processor=None,
    cores=2,
    memory_bytes=None,
    governor=None,
    frequency_mhz=None,
    temperature_c=None,
    runtime_version=None,
)


def measured(precision: str, ms: float | None, top1: float, label: str = "compressed", size=9):
    artifact = file(precision, f"{label}-{precision}").model_copy(update={"size_bytes": size})
    return Measurement(
        label=label,
        artifact=artifact,
        threads=1,
        device=HERE,
        latency=None if ms is None else Latency(samples_ms=[ms] * 3, warmup_runs=1),
        accuracy=Accuracy(top1=top1, images=100, split="test"),
    )


ORIGINAL = measured("float32", 5.0, 0.95, "original")


@pytest.mark.parametrize(
    ("float32", "int8", "budget", "ships", "reason"),
    [
        ((1.2, 0.90), (0.8, 0.89), None, "int8", "1.50x faster than float32, accuracy -1.00 poin"),
        ((1.2, 0.90), (0.8, 0.91), 0.0, "int8", "1.50x faster than float32, accuracy +1.00 poin"),
        ((1.2, 0.90), (0.8, 0.87), None, "float32", "int8 loses 3.00 points of accuracy, more"),
        ((1.2, 0.90), (0.8, 0.87), 0.05, "int8", "1.50x faster"),
        ((1.0, 0.90), (1.5, 0.90), None, "float32", "int8 is 1.50x slower than float32: why"),
        ((None, 0.90), (None, 0.90), None, "int8", "50% of the size of float32"),
    ],
)
def test_the_file_to_ship(float32, int8, budget, ships, reason):
    files = [ORIGINAL, measured("float32", *float32, size=8), measured("int8", *int8, size=4)]
    doctor = Diagnosis(
        label="compressed",
        artifact=files[2].artifact,
        threads=1,
        verdict="",
        findings=[Finding(message="why")],
        channel_step=8,
    )
    (shipment,) = choose(files, [doctor], budget)
    assert shipment.precision == ships
    assert shipment.path == f"compressed-{ships}"
    assert shipment.reason.startswith(reason)
    assert shipment.target == "fake@local, threads 1"


def test_one_file_ships_by_itself():
    (shipment,) = choose([ORIGINAL, measured("int8", 1.0, 0.5)], [])
    assert shipment.precision == "int8"
    assert "only file" in shipment.reason


def test_of_a_run_the_compressed_files_beside_their_float_file(fake):
    fake.holds = {"compressed-float32": [op("f", precision="float32")], "compressed-int8": MIXED}
    fake.takes = {"compressed-float32": {"f": 1.0}, "compressed-int8": TIMES}
    files = [ORIGINAL, measured("float32", 1.0, 0.9), measured("int8", 2.0, 0.9)]
    float32, int8 = diagnose_all(files, torch.zeros(1, 3))
    assert float32.speedup is None
    assert int8.speedup == 0.5
    assert int8.verdict.startswith("2.00x slower than the float file; 90 % of the MACs")
    assert int8.label == "compressed"
    away = [m.model_copy(update={"device": m.device.model_copy(update={"device": "ssh"})})
            for m in files]  # fmt: skip
    assert diagnose_all(away, torch.zeros(1, 3))[1].profiled_ms is None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A network with one Conv between others, and its float and int8 ONNX files."""
    folder, net = tmp_path_factory.mktemp("files"), randomise(Projection())
    batches = [torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(5))]
    return net, *(
        bevel.export(
            net,
            EXAMPLE,
            precision=precision,
            calibration=batches,
            path=folder / f"{precision}.onnx",
        )
        for precision in ("float32", "int8")
    )


def test_parity_of_real_files_is_that_of_a_hand_computation(files):
    net, float32, int8 = files
    arrays = random_inputs(int8, 9)
    with torch.no_grad():
        expected = net(torch.from_numpy(arrays[0])).numpy().astype(np.float64)
    session = plugins.load("runtimes", "onnxruntime").open_session(Path(int8.path), 1)
    got = session.run(arrays)[0].astype(np.float64)
    for against in (net, float32):
        found = parity(int8, against, arrays)
        assert found.max_difference == pytest.approx(np.abs(got - expected).max(), rel=1e-2)
        assert found.mean_difference == pytest.approx(np.abs(got - expected).mean(), rel=1e-2)
        assert found.top1_agreement == np.mean(got.argmax(1) == expected.argmax(1))
        assert found.images == 9
    assert parity(float32, net, arrays).max_difference < 1e-5


def test_real_files_on_onnx_runtime(files, capfd):
    runtime = plugins.load("runtimes", "onnxruntime")
    if not hasattr(runtime, "operators"):
        pytest.skip("this ONNX Runtime plugin does not list operators")
    net, float32, int8 = files
    found = bevel.diagnose(int8, against=float32, images=EXAMPLE)
    assert capfd.readouterr() == ("", "")
    assert found.int8_macs == 1.0
    assert found.stray_pairs == 0
    assert found.profiled_ms > 0
    assert found.parity.images == 2
    by_macs = sum(o.macs for o in found.operators)
    plain = bevel.diagnose(float32, against=net, images=EXAMPLE)
    assert plain.int8_macs == 0.0
    macs = bevel.analyze(net, EXAMPLE[:1]).cost().macs
    assert sum(o.macs for o in plain.operators) == macs
    stem = net.stem[0]
    colour = math.prod(EXAMPLE.shape[2:]) * stem.out_channels * math.prod(stem.kernel_size)
    assert by_macs == macs + colour  # the fourth that an image gets


def test_images_of_a_folder(tmp_path):
    from PIL import Image

    for number in range(5):
        folder = tmp_path / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (20, 10 + number), (number * 50, 0, 255)).save(folder / f"{number}.png")
    images = folder_images(tmp_path, (3, 8, 6), None, 3)
    assert images.shape == (3, 3, 8, 6)
    assert [round(float(i[0, 0, 0]) * 255) for i in images] == [0, 200, 150]  # 0, 4, 3: by path
    normalize = Normalize(mean=[0.0, 0.0, 0.5], std=[1.0, 1.0, 0.5])
    assert float(folder_images(tmp_path, (3, 8, 6), normalize, 1)[0, 2, 0, 0]) == 1.0
    assert folder_images(tmp_path, (1, 4, 4), None, 9).shape == (5, 1, 4, 4)
    (tmp_path / "damaged.png").write_bytes(b"no image")
    for bad, shape, message in (
        (tmp_path / "absent", (3, 8, 8), "is not a folder of images"),
        (tmp_path, (4, 8, 8), "takes 4 channels"),
        (tmp_path, (3, 8, 8), "damaged.png cannot be read"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            folder_images(bad, shape, None, 9)
        assert_readable(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        folder_images(tmp_path / "empty", (3, 8, 8), None, 9)


def test_several_inputs_and_shapes_get_random_numbers():
    artifact = file().model_copy(
        update={
            "inputs": [
                TensorSignature(name="a", shape=[1, 3, 4], dtype="float32"),
                TensorSignature(name="b", shape=["batch", 2], dtype="int64"),
            ]
        }
    )
    a, b = random_inputs(artifact, 5)
    assert (a.shape, b.shape, b.dtype) == ((5, 3, 4), (5, 2), np.int64)
    assert np.array_equal(a, random_inputs(artifact, 5)[0])


def test_first_output_of_a_network_with_several(tmp_path):
    net = randomise(Shared())
    artifact = bevel.export(net, EXAMPLE, path=tmp_path / "shared.onnx")
    assert parity(artifact, net, [EXAMPLE.numpy()]).max_difference < 1e-4
    assert parity(artifact, artifact, [EXAMPLE.numpy()]).max_difference == 0
    plain = bevel.export(randomise(Plain()), EXAMPLE, path=tmp_path / "plain.onnx")
    with pytest.raises(MeasurementError, match="not of the same network"):
        parity(artifact, plain, [EXAMPLE.numpy()])
