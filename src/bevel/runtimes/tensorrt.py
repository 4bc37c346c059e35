"""TensorRT: ONNX with explicit Quantize/Dequantize pairs, symmetric int8, for NVIDIA's devices.

The file is ONNX; TensorRT builds its engine from it on the GPU that runs it. Every int8 file is
checked structurally when it is written (`_tensorrt_form.check_structure`). It is built and run
where the package `tensorrt` and a GPU are present; elsewhere `open_session` says that it was not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bevel.core.errors import MeasurementError, MissingDependencyError, one_line
from bevel.core.signature import TensorSignature

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bevel.core.recipe import Quantization

SUFFIX = ".onnx"
PRECISIONS = ("float32", "int8")

MOST_IMAGES = 64
"""Largest batch of an engine whose file leaves the batch size open; it is tuned for one image."""

NOT_RUN = "the file was checked structurally and was not run"


def version() -> str:
    """Version of TensorRT."""
    try:
        return f"tensorrt {metadata.version('tensorrt')}"
    except metadata.PackageNotFoundError:
        return "tensorrt (not installed: int8 files are checked structurally)"


def channel_step(precision: str) -> int:
    """Channels that its tensor-core kernels take in one go."""
    # Activations lie in vectors of 32 int8 channels on the GPU, of 8 float channels.
    return 32 if precision == "int8" else 8


def quantizer(options: Quantization) -> Any:
    """The torchao quantizer that says what becomes int8."""
    from bevel.core.quiet import quiet

    with quiet():  # torchao talks while it is imported
        from bevel.quantization.ranges import s8s8
        from bevel.runtimes._tensorrt_form import PairPlacer

    return PairPlacer(s8s8(options.ranges))


def export(
    net: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    precision: str,
    calibration: Iterable[Any] | None,
    quantization: Quantization,
    path: Path,
) -> str | None:
    """Write an ONNX file; see `bevel.export`.

    Raises:
        ExportError: besides what `bevel.export` says, a quantizer other than torch, or a file that
            breaks one of TensorRT's rules.
    """
    from bevel.core.errors import ExportError
    from bevel.core.quiet import quiet
    from bevel.graph.program import export_program, fixed_batch
    from bevel.runtimes._onnx_file import convert, save, write_onnx

    program = export_program(net, example_inputs)
    if precision == "float32":
        write_onnx(program, path)
        return None
    if quantization.quantizer == "native":
        raise ExportError("TensorRT has no quantizer of its own here; use quantizer: torch")
    with quiet():  # torchao talks while it is imported
        from bevel.quantization.pt2e import quantize
        from bevel.runtimes._tensorrt_form import check_structure

    converted = quantize(program, quantizer(quantization), calibration or (), quantization)
    whole = export_program(converted, example_inputs, dynamic=fixed_batch(program) is None)
    model = convert(whole)
    check_structure(model)
    save(model, path)
    return (
        f"torchao PT2E: int8 activations per tensor ({quantization.ranges}), int8 weights per "
        "channel, all symmetric"
    )


def signature(path: Path) -> tuple[list[TensorSignature], list[TensorSignature]]:
    """Inputs and outputs of a file, without TensorRT."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [_signature(value) for value in graph.input if value.name not in stored]
    return inputs, [_signature(value) for value in graph.output]


def _signature(value: Any) -> TensorSignature:
    from onnx import helper

    kind = value.type.tensor_type
    shape = [size.dim_param or size.dim_value for size in kind.shape.dim]
    dtype = str(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return TensorSignature(name=value.name, shape=shape, dtype=dtype)


def open_session(path: Path, threads: int) -> TensorrtSession:  # noqa: ARG001
    """Build an engine from the file on this machine's GPU; threads mean nothing there.

    Raises:
        MissingDependencyError: TensorRT is not installed.
        MeasurementError: there is no GPU, or TensorRT cannot build the engine.
    """
    return TensorrtSession(path)


class TensorrtSession:
    """An engine and its buffers on the first GPU. Written after the guide; no GPU was at hand."""

    def __init__(self, path: Path) -> None:
        try:
            import tensorrt
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"TensorRT is not installed: {NOT_RUN}. On a machine with an NVIDIA GPU: "
                "pip install tensorrt"
            ) from error
        import torch  # for the buffers

        if not torch.cuda.is_available():
            raise MeasurementError(f"TensorRT needs an NVIDIA GPU and there is none: {NOT_RUN}")
        self._torch = torch
        self.inputs, self.outputs = signature(path)
        self._engine = _build(tensorrt, path, self.inputs)
        self._context = self._engine.create_execution_context()

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Arrays for the inputs, in order, to arrays of the outputs."""
        if len(arrays) != len(self.inputs):
            raise MeasurementError(f"got {len(arrays)} inputs, the file takes {len(self.inputs)}")
        torch, held = self._torch, []
        for one, array in zip(self.inputs, arrays, strict=True):
            tensor = torch.from_numpy(np.ascontiguousarray(array)).cuda()
            if not self._context.set_input_shape(one.name, tuple(tensor.shape)):
                raise MeasurementError(f"TensorRT does not take {one.name} of shape {array.shape}")
            self._context.set_tensor_address(one.name, tensor.data_ptr())
            held.append(tensor)
        outputs = []
        for one in self.outputs:
            shape = tuple(self._context.get_tensor_shape(one.name))
            tensor = torch.empty(shape, dtype=getattr(torch, one.dtype), device="cuda")
            self._context.set_tensor_address(one.name, tensor.data_ptr())
            outputs.append(tensor)
        stream = torch.cuda.current_stream()
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise MeasurementError("TensorRT cannot run the engine")
        stream.synchronize()
        return [tensor.cpu().numpy() for tensor in outputs]


def _build(tensorrt: Any, path: Path, inputs: Sequence[TensorSignature]) -> Any:
    """An engine in which every layer has the type that the file says."""
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    flags = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(path.read_bytes()):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise MeasurementError(f"TensorRT cannot read {path}: {one_line(reasons, 200)}")
    config = builder.create_builder_config()
    if any(isinstance(size, str) for one in inputs for size in one.shape):
        profile = builder.create_optimization_profile()
        for one in inputs:
            least, most = (
                [count if isinstance(size, str) else size for size in one.shape]
                for count in (1, MOST_IMAGES)
            )
            profile.set_shape(one.name, least, least, most)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise MeasurementError(f"TensorRT cannot build an engine from {path}")
    return tensorrt.Runtime(logger).deserialize_cuda_engine(plan)
