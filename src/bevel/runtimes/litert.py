"""LiteRT, once TensorFlow Lite: float32, float16 weights, int8, and weights alone in int8.

Files take one image and float32 arrays, in the network's own layout (N, C, H, W): LiteRT computes
in (N, H, W, C), so a file begins with a transpose of the image. In int8 files a Quantize at the
input and a Dequantize at the output are part of the file, where XNNPACK runs them.

int8-weights and float16 are smaller files that run in float32: the weights become float32 again
once, while the file is loaded. LiteRT's Python package has no profiler, so there is no `profile`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from bevel.core.errors import MeasurementError, one_line
from bevel.core.quiet import quiet
from bevel.core.signature import TensorSignature

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bevel.core.recipe import Quantization
    from bevel.core.records import Operator

SUFFIX = ".tflite"
PRECISIONS = ("float32", "float16", "int8", "int8-weights")


def version() -> str:
    """Version of LiteRT."""
    return f"ai-edge-litert {package_version('ai-edge-litert')}"


def channel_step(precision: str) -> int:
    """Channels that XNNPACK's kernels take in one go."""
    # Its matrix kernels make 16 columns at a time in int8 and 8 in float32 on Arm.
    return 16 if precision == "int8" else 8


def export(
    net: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    precision: str,
    calibration: Iterable[Any] | None,
    quantization: Quantization,
    path: Path,
) -> str | None:
    """Write a .tflite file; see `bevel.export`."""
    from bevel.graph.program import export_program

    program = export_program(net, example_inputs, dynamic=False)
    with quiet():  # litert-torch and torchao talk while they are imported
        from bevel.runtimes import _litert_file
    return _litert_file.write(
        program, example_inputs, precision, calibration or (), quantization, path
    )


def quantizer(options: Quantization) -> Any:
    """The torchao quantizer that says what its int8 is."""
    with quiet():  # litert-torch and torchao talk while they are imported
        from bevel.runtimes._litert_file import SAME_SCALE
        from bevel.runtimes._xnnpack import XnnpackQuantizer
    return XnnpackQuantizer(options.ranges, same_scale=SAME_SCALE)


class LiteRTSession:
    """A .tflite file loaded on the CPU, on XNNPACK.

    Raises:
        MeasurementError: the file is no model that this version runs.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._interpreter = load(path, threads)
        names = {
            (kind, index): name
            for signature in self._interpreter._get_full_signature_list().values()
            for kind in ("inputs", "outputs")
            for name, index in signature[kind].items()
        }
        self._taken = self._interpreter.get_input_details()
        self._given = self._interpreter.get_output_details()
        self.inputs = [_signature(tensor, names, "inputs") for tensor in self._taken]
        self.outputs = [_signature(tensor, names, "outputs") for tensor in self._given]

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Arrays for the inputs, in order, to arrays of the outputs."""
        if len(arrays) != len(self.inputs):
            raise MeasurementError(f"got {len(arrays)} inputs, the file takes {len(self.inputs)}")
        for signature, tensor, array in zip(self.inputs, self._taken, arrays, strict=True):
            if list(array.shape) != signature.shape or str(array.dtype) != signature.dtype:
                raise MeasurementError(
                    f"the input '{signature.name}' takes {signature.dtype} of shape "
                    f"{tuple(signature.shape)}, got {array.dtype} of shape {array.shape}"
                )
            self._interpreter.set_tensor(tensor["index"], array)
        try:
            self._interpreter.invoke()
        except RuntimeError as error:
            raise MeasurementError(f"LiteRT cannot run it: {one_line(error, 160)}") from error
        return [self._interpreter.get_tensor(tensor["index"]) for tensor in self._given]


def open_session(path: Path, threads: int) -> LiteRTSession:
    """Load a .tflite file for this many threads."""
    return LiteRTSession(path, threads)


def load(path: Path, threads: int, delegate: bool = True) -> Interpreter:
    """An interpreter of the file that is ready to run, with XNNPACK or without.

    Raises:
        MeasurementError: the file is no model that this version runs.
    """
    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        with quiet():  # it tells on stderr which delegate it made, and what is wrong with a file
            interpreter = Interpreter(
                model_path=str(path),
                num_threads=threads,
                experimental_op_resolver_type=OpResolverType.AUTO if delegate else kernels,
            )
            interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise MeasurementError(f"LiteRT cannot load {path}: {one_line(error, 160)}") from error
    return interpreter


def operators(path: Path) -> list[Operator]:
    """What the file holds, and what of it XNNPACK takes; see `_litert_operators`."""
    from bevel.runtimes._litert_operators import list_operators

    return list_operators(load(path, 1))


def _signature(
    tensor: dict[str, Any], names: dict[tuple[str, int], str], kind: str
) -> TensorSignature:
    return TensorSignature(
        name=names.get((kind, tensor["index"]), tensor["name"]),
        shape=[int(size) for size in tensor["shape"]],
        dtype=np.dtype(tensor["dtype"]).name,
    )
