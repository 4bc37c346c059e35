"""OpenVINO: int8 files that run in integers throughout, in the precision that a file states."""

from __future__ import annotations

import ctypes
import gc
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bevel
from bevel.core.errors import ExportError, MeasurementError
from bevel.core.recipe import Quantization
from bevel.graph.program import export_program
from bevel.quantization.pt2e import quantize
from bevel.testing.plugin import assert_readable

openvino = pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")

from bevel.runtimes import openvino as runtime  # noqa: E402

SHAPE = (3, 16, 16)


class Gated(nn.Module):
    """What lite networks are made of: a residual sum, SiLU, squeeze and excitation, a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.stem(x))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        gate = torch.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(x, 1)))
        gated = x * torch.sigmoid(self.excite(gate))
        x = self.pool(torch.cat([x, gated], 1))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def export(net, path, precision="int8", **options):
    return bevel.export(
        net,
        images(2, 0),
        runtime="openvino",
        precision=precision,
        calibration=[images(32, 1)],
        quantization=Quantization(**options),
        path=path,
    )


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Gated().eval()


@pytest.fixture(scope="module")
def int8(net, tmp_path_factory):
    return export(net, tmp_path_factory.mktemp("int8") / "net.zip")


def run(artifact, array):
    return runtime.open_session(Path(artifact.path), 1).run([array])[0]


def test_every_layer_runs_in_integers_and_sums_are_inside_them(int8):
    found = runtime.operators(Path(int8.path))
    heavy = [operator for operator in found if operator.macs]
    assert len(heavy) == 7
    assert {operator.precision for operator in heavy} == {"int8"}
    assert not [o for o in found if o.kind == "Eltwise" and "add" in o.name]
    assert all(set(o.inputs) <= {other.name for other in found} for o in found)


def test_file_computes_what_its_reference_does(net, int8):
    program, options = export_program(net, (images(2, 0),)), Quantization()
    reference = quantize(program, runtime.quantizer(options), [images(32, 1)], options)
    x = images(16, 2)
    with torch.no_grad():
        expected, exact = reference(x).numpy(), net(x).numpy()
    spread = np.ptp(exact)
    assert np.abs(run(int8, x.numpy()) - expected).max() <= 0.02 * spread
    assert 0 < np.abs(expected - exact).max() <= 0.05 * spread


def test_layers_can_stay_in_float(net, tmp_path):
    for quantizer in ("torch", "native"):
        path = tmp_path / f"{quantizer}.zip"
        export(net, path, quantizer=quantizer, keep_float=["last"])
        heavy = [operator for operator in runtime.operators(path) if operator.macs]
        left = {operator.macs for operator in heavy if operator.precision == "float32"}
        assert 32 * 16 * 8 * 8 in left, quantizer
        # NNCF leaves squeeze and excitation in float of its own accord.
        assert left <= {32 * 16 * 8 * 8} | ({128} if quantizer == "native" else set())


def test_native_quantizer_is_named_repeatable_and_silent(net, tmp_path, capfd):
    first, second = (export(net, tmp_path / f"{i}.zip", quantizer="native") for i in range(2))
    assert first.quantizer.startswith("nncf.quantize")
    assert first.sha256 == second.sha256
    assert capfd.readouterr() == ("", "")
    x = images(16, 2)
    with torch.no_grad():
        exact = net(x).numpy()
    assert 0 < np.abs(run(first, x.numpy()) - exact).max() <= 0.05 * np.ptp(exact)


def test_auto_says_what_it_chose_and_why(net, tmp_path):
    chosen = export(net, tmp_path / "auto.zip", quantizer="auto")
    assert chosen.quantizer.startswith(("torchao PT2E", "nncf.quantize"))
    assert "chosen on calibration images: " in chosen.quantizer
    assert chosen.quantizer.count("agreement with float") == 2


@pytest.mark.parametrize("options", [{"observer": "mse"}, {"equalize": True}])
def test_what_nncf_is_not_asked_for(net, tmp_path, options):
    with pytest.raises(ExportError, match="use quantizer: torch") as caught:
        export(net, tmp_path / "no.zip", quantizer="native", **options)
    assert_readable(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_float32_means_float32_whatever_the_processor_prefers(net, tmp_path):
    for precision, arithmetic in (("float32", "f32"), ("bfloat16", "bf16"), ("float16", "f16")):
        path = tmp_path / f"{precision}.zip"
        export(net, path, precision)
        with zipfile.ZipFile(path) as archive:
            assert f'inference_precision value="{arithmetic}"'.encode() in archive.read("model.xml")
    found = runtime.operators(tmp_path / "float32.zip")
    assert {o.precision for o in found if o.macs} == {"float32"}
    half = (tmp_path / "float16.zip").stat().st_size
    assert half < 0.7 * (tmp_path / "float32.zip").stat().st_size


def test_unpacked_file_is_what_openvinos_own_tools_read(net, int8, tmp_path):
    with zipfile.ZipFile(int8.path) as archive:
        assert archive.namelist() == ["model.xml", "model.bin"]
        archive.extractall(tmp_path)
    compiled = openvino.Core().compile_model(tmp_path / "model.xml", "CPU")
    x = images(3, 2).numpy()
    with torch.no_grad():
        exact = net(torch.from_numpy(x)).numpy()
    assert np.abs(compiled([x])[0] - exact).max() <= 0.1 * np.ptp(exact)
    text = (tmp_path / "model.xml").read_text()
    for trace in (str(Path.cwd()), "site-packages", str(tmp_path), "nncf", "conversion_parameters"):
        assert trace not in text


@pytest.mark.parametrize(("side", "merged"), [(8, False), (80, True)])
def test_a_large_sum_is_merged_with_its_convolution(tmp_path, side, merged):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first, self.second = (nn.Conv2d(16, 16, 3, padding=1) for _ in "abc")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.stem(x))
            return torch.relu(x + self.second(torch.relu(self.first(x)))).mean((2, 3))

    x = torch.randn(2, 16, side, side, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "block.zip"
    bevel.export(
        Block().eval(), x, runtime="openvino", precision="int8", calibration=[x], path=path
    )
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    network = openvino.Core().read_model(tmp_path / "model.xml")
    rounded = {
        op.input_value(0).get_node().get_type_name()
        for op in network.get_ops()
        if op.get_type_name() == "FakeQuantize"
    }
    assert ("Convolution" in rounded or "Add" in rounded) is merged, rounded


def test_other_types_and_shapes_are_refused(int8):
    session = runtime.open_session(Path(int8.path), 1)
    image = images(1, 0).numpy()
    for wrong in (image.astype(np.float64), image[0], image[:, :2], image[:, :, 1:]):
        with pytest.raises(MeasurementError, match="takes float32 of shape") as caught:
            session.run([wrong])
        assert_readable(caught.value)


class _SignalStack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("quantizer", ["torch", "native"])
def test_sessions_leave_a_signal_stack_that_is_mapped(tmp_path, quantizer):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 14 * 14, 4))
    file = Path(export(net, tmp_path / "net.zip", quantizer=quantizer).path)
    first, second = (runtime.open_session(file, threads=1) for _ in range(2))
    for session in (first, second):
        session.run([images(1, 0).numpy()])
    del session, first
    gc.collect()
    del second
    gc.collect()
    stack = _SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    mapped = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()
    ]
    assert stack.start is None or any(
        int(start, 16) <= stack.start < int(end, 16) for start, end in mapped
    )


class Ghost(nn.Module):
    """Cheap channels beside dear ones, cut to a number that is all of them, as GhostNet does."""

    def __init__(self, kept: int = 16, *, last: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.cheap = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.reader = nn.Conv2d(kept, 4, 1)
        self.kept, self.last = kept, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = torch.cat([x, self.cheap(x)], 1)[:, : self.kept]
        return x if self.last else self.reader(x).mean((2, 3))


def slices(program):
    return program.graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor)


@pytest.mark.parametrize(("net", "left"), [(Ghost(), 0), (Ghost(12), 1), (Ghost(last=True), 1)])
def test_slices_that_take_everything_are_no_part_of_a_program(net, left):
    """But where one is the output, whose name the program's signature holds."""
    program = export_program(net.eval(), (images(2, 0),))
    assert len(slices(program)) == left
    assert torch.equal(program.module()(images(5, 1)), net(images(5, 1)))


def test_int8_after_a_cat_of_which_everything_is_taken(tmp_path):
    """OpenVINO 2026.4.1 ended with a segmentation fault on it."""
    torch.manual_seed(0)
    net = Ghost().eval()
    found = run(export(net, tmp_path / "ghost.zip"), images(8, 1).numpy())
    with torch.no_grad():
        expected = net(images(8, 1)).numpy()
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
