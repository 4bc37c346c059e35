"""ONNX Runtime: float32, and int8 in Quantize/Dequantize form.

On x86 uint8 activations with int8 weights are the fast form; int8 activations are slower than
float there. Arm is fast with both, so one file serves both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from bevel.core.errors import MeasurementError, one_line
from bevel.core.quiet import quiet
from bevel.core.records import TensorSignature

if TYPE_CHECKING:
    from torch import Tensor, nn

SUFFIX = ".onnx"
PRECISIONS = ("float32", "int8")
TYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(int64)": "int64"}
FAULTS = (
    onnxruntime.capi.onnxruntime_pybind11_state.Fail,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    onnxruntime.capi.onnxruntime_pybind11_state.NoSuchFile,
    onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented,
    onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException,
)


def version() -> str:
    """Version of ONNX Runtime."""
    return f"onnxruntime {onnxruntime.__version__}"


def channel_step(precision: str) -> int:
    """Channels that its kernels take in one go."""
    # MLAS lays float32 convolutions out in blocks of 8 channels (16 with AVX-512); its int8
    # matrix kernels pack weights in panels of 16 columns and pad what is left over.
    return 16 if precision == "int8" else 8


def export(
    net: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    precision: str,
    calibration: Iterable[Any] | None,
    path: Path,
) -> str | None:
    """Write an ONNX file; see `bevel.export`."""
    from bevel.graph.program import export_program, fixed_batch
    from bevel.runtimes._onnx_file import write_onnx

    program = export_program(net, example_inputs)
    if precision == "float32":
        write_onnx(program, path)
        return None
    with quiet():  # torchao talks while it is imported
        from bevel.quantization.annotate import FusingQuantizer
        from bevel.quantization.pt2e import quantize
        from bevel.quantization.ranges import u8s8

    converted = quantize(program, FusingQuantizer(u8s8()), calibration or ())
    program = export_program(converted, example_inputs, dynamic=fixed_batch(program) is None)
    write_onnx(program, path)
    return "torchao PT2E: uint8 activations per tensor (min-max), int8 weights per channel"


class OnnxSession:
    """An ONNX file loaded on the CPU.

    Raises:
        MeasurementError: the file is no ONNX model that this version runs.
    """

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except FAULTS as error:
            raise MeasurementError(
                f"ONNX Runtime cannot load {path}: {one_line(error, 160)}"
            ) from error
        self.inputs = [_signature(node) for node in self._session.get_inputs()]
        self.outputs = [_signature(node) for node in self._session.get_outputs()]

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Arrays for the inputs, in order, to arrays of the outputs."""
        if len(arrays) != len(self.inputs):
            raise MeasurementError(f"got {len(arrays)} inputs, the file takes {len(self.inputs)}")
        feeds = {signature.name: a for signature, a in zip(self.inputs, arrays, strict=True)}
        try:
            outputs: list[np.ndarray] = self._session.run(None, feeds)
        except FAULTS as error:
            raise MeasurementError(f"ONNX Runtime cannot run it: {one_line(error, 160)}") from error
        return outputs


def open_session(path: Path, threads: int) -> OnnxSession:
    """Load an ONNX file for this many threads."""
    return OnnxSession(path, threads)


def _signature(node: Any) -> TensorSignature:
    shape = [size if isinstance(size, int) else str(size) for size in node.shape]
    return TensorSignature(name=node.name, shape=shape, dtype=TYPES.get(node.type, node.type))
