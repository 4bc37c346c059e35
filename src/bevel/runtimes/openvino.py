"""OpenVINO: float32, 16-bit floats, int8, and weights alone in int8.

A file is a zip of `model.xml` and `model.bin`, which OpenVINO's own tools take when unpacked. On
processors with bfloat16 OpenVINO computes float32 networks in it unless told otherwise: the file
says in which precision to compute, and a session tells it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino

from bevel.core.errors import MeasurementError, one_line
from bevel.core.quiet import quiet
from bevel.core.signature import TensorSignature

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bevel.core.recipe import Quantization
    from bevel.core.records import Operator

SUFFIX = ".zip"
PRECISIONS = ("float32", "float16", "bfloat16", "int8", "int8-weights")
ARITHMETIC = {"float16": "f16", "bfloat16": "bf16"}
"""OpenVINO's inference precision for what is not in integers; f32 for the rest."""

TYPES = {
    "f32": "float32",
    "f64": "float64",
    "f16": "float16",
    "bf16": "bfloat16",
    "i64": "int64",
    "i32": "int32",
    "i8": "int8",
    "u8": "int8",
    "boolean": "bool",
}
MOVEMENT = (
    *("Broadcast", "Concat", "Gather", "Pad", "Permute", "Reorder", "Reshape", "Slice", "Split"),
    *("Squeeze", "StridedSlice", "Tile", "Transpose", "Unsqueeze"),
)
"""Kinds of operator that compute nothing."""

KEPT = 3
"""Batch sizes whose kernels a session keeps: one image, a whole batch, the last one."""

NAMED = ("node_",)
"""How names begin that torch's exporter gave."""

PROFILED_RUNS = 50
WARMUP_RUNS = 5


def version() -> str:
    """Version of OpenVINO."""
    return f"openvino {openvino.__version__.split('-')[0]}"


def channel_step(precision: str) -> int:
    """Channels that its kernels take in one go."""
    # oneDNN blocks channels by 16 floats with AVX-512 and by 8 with AVX2; four int8 products make
    # one 32-bit lane, and brgconv works through 64 input channels at a time, 16 output channels.
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
    """Write a zip file of OpenVINO's form; see `bevel.export`."""
    from bevel.graph.program import export_program
    from bevel.runtimes import _onnx_file, _openvino_file

    program = export_program(net, example_inputs)
    quantizer = None
    if precision == "int8":
        with quiet():  # torchao talks while it is imported
            from bevel.runtimes._openvino_int8 import quantized_model

        model, quantizer = quantized_model(program, example_inputs, calibration or (), quantization)
    else:
        converted = _onnx_file.convert(program)
        if precision == "int8-weights":
            from bevel.runtimes._onnx_forms import pack_weights

            pack_weights(converted, quantization.keep_float)
            quantizer = "int8 weights per channel, symmetric; arithmetic in float32"
        model = _openvino_file.from_onnx(converted)
    arithmetic = ARITHMETIC.get(precision, "f32")
    _openvino_file.write(model, path, arithmetic, half=precision == "float16")
    return quantizer


def quantizer(options: Quantization) -> Any:
    """The torchao quantizer that says what becomes int8."""
    with quiet():  # torchao talks while it is imported
        from bevel.quantization.ranges import u8s8
        from bevel.runtimes import _openvino_int8

    return _openvino_int8.ReadingQuantizer(u8s8(options.ranges))


