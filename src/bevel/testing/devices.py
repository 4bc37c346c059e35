"""The contract of devices: they state what they are, and run bevel's modules.

class TestMine(DeviceContract):
    name = "mine"
"""
# ruff: noqa: S101  a contract is stated in assertions

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from bevel.core.errors import MeasurementError
from bevel.core.records import DeviceFacts
from bevel.devices import Device
from bevel.measurement.bench import RUNNER
from bevel.runtimes import export
from bevel.testing.plugin import PluginContract, assert_readable


class DeviceContract(PluginContract):
    """Inherit, and set `name`; and `runtime`, if the device does not run ONNX Runtime."""

    kind = "devices"
    runtime: ClassVar[str] = "onnxruntime"

    @pytest.fixture(scope="class")
    @classmethod
    def artifact(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A file that the runner can open."""
        path = tmp_path_factory.mktemp("device") / "linear.artifact"
        export(nn.Linear(4, 2), torch.zeros(2, 4), runtime=cls.runtime, path=path)
        return path

    def run(self, plugin: Device, folder: Path, artifact: Path) -> dict[str, int]:
        """Let the runner state the memory of an artifact."""
        job, result = folder / "job.json", folder / "result.json"
        subject = {"runtime": self.runtime, "path": str(artifact)}
        job.write_text(json.dumps({"task": "memory", "threads": 1, "subjects": [subject]}))
        plugin.run_module(RUNNER, [str(job), str(result)], threads=1)
        outcome: dict[str, int] = json.loads(result.read_text())
        return outcome

    def test_facts_are_plausible(self, plugin: Device) -> None:
        """Units are those of the names; what the system does not tell is None."""
        facts = plugin.facts()
        assert facts.device == self.name
        assert facts.system.strip()
        assert facts.architecture.strip()
        assert 1 <= facts.cores <= 4096
        assert facts.processor is None or facts.processor.strip()
        assert facts.memory_bytes is None or 2**20 <= facts.memory_bytes <= 2**50
        assert facts.frequency_mhz is None or 1 <= facts.frequency_mhz <= 10_000
        assert facts.temperature_c is None or -60 <= facts.temperature_c <= 150
        assert DeviceFacts.model_validate_json(facts.model_dump_json()) == facts

    def test_facts_carry_the_runtimes_version(self, plugin: Device) -> None:
        """As given."""
        assert plugin.facts("runtime 1.2").runtime_version == "runtime 1.2"
        assert plugin.facts().runtime_version is None

    def test_busy_cores(self, plugin: Device) -> None:
        """Between none and all processors, or unknown."""
        busy = plugin.busy_cores()
        assert busy is None or -1e-6 <= busy <= plugin.facts().cores + 1e-6

    def test_runs_the_runner(
        self, plugin: Device, tmp_path: Path, artifact: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """It is done when the call returns, and says nothing."""
        peak = self.run(plugin, tmp_path, artifact)["peak_memory_bytes"]
        assert 2**20 < peak < 2**32
        assert capfd.readouterr() == ("", "")

    def test_failure_is_one_line_that_says_why(
        self, plugin: Device, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Of the runner, which cannot open its artifact."""
        broken = tmp_path / "broken.artifact"
        broken.write_bytes(b"nothing a runtime knows" * 20)
        with pytest.raises(MeasurementError, match=r"broken\.artifact") as caught:
            self.run(plugin, tmp_path, broken)
        assert_readable(caught.value)
        assert not (tmp_path / "result.json").exists()
        assert capfd.readouterr() == ("", "")

    def test_unknown_module(self, plugin: Device) -> None:
        """One line, with its name."""
        with pytest.raises(MeasurementError, match="no_such_module") as caught:
            plugin.run_module("bevel.no_such_module", [], threads=1)
        assert_readable(caught.value)
