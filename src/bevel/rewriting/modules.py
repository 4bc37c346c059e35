"""What surgery puts in place of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevel.models.fading import Fading


class ChannelScale(nn.Module):
    """Multiplies each channel by a number of its own: (N, C, ...) with a weight of (C,)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x times its channels' numbers."""
        return x * self.weight.reshape(-1, *[1] * (x.ndim - 2))


class ChannelsLastBatchNorm(nn.BatchNorm2d):
    """Batch norm of (N, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised, in the same order of axes."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PooledLinear(nn.Module):
    """The mean over all positions, then a linear layer.

    Args:
        in_features: channels of what is pooled.
        out_features: size of the vector.
        of_images: whether images (N, C, H, W) are pooled, or tokens (N, positions, C).
        keep_axis: whether the result is (N, 1, out_features), or (N, out_features).
    """

    def __init__(
        self, in_features: int, out_features: int, *, of_images: bool, keep_axis: bool
    ) -> None:
        super().__init__()
        self.of_images, self.keep_axis = of_images, keep_axis
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """The vector of each image."""
        mean = F.adaptive_avg_pool2d(x, 1).flatten(1) if self.of_images else x.mean(1)
        vector: Tensor = self.linear(mean)
        return vector[:, None] if self.keep_axis else vector


class SeparableConv2d(nn.Sequential):
    """A convolution of each channel by itself, then one of size 1 across channels.

    Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
    Applications", 2017.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: list[int], *, bias: bool, **how: Any
    ) -> None:
        super().__init__()
        size = (kernel_size[0], kernel_size[1])
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, size, groups=in_channels, bias=False, **how
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=bias)


MODULES: Mapping[str, Callable[..., nn.Module]] = {
    "AlphaDropout": nn.AlphaDropout,
    "AvgPool2d": nn.AvgPool2d,
    "BatchNorm2d": nn.BatchNorm2d,
    "ChannelScale": ChannelScale,
    "ChannelsLastBatchNorm": ChannelsLastBatchNorm,
    "Conv2d": nn.Conv2d,
    "Dropout": nn.Dropout,
    "Dropout1d": nn.Dropout1d,
    "Dropout2d": nn.Dropout2d,
    "Dropout3d": nn.Dropout3d,
    "Fading": Fading,
    "Identity": nn.Identity,
    "MaxPool2d": nn.MaxPool2d,
    "PooledLinear": PooledLinear,
    "ReLU": nn.ReLU,
    "SeparableConv2d": SeparableConv2d,
}
"""What a module can become; nothing else is made from a log."""
