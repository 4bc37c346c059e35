"""VGG-16 with batch norm in its CIFAR form (Simonyan and Zisserman 2015; as pruned by HRank, CHIP).

Thirteen 3x3 convolutions as in arXiv:1409.1556, configuration D, then a classifier of two linear
layers with 512 hidden units in place of the three with 4096.
"""

from __future__ import annotations

from torch import Tensor, nn

from bevel.models.blocks import ConvNormReLU, initialise

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the convolutions; a 2x2 max pooling lies between the stages."""


class VGG(nn.Module):
    """(N, C, H, W) -> (N, num_classes), H and W at least 16."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, stage in enumerate(STAGES):
            if number > 0:
                layers.append(nn.MaxPool2d(2))
            for channels in stage:
                layers.extend(ConvNormReLU(in_channels, channels, 3, bias=True))
                in_channels = channels
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(512, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(inplace=True),
            nn.Linear(512, num_classes),
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.features(x))))  # type: ignore[no-any-return]


def vgg16_bn(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """14.98 M parameters, 314 M MACs at 32x32."""
    return VGG(num_classes, in_channels)
