"""What ONNX Runtime makes of a file: its operators after fusion, with shapes and times.

The names are those of the graph that it runs. They are taken from its own profiler, which also
tells the shapes that went in and came out.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx

from bevel.core.records import Operator
from bevel.runtimes._onnx_forms import Graph, attribute
from bevel.runtimes.onnxruntime import OnnxSession, load, session_options

WARMUP_RUNS = 5
TIMED_RUNS = 30
EVENT = "_kernel_time"
"""Ends the name of the profiler's event for the work of one operator."""

SUFFIX = re.compile(r"(_token_\d+|_nchwc)+$")
"""What the optimizer appends to the name of an operator that it lays out anew."""

MOVEMENT = frozenset(
    (
        "QuantizeLinear",
        "DequantizeLinear",
        "Transpose",
        "ReorderInput",
        "ReorderOutput",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Split",
        "Pad",
        "Gather",
        "Concat",
        "Expand",
        "Identity",
        "Cast",
        "Shape",
        "DepthToSpace",
        "SpaceToDepth",
        "QLinearConcat",
    )
)
"""Operators that move or convert values without arithmetic."""

INTEGER_KERNELS = frozenset(
    (
        "Conv",
        "FusedConv",
        "Gemm",
        "MatMul",
        "Add",
        "Mul",
        "Sigmoid",
        "LeakyRelu",
        "AveragePool",
        "GlobalAveragePool",
        "MaxPool",
        "Softmax",
        "Where",
    )
)
"""Operators that ONNX Runtime has integer kernels for, on the CPU."""

ACTIVATIONS = ("Relu", "Clip", "HardSigmoid", "HardSwish", "LeakyRelu", "Sigmoid", "Tanh")
"""Functions that the optimizer fuses into the convolution before them."""

Event = dict[str, Any]


def list_operators(path: Path) -> list[Operator]:
    """The file's operators as ONNX Runtime runs them here, in order, for one image.

    Raises:
        MeasurementError: the file does not load, or does not run on zeros.
    """
    inputs = OnnxSession(path, 1).inputs
    zeros = [
        np.zeros([size if isinstance(size, int) else 1 for size in one.shape], dtype=one.dtype)
        for one in inputs
    ]
    events, model = _events(path, zeros, threads=1, runs=1)
    written = onnx.load(str(path))
    sizes = _weight_sizes(written)
    quantized = any(node.op_type == "QuantizeLinear" for node in written.graph.node)
    nodes = {node.name: node for node in model.graph.node}
    makers = {name: node.name for node in model.graph.node for name in node.output}
    found = []
    for event in events:
        name = str(event["name"]).removesuffix(EVENT)
        node = nodes.get(name)
        kind = str(event["args"]["op_name"])
        precision = _precision(kind, event)
        channels = _channels(node, event)
        found.append(
            Operator(
                name=name,
                kind=kind,
                precision=precision,
                macs=_macs(kind, event, sizes.get(SUFFIX.sub("", name)), channels),
                channels=channels,
                reason=_reason(kind) if quantized and precision == "float32" else None,
                inputs=[makers[i] for i in node.input if i and i in makers]
                if node is not None
                else [],
            )
        )
    return found


def profile_operators(path: Path, arrays: Sequence[np.ndarray], threads: int) -> dict[str, float]:
    """Median milliseconds of each operator by name, over runs after warm-up.

    Args:
        path: the file.
        arrays: its inputs, in order.
        threads: threads that the runtime may use.

    Raises:
        MeasurementError: the file does not load, or does not run on these arrays.
    """
    events, _ = _events(path, arrays, threads, WARMUP_RUNS + TIMED_RUNS)
    times: dict[str, list[float]] = {}
    for event in events:
        name = str(event["name"]).removesuffix(EVENT)
        times.setdefault(name, []).append(event["dur"] / 1000)
    return {name: median(values[WARMUP_RUNS:] or values) for name, values in times.items()}


def _events(
    path: Path, arrays: Sequence[np.ndarray], threads: int, runs: int
) -> tuple[list[Event], onnx.ModelProto]:
    """The profiler's events for operators, in order, and the graph that was run."""
    with tempfile.TemporaryDirectory(prefix="bevel-") as folder:
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        session = OnnxSession(path, threads, load(path, options))
        for _ in range(runs):
            session.run(arrays)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        model = onnx.load(options.optimized_model_filepath)
    own = [e for e in events if e.get("cat") == "Node" and str(e["name"]).endswith(EVENT)]
    return own, model


def _weight_sizes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Shapes of the weights as they were exported, by operator; layouts may pad them later.

    The optimizer names a convolution after itself or after what it gives once an activation
    function is fused into it, so it is found under all of these names.
    """
    graph = Graph(model)
    stored = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    sizes = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        name = node.input[1]
        while name not in stored:  # through Dequantize, or the Cast and Mul of packed weights
            makers = [graph.maker(name, kind) for kind in ("DequantizeLinear", "Mul", "Cast")]
            maker = next((node for node in makers if node is not None), None)
            if maker is None:
                break
            name = maker.input[0]
        if name not in stored:
            continue
        sizes[node.name] = stored[name]
        after: onnx.NodeProto | None = node
        while after is not None:
            sizes[after.output[0]] = stored[name]
            result = after.output[0]
            after = next(filter(None, (graph.only_reader(result, k) for k in ACTIVATIONS)), None)
    return sizes


def _shape(event: Event, side: str) -> list[int]:
    """Shape of the first tensor on a side: input or output."""
    shapes = event["args"].get(f"{side}_type_shape") or [{}]
    return next((list(map(int, shape)) for shape in shapes[0].values()), [])


def _precision(kind: str, event: Event) -> str:
    """What it computes in: that of its first input."""
    if kind in MOVEMENT:
        return "none"
    types = event["args"].get("input_type_shape") or [{}]
    first = next(iter(types[0]), "none")
    return {"float": "float32", "uint8": "int8", "int8": "int8"}.get(first, first)


def _channels(node: onnx.NodeProto | None, event: Event) -> int | None:
    """Width of its output: the last axis of a matrix product or where channels come last."""
    shape = _shape(event, "output")
    if len(shape) < 2:
        return None
    matrix = "MatMul" in event["args"]["op_name"]
    last = node is not None and bool(attribute(node, "channels_last", 0))
    return shape[-1] if last or matrix else shape[1]


def _macs(kind: str, event: Event, weight: list[int] | None, channels: int | None) -> int:
    """Multiply-accumulates: each weight is used once per position.

    The positions of a convolution are those of its output (of its input where it is transposed),
    of a matrix product the rows.
    """
    output, source = _shape(event, "output"), _shape(event, "input")
    if weight is not None and channels:
        if "Transpose" in kind:
            return math.prod(source) // max(source[1], 1) * math.prod(weight)
        return math.prod(output) // channels * math.prod(weight)
    if "MatMul" in kind or "Gemm" in kind:
        return math.prod(output) * (source or [0])[-1]
    return 0


def _reason(kind: str) -> str:
    """Why an operator of an int8 file runs in float."""
    if kind in INTEGER_KERNELS:
        return "an input or its output is not quantized"
    return f"ONNX Runtime has no integer kernel for {kind}"
