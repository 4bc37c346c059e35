"""From a `torch.export` program to an ONNX file: checked, free of traces of where it was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch.export import ExportedProgram

from bevel.core.errors import ExportError, one_line
from bevel.core.quiet import quiet
from bevel.runtimes._onnx_forms import pool_globally

TRACE_HINT = "See the stack trace for more information."
"""Ends the exporter's messages; only `--debug` shows the trace."""


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """Convert and write; the same program gives the same bytes.

    Raises:
        ExportError: an operator has no ONNX form.
    """
    save(convert(program), path)


def convert(program: ExportedProgram) -> onnx.ModelProto:
    """The program as an ONNX model, still with torch's notes on where each node comes from.

    Raises:
        ExportError: an operator has no ONNX form.
    """
    try:
        with quiet(), torch.no_grad(), _operators_kept():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                external_data=False,
                verbose=False,
                output_names=_names(len(program.graph_signature.user_outputs)),
            )
            model = converted.model_proto if converted is not None else None
    except (RuntimeError, ValueError, TypeError) as error:
        told = str(error.__cause__ or error).replace(TRACE_HINT, "")
        reason = one_line(told, 200).rstrip(".")
        raise ExportError(
            f"the network has no ONNX form: {reason}. Replace the operator it names, or export "
            "for another runtime"
        ) from error
    if model is None:
        raise ExportError("torch.onnx.export gave no model for this network")
    pool_globally(model)
    return model


@contextmanager
def _operators_kept() -> Iterator[None]:
    """Let torch build its table of ONNX operators once in a process, not once in each export.

    It parses the source of some 500 functions for it: 0.9 s, two thirds of the export of a small
    network. Operators that torch does not know at that time are left out of it, so it is built
    anew when a library has brought more: those of integers come with the first quantization.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    name = "from_torchlib"
    own = vars(ONNXRegistry)[name]
    setattr(ONNXRegistry, name, staticmethod(partial(_kept, getattr(ONNXRegistry, name))))
    try:
        yield
    finally:
        setattr(ONNXRegistry, name, own)


def _kept(build: Callable[..., Any], **given: Any) -> Any:
    """What `build` makes of these arguments, from last time if torch knows no more operators."""
    return _built(build, len(torch._C._dispatch_get_all_op_names()), **given)


@lru_cache(maxsize=1)
def _built(build: Callable[..., Any], _operators: int, **given: Any) -> Any:
    return build(**given)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Check the model and write it, without notes."""
    _strip(model)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _names(count: int) -> list[str]:
    """`output`, `output_1`, ...: a quantized program's own names say nothing."""
    return ["output", *(f"output_{index}" for index in range(1, count))]


def _strip(model: onnx.ModelProto) -> None:
    """Remove stack traces and paths: they differ between machines and say nothing to a runtime."""
    model.doc_string = ""
    del model.metadata_props[:]
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        graph.doc_string = ""
        del graph.metadata_props[:]
        for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
            value.doc_string = ""
            del value.metadata_props[:]
        for value in [*graph.input, *graph.output, *graph.value_info]:
            for size in value.type.tensor_type.shape.dim:
                if size.dim_param and size.dim_param.isalnum():  # torch's name for the batch
                    size.dim_param = "batch"
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            graphs += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
