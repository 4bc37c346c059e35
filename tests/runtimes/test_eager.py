"""The reference: exact, needs no source of the network, and runs nothing that a file brings."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import OneImage, TwoViews, assert_same, net_outputs
from torch import nn

import bevel
from bevel.core.errors import ExportError, MeasurementError
from bevel.core.recipe import Quantization
from bevel.graph.program import export_program
from bevel.quantization.pt2e import quantize
from bevel.runtimes import eager
from bevel.testing.plugin import assert_readable
from networks import ALL, EXAMPLE, Plain, randomise


def outputs(path, *inputs):
    return eager.open_session(Path(path), 1).run([tensor.numpy() for tensor in inputs])


@pytest.mark.parametrize("network", [*ALL, OneImage])
def test_float32_is_exact(network, tmp_path):
    net = randomise(network())
    path = tmp_path / "net.zip"
    artifact = bevel.export(net, EXAMPLE, runtime="eager", path=path)
    one = EXAMPLE[:1] if artifact.inputs[0].shape[0] == 1 else EXAMPLE
    assert_same(outputs(path, one), net_outputs(net, one), 1e-6)


def test_int8_is_exactly_its_reference(tmp_path):
    net, path = randomise(Plain()), tmp_path / "net.zip"
    bevel.export(net, EXAMPLE, runtime="eager", precision="int8", calibration=[EXAMPLE], path=path)
    options = Quantization()
    program = export_program(net, (EXAMPLE,))
    reference = quantize(program, eager.quantizer(options), [EXAMPLE], options)
    assert_same(outputs(path, EXAMPLE), net_outputs(reference, EXAMPLE), 1e-6)


def test_runs_without_the_networks_source(tmp_path):
    net, path = randomise(TwoViews()), tmp_path / "net.zip"
    example = (EXAMPLE, torch.ones(2, 1, 8, 8))
    bevel.export(net, example, runtime="eager", path=path)
    program = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from bevel.runtimes import eager\n"
        "session = eager.open_session(Path(sys.argv[1]), 1)\n"
        "found = session.run([np.ones((1, 3, 8, 8), 'f4'), np.ones((1, 1, 8, 8), 'f4')])\n"
        "assert 'exported' not in sys.modules\n"
        "sys.stdout.write(repr(float(found[0].sum())))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = net_outputs(net, torch.ones(1, 3, 8, 8), torch.ones(1, 1, 8, 8))[0].sum()
    assert np.isclose(float(done.stdout), expected, rtol=1e-4)


def test_an_input_that_the_network_changes_in_place_is_not_changed(tmp_path):
    path = tmp_path / "net.zip"
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3))
    bevel.export(net, EXAMPLE, runtime="eager", path=path)
    array = EXAMPLE.numpy().copy()
    eager.open_session(path, 1).run([array])
    assert np.array_equal(array, EXAMPLE.numpy())


def test_threads_of_the_process_are_given_back(tmp_path):
    path = tmp_path / "net.zip"
    bevel.export(randomise(Plain()), EXAMPLE, runtime="eager", path=path)
    before = torch.get_num_threads()
    eager.open_session(path, before + 1).run([EXAMPLE.numpy()])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "operator.attrgetter",
        "operator.__call__",
        "aten.from_file.default",
        "aten.save.default",
        "aten.conv2d.__class__",
        "torchvision.__builtins__.eval",
        "profiler._record_function_enter.default",
    ],
)
def test_a_file_calls_nothing_but_operators_on_tensors(target, tmp_path):
    path, bad = tmp_path / "net.zip", tmp_path / "bad.zip"
    bevel.export(nn.Conv2d(3, 4, 3), EXAMPLE, runtime="eager", path=path)
    with zipfile.ZipFile(path) as archive:
        graph, weights = json.loads(archive.read("graph.json")), archive.read("weights.bin")
    graph["calls"][0] |= {"target": target, "args": ["touch owned"], "kwargs": {}}
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("graph.json", json.dumps(graph))
        archive.writestr("weights.bin", weights)
    with pytest.raises(MeasurementError, match="torch cannot load") as caught:
        eager.open_session(bad, 1)
    assert_readable(caught.value)


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    class Number(nn.Module):
        def forward(self, x):
            return x * 2, 3

    with pytest.raises(ExportError, match="a file gives tensors only") as caught:
        bevel.export(Number(), EXAMPLE, runtime="eager", path=tmp_path / "no.zip")
    assert_readable(caught.value)
    assert list(tmp_path.iterdir()) == []
