"""Distillation of embeddings: which are compared in a pruned network, and what the loss is."""

import copy

import numpy as np
import pytest
import torch
from tiny_training import TinyData
from torch import nn

import bevel
from bevel.core import recipe as recipes
from bevel.core.errors import RecipeError, TrainingError
from bevel.core.steps import TrainStep
from bevel.finetuning import finetune
from bevel.finetuning.embedding import embeddings, find_embedding
from bevel.finetuning.state import digest
from bevel.finetuning.step import Execution, Stepper
from networks import conv, randomise

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two layers and a classifier; `tail` stands behind it."""

    def __init__(self, widths: tuple[int, int] = (6, 8), tail: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, widths[0]), conv(widths[0], widths[1]))
        self.linear = nn.Linear(widths[1], 3)
        self.tail = nn.Identity() if tail is None else tail

    def forward(self, images):
        return self.tail(self.linear(self.body(images).mean((2, 3))))


def seeded(seed: int, **arguments) -> nn.Module:
    return randomise(Net(**arguments), seed)


def settings(embedding: float = 1.0, **others) -> TrainStep:
    distill = {"weight": 0.0, "embedding": embedding}
    return TrainStep(**{"epochs": 1, "lr": 0.05, "distill": distill} | others)


@pytest.fixture
def batch(data):
    return data.images[:8], data.labels[:8]


@pytest.fixture
def pruned(batch):
    """A teacher, what pruning leaves of it, and the plan."""
    teacher = seeded(1)
    plan = bevel.plan_pruning(teacher, batch[0][:2], ratio=0.5, align=1)
    return teacher, bevel.prune(teacher, plan), plan


def test_the_features_compared_are_those_that_pruning_left(pruned, batch):
    teacher, net, plan = pruned
    where = find_embedding(net, teacher, batch[0][:1], plan.inputs())
    assert where.module == "linear"
    assert where.kept is not None
    assert torch.equal(teacher.linear.weight[:, where.kept], net.linear.weight)  # the very same
    with torch.no_grad(), embeddings(teacher, where) as taught:
        teacher(batch[0])
    expected = teacher.body(batch[0]).mean((2, 3))[:, plan.inputs()["linear"]]
    torch.testing.assert_close(where.of_teacher(taught[0]), expected)
    assert find_embedding(seeded(0), teacher, batch[0][:1]).kept is None


@pytest.mark.parametrize(
    ("net", "kept", "words"),
    [
        (seeded(0, widths=(6, 5)), None, "given 5 features and the teacher's 8, and which"),
        (seeded(0, widths=(6, 5)), {"linear": np.arange(4)}, "which they are is not known"),
        (seeded(0, widths=(6, 5)), {"linear": np.arange(5) + 4}, "which they are is not known"),
        (seeded(0, tail=nn.Linear(3, 3)), None, "do not end in a linear layer of the same name"),
        (seeded(0, tail=nn.Sigmoid()), None, "do not end in a linear layer of the same name"),
    ],
)
def test_what_cannot_be_compared_is_one_line(net, kept, words, data):
    with pytest.raises(TrainingError, match=words) as caught:
        finetune(net, data, settings(), teacher=seeded(1), kept=kept)
    assert "\n" not in str(caught.value)
    assert "set embedding: 0" in str(caught.value)


@pytest.mark.parametrize("known", [False, True])
def test_the_loss_of_a_step_has_the_distance_in_it(pruned, batch, known):
    teacher, net, plan = pruned
    where = find_embedding(net, teacher, batch[0][:1], plan.inputs())

    def loss(weight: float) -> float:
        stepper = Stepper(net, teacher, Execution(), settings(weight), CPU, (), where)
        answers = stepper.ask(batch[0]) if known else None
        return float(stepper.step(*batch, answers=answers))

    with torch.no_grad():
        taught = teacher.eval().body(batch[0]).mean((2, 3))[:, where.kept]
        own = copy.deepcopy(net).train().body(batch[0]).mean((2, 3))
    distance = float((own - taught).square().sum() / taught.square().sum())
    assert distance > 0.01
    assert loss(2.5) - loss(0.0) == pytest.approx(2.5 * distance, 1e-4)


def test_embeddings_come_nearer_to_the_teachers(data, pruned):
    _, _, plan = pruned
    teacher = finetune(seeded(1), data, TrainStep(epochs=4, lr=0.05)).net
    start = bevel.prune(teacher, plan)
    where = find_embedding(start, teacher, data.images[:1], plan.inputs())

    def distance(net: nn.Module) -> float:
        with torch.no_grad():
            taught = where.of_teacher(teacher.body(data.images).mean((2, 3)))
            own = net.body(data.images).mean((2, 3))
        return float((own - taught).square().sum() / taught.square().sum())

    plain, taught = (
        finetune(start, data, settings(weight, epochs=8), teacher=teacher, kept=plan.inputs()).net
        for weight in (0.0, 3.0)
    )
    assert distance(taught) < 0.7 * min(distance(plain), distance(start))


def test_known_answers_are_the_same_training_and_it_goes_on_bit_for_bit(tmp_path, pruned):
    teacher, net, plan = pruned

    class Counting(TinyData):
        epochs = 0

        def train_batches(self, *, seed, epoch):
            Counting.epochs += 1
            if Counting.epochs == 4 and self.stop:
                raise KeyboardInterrupt
            return super().train_batches(seed=seed, epoch=epoch)

        stop = False

    def train(folder: str, data: TinyData):
        wanted = settings(epochs=4, precision="float32", compile="never")
        wanted = wanted.model_copy(
            update={"distill": wanted.distill.model_copy(update={"views": 2})}
        )
        return finetune(
            net, data, wanted, teacher=teacher, folder=tmp_path / folder, kept=plan.inputs()
        )

    whole = train("whole", TinyData())
    interrupted = Counting()
    interrupted.stop = True
    with pytest.raises(KeyboardInterrupt):
        train("parts", interrupted)
    assert digest(train("parts", TinyData()).net) == digest(whole.net)
    assert sum(len(module._forward_pre_hooks) for module in whole.net.modules()) == 0
    assert "not compiled: distill.embedding reads linear by a hook" in whole.execution["notes"]


def recipe(**distill: object) -> dict:
    return {
        "version": 1,
        "name": "x",
        "model": {"name": "bevel:resnet20"},
        "data": {"name": "digits"},
        "steps": [{"finetune": {"epochs": 1, "distill": distill}}],
        "targets": [{"runtime": "onnxruntime"}],
    }


def test_the_recipe_takes_a_weight_from_zero_and_views_with_it():
    step = recipes.validate(recipe(embedding=2, views=4)).steps[0].finetune
    assert (step.distill.embedding, step.distill.views) == (2.0, 4)
    with pytest.raises(RecipeError, match=r"finetune\.distill\.embedding: "):
        recipes.validate(recipe(embedding=-1))
