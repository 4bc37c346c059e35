"""CIFAR ResNets, He et al. 2016, arXiv:1512.03385, section 4.2.

Their shortcuts are padded (option A), or projections where the size changes (option B). The
parameter names are those of the widely used public checkpoints: conv1, bn1,
layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2,shortcut}, linear.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from bevel.models.blocks import initialise


class PaddedShortcut(nn.Module):
    """Shortcut without parameters: subsample by the stride, add channels of zeros on both sides.

    (N, C, H, W) -> (N, front + C + back, ceil(H / stride), ceil(W / stride)).
    """

    channel_padding: ClassVar[tuple[str, str]] = ("front", "back")
    """Names of the attributes that count channels; pruning updates them."""

    def __init__(self, front: int, back: int, stride: int) -> None:
        super().__init__()
        self.front = front
        self.back = back
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.front, self.back))

    def extra_repr(self) -> str:
        """The attributes, for printing."""
        return f"front={self.front}, back={self.back}, stride={self.stride}"


Shortcuts = Literal["padded", "projection"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, shortcuts: Shortcuts = "padded"
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride == 1 and in_channels == channels:
            return
        if shortcuts == "projection":
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )
        else:
            front = (channels - in_channels) // 2
            self.shortcut = PaddedShortcut(front, channels - in_channels - front, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """6n + 2 layers in three stages of 16, 32 and 64 channels; (N, C, H, W) -> (N, num_classes)."""

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_channels: int = 3,
        shortcuts: Shortcuts = "padded",
    ) -> None:
        super().__init__()
        if shortcuts not in get_args(Shortcuts):
            raise ValueError(f"shortcuts are {' or '.join(get_args(Shortcuts))}, got {shortcuts!r}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks, 1, shortcuts)
        self.layer2 = _stage(16, 32, blocks, 2, shortcuts)
        self.layer3 = _stage(32, 64, blocks, 2, shortcuts)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(64, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


def _stage(
    in_channels: int, channels: int, blocks: int, stride: int, shortcuts: Shortcuts
) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride, shortcuts)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def resnet20(
    num_classes: int = 10, in_channels: int = 3, shortcuts: Shortcuts = "padded"
) -> ResNet:
    """0.27 M parameters, 41 M MACs at 32x32."""
    return ResNet(3, num_classes, in_channels, shortcuts)


def resnet32(
    num_classes: int = 10, in_channels: int = 3, shortcuts: Shortcuts = "padded"
) -> ResNet:
    """0.46 M parameters, 69 M MACs at 32x32."""
    return ResNet(5, num_classes, in_channels, shortcuts)


def resnet44(
    num_classes: int = 10, in_channels: int = 3, shortcuts: Shortcuts = "padded"
) -> ResNet:
    """0.66 M parameters, 97 M MACs at 32x32."""
    return ResNet(7, num_classes, in_channels, shortcuts)


def resnet56(
    num_classes: int = 10, in_channels: int = 3, shortcuts: Shortcuts = "padded"
) -> ResNet:
    """0.85 M parameters, 125 M MACs at 32x32."""
    return ResNet(9, num_classes, in_channels, shortcuts)


def resnet110(
    num_classes: int = 10, in_channels: int = 3, shortcuts: Shortcuts = "padded"
) -> ResNet:
    """1.73 M parameters, 253 M MACs at 32x32."""
    return ResNet(18, num_classes, in_channels, shortcuts)
