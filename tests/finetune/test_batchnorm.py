"""Batch-norm statistics become those of the given batches."""

import pytest
import torch
from tiny_training import tiny_net
from torch import nn

from bevel.core.errors import TrainingError
from bevel.finetune import recalibrate


def test_the_statistics_are_the_average_over_the_batches():
    net = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5)).eval()
    net[0].train()
    net[0].running_mean.fill_(99)
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


def test_no_batch_is_an_error_that_changes_nothing(snapshot):
    net = tiny_net()
    before = snapshot(net)
    with pytest.raises(TrainingError, match="at least one"):
        recalibrate(net, [])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_modes_come_back_when_a_batch_fails():
    net = tiny_net().train()
    with pytest.raises(RuntimeError):
        recalibrate(net, [torch.zeros(2, 7, 6, 6)])
    assert all(module.training for module in net.modules())
    assert net.norm.momentum == 0.1
