"""The device `qemu-aarch64`: real aarch64 builds under QEMU give the answers of this machine.

Skipped with its reason where they cannot be fetched; fetched once, into the user's cache folder.
"""

from __future__ import annotations

import base64
import json
import platform
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from bevel.core.errors import BevelError, MeasurementError
from bevel.devices import _arm64_root, local, open_device, qemu_aarch64
from bevel.devices._arm64_root import Root
from bevel.measurement.bench import EMULATED, Subject, measure_all
from bevel.runtimes import export
from bevel.testing.plugin import assert_readable

IMAGES = 48


@pytest.fixture(scope="module")
def emulator(armv8):  # noqa: ARG001
    """The emulator with ONNX Runtime."""
    try:
        device = open_device("qemu-aarch64")
        device.facts("onnxruntime")
    except MeasurementError as error:
        pytest.skip(str(error))
    return device


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    values, targets = load_digits(return_X_y=True)
    pixels = torch.from_numpy(values.reshape(-1, 1, 8, 8) / 16).float()
    return pixels, torch.from_numpy(targets)


@pytest.fixture(scope="module")
def net(digits) -> nn.Module:
    """A small network that knows most digits."""
    pixels, labels = digits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(288, 10),
        )
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            functional.cross_entropy(net(pixels[:1000]), labels[:1000]).backward()
            optimizer.step()
    return net.eval()


@pytest.mark.parametrize("runtime", sorted(qemu_aarch64.PACKAGES))
def test_the_same_answers_as_on_this_machine(emulator, runtime, net, digits, tmp_path):
    pixels, labels = digits
    batches = [(pixels[-IMAGES:], labels[-IMAGES:])]
    subjects = []
    for precision in ("float32", "int8"):
        try:
            artifact = export(
                net,
                pixels[:2],
                runtime=runtime,
                precision=precision,
                calibration=[pixels[:200]],
                path=tmp_path / f"{precision}.file",
            )
        except BevelError as error:  # an extra that is not installed
            pytest.skip(str(error))
        subjects.append(Subject(precision, artifact, net))
    files = {f"{s.label}.file": Path(s.artifact.path) for s in subjects}
    np.save(tmp_path / "images.npy", batches[0][0].numpy())
    job = {
        "task": "predict",
        "images": "images.npy",
        "subjects": [{"runtime": runtime, "file": name} for name in files],
    }
    files["images.npy"] = tmp_path / "images.npy"
    here, there = local.connect("").run(job, files), emulator.run(job, files)
    for one, other in zip(here["outputs"], there["outputs"], strict=True):
        assert np.array_equal(decoded(one).argmax(1), decoded(other).argmax(1))
    float32 = [decoded(found["outputs"][0]) for found in (here, there)]
    assert np.allclose(*float32, atol=1e-4)


def decoded(output: dict) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(output["data"]), output["dtype"])
    return flat.reshape(output["shape"])


def test_a_measurement_has_accuracy_and_no_times(emulator, net, digits, tmp_path):
    pixels, labels = digits
    artifact = export(net, pixels[:2], runtime="onnxruntime", path=tmp_path / "net.onnx")
    (found,) = measure_all(
        [Subject("net", artifact, net)],
        device=emulator.address,
        batches=[(pixels[-IMAGES:], labels[-IMAGES:])],
    )
    assert found.latency is None
    assert found.peak_memory_bytes is None
    assert found.device.emulated
    assert found.device.architecture == "aarch64"
    assert found.device.processor is not None
    assert found.device.processor.startswith("cortex-a72, emulated by QEMU 1")
    assert found.device.runtime_version is not None
    assert found.device.frequency_mhz is None
    assert EMULATED in found.warnings
    assert found.accuracy is not None
    assert found.accuracy.images == IMAGES
    assert found.parity is not None
    assert found.parity.top1_agreement == 1.0


# -- what goes wrong, without any download -----------------------------------------------------


