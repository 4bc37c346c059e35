"""The contract of runtimes: an exported file computes what the network does.

    class TestMine(RuntimeContract):
        name = "mine"

Each precision of the runtime is exported once, from a small network of convolutions (dense and
depthwise), batch norm, a residual addition, pooling and a classifier; once more to see that the
bytes are the same; and once in a process of its own.
"""
# ruff: noqa: S101  a contract is stated in assertions

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bevel.core.errors import ExportError, MeasurementError
from bevel.core.recipe import Quantization
from bevel.core.records import Artifact
from bevel.devices import open_device
from bevel.graph.couplings import analyze
from bevel.graph.program import export_program
from bevel.measurement.runner import decoded, run_batch
from bevel.quantization.pt2e import quantize
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


class TwoViews(nn.Module):
    """(N, 3, 12, 12) and (N, 1, 12, 12) to a dictionary of (N, 8, 10, 10), (N, 8) and (N, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor | list[Tensor]]:
        """The sum of both views, and what each is on average."""
        left, right = torch.relu(self.left(x)), torch.relu(self.right(y))
        return {"sum": left + right, "both": [left.mean((2, 3)), right.mean((2, 3))]}


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


def two_views(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random inputs of `TwoViews`."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 12, 12, generator=random), torch.randn(
        count, 1, 12, 12, generator=random
    )


def images(count: int, seed: int = 0) -> Tensor:
    """Random images, (count, 3, 16, 16)."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


ALONE = """
import sys
from pathlib import Path
from bevel.runtimes import load_runtime
from bevel.testing.runtimes import RuntimeContract, images
name, precision, file = sys.argv[1:]
contract = type("Contract", (RuntimeContract,), {"name": name})
artifact = contract.export(precision, Path(file))
session = load_runtime(name).open_session(Path(file), 1)
session.run([images(1).numpy()])
sys.stdout.write(artifact.sha256)
"""
"""Exports and runs in a fresh process; says the hash of the file and nothing else."""


