"""What training does to a network, and what it leaves alone."""

import copy
import math

import pytest
import torch
from tiny_training import TinyData, tiny_net
from torch import nn

from bevel.core.errors import ModelError, TrainingError
from bevel.core.steps import ADAMW_LR, FinetuneStep, TrainStep
from bevel.data.metrics import evaluate
from bevel.finetuning import finetune
from bevel.finetuning.optimizer import averaged, learning_rate, optimizer
from bevel.finetuning.state import digest
from bevel.finetuning.unfreezing import stages
from bevel.models.fading import Fading


def test_it_learns_and_leaves_the_input_alone(data, net, snapshot):
    before = snapshot(net)
    random_state = torch.get_rng_state()
    trained = finetune(net, data, TrainStep(epochs=6, lr=0.05), seed=3)
    assert trained.history[-1]["validation_top1"] > 0.9
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    assert set(trained.history[0]) == {"epoch", "loss", "lr", "seconds", "validation_top1"}
    assert [row["epoch"] for row in trained.history] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert not net.training
    assert not trained.net.training
    assert type(trained.net) is type(net)


def test_the_seed_decides_the_result(data, net):
    settings = TrainStep(epochs=2)
    first, same, other = (finetune(net, data, settings, seed=seed) for seed in (1, 1, 2))
    assert digest(first.net) == digest(same.net) != digest(other.net)


def test_small_jobs_take_the_plain_way_without_measuring(data, net):
    execution = finetune(net, data, TrainStep(epochs=1)).execution
    assert (execution["dtype"], execution["memory_format"]) == ("float32", "contiguous")
    assert execution["compiled"] is False
    assert execution["reason"].startswith("short")
    assert len(execution["step_ms"]) == 1


def test_precision_is_pinned(data, net):
    execution = finetune(net, data, TrainStep(epochs=1, precision="bfloat16")).execution
    assert execution["dtype"] == "bfloat16"


@pytest.mark.parametrize("ema", [None, 0.9])
def test_what_fades_is_relu_after_half_of_the_steps(data, ema):
    torch.manual_seed(0)
    net = nn.Sequential(tiny_net(), Fading("silu"))
    shares: list[float] = []

    def note(module: nn.Module, _given: object) -> None:  # of the copy that learns
        if module.training:
            shares.append(float(module.share))

    net[1].register_forward_pre_hook(note)
    trained = finetune(net, data, TrainStep(epochs=4, lr=0.01, fade=0.5, ema=ema))
    steps = len(shares) // 4
    rising = [(number + 1) / (2 * steps) for number in range(2 * steps)]
    assert shares[-4 * steps :] == pytest.approx([*rising, *[1.0] * (2 * steps)])
    assert type(trained.net[1]) is nn.ReLU
    assert float(net[1].share) == 0


def test_the_head_learns_first_and_the_rest_joins(data):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, len(data.classes)),
    )  # fmt: skip
    net[3].bias.requires_grad_(False)  # the user's own wish stays
    assert [[type(m).__name__ for m in stage] for stage in stages(net)] == [
        ["Linear"], ["Conv2d", "BatchNorm2d"], ["BatchNorm2d"], ["Conv2d"],
    ]  # fmt: skip
    head_only = finetune(net, data, TrainStep(epochs=1, lr=0.1, unfreeze=1)).net
    changed = {
        name.split(".")[0]
        for name, value in head_only.state_dict().items()
        if not torch.equal(value, net.state_dict()[name])
    }
    assert changed == {"7"}
    assert all(p.requires_grad == (n != "3.bias") for n, p in head_only.named_parameters())
    whole = finetune(net, data, TrainStep(epochs=5, lr=0.1, unfreeze=4)).net
    assert not torch.equal(whole[0].weight, net[0].weight)
    assert not torch.equal(whole[1].running_mean, net[1].running_mean)
    assert torch.equal(whole[3].bias, net[3].bias)


def test_distillation_pulls_towards_the_teacher(data):
    teacher = tiny_net(seed=9)  # knows nothing: its answers differ from the labels
    settings = TrainStep(epochs=8, lr=0.05, distill={"weight": 1.0, "temperature": 2.0})
    plain = finetune(tiny_net(dropout=0.0), data, settings.model_copy(update={"distill": None}))
    taught = finetune(tiny_net(dropout=0.0), data, settings, teacher=teacher)

    def distance(net: nn.Module) -> float:
        with torch.no_grad():
            return float(
                (net(data.images).softmax(1) - teacher(data.images).softmax(1)).abs().mean()
            )

    assert distance(taught.net) < 0.3 * distance(plain.net)
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_loss_that_blows_up_is_an_error_that_says_what_to_change(data, net):
    with pytest.raises(TrainingError, match=r"no longer finite in epoch .*lower lr") as caught:
        finetune(net, data, TrainStep(epochs=20, lr=1e30, warmup_epochs=0))
    assert "\n" not in str(caught.value)


class Empty(TinyData):
    def train_batches(self, **_):
        return []


