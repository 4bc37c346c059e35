"""Layers fitted again: what a changed network lost comes back, as far as they can bring it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bevel
from bevel.core.errors import SurgeryError
from bevel.core.modes import evaluating
from bevel.core.progress import reporting
from bevel.models.batchnorm import recalibrate
from bevel.rewriting.reconstruction import reconstruct


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def error(net: nn.Module, original: nn.Module, x: Tensor) -> float:
    with evaluating(net), evaluating(original), torch.no_grad():
        found, wanted = net(x), original(x)
    return float((found - wanted).square().sum() / wanted.square().sum())


LAYERS = {
    "padded": lambda: nn.Conv2d(3, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(3, 6, (3, 5), stride=(2, 1), padding=(1, 2)),
    "dilated": lambda: nn.Conv2d(3, 6, 3, dilation=2),
    "grouped": lambda: nn.Conv2d(3, 6, 3, groups=3, bias=False),
    "pointwise": lambda: nn.Conv2d(3, 6, 1, stride=2),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_weights_that_were_changed_come_back(layer):
    torch.manual_seed(0)
    original = nn.Sequential(layer(), nn.ReLU(), nn.Flatten(2), nn.Linear(14 * 14, 4))
    with torch.no_grad():
        width = original[0](images(1)).flatten(2).shape[2]
    original[3] = nn.Linear(width, 4)
    changed = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    before = error(changed, original, images(8, seed=1))
    refits = reconstruct(changed, original, images(256), {})
    assert refits[0].module == "0"
    assert refits[0].after < 1e-4 < refits[0].before
    assert error(changed, original, images(8, seed=1)) < 0.02 * before
    assert torch.allclose(changed[0].weight, original[0].weight, atol=0.01)


def test_a_network_that_was_not_changed_is_left_alone():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    same = copy.deepcopy(original)
    assert reconstruct(same, original, images(4), {}) == []
    assert all(map(torch.equal, same.state_dict().values(), original.state_dict().values()))


def test_means_are_taken_by_the_batch_norm_behind_a_layer_without_bias():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    changed = nn.Sequential(Shifted(), *copy.deepcopy(original)[1:])
    changed[0].load_state_dict(original[0].state_dict(), strict=False)
    reconstruct(changed, original, images(64), {})
    assert error(changed, original, images(8, seed=1)) < 1e-6
    assert not torch.equal(changed[1].running_mean, original[1].running_mean)


class Shifted(nn.Conv2d):
    """A convolution of an image that is brighter than the original's."""

    def __init__(self) -> None:
        super().__init__(3, 6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x + 1, self.weight)


def test_it_finds_what_surgery_makes_of_a_layer():
    """A batch norm that is folded into its convolution changes what the convolution gives."""
    torch.manual_seed(0)
    original = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 8, 3), nn.Flatten(1)
    )
    with torch.no_grad():
        original[1].running_mean.uniform_(-1, 1)
        original[1].running_var.uniform_(0.5, 2)
        original[1].weight.uniform_(0.5, 2)
    batches = images(64).split(16)
    for rules in (["batch_norm"], ["batch_norm", "hardswish"], ["hardswish", "batch_norm"]):
        lite = bevel.surgery(original, batches[0][:2], rules=rules, calibration=batches)
        naive = bevel.surgery(original, batches[0][:2], rules=rules, calibration=batches, fit=False)
        apart = error(lite.net, original, images(16, seed=1))
        assert apart <= error(naive.net, original, images(16, seed=1))
        assert apart < (1e-10 if rules == ["batch_norm"] else 0.02)


def test_what_is_fitted_in_turn_beats_what_is_fitted_side_by_side():
    """Ten activations in a row: the errors of single sites add up unless layers mend them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(10):
        layers += [nn.Conv2d(12 if index else 3, 12, 3, padding=1), nn.Hardswish()]
    original = nn.Sequential(*layers, nn.Conv2d(12, 4, 3))
    with torch.no_grad():  # activations of the size that they have in trained networks
        for part in original:
            if isinstance(part, nn.Conv2d):
                part.weight.mul_(2.5)
    batches = images(64).split(16)
    lite = bevel.surgery(original, batches[0][:2], rules=["hardswish"], calibration=batches)
    naive = bevel.surgery(
        original, batches[0][:2], rules=["hardswish"], calibration=batches, fit=False
    ).net
    held_out = images(16, seed=1)
    assert error(lite.net, original, held_out) < 0.5 * error(naive, original, held_out)


def test_a_layer_that_is_too_wide_or_pads_otherwise_is_left():
    torch.manual_seed(0)
    original = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(4, 4, 3)
    )
    changed = copy.deepcopy(original)
    with torch.no_grad():
        changed[0].weight.mul_(1.1)
    refits = reconstruct(changed, original, images(64), {})
    assert [(refit.module, refit.after < refit.before) for refit in refits] == [
        ("0", False),
        ("2", True),
    ]


class Steps:
    """Notes what is reported of progress."""

    def __init__(self) -> None:
        self.totals: dict[str, int | None] = {}
        self.done: dict[str, int] = {}

    def start(self, label, total):
        self.totals[label] = total
        return lambda done: self.done.update({label: done})

    def finish(self, label):
        assert label in self.totals

    def note(self, message):
        raise AssertionError(message)


def test_progress_goes_on_with_each_layer():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 4, 1))
    steps = Steps()
    with reporting(steps):
        reconstruct(copy.deepcopy(original), original, images(4), {})
    assert steps.totals == {"fitting layers": 3}
    assert steps.done["fitting layers"] >= 2  # the last is done when the pass is


class Batches(nn.Sequential):
    """A network that takes one image or four."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 4:
            raise ValueError("at most four images")
        return super().forward(x)


def test_a_network_that_takes_no_large_batch_is_one_clear_line():
    net = Batches(nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.Conv2d(4, 4, 1))
    batches = images(8).split(4)
    with pytest.raises(SurgeryError, match=r"cannot be fitted on 8 images at once.*fit=False"):
        bevel.surgery(net, batches[0], rules=["hardswish"], calibration=batches)
    lite = bevel.surgery(net, batches[0], rules=["hardswish"], calibration=batches, fit=False)
    assert isinstance(lite.net[1], nn.ReLU)


@pytest.mark.parametrize("name", ["bevel:resnet20", "timm:mobilenetv3_small_050"])
def test_what_is_left_of_a_pruned_network_gives_what_it_gave(name):
    torch.manual_seed(0)
    original = bevel.build_model(name).eval()
    x, unseen = images(96), images(16, seed=1)
    recalibrate(original, [x])
    plan = bevel.plan_pruning(original, x[:2], criterion="random", budget={"macs": 0.7}, align=4)
    plain, mended = (bevel.prune(original, plan) for _ in range(2))
    recalibrate(plain, [x])
    refits = bevel.reconstruct(mended, original, x, kept=plan.outputs())
    assert sum(refit.after for refit in refits) < 0.8 * sum(refit.before for refit in refits)
    assert error(mended, original, unseen) < 0.5 * error(plain, original, unseen)


def test_a_plan_says_which_outputs_are_left():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    plan = bevel.plan_pruning(net, images(2), ratio=0.5, align=1)
    left = plan.outputs()
    pruned = bevel.prune(net, plan)
    assert set(left) == {"0", "1"}
    assert torch.equal(pruned[0].weight, net[0].weight[torch.tensor(left["0"])])
