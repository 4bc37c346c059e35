"""The contract of runtimes: an exported file computes what the network does.

    class TestMine(RuntimeContract):
        name = "mine"

Each precision of the runtime is exported once, from a small network of convolutions (dense and
depthwise), batch norm, a residual addition, pooling and a classifier.
"""
# ruff: noqa: S101  a contract is stated in assertions

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bevel.core.errors import ExportError, MeasurementError
from bevel.core.records import Artifact
from bevel.measurement.parity import run_batch
from bevel.runtimes import Runtime, export, open_artifact, sidecar
from bevel.testing.plugin import PluginContract, assert_readable


class SmallNetwork(nn.Module):
    """What a runtime meets in a vision network, in 5 thousand parameters: (N, 3, 16, 16) to 10."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.wide = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores, shape (N, 10)."""
        x = torch.relu(self.stem(images))
        x = x + torch.relu(self.wide(nn.functional.relu6(self.deep(x))))
        x = nn.functional.adaptive_avg_pool2d(nn.functional.max_pool2d(x, 2), 1)
        scores: Tensor = self.head(torch.flatten(x, 1))
        return scores


class Undecided(nn.Module):
    """Its way depends on the values of a tensor, so it cannot be traced."""

    def forward(self, images: Tensor) -> Tensor:
        """The images, or their opposite."""
        return images if bool(images.sum() > 0) else -images


def small_network() -> nn.Module:
    """The same weights and statistics each time, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SmallNetwork()
        norm = net.stem[1]
        assert isinstance(norm, nn.BatchNorm2d)
        with torch.no_grad():
            for tensor in (norm.weight, norm.running_var):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)
            for tensor in (norm.bias, norm.running_mean):
                assert tensor is not None
                tensor.normal_()
    return net.eval()


def images(count: int, seed: int = 0) -> Tensor:
    """Random images, (count, 3, 16, 16)."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


