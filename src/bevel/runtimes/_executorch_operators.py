"""The operators of a .pte file, with their types, inside XNNPACK's part and beside it."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from importlib import resources
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from executorch.backends.xnnpack import serialization
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._program import deserialize_pte_binary
from torch import Tensor

from bevel.core.errors import MeasurementError, one_line
from bevel.core.records import Operator
from bevel.runtimes.executorch import load

RUNS = 20
WINDOW = 12
"""How many operators XNNPACK may have merged into others between two events."""

PORTABLE = "native_call_"
"""How events of operators outside XNNPACK begin."""

INFINITE = re.compile(r"(:\s*-?)inf\b")
"""How flatc writes a number that JSON has no form for."""

DATATYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int32": "int32"}
"""XNNPACK's types that are not integers with a scale."""

MOVEMENT = frozenset(
    (
        "Convert",
        "StaticTranspose",
        "StaticReshape",
        "StaticConstantPad",
        "StaticSlice",
        "Copy",
        "MaxPooling2d",
        "Concatenate2",
        "Concatenate3",
        "Concatenate4",
        "Concatenate5",
    )
)
"""They copy or convert, and compute nothing."""

LOOKUPS = frozenset(
    (
        "Abs",
        "Ceiling",
        "Clamp",
        "Cos",
        "ELU",
        "Exp",
        "Floor",
        "Gelu",
        "Hardswish",
        "LeakyReLU",
        "Log",
        "Negate",
        "ReciprocalSquareRoot",
        "Sigmoid",
        "Sin",
        "Square",
        "SquareRoot",
        "Tanh",
    )
)
"""Functions of one number: between conversions from and to int8, a lookup in a table."""

CONVERT = "Convert"
UNKNOWN = "it was not annotated, or ExecuTorch hands it to XNNPACK in float only"
OUTSIDE = "ExecuTorch does not hand it to XNNPACK, so its own portable kernel runs it"


def list_operators(path: Path) -> list[Operator]:
    """The operators in the order in which they run.

    Raises:
        MeasurementError: the file is no program of this version.
    """
    try:
        program = deserialize_pte_binary(path.read_bytes()).program
        plan = program.execution_plan[0]
        parts = [
            _graph(bytes(program.backend_delegate_data[delegate.processed.index].data))
            for delegate in plan.delegates
        ]
    except (ValueError, KeyError, IndexError, AssertionError, RuntimeError, OSError) as error:
        raise MeasurementError(f"ExecuTorch cannot read {path}: {one_line(error, 160)}") from error
    found: list[Operator] = []
    for instruction in plan.chains[0].instructions:
        call: Any = instruction.instr_args
        if hasattr(call, "delegate_index"):
            found += _delegated(parts[call.delegate_index], len(found))
        elif hasattr(call, "op_index"):
            kind = plan.operators[call.op_index].name.removeprefix("aten::")
            found.append(_portable(kind, len(found)))
    return found


def profile_operators(path: Path, tensors: Sequence[Tensor]) -> dict[str, float]:
    """Median milliseconds per run by operator name.

    XNNPACK names its events by kernel. They come nearly in the order of the file, so each is taken
    for the next operator of its kind, or else for the first that no event was taken for; one that
    has none keeps its own name.
    """
    from executorch.devtools import Inspector

    program, method = load(path, path.read_bytes(), events=True)
    for _ in range(RUNS):
        method.execute(list(tensors))
    with tempfile.TemporaryDirectory(prefix="bevel-") as folder:
        dump = Path(folder) / "events"
        program.write_etdump_result_to_file(str(dump), str(dump.with_suffix(".debug")))
        inspector = Inspector(etdump_path=str(dump))
    events = [
        (event.name, median(event.perf_data.raw))
        for block in inspector.event_blocks
        for event in block.events
        if event.perf_data is not None
        and (event.is_delegated_op or event.name.startswith(PORTABLE))
    ]
    operators = list_operators(path)
    times: dict[str, float] = {}
    position, left = 0, list(range(len(operators)))
    for number, (event, milliseconds) in enumerate(events):
        own = [i for i in left if _same(event, operators[i].kind)]
        match = next((i for i in own if position <= i < position + WINDOW), next(iter(own), None))
        if match is None:
            times[f"{event} ({number})"] = milliseconds
            continue
        times[operators[match].name] = milliseconds
        left.remove(match)
        position = max(position, match + 1)
    return times


