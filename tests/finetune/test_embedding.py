"""Embeddings compared through a learned map: against least squares, and nothing is left behind."""

import copy

import pytest
import torch
from pydantic import ValidationError
from tiny_training import Interrupted, TinyData, tiny_net
from torch import nn

from bevel.core.errors import TrainingError
from bevel.core.steps import QatStep, TrainStep
from bevel.finetuning import finetune
from bevel.finetuning.embedding import (
    embedding_loss,
    last_layer,
    width,
    with_embeddings,
    without_embeddings,
)
from bevel.finetuning.state import digest


class _Net(nn.Module):
    """Two layers that `width` features lie between, and a third that reads no image."""

    def __init__(self, features: int, classes: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(features, classes)
        self.body = nn.Linear(3 * 16, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(x.flatten(1))))

    def embedding(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x.flatten(1)))


def _pair(batches: int = 6) -> tuple[_Net, _Net, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    images = (torch.randn(batches, 40, 4) @ torch.randn(4, 48)).unflatten(2, (3, 4, 4))
    return _Net(5), _Net(7), [(batch, torch.zeros(40, dtype=torch.long)) for batch in images]


def test_in_training_both_give_their_embedding_before_their_outputs():
    net, teacher, batches = _pair()
    mapped, shown = with_embeddings(net, teacher, batches)
    images = batches[0][0]
    assert width(mapped) == 7
    assert width(net) == 0
    given = mapped.train()(images)
    assert given.shape == (40, 7 + 3)
    assert torch.equal(given[:, 7:], net(images))
    assert torch.equal(mapped.eval()(images), net(images))
    told = shown(images)
    assert torch.equal(told[:, :7], teacher.embedding(images))
    assert torch.equal(told[:, 7:], teacher(images))


def test_the_map_starts_as_the_least_squares_fit():
    net, teacher, batches = _pair(batches=25)
    mapped, _ = with_embeddings(net, teacher, batches)
    images = torch.cat([images for images, _ in batches])
    with torch.no_grad():
        x, y = net.embedding(images), teacher.embedding(images)
        ones = torch.ones(len(x), 1)
        best = torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution
        least = (torch.cat([x, ones], 1) @ best - y).square().mean()
        found = (mapped.train()(images)[:, :7] - y).square().mean()
    assert found == pytest.approx(float(least), rel=2e-3)
    assert found < 0.8 * (y - y.mean(0)).square().mean()  # there is something to fit


def test_nothing_is_left_behind():
    net, teacher, batches = _pair()
    before = digest(net), digest(teacher)
    mapped, _ = with_embeddings(net, teacher, batches)
    assert digest(mapped) != before[0]
    without_embeddings(mapped)
    assert digest(mapped) == before[0]
    assert type(mapped.head) is nn.Linear
    assert (digest(net), digest(teacher)) == before
    assert type(net.head) is type(teacher.head) is nn.Linear


def test_the_loss_is_the_distance_relative_to_the_teachers_spread():
    teacher = torch.tensor([[0.0, 4.0], [2.0, 0.0]])
    assert embedding_loss(teacher, teacher) == 0
    assert embedding_loss(teacher.mean(0).expand(2, 2), teacher) == pytest.approx(1.0)
    assert embedding_loss(teacher + 1, teacher) == pytest.approx(1 / 2.5)
    assert embedding_loss(teacher[:1] + 1, teacher[:1]) == pytest.approx(1.0)  # no spread


def test_the_last_layer_is_found_wherever_it_is_registered():
    net, _, batches = _pair()
    assert last_layer(net, batches[0][0][:1], "the network") == "head"


@pytest.mark.parametrize("who", ["the network", "the teacher"])
def test_a_network_that_ends_otherwise_is_refused(who):
    net, teacher, batches = _pair()
    if who == "the network":
        net = nn.Sequential(net, nn.Softmax(1))
    else:
        teacher = nn.Sequential(teacher, nn.Softmax(1))
    with pytest.raises(TrainingError, match=f"{who} does not end in a linear layer"):
        with_embeddings(net, teacher, batches)


def _settings(**changes: object) -> TrainStep:
    distill = {"weight": 0.9, "embedding": 1.0}
    given = {"epochs": 2, "lr": 0.05, "precision": "float32", "compile": "never"}
    return TrainStep.model_validate(given | {"distill": distill | changes})


def test_a_student_comes_nearer_to_what_its_teachers_last_layer_reads():
    data, teacher = TinyData(images=256), tiny_net(seed=5)
    start = tiny_net(seed=1, width=1, dropout=0.0)

    def features(net: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return net.norm(net.conv(data.images)).relu().flatten(1)

    def distance(net: nn.Module) -> float:
        x, y = features(net), features(teacher)
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        return float(embedding_loss(x @ torch.linalg.lstsq(x, y).solution, y))

    settings = _settings().model_copy(update={"epochs": 8, "lr": 0.005})
    with_it = finetune(start, data, settings, teacher=teacher).net
    assert [n for n, _ in with_it.named_parameters()] == [n for n, _ in start.named_parameters()]
    other = settings.distill.model_copy(update={"embedding": 0.0})
    plain = settings.model_copy(update={"distill": other})
    without = finetune(start, data, plain, teacher=teacher).net
    assert distance(with_it) < 0.95 * distance(without)


@pytest.mark.parametrize("views", [None, 2])
def test_a_killed_training_goes_on_with_the_same_map(tmp_path, views):
    settings, teacher = _settings(views=views), tiny_net(seed=5)
    whole = finetune(tiny_net(), TinyData(), settings, teacher=teacher)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_net(), Interrupted(1), settings, teacher=teacher, folder=tmp_path)
    resumed = finetune(tiny_net(), TinyData(), settings, teacher=teacher, folder=tmp_path)
    assert digest(resumed.net) == digest(whole.net)


def test_views_keep_the_embeddings_too():
    settings, teacher = _settings(views=1), tiny_net(seed=5)
    asked = []
    told = copy.deepcopy(teacher)
    told.register_forward_hook(lambda *_: asked.append(1))
    finetune(tiny_net(), TinyData(), settings, teacher=told)
    once = len(asked)
    asked.clear()
    finetune(tiny_net(), TinyData(), settings.model_copy(update={"epochs": 4}), teacher=told)
    assert len(asked) == once


def test_a_teacher_in_another_precision_is_asked_in_single():
    settings = _settings()
    found = finetune(tiny_net(), TinyData(), settings, teacher=tiny_net(seed=5).double())
    alike = finetune(tiny_net(), TinyData(), settings, teacher=tiny_net(seed=5))
    assert digest(found.net) == digest(alike.net)


def test_stages_that_join_later_do_not_go_with_it():
    with pytest.raises(ValidationError, match=r"unfreeze and distill\.embedding"):
        TrainStep(epochs=1, unfreeze=1, distill={"embedding": 1.0})


def test_training_for_int8_does_not_take_it():
    with pytest.raises(ValidationError, match=r"qat does not take distill\.embedding"):
        QatStep(epochs=1, distill={"embedding": 1.0})
