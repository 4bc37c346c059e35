"""Distillation of feature maps: where they are read, what the loss is, and what is left behind."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from tiny_training import TinyData
from torch import nn

from bevel.core import recipe as recipes
from bevel.core.errors import RecipeError, TrainingError
from bevel.core.steps import TrainStep
from bevel.finetuning import execution, finetune
from bevel.finetuning.features import feature_loss, feature_maps, feature_sites
from bevel.finetuning.state import digest
from bevel.finetuning.step import Execution, Stepper
from networks import conv, randomise

CPU = torch.device("cpu")


class Block(nn.Module):
    """A convolution at the old size and one at the new, whose output it writes into."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.widen = conv(inputs, hidden)
        self.narrow = conv(hidden, outputs, stride=stride)[:2]

    def forward(self, x):
        return self.narrow(self.widen(x)).relu_()


class Staged(nn.Module):
    """Two stages, then a layer that runs twice and a gate."""

    def __init__(self, widths: tuple[int, int] = (4, 8), hidden: int = 6) -> None:
        super().__init__()
        self.stem = conv(1, widths[0])
        self.first = nn.Sequential(Block(widths[0], hidden, widths[0]))
        self.second = nn.Sequential(Block(widths[0], hidden, widths[1], stride=2))
        self.twice = nn.Conv2d(widths[1], widths[1], 1)
        self.gate = nn.Conv2d(widths[1], widths[1], 1)
        self.linear = nn.Linear(widths[1], 3)

    def forward(self, images):
        features = self.second(self.first(self.stem(images)))
        features = self.twice(self.twice(features).relu())
        gated = features * self.gate(features.mean((2, 3), keepdim=True)).sigmoid()
        return self.linear(gated.mean((2, 3)))


class Tokens(nn.Module):
    """Patches as a sequence, and a layer on windows of it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, stride=2)
        self.norm = nn.LayerNorm(8)
        self.windows = nn.Linear(8, 8)
        self.linear = nn.Linear(8, 3)

    def forward(self, images):
        x = self.norm(self.patches(images).flatten(2).transpose(1, 2))
        x = self.windows(x.reshape(-1, 3, 8)).reshape(x.shape)
        return self.linear(x.mean(1))


class Wrapped(nn.Module):
    """Another network behind a scaling of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Identity()
        self.net = Staged()

    def forward(self, images):
        return self.net(self.scale(images)[:, :, :, :5])


def seeded(seed: int, make=Staged, **arguments) -> nn.Module:
    return randomise(make(**arguments), seed)


def settings(features: float = 1.0, **others) -> TrainStep:
    distill = {"weight": 0.0, "features": features}
    return TrainStep(**{"epochs": 1, "lr": 0.05, "distill": distill} | others)


def hooks(*nets: nn.Module) -> int:
    return sum(len(module._forward_hooks) for net in nets for module in net.modules())


@pytest.fixture
def batch(data):
    return data.images[:8], data.labels[:8]


def test_sites_are_the_ends_of_the_stages(batch):
    image = batch[0][:1]
    net = seeded(0).train()
    # Not the layer of the next stage's block at the old size, nor the gate, nor what runs twice.
    assert feature_sites(net, seeded(1), image) == ("first", "second")
    assert feature_sites(seeded(0, Tokens), seeded(1, Tokens), image) == ("patches", "norm")
    wrapped = feature_sites(seeded(0, Wrapped), seeded(1, Wrapped), image)
    assert wrapped == ("scale", "net.first", "net.second")
    layers = {"stem": conv(1, 4), "body": nn.Sequential(conv(4, 4), conv(4, 4, stride=2))}
    plain = nn.Sequential(OrderedDict(layers, flat=nn.Flatten()))
    assert feature_sites(plain, plain, image) == ("body.0", "body")
    assert net.training
    assert hooks(net) == 0


def test_maps_of_unequal_shape_are_left_out(batch):
    image, teacher = batch[0][:1], seeded(1)
    assert feature_sites(seeded(0, hidden=3), teacher, image) == ("first", "second")
    assert feature_sites(seeded(0, widths=(4, 5)), teacher, image) == ("first",)
    ends = feature_sites(seeded(0, widths=(3, 8)), teacher, image)
    assert ends == ("second.0.widen", "second")  # the last of its size that is left


def test_no_common_site_is_an_error_that_says_what_to_do(data):
    pruned, teacher = seeded(0, widths=(3, 5), hidden=2), seeded(1)
    with pytest.raises(TrainingError, match=r"no module gives .* set features: 0") as caught:
        finetune(pruned, data, settings(), teacher=teacher)
    assert "\n" not in str(caught.value)
    assert finetune(pruned, data, settings(0.0), teacher=teacher).execution["notes"] == []


def test_at_most_six_sites_are_compared():
    net = nn.Sequential(*(nn.Conv2d(1, 1, 2, stride=2) for _ in range(8)), nn.Flatten())
    sites = feature_sites(net, net, torch.zeros(1, 1, 512, 512))
    assert sites == ("0", "1", "2", "3", "4", "5")


def test_the_loss_is_relative_to_the_teacher():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5, 5, generator=generator)
    expected = float((student - teacher).square().sum() / teacher.square().sum())
    for unit in (1.0, 1e3):
        assert feature_loss({"a": unit * student}, {"a": unit * teacher}) == pytest.approx(expected)
    both = feature_loss({"a": student, "b": teacher}, {"a": teacher, "b": teacher})
    assert both == pytest.approx(expected / 2)
    silent = torch.zeros(3, 4)
    assert feature_loss({"a": silent + 2}, {"a": silent}) == 4.0
    with pytest.raises(TrainingError, match="b gave no feature map while training"):
        feature_loss({"a": student}, {"a": teacher, "b": teacher})


