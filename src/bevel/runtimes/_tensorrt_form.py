"""The Quantize/Dequantize form that TensorRT takes: where the pairs go, and a check that they do.

From NVIDIA's guide to explicit quantization: zero points are 0, scales are constants, activations
have one scale and weights one per output channel; the inputs of convolutions and matrix products
are quantized, their outputs and biases are not; of a residual addition the branch that no
convolution ends in is quantized, so that the addition is fused into the convolution of the other
branch and gives int8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer

from bevel.core.errors import ExportError
from bevel.quantization.annotate import WEIGHTED, IntegerTypes, aten
from bevel.runtimes._onnx_forms import Graph, output_axis

POOLS = (aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.mean.dim)
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)

WEIGHTED_KINDS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
STANDARD_DOMAINS = ("", "ai.onnx")


class PairPlacer(Quantizer):  # type: ignore[misc]  # torchao is untyped
    """Quantizes the inputs of what TensorRT runs in int8, and no outputs.

    `types` must be symmetric.
    """

    def __init__(self, types: IntegerTypes) -> None:
        super().__init__()
        self.types = types

    def annotate(self, model: GraphModule) -> GraphModule:
        """Attach an annotation to each node that gets quantized inputs."""
        for node in model.graph.nodes:
            if node.target in WEIGHTED:
                activation, weight = node.args[0], node.args[1]
                _annotate(node, {activation: self.types.activations, weight: self.types.weights})
            elif node.target in POOLS:
                _annotate(node, {node.args[0]: self.types.activations})
            elif node.target in ADDITIONS:
                quantized = _quantized_branches(node)
                _annotate(node, dict.fromkeys(quantized, self.types.activations))
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: `check_structure` looks at what is written."""


def _annotate(node: Node, inputs: dict[Any, Any]) -> None:
    if inputs:
        node.meta["quantization_annotation"] = QuantizationAnnotation(
            input_qspec_map=inputs, _annotated=True
        )


def _quantized_branches(node: Node) -> list[Node]:
    """The operands of an addition but one convolution's; none where one is a constant."""
    operands = [a for a in node.args[:2] if isinstance(a, Node) and a.op != "get_attr"]
    if len(operands) != 2:
        return []
    fused = next((a for a in operands if a.target in WEIGHTED and len(a.users) == 1), None)
    return [operand for operand in operands if operand is not fused]


def check_structure(model: onnx.ModelProto) -> None:
    """Prove that the model has no Quantize or Dequantize that TensorRT rejects or cannot fuse.

    Raises:
        ExportError: the first node that breaks a rule, by name, and the rule.
    """
    foreign = next((n for n in model.graph.node if n.domain not in STANDARD_DOMAINS), None)
    if foreign is not None:
        raise ExportError(
            f"TensorRT would reject {foreign.op_type} '{foreign.name}': it is of the domain "
            f"{foreign.domain}, which it does not know"
        )
    inferred = onnx.shape_inference.infer_shapes(model)
    values = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    graph = Graph(model)
    for node in model.graph.node:
        problem = next(_problems(node, graph, kinds), None)
        if problem is not None:
            raise ExportError(f"TensorRT would reject {node.op_type} '{node.name}': {problem}")