def test_unusable_networks_are_refused(data, net):
    with pytest.raises(ModelError, match="2 outputs and the data 3 classes"):
        finetune(tiny_net(classes=2), data, TrainStep(epochs=1))
    with pytest.raises(ModelError, match="shape"):
        finetune(nn.Sequential(nn.Conv2d(3, 4, 3)), data, TrainStep(epochs=1))
    with pytest.raises(ModelError, match=r"\(16, 4, 4, 4\)"):
        finetune(nn.Sequential(nn.Conv2d(1, 4, 3)), data, TrainStep(epochs=1))
    with pytest.raises(TrainingError, match="no teacher"):
        finetune(net, data, TrainStep(epochs=1, distill={}))
    with pytest.raises(TrainingError, match="nothing to train"):
        finetune(tiny_net().requires_grad_(False), data, TrainStep(epochs=1))
    with pytest.raises(ModelError, match="the same classes"):
        teacher = tiny_net(classes=5)
        finetune(net, data, TrainStep(epochs=1, distill={}), teacher=teacher)
    with pytest.raises(TrainingError, match="no batch"):
        finetune(net, Empty(), TrainStep(epochs=1))


def test_a_left_over_single_image_is_passed_over():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(36, 3)
            self.norm = nn.BatchNorm1d(3)  # refuses a batch of one

        def forward(self, images):
            return self.norm(self.linear(images.flatten(1)))

    trained = finetune(Flat(), TinyData(images=33), TrainStep(epochs=1))
    assert math.isfinite(trained.history[0]["loss"])


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 100, 10, 0.4) for step in range(100)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == rates[9] == pytest.approx(0.4)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[55] == pytest.approx(0.2)
    assert 0 < rates[-1] < 0.001
    assert learning_rate(0, 1, 5, 0.4) == pytest.approx(0.4)


def test_weight_decay_spares_norms_and_biases():
    net = tiny_net()
    groups = optimizer(net, TrainStep(epochs=1, weight_decay=0.1)).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(net.conv.weight), id(net.linear.weight)}
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))


def test_adamw_has_a_rate_of_its_own_and_betas_of_the_step():
    step = TrainStep(epochs=1, optimizer="adamw", momentum=0.8, weight_decay=0.05)
    assert step.lr == ADAMW_LR
    assert FinetuneStep(epochs=1, optimizer="adamw", lr=0.02).lr == 0.02
    assert TrainStep(epochs=1).lr == 0.1
    found = optimizer(tiny_net(), step)
    assert type(found) is torch.optim.AdamW
    assert found.defaults["betas"] == (0.8, 0.999)
    assert [group["weight_decay"] for group in found.param_groups] == [0.05, 0.0]


def test_large_features_throw_a_head_about_with_sgd_and_not_with_adamw(data):
    net = finetune(tiny_net(), data, TrainStep(epochs=2, lr=0.02)).net
    with torch.no_grad():  # the same function, but its head reads larger features
        net.norm.weight *= 100
        net.norm.bias *= 100
        net.linear.weight /= 100
    known = evaluate(net, data.batches("validation")).loss
    assert 0.2 < known < 0.5
    shaken = finetune(net, data, FinetuneStep(epochs=1)).history[0]["loss"]
    kept = finetune(net, data, FinetuneStep(epochs=1, optimizer="adamw")).history[0]["loss"]
    assert kept < known / 2
    assert shaken > 10 * known


def test_the_average_follows_weights_and_buffers():
    net = tiny_net()
    average = averaged(net, 0.99)
    average.update_parameters(net)
    with torch.no_grad():
        start = net.conv.weight.clone()
        net.conv.weight += 1
        net.norm.running_mean += 1
        net.norm.num_batches_tracked += 5
    average.update_parameters(net)
    share = 1 - 2 / 11  # (1 + n) / (10 + n) after one update
    assert torch.allclose(average.module.conv.weight, start + share)
    assert torch.allclose(average.module.norm.running_mean, torch.full((4,), share))
    assert average.module.norm.num_batches_tracked == 5


def test_the_average_is_what_is_returned(data, net):
    plain = finetune(net, data, TrainStep(epochs=2))
    mean = finetune(net, data, TrainStep(epochs=2, ema=0.9))
    assert digest(plain.net) != digest(mean.net)
    assert plain.history[0]["loss"] == mean.history[0]["loss"]


def test_a_checkpoint_with_folded_batch_norms_is_not_destroyed(data, net):
    trained = finetune(net, data, TrainStep(epochs=6, lr=0.05, weight_decay=0), seed=3).net
    norm = trained.norm
    with torch.no_grad():  # as a converter does it
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        trained.conv.weight.mul_(scale[:, None, None, None])
        trained.conv.bias.copy_((trained.conv.bias - norm.running_mean) * scale)
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        norm.weight.fill_(math.sqrt(1 + norm.eps))
        for numbers in (trained.conv.weight, trained.conv.bias, norm.bias):
            numbers.mul_(5)  # the same function, of features that are larger
        trained.linear.weight.div_(5)
    images = torch.cat([images for images, _ in data.batches("validation")])
    folded = copy.deepcopy(trained.state_dict())
    # Steps that move nothing: what is left is what training does to the network by itself.
    again = finetune(trained, data, TrainStep(epochs=15, lr=1e-9, weight_decay=0), seed=4).net
    with torch.no_grad():
        before, after = trained(images), again(images)
    assert (after - before).square().mean() < 0.01 * before.var()
    assert all(torch.equal(folded[name], value) for name, value in trained.state_dict().items())
