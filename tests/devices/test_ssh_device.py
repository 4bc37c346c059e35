"""The device `ssh` against a real OpenSSH server on loopback: the contract, and every fault."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_in import install, memory_job

import bevel
from bevel.core.errors import MeasurementError, MissingDependencyError
from bevel.devices import open_device
from bevel.testing.devices import DeviceContract
from bevel.testing.plugin import assert_readable
from openssh import make_key

pytestmark = pytest.mark.usefixtures("server")


@pytest.fixture(autouse=True)
def _tidy(server):
    """Whatever a test did: no job is left on the device, and nothing runs there."""
    yield
    assert server.jobs() == []
    deadline = time.monotonic() + 15  # a killed process takes a moment to vanish
    while server.runners() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.runners() == []


class TestContract(DeviceContract):
    """The suite of every device, on loopback."""

    name = "ssh"

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _address(cls, server):
        cls.address = server.address()


@pytest.fixture
def device(server):
    with open_device(server.address()) as connected:
        yield connected


def refusal(address: str) -> str:
    with pytest.raises(MeasurementError) as caught:
        open_device(address)
    assert_readable(caught.value)
    return str(caught.value)


# -- getting in ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rest", ["", "pi@", "@host", "pi@host:x", "pi@host:22:22", "pi@host python", "a b@host"]
)
def test_what_is_no_address(rest):
    assert "is no address: write ssh:USER@HOST" in refusal(f"ssh:{rest}")


def test_an_unknown_host_key_is_refused_and_said_how_to_add(server):
    known = server.home / ".ssh/known_hosts"
    kept = known.read_text()
    known.write_text("")
    try:
        told = refusal(server.address())
        assert "is not known (ssh-ed25519 SHA256:" in told
        command = told.partition("then add it: ")[2]
        assert command == f"ssh-keyscan -p {server.port} 127.0.0.1 >> ~/.ssh/known_hosts"
        assert known.read_text() == ""
        subprocess.run(["sh", "-c", command], check=True, capture_output=True)
        open_device(server.address()).close()  # what the message says is enough
    finally:
        known.write_text(kept)


def test_a_changed_host_key_is_refused(server, tmp_path):
    known = server.home / ".ssh/known_hosts"
    kept = known.read_text()
    make_key(tmp_path / "other")
    server.know((tmp_path / "other.pub").read_text())
    try:
        told = refusal(server.address())
        assert "has changed (now ssh-ed25519 SHA256:" in told
        assert f"ssh-keygen -R '[127.0.0.1]:{server.port}'" in told
    finally:
        known.write_text(kept)


def test_a_refused_login(server):
    authorized = server.folder / "authorized_keys"
    kept = authorized.read_text()
    authorized.write_text("")
    try:
        assert "refused the login: it accepts no key of the agent" in refusal(server.address())
    finally:
        authorized.write_text(kept)
    key = server.home / ".ssh/id_ed25519"
    key.rename(server.home / "away")
    try:
        assert "ssh-copy-id -p" in refusal(server.address())
    finally:
        (server.home / "away").rename(key)


def test_nothing_answers():
    told = refusal("ssh:nobody@127.0.0.1:1")
    assert told.startswith("nothing answers as SSH at 127.0.0.1, port 1")
    assert refusal("ssh:pi@no-such-host.invalid").startswith("there is no machine called no-such")


def test_settings_of_openssh_are_followed(server):
    config = server.home / ".ssh/config"
    config.write_text(
        f"Host board\n HostName 127.0.0.1\n Port {server.port}\n User {server.user}\n"
    )
    try:
        with open_device(f"ssh:board{sys.executable}") as found:
            assert found.facts().device == f"ssh:board{sys.executable}"
        config.write_text(config.read_text() + f" UserKnownHostsFile {server.home}/none\n")
        assert f">> {server.home}/none" in refusal(f"ssh:board{sys.executable}")
    finally:
        config.unlink()


def test_missing_python(server):
    told = refusal(server.address("/nowhere/python3"))
    assert told.startswith(f"there is no /nowhere/python3 on {server.user}@127.0.0.1")


def test_old_python(server, tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 3 9\n")
    old.chmod(0o755)
    assert "is Python 3.9; 3.10 or newer is needed" in refusal(server.address(str(old)))


def test_missing_runtime_and_numpy(server, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    with open_device(server.address(f"{tmp_path}/bare/bin/python")) as bare:
        assert bare.facts().cores >= 1  # needs neither
        with pytest.raises(
            MeasurementError, match=r"'numpy' is not installed for .*bare"
        ) as caught:
            bare.facts("onnxruntime")
        assert_readable(caught.value)


def test_without_paramiko(monkeypatch):
    monkeypatch.setitem(sys.modules, "paramiko", None)
    monkeypatch.delitem(sys.modules, "bevel.devices.ssh", raising=False)
    monkeypatch.delitem(sys.modules, "bevel.devices._ssh_link", raising=False)
    with pytest.raises(MissingDependencyError, match=r"the device 'ssh' needs .*'paramiko'"):
        open_device("ssh:pi@host")


# -- a job --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A network with its file, and 40 labelled images."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10)
    )
    path = tmp_path_factory.mktemp("network") / "net.onnx"
    artifact = bevel.export(net, torch.zeros(2, 3, 8, 8), path=path)
    return net, artifact, [(torch.randn(40, 3, 8, 8), torch.randint(10, (40,)))]


def test_measured_over_ssh_as_here(server, network):
    """Accuracy and parity are the same numbers; latency and memory are of the same order."""
    net, artifact, batches = network
    here = bevel.measure(artifact, reference=net, batches=batches)
    there = bevel.measure(artifact, reference=net, batches=batches, device=server.address())
    assert there.accuracy == here.accuracy
    assert there.parity.top1_agreement == here.parity.top1_agreement == 1
    assert len(there.latency.samples_ms) >= 100
    assert there.peak_memory_bytes == pytest.approx(here.peak_memory_bytes, rel=0.3)
    assert there.device.runtime_version == here.device.runtime_version


def test_files_are_pushed_once_and_images_are_not_kept(server, device, network, tmp_path):
    _, artifact, _ = network
    np.save(tmp_path / "images.npy", np.zeros((2, 3, 8, 8), np.float32))
    files = {"artifact": Path(artifact.path), "images": tmp_path / "images.npy"}
    job = {**memory_job("onnxruntime"), "task": "predict", "images": "images"}
    device.run(job, files)
    kept = {path: path.stat().st_mtime_ns for path in server.cache.glob("bevel/files/*/*")}
    assert {"net.onnx", "runner.pyz"} <= {path.name for path in kept}
    assert not any(path.name.endswith(".npy") for path in server.cache.rglob("*"))
    device.run(job, files)
    again = {path: path.stat().st_mtime_ns for path in server.cache.glob("bevel/files/*/*")}
    assert again == kept
    damaged = next(path for path in kept if path.name == "net.onnx")
    damaged.write_bytes(b"")  # as after a power cut
    device.run(job, files)
    assert damaged.read_bytes() == Path(artifact.path).read_bytes()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('odd value')", "failed on .*@127.0.0.1: ValueError: odd value"),
        ("os._exit(3)", "it ended with 3"),
        ("os.kill(os.getpid(), 9)", "it ended with 137|Killed"),
    ],
)
def test_failing_job(device, tmp_path, monkeypatch, code, message):
    name = install(monkeypatch, tmp_path, code)
    (tmp_path / "file").touch()
    with pytest.raises(MeasurementError, match=message) as caught:
        device.run(memory_job(name), {"artifact": tmp_path / "file"})
    assert_readable(caught.value)
    assert device.facts().cores >= 1


def slow_job(monkeypatch, tmp_path, seconds):
    """A job that says when it began, takes its time, and fails with a word of its own."""
    begun = tmp_path / "begun"
    code = f"pathlib.Path({str(begun)!r}).touch()\ntime.sleep({seconds})\n"
    name = install(monkeypatch, tmp_path, code + "raise MeasurementError('came to its end')")
    (tmp_path / "file").touch()
    return memory_job(name), {"artifact": tmp_path / "file"}, begun


def once(condition, then):
    """Do something as soon as a condition holds, beside the test."""

    def wait():
        while not condition():
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_connection_cut_meanwhile_is_taken_up_again(server, device, tmp_path, monkeypatch):
    """The job goes on, detached, and its result is fetched over a new connection."""
    monkeypatch.setattr("bevel.devices._ssh_link.RETRY_S", 0.1)
    job, files, begun = slow_job(monkeypatch, tmp_path, 2)
    cut = []
    thread = once(begun.exists, lambda: cut.append(server.cut()))
    with pytest.raises(MeasurementError, match="came to its end"):
        device.run(job, files)
    thread.join()
    assert cut[0] >= 1


def test_a_connection_cut_again_and_again_while_pushing(server, device, tmp_path, monkeypatch):
    """What was sent in part is sent again; nothing of it stays."""
    monkeypatch.setattr("bevel.devices._ssh_link.RETRY_S", 0.05)
    name = install(monkeypatch, tmp_path, "raise MeasurementError(str(path.stat().st_size))")
    large = tmp_path / "large"
    large.write_bytes(bytes(32 * 2**20))
    thread = once(lambda: any(server.cache.rglob(".part-*")), server.cut)
    with pytest.raises(MeasurementError, match=str(32 * 2**20)):
        device.run(memory_job(name), {"artifact": large})
    thread.join()
    assert not list(server.cache.rglob(".part-*"))


def test_a_device_that_stays_away_ends_the_job_itself_and_a_rerun_completes(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr("bevel.devices._ssh_link.RETRY_S", 0.1)
    monkeypatch.setattr("bevel.devices._ssh_link.RECONNECT_S", 0.5)
    monkeypatch.setattr("bevel.devices.ssh.ABANDONED_S", 3)
    monkeypatch.setattr("bevel.devices.ssh.BEAT_S", 1)
    job, files, begun = slow_job(monkeypatch, tmp_path, 60)
    thread = once(begun.exists, server.stop)
    with (
        open_device(server.address()) as device,
        pytest.raises(MeasurementError, match="did not come back within") as caught,
    ):
        device.run(job, files)
    assert_readable(caught.value)
    thread.join()
    deadline = time.monotonic() + 15
    while (server.runners() or server.jobs()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (server.runners(), server.jobs()) == ([], [])
    server.start()
    with open_device(server.address()) as device:
        assert device.facts("onnxruntime").runtime_version


def test_timeout_ends_the_job(device, tmp_path, monkeypatch):
    monkeypatch.setattr("bevel.devices.ssh.TIMEOUT_S", 0.5)
    job, files, _ = slow_job(monkeypatch, tmp_path, 60)
    with pytest.raises(MeasurementError, match=r"was not done after 0\.5 s") as caught:
        device.run(job, files)
    assert_readable(caught.value)


def test_an_interrupt_ends_the_job(device, tmp_path, monkeypatch):
    """Ctrl-C while it runs."""
    job, files, begun = slow_job(monkeypatch, tmp_path, 60)

    def interrupted(_):
        if begun.exists():
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(device, "_ended", interrupted)
    with pytest.raises(KeyboardInterrupt):
        device.run(job, files)


def test_a_job_whose_process_vanished(server, device, tmp_path, monkeypatch):
    """As after a restart of the device: no result, nobody who will write one."""
    monkeypatch.setattr("bevel.devices.ssh.BEAT_S", 0.2)
    job, files, begun = slow_job(monkeypatch, tmp_path, 60)

    def restart():
        (folder,) = server.jobs()
        pid = (folder / "pid").read_text().strip()
        subprocess.run(["kill", "-KILL", "--", f"-{pid}"], check=True)

    thread = once(begun.exists, restart)
    with pytest.raises(MeasurementError, match="it ended without a word"):
        device.run(job, files)
    thread.join()


def test_leftovers_of_a_host_that_vanished_are_removed(server):
    old = server.cache / "bevel/jobs/old"
    old.mkdir(parents=True)
    (old / "beat").touch()
    part = server.cache / "bevel/files/0/.part-0"
    part.parent.mkdir(parents=True)
    part.touch()
    fresh = server.cache / "bevel/files/0/.part-1"
    fresh.touch()
    hour_ago = time.time() - 3600
    for path in (old / "beat", part):
        subprocess.run(["touch", "-d", f"@{hour_ago:.0f}", path], check=True)
    open_device(server.address()).close()
    assert not old.exists()
    assert not part.exists()
    assert fresh.exists()
    shutil.rmtree(part.parent)


def test_full_disk(server, tmp_path, monkeypatch):
    """With 2 MB of room, a file of 4 MB is refused in one line, and a small one then goes."""
    server.stop()
    server.disk = 2 * 2**20
    server.start()
    try:
        name = install(monkeypatch, tmp_path, "raise MeasurementError('it did fit')")
        (tmp_path / "large").write_bytes(bytes(4 * 2**20))
        (tmp_path / "small").write_bytes(bytes(2**10))
        with open_device(server.address()) as device:
            with pytest.raises(MeasurementError, match=r"the disk of .* is full") as caught:
                device.run(memory_job(name), {"artifact": tmp_path / "large"})
            assert_readable(caught.value)
            with pytest.raises(MeasurementError, match="it did fit"):
                device.run(memory_job(name), {"artifact": tmp_path / "small"})
            text = "open('/proc/self/cwd/fill', 'wb', buffering=0).write(bytes(2**22))\n"
            name = install(monkeypatch, tmp_path, text + "raise ValueError('x' * 70000)")
            with pytest.raises(MeasurementError, match=r"disk of|No space left") as caught:
                device.run(memory_job(name), {"artifact": tmp_path / "small"})
            assert_readable(caught.value)
            assert device.facts().cores >= 1  # the room is back
    finally:
        server.stop()
        server.disk = None
        server.start()
