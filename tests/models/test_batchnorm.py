"""Batch-norm statistics become those of the given batches."""

import pytest
import torch
from torch import nn

from bevel.core.errors import TrainingError
from bevel.models.batchnorm import recalibrate, unfold
from networks import Plain, randomise


def test_the_statistics_are_the_average_over_the_batches():
    net = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5)).eval()
    net[0].train()
    net[0].running_mean.fill_(99)
    net[0].running_var.fill_(99)
    batches = [torch.randn(8, 2, 3, 3) * 2 + 1 for _ in range(4)]
    assert recalibrate(net, [(batch, torch.zeros(8)) for batch in batches]) == 1
    pixels = [batch.transpose(0, 1).flatten(1) for batch in batches]
    assert torch.allclose(
        net[0].running_mean, torch.stack([p.mean(1) for p in pixels]).mean(0), atol=1e-5
    )
    assert torch.allclose(
        net[0].running_var, torch.stack([p.var(1) for p in pixels]).mean(0), atol=1e-4
    )
    assert net[0].training
    assert not net[1].training
    assert net[0].momentum == 0.1
    assert net[0].weight.grad is None


def test_without_batch_norms_nothing_is_read():
    assert recalibrate(nn.Linear(2, 2), iter([])) == 0


def test_no_batch_is_an_error_that_changes_nothing():
    net = randomise(Plain())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(TrainingError, match="at least one"):
        recalibrate(net, [])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_modes_come_back_when_a_batch_fails():
    net = randomise(Plain()).train()
    with pytest.raises(RuntimeError):
        recalibrate(net, [torch.zeros(2, 7, 8, 8)])
    assert all(module.training for module in net.modules())
    assert net.features[0][1].momentum == 0.1


def test_a_folded_batch_norm_is_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    assert recalibrate(net, [torch.randn(8, 3, 4, 4)]) == 0
    assert bool((net[1].running_mean == 0).all())


def folded() -> nn.Sequential:
    """A trained network whose batch norms only add a bias any more."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    with torch.no_grad():
        for norm in (net[1], net[4]):
            norm.bias.uniform_(-3, 3)
        net[0].weight.mul_(5)
        net[4].running_mean.uniform_(-1, 1)
    return net.eval()


def test_folded_batch_norms_get_statistics_and_compute_what_they_did():
    net, batches = folded(), [torch.randn(32, 3, 12, 12) for _ in range(4)]
    with torch.no_grad():
        before, read = net(batches[0]), net[:4](torch.cat(batches))
    assert unfold(net, batches) == 2
    with torch.no_grad():
        assert torch.allclose(net(batches[0]), before, atol=1e-4)
        net.train()
        assert torch.allclose(net(batches[0]), before, atol=0.2 * float(before.std()))
    net = folded()
    unfold(net, batches)
    assert torch.allclose(net[4].running_mean, read.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(net[4].running_var, read.var((0, 2, 3), unbiased=False), rtol=1e-3)
    assert unfold(net, []) == 0
    assert recalibrate(net, batches) == 2


def test_batch_norms_that_were_never_trained_are_not_folded():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert unfold(net, [torch.randn(2, 3, 8, 8)]) == 0
    assert torch.equal(net[1].running_var, torch.ones(4))
