"""The way steps run is chosen by measuring, and never by hoping."""

import time
from unittest.mock import Mock

import pytest
import torch
from tiny_training import TinyData, tiny_net
from torch import nn

from bevel.core.errors import RunFolderError
from bevel.core.progress import reporting
from bevel.core.steps import TrainStep
from bevel.finetuning import execution
from bevel.finetuning.execution import Choice, choose
from bevel.finetuning.state import digest
from bevel.finetuning.step import Execution

CPU = torch.device("cpu")


class Moody(nn.Module):
    """Sleeps by memory format and type, so that the fastest is known."""

    def __init__(self, seconds: dict[tuple[bool, bool], float], bad: str | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))
        self.linear = nn.Linear(16, 3)
        self.seconds, self.bad, self.calls = seconds, bad, []

    def forward(self, images):
        last = self.layers[1].weight.is_contiguous(memory_format=torch.channels_last)
        mixed = torch.is_autocast_enabled("cpu")
        self.calls.append((mixed, last))
        if mixed and self.bad == "raises":
            raise RuntimeError("no kernel\nfor that")
        for layer in self.layers:
            time.sleep(self.seconds.get((mixed, last), 0.002) / 3)
            images = layer(images)
        logits = self.linear(images.flatten(1))
        return logits * float("nan") if mixed and self.bad == "nan" else logits


@pytest.fixture
def batch():
    data = TinyData()
    return data.images[:8], data.labels[:8]


@pytest.fixture(autouse=True)
def long_job(monkeypatch):
    monkeypatch.setattr(execution, "SHORT_SECONDS", 0.0)


def pick(net, batch, steps=100, **settings) -> Choice:
    settings = {"epochs": 1, "compile": "never"} | settings
    return choose(net, None, TrainStep(**settings), batch, steps=steps, device=CPU)[1]


def test_the_fastest_is_chosen(batch):
    slow = 0.15  # far apart, so that other work on the machine does not change the order
    seconds = {(False, False): slow, (False, True): slow, (True, False): 0.01, (True, True): slow}
    choice = pick(Moody(seconds), batch)
    assert choice.execution == Execution("bfloat16", "contiguous")
    assert len(choice.step_ms) == 4


@pytest.mark.parametrize(
    ("precision", "memory_format"), [("float32", "channels_last"), ("bfloat16", "contiguous")]
)
def test_a_pinned_precision_runs_the_same_way_whatever_the_time(batch, precision, memory_format):
    mixed, last = precision == "bfloat16", memory_format == "channels_last"
    net = Moody({(mixed, last): 0.05})
    choice = pick(net, batch, precision=precision)
    assert choice.execution == Execution(precision, memory_format)
    assert choice.step_ms == {}
    assert net.calls == []


def test_a_pathological_candidate_is_given_up_within_its_first_step(batch, monkeypatch):
    seconds = {(True, True): 30.0}
    net = Moody(seconds)
    naps = []

    def nap(length: float, sleep=time.sleep) -> None:
        naps.append(length)
        sleep(min(length, 2.1))

    monkeypatch.setattr(time, "sleep", nap)
    choice = pick(net, batch)
    assert choice.execution != Execution("bfloat16", "channels_last")
    assert any("bfloat16 channels_last eager: given up" in line for line in choice.notes)
    assert naps.count(10.0) == 1  # one of its three layers ran


@pytest.mark.parametrize(("bad", "told"), [("raises", "no kernel for that"), ("nan", "nan where")])
def test_a_candidate_that_fails_or_miscalculates_is_out(batch, bad, told):
    seconds = {(False, False): 0.03, (False, True): 0.03}
    choice = pick(Moody(seconds, bad), batch)
    assert choice.execution.dtype == "float32"
    assert sum(told in line for line in choice.notes) == 2


@pytest.mark.parametrize("device, limits", [("cpu", [2.0, 0.5]), ("cuda", [None, 0.5])])
def test_only_a_processor_is_stopped_in_its_first_step(device, limits):
    # On an accelerator kernels are set up then: seen to take 17 s where a step takes 0.1.
    given = []
    candidate = Mock(first_loss=1.0)
    candidate.stepper.device = torch.device(device)
    candidate.measure = lambda limit: given.append(limit)
    assert execution._first(candidate, candidate, best=0.1) is None
    assert given == limits


def test_measuring_leaves_no_trace(batch):
    net = tiny_net()
    before = digest(net)
    stepper, _ = choose(net, None, TrainStep(epochs=1, compile="never"), batch, steps=9, device=CPU)
    assert digest(net) == before == digest(stepper.net)
    assert not stepper.optimizer.state
    assert all(parameter.grad is None for parameter in stepper.net.parameters())


def test_compiling_must_pay(batch):
    choice = pick(tiny_net(), batch, steps=10, compile="auto")
    assert not choice.execution.compiled
    assert any(line.startswith("not compiled: about") for line in choice.notes)


def test_compiling_that_fails_falls_back_with_a_note(batch, monkeypatch):
    def refuse(*_, **__):
        def call(_):
            raise RuntimeError("no C++ compiler\nfound")

        return call

    class Notes:
        def __init__(self):
            self.lines = []

        def start(self, *_):
            return self.finish

        def finish(self, _): ...

        def note(self, message):
            self.lines.append(message)

    notes = Notes()
    monkeypatch.setattr(torch, "compile", refuse)
    with reporting(notes):
        choice = pick(tiny_net(), batch, steps=10**9, compile="auto")
    assert not choice.execution.compiled
    assert any(
        "compiling failed" in line and "no C++ compiler found" in line for line in notes.lines
    )


def test_a_faster_compiled_step_is_used_for_whole_batches_only(batch, monkeypatch):
    shapes = []

    def faster(net, **_):
        def call(images):
            shapes.append(tuple(images.shape))
            return net.linear(images.new_zeros(len(images), 16))

        return call

    monkeypatch.setattr(torch, "compile", faster)
    net = Moody(dict.fromkeys([(a, b) for a in (True, False) for b in (True, False)], 0.02))
    stepper, choice = choose(net, None, TrainStep(epochs=1), batch, steps=10**9, device=CPU)
    assert choice.execution.compiled
    assert choice.compile_seconds is not None
    seen = len(shapes)
    stepper.step(batch[0][:5], batch[1][:5])
    assert len(shapes) == seen
    stepper.step(*batch)
    assert len(shapes) == seen + 1


def test_the_choice_survives_json_and_a_strange_one_is_refused():
    choice = Choice(Execution("bfloat16", "contiguous", True), "why", "cpu", 2, {"x": 1.0}, 3.0)
    assert Choice.from_record(choice.record()) == choice
    with pytest.raises(RunFolderError, match="cannot be used"):
        Choice.from_record({"dtype": "float32"})
