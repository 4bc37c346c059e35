"""What goes wrong is said in one line, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import Bessel, Branching

import bevel
from bevel.core.errors import ExportError, MeasurementError, UnknownNameError
from bevel.core.quiet import quiet
from bevel.runtimes import open_artifact, sidecar
from bevel.runtimes.onnxruntime import open_session
from bevel.testing.plugin import assert_readable
from networks import EXAMPLE, Plain, randomise


@pytest.fixture(scope="module")
def plain():
    return randomise(Plain())


@pytest.fixture(scope="module")
def original(plain, tmp_path_factory):
    return bevel.export(plain, EXAMPLE, path=tmp_path_factory.mktemp("plain") / "plain.onnx")


@pytest.fixture
def artifact(original, tmp_path):
    """A copy to damage."""
    path = tmp_path / "plain.onnx"
    path.write_bytes(Path(original.path).read_bytes())
    sidecar(path).write_bytes(sidecar(Path(original.path)).read_bytes())
    return open_artifact(path)


def refused(error: type[Exception], match: str, *arguments, **options) -> None:
    with pytest.raises(error, match=match) as caught:
        bevel.export(*arguments, **options)
    assert_readable(caught.value)


def test_network_that_cannot_be_traced(tmp_path, capfd):
    message = "torch.export refuses the network: .*torch.where"
    refused(ExportError, message, Branching(), EXAMPLE, path=tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_operator_without_onnx_form(tmp_path, capfd):
    message = r"no ONNX form: .*bessel_j0.*\. Replace the operator"
    refused(ExportError, message, Bessel(), EXAMPLE, path=tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_failed_export_leaves_the_old_file(artifact):
    refused(ExportError, "no ONNX form", Bessel(), EXAMPLE, path=artifact.path)
    assert open_artifact(artifact.path) == artifact


def test_wrong_input_size(plain, tmp_path):
    refused(ExportError, "refuses", plain, torch.zeros(2, 3, 20, 20), path=tmp_path / "a.onnx")


def test_unknown_runtime_and_precision(plain, tmp_path):
    path = tmp_path / "a.onnx"
    message = r"no runtime called 'onnxruntme'\. Did you mean 'onnxruntime'"
    refused(UnknownNameError, message, plain, EXAMPLE, runtime="onnxruntme", path=path)
    message = r"'onnxruntime' has no precision 'int4'\. Available: float32, int8"
    refused(ExportError, message, plain, EXAMPLE, precision="int4", path=path)
    assert not path.exists()


def test_folder_that_cannot_be_written(plain, tmp_path):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "a.onnx"
    refused(ExportError, r"cannot write .*a\.onnx: .*; check the folder", plain, EXAMPLE, path=path)


def test_folder_without_permission(plain, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    path = folder / "a.onnx"
    refused(ExportError, "cannot write .*permission denied", plain, EXAMPLE, path=path)


def test_folder_in_the_place_of_the_file(plain, tmp_path):
    (tmp_path / "a.onnx").mkdir()
    refused(ExportError, "cannot write .*directory", plain, EXAMPLE, path=tmp_path / "a.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "calibration images: pass calibration"),
        ([], "got none"),
        (iter(()), "got none"),
        ([torch.zeros(2, 3, 9, 9)], r"batch of shape \(2, 3, 9, 9\)"),
        ([torch.zeros(2, 4, 8, 8)], r"batch of shape \(2, 4, 8, 8\)"),
        ([EXAMPLE.double()], "does not run on a calibration batch"),
        ([{"images": EXAMPLE}], "is a dict; expected a tensor"),
        ([[]], "holds 0 tensors, and the network takes 1"),
        ([(np.zeros((2, 3, 8, 8)), 1)], "tensor"),
    ],
)
def test_int8_with_wrong_calibration(plain, tmp_path, calibration, message):
    path = tmp_path / "a.onnx"
    options = {"precision": "int8", "calibration": calibration, "path": path}
    refused(ExportError, message, plain, EXAMPLE, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("runtime", ["onnxruntime", "executorch"])
def test_a_network_in_another_precision(runtime, tmp_path):
    net, example = randomise(Plain()).double(), EXAMPLE.double()
    message = r"weights are float64 \(.*weight\), and files are made from float32: call net\.float"
    refused(ExportError, message, net, example, runtime=runtime, path=tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_missing_file(tmp_path):
    with pytest.raises(MeasurementError, match=r"no exported file at .*none\.onnx"):
        open_artifact(tmp_path / "none.onnx")


def test_missing_description(artifact):
    sidecar(Path(artifact.path)).unlink()
    with pytest.raises(MeasurementError, match=r"no description plain\.onnx\.json beside it"):
        open_artifact(artifact.path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"path": "a"}', b"\xff\xfe\x00"])
def test_damaged_description(artifact, content):
    sidecar(Path(artifact.path)).write_bytes(content)
    with pytest.raises(MeasurementError, match=r"plain\.onnx\.json is damaged") as caught:
        open_artifact(artifact.path)
    assert_readable(caught.value)


def test_changed_file(artifact):
    path = Path(artifact.path)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(MeasurementError, match=r"its hash differs.*export it again"):
        open_artifact(path)


def test_inputs_that_do_not_fit(artifact):
    session = open_session(Path(artifact.path), 1)
    image = np.zeros((1, 3, 8, 8), dtype=np.float32)
    for inputs, message in (
        ([], "got 0 inputs, the file takes 1"),
        ([image, image], "got 2 inputs, the file takes 1"),
        ([image.astype(np.float64)], "data type"),
        ([image[0]], "rank"),
        ([image[:, :, 1:]], "dimensions"),
    ):
        with pytest.raises(MeasurementError, match=message) as caught:
            session.run(inputs)
        assert_readable(caught.value)


def test_opening_and_measuring_needs_no_torch(artifact):
    """A device carries the runtime, not torch: it must not even be imported."""
    program = (
        "import sys\n"
        "from bevel.measurement import runner\n"
        "from bevel.runtimes import open_artifact, onnxruntime\n"
        "path = sys.argv[1]\n"
        "open_artifact(path)\n"
        "job = {'task': 'memory', 'threads': 1, 'files': {'net': path},\n"
        "       'subjects': [{'runtime': 'onnxruntime', 'file': 'net'}]}\n"
        "assert runner.outcome(job)['peak_memory_bytes'] > 0\n"
        "heavy = {'torch', 'torchao', 'torchvision', 'onnx', 'scipy', 'sklearn'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, artifact.path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_quiet_discards_all_that_is_printed(capfd):
    with quiet():
        print("python")  # noqa: T201
        os.write(1, b"descriptor 1\n")
        os.write(2, b"descriptor 2\n")
        subprocess.run(["echo", "child"], check=True)
        warnings.warn("warned", stacklevel=1)
    assert capfd.readouterr() == ("", "")


def test_quiet_restores_what_it_took(capfd):
    places = [os.fstat(descriptor).st_ino for descriptor in (1, 2)]
    table = Path("/proc/self/fd")
    count = len(list(table.iterdir())) if table.exists() else None
    with quiet(), quiet():
        assert [os.fstat(descriptor).st_ino for descriptor in (1, 2)] != places
    assert [os.fstat(descriptor).st_ino for descriptor in (1, 2)] == places
    assert count is None or len(list(table.iterdir())) == count
    print("after")  # noqa: T201
    os.write(2, b"too\n")
    assert capfd.readouterr() == ("after\n", "too\n")


def test_quiet_keeps_an_error_and_notes_what_was_printed(capfd):
    with pytest.raises(ValueError, match="reason") as caught, quiet():
        os.write(2, b"said before\n")
        raise ValueError("reason")
    assert caught.value.__notes__ == ["printed meanwhile:\nsaid before"]
    os.write(1, b"open\n")
    assert capfd.readouterr() == ("open\n", "")
