"""ONNX Runtime's own post-training quantizer, behind bevel's `Quantization`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bevel.core.errors import ExportError, one_line
from bevel.core.quiet import quiet
from bevel.core.recipe import Quantization
from bevel.quantization.pt2e import inputs_of
from bevel.quantization.ranges import PERCENTILE
from bevel.runtimes._onnx_file import save
from bevel.runtimes._onnx_forms import nodes_of, shield_float_layers
from bevel.runtimes._onnx_widths import widen


def quantize_natively(
    model: onnx.ModelProto, calibration: Iterable[Any], options: Quantization, path: Path
) -> None:
    """Write the int8 file that `onnxruntime.quantization.quantize_static` makes.

    uint8 activations per tensor, int8 weights per channel, in Quantize/Dequantize form.

    Args:
        model: a float model, with torch's notes; it is not changed.
        calibration: batches of images.
        options: observer minmax or percentile, and keep_float; it has no more than that.
        path: the file to write.

    Raises:
        ExportError: the options ask for what it does not have, or it refuses the network.
    """
    _check(options)
    with quiet():
        from onnxruntime.quantization import (
            CalibrationDataReader,
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = _feeds(model, calibration)
    first = next(batches, None)
    if first is None:
        raise ExportError("int8 needs calibration images and got none")
    batches = chain([first], batches)

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
        """Hands the batches over, one feed at a time."""

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(batches, None)

    percentile = options.native_ranges == "percentile"
    excluded = nodes_of(model, options.keep_float)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with tempfile.TemporaryDirectory(prefix="bevel-") as folder:
        plain, ready = Path(folder) / "float.onnx", Path(folder) / "ready.onnx"
        save(copy, plain)
        try:
            with quiet():
                quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
                quantize_static(
                    str(ready),
                    str(path),
                    Reader(),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    nodes_to_exclude=excluded,
                    calibrate_method=CalibrationMethod.Percentile
                    if percentile
                    else CalibrationMethod.MinMax,
                    extra_options={"CalibPercentile": PERCENTILE} if percentile else {},
                )
        except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
            raise ExportError(
                f"onnxruntime's quantize_static refuses the network: {one_line(error, 200)}; "
                "use quantizer: torch"
            ) from error
    quantized = onnx.load(str(path))
    shield_float_layers(quantized)
    widen(quantized)
    save(quantized, path)


def _check(options: Quantization) -> None:
    """Refuse what the native quantizer does not have."""
    asked = {
        f"observer: {options.observer}": options.native_ranges not in ("minmax", "percentile"),
        "equalize": options.equalize,
        "correct_bias": options.correct_bias,
        "learn_rounding": options.learn_rounding,
    }
    for name, wanted in asked.items():
        if wanted:
            raise ExportError(f"onnxruntime's own quantizer has no {name}; use quantizer: torch")


def _feeds(model: onnx.ModelProto, calibration: Iterable[Any]) -> Iterator[dict[str, np.ndarray]]:
    """The calibration batches by input name, in pieces of the batch size where that is fixed."""
    names = [value.name for value in model.graph.input]
    size = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    for batch in calibration:
        arrays = [tensor.numpy() for tensor in inputs_of(batch, len(names))]
        count = len(arrays[0])
        step = size or count
        for start in range(0, count - step + 1, step):
            yield {n: a[start : start + step] for n, a in zip(names, arrays, strict=True)}
