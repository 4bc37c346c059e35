"""int8 files for ONNX Runtime: bevel's quantizer, the runtime's own, or the better of both."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from bevel.core.recipe import Quantization
from bevel.graph.program import export_program, fixed_batch
from bevel.quantization.pt2e import quantize
from bevel.runtimes._choice import choose
from bevel.runtimes._onnx_file import convert, save
from bevel.runtimes._onnx_forms import pad_in_integers, saturate_hard_sigmoids, shield_float_layers
from bevel.runtimes._onnx_native import quantize_natively
from bevel.runtimes._onnx_widths import widen
from bevel.runtimes.onnxruntime import OnnxSession, quantizer

TORCH = "torchao PT2E: uint8 activations per tensor ({observer}), int8 weights per channel"
NATIVE = (
    "onnxruntime quantize_static: uint8 activations per tensor ({observer}), int8 weights per "
    "channel"
)


def write_int8(
    program: ExportedProgram,
    example_inputs: tuple[Tensor, ...],
    calibration: Iterable[Any],
    options: Quantization,
    path: Path,
) -> str:
    """Write the file; returns which quantizer made it.

    With quantizer "auto" both files are made and run beside the float file on calibration images;
    see `_choice.choose` for which of them stays.

    Raises:
        ExportError: calibration is empty, a quantizer refuses, or an operator has no ONNX form.
    """
    torch_name = TORCH.format(observer=options.ranges)
    native_name = NATIVE.format(observer=options.native_ranges)
    if options.quantizer == "torch":
        _write_torch(program, example_inputs, calibration, options, path)
        return torch_name
    if options.quantizer == "native":
        quantize_natively(convert(program), calibration, options, path)
        return native_name
    with tempfile.TemporaryDirectory(prefix="bevel-") as name:
        folder = Path(name)
        float_model = convert(program)
        quantize_natively(float_model, calibration, options, folder / "native.onnx")
        _write_torch(program, example_inputs, calibration, options, folder / "torch.onnx")
        save(float_model, folder / "float.onnx")
        sessions = {name: OnnxSession(folder / f"{name}.onnx", 1) for name in ("torch", "native")}
        reference = OnnxSession(folder / "float.onnx", 1)
        count = len(program.graph_signature.user_inputs)
        chosen, why = choose(sessions, reference, calibration, count)
        shutil.copyfile(folder / f"{chosen}.onnx", path)
    return f"{torch_name if chosen == 'torch' else native_name}; {why}"


def _write_torch(
    program: ExportedProgram,
    example_inputs: tuple[Tensor, ...],
    calibration: Iterable[Any],
    options: Quantization,
    path: Path,
) -> None:
    converted = quantize(program, quantizer(options), calibration, options)
    whole = export_program(converted, example_inputs, dynamic=fixed_batch(program) is None)
    model = convert(whole)
    saturate_hard_sigmoids(model)
    pad_in_integers(model)
    shield_float_layers(model)
    widen(model)
    save(model, path)
