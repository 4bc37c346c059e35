"""From a `torch.export` program to a .pte file whose operators run on XNNPACK."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor
from torch.export import ExportedProgram

from bevel.core.errors import FORWARD_FAULTS, ExportError, one_line
from bevel.core.quiet import quiet
from bevel.core.recipe import Quantization
from bevel.graph.program import export_program
from bevel.quantization.pt2e import quantize
from bevel.runtimes._choice import choose
from bevel.runtimes._xnnpack import REWRITES, XnnpackQuantizer, name_quantizer
from bevel.runtimes.executorch import open_session

aten = torch.ops.aten

TORCH = "torchao PT2E"
NATIVE = "XNNPACKQuantizer"
NATIVELY = f"{NATIVE}: int8 activations per tensor (histogram), int8 weights per channel"
IN_FLOAT = (aten.avg_pool2d.default,)
"""ExecuTorch hands it to XNNPACK in float only. So it does others, but those of one input and one
output XNNPACK merges with the conversions around them."""


def write(
    program: ExportedProgram,
    example_inputs: tuple[Tensor, ...],
    precision: str,
    calibration: Iterable[Any],
    options: Quantization,
    path: Path,
) -> str | None:
    """Write the file; returns which quantizer made it, if any.

    Raises:
        ExportError: an operator has no ExecuTorch form, or calibration is empty or does not fit.
    """
    if precision == "float32":
        path.write_bytes(_lowered(program))
        return None
    ways = {"torch": (TORCH,), "native": (NATIVE,), "auto": (TORCH, NATIVE)}[options.quantizer]
    files = {
        way: _lowered(_integers(way, program, example_inputs, calibration, options)) for way in ways
    }
    names = {TORCH: name_quantizer(TORCH, options), NATIVE: NATIVELY}
    if len(files) == 1:
        path.write_bytes(files[ways[0]])
        return names[ways[0]]
    with tempfile.TemporaryDirectory(prefix="bevel-") as folder:
        sessions = {}
        for name, content in {"float": _lowered(program), **files}.items():
            place = Path(folder) / f"{name}.pte"
            place.write_bytes(content)
            sessions[name] = open_session(place, 1)
        reference = sessions.pop("float")
        count = len(program.graph_signature.user_inputs)
        chosen, why = choose(sessions, reference, calibration, count)
    path.write_bytes(files[chosen])
    return f"{names[chosen]}; {why}"


def _integers(
    way: str,
    program: ExportedProgram,
    example_inputs: tuple[Tensor, ...],
    calibration: Iterable[Any],
    options: Quantization,
) -> ExportedProgram:
    """The network with what a quantizer wants in integers."""
    if way == NATIVE:
        config = get_symmetric_quantization_config(is_per_channel=True)
        native = XNNPACKQuantizer().set_global(config)
        converted = quantize(program, native, calibration, options)
    else:
        quantizer = XnnpackQuantizer(options.ranges, in_float=IN_FLOAT)
        converted = quantize(program, quantizer, calibration, options, rewrites=REWRITES)
    return export_program(converted, example_inputs, dynamic=False)


def _lowered(program: ExportedProgram) -> bytes:
    """The content of a .pte file."""
    try:
        with quiet(), torch.no_grad():
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            content: bytes = bytes(edge.to_executorch().buffer)
    except FORWARD_FAULTS as error:
        raise ExportError(
            f"the network has no ExecuTorch form: {one_line(error, 200).rstrip('.')}. Replace the "
            "operator it names, or export for another runtime"
        ) from error
    return content
