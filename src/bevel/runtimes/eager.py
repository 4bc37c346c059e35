"""Torch's own kernels, one operator after another: the reference for other runtimes.

A file is a zip of `graph.json`, the operators that `torch.export` recorded, and `weights.bin`. It
is not torch's own .pt2: `torch.export.load` unpickles weights and example inputs without
restriction, and evaluates the text of shape expressions, so a .pt2 from elsewhere may run any
program. Here nothing is unpickled or evaluated, and only operators on tensors are called.

int8 is what the quantized file of an integer runtime should compute, rounded to the same steps but
in float arithmetic: exact, and slower than float32.
"""

from __future__ import annotations

import json
import operator
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bevel.core.errors import MeasurementError, one_line
from bevel.core.quiet import quiet
from bevel.core.signature import TensorSignature

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bevel.core.recipe import Quantization

SUFFIX = ".zip"
PRECISIONS = ("float32", "bfloat16", "int8", "int8-weights")
NAMESPACES = ("aten", "quantized_decomposed", "torchvision")
"""Where a file's operators may come from; torch.ops holds others that read files or run code."""

NUMBERS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv),
        *(operator.mod, operator.neg, operator.pow, operator.getitem),
        *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    )
}
"""What a file may do with sizes, and with the results of operators that have several."""

OBJECTS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
"""Arguments that are stored by their name in `torch`."""

FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
)
"""What a damaged file may raise."""


def version() -> str:
    """Version of torch."""
    return f"torch {torch.__version__}"


def export(
    net: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    precision: str,
    calibration: Iterable[Any] | None,
    quantization: Quantization,
    path: Path,
) -> str | None:
    """Write a zip file of operators and weights; see `bevel.export`."""
    with quiet():  # torchao talks while it is imported
        from bevel.runtimes import _eager_file

    return _eager_file.export(net, example_inputs, precision, calibration, quantization, path)


def quantizer(options: Quantization) -> Any:
    """The torchao quantizer that says what becomes int8."""
    with quiet():  # torchao talks while it is imported
        from bevel.quantization.annotate import FusingQuantizer
        from bevel.quantization.ranges import u8s8

    return FusingQuantizer(u8s8(options.ranges))


class EagerSession:
    """A file's operators, called in their order.

    Raises:
        MeasurementError: the file is damaged, or names what is no operator on tensors.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._threads = threads
        try:
            with quiet(), zipfile.ZipFile(path) as archive:
                graph = json.loads(archive.read("graph.json"))
                weights = bytearray(archive.read("weights.bin"))
                self._constants = {
                    name: _tensor(weights, said) for name, said in graph["tensors"].items()
                }
                self._calls = [_Call(said) for said in graph["calls"]]
                self._results = [str(name) for name in graph["results"]]
                self.inputs = [TensorSignature(**said) for said in graph["inputs"]]
                self.outputs = [TensorSignature(**said) for said in graph["outputs"]]
        except FAULTS as error:
            raise MeasurementError(f"torch cannot load {path}: {one_line(error, 160)}") from error
        self._last = {name: index for index, c in enumerate(self._calls) for name in c.reads}

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Arrays for the inputs, in order, to arrays of the outputs.

        Raises:
            MeasurementError: they do not fit the inputs, or an operator refuses.
        """
        if len(arrays) != len(self.inputs):
            raise MeasurementError(f"got {len(arrays)} inputs, the file takes {len(self.inputs)}")
        for signature, array in zip(self.inputs, arrays, strict=True):
            _check(signature, array)
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                return self._run([torch.tensor(array) for array in arrays])
        except FAULTS as error:
            raise MeasurementError(f"torch cannot run it: {one_line(error, 160)}") from error
        finally:
            torch.set_num_threads(before)

    def _run(self, tensors: Sequence[Tensor]) -> list[np.ndarray]:
        values: dict[str, Any] = dict(self._constants)
        values |= {s.name: tensor for s, tensor in zip(self.inputs, tensors, strict=True)}
        kept = set(self._results)
        for index, call in enumerate(self._calls):
            values[call.name] = call(values)
            for name in call.reads:
                if self._last[name] == index and name not in kept:
                    values.pop(name, None)
        found: list[np.ndarray] = [values[name].numpy() for name in self._results]
        return found


