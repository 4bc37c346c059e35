"""ONNX Runtime: float32, int8 in Quantize/Dequantize form, and weights alone in int8.

int8 files get the channels that the fast kernels need: `_onnx_widths`.

On x86 uint8 activations with int8 weights are the fast form; int8 activations are slower than
float there. Arm is fast with both, so one file serves both.

int8-weights is a smaller file that runs as fast as float32 and no faster, in as much memory: the
runtime has no kernel for convolutions of float images with int8 weights, so they become float again
once, while it loads the file. There is no float16: on the CPU it converts every tensor to
float32 and back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from bevel.core.errors import MeasurementError, one_line
from bevel.core.quiet import quiet
from bevel.core.signature import TensorSignature

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bevel.core.recipe import Quantization
    from bevel.core.records import Operator

SUFFIX = ".onnx"
PRECISIONS = ("float32", "int8", "int8-weights")
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


def quantizer(options: Quantization) -> Any:
    """The torchao quantizer that says what becomes int8, in bevel's int8 files."""
    with quiet():  # torchao talks while it is imported
        from bevel.quantization.annotate import FusingQuantizer
        from bevel.quantization.ranges import u8s8

    return FusingQuantizer(u8s8(options.ranges))


def export(
    net: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    precision: str,
    calibration: Iterable[Any] | None,
    quantization: Quantization,
    path: Path,
) -> str | None:
    """Write an ONNX file; see `bevel.export`."""
    from bevel.graph.program import export_program
    from bevel.runtimes import _onnx_file

    program = export_program(net, example_inputs)
    if precision == "float32":
        _onnx_file.write_onnx(program, path)
        return None
    if precision == "int8-weights":
        from bevel.runtimes._onnx_forms import pack_weights

        model = _onnx_file.convert(program)
        pack_weights(model, quantization.keep_float)
        _onnx_file.save(model, path)
        return "int8 weights per channel, symmetric; arithmetic in float32"
    with quiet():  # torchao talks while it is imported
        from bevel.runtimes._onnx_int8 import write_int8

    return write_int8(program, example_inputs, calibration or (), quantization, path)


def operators(path: Path) -> list[Operator]:
    """What ONNX Runtime makes of the file on this machine; see `_onnx_operators`."""
    from bevel.runtimes._onnx_operators import list_operators

    return list_operators(path)


def profile(path: Path, arrays: Sequence[np.ndarray], threads: int) -> dict[str, float]:
    """Median milliseconds per run of each operator, by name, from its own profiler."""
    from bevel.runtimes._onnx_operators import profile_operators

    return profile_operators(path, arrays, threads)


def session_options(threads: int) -> Any:
    """How a session runs: these threads, on the CPU, without a word."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return options


def load(path: Path, options: Any) -> Any:
    """An ONNX Runtime session.

    Raises:
        MeasurementError: the file is no ONNX model that this version runs.
    """
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except FAULTS as error:
        raise MeasurementError(
            f"ONNX Runtime cannot load {path}: {one_line(error, 160)}"
        ) from error


class OnnxSession:
    """An ONNX file loaded on the CPU.

    Raises:
        MeasurementError: the file is no ONNX model that this version runs.
    """

    def __init__(self, path: Path, threads: int, session: Any = None) -> None:
        self._session = session or load(path, session_options(threads))
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

    def end_profiling(self) -> str:
        """Where the profile lies, if the session was loaded with profiling."""
        path: str = self._session.end_profiling()
        return path


def open_session(path: Path, threads: int) -> OnnxSession:
    """Load an ONNX file for this many threads."""
    return OnnxSession(path, threads)


def _signature(node: Any) -> TensorSignature:
    shape = [size if isinstance(size, int) else str(size) for size in node.shape]
    return TensorSignature(name=node.name, shape=shape, dtype=TYPES.get(node.type, node.type))
