"""Say which tensors of an exported graph become int8, in the form that fusing runtimes expect.

Runtimes with a Quantize/Dequantize format run an operator in integers when all its inputs come
from Dequantize nodes and its output goes into a Quantize node. So every operator that has an
integer kernel gets quantized inputs and a quantized output; data movement keeps its input's
scale, except where it joins several; an activation function is fused into the operator before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from bevel.quantization.keeping import drop_annotations

aten = torch.ops.aten

WEIGHTED = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default)
FUSED_ACTIVATIONS = (
    aten.relu.default,
    aten.relu_.default,
    aten.relu6.default,
    aten.relu6_.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.clamp.default,
)
ARITHMETIC = (aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor)
OWN_SCALE = (
    aten.adaptive_avg_pool2d.default,
    aten.avg_pool2d.default,
    aten.mean.dim,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.leaky_relu.default,
    aten.leaky_relu_.default,
)
MOVEMENT = (
    aten.max_pool2d.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.upsample_nearest2d.vec,
)


GATES = {
    aten.silu.default: aten.sigmoid.default,
    aten.silu_.default: aten.sigmoid.default,
    aten.hardswish.default: aten.hardsigmoid.default,
    aten.hardswish_.default: aten.hardsigmoid.default,
}
"""Activation functions that are x * gate(x): gate and product have integer kernels, they do not."""


@dataclass(frozen=True)
class IntegerTypes:
    """How activations and weights become integers, as a runtime is fast with it."""

    activations: QuantizationSpec
    weights: QuantizationSpec


class FusingQuantizer(Quantizer):  # type: ignore[misc]  # torchao is untyped
    """Annotates every operator that has an integer kernel.

    Args:
        types: what activations and weights become.
        keep_float: module names (globs) that stay in float, with all that they hold.
    """

    def __init__(self, types: IntegerTypes, keep_float: Sequence[str] = ()) -> None:
        super().__init__()
        self.types, self.keep_float = types, tuple(keep_float)

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Write SiLU and hard swish as the product that they are."""
        split_gates(model)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Attach an annotation to each node, in graph order."""
        nodes = [node for node in model.graph.nodes if node.op == "call_function"]
        fused: set[Node] = set()
        for node in nodes:
            if node in fused:
                continue
            if node.target in WEIGHTED:
                fused |= self._compute(node, {_tensor(node, 1): self.types.weights}, [0])
            elif node.target in ARITHMETIC and self._both_activations(node):
                fused |= self._compute(node, {}, [0, 1])
            elif node.target in OWN_SCALE:
                self._compute(node, {}, [0], fuse=False)
            elif node.target is aten.cat.default:
                # No shared scale: with a negative input among them, the zero point would not cut
                # at 0, and a convolution with a ReLU before it would run in float.
                own = dict.fromkeys(node.args[0], self.types.activations)
                _annotate(node, own, self.types.activations)
            elif node.target in MOVEMENT:
                self._share(node, _tensor(node, 0))
        drop_annotations(model, self.keep_float)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: every annotation stands by itself."""

    def _compute(
        self,
        node: Node,
        weights: dict[Node, QuantizationSpec],
        inputs: Sequence[int],
        fuse: bool = True,
    ) -> set[Node]:
        """Quantize an operator's inputs, and its output behind the activation that follows it."""
        specs = {_tensor(node, index): self.types.activations for index in inputs}
        after = _only_user(node) if fuse else None
        activation = after if after is not None and after.target in FUSED_ACTIVATIONS else None
        _annotate(node, {**specs, **weights}, None if activation else self.types.activations)
        if activation is None:
            return set()
        _annotate(activation, {}, self.types.activations)
        return {activation}

    def _share(self, node: Node, source: Node) -> None:
        """Input and output of data movement have one scale."""
        shared = SharedQuantizationSpec((source, node))
        _annotate(node, {source: self.types.activations}, shared)

    @staticmethod
    def _both_activations(node: Node) -> bool:
        """Whether both operands are computed tensors: constants and numbers stay as they are."""
        operands = node.args[:2]
        return all(
            isinstance(operand, Node) and operand.op in ("call_function", "placeholder")
            for operand in operands
        )


def split_gates(model: GraphModule, gates: Mapping[Any, Any] = GATES) -> None:
    """Replace each activation function in `gates` by its gate and a product, in place."""
    for node in list(model.graph.nodes):
        if node.target not in gates:
            continue
        source = _tensor(node, 0)
        if str(node.target).endswith("_.default") and len(source.users) > 1:
            continue  # others may read what it overwrites
        with model.graph.inserting_before(node):
            gate = model.graph.call_function(gates[node.target], (source,))
            product = model.graph.call_function(aten.mul.Tensor, (source, gate))
        gate.meta, product.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(product)
        model.graph.erase_node(node)
    model.recompile()


def _tensor(node: Node, index: int) -> Node:
    argument = node.args[index]
    assert isinstance(argument, Node), f"{node} has no tensor as argument {index}"  # noqa: S101
    return argument


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _annotate(node: Node, inputs: dict[Node, object], output: object) -> None:
    node.meta["quantization_annotation"] = QuantizationAnnotation(
        input_qspec_map=inputs, output_qspec=output, _annotated=True
    )
