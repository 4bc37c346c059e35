"""What LiteRT and ExecuTorch share: XNNPACK runs their files, so both want the same integers.

Activations and weights are int8, with a zero point for activations. Hard swish is written in float
between two conversions: XNNPACK merges the three into one lookup in a table, while it has no kernel
for an integer hard swish, which LiteRT then runs itself, slowly. Hard sigmoid becomes a ReLU6 where
that can be; elsewhere it is in float: its tensors are tiny where networks use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    SharedQuantizationSpec,
)

from bevel.core.recipe import Quantization
from bevel.quantization.annotate import FusingQuantizer, IntegerTypes, split_gates
from bevel.quantization.keeping import ANNOTATION
from bevel.quantization.ranges import s8s8
from bevel.quantization.weights import clip_hard_sigmoids

aten = torch.ops.aten

SIGMOID_SCALE = 1 / 256
"""Integer sigmoids have this scale and zero point -128, by the LiteRT specification."""

SPLIT = {aten.silu.default: aten.sigmoid.default, aten.silu_.default: aten.sigmoid.default}
"""Written as x * gate(x): both have integer kernels."""

REWRITES = (clip_hard_sigmoids,)
"""What is done to a network before its integers are chosen."""


def a8w8(observer: str) -> IntegerTypes:
    """int8 activations, per tensor, with a zero point; int8 weights, per channel, symmetric."""
    types = s8s8(observer)
    return IntegerTypes(
        activations=replace(types.activations, qscheme=torch.per_tensor_affine),
        weights=types.weights,
    )


class XnnpackQuantizer(FusingQuantizer):
    """Annotates the operators that XNNPACK has integer kernels for, as a runtime reaches them.

    Args:
        observer: what the range of an activation is: minmax, percentile or mse.
        in_float: operators that the runtime does not run in integers.
        same_scale: operators whose output must have the scale of their input.
    """

    def __init__(
        self, observer: str, *, in_float: Sequence[Any] = (), same_scale: Sequence[Any] = ()
    ) -> None:
        super().__init__(a8w8(observer))
        self._in_float, self._same_scale = (aten.hardsigmoid.default, *in_float), same_scale

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Write SiLU as the product that it is."""
        split_gates(model, SPLIT)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate as for any fusing runtime, then what is particular here."""
        super().annotate(model)
        for node in model.graph.nodes:
            if ANNOTATION not in node.meta:
                continue
            if node.target in self._in_float:
                del node.meta[ANNOTATION]
            elif node.target in self._same_scale:
                self._share(node, node.args[0])
            elif node.target is aten.cat.default:
                self._join(node)
            elif node.target is aten.sigmoid.default:
                node.meta[ANNOTATION] = replace(
                    node.meta[ANNOTATION], output_qspec=_sigmoid_output()
                )
        return model

    def _join(self, node: Node) -> None:
        """One scale for all that is joined: then joining is a copy."""
        first, *others = dict.fromkeys(node.args[0])  # type: ignore[arg-type]
        shared = SharedQuantizationSpec((first, node))
        inputs = {first: self.types.activations, **dict.fromkeys(others, shared)}
        node.meta[ANNOTATION] = QuantizationAnnotation(
            input_qspec_map=inputs, output_qspec=shared, _annotated=True
        )


def _sigmoid_output() -> FixedQParamsQuantizationSpec:
    return FixedQParamsQuantizationSpec(
        dtype=torch.int8,
        scale=SIGMOID_SCALE,
        zero_point=-128,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
    )


def name_quantizer(quantizer: str, options: Quantization) -> str:
    """How an artifact names what made its integers."""
    return f"{quantizer}: int8 activations per tensor ({options.ranges}), int8 weights per channel"
