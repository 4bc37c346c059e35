"""What the CIFAR networks share: convolution + batch norm + ReLU, and initialisation."""

from __future__ import annotations

from torch import nn


class ConvNormReLU(nn.Sequential):
    """Convolution -> batch norm -> ReLU, (N, in, H, W) -> (N, out, H', W')."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel,
                stride=stride,
                padding=kernel // 2,
                groups=groups,
                bias=bias,
            ),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


def initialise(net: nn.Module) -> None:
    """Initialise in place for ReLU networks (He et al. 2015, arXiv:1502.01852).

    Convolutions: normal, variance 2 / fan-out. Batch norms: 1 and 0. Linear layers: normal,
    standard deviation 0.01. All biases: 0.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
