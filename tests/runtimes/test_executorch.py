"""ExecuTorch files: what becomes integers, what XNNPACK takes, threads, and the profiler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exported import TwoViews, assert_same, net_outputs
from gated import MACS, batches, gated

import bevel
from bevel.core.recipe import Quantization
from bevel.measurement.parity import run_batch
from networks import randomise

pytest.importorskip("executorch", reason="needs the extra 'executorch'")
from bevel.runtimes import executorch


def int8(path: Path, **options):
    return bevel.export(
        gated(),
        batches()[0][:1],
        runtime="executorch",
        precision="int8",
        calibration=batches(),
        quantization=Quantization(**options),
        path=path,
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return int8(tmp_path_factory.mktemp("executorch") / "gated.pte")


def outputs(artifact, threads: int = 1) -> np.ndarray:
    session = executorch.open_session(Path(artifact.path), threads)
    return run_batch(session, batches(3)[2].numpy())


def error(artifact) -> float:
    (expected,) = net_outputs(gated(), batches(3)[2])
    return float(np.abs(outputs(artifact) - expected).max() / np.abs(expected).max())


def test_integers_and_what_stays_in_float(artifact):
    assert 0 < error(artifact) < 0.1
    found = executorch.operators(Path(artifact.path))
    counted = [operator for operator in found if operator.macs]
    assert {operator.precision for operator in counted} == {"int8"}
    assert all(operator.delegated for operator in counted)
    assert sum(operator.macs for operator in counted) == MACS
    lookups = [operator for operator in found if operator.kind in ("Hardswish", "Sigmoid")]
    assert [operator.precision for operator in lookups] == ["int8", "int8"]


def test_profile_is_by_operator(artifact):
    image = batches()[0][:1].numpy()
    times = executorch.profile(Path(artifact.path), [image], 1)
    found = executorch.operators(Path(artifact.path))
    named = [times[operator.name] for operator in found if operator.name in times]
    assert sum(named) > 0.8 * sum(times.values())  # some kernels stand for no operator of the file
    assert {operator.name for operator in found if operator.macs} <= set(times)
    assert all(milliseconds >= 0 for milliseconds in times.values())
    assert sum(times.values()) > 0


def test_native_quantizer_with_a_module_in_float(tmp_path):
    artifact = int8(tmp_path / "native.pte", quantizer="native", keep_float=["stem"])
    assert artifact.quantizer.startswith("XNNPACKQuantizer")
    assert 0 < error(artifact) < 0.1
    counted = [o for o in executorch.operators(Path(artifact.path)) if o.macs]
    assert [o.precision for o in counted] == ["float32"] + ["int8"] * (len(counted) - 1)


def test_sessions_with_different_threads_take_turns(artifact):
    image = batches()[0][:1].numpy()
    sessions = [executorch.open_session(Path(artifact.path), threads) for threads in (1, 2, 1)]
    answers = [session.run([image])[0] for _ in range(3) for session in sessions]
    assert all(np.array_equal(answer, answers[0]) for answer in answers)


def test_several_inputs_and_outputs(tmp_path):
    net = randomise(TwoViews())
    inputs = (torch.randn(1, 3, 8, 8), torch.randn(1, 1, 8, 8))
    artifact = bevel.export(net, inputs, runtime="executorch", path=tmp_path / "two.pte")
    assert [signature.name for signature in artifact.inputs] == ["input", "input_1"]
    session = executorch.open_session(Path(artifact.path), 2)
    got = session.run([tensor.numpy() for tensor in inputs])
    assert_same(got, net_outputs(net, *inputs))
