"""Channels added to an int8 ONNX file, up to the numbers that ONNX Runtime has fast kernels for.

Its kernels that convolve integers where they lie take input channels in fours and output channels,
or those of a depthwise convolution, in sixteens. Other layers are laid out as matrices first, which
costs much where there are few channels: images have three, depthwise convolutions one in each
group. So an image gets a fourth colour, 24 channels of a depthwise convolution become 32, and 8 of
any other 16. Wider layers are as fast as matrices, and stay as they are.

This undoes no pruning: added channels have weights of zero, both where they are made and where they
are read, so every number that the file computes stays what it was, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import NodeProto, helper

from bevel.runtimes._onnx_forms import Graph, attribute, read_by

INPUTS, OUTPUTS = 4, 16
"""What input and output channels of a convolution have to be multiples of."""

EACH = frozenset(
    [
        "QuantizeLinear",
        "DequantizeLinear",
        "Identity",
        "Relu",
        "LeakyRelu",
        "Clip",
        "Tanh",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
    ]
)
"""Operators that treat every channel of their first input alike."""

TOGETHER = frozenset(("Add", "Sub", "Mul"))
"""Operators that put channels with the same number together."""


@dataclass(eq=False)
class _Group:
    """Tensors that have the same channels.

    Attributes:
        made: convolutions that these channels are the outputs of.
        read: convolutions that they are the inputs of.
        followed: depthwise convolutions from them to them.
        fixed: something needs their number as it is.
        tensors: their names.
    """

    made: list[NodeProto] = field(default_factory=list)
    read: list[NodeProto] = field(default_factory=list)
    followed: list[NodeProto] = field(default_factory=list)
    fixed: bool = False
    tensors: set[str] = field(default_factory=set)


def widen(model: onnx.ModelProto) -> bool:
    """Add the channels, in place, where they save time; returns whether there were any to add.

    Args:
        model: in Quantize/Dequantize form. Convolutions whose weights are not int8 around zero, and
            channels that are joined, cut or reshaped, stay as they are.
    """
    widths = _Widths(model)
    changed = widths.colour_images()
    for group, extra in widths.lacking().items():
        widths.grow(group, extra)
        changed = True
    if changed:
        del model.graph.value_info[:]  # shapes of before
        widths.graph.drop_unread()
    return changed


class _Widths:
    """Which tensors of a model have the same channels, by name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = Graph(model)
        self.groups: dict[str, _Group] = {}
        self.colours = {
            value.name: count for value in model.graph.input if (count := _channels(value))
        }
        for node in model.graph.node:
            self._note(node)
        for value in model.graph.output:
            self._group(value.name).fixed = True

    def _note(self, node: NodeProto) -> None:
        moving = [name for name in node.input if name and self._weight(name) is None]
        if not moving:  # a constant
            return
        if node.op_type == "Conv" and moving == [node.input[0]] and self._convolution(node):
            return
        if node.op_type in EACH and moving == [node.input[0]] and self._alike(node.input[1:]):
            self._join([node.input[0], node.output[0]])
        elif node.op_type in TOGETHER and self._alike(set(node.input) - set(moving)):
            self._join([*moving, node.output[0]])
        else:
            for name in (*read_by([node]), *node.output):
                self._group(name).fixed = True

    def _convolution(self, node: NodeProto) -> bool:
        """Note what a convolution does to channels; False if that is not known."""
        weight = self._weight(node.input[1])
        count = int(attribute(node, "group", 1))
        if weight is None or weight.dtype != np.int8 or not self._around_zero(node.input[1]):
            return False
        if count == 1:
            self._group(node.input[0]).read.append(node)
            self._group(node.output[0]).made.append(node)
            return True
        if count == len(weight) and weight.shape[1] == 1:
            self._join([node.input[0], node.output[0]])
            self._group(node.input[0]).followed.append(node)
            return True
        return False

    def _weight(self, name: str) -> np.ndarray | None:
        """A constant, in integers if that is how it is stored."""
        stored = self.graph.maker(name, "DequantizeLinear")
        return self.graph.constant(stored.input[0] if stored is not None else name)

    def _around_zero(self, name: str) -> bool:
        stored = self.graph.maker(name, "DequantizeLinear")
        if stored is None or len(stored.input) < 3:
            return stored is not None
        zero = self.graph.constant(stored.input[2])
        return zero is not None and not zero.any()

    def _alike(self, constants: Iterable[str]) -> bool:
        """Whether constants are the same for all channels."""
        found = [self._weight(name) for name in constants if name]
        return all(value is not None and value.size == 1 for value in found)

    def _group(self, tensor: str) -> _Group:
        return self.groups.setdefault(tensor, _Group(tensors={tensor}))

    def _join(self, tensors: list[str]) -> None:
        first = self._group(tensors[0])
        for tensor in tensors[1:]:
            other = self._group(tensor)
            if other is first:
                continue
            first.made += other.made
            first.read += other.read
            first.followed += other.followed
            first.fixed |= other.fixed
            first.tensors |= other.tensors
            self.groups.update(dict.fromkeys(other.tensors, first))

    def lacking(self) -> dict[_Group, int]:
        """By group, how many channels to add: to those that it saves time for."""
        groups = dict.fromkeys(self.groups.values())
        return {group: extra for group in groups if (extra := self._lacking(group))}

    def _lacking(self, group: _Group) -> int:
        counts = {self._shape(node)[0] for node in group.made}
        if group.fixed or len(counts) != 1 or group.tensors & set(self.colours):
            return 0
        [count] = counts
        return -count % OUTPUTS if group.followed or count < OUTPUTS else 0

    def _shape(self, node: NodeProto) -> tuple[int, ...]:
        weight = self._weight(node.input[1])
        assert weight is not None  # noqa: S101  # `_convolution` found it
        return weight.shape

    def grow(self, group: _Group, extra: int) -> None:
        """Add channels to a group."""
        for node in group.made:
            self._grow(node, 0, extra)
        for node in group.read:
            self._grow(node, 1, extra)
        for node in group.followed:
            self._grow(node, 0, extra)
            _set_groups(node, int(attribute(node, "group", 1)) + extra)

    def colour_images(self) -> bool:
        """Give images as many channels as the kernel wants, once they are quantized."""
        done = [self._colour(image, count) for image, count in self.colours.items()]
        return any(done)

    def _colour(self, image: str, count: int) -> bool:
        group, extra = self._group(image), -count % INPUTS
        only = group.tensors.isdisjoint(self.colours.keys() - {image})
        quantize = self.graph.only_reader(image, "QuantizeLinear")
        if not extra or group.fixed or group.made or group.followed or not group.read or not only:
            return False
        if quantize is None or len(quantize.input) < 3:
            return False
        [name] = quantize.output
        readers, padded = self.graph.readers(name), f"{name}_padded"
        by = self.graph.store(np.array([0, 0, 0, 0, 0, extra, 0, 0]), f"{padded}_by")
        pad = helper.make_node("Pad", [name, by, quantize.input[2]], [padded], name=padded)
        self.graph.insert(readers[0], pad)
        for node in readers:
            node.input[list(node.input).index(name)] = padded
        for node in group.read:
            self._grow(node, 1, extra)
        return True

    def _grow(self, node: NodeProto, axis: int, extra: int) -> None:
        """Append channels of zeros to a convolution's weight; to its bias with the outputs."""
        node.input[1] = self._grown(node, node.input[1], axis, extra)
        if axis == 0 and len(node.input) > 2 and node.input[2]:
            node.input[2] = self._grown(node, node.input[2], 0, extra)

    def _grown(self, node: NodeProto, name: str, axis: int, extra: int) -> str:
        """A longer copy of a constant of this node: others may share it."""
        suffix = f"{node.name or node.output[0]}_{'io'[axis == 0]}{extra}"
        stored = self.graph.maker(name, "DequantizeLinear")
        if stored is None:
            value = self.graph.constant(name)
            assert value is not None  # noqa: S101  # `_note` found it
            return self.graph.store(_longer(value, axis, extra, 0), f"{name}_{suffix}")
        inputs = []
        for position, part in enumerate(stored.input):
            value = self.graph.constant(part)
            assert value is not None  # noqa: S101
            if position == 0:
                value = _longer(value, axis, extra, 0)
            elif axis == 0 and value.size > 1:
                value = _longer(value, 0, extra, 1 if position == 1 else 0)
            else:
                inputs.append(part)
                continue
            inputs.append(self.graph.store(value, f"{part}_{suffix}"))
        grown = f"{name}_{suffix}"
        copy = helper.make_node("DequantizeLinear", inputs, [grown], name=grown)
        copy.attribute.extend(stored.attribute)
        self.graph.insert(node, copy)
        return grown


def _longer(value: np.ndarray, axis: int, extra: int, filling: float) -> np.ndarray:
    shape = list(value.shape)
    shape[axis] = extra
    return np.concatenate([value, np.full(shape, filling, value.dtype)], axis)


def _set_groups(node: NodeProto, count: int) -> None:
    for found in node.attribute:
        if found.name == "group":
            found.i = count


def _channels(value: onnx.ValueInfoProto) -> int:
    """Of an image (N, C, H, W); 0 for what is none."""
    dims = value.type.tensor_type.shape.dim
    return dims[1].dim_value if len(dims) == 4 else 0
