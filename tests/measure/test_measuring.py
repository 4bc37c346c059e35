"""Real files on this machine, and constructed timings on a device that only pretends."""

from __future__ import annotations

import types
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bevel
from bevel.core.errors import MeasurementError, UnknownNameError
from bevel.core.records import Artifact
from bevel.devices import Device, open_device
from bevel.measurement import runner
from bevel.measurement.bench import Subject, _scores, images_for, measure_all
from bevel.measurement.parity import evaluate_artifacts, run_batch
from bevel.runtimes import open_artifact
from bevel.runtimes.onnxruntime import open_session
from bevel.testing.plugin import assert_readable
from networks import EXAMPLE, Plain, Projection, Shared, randomise


def labelled(*counts: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in counts
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A network, and its float and int8 files."""
    folder, net = tmp_path_factory.mktemp("files"), randomise(Projection())
    made = [
        bevel.export(
            net,
            EXAMPLE,
            precision=precision,
            calibration=labelled(32),
            path=folder / f"{precision}.onnx",
        )
        for precision in ("float32", "int8")
    ]
    return net, *made


@pytest.fixture(scope="module")
def measured(files):
    """Both files side by side, while this process holds far more memory than they need."""
    net, float32, int8 = files
    ballast = np.ones(2**26)  # 512 MiB, touched
    subjects = [Subject("original", float32, net), Subject("compressed", int8, net)]
    results = measure_all(subjects, batches=labelled(7, 4), split="validation")
    assert ballast.sum() == 2**26
    return results


def test_every_file_is_timed_at_least_a_hundred_times(measured):
    counts = {len(result.latency.samples_ms) for result in measured}
    assert len(counts) == 1  # in turn
    assert counts.pop() >= 100
    for result in measured:
        assert result.latency.warmup_runs == runner.WARMUP_RUNS
        assert min(result.latency.samples_ms) > 0
        assert result.latency.p50_ms <= result.latency.p90_ms <= result.latency.p99_ms


def test_peak_memory_is_that_of_the_file_alone(measured):
    for result in measured:
        assert 2**23 < result.peak_memory_bytes < 2**29


def test_what_was_measured_and_where(measured, files):
    assert [result.label for result in measured] == ["original", "compressed"]
    assert [result.artifact for result in measured] == list(files[1:])
    assert {result.threads for result in measured} == {1}
    assert measured[0].device == open_device("local").facts("onnxruntime").model_copy(
        update={
            "frequency_mhz": measured[0].device.frequency_mhz,
            "temperature_c": measured[0].device.temperature_c,
        }
    )
    assert measured[0].device.runtime_version.startswith("onnxruntime 1.")


def test_accuracy_and_parity_are_those_of_a_hand_computation(measured, files):
    net, *artifacts = files
    batches = labelled(7, 4)
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        expected = net(images).numpy().astype(np.float64)
    for artifact, result in zip(artifacts, measured, strict=True):
        got = open_session(Path(artifact.path), 1).run([images.numpy()])[0].astype(np.float64)
        difference = np.abs(got - expected)
        assert result.accuracy.top1 == np.mean(got.argmax(1) == labels.numpy())
        assert (result.accuracy.images, result.accuracy.split) == (11, "validation")
        assert result.parity.max_difference == pytest.approx(difference.max(), abs=1e-6)
        assert result.parity.mean_difference == pytest.approx(difference.mean(), abs=1e-6)
        assert result.parity.top1_agreement == np.mean(got.argmax(1) == expected.argmax(1))
        assert result.parity.images == 11
    assert measured[0].parity.max_difference < 1e-5 < measured[1].parity.max_difference


def test_parity_keeps_the_references_mode_and_needs_no_gradients(files):
    net, float32, _ = files
    net.train()
    ((accuracy, parity),) = evaluate_artifacts([(float32, net)], labelled(3), "test")
    assert net.training
    net.eval()
    assert accuracy.images == 3
    assert parity.max_difference < 1e-5


def test_without_reference_there_is_no_parity(files):
    ((accuracy, parity),) = evaluate_artifacts([(files[1], None)], labelled(3), "test")
    assert accuracy.images == 3
    assert parity is None


def test_first_of_several_outputs_counts(tmp_path):
    net = randomise(Shared())
    wrapped = nn.Sequential(net)
    artifact = bevel.export(wrapped, EXAMPLE, path=tmp_path / "shared.onnx")
    labels = torch.zeros(2, 16, 16, dtype=torch.int64)
    ((_, parity),) = evaluate_artifacts([(artifact, wrapped)], [(EXAMPLE, labels)], "test")
    assert parity.max_difference < 1e-4


def test_no_images(files):
    with pytest.raises(MeasurementError, match="no validation images") as caught:
        evaluate_artifacts([(files[1], None)], [], "validation")
    assert_readable(caught.value)


def test_images_of_another_size(files):
    wrong = [(torch.zeros(2, 3, 9, 9), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(MeasurementError, match="dimensions") as caught:
        evaluate_artifacts([(files[1], None)], wrong, "test")
    assert_readable(caught.value)


def test_file_for_one_image_gets_a_batch_in_turn():
    class One:
        inputs = [types.SimpleNamespace(shape=[1, 3])]  # noqa: RUF012

        def run(self, arrays):
            assert arrays[0].shape == (1, 3)
            return [arrays[0] * 2]

    images = np.arange(12.0).reshape(4, 3)
    assert np.array_equal(run_batch(One(), images), images * 2)
    One.inputs[0].shape = [8, 3]
    with pytest.raises(MeasurementError, match="takes 8 images at a time, got 4"):
        run_batch(One(), images)


@pytest.mark.parametrize(
    ("images", "pieces"), [(0, [0]), (1, [1]), (32, [32]), (33, [32, 1]), (70, [32, 32, 6])]
)
def test_file_for_any_batch_gets_a_large_one_in_pieces(images, pieces):
    seen = []

    class Any:
        inputs = [types.SimpleNamespace(shape=["batch", 3])]  # noqa: RUF012

        def run(self, arrays):
            seen.append(len(arrays[0]))
            return [arrays[0] * 2]

    batch = np.arange(3.0 * images).reshape(images, 3)
    assert np.array_equal(run_batch(Any(), batch), batch * 2)
    assert seen == pieces


def described(label: str, precision: str, runtime: str = "onnxruntime") -> Subject:
    fields = {"path": label, "runtime": runtime, "precision": precision, "sha256": ""}
    return Subject(label, Artifact(**fields, inputs=[], outputs=[], size_bytes=1))


class Pretended(Device):
    """Does every job with a result that the test gave."""

    address = "pretend"

    def __init__(self, samples, busy=0.0, throttling=None, emulated=False):
        self.samples, self.busy, self.throttling = samples, busy, throttling
        self.emulated, self.jobs, self.closed = emulated, [], False

    def run(self, job, files, *, threads=1):
        if job["task"] == "facts":
            facts = {"system": "Pretence 1", "architecture": "none", "processor": None, "cores": 2}
            return (
                facts
                | dict.fromkeys(
                    (
                        "memory_bytes",
                        "governor",
                        "frequency_mhz",
                        "temperature_c",
                        "runtime_version",
                    )
                )
                | {"throttling": self.throttling}
            )
        assert threads == 3
        assert list(files) == [subject["file"] for subject in job["subjects"]]
        self.jobs.append(job)
        timed = {"samples_ms": self.samples, "warmup_runs": 20}
        return timed if job["task"] == "latency" else {"peak_memory_bytes": len(self.jobs)}

    def busy_cores(self):
        return self.busy

    def close(self):
        self.closed = True


@pytest.fixture
def pretend(monkeypatch):
    """A function that measures subjects with given samples, beside other work."""

    def measure(subjects, samples, **told):
        place = Pretended(samples, **told)
        monkeypatch.setattr("bevel.measurement.bench.open_device", lambda _: place)
        results = measure_all(subjects, device="pretend", threads=3)
        assert place.closed
        return [result.warnings for result in results], place.jobs

    return measure


STEADY, SLOWER = [1.0] * 100, [1.25] * 100


def test_nothing_to_warn_of(pretend):
    subjects = [described("compressed", "float32"), described("compressed", "int8")]
    warnings, jobs = pretend(subjects, [SLOWER, STEADY], busy=0.5)
    assert warnings == [[], []]
    assert [(job["task"], len(job["subjects"])) for job in jobs] == [
        ("latency", 2),
        ("memory", 1),
        ("memory", 1),
    ]


def test_int8_slower_than_its_float_file(pretend):
    subjects = [described("compressed", "float32"), described("compressed", "int8")]
    (float32, int8), _ = pretend(subjects, [STEADY, SLOWER])
    assert float32 == []
    assert int8 == [
        "int8 is slower than compressed float32 here (1.25 against 1 ms): ship the float32 file"
    ]


def test_int8_slower_than_the_original(pretend):
    subjects = [described("original", "float32"), described("compressed", "int8")]
    (_, int8), _ = pretend(subjects, [STEADY, SLOWER])
    assert [warning[:40] for warning in int8] == ["int8 is slower than original float32 her"]


def test_noisy_timing(pretend):
    (warnings,), _ = pretend([described("a", "float32")], [[1.0] * 80 + [2.0] * 20])
    assert len(warnings) == 1
    assert warnings[0].startswith("noisy timing: p90 2 ms against p50 1 ms")
    assert pretend([described("a", "float32")], [[1.0] * 95 + [2.0] * 5])[0] == [[]]


def test_loaded_machine(pretend):
    (warnings,), _ = pretend([described("a", "float32")], [STEADY], busy=1.3)
    assert warnings == ["other work kept 1.3 processors busy just before the timing"]
    assert pretend([described("a", "float32")], [STEADY], busy=None)[0] == [[]]


def test_throttled_device(pretend):
    (warnings,), _ = pretend([described("a", "float32")], [STEADY], throttling="too warm")
    assert warnings == ["the device was throttled after the timing: too warm"]
    assert pretend([described("a", "float32")], [STEADY], throttling="none")[0] == [[]]


def test_an_emulated_device_has_no_times(monkeypatch):
    place = Pretended([STEADY], emulated=True)
    monkeypatch.setattr("bevel.measurement.bench.open_device", lambda _: place)
    (result,) = measure_all([described("a", "float32")], device="pretend", threads=3)
    assert (result.latency, result.peak_memory_bytes) == (None, None)
    assert result.device.emulated
    assert [warning[:9] for warning in result.warnings] == ["emulated:"]
    assert [job["task"] for job in place.jobs] == ["memory"]  # the file did run


class Elsewhere(type(open_device("local"))):
    """This machine under another address: images are sent to it in pieces."""

    address = "elsewhere"

    def __init__(self):
        self.pieces = []

    def run(self, job, files, *, threads=1):
        if job["task"] == "predict":
            self.pieces.append(len(np.load(files[job["images"]])))
        return super().run(job, files, threads=threads)


def test_accuracy_and_parity_are_what_the_device_computes(files, measured, monkeypatch):
    """The same numbers, whether the images go there in one piece or in several."""
    net, *artifacts = files
    place = Elsewhere()
    monkeypatch.setattr("bevel.measurement.bench.open_device", lambda _: place)
    one = torch.zeros(1, 3, 8, 8).nbytes
    for piece_bytes, pieces in ((2**20, [11]), (6 * one, [6, 5])):
        monkeypatch.setattr("bevel.measurement.bench.PIECE_BYTES", piece_bytes)
        place.pieces.clear()
        subjects = [Subject("x", artifact, net) for artifact in artifacts]
        scores = _scores(place, subjects, labelled(7, 4), "validation", 1)
        assert place.pieces == pieces
        for (accuracy, parity), here in zip(scores, measured, strict=True):
            assert accuracy == here.accuracy
            assert parity.top1_agreement == here.parity.top1_agreement
            assert parity.max_difference == pytest.approx(here.parity.max_difference, abs=1e-6)


def test_how_many_images_a_device_gets():
    assert images_for("local") is None
    assert images_for("ssh:pi@host") == 500


def test_unknown_device(files):
    with pytest.raises(UnknownNameError, match=r"no device called 'locale'\. Did you mean 'local'"):
        bevel.measure(files[1], device="locale")


def test_damaged_file_is_one_line(files, tmp_path, capfd):
    path = tmp_path / "damaged.onnx"
    path.write_bytes(b"no model" * 50)
    damaged = files[1].model_copy(update={"path": str(path)})
    with pytest.raises(MeasurementError, match=r"ONNX Runtime cannot load .*damaged") as caught:
        bevel.measure(damaged)
    assert_readable(caught.value)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(MeasurementError, match="no exported file at"):
        bevel.measure(tmp_path / "absent.onnx")


def test_runner_takes_files_in_turn(monkeypatch):
    """Every round has a turn of each file, after any of the others; what warms is not counted."""
    order = []

    def opened(job):
        assert job["threads"] == 2
        return [
            types.SimpleNamespace(run=lambda _, subject=subject: order.append(subject), inputs=[])
            for subject in job["subjects"]
        ]

    monkeypatch.setattr(runner, "_sessions", opened)
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0.0)
    result = runner._latency({"subjects": ["a", "b", "c"], "threads": 2})
    warm, least, timed = runner.WARMUP_RUNS, runner.LEAST_RUNS, runner.TURN_RUNS
    assert order[: 3 * warm] == ["a"] * warm + ["b"] * warm + ["c"] * warm
    after = order[3 * warm :]
    turns = after[:: timed + 1]
    assert after == [name for name in turns for _ in range(timed + 1)]
    rounds = [turns[start : start + 3] for start in range(0, len(turns), 3)]
    assert [sorted(names) for names in rounds] == [["a", "b", "c"]] * (least // timed)
    followed = Counter(pairwise(turns))
    assert all(followed[pair] for pair in permutations("abc", 2))
    assert [len(times) for times in result["samples_ms"]] == [least] * 3


def test_plain_network_measured_by_path(tmp_path, monkeypatch):
    """`bevel.measure` on a path reads the description beside it."""
    artifact = bevel.export(randomise(Plain()), EXAMPLE, path=tmp_path / "plain.onnx")
    assert open_artifact(tmp_path / "plain.onnx") == artifact
    seen = []
    monkeypatch.setattr(
        "bevel.measurement.bench.measure_all",
        lambda subjects, **_: seen.extend(subjects) or subjects,
    )
    bevel.measure(tmp_path / "plain.onnx", label="mine")
    assert (seen[0].label, seen[0].artifact, seen[0].reference) == ("mine", artifact, None)
