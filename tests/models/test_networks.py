"""bevel's own networks: sizes as in the literature, exportable, trainable."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bevel.models import BUILTIN, build

# Parameters of all layers; MACs of convolutions and linear layers for one 32x32 image.
# The literature's figures where it states them: resnet56 0.853 M / 125.5 M, resnet110 1.73 M /
# 253 M, vgg16_bn 14.98 M / 313 M, googlenet 6.15 M / 1.52 G, densenet40 1.04 M / 283 M; the last
# three agree best without batch norms. resnet20-44 and mobilenet_v1: our own count, against change.
SIZES = {
    "resnet20": (0.27, 40.6),
    "resnet32": (0.46, 68.9),
    "resnet44": (0.66, 97.2),
    "resnet56": (0.853, 125.5),
    "resnet110": (1.73, 252.9),
    "vgg16_bn": (14.98, 313.7),
    "googlenet": (6.15, 1522),
    "densenet40": (1.04, 282.9),
    "mobilenet_v1": (3.2, 46.4),
}


def counted(name, arguments=None):
    return sum(p.numel() for p in build(f"bevel:{name}", arguments).parameters())


def test_every_network_has_a_known_size():
    assert set(SIZES) == set(BUILTIN)


@pytest.mark.parametrize("name", SIZES)
def test_size_is_the_expected_one(name):
    net = build(f"bevel:{name}")
    norms = sum(
        p.numel()
        for m in net.modules()
        if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)
        for p in m.parameters()
    )
    params = sum(p.numel() for p in net.parameters())
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    expected_params, expected_macs = SIZES[name]
    without_norms = name in {"vgg16_bn", "googlenet", "densenet40"}
    assert (params - norms * without_norms) / 1e6 == pytest.approx(expected_params, rel=0.01)
    assert flops.get_total_flops() / 2e6 == pytest.approx(expected_macs, rel=0.002)


def test_exact_parameter_counts():
    assert counted("resnet20") == 269722
    assert counted("resnet56") == 853018
    assert counted("resnet110") == 1727962
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert counted("resnet20", {"shortcuts": "projection"}) == 269722 + projections


@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn", "densenet40", "mobilenet_v1"])
def test_exports_with_a_dynamic_batch(name):
    torch.manual_seed(0)
    net = build(f"bevel:{name}")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        net, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},)
    ).module()
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program(images), net(images))


def test_googlenet_exports():
    torch.export.export(build("bevel:googlenet"), (torch.zeros(2, 3, 32, 32),))


def test_digits_shape_and_arguments():
    net = build("bevel:resnet20", {"in_channels": 1, "num_classes": 7})
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    assert not net.training


def test_padded_shortcut_pads_both_sides():
    from bevel.models.resnet import PaddedShortcut

    x = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    y = PaddedShortcut(front=1, back=2, stride=2)(x)
    assert y.shape == (2, 6, 2, 2)
    assert torch.equal(y[:, 1:4], x[:, :, ::2, ::2])
    assert y[:, 0].abs().sum() == 0
    assert y[:, 4:].abs().sum() == 0


def test_mobilenet_at_224_with_width_and_stride():
    net = build("bevel:mobilenet_v1", {"num_classes": 1000, "input_stride": 2})
    assert sum(p.numel() for p in net.parameters()) == 4231976
    half = build("bevel:mobilenet_v1", {"num_classes": 3, "width": 0.5, "input_stride": 2})
    assert half.linear.in_features == 512
    with torch.no_grad():
        assert half(torch.zeros(1, 3, 224, 224)).shape == (1, 3)


def test_importing_models_imports_no_torch():
    code = "import sys, bevel.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