class RuntimeContract(PluginContract):
    """Inherit, and set `name`.

    Attributes:
        float_tolerance: largest difference of a float32 file from torch, as a share of the
            largest output.
        int8_tolerance: the same for int8 files.
    """

    kind = "runtimes"
    float_tolerance: ClassVar[float] = 1e-4
    int8_tolerance: ClassVar[float] = 0.1

    @pytest.fixture(scope="class")
    @classmethod
    def artifacts(
        cls, plugin: Runtime, tmp_path_factory: pytest.TempPathFactory
    ) -> Mapping[str, Artifact]:
        """The small network in each precision."""
        folder = tmp_path_factory.mktemp("artifacts")
        return {
            precision: cls.export(precision, folder / f"{precision}{plugin.SUFFIX}")
            for precision in plugin.PRECISIONS
        }

    @classmethod
    def export(cls, precision: str, path: Path) -> Artifact:
        """Export the small network with the runtime."""
        return export(
            small_network(),
            images(2),
            runtime=cls.name,
            precision=precision,
            calibration=[images(32, seed) for seed in (1, 2)],
            path=path,
        )

    def outputs(self, plugin: Runtime, artifact: Artifact, threads: int = 1) -> np.ndarray:
        """What the file computes for 16 images, shape (16, 10)."""
        session = plugin.open_session(Path(artifact.path), threads)
        return run_batch(session, images(16, seed=3).numpy())

    def expected(self) -> np.ndarray:
        """What the network computes for them."""
        with torch.no_grad():
            scores: np.ndarray = small_network()(images(16, seed=3)).numpy()
        return scores

    def test_states_suffix_and_precisions(self, plugin: Runtime) -> None:
        """Files have a suffix; float32 is always there."""
        assert plugin.SUFFIX.startswith(".")
        assert "float32" in plugin.PRECISIONS
        assert len(set(plugin.PRECISIONS)) == len(plugin.PRECISIONS)

    def test_states_its_version(self, plugin: Runtime) -> None:
        """One line with a number, for the record of a measurement."""
        version = plugin.version()
        assert "\n" not in version
        assert any(character.isdigit() for character in version)

    def test_float32_file_computes_what_the_network_does(
        self, plugin: Runtime, artifacts: Mapping[str, Artifact]
    ) -> None:
        """Up to rounding, and with any number of threads."""
        expected = self.expected()
        for threads in (1, 2):
            got = self.outputs(plugin, artifacts["float32"], threads)
            assert got.shape == expected.shape
            assert np.abs(got - expected).max() <= self.float_tolerance * np.abs(expected).max()

    def test_int8_file_is_near_the_network(
        self, plugin: Runtime, artifacts: Mapping[str, Artifact]
    ) -> None:
        """Near, but not equal: an equal one was not quantized. It names its quantizer."""
        assert artifacts["float32"].quantizer is None
        if "int8" not in artifacts:
            pytest.skip(f"the runtime '{self.name}' has no int8")
        expected = self.expected()
        difference = np.abs(self.outputs(plugin, artifacts["int8"]) - expected).max()
        assert 0 < difference <= self.int8_tolerance * np.abs(expected).max()
        assert artifacts["int8"].quantizer

    def test_signature_describes_what_goes_in_and_out(
        self, plugin: Runtime, artifacts: Mapping[str, Artifact]
    ) -> None:
        """Names, numpy types and shapes; a text in a shape is a size that is open."""
        for artifact in artifacts.values():
            assert len(artifact.inputs) == len(artifact.outputs) == 1
            session = plugin.open_session(Path(artifact.path), 1)
            array = images(1).numpy()
            (output,) = session.run([array])
            pairs = ((artifact.inputs[0], array), (artifact.outputs[0], output))
            for signature, actual in pairs:
                assert signature.name
                assert np.dtype(signature.dtype) == actual.dtype
                assert len(signature.shape) == actual.ndim
                for said, size in zip(signature.shape, actual.shape, strict=True):
                    assert isinstance(said, str) or said == size

    def test_description_is_read_back(self, artifacts: Mapping[str, Artifact]) -> None:
        """Size and hash are the file's; the description beside it says the same."""
        for precision, artifact in artifacts.items():
            content = Path(artifact.path).read_bytes()
            assert artifact.size_bytes == len(content)
            assert artifact.sha256 == hashlib.sha256(content).hexdigest()
            assert (artifact.runtime, artifact.precision) == (self.name, precision)
            assert open_artifact(artifact.path) == artifact

    def test_export_is_silent_repeatable_and_leaves_the_network_alone(
        self,
        plugin: Runtime,
        artifacts: Mapping[str, Artifact],
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """The same network gives the same bytes; two files appear, and nothing on the terminal."""
        for precision, artifact in artifacts.items():
            net = small_network().train()
            before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            path = tmp_path / precision / f"again{plugin.SUFFIX}"
            again = export(
                net,
                images(2),
                runtime=self.name,
                precision=precision,
                calibration=[images(32, seed) for seed in (1, 2)],
                path=path,
            )
            assert again.sha256 == artifact.sha256
            assert set(path.parent.iterdir()) == {path, sidecar(path)}
            assert all(module.training for module in net.modules())
            for name, tensor in net.state_dict().items():
                assert torch.equal(tensor, before[name])
        assert capfd.readouterr() == ("", "")

    def test_refusal_is_one_line_and_leaves_nothing(self, plugin: Runtime, tmp_path: Path) -> None:
        """A network that cannot be traced is an ExportError."""
        with pytest.raises(ExportError) as caught:
            export(Undecided(), images(2), runtime=self.name, path=tmp_path / f"no{plugin.SUFFIX}")
        assert_readable(caught.value)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("count", [0, 2])
    def test_wrong_number_of_inputs(
        self, plugin: Runtime, artifacts: Mapping[str, Artifact], count: int
    ) -> None:
        """A MeasurementError."""
        session = plugin.open_session(Path(artifacts["float32"].path), 1)
        with pytest.raises(MeasurementError) as caught:
            session.run([images(1).numpy()] * count)
        assert_readable(caught.value)

    @pytest.mark.parametrize("shape", [(1, 3, 16), (1, 4, 16, 16)])
    def test_wrong_shape(
        self, plugin: Runtime, artifacts: Mapping[str, Artifact], shape: tuple[int, ...]
    ) -> None:
        """A MeasurementError."""
        session = plugin.open_session(Path(artifacts["float32"].path), 1)
        with pytest.raises(MeasurementError) as caught:
            session.run([np.zeros(shape, dtype=np.float32)])
        assert_readable(caught.value)

    @pytest.mark.parametrize("damage", ["cut", "other", "empty", "absent"])
    def test_damaged_file(
        self,
        plugin: Runtime,
        artifacts: Mapping[str, Artifact],
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
        damage: str,
    ) -> None:
        """A MeasurementError, and nothing on the terminal."""
        content = Path(artifacts["float32"].path).read_bytes()
        damaged: dict[str, Any] = {"cut": content[: len(content) // 2], "other": b"x" * 999}
        path = tmp_path / f"damaged{plugin.SUFFIX}"
        if damage != "absent":
            path.write_bytes(damaged.get(damage, b""))
        with pytest.raises(MeasurementError) as caught:
            plugin.open_session(path, 1)
        assert_readable(caught.value)
        assert capfd.readouterr() == ("", "")