class OpenVinoSession:
    """A model on the CPU.

    Each batch size has kernels for exactly its shape, made when they are first needed. They are
    faster, and int8 with an open size is not to be trusted: OpenVINO up to 2026.3 at least ends
    the process with it on many processors with AMX (its issue 37577).

    Args:
        model: OpenVINO's model.
        threads: threads that it may use.
    """

    def __init__(self, model: openvino.Model, threads: int) -> None:
        self._model, self._threads = model, threads
        self._requests: dict[tuple[int, ...], Any] = {}
        self.inputs = [_signature(port) for port in model.inputs]
        self.outputs = [_signature(port) for port in model.outputs]

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Arrays for the inputs, in order, to arrays of the outputs.

        Raises:
            MeasurementError: they do not fit the inputs, or OpenVINO cannot run them.
        """
        if len(arrays) != len(self.inputs):
            raise MeasurementError(f"got {len(arrays)} inputs, the file takes {len(self.inputs)}")
        for signature, array in zip(self.inputs, arrays, strict=True):
            _check(signature, array)
        sizes = tuple(map(len, arrays))
        try:
            if sizes not in self._requests:
                if len(self._requests) == KEPT:
                    del self._requests[next(iter(self._requests))]
                compiled = _compile(self._model, self._threads, sizes)
                self._requests[sizes] = compiled.create_infer_request()
            found = self._requests[sizes].infer(list(arrays))
        except RuntimeError as error:
            raise MeasurementError(f"OpenVINO cannot run it: {one_line(error, 160)}") from error
        return [found[index] for index in range(len(self.outputs))]


def open_session(path: Path, threads: int) -> OpenVinoSession:
    """Load a file for this many threads.

    Raises:
        MeasurementError: it is not one that this version runs.
    """
    return OpenVinoSession(_read(path), threads)


def operators(path: Path) -> list[Operator]:
    """What OpenVINO makes of the file for one image on this machine, in the order it runs.

    Raises:
        MeasurementError: the file is not one that this version runs.
    """
    from bevel.core.records import Operator

    model = _read(path)
    sizes = (1,) * len(model.inputs)
    model = _sized(model, sizes)
    macs = {op.get_friendly_name(): _macs(op) for op in model.get_ops()}
    running = _running(_compile(model, 1, sizes))
    names = {op.get_friendly_name(): name for name, op in running}
    found: list[Operator] = []
    for name, op in running:
        facts = _facts(op)
        kind, precision = facts["layerType"], facts["runtimePrecision"]
        shape = op.output(0).get_shape() if op.get_output_size() else []
        inside = facts["originalLayersNames"].split(",")
        own = sum(macs.get(part, 0) for part in inside)
        if not own and kind in ("FullyConnected", "MatMul"):  # it has lost its name
            own = int(np.prod(shape)) * int(op.input(0).get_shape()[-1])
        sources = (port.get_node().get_friendly_name() for port in op.input_values())
        found.append(
            Operator(
                name=name,
                kind=kind,
                precision="none" if kind in MOVEMENT else TYPES.get(precision, precision),
                macs=own,
                channels=shape[1] if len(shape) > 1 else None,
                inputs=[names[source] for source in sources if source in names],
            )
        )
    return found


def profile(path: Path, arrays: Sequence[np.ndarray], threads: int) -> dict[str, float]:
    """Mean milliseconds per run of each operator that runs, by name, from its own profiler.

    Raises:
        MeasurementError: the file is not one that this version runs, or not on these arrays.
    """
    model = _read(path)
    total: dict[str, timedelta] = {}
    try:
        compiled = _compile(model, threads, map(len, arrays), PERF_COUNT=True)
        names = {op.get_friendly_name(): name for name, op in _running(compiled)}
        request = compiled.create_infer_request()
        for run in range(WARMUP_RUNS + PROFILED_RUNS):
            request.infer(list(arrays))
            for entry in request.profiling_info if run >= WARMUP_RUNS else ():
                before = total.get(entry.node_name, timedelta())
                total[entry.node_name] = before + entry.real_time
    except RuntimeError as error:
        raise MeasurementError(f"OpenVINO cannot run it: {one_line(error, 160)}") from error
    return {
        names.get(name, name): time.total_seconds() * 1000 / PROFILED_RUNS
        for name, time in total.items()
        if time
    }


def _running(compiled: Any) -> list[tuple[str, Any]]:
    """Name and node of what runs for each image, in order; not inputs, outputs and constants.

    OpenVINO numbers nodes that it makes anew each time; these are called by kind and place.
    """
    nodes = list(compiled.get_runtime_model().get_ordered_ops())
    told = (*NAMED, *(port.get_any_name() for port in compiled.inputs))
    constant: set[str] = set()
    found: list[tuple[str, Any]] = []
    for op in nodes:
        kind, name = _facts(op)["layerType"], op.get_friendly_name()
        sources = [port.get_node().get_friendly_name() for port in op.input_values()]
        if kind == "Const" or (sources and constant.issuperset(sources)):
            constant.add(name)
        elif kind not in ("Input", "Output"):
            stable = name if name.startswith(told) else f"{kind}_{len(found)}"
            found.append((stable, op))
    return found


def _facts(op: Any) -> dict[str, str]:
    """What OpenVINO tells of a node that runs."""
    return {key: value.astype(str) for key, value in op.get_rt_info().items()}


@cache
def _core() -> openvino.Core:
    """OpenVINO's core, one for the whole process and never let go.

    Where a processor has AMX, a core that loads the CPU's plugin sets a stack for signals and, as
    it goes, puts back the one it had found. Two of which the older goes first leave a stack that
    is no longer mapped, and the next signal (a data loader's worker ends) stops the process.
    """
    return openvino.Core()


def _read(path: Path) -> openvino.Model:
    try:
        with zipfile.ZipFile(path) as archive:
            xml, weights = archive.read("model.xml"), archive.read("model.bin")
        with quiet():
            return _core().read_model(xml, weights)
    except (OSError, KeyError, zipfile.BadZipFile, RuntimeError) as error:
        raise MeasurementError(f"OpenVINO cannot load {path}: {one_line(error, 160)}") from error


def _sized(model: openvino.Model, sizes: Iterable[int]) -> openvino.Model:
    """The model with these sizes of the inputs' first axes where the file leaves them open."""
    if not any(port.get_partial_shape().is_dynamic for port in model.inputs):
        return model
    copy = model.clone()
    shapes = {}
    for port, size in zip(copy.inputs, sizes, strict=True):
        shape = port.get_partial_shape()
        if len(shape) and shape[0].is_dynamic:
            shape[0] = size
        shapes[port] = shape
    copy.reshape(shapes)
    return copy


def _compile(model: openvino.Model, threads: int, sizes: Iterable[int], **options: Any) -> Any:
    """The model on the CPU, in the precision that it states."""
    key = ["bevel", "inference_precision"]
    stated = model.get_rt_info(key).astype(str) if model.has_rt_info(key) else "f32"
    settings = {
        "INFERENCE_PRECISION_HINT": stated,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        # Threads bound to the same core would make two programs wait for each other.
        "ENABLE_CPU_PINNING": False,
        **options,
    }
    with quiet():
        return _core().compile_model(_sized(model, sizes), "CPU", settings)


def _signature(port: Any) -> TensorSignature:
    """An open first size is the batch."""
    shape: list[int | str] = []
    for axis, size in enumerate(port.get_partial_shape()):
        open_size = "batch" if axis == 0 else f"size_{axis}"
        shape.append(open_size if size.is_dynamic else size.get_length())
    kind = port.get_element_type().get_type_name()
    return TensorSignature(name=port.get_any_name(), shape=shape, dtype=TYPES.get(kind, kind))


def _check(signature: TensorSignature, array: np.ndarray) -> None:
    """OpenVINO converts other types silently, and lets some other shapes pass."""
    fits = array.ndim == len(signature.shape) and all(
        isinstance(said, str) or said == size
        for said, size in zip(signature.shape, array.shape, strict=True)
    )
    if not fits or array.dtype != signature.dtype:
        raise MeasurementError(
            f"the input '{signature.name}' takes {signature.dtype} of shape "
            f"{tuple(signature.shape)}, got {array.dtype} of shape {array.shape}"
        )


def _macs(op: Any) -> int:
    """Multiply-accumulates of a node for one image; shapes are of one image."""
    kind = op.get_type_name()
    if kind not in ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul"):
        return 0
    first, second, result = (
        op.input(0).get_shape(),
        op.input(1).get_shape(),
        op.output(0).get_shape(),
    )
    elements = int(np.prod(result))
    if kind == "MatMul":
        return elements * int(first[-2 if op.get_attributes()["transpose_a"] else -1])
    if kind == "ConvolutionBackpropData":  # weights (in, out, ...)
        return int(np.prod(first)) * int(np.prod(second[1:]))
    outputs = second[0] * second[1] if kind == "GroupConvolution" else second[0]
    return elements * int(np.prod(second)) // int(outputs)
