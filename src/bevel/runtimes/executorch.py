"""ExecuTorch on XNNPACK: float32, and int8.

Files take one image. Its Python package needs torch also where files are only run, and has one
pool of threads for the whole process: a session whose number of threads is not the pool's sets it,
and reloads its file, before it runs. There is no int8-weights: XNNPACK's convolutions take float
images with float weights only. Nor float16: its kernels for it are for Arm alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bevel.core.errors import MeasurementError, one_line
from bevel.core.quiet import quiet
from bevel.core.signature import TensorSignature

with quiet():  # it tells which files about the processor it cannot read, once
    import torch
    from executorch.extension.pybindings import portable_lib as _library
    from executorch.runtime import Runtime

    _library._threadpool_get_thread_count()

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bevel.core.recipe import Quantization
    from bevel.core.records import Operator

SUFFIX = ".pte"
PRECISIONS = ("float32", "int8")
METHOD = "forward"
TYPES = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 6: "float32", 7: "float64"}
"""ExecuTorch's numbers of scalar types."""


def version() -> str:
    """Version of ExecuTorch."""
    return f"executorch {package_version('executorch')}"


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
    """Write a .pte file; see `bevel.export`."""
    from bevel.graph.copying import in_order
    from bevel.graph.program import export_program

    # ExecuTorch's passes fail on weights that lie otherwise.
    program = export_program(in_order(net), example_inputs, dynamic=False)
    with quiet():  # ExecuTorch and torchao talk while they are imported
        from bevel.runtimes import _executorch_file
    return _executorch_file.write(
        program, example_inputs, precision, calibration or (), quantization, path
    )


def quantizer(options: Quantization) -> Any:
    """The torchao quantizer that says what its int8 is."""
    with quiet():  # ExecuTorch and torchao talk while they are imported
        from bevel.runtimes._executorch_file import IN_FLOAT
        from bevel.runtimes._xnnpack import XnnpackQuantizer
    return XnnpackQuantizer(options.ranges, in_float=IN_FLOAT)


class _Pool:
    """The process's threads; `generation` counts how often they were replaced."""

    generation = 0

    @classmethod
    def resize(cls, threads: int) -> None:
        """Have this many; files that were loaded before must not run any more."""
        if _library._threadpool_get_thread_count() != threads:
            with quiet():
                _library._unsafe_reset_threadpool(threads)
            cls.generation += 1


class ExecuTorchSession:
    """A .pte file loaded on the CPU.

    Raises:
        MeasurementError: the file is no program that this version runs.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._path, self._threads = path, threads
        try:
            self._content = path.read_bytes()
        except OSError as error:
            raise MeasurementError(f"cannot read {path}: {error.strerror}") from error
        self._load()
        meta = self._method.metadata
        self.inputs = [
            _signature(meta.input_tensor_meta(i), "input", i) for i in range(meta.num_inputs())
        ]
        self.outputs = [
            _signature(meta.output_tensor_meta(i), "output", i) for i in range(meta.num_outputs())
        ]

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Arrays for the inputs, in order, to arrays of the outputs."""
        if len(arrays) != len(self.inputs):
            raise MeasurementError(f"got {len(arrays)} inputs, the file takes {len(self.inputs)}")
        for signature, array in zip(self.inputs, arrays, strict=True):
            if list(array.shape) != signature.shape or str(array.dtype) != signature.dtype:
                raise MeasurementError(
                    f"the input '{signature.name}' takes {signature.dtype} of shape "
                    f"{tuple(signature.shape)}, got {array.dtype} of shape {array.shape}"
                )
        if self._generation != _Pool.generation or self._threads != _pool_size():
            self._load()
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        try:
            outputs = self._method.execute(tensors)
        except RuntimeError as error:
            raise MeasurementError(f"ExecuTorch cannot run it: {one_line(error, 160)}") from error
        return [output.numpy() for output in outputs]

    def _load(self) -> None:
        """Load the file into the pool of threads."""
        _Pool.resize(self._threads)
        self._generation = _Pool.generation
        self._method = load(self._path, self._content)[1]


def _pool_size() -> int:
    size: int = _library._threadpool_get_thread_count()
    return size


def open_session(path: Path, threads: int) -> ExecuTorchSession:
    """Load a .pte file for this many threads."""
    return ExecuTorchSession(path, threads)


def load(path: Path, content: bytes, *, events: bool = False) -> tuple[Any, Any]:
    """A program and its method; with `events` it records how long operators take.

    Raises:
        MeasurementError: the content is no program that this version runs.
    """
    try:
        with quiet():
            program = Runtime.get().load_program(content, enable_etdump=events)
            method = program.load_method(METHOD)
    except (RuntimeError, KeyError, ValueError) as error:
        raise MeasurementError(f"ExecuTorch cannot load {path}: {one_line(error, 160)}") from error
    return program, method


def operators(path: Path) -> list[Operator]:
    """What the file holds, also inside XNNPACK's part of it; see `_executorch_operators`."""
    with quiet():
        from bevel.runtimes._executorch_operators import list_operators

    return list_operators(path)


def profile(path: Path, arrays: Sequence[np.ndarray], threads: int) -> dict[str, float]:
    """Median milliseconds per run of each operator, by name, from ExecuTorch's own events."""
    _Pool.resize(threads)
    with quiet():
        from bevel.runtimes._executorch_operators import profile_operators

        return profile_operators(path, [torch.from_numpy(array) for array in arrays])


def _signature(meta: Any, kind: str, index: int) -> TensorSignature:
    return TensorSignature(
        name=f"{kind}_{index}" if index else kind,
        shape=list(meta.sizes()),
        dtype=TYPES.get(meta.dtype(), f"type {meta.dtype()}"),
    )
