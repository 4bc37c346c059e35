"""The device `adb`, against a scripted stand-in for the program adb: no phone is attached here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bevel.core.errors import MeasurementError
from bevel.core.records import Artifact, TensorSignature
from bevel.devices import Device, _android, open_device
from bevel.devices.adb import BenchmarkModel, ExecutorRunner
from bevel.measurement.bench import measure
from bevel.testing.plugin import assert_readable

HERE = Path(__file__).parent
SERIAL = "1A2B3C4D"


class Phone:
    """The stand-in's folder, and the benchmark programs' files here."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "phone"
        self.state.mkdir()
        self.attach(f"{SERIAL}\tdevice")
        self.benchmark = HERE / "phone/benchmark_model"
        self.runner = HERE / "phone/executor_runner"

    def attach(self, *lines: str) -> None:
        (self.state / "devices").write_text("".join(f"{line}\n" for line in lines))

    def fault(self, name: str) -> None:
        (self.state / "fault").write_text(name)

    def calls(self, verb: str) -> list[str]:
        lines = (self.state / "calls").read_text().splitlines()
        return [line for line in lines if f" {verb} " in line]

    def open(self, program: Path | None = None, serial: str = SERIAL) -> Device:
        return open_device(f"adb:{serial},{program or self.benchmark}")


@pytest.fixture
def phone(tmp_path, monkeypatch) -> Phone:
    programs = tmp_path / "bin"
    programs.mkdir()
    adb = programs / "adb"
    adb.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "fake_adb.py"} "$@"\n')
    adb.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_PHONE", str(tmp_path / "phone"))
    monkeypatch.setattr(BenchmarkModel, "ROUNDS", 2)
    monkeypatch.setattr(ExecutorRunner, "ROUNDS", 2)
    return Phone(tmp_path)


def model(folder: Path, name: str = "net.tflite", content: bytes = b"a network") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def job(task: str, runtime: str, *names: str) -> dict:
    return {"task": task, "subjects": [{"runtime": runtime, "file": name} for name in names]}


def test_times_files_in_turn_and_pushes_each_once(phone, tmp_path):
    files = {"a": model(tmp_path, "a.tflite", b"a"), "b": model(tmp_path, "b.tflite", b"b")}
    with phone.open() as device:
        result = device.run(job("latency", "litert", "a", "b"), files, threads=3)
        assert result == {"samples_ms": [[13.5202] * 2] * 2, "warmup_runs": 10}
        device.run(job("latency", "litert", "a"), files)
    assert len(phone.calls("push")) == 3  # the program and two files
    runs = [call for call in phone.calls("shell") if "--graph=" in call]
    assert ["a.tflite" in run for run in runs] == [True, False, True, False, True, True]
    assert "--num_threads=3" in runs[0]
    assert "--num_threads=1" in runs[-1]
    assert "--num_runs=1 " in runs[0]


def test_memory_is_the_programs_own_figure(phone, tmp_path):
    device = phone.open()
    found = device.run(job("memory", "litert", "a"), {"a": model(tmp_path)})
    assert found == {"peak_memory_bytes": round(25.0508 * 2**20)}


def test_executor_runner_leaves_out_the_first_run(phone, tmp_path):
    device = phone.open(phone.runner)
    result = device.run(job("latency", "executorch", "a"), {"a": model(tmp_path, "net.pte")})
    assert result["samples_ms"] == [[pytest.approx(1.5)] * 2]
    assert "memory" not in device.tasks


def test_facts(phone):
    facts = phone.open().facts("litert")
    assert facts.device == f"adb:{SERIAL},{phone.benchmark}"
    assert facts.system == "Android 14, Linux 5.10.198-android13-4-00050"
    assert facts.architecture == "aarch64"
    assert facts.processor == "Google Pixel 6 Google Tensor"
    assert facts.cores == 8
    assert facts.memory_bytes == 7657816 * 1024
    assert (facts.governor, facts.frequency_mhz) == ("sched_pixel", 2401.0)
    assert facts.temperature_c == 52.0
    assert facts.throttling == "none"
    assert facts.runtime_version is not None
    assert facts.runtime_version.startswith("benchmark_model ")
    assert not facts.emulated


def test_throttling_is_told(phone, monkeypatch):
    monkeypatch.setenv("FAKE_THERMAL", "3")
    assert phone.open().facts().throttling == "thermal status severe"
    monkeypatch.delenv("FAKE_THERMAL")
    capped = phone.state / "sys/devices/system/cpu/cpu6/cpufreq/scaling_max_freq"
    capped.write_text("1826000\n")
    assert phone.open().facts().throttling == "frequency capped at 1826 of 2802 MHz"


