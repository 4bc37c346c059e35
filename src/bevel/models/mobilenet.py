"""MobileNetV1 (Howard et al. 2017, arXiv:1704.04861), for CIFAR by default.

At 32x32 the first convolution keeps the resolution; `input_stride=2` is the ImageNet form.
"""

from __future__ import annotations

from torch import Tensor, nn

from bevel.core.errors import ModelError
from bevel.models.blocks import ConvNormReLU, initialise

BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)
"""Output channels at width 1 and stride of the depthwise separable blocks (table 1)."""


class SeparableBlock(nn.Sequential):
    """Depthwise 3x3, then pointwise 1x1, each with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(
            ConvNormReLU(in_channels, in_channels, 3, stride=stride, groups=in_channels),
            ConvNormReLU(in_channels, out_channels, 1),
        )


class MobileNetV1(nn.Module):
    """(N, C, H, W) -> (N, num_classes)."""

    def __init__(self, num_classes: int, in_channels: int, width: float, input_stride: int) -> None:
        super().__init__()
        channels = _scaled(32, width)
        self.stem = ConvNormReLU(in_channels, channels, 3, stride=input_stride)
        blocks: list[nn.Module] = []
        for base, stride in BLOCKS:
            blocks.append(SeparableBlock(channels, _scaled(base, width), stride))
            channels = _scaled(base, width)
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flatten(self.pool(self.features(self.stem(x)))))  # type: ignore[no-any-return]


def _scaled(channels: int, width: float) -> int:
    """Channels times width, in multiples of 8: runtimes compute in vectors of that size."""
    return max(8, round(channels * width / 8) * 8)


def mobilenet_v1(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, input_stride: int = 1
) -> MobileNetV1:
    """Width 1: 3.2 M parameters, 46 M MACs at 32x32; 4.2 M, 569 M at 224 (1000 classes, stride 2).

    Args:
        num_classes: outputs.
        in_channels: channels of the image.
        width: multiplier of all channel counts (0.25, 0.5, 0.75 and 1 in the paper).
        input_stride: stride of the first convolution; 2 for large images.

    Raises:
        ModelError: width or input_stride is out of range.
    """
    if width <= 0 or input_stride not in (1, 2):
        raise ModelError(
            f"mobilenet_v1 needs width > 0 and input_stride 1 or 2, got width={width} "
            f"and input_stride={input_stride}"
        )
    return MobileNetV1(num_classes, in_channels, width, input_stride)