def _problems(node: NodeProto, graph: Graph, kinds: dict[str, int]) -> Iterator[str]:
    """What is wrong with a node."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        yield from _scale_problems(node, graph)
    if node.op_type == "QuantizeLinear":
        yield from _quantize_problems(node, graph, kinds)
    elif node.op_type == "DequantizeLinear":
        yield from _dequantize_problems(node, graph)
    elif node.op_type in WEIGHTED_KINDS:
        yield from _weighted_problems(node, graph)
    elif node.op_type == "Add":
        yield from _addition_problems(node, graph)
    elif "Integer" in node.op_type or "QLinear" in node.op_type or "Dynamic" in node.op_type:
        yield "integer operators are written as Quantize and Dequantize around float ones"


def _scale_problems(node: NodeProto, graph: Graph) -> Iterator[str]:
    """Scales are positive constants, zero points are int8 zeros."""
    scale = graph.constant(node.input[1])
    if scale is None:
        yield "its scale is computed, not a constant"
    elif scale.dtype != np.float32 or not (np.isfinite(scale).all() and (scale > 0).all()):
        yield "its scale is not a positive float32 number"
    if len(node.input) < 3 or not node.input[2]:
        yield "it has no zero point, so its type is uint8"
        return
    zero = graph.constant(node.input[2])
    if zero is None:
        yield "its zero point is computed, not a constant"
    elif zero.dtype != np.int8:
        yield f"it is of type {zero.dtype}, not int8"
    elif zero.any():
        yield f"its zero point is {zero.reshape(-1)[np.flatnonzero(zero)[0]]}, not 0"


def _quantize_problems(node: NodeProto, graph: Graph, kinds: dict[str, int]) -> Iterator[str]:
    """An activation in float goes in, one scale, and Dequantize nodes of that scale read it."""
    if kinds.get(node.input[0], TensorProto.FLOAT) != TensorProto.FLOAT:
        name = TensorProto.DataType.Name(kinds[node.input[0]])
        yield f"it quantizes a tensor of type {name.lower()}, not a float activation"
    scale = graph.constant(node.input[1])
    if scale is not None and scale.size != 1:
        yield "an activation has one scale, not one per channel"
    readers = graph.readers(node.output[0])
    if not readers or any(reader.op_type != "DequantizeLinear" for reader in readers):
        yield "something other than Dequantize reads its integers"
    for reader in readers:
        other = graph.constant(reader.input[1])
        if scale is not None and other is not None and not np.array_equal(scale, other):
            yield f"'{reader.name}' dequantizes with another scale"


def _dequantize_problems(node: NodeProto, graph: Graph) -> Iterator[str]:
    """It undoes a Quantize, or restores the int8 weight of a convolution or matrix product."""
    stored = graph.constant(node.input[0])
    if stored is None:
        if graph.maker(node.input[0], "QuantizeLinear") is None:
            yield "it undoes no Quantize"
        return
    for reader in graph.readers(node.output[0]):
        if reader.op_type not in WEIGHTED_KINDS or list(reader.input).index(node.output[0]) != 1:
            yield f"it restores a constant of '{reader.name}' that is no weight, such as a bias"
            continue
        scale = graph.constant(node.input[1])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if scale is not None and scale.size > 1 and axis != output_axis(reader, stored.ndim):
            yield f"its scales lie along axis {axis}, which is not that of the output channels"


def _weighted_problems(node: NodeProto, graph: Graph) -> Iterator[str]:
    """Input and weight are both quantized, or neither; the bias never."""
    sources = [graph.maker(name, "DequantizeLinear") for name in node.input]
    if (sources[0] is None) != (sources[1] is None):
        which = "input" if sources[0] is None else "weight"
        yield f"its {which} is in float and the other operand in int8"
    if len(sources) > 2 and sources[2] is not None:
        yield "its bias is quantized"


def _addition_problems(node: NodeProto, graph: Graph) -> Iterator[str]:
    """Where a quantized convolution is added to something, that something is quantized."""
    convolutions = [name for name in node.input if _is_quantized_convolution(name, graph)]
    others = [name for name in node.input if name not in convolutions[:1]]
    for name in others if convolutions else []:
        constant = graph.constant(name) is not None
        if not constant and graph.maker(name, "DequantizeLinear") is None:
            yield "its residual input is in float, so it is not fused into the int8 convolution"


def _is_quantized_convolution(name: str, graph: Graph) -> bool:
    maker = graph.maker(name, "Conv")
    return (
        maker is not None
        and graph.only_reader(name, "Add") is not None
        and graph.maker(maker.input[1], "DequantizeLinear") is not None
    )
