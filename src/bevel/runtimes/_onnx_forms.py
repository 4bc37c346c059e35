"""Other forms of the same computation in an ONNX file, which runtimes have faster kernels for."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter notes the modules that a node comes from."""

ROUNDING = 1e-5
"""Two scales are the same if they differ by no more than this share."""


class Graph:
    """The main graph of a model, with who makes and who reads each tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.proto = model.graph
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._outputs = {value.name for value in model.graph.output}

    def maker(self, name: str, kind: str) -> NodeProto | None:
        """The node of that kind whose output the tensor is."""
        node = self._makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def only_reader(self, name: str, kind: str) -> NodeProto | None:
        """The node of that kind which alone reads the tensor."""
        readers = self._readers.get(name, [])
        alone = len(readers) == 1 and name not in self._outputs
        return readers[0] if alone and readers[0].op_type == kind else None

    def readers(self, name: str) -> list[NodeProto]:
        """All nodes that read the tensor."""
        return self._readers.get(name, [])

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a stored tensor."""
        tensor = self._initializers.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def store(self, value: np.ndarray, name: str) -> str:
        """Add a constant; returns its name."""
        if name not in self._initializers:
            tensor = numpy_helper.from_array(value, name)
            self.proto.initializer.append(tensor)
            self._initializers[name] = tensor
        return name

    def insert(self, before: NodeProto, *nodes: NodeProto) -> None:
        """Put nodes where they run before another one."""
        index = next(i for i, node in enumerate(self.proto.node) if node is before)
        for offset, node in enumerate(nodes):
            self.proto.node.insert(index + offset, node)
            self._makers.update(dict.fromkeys(node.output, node))

    def drop_unread(self) -> None:
        """Remove nodes and constants that nothing reads any more."""
        while True:
            read = set(read_by(self.proto.node)) | self._outputs
            dead = [n for n in self.proto.node if not read.intersection(n.output)]
            if not dead:
                break
            for node in dead:
                self.proto.node.remove(node)
        for tensor in [t for t in self.proto.initializer if t.name not in read]:
            self.proto.initializer.remove(tensor)


def read_by(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """Names of the tensors that nodes read, the graphs inside them included."""
    for node in nodes:
        yield from node.input
        for found in node.attribute:
            if found.type == onnx.AttributeProto.GRAPH:
                yield from read_by(found.g.node)


def attribute(node: NodeProto, name: str, default: int | float) -> int | float:
    """A number among the node's attributes."""
    for found in node.attribute:
        if found.name == name:
            value: int | float = helper.get_attribute_value(found)
            return value
    return default


def pool_globally(model: onnx.ModelProto) -> None:
    """ReduceMean over height and width -> GlobalAveragePool.

    torch's exporter writes a global pooling as the former. Only the latter has integer kernels
    in ONNX Runtime, and keeps its blocked layout.
    """
    graph = Graph(model)
    for node in model.graph.node:
        if node.op_type != "ReduceMean" or len(node.input) != 2:
            continue
        axes = graph.constant(node.input[1])
        # Counted from the end, they are height and width of a 4D tensor only with axes 2 and 3.
        rank = _rank(model, node.input[0])
        if axes is None or rank != 4 or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            continue
        if attribute(node, "keepdims", 1):
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]
    graph.drop_unread()


def _rank(model: onnx.ModelProto, name: str) -> int | None:
    for value in [*model.graph.value_info, *model.graph.input]:
        if value.name == name and value.type.tensor_type.HasField("shape"):
            return len(value.type.tensor_type.shape.dim)
    return None


def saturate_hard_sigmoids(model: onnx.ModelProto) -> None:
    """Dequantize, HardSigmoid, Quantize -> Dequantize with another scale, Add, Quantize.

    clip(a x + b, 0, 1) = a x + b where the uint8 that follows saturates within 0..1 anyway; a goes
    into the scale of x. ONNX Runtime adds in integers and has no integer hard sigmoid.
    """
    graph = Graph(model)
    for node in [n for n in model.graph.node if n.op_type == "HardSigmoid"]:
        source = graph.maker(node.input[0], "DequantizeLinear")
        result = graph.only_reader(node.output[0], "QuantizeLinear")
        if source is None or result is None or not _within_one(graph, result):
            continue
        scale = graph.constant(source.input[1])
        if scale is None:
            continue
        slope = np.float32(attribute(node, "alpha", 0.2))
        offset = np.float32(attribute(node, "beta", 0.5))
        base = node.name or node.output[0]
        scaled = graph.store((scale * slope).astype(np.float32), f"{base}_scale")
        one = graph.store(np.array(1, dtype=np.uint8), "saturate_one")
        none = graph.store(np.array(0, dtype=np.uint8), "saturate_zero")
        step = graph.store(np.array(offset), f"{base}_offset")
        zero = list(source.input[2:3])
        graph.insert(
            node,
            _dequantize([source.input[0], scaled, *zero], f"{base}_x"),
            _dequantize([one, step, none], f"{base}_b"),
        )
        node.op_type = "Add"
        del node.input[:], node.attribute[:]
        node.input.extend([f"{base}_x", f"{base}_b"])
    graph.drop_unread()


