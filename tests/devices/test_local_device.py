"""The device `local`: its facts, and jobs that fail."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import pytest
from stand_in import install, memory_job

from bevel.core import hardware
from bevel.core.errors import MeasurementError, UnknownNameError
from bevel.devices import local, open_device, split_address
from bevel.testing.plugin import assert_readable

device = open_device("local")


def test_facts_are_those_of_this_machine():
    facts = device.facts("onnxruntime")
    assert facts.device == "local"
    assert facts.runtime_version.startswith("onnxruntime 1.")
    assert facts.architecture == platform.machine()
    assert facts.cores == os.cpu_count()
    if hasattr(os, "sysconf") and Path("/proc/meminfo").exists():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert facts.memory_bytes == pytest.approx(total, rel=0.01)


def test_the_runner_tells_the_same_facts():
    there = device.run({"task": "facts", "runtime": "onnxruntime"}, {})
    here = device.facts("onnxruntime").model_dump(exclude={"device", "emulated"})
    for changing in ("frequency_mhz", "temperature_c"):
        there.pop(changing), here.pop(changing)
    assert there == here


def test_what_the_system_does_not_tell_is_unknown(tmp_path):
    assert hardware._text(tmp_path / "absent") is None
    assert hardware._number(tmp_path / "absent") is None
    odd = tmp_path / "odd"
    odd.write_text("not a number\nMemTotal:\nmodel name : chip : v2\n")
    assert hardware._number(odd) is None
    assert hardware._field(odd, "MemTotal") is None
    assert hardware._field(odd, "absent") is None
    assert hardware._field(odd, "model name") == "chip : v2"


@pytest.mark.parametrize(
    ("flags", "words"),
    [("0x50000", "none"), ("0x50005", "under-voltage, throttled"), ("0xe0008", "too warm")],
)
def test_throttling_as_a_raspberry_pi_tells_it(tmp_path, monkeypatch, flags, words):
    (tmp_path / "get_throttled").write_text(flags + "\n")
    monkeypatch.setattr(hardware, "FIRMWARE_THROTTLING", tmp_path / "get_throttled")
    assert hardware.describe()["throttling"] == words


def test_throttling_as_the_frequency_driver_tells_it(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "FIRMWARE_THROTTLING", tmp_path / "absent")
    monkeypatch.setattr(hardware, "CPU", tmp_path)
    assert hardware.throttling() is None
    (tmp_path / "cpufreq").mkdir()
    (tmp_path / "cpufreq/cpuinfo_max_freq").write_text("1800000")
    (tmp_path / "cpufreq/scaling_max_freq").write_text("1800000")
    assert hardware.throttling() == "none"
    (tmp_path / "cpufreq/scaling_max_freq").write_text("1200000")
    assert hardware.throttling() == "frequency capped at 1200 of 1800 MHz"


def test_threads_and_files_reach_the_process(tmp_path, monkeypatch):
    name = install(
        monkeypatch,
        tmp_path,
        "found = [os.environ[v] for v in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')]\n"
        "raise MeasurementError(json.dumps([*found, threads, path.read_text()]))",
    )
    (tmp_path / "a b").write_text("content")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with pytest.raises(MeasurementError, match=r'\["3", "3", 3, "content"\]'):
        device.run(memory_job(name, "mine"), {"mine": tmp_path / "a b"}, threads=3)
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.exit('out of paper')", "out of paper"),
        ("raise ValueError('odd value')", "ValueError: odd value"),
        ("raise MeasurementError('no such chip')", "on this machine: no such chip"),
        ("import a_missing.package", "the package 'a-missing' is not installed for .*python"),
        ("os._exit(3)", "it ended with 3"),
        ("os.kill(os.getpid(), 9)", "it ended with -9"),
        ("raise RuntimeError('x' * 5000)", "xxx"),
    ],
)
def test_failure_is_one_line(tmp_path, monkeypatch, code, message, capfd):
    name = install(monkeypatch, tmp_path, code)
    with pytest.raises(MeasurementError, match=message) as caught:
        device.run(memory_job(name), {"artifact": tmp_path})
    assert_readable(caught.value)
    assert capfd.readouterr() == ("", "")


def test_timeout_is_one_line_and_ends_the_process(tmp_path, monkeypatch):
    late = tmp_path / "late"
    name = install(monkeypatch, tmp_path, f"time.sleep(2); pathlib.Path({str(late)!r}).touch()")
    monkeypatch.setattr(local, "TIMEOUT_S", 0.3)
    start = time.monotonic()
    with pytest.raises(MeasurementError, match=r"not done after 0\.3 s") as caught:
        device.run(memory_job(name), {"artifact": tmp_path})
    assert_readable(caught.value)
    time.sleep(max(0.0, 2.4 - (time.monotonic() - start)))
    assert not late.exists()


def test_addresses():
    assert split_address("ssh:pi@host:22/usr/bin/python3") == ("ssh", "pi@host:22/usr/bin/python3")
    assert split_address("local") == ("local", "")
    with pytest.raises(MeasurementError, match="local:somewhere"):
        open_device("local:somewhere")
    with pytest.raises(UnknownNameError, match=r"no device called 'shh'\. Did you mean 'ssh'"):
        open_device("shh:pi@host")
