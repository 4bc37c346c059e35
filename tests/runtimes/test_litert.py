"""LiteRT files: what becomes integers, what XNNPACK takes, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import Bessel, TwoViews, assert_same, net_outputs
from gated import MACS, batches, gated

import bevel
from bevel.core.errors import ExportError
from bevel.core.recipe import Quantization
from bevel.measurement.parity import run_batch
from networks import randomise

pytest.importorskip("litert_torch", reason="needs the extra 'litert'")
pytest.importorskip("ai_edge_quantizer", reason="needs the extra 'litert'")
from bevel.runtimes import litert


def int8(path: Path, **options):
    return bevel.export(
        gated(),
        batches()[0][:1],
        runtime="litert",
        precision="int8",
        calibration=batches(),
        quantization=Quantization(**options),
        path=path,
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return int8(tmp_path_factory.mktemp("litert") / "gated.tflite")


def error(artifact) -> float:
    images = batches(3)[2]
    session = litert.open_session(Path(artifact.path), 1)
    (expected,) = net_outputs(gated(), images)
    got = run_batch(session, images.numpy())
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def test_integers_and_what_stays_in_float(artifact):
    assert 0 < error(artifact) < 0.1
    found = litert.operators(Path(artifact.path))
    assert all(operator.delegated for operator in found), found
    counted = {operator.kind: operator.precision for operator in found if operator.macs}
    assert counted == dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"), "int8")
    assert sum(operator.macs for operator in found) == MACS
    precisions = {operator.kind: operator.precision for operator in found}
    assert precisions["HARD_SWISH"] == "float32"
    assert precisions["LOGISTIC"] == "int8"


def test_borders_are_float_and_named(artifact):
    found = litert.operators(Path(artifact.path))
    assert (found[0].kind, found[-1].kind) == ("QUANTIZE", "DEQUANTIZE")
    ends = [(end.name, end.shape, end.dtype) for end in (*artifact.inputs, *artifact.outputs)]
    assert ends == [("args_0", [1, 3, 16, 16], "float32"), ("output_0", [1, 10], "float32")]


def test_what_the_native_quantizer_does_not_do_is_refused(tmp_path):
    with pytest.raises(ExportError, match="has no learn_rounding; use quantizer: torch"):
        int8(tmp_path / "native.tflite", quantizer="native", learn_rounding=True)


def test_native_quantizer_with_a_module_in_float(tmp_path):
    artifact = int8(tmp_path / "native.tflite", quantizer="native", keep_float=["stem"])
    assert artifact.quantizer.startswith("ai-edge-quantizer")
    assert 0 < error(artifact) < 0.1
    counted = [o for o in litert.operators(Path(artifact.path)) if o.macs]
    assert [o.precision for o in counted] == ["float32"] + ["int8"] * (len(counted) - 1)


def test_several_inputs_and_outputs(tmp_path):
    net = randomise(TwoViews())
    inputs = (torch.randn(1, 3, 8, 8), torch.randn(1, 1, 8, 8))
    artifact = bevel.export(net, inputs, runtime="litert", path=tmp_path / "two.tflite")
    session = litert.open_session(Path(artifact.path), 2)
    got = session.run([tensor.numpy() for tensor in inputs])
    assert_same(got, net_outputs(net, *inputs))


def test_operator_without_form(tmp_path, capfd):
    image = torch.ones(1, 3, 8, 8)
    with pytest.raises(ExportError, match=r"no LiteRT form: .*bessel_j0"):
        bevel.export(Bessel(), image, runtime="litert", path=tmp_path / "a.tflite")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_running_needs_neither_torch_nor_converter(artifact):
    program = (
        "import pathlib, sys, numpy\n"
        "from bevel.runtimes import litert\n"
        "session = litert.open_session(pathlib.Path(sys.argv[1]), 1)\n"
        "session.run([numpy.zeros(session.inputs[0].shape, 'float32')])\n"
        "heavy = {'torch', 'torchao', 'litert_torch', 'ai_edge_quantizer', 'tensorflow'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)\n"
    )
    command = [sys.executable, "-c", program, artifact.path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