def _within_one(graph: Graph, quantize: NodeProto) -> bool:
    """Whether a Quantize node to uint8 cuts what lies outside 0..1."""
    if len(quantize.input) < 3:
        return False
    scale, zero = (graph.constant(name) for name in quantize.input[1:3])
    if scale is None or zero is None or zero.dtype != np.uint8 or zero.size != 1:
        return False
    return int(zero.reshape(())) == 0 and float(scale.reshape(())) * 255 <= 1 + ROUNDING


def pad_in_integers(model: onnx.ModelProto) -> None:
    """Dequantize, Pad with 0, Quantize of the same scale -> Pad of the integers with their zero."""
    graph = Graph(model)
    for node in [n for n in model.graph.node if n.op_type == "Pad"]:
        source = graph.maker(node.input[0], "DequantizeLinear")
        result = graph.only_reader(node.output[0], "QuantizeLinear")
        filled = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if source is None or result is None or (filled is not None and filled.any()):
            continue
        pairs = [
            (graph.constant(a), graph.constant(b))
            for a, b in zip(source.input[1:], result.input[1:], strict=True)
        ]
        if len(pairs) != 2 or not all(
            a is not None and b is not None and np.array_equal(a, b) for a, b in pairs
        ):
            continue
        axes = list(node.input[3:])
        del node.input[2:]
        node.input.extend([source.input[2], *axes])
        node.input[0], node.output[0] = source.input[0], result.output[0]
        model.graph.node.remove(result)
    graph.drop_unread()


def shield_float_layers(model: onnx.ModelProto) -> None:
    """Between Dequantize and a layer with float weights: half the scale, and a product with 2.

    ONNX Runtime quantizes the weights of such a layer by itself where integers come in and go out,
    so a layer that was to stay in float would not. It does not look behind a product, and halving
    and doubling are exact.
    """
    graph = Graph(model)
    for node in list(model.graph.node):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        source = graph.maker(node.input[0], "DequantizeLinear")
        scale = graph.constant(source.input[1]) if source is not None else None
        if source is None or scale is None or graph.constant(node.input[1]) is None:
            continue
        base = node.name or node.output[0]
        half = graph.store((scale / 2).astype(np.float32), f"{base}_half_scale")
        two = graph.store(np.array(2, dtype=np.float32), "shield_two")
        graph.insert(
            node,
            _dequantize([source.input[0], half, *source.input[2:3]], f"{base}_half"),
            helper.make_node("Mul", [f"{base}_half", two], [f"{base}_x"], name=f"{base}_x"),
        )
        node.input[0] = f"{base}_x"
    graph.drop_unread()


def pack_weights(model: onnx.ModelProto, keep: Sequence[str] = ()) -> None:
    """Store the weights of Conv, Gemm and MatMul as int8, one symmetric scale per output channel.

    They become float again by Cast and Mul, which every runtime computes once, while it loads the
    file. ONNX Runtime does not do that with DequantizeLinear, and runs such a file slower.

    Args:
        model: a float model; changed in place.
        keep: module names (globs) whose weights stay in float.
    """
    graph = Graph(model)
    spared = set(nodes_of(model, keep))
    packed: set[str] = set()
    for node in list(model.graph.node):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        name = node.input[1]
        weight = graph.constant(name)
        if weight is None or weight.dtype != np.float32 or weight.ndim < 2:
            continue
        if node.name in spared or name in packed:
            continue
        packed.add(name)
        _pack(graph, node, name, weight)


def _pack(graph: Graph, node: NodeProto, name: str, weight: np.ndarray) -> None:
    others = tuple(axis for axis in range(weight.ndim) if axis != output_axis(node, weight.ndim))
    scale = np.abs(weight).max(axis=others, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    integers = np.round(weight / scale).astype(np.int8)
    stored, float_name = f"{name}.int8", f"{name}.float"
    graph.insert(
        node,
        helper.make_node("Cast", [stored], [float_name], name=float_name, to=TensorProto.FLOAT),
        helper.make_node("Mul", [float_name, f"{name}.scale"], [name], name=f"{name}.restored"),
    )
    graph.store(integers, stored)
    graph.store(scale.astype(np.float32), f"{name}.scale")
    graph.proto.initializer.remove(next(t for t in graph.proto.initializer if t.name == name))


def output_axis(node: NodeProto, rank: int) -> int:
    """The axis of a weight that lies along the node's output channels."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 0
    return 1 if node.op_type == "ConvTranspose" else rank - 1


def nodes_of(model: onnx.ModelProto, patterns: Sequence[str]) -> list[str]:
    """Names of the nodes that come from modules whose names match a pattern (glob).

    The exporter's notes must still be in the model. A batch norm that was folded into a
    convolution left it its own name; the convolution's is that of the weight.
    """
    return [
        node.name
        for node in model.graph.node
        if any(fnmatchcase(module, pattern) for module in _modules(node) for pattern in patterns)
    ]


def _modules(node: NodeProto) -> Iterator[str]:
    """Modules that a node comes from, outermost first."""
    for note in node.metadata_props:
        if note.key == SCOPES:
            yield from ast.literal_eval(note.value)[1:-1]
    for name in node.input[1:2]:
        parts = name.split(".")[:-1]
        yield from (".".join(parts[: depth + 1]) for depth in range(len(parts)))


def _dequantize(inputs: list[str], output: str) -> NodeProto:
    return helper.make_node("DequantizeLinear", inputs, [output], name=output)
