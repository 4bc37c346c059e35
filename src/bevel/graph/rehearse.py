"""Rehearse a pruned network without computing anything: does its own code follow the new sizes?

The network, dressed in meta tensors of the pruned shapes, runs its ordinary Python forward. Every
torch function that it calls is compared with the recorded pass: its result must have the shape
that the layers of ids predict. Where it does not, the fault is noted, with the line of code, and
the rehearsal goes on with what was predicted, so one run finds every size that is written in the
code.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from bevel.core.errors import FORWARD_FAULTS, one_line
from bevel.graph.arguments import ARITHMETIC, integers, leaves, name_of, numbers
from bevel.graph.faults import (
    Fault,
    Kind,
    Written,
    given_names,
    is_user,
    place_of,
    user_frame,
)
from bevel.graph.layers import Layer
from bevel.graph.prediction import Prediction
from bevel.graph.record import READS_DATA, decomposed, is_frame, run
from bevel.graph.recording import Frame, Recording, Value
from bevel.graph.stage import Stage


def rehearse(
    stage: Stage, recording: Recording, prediction: Prediction, *, until: float = math.inf
) -> list[Fault]:
    """Run the network at its predicted sizes; returns where its code does not follow them.

    `until`: the position in the recording at which the run may end.
    """
    mode = _Rehearsal(recording, prediction, stage, until)
    try:
        with (
            stage.dressed(prediction) as net,
            torch.no_grad(),
            decomposed(),
            mode,
        ):
            run(net, stage.inputs)
    except _EndedError:
        pass  # what was found until then is noted
    except FORWARD_FAULTS as error:
        mode.faults.append(mode.raised(error))
    return mode.faults


class _EndedError(Exception):
    """No need to go on, or no way: the shrunken network took another path through its code."""


class _Seen(TorchDispatchMode):
    """Collects the integers among the arguments of every operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.calls: list[tuple[Any, set[int]]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """As for the recorder's."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls.append((func, set(integers((args, kwargs or {})))))
        return func(*args, **(kwargs or {}))


_FOLLOWING = frozenset(
    {
        "relu", "relu_", "relu6", "silu", "silu_", "gelu", "hardswish", "hardswish_", "mish",
        "hardsigmoid", "sigmoid", "sigmoid_", "tanh", "hardtanh", "hardtanh_", "leaky_relu", "elu",
        "dropout", "softmax", "log_softmax", "exp", "log", "sqrt", "rsqrt", "clamp", "erf", "abs",
        "add", "add_", "__add__", "__radd__", "iadd", "__iadd__", "mul", "mul_", "__mul__",
        "__rmul__", "__imul__", "sub", "sub_", "__sub__", "rsub", "__rsub__", "__isub__", "div",
        "div_", "__truediv__", "__rdiv__", "__rtruediv__", "true_divide", "pow", "__pow__",
        "__rpow__", "neg", "eq", "__eq__", "ne", "__ne__", "lt", "__lt__", "gt", "__gt__", "le",
        "__le__", "ge", "__ge__", "masked_fill", "masked_fill_", "where", "lerp", "maximum",
        "minimum", "contiguous", "float", "to", "type_as", "clone", "detach",
        "conv1d", "conv2d", "conv3d", "linear", "matmul", "__matmul__", "bmm", "einsum",
        "batch_norm", "instance_norm", "layer_norm", "rms_norm", "lstm", "gru",
        "scaled_dot_product_attention", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
        "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
        "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
        "boolean_dispatch", "interpolate", "grid_sample", "mean", "sum",
        "cat", "concat", "stack", "transpose", "permute", "unsqueeze", "flatten", "roll", "flip",
        "normalize", "group_norm", "norm", "var", "std", "amax", "amin", "cumsum", "clamp_min",
        "clamp_max", "addcmul", "remainder", "sin", "cos", "multi_head_attention_forward",
    }
)  # fmt: skip
"""Functions whose result has the right shape if their arguments have it.

None of them takes a length as a number, but for `_NORMALIZED`, `_ATTENTION` and what handlers
`expect`.
"""

_ATTENTION = "multi_head_attention_forward"
"""The function that is told its width, which has to fit its weights."""

_WIDTH = "embed_dim_to_check"

_RESHAPING = frozenset({"view", "reshape"})
"""Functions whose arguments are a tensor and the sizes that it gets."""

_NORMALIZED = frozenset({"layer_norm", "rms_norm"})
"""Functions whose second argument is the shape of the last dimensions of the first."""

COMPUTED = "a number computed from a size"


class _Rehearsal(TorchFunctionMode):
    """Compares every torch function of the pass with the recorded one."""

    def __init__(
        self, recording: Recording, prediction: Prediction, stage: Stage, until: float
    ) -> None:
        super().__init__()
        self.recording, self.prediction, self.stage = recording, prediction, stage
        self.until = until
        self.position = 0
        self.faults: list[Fault] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.position > self.until:
            raise _EndedError
        kwargs = kwargs or {}
        if _inside_torch(sys._getframe(1)):  # a scripted function, interpreted on meta tensors
            return func(*args, **kwargs)
        if func == _DEVICE:  # code that asks gets the answer it got when it was recorded
            return self.stage.device
        if _names_device(args, kwargs):
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        expected = self._next()
        if expected is None or expected.function != func:
            # Functions whose result is no tensor are not part of the recording.
            result = func(*args, **kwargs) if func not in READS_DATA else None
            if func in READS_DATA or is_frame(func, result):
                other = f"it calls {name_of(func)}, the original {_called(expected)}"
                self.faults.append(self.fault(None, other, kind=Kind.PATH))
                raise _EndedError
            return result
        if func in READS_DATA:
            self.position += 1
            return expected.result
        name, given = name_of(func), (*args, *kwargs.values())
        known = None
        if name in _FOLLOWING:
            known = self._shortcut(expected, given)
        elif name in _RESHAPING:
            known = self._reshaped(expected, args, kwargs)
        elif self._as_recorded(expected, given):
            self.position += 1
            return self._result(expected, given)  # None, if it was recorded so
        if known is not None:
            self.position += 1
            return known
        return self._compare(expected, func, args, kwargs)

    def _shortcut(self, frame: Frame, given: tuple[Any, ...]) -> Any:
        """The predicted result of a function that has no sizes among its arguments.

        None unless every tensor has its predicted shape and everything else is as recorded, or
        follows as it shall.
        """
        follow = self._following(frame) if _on_meta(given) else None
        if follow is None:
            return None
        if not self._same(given, frame.arguments, follow):
            if name_of(frame.function) not in ARITHMETIC:
                return None
            if not self._same(_other_numbers(given, frame.arguments), frame.arguments, follow):
                return None
            self.faults.append(self.fault(frame, COMPUTED, kind=Kind.NUMBER))
        return self._result(frame, given)

    def _as_recorded(self, frame: Frame, given: tuple[Any, ...]) -> bool:
        """Whether any function gives what was recorded: nothing that it is given has changed."""
        if not _on_meta(given) or self._watched(frame):
            return False
        if any(
            isinstance(leaf, Value) and self.prediction.shape(leaf) != leaf.shape
            for leaf in leaves(frame.result)
        ):
            return False
        return self._same(given, frame.arguments, {}, shape=_recorded_shape)

    def _result(self, frame: Frame, given: Sequence[Any]) -> Any:
        """What is predicted of a function, or the argument that it works on in place."""
        for argument, value in zip(given, frame.arguments, strict=True):
            if value is frame.result and value is not None:
                return argument
        return self._predicted(frame)

    def _reshaped(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The predicted result of a view or reshape to the predicted sizes, None if it is not."""
        source, result = frame.arguments[0], frame.result
        if kwargs or not isinstance(source, Value) or self._watched(frame):
            return None
        x, *sizes = args
        if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
            sizes = list(sizes[0])
        want = self.prediction.shape(result)
        if x.shape != self.prediction.shape(source) or x.numel() != math.prod(want):
            return None
        if any(type(size) is not int for size in sizes) or sizes.count(-1) > 1:
            return None
        if len(sizes) != len(want) or not x.is_meta:
            return None
        fits = all(size in (length, -1) for size, length in zip(sizes, want, strict=True))
        return self._predicted(frame) if fits else None

    def _watched(self, frame: Frame) -> bool:
        """Whether integers among the operators' arguments have to follow lengths."""
        positions = range(frame.calls.start, frame.calls.stop)
        return any(position in self.prediction.state.expected for position in positions)

    def _following(self, frame: Frame) -> dict[int, int] | None:
        """Lengths among the arguments, and what they have to be; None where they cannot fit."""
        follow: dict[int, int] = {}
        expected = self.prediction.state.expected
        for position in range(frame.calls.start, frame.calls.stop):
            for number, extent in expected.get(position, ()):
                follow[number] = self.prediction.length((extent,)) * (-1 if number < 0 else 1)
        name = name_of(frame.function)
        if name == _ATTENTION:
            width = self._width_of_attention(frame)
            return None if width is None else follow | {frame.argument(3, _WIDTH): width}
        if name in _NORMALIZED:
            value, shape = frame.arguments[:2]
            tail = self.prediction.shape(value)[-len(shape) :]
            follow.update(zip(shape, tail, strict=True))
        return follow

    def _width_of_attention(self, frame: Frame) -> int | None:
        """What torch's attention has to be told, None if its weights do not fit what it gets."""
        query, packed = frame.argument(0, "query"), frame.argument(5, "in_proj_weight")
        last = frame.argument(11, "out_proj_weight")
        if not isinstance(packed, Value) or not isinstance(last, Value):
            return None
        left = self.prediction.shape(query)[-1]
        fits = self.prediction.shape(packed) == (3 * left, left)
        fits = fits and self.prediction.shape(last)[1] == left
        return left if fits and left % frame.argument(4, "num_heads") == 0 else None

    def _same(
        self,
        given: Sequence[Any],
        recorded: Sequence[Any],
        follow: dict[int, int],
        shape: Callable[[Value], tuple[int, ...]] | None = None,
    ) -> bool:
        """Whether tensors have the predicted shapes, or those of `shape`, and all else is equal."""
        shape = shape or self.prediction.shape
        if len(given) != len(recorded):
            return False
        for argument, value in zip(given, recorded, strict=True):
            if isinstance(value, Value):
                if not isinstance(argument, Tensor):
                    return False
                if argument.shape != shape(value):
                    return False
            elif isinstance(value, list | tuple):
                if not isinstance(argument, list | tuple):
                    return False
                if not self._same(argument, value, follow, shape):
                    return False
            elif type(value) is int and value in follow:
                if argument != follow[value]:
                    return False
            elif argument is not value and not _equal(argument, value):
                return False
        return True

    def _next(self) -> Frame | None:
        frames = self.recording.frames
        return frames[self.position] if self.position < len(frames) else None

    def _compare(
        self, frame: Frame, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        try:
            result, seen = self._call(frame, func, args, kwargs)
        except FORWARD_FAULTS as error:
            self.position += 1
            return self._repair(frame, one_line(error, 120), (args, kwargs))
        if not is_frame(func, result):  # this call of the function gave no tensor
            return result
        self.position += 1
        wrong = self._wrong(frame, result)
        if wrong:
            return self._repair(frame, wrong, (args, kwargs))
        for unexpected in self._unexpected(frame, seen):
            self.faults.append(self.fault(frame, unexpected, (args, kwargs)))
        if numbers(func, (args, kwargs)) != numbers(func, frame.arguments):
            self.faults.append(self.fault(frame, COMPUTED, kind=Kind.NUMBER))
        return result

    def _repair(self, frame: Frame, error: str, arguments: Any) -> Any:
        """Note what went wrong and go on with what was predicted.

        Where the tensors of the frame have their recorded sizes, the sizes come from data, and
        there is nothing to note, unless the code passes other numbers than in the recording.
        """
        changed = self._changed(frame)
        if changed:
            self.faults.append(self.fault(frame, error, arguments))
        elif sorted(integers(arguments)) != sorted(integers(frame.arguments)):
            self.faults.append(self.fault(frame, error, arguments, kind=Kind.ELSEWHERE))
        return self._predicted(frame)

    def _call(
        self, frame: Frame, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> tuple[Any, _Seen | None]:
        """The function on meta tensors, or, where it cannot, on zeros."""
        seen = _Seen() if self._watched(frame) else None
        try:
            if seen is not None:
                with seen:
                    return func(*args, **kwargs), seen
            return func(*args, **kwargs), None
        except FORWARD_FAULTS:
            if not any(
                isinstance(leaf, Tensor) and leaf.device.type != "meta"
                for leaf in leaves((args, kwargs))
            ) and not isinstance(sys.exc_info()[1], NotImplementedError):
                raise
            args, kwargs = tree_map(_zeros, (args, kwargs))
            result = func(*args, **kwargs)
            return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, result), None

    def _changed(self, frame: Frame) -> bool:
        """Whether any tensor of the frame has another size than in the recording."""
        return any(self.prediction.shape(value) != value.shape for value in self._values(frame))

    def _values(self, frame: Frame) -> Iterator[Value]:
        for leaf in leaves((frame.arguments, frame.result)):
            if isinstance(leaf, Value):
                yield leaf
        for call in self.recording.calls[frame.calls]:
            yield from call.inputs

    def _predicted(self, frame: Frame) -> Any:
        def make(leaf: Any) -> Any:
            if not isinstance(leaf, Value):
                return leaf
            return torch.empty(self.prediction.shape(leaf), dtype=leaf.dtype, device="meta")

        result = frame.result
        if isinstance(result, Value):
            return make(result)
        if type(result) in (tuple, list) and all(isinstance(item, Value) for item in result):
            return type(result)(map(make, result))
        return tree_map(make, result)

    def _wrong(self, frame: Frame, result: Any) -> str:
        given, expected = list(leaves(result)), list(leaves(frame.result))
        if len(given) != len(expected):
            return f"{len(given)} results instead of {len(expected)}"
        for leaf, value in zip(given, expected, strict=True):
            if isinstance(value, Value):
                want = self.prediction.shape(value)
                if 0 in value.shape:  # nothing is in it, so it has no ids
                    continue
                if not isinstance(leaf, Tensor) or tuple(leaf.shape) != want:
                    got = tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf
                    return f"its shape would be {got} instead of {want}"
        return ""

    def _unexpected(self, frame: Frame, seen: _Seen | None) -> Iterator[str]:
        if seen is None:
            return
        calls = self.recording.calls[frame.calls]
        if [call.function for call in calls] != [function for function, _ in seen.calls]:
            return
        for offset, (_, given) in enumerate(seen.calls):
            position = frame.calls.start + offset
            for number, extent in self.prediction.state.expected.get(position, ()):
                want = self.prediction.length((extent,)) * (-1 if number < 0 else 1)
                if want not in given:
                    yield f"it uses positions {sorted(given)}, expected {want}"

    # -- faults ---------------------------------------------------------------------------

    def fault(
        self, frame: Frame | None, error: str, arguments: Any = (), *, kind: Kind = Kind.HERE
    ) -> Fault:
        """A fault at the line of the network's code that is running."""
        code = user_frame(sys._getframe())
        written: tuple[Written, ...] = ()
        blamed: list[Layer] = []
        lengths: tuple[Written, ...] = ()
        changes: tuple[tuple[int, int], ...] = ()
        if frame is not None:
            present = list(integers(arguments))
            before = list(integers(frame.arguments))
            if len(present) == len(before):
                pairs = zip(before, present, strict=True)
                changes = tuple((old, new) for old, new in pairs if old != new)
            lengths = tuple(w for w in self._lengths(frame) if w.predicted != w.number)
            written = tuple(w for w in lengths if w.number in present)
            for value in self._values(frame):
                blamed += self.prediction.state.layers.get(value.index, ())
        return Fault(
            modules=self._running(),
            place=place_of(code),
            names=frozenset(code.f_code.co_names) if code is not None else frozenset(),
            written=written,
            blamed=tuple(blamed),
            error=f"{name_of(frame.function)}: {error}" if frame is not None else error,
            kind=kind,
            given=given_names(code) if written else (),
            lengths=lengths,
            changes=changes,
            position=self.position,
        )

    def _running(self) -> tuple[str, ...]:
        """The modules whose forward is running, innermost first."""
        names: dict[str, None] = {}
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _MODULE_CALL:
                name = self.stage.module_names.get(id(frame.f_locals["self"]))
                if name is not None:
                    names[name] = None
            frame = frame.f_back
        return tuple(names) or ("",)

    def raised(self, error: BaseException) -> Fault:
        """A fault where the network's own code raised an error."""
        trace = error.__traceback__
        code: FrameType | None = None
        while trace is not None:
            if is_user(trace.tb_frame):
                code = trace.tb_frame
            trace = trace.tb_next
        owner = code.f_locals.get("self") if code is not None else None
        name = self.stage.module_names.get(id(owner))
        values = self._recent()
        blamed = [x for v in values for x in self.prediction.state.layers.get(v.index, ())]
        return Fault(
            modules=(name,) if name is not None else self._last_modules(),
            place=place_of(code),
            names=frozenset(code.f_code.co_names) if code is not None else frozenset(),
            written=tuple(w for v in values for w in self._of(v) if w.predicted != w.number),
            blamed=tuple(blamed),
            error=one_line(error, 120) or type(error).__name__,
            kind=Kind.RAISED,
            position=self.position,
        )

    def _recent(self) -> list[Value]:
        """The tensors around the place where the pass stopped."""
        frames = self.recording.frames[max(self.position - 1, 0) : self.position + 1]
        return [value for frame in frames for value in self._values(frame)]

    def _last_modules(self) -> tuple[str, ...]:
        frame = self._next() or self.recording.frames[-1]
        return (frame.module,)

    def _lengths(self, frame: Frame) -> Iterator[Written]:
        """The lengths that may be written as numbers in a call of this frame."""
        for leaf in leaves(frame.result):
            if isinstance(leaf, Value):
                yield from self._of(leaf)
        for position in range(frame.calls.start, frame.calls.stop):
            for number, extent in self.prediction.state.expected.get(position, ()):
                yield Written(number, self.prediction.length((extent,)), (extent,), extent.ids)

    def _of(self, value: Value) -> Iterator[Written]:
        layers = self.prediction.state.layers.get(value.index, ())
        shape = self.prediction.shape(value)
        for dim, extents in self.prediction.state.shrinking(value):
            first = next(layer for layer in layers if layer.dim == dim)
            ids = first.compact().reshape(-1).numpy()
            yield Written(value.shape[dim], shape[dim], extents, ids)


_DEVICE = torch.Tensor.device.__get__

_MODULE_CALL = nn.Module._call_impl.__code__

_INSIDE = tuple(
    f"{Path(torch.__file__).parent}{os.sep}{part}"
    for part in ("_refs", "_prims", "_decomp", "_meta_registrations")
)
"""Torch's own implementation in Python of operators on meta tensors."""


def _inside_torch(frame: FrameType | None) -> bool:
    """Whether a call comes from there."""
    while frame is not None and frame.f_code.co_filename == torch._ops.__file__:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(_INSIDE)


def _names_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a device is among the arguments."""
    return any(isinstance(a, torch.device) for a in (*args, *kwargs.values()))


def _recorded_shape(value: Value) -> tuple[int, ...]:
    return value.shape


_COMPARABLE = frozenset(
    {int, float, bool, str, type(None)}
    | {torch.dtype, torch.device, torch.layout, torch.memory_format}
)


def _equal(argument: Any, recorded: Any) -> bool:
    """Whether an argument that is no tensor is the same; what has no plain equality is not."""
    if type(argument) is slice and type(recorded) is slice:  # tensors may be in it
        parts = ((s.start, s.stop, s.step) for s in (argument, recorded))
        return all(map(_equal, *parts))
    known = type(argument) in _COMPARABLE and type(recorded) in _COMPARABLE
    return known and bool(argument == recorded)


def _other_numbers(given: Sequence[Any], recorded: Sequence[Any]) -> list[Any]:
    """The arguments, with numbers as they were recorded."""
    pairs = zip(given, recorded, strict=False)
    alike = [b if type(a) in _NUMBERS and type(b) in _NUMBERS else a for a, b in pairs]
    return [*alike, *given[len(alike) :]]


_NUMBERS = (int, float)


def _on_meta(given: Sequence[Any]) -> bool:
    """Whether a tensor among the arguments is one of the stage's.

    The others may be what a module keeps besides its parameters, such as a table of positions.
    """
    for argument in given:
        if isinstance(argument, Tensor):
            if argument.is_meta:
                return True
        elif isinstance(argument, list | tuple) and _on_meta(argument):
            return True
    return False


def _to_meta(leaf: Any) -> Any:
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def _zeros(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.device.type == "meta":
        return torch.zeros(leaf.shape, dtype=leaf.dtype)
    return leaf


def _called(frame: Frame | None) -> str:
    return "ends there" if frame is None else name_of(frame.function)
