"""Zero padding in a .tflite file: in the file's own layout, and in the convolution that reads it.

The converter leaves the padding of integers in the network's layout (N, C, H, W), between two
transposes of the whole tensor, and as an operator of its own. LiteRT computes in (N, H, W, C), and
its convolutions pad by themselves where the padding is what they call SAME.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert.tools import flatbuffer_utils as tflite

CODES = tflite.schema_fb.BuiltinOperator
CONVOLUTIONS = (CODES.CONV_2D, CODES.DEPTHWISE_CONV_2D)
TO_CHANNELS_LAST = [0, 2, 3, 1]
TO_CHANNELS_FIRST = [0, 3, 1, 2]


def fold_pads(model: Any) -> None:
    """Move each zero padding behind the transpose that follows it, then into its convolution."""
    graph = model.subgraphs[0]
    for pad in [operator for operator in graph.operators if code_of(model, operator) == CODES.PAD]:
        if _keeps_integers(graph, pad):
            _change_layout(model, graph, pad)
            _merge(model, graph, pad)


def code_of(model: Any, operator: Any) -> int:
    """The code of an operator, where old files have it or where new ones do."""
    code = model.operatorCodes[operator.opcodeIndex]
    return max(int(code.builtinCode), int(code.deprecatedBuiltinCode))


def _keeps_integers(graph: Any, pad: Any) -> bool:
    """Whether what it reads and makes have one scale and zero point, or are no integers."""
    source, result = (
        graph.tensors[index].quantization for index in (pad.inputs[0], pad.outputs[0])
    )
    return all(
        np.array_equal(_listed(source, field), _listed(result, field))
        for field in ("scale", "zeroPoint")
    )


def _listed(quantization: Any, field: str) -> list[float]:
    values = getattr(quantization, field, None)
    return [] if values is None else list(values)


def _change_layout(model: Any, graph: Any, pad: Any) -> None:
    """Padding, then transpose to channels last -> transpose, then padding."""
    last = _only_reader(graph, pad.outputs[0])
    if last is None or not _transposes(model, graph, last, TO_CHANNELS_LAST):
        return
    amounts = _constant(model, graph, pad.inputs[1])
    if not amounts.size:  # they are computed
        return
    first = _maker(graph, pad.inputs[0])
    if first is not None and _transposes(model, graph, first, TO_CHANNELS_FIRST):
        source = first.inputs[0]
        _drop(graph, last)
        if _only_reader(graph, first.outputs[0]) is pad:
            _drop(graph, first)
    else:
        source = _transposed(graph, pad.inputs[0])
        _drop(graph, last)
        graph.operators.insert(_position(graph, pad), last)
        last.inputs = [pad.inputs[0], last.inputs[1]]
    pad.inputs = [source, _store(model, graph, pad.inputs[1], amounts[TO_CHANNELS_LAST])]
    pad.outputs, last.outputs = last.outputs, [source]


def _merge(model: Any, graph: Any, pad: Any) -> None:
    """Let the convolution pad, where it would pad by the same amounts."""
    reader = _only_reader(graph, pad.outputs[0])
    if reader is None or code_of(model, reader) not in CONVOLUTIONS:
        return
    options = reader.builtinOptions
    if options.padding != tflite.schema_fb.Padding.VALID or reader.inputs[0] != pad.outputs[0]:
        return
    size = list(graph.tensors[pad.inputs[0]].shape)
    kernel = list(graph.tensors[reader.inputs[1]].shape)[1:3]
    made = list(graph.tensors[reader.outputs[0]].shape)[1:3]
    steps = (options.strideH, options.strideW)
    dilation = (options.dilationHFactor, options.dilationWFactor)
    wanted = [[0, 0], *map(_same, size[1:3], kernel, made, steps, dilation), [0, 0]]
    if _constant(model, graph, pad.inputs[1]).tolist() == wanted:
        options.padding = tflite.schema_fb.Padding.SAME
        reader.inputs = [pad.inputs[0], *list(reader.inputs)[1:]]
        _drop(graph, pad)


def _same(size: int, kernel: int, made: int, step: int, dilation: int) -> list[int]:
    """What SAME adds before and after a dimension; nothing fits if it makes another size."""
    if made != -(-size // step):
        return [-1, -1]
    total = max((made - 1) * step + (kernel - 1) * dilation + 1 - size, 0)
    return [total // 2, total - total // 2]


def _transposes(model: Any, graph: Any, operator: Any, order: Sequence[int]) -> bool:
    if code_of(model, operator) != CODES.TRANSPOSE:
        return False
    return bool(_constant(model, graph, operator.inputs[1]).tolist() == list(order))


def _constant(model: Any, graph: Any, index: int) -> np.ndarray:
    """The integers of a stored tensor; of one that is computed, none."""
    tensor = graph.tensors[index]
    data = model.buffers[tensor.buffer].data
    content = np.array([] if data is None else data, dtype=np.uint8)
    wide = tensor.type == tflite.schema_fb.TensorType.INT64
    values: np.ndarray = content.view(np.int64 if wide else np.int32)
    return values.reshape(tensor.shape) if values.size else values


def _store(model: Any, graph: Any, like: int, values: np.ndarray) -> int:
    """A new stored tensor of integers, of the type of another one."""
    old, new, buffer = graph.tensors[like], tflite.schema_fb.TensorT(), tflite.schema_fb.BufferT()
    wide = old.type == tflite.schema_fb.TensorType.INT64
    content = np.ascontiguousarray(values, dtype=np.int64 if wide else np.int32)
    buffer.data = np.frombuffer(content.tobytes(), dtype=np.uint8)
    model.buffers.append(buffer)
    new.shape, new.type, new.buffer = list(values.shape), old.type, len(model.buffers) - 1
    new.name = f"paddings_{len(graph.tensors)}".encode()
    graph.tensors.append(new)
    return len(graph.tensors) - 1


def _transposed(graph: Any, index: int) -> int:
    """A new tensor: another one with the channels last."""
    old, new = graph.tensors[index], tflite.schema_fb.TensorT()
    new.shape = [int(old.shape[axis]) for axis in TO_CHANNELS_LAST]
    new.type, new.quantization, new.buffer = old.type, old.quantization, 0
    new.name = f"channels_last_{len(graph.tensors)}".encode()
    graph.tensors.append(new)
    return len(graph.tensors) - 1


def _only_reader(graph: Any, index: int) -> Any:
    """The one operator that reads a tensor, if nothing else does."""
    readers = [operator for operator in graph.operators if index in operator.inputs]
    return readers[0] if len(readers) == 1 and index not in graph.outputs else None


def _maker(graph: Any, index: int) -> Any:
    return next((operator for operator in graph.operators if index in operator.outputs), None)


def _position(graph: Any, operator: Any) -> int:
    return next(i for i, known in enumerate(graph.operators) if known is operator)


def _drop(graph: Any, operator: Any) -> None:
    graph.operators = [known for known in graph.operators if known is not operator]
