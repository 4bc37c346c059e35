"""The contract of devices: they state what they are, and do the runner's jobs.

    class TestMine(DeviceContract):
        name = "mine"
        address = "mine:somewhere"

A device that does not run ONNX Runtime sets `runtime`; the suite exports a small network for it.
"""
# ruff: noqa: S101  a contract is stated in assertions

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from bevel.core.errors import MeasurementError
from bevel.core.records import DeviceFacts
from bevel.devices import Device, split_address
from bevel.measurement.runner import decoded
from bevel.runtimes import export
from bevel.testing.plugin import PluginContract, assert_readable


class DeviceContract(PluginContract):
    """Inherit, and set `name`.

    Attributes:
        address: where one such device is; default: its name alone.
        runtime: what the device runs.
    """

    kind = "devices"
    address: ClassVar[str | None] = None
    runtime: ClassVar[str] = "onnxruntime"

    @pytest.fixture(scope="class")
    @classmethod
    def device(cls, plugin: Any) -> Iterator[Device]:
        """The device, connected."""
        with plugin.connect(split_address(cls.address or cls.name)[1]) as connected:
            yield connected

    @pytest.fixture(scope="class")
    @classmethod
    def artifact(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A file that the runner can open: 4 numbers to 2."""
        path = tmp_path_factory.mktemp("device") / "linear.artifact"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Linear(4, 2)
        export(net, torch.zeros(2, 4), runtime=cls.runtime, path=path)
        return path

    def do(self, device: Device, task: str, files: dict[str, Path], **more: Any) -> dict[str, Any]:
        """One job on the file called `artifact`."""
        if task not in device.tasks:
            pytest.skip(f"the device '{self.name}' has no task {task}")
        subject = {"runtime": self.runtime, "file": "artifact"}
        return device.run({"task": task, "subjects": [subject], **more}, files)

    def test_facts_are_plausible(self, device: Device) -> None:
        """Units are those of the names; what the system does not tell is None."""
        facts = device.facts()
        assert facts.device == device.address == (self.address or self.name)
        assert facts.emulated == device.emulated
        assert facts.system.strip()
        assert facts.architecture.strip()
        assert 1 <= facts.cores <= 4096
        assert facts.processor is None or facts.processor.strip()
        assert facts.memory_bytes is None or 2**20 <= facts.memory_bytes <= 2**50
        assert facts.frequency_mhz is None or 1 <= facts.frequency_mhz <= 10_000
        assert facts.temperature_c is None or -60 <= facts.temperature_c <= 150
        assert facts.throttling is None or facts.throttling.strip()
        assert facts.runtime_version is None
        assert DeviceFacts.model_validate_json(facts.model_dump_json()) == facts

    def test_facts_carry_the_runtimes_version_there(self, device: Device) -> None:
        """One line with a number."""
        version = device.facts(self.runtime).runtime_version
        assert version is not None
        assert "\n" not in version
        assert any(character.isdigit() for character in version)

    def test_busy_cores(self, device: Device) -> None:
        """Between none and all processors, or unknown."""
        busy = device.busy_cores()
        assert busy is None or -1e-6 <= busy <= device.facts().cores + 1e-6

    def test_latency(
        self, device: Device, artifact: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Many runs, each with its time; the call is silent."""
        if device.emulated:
            pytest.skip(f"the times of '{self.name}' mean nothing, and nobody asks for them")
        result = self.do(device, "latency", {"artifact": artifact})
        (samples,) = result["samples_ms"]
        assert len(samples) >= 100
        assert min(samples) > 0
        assert result["warmup_runs"] > 0
        assert capfd.readouterr() == ("", "")

    def test_memory(
        self, device: Device, artifact: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """It is done when the call returns, and says nothing."""
        peak = self.do(device, "memory", {"artifact": artifact})["peak_memory_bytes"]
        assert 2**20 < peak < 2**32
        assert capfd.readouterr() == ("", "")

    def test_answers_are_those_of_the_network(
        self, device: Device, artifact: Path, tmp_path: Path
    ) -> None:
        """Of every image that was sent, in order, up to rounding."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Linear(4, 2)
        images = np.arange(20, dtype=np.float32).reshape(5, 4) / 10
        np.save(tmp_path / "images.npy", images)
        files = {"artifact": artifact, "images": tmp_path / "images.npy"}
        (output,) = self.do(device, "predict", files, images="images")["outputs"]
        got = decoded(output)
        with torch.no_grad():
            expected = net(torch.from_numpy(images)).numpy()
        assert got.shape == expected.shape
        assert np.allclose(got, expected, atol=1e-5)

    def test_failure_is_one_line_that_says_why(
        self, device: Device, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Of the runner, which cannot open its artifact; the device goes on working."""
        broken = tmp_path / "broken.artifact"
        broken.write_bytes(b"nothing a runtime knows" * 20)
        with pytest.raises(MeasurementError, match=r"broken\.artifact") as caught:
            self.do(device, "memory", {"artifact": broken})
        assert_readable(caught.value)
        assert capfd.readouterr() == ("", "")
        assert device.facts().cores >= 1