def test_a_map_is_what_the_module_gave_whatever_writes_into_it(batch):
    net = seeded(0)
    with torch.no_grad(), feature_maps(net, ["first.0.narrow", "first"]) as maps:
        net(batch[0])
    assert maps["first.0.narrow"].min() < 0
    assert torch.equal(maps["first"], maps["first.0.narrow"].relu())


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_of_a_step_has_the_distance_in_it(batch, dtype, memory_format):
    net, teacher, sites = seeded(0), seeded(1), ("first", "second")

    def loss(weight: float) -> float:
        way = Execution(dtype, memory_format)
        return float(Stepper(net, teacher, way, settings(weight), CPU, sites).step(*batch))

    with torch.no_grad(), feature_maps(teacher, sites) as taught:
        teacher(batch[0])
    training = copy.deepcopy(net).train()
    with torch.no_grad(), feature_maps(training, sites) as own:
        training(batch[0])
    accuracy = 1e-4 if dtype == "float32" else 2e-2
    assert loss(2.5) - loss(0.0) == pytest.approx(2.5 * float(feature_loss(own, taught)), accuracy)


def test_only_the_student_learns(batch):
    stepper = Stepper(seeded(0), seeded(1), Execution(), settings(), CPU, ("first", "second"))
    before = digest(stepper.teacher)
    stepper.step(*batch)
    assert digest(stepper.teacher) == before
    assert all(parameter.grad is None for parameter in stepper.teacher.parameters())
    plain = Stepper(seeded(0), seeded(1), Execution(), settings(), CPU)
    plain.step(*batch)
    changed = [
        name
        for (name, mine), other in zip(
            stepper.net.named_parameters(), plain.net.parameters(), strict=True
        )
        if not torch.equal(mine.grad, other.grad)
    ]
    assert {name.split(".")[0] for name in changed} == {"stem", "first", "second"}


def test_features_come_nearer_to_the_teachers(data):
    teacher = finetune(seeded(1), data, TrainStep(epochs=4, lr=0.05)).net

    def distance(net: nn.Module) -> float:
        found = []
        for each in (net, teacher):
            with torch.no_grad(), feature_maps(each, ("first", "second")) as maps:
                each(data.images)
            found.append(maps)
        return float(feature_loss(*found))

    start = seeded(0)
    plain, taught = (
        finetune(start, data, settings(weight, epochs=8), teacher=teacher) for weight in (0.0, 3.0)
    )
    assert distance(taught.net) < 0.5 * min(distance(plain.net), distance(start))


def test_steps_are_not_compiled_and_the_record_says_why(batch, monkeypatch):
    monkeypatch.setattr(execution, "SHORT_SECONDS", 0.0)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    _, choice = execution.choose(seeded(0), seeded(1), settings(), batch, steps=10**9, device=CPU)
    assert not choice.execution.compiled
    assert "not compiled: distill.features reads first, second by hooks" in choice.notes


def test_no_hook_is_left_behind(data, batch):
    trained = finetune(seeded(0), data, settings(), teacher=seeded(1))
    assert hooks(trained.net) == 0
    again = pickle.loads(pickle.dumps(copy.deepcopy(trained.net)))  # noqa: S301
    assert digest(again) == digest(trained.net)
    stepper = Stepper(seeded(0), seeded(1), Execution(), settings(), CPU, ("first", "second"))
    for broken in (stepper.teacher, stepper.net):
        linear, broken.linear = broken.linear, nn.Linear(1, 1)
        with pytest.raises(RuntimeError, match="shapes"):
            stepper.step(*batch)
        broken.linear = linear
        assert hooks(stepper.net, stepper.teacher) == 0


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path):
    class Interrupted(TinyData):
        def train_batches(self, *, seed, epoch):
            if epoch == 2:
                raise KeyboardInterrupt
            return super().train_batches(seed=seed, epoch=epoch)

    def train(data: TinyData, folder: str):
        wanted = settings(epochs=3, precision="float32", compile="never")
        return finetune(seeded(0), data, wanted, teacher=seeded(1), folder=tmp_path / folder)

    whole = train(TinyData(), "whole")
    with pytest.raises(KeyboardInterrupt):
        train(Interrupted(), "parts")
    parts = train(TinyData(), "parts")
    assert digest(parts.net) == digest(whole.net)
    assert [row["loss"] for row in parts.history] == [row["loss"] for row in whole.history]
    assert parts.execution["notes"] == whole.execution["notes"] != []


def recipe(features: object) -> dict:
    return {
        "version": 1,
        "name": "x",
        "model": {"name": "bevel:resnet20"},
        "data": {"name": "digits"},
        "steps": [{"finetune": {"epochs": 1, "distill": {"features": features}}}],
        "targets": [{"runtime": "onnxruntime"}],
    }


def test_the_recipe_takes_a_weight_from_zero():
    assert recipes.validate(recipe(2)).steps[0].finetune.distill.features == 2.0
    assert TrainStep(epochs=1, distill={}).distill.features == 0.0


@pytest.mark.parametrize("wrong", [-0.1, "much", None, float("nan")])
def test_other_weights_are_refused_in_one_line(wrong):
    with pytest.raises(RecipeError, match=r"finetune\.distill\.features: ") as caught:
        recipes.validate(recipe(wrong))
    assert "\n" not in str(caught.value)
