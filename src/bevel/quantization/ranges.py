"""How ranges become scales: the observers that calibration runs.

Activations take the smallest and largest value seen: the histogram observer is slower to calibrate
and was no more accurate on the networks tried, and less so on MobileNetV2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from bevel.quantization.annotate import IntegerTypes

SMALLEST_SCALE = 2.0**-12
"""Least weight scale of a channel, as a fraction of the layer's largest."""


class ChannelObserver(PerChannelMinMaxObserver):  # type: ignore[misc]  # torchao is untyped
    """One symmetric scale per output channel, none of them vanishingly small.

    A runtime stores a bias as int32 in units of input scale times weight scale. A channel whose
    weights are all but zero would make that unit so small that its bias overflows.
    """

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, each of shape (channels,)."""
        scale, zero_point = super().calculate_qparams()
        return torch.clamp(scale, min=float(scale.max()) * SMALLEST_SCALE), zero_point


def u8s8() -> IntegerTypes:
    """uint8 activations, per tensor, with a zero point; int8 weights, per channel, symmetric."""
    return IntegerTypes(
        activations=QuantizationSpec(
            dtype=torch.uint8,
            observer_or_fake_quant_ctr=MinMaxObserver,
            quant_min=0,
            quant_max=255,
            qscheme=torch.per_tensor_affine,
        ),
        weights=QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=ChannelObserver,
            quant_min=-127,
            quant_max=127,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        ),
    )