def test_busy_cores(phone):
    # 100 of 400 ticks were work, of 8 processors
    assert phone.open().busy_cores() == pytest.approx(2.0)


def test_what_a_phone_does_not_tell_is_unknown():
    found = _android.facts("kernel=6.1\ncores=4\nclock=1 2\nheat=cpu none\n")
    unknown = (
        "processor",
        "memory_bytes",
        "governor",
        "frequency_mhz",
        "temperature_c",
        "throttling",
    )
    assert [found[name] for name in unknown] == [None] * 6
    assert found["cores"] == 4
    assert _android.busy_cores("cpu 1 2 3 4 5 6 7 8\n") is None


def test_the_only_phone_needs_no_serial(phone):
    assert phone.open(serial="").facts().cores == 8


def test_measure_gives_time_and_memory_but_no_accuracy(phone, tmp_path):
    signature = [TensorSignature(name="x", shape=[1, 3, 8, 8], dtype="float32")]
    artifact = Artifact(
        path=str(model(tmp_path)),
        runtime="litert",
        precision="float32",
        inputs=signature,
        outputs=signature,
        size_bytes=9,
        sha256="0" * 64,
    )
    found = measure(artifact, device=f"adb:{SERIAL},{phone.benchmark}")
    assert found.latency is not None
    assert found.latency.p50_ms == pytest.approx(13.5202)
    assert found.peak_memory_bytes == round(25.0508 * 2**20)
    assert found.accuracy is None


# -- what goes wrong ---------------------------------------------------------------------------


def refused(call, *words: str) -> None:
    with pytest.raises(MeasurementError) as caught:
        call()
    assert_readable(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_no_adb(phone, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    refused(phone.open, "no program adb", "platform tools")


@pytest.mark.parametrize(
    ("attached", "serial", "words"),
    [
        ((), "", ("sees no device", "USB debugging")),
        ((f"{SERIAL}\tunauthorized",), SERIAL, (SERIAL, "allow USB debugging")),
        ((f"{SERIAL}\toffline",), "", (SERIAL, "offline")),
        (("A\tdevice", "B\tdevice"), "", ("several", "A (device)", "B (device)")),
        (("A\tdevice",), "C", ("no device C", "A (device)")),
    ],
)
def test_devices_that_cannot_be_used(phone, attached, serial, words):
    phone.attach(*attached)
    refused(lambda: phone.open(serial=serial), *words)


def test_addresses_that_are_none(phone, tmp_path):
    refused(lambda: open_device("adb"), "names no benchmark program", "adb:SERIAL,PROGRAM")
    refused(lambda: open_device(f"adb:{SERIAL}"), "names no benchmark program")
    refused(lambda: phone.open(tmp_path / "other"), "cannot tell what", "benchmark_model")
    refused(lambda: phone.open(tmp_path / "no/benchmark_model"), "there is no benchmark program")


def test_wrong_runtime_and_task(phone, tmp_path):
    device = phone.open()
    files = {"a": model(tmp_path)}
    refused(lambda: device.run(job("latency", "executorch", "a"), files), "litert", "executorch")
    refused(lambda: device.run(job("predict", "litert", "a"), files), "predict")


def test_a_file_that_the_program_refuses(phone, tmp_path):
    files = {"a": model(tmp_path, content=b"none")}
    device = phone.open()
    refused(
        lambda: device.run(job("latency", "litert", "a"), files), "not a valid Flatbuffer buffer"
    )


def test_output_that_cannot_be_read(phone, tmp_path):
    odd = tmp_path / "benchmark_model_odd"
    odd.write_text("#!/bin/sh\necho all went well\n")
    device = phone.open(odd)
    refused(
        lambda: device.run(job("latency", "litert", "a"), {"a": model(tmp_path)}),
        "cannot read what benchmark_model_odd printed",
        "all went well",
    )


def test_full_phone(phone, tmp_path):
    device = phone.open()
    phone.fault("full")
    refused(
        lambda: device.run(job("memory", "litert", "a"), {"a": model(tmp_path)}),
        "No space left on device",
    )


def test_phone_that_goes_away(phone, tmp_path):
    device = phone.open()
    phone.fault("gone")
    refused(lambda: device.run(job("memory", "litert", "a"), {"a": model(tmp_path)}), "not found")