def _same(event: str, kind: str) -> bool:
    """Whether a kernel's event can be of that kind of operator."""
    words, kind = event.removeprefix(PORTABLE).partition("(")[0].strip().lower(), kind.lower()
    plain = words.replace(" ", "").partition("#")[0].partition(".")[0]
    if plain in ("convolution", "fullyconnected", "deconvolution"):
        return kind == "fullyconnected" or ("conv" in kind and "convert" not in kind)
    if plain == "mean":
        return "avgpool" in kind or kind.startswith("mean")
    if plain == "invalidunaryop":
        return kind in {known.lower() for known in LOOKUPS}
    return kind in plain or plain in kind


def _portable(kind: str, number: int) -> Operator:
    return Operator(
        name=f"{number}:{kind}",
        kind=kind,
        precision="none" if "copy" in kind else "float32",
        delegated=False,
        reason=OUTSIDE,
    )


def _graph(content: bytes) -> dict[str, Any]:
    """XNNPACK's part of a program, as its schema describes it."""
    header = XNNHeader.from_bytes(content[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    schema = resources.files(serialization).joinpath("schema.fbs").read_bytes()
    with tempfile.TemporaryDirectory(prefix="bevel-") as name:
        folder = Path(name)
        (folder / "schema.fbs").write_bytes(schema)
        (folder / "graph.bin").write_bytes(content[start : start + header.flatbuffer_size])
        _flatc_decompile(name, str(folder / "schema.fbs"), str(folder / "graph.bin"))
        graph: dict[str, Any] = json.loads(
            INFINITE.sub(r"\1Infinity", (folder / "graph.json").read_text(encoding="utf-8"))
        )
    return graph


def _delegated(graph: dict[str, Any], first: int) -> list[Operator]:
    """The operators of one part, numbered from `first`."""
    values = {}
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        tensor = union.get("tensor_value", union)
        values[tensor["id_out"]] = tensor
    makers: dict[int, str] = {}
    found = []
    integers = any(_integer(tensor) for tensor in values.values())
    for number, node in enumerate(graph["xnodes"], first):
        kind = node["xnode_union_type"].removeprefix("XNN")
        fields = node["xnode_union"]
        inputs = [v for k, v in fields.items() if k.startswith("input") and k.endswith("_id")]
        image, output = values[inputs[0]], values[fields["output_id"]]
        dtype = _precision(image)
        moves = kind in MOVEMENT
        weights = values.get(fields.get("filter_id"))
        reason = UNKNOWN if integers and dtype.startswith("float") else None
        operator = Operator(
            name=f"{number}:{kind}",
            kind=kind,
            precision="none" if moves else dtype,
            macs=_macs(output["dims"], fields, weights["dims"]) if weights else 0,
            channels=int(output["dims"][-1]) if weights else None,
            reason=None if moves else reason,
            inputs=[makers[index] for index in inputs if index in makers],
        )
        makers[fields["output_id"]] = operator.name
        found.append(operator)
    return _with_lookups(found)


def _with_lookups(found: list[Operator]) -> list[Operator]:
    """The same operators, with what XNNPACK turns into a lookup as one of them."""
    by_name = {operator.name: operator for operator in found}
    readers: dict[str, list[Operator]] = {}
    for operator in found:
        for source in operator.inputs:
            readers.setdefault(source, []).append(operator)
    merged: dict[str, str] = {}
    for operator in found:
        before = by_name.get(operator.inputs[0]) if operator.inputs else None
        after = readers.get(operator.name, [])
        if operator.kind not in LOOKUPS or before is None or len(after) != 1:
            continue
        if (before.kind, after[0].kind) == (CONVERT, CONVERT):
            merged[after[0].name] = operator.name
            if len(readers[before.name]) == 1:
                merged[before.name] = before.inputs[0] if before.inputs else ""
            lookup = {"precision": "int8", "reason": None, "inputs": before.inputs}
            by_name[operator.name] = operator.model_copy(update=lookup)
    return [
        by_name[operator.name].model_copy(
            update={"inputs": [merged.get(s, s) for s in by_name[operator.name].inputs]}
        )
        for operator in found
        if operator.name not in merged
    ]


def _integer(tensor: dict[str, Any]) -> bool:
    return _precision(tensor) == "int8"


def _precision(tensor: dict[str, Any]) -> str:
    name: str = tensor["datatype"].removeprefix("xnn_datatype_")
    return DATATYPES.get(name, name.lstrip("qcdbp"))


def _macs(output: Sequence[int], fields: dict[str, Any], weights: Sequence[int]) -> int:
    """Multiply-accumulates, from the shapes of output and weights."""
    summed = int(weights[1])
    if "kernel_height" in fields:
        kernel = int(fields["kernel_height"]) * int(fields["kernel_width"])
        summed = kernel * int(fields["group_input_channels"])
    return prod(map(int, output)) * summed
