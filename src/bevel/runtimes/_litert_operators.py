"""The operators of a .tflite file, with their types, and which of them XNNPACK takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from bevel.core.records import Operator

DELEGATE = "DELEGATE"

MOVEMENT = frozenset(
    (
        "TRANSPOSE",
        "RESHAPE",
        "PAD",
        "PADV2",
        "CONCATENATION",
        "SLICE",
        "STRIDED_SLICE",
        "SPLIT",
        "SQUEEZE",
        "EXPAND_DIMS",
        "MAX_POOL_2D",
        "GATHER",
        "RESIZE_NEAREST_NEIGHBOR",
        "QUANTIZE",
        "DEQUANTIZE",
        "BROADCAST_TO",
        "PACK",
    )
)
"""They copy or convert, and compute nothing."""

WEIGHTED = frozenset(("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"))
"""Their second input are weights."""

LITERT_ONLY = "XNNPACK does not take it, so LiteRT's own slower kernel runs it"


NO_KERNEL = {"HARD_SWISH": "XNNPACK takes it in float only"}
"""Why an operator of an int8 file is in float."""


def list_operators(interpreter: Any) -> list[Operator]:
    """The operators in the file's order.

    Args:
        interpreter: a LiteRT interpreter whose tensors are allocated, with XNNPACK.
    """
    nodes = interpreter._get_ops_details()
    tensors = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    taken = _delegated(nodes)
    integers = any(node["op_name"] == "QUANTIZE" for node in nodes)
    makers: dict[int, str] = {}
    found: list[Operator] = []
    for number, node in enumerate(nodes):
        kind = node["op_name"]
        if kind == DELEGATE:
            continue
        operator = _operator(number, node, tensors, number in taken, makers)
        if not operator.delegated:
            operator = operator.model_copy(update={"reason": LITERT_ONLY})
        elif integers and operator.precision.startswith("float"):
            operator = operator.model_copy(update={"reason": NO_KERNEL.get(operator.kind)})
        makers |= dict.fromkeys(map(int, node["outputs"]), operator.name)
        found.append(operator)
    return found


def _delegated(nodes: list[dict[str, Any]]) -> set[int]:
    """Numbers of the nodes that a delegate runs: those between its outputs and its inputs."""
    own = [(number, node) for number, node in enumerate(nodes) if node["op_name"] != DELEGATE]
    makers = {int(tensor): number for number, node in own for tensor in node["outputs"]}
    taken: set[int] = set()
    for delegate in nodes:
        if delegate["op_name"] != DELEGATE:
            continue
        ends = {int(tensor) for tensor in delegate["inputs"]}
        waiting = [int(tensor) for tensor in delegate["outputs"]]
        while waiting:
            tensor = waiting.pop()
            number = makers.get(tensor)
            if tensor in ends or number is None or number in taken:
                continue
            taken.add(number)
            waiting += map(int, nodes[number]["inputs"])
    return taken


def _operator(
    number: int,
    node: dict[str, Any],
    tensors: dict[int, dict[str, Any]],
    delegated: bool,
    makers: dict[int, str],
) -> Operator:
    kind = node["op_name"]
    inputs = [int(index) for index in node["inputs"] if index >= 0 and int(index) in tensors]
    output = tensors[int(node["outputs"][0])]
    weights = kind in WEIGHTED and len(inputs) > 1
    image = tensors[inputs[0]]
    if kind == "TRANSPOSE_CONV" and len(inputs) > 2:  # output size, weights, image
        image = tensors[inputs[2]]
    moves = kind in MOVEMENT
    dtype = np.dtype(image["dtype"]).name
    shape = [int(size) for size in output["shape"]]
    return Operator(
        name=f"{number}:{kind}",
        kind=kind,
        precision="none" if moves else dtype,
        macs=_macs(kind, image["shape"], shape, tensors[inputs[1]]["shape"]) if weights else 0,
        channels=shape[-1] if weights else None,
        delegated=delegated,
        inputs=[makers[index] for index in inputs if index in makers],
    )


def _macs(kind: str, image: np.ndarray, output: list[int], weights: np.ndarray) -> int:
    """Multiply-accumulates of an operator, from the shapes of what goes in and comes out."""
    summed = weights[1:-1] if kind == "DEPTHWISE_CONV_2D" else weights[1:]
    if kind == "TRANSPOSE_CONV":  # each pixel of the image meets all weights
        return int(np.prod(image[:-1])) * int(np.prod(weights))
    return int(np.prod(output)) * int(np.prod(summed))