def refused(call, *words: str) -> None:
    with pytest.raises(MeasurementError) as caught:
        call()
    assert_readable(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A function that puts a scripted program on a PATH with nothing else but the basics."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("sh", "mkdir", "cp"):
        (folder / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(_arm64_root, "KEYRING", folder)

    def make(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return make


@pytest.mark.usefixtures("programs")
def test_machines_without_apt(tmp_path):
    refused(Root(tmp_path / "root").prepare, "no apt-get here", str(tmp_path / "root"))


def test_no_keyring(programs, tmp_path, monkeypatch):
    programs("apt-get", "true")
    programs("dpkg-deb", "true")
    monkeypatch.setattr(_arm64_root, "KEYRING", tmp_path / "absent.gpg")
    refused(Root(tmp_path / "root").prepare, "debian-archive-keyring")


def test_no_debian_mirror(programs, tmp_path):
    programs("apt-get", "echo https://example.org/ubuntu/")
    programs("dpkg-deb", "true")
    refused(Root(tmp_path / "root").prepare, "no Debian archive", "BEVEL_DEBIAN_MIRROR")


def test_no_network_and_then_there_is(programs, tmp_path, monkeypatch):
    monkeypatch.setenv("BEVEL_DEBIAN_MIRROR", "https://example.org/debian")
    programs("apt-get", 'echo "E: Failed to fetch x: Could not resolve host" >&2; exit 100')
    programs("dpkg-deb", 'mkdir -p "$3/usr/bin" "$3/usr/lib"; cp "$2" "$3/usr/bin/qemu-aarch64"')
    root = Root(tmp_path / "root")
    refused(root.prepare, "cannot fetch QEMU", "Could not resolve host", "check the connection")
    assert not (root.folder / "emulator").exists()
    archives = root.folder / "apt/cache/archives"
    programs("apt-get", f'case $1 in update) ;; *) echo deb > "{archives}/$2.deb";; esac')
    assert root.prepare() == root.folder / "emulator"
    assert (root.system / "lib").readlink() == Path("usr/lib")
    assert not (root.folder / "apt").exists()
    left = {path.name for path in root.folder.iterdir()}
    assert left == {".lock", "emulator", "system"}
    programs("apt-get", "exit 1")  # nothing is fetched twice
    assert root.prepare() == root.folder / "emulator"


def test_packages_without_wheels(tmp_path, monkeypatch):
    def fails(command, what, *_):
        assert "--only-binary=:all:" in command
        raise MeasurementError(f"cannot fetch {what}")

    monkeypatch.setattr(_arm64_root, "run", fails)
    root = Root(tmp_path / "root")
    refused(lambda: root.install("numpy==0.1"), "numpy==0.1 for aarch64")
    assert list((root.folder / "packages").iterdir()) == []


def test_an_own_qemu_is_taken_if_it_is_new_enough(programs):
    assert _arm64_root.installed_qemu() is None
    programs("qemu-aarch64", 'echo "qemu-aarch64 version 7.2.17 (Debian 1:7.2+dfsg-7)"')
    assert _arm64_root.installed_qemu() is None
    programs("qemu-aarch64", 'echo "qemu-aarch64 version 10.0.13 (Debian 1:10.0.13)"')
    assert _arm64_root.installed_qemu() is not None


def test_folders_and_machines_that_do_not_serve(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    refused(Root(tmp_path / "file/root").prepare, "cannot write", "qemu-aarch64:FOLDER")
    refused(lambda: open_device(f"qemu-aarch64:{tmp_path}/a,b"), "without commas")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    refused(lambda: open_device("qemu-aarch64"), "'local' is an Armv8 already")


def test_runtimes_that_it_does_not_have(tmp_path, monkeypatch):
    device = open_device(f"qemu-aarch64:{tmp_path}")
    job = {"task": "memory", "subjects": [{"runtime": "executorch", "file": "a"}]}
    monkeypatch.setattr(Root, "prepare", lambda _: Path("/bin/false"))
    refused(lambda: device.run(job, {}), "onnxruntime and litert", "'executorch'")


def test_the_address_names_the_folder(tmp_path, monkeypatch):
    assert open_device(f"qemu-aarch64:{tmp_path}")._root.folder == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    device = open_device("qemu-aarch64")
    assert device._root.folder == tmp_path / "cache/bevel/qemu-aarch64"
    assert json.dumps([device.address, sorted(device.tasks)]) == (
        '["qemu-aarch64", ["memory", "predict"]]'
    )