class RuntimeContract(PluginContract):
    """Inherit, and set `name`.

    Attributes:
        tolerances: by precision, the largest difference of a file from torch, as a share of the
            largest output; float32 is near to rounding, and others are not equal to torch.
        reference_tolerance: the same for an int8 file against its own torch reference, where the
            runtime gives one: a rounding may go the other way, and then through a few layers.
        macs_tolerance: how far the sum of the operators' MACs may be from the network's.
        macs_added: share of them that an int8 file may do more, with channels that kernels need.
    """

    kind = "runtimes"
    tolerances: ClassVar[Mapping[str, float]] = {
        "float32": 1e-4,
        "float16": 0.005,
        "bfloat16": 0.03,
        "int8": 0.1,
        "int8-weights": 0.03,
    }
    reference_tolerance: ClassVar[float] = 0.03
    macs_tolerance: ClassVar[float] = 0.03
    macs_added: ClassVar[float] = 0.0

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
            calibration=cls.calibration(),
            path=path,
        )

    @staticmethod
    def calibration() -> list[Tensor]:
        """The batches that int8 takes its ranges from."""
        return [images(32, seed) for seed in (1, 2)]

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
            assert (
                np.abs(got - expected).max() <= self.tolerances["float32"] * np.abs(expected).max()
            )

    def test_other_precisions_are_near_the_network(
        self, plugin: Runtime, artifacts: Mapping[str, Artifact]
    ) -> None:
        """Near, but not equal: an equal one is float32. Integers name their quantizer."""
        expected = self.expected()
        assert set(artifacts) <= set(self.tolerances)
        for precision, artifact in artifacts.items():
            assert bool(artifact.quantizer) == precision.startswith("int8")
            if precision != "float32":
                difference = np.abs(self.outputs(plugin, artifact) - expected).max()
                allowed = self.tolerances[precision] * np.abs(expected).max()
                assert 0 < difference <= allowed, precision

    def test_int8_file_computes_what_its_reference_does(
        self, plugin: Any, artifacts: Mapping[str, Artifact]
    ) -> None:
        """The quantized network in torch, where the runtime gives it."""
        if "int8" not in artifacts or not hasattr(plugin, "quantizer"):
            pytest.skip(f"the runtime '{self.name}' gives no torch reference of int8")
        options = Quantization()
        program = export_program(small_network(), (images(2),))
        quantizer = plugin.quantizer(options)
        reference = quantize(program, quantizer, self.calibration(), options)
        with torch.no_grad():
            expected = reference(images(16, seed=3)).numpy()
        got = self.outputs(plugin, artifacts["int8"])
        assert np.abs(got - expected).max() <= self.reference_tolerance * np.abs(expected).max()

    def test_how_tensors_lie_in_memory_does_not_matter(
        self, plugin: Runtime, tmp_path: Path
    ) -> None:
        """Neither of the example, as data loaders give it, nor of the network's weights."""
        expected = self.expected()
        example = images(2).to(memory_format=torch.channels_last)
        turned = small_network().to(memory_format=torch.channels_last)
        for number, net in enumerate((small_network(), turned)):
            path = tmp_path / f"{number}{plugin.SUFFIX}"
            artifact = export(net, example, runtime=self.name, path=path)
            difference = np.abs(self.outputs(plugin, artifact) - expected).max()
            assert difference <= self.tolerances["float32"] * np.abs(expected).max()

    def test_any_batch_size_where_the_file_says_so(
        self, plugin: Runtime, artifacts: Mapping[str, Artifact]
    ) -> None:
        """The same answer for an image, alone or among others."""
        for precision, artifact in artifacts.items():
            session = plugin.open_session(Path(artifact.path), 1)
            size = artifact.inputs[0].shape[0]
            assert artifact.outputs[0].shape[0] == size
            array = images(5, seed=3).numpy()
            alone = np.concatenate([session.run([array[i : i + 1]])[0] for i in range(5)])
            if isinstance(size, int):
                assert size == 1
                continue
            rounding = 0.02 if precision != "float32" else 1e-5
            for count in (5, 2):
                together = session.run([array[:count]])[0]
                difference = np.abs(together - alone[:count]).max()
                assert difference <= rounding * np.abs(alone).max(), precision

    @pytest.mark.parametrize("precision", ["float32", "int8"])
    def test_several_inputs_and_outputs(
        self, plugin: Runtime, tmp_path: Path, precision: str
    ) -> None:
        """In the order of the forward's arguments, and of the leaves of what it returns."""
        if precision not in plugin.PRECISIONS:
            pytest.skip(f"the runtime '{self.name}' has no {precision}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = TwoViews().eval()
        artifact = export(
            net,
            two_views(2),
            runtime=self.name,
            precision=precision,
            calibration=[two_views(32, seed=1)],
            path=tmp_path / f"two{plugin.SUFFIX}",
        )
        example = two_views(1, seed=3)
        with torch.no_grad():
            expected = [leaf.numpy() for leaf in tree_leaves(net(*example))]
        session = plugin.open_session(Path(artifact.path), 1)
        found = session.run([tensor.numpy() for tensor in example])
        assert [signature.shape[1:] for signature in artifact.inputs] == [[3, 12, 12], [1, 12, 12]]
        assert len(found) == len(expected) == len(artifact.outputs)
        for got, exact in zip(found, expected, strict=True):
            assert got.shape == exact.shape
            assert np.abs(got - exact).max() <= self.tolerances[precision] * np.abs(exact).max()

    def test_operators_account_for_the_macs(
        self, plugin: Runtime, artifacts: Mapping[str, Artifact]
    ) -> None:
        """They have distinct names and kinds; an int8 file does most of its MACs in integers."""
        if not hasattr(plugin, "operators"):
            pytest.skip(f"the runtime '{self.name}' does not say what its files hold")
        macs = analyze(small_network(), images(2)).cost().macs
        for precision, artifact in artifacts.items():
            found = plugin.operators(Path(artifact.path))
            assert len({operator.name for operator in found}) == len(found)
            assert all(operator.kind and operator.precision for operator in found)
            total = sum(operator.macs for operator in found)
            added = self.macs_added * macs if precision == "int8" else 0
            slack = self.macs_tolerance * macs
            assert macs - slack <= total <= macs + added + slack, precision
            integers = sum(o.macs for o in found if o.precision.startswith(("int", "uint")))
            assert (integers >= 0.9 * macs) == (precision == "int8"), precision

    def test_profile_times_the_operators(
        self, plugin: Any, artifacts: Mapping[str, Artifact]
    ) -> None:
        """Milliseconds by the names that `operators` gives; what has MACs takes time."""
        if not hasattr(plugin, "profile"):
            pytest.skip(f"the runtime '{self.name}' has no profiler")
        for precision in {"float32", "int8"} & set(artifacts):
            path = Path(artifacts[precision].path)
            times = plugin.profile(path, [images(1).numpy()], 1)
            assert all(0 <= time < 1000 for time in times.values())
            assert sum(times.values()) > 0
            heavy = max(plugin.operators(path), key=lambda operator: operator.macs)
            assert times[heavy.name] > 0, precision

    def test_a_process_of_its_own_is_silent_and_writes_the_same_bytes(
        self, plugin: Runtime, artifacts: Mapping[str, Artifact], tmp_path: Path
    ) -> None:
        """What runtimes and converters say while they are imported counts as well."""
        precision = "int8" if "int8" in artifacts else "float32"
        path = os.pathsep.join(item for item in sys.path if item)
        done = subprocess.run(  # noqa: S603 - it is this Python with the program above
            [sys.executable, "-c", ALONE, self.name, precision, f"alone{plugin.SUFFIX}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == artifacts[precision].sha256

    def test_files_run_where_bevel_is_not_installed(
        self, plugin: Runtime, artifacts: Mapping[str, Artifact], tmp_path: Path
    ) -> None:
        """The runtime's file alone, packed with the runner, computes the same as here."""
        np.save(tmp_path / "images.npy", images(16, seed=3).numpy())
        files = {precision: Path(artifact.path) for precision, artifact in artifacts.items()}
        subjects = [{"runtime": self.name, "file": precision} for precision in files]
        job = {"task": "predict", "subjects": subjects, "images": "images"}
        with open_device("local") as device:
            result = device.run(job, {**files, "images": tmp_path / "images.npy"})
        for artifact, output in zip(artifacts.values(), result["outputs"], strict=True):
            assert np.array_equal(decoded(output), self.outputs(plugin, artifact))

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
                calibration=self.calibration(),
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