class _Call:
    """One operator of a file: its name, what it calls, and with which arguments."""

    def __init__(self, said: dict[str, Any]) -> None:
        self.name = str(said["name"])
        self._function = _function(str(said["target"]))
        self.reads: list[str] = []
        self._arguments = [self._decode(item) for item in said["args"]]
        self._named = {str(key): self._decode(item) for key, item in said["kwargs"].items()}

    def __call__(self, values: dict[str, Any]) -> Any:
        """Its result, where `values` holds what was computed before."""
        arguments = [_filled(item, values) for item in self._arguments]
        named = {key: _filled(item, values) for key, item in self._named.items()}
        return self._function(*arguments, **named)

    def _decode(self, item: Any) -> Any:
        if isinstance(item, list):
            return [self._decode(part) for part in item]
        if not isinstance(item, dict):
            return item
        ((kind, text),) = item.items()
        if kind == "value":
            self.reads.append(str(text))
            return _Value(str(text))
        if kind == "device":
            return torch.device("cpu")
        found = getattr(torch, str(text))
        if not isinstance(found, OBJECTS[kind]):
            raise TypeError(f"'{text}' is no {kind}")
        return found


class _Value(str):
    """Name of an earlier result, where an argument is that."""

    __slots__ = ()


def open_session(path: Path, threads: int) -> EagerSession:
    """Load a file for this many threads."""
    return EagerSession(path, threads)


def _filled(item: Any, values: dict[str, Any]) -> Any:
    if isinstance(item, _Value):
        return values[item]
    if isinstance(item, list):
        return [_filled(part, values) for part in item]
    return item


def _function(target: str) -> Callable[..., Any]:
    """What a file's target names: an operator on tensors, or arithmetic on sizes.

    Raises:
        ValueError: it is neither.
    """
    namespace, _, rest = target.partition(".")
    if namespace == "operator" and rest in NUMBERS:
        return NUMBERS[rest]
    name, _, overload = rest.partition(".")
    if namespace in NAMESPACES:
        if namespace == "quantized_decomposed":
            from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers them
        if namespace == "torchvision":
            import torchvision  # noqa: F401  registers them
        found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        if isinstance(found, torch._ops.OpOverload) and _on_tensors(found):
            return found
    raise ValueError(f"'{target}' is no operator that a file may call")


def _on_tensors(overload: Any) -> bool:
    """Whether it takes or gives tensors, and names no file."""
    schema = overload._schema
    values = [*schema.arguments, *schema.returns]
    return any("Tensor" in str(value.type) for value in values) and not any(
        value.name == "filename" for value in schema.arguments
    )


def _tensor(weights: bytearray, said: dict[str, Any]) -> Tensor:
    """A stored tensor."""
    dtype = getattr(torch, said["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"'{said['dtype']}' is no type of tensors")
    shape = [int(size) for size in said["shape"]]
    count = int(np.prod(shape))
    if not count:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(weights, dtype=dtype, count=count, offset=int(said["offset"]))
    return flat.reshape(shape).clone()


def _check(signature: TensorSignature, array: np.ndarray) -> None:
    """The graph was recorded for these types and sizes; operators may take others and be wrong."""
    fits = array.ndim == len(signature.shape) and all(
        isinstance(said, str) or said == size
        for said, size in zip(signature.shape, array.shape, strict=True)
    )
    if not fits or array.dtype != signature.dtype:
        raise MeasurementError(
            f"the input '{signature.name}' takes {signature.dtype} of shape "
            f"{tuple(signature.shape)}, got {array.dtype} of shape {array.shape}"
        )
