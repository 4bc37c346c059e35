"""Record one ordinary forward pass: primitive operators, and the torch functions around them.

A `TorchDispatchMode` sees every primitive operator with concrete shapes, whatever Python the
network runs to get there, so nothing has to be traced, scripted or exported. A
`TorchFunctionMode` sees the functions that the network's own code calls; the pass can be
rehearsed function by function with other sizes (`graph.rehearse`). Tensors become `Value`s; a
`Value` that is a parameter or buffer knows its name. The arithmetic is left out (`graph.unknown`)
but for what the network looks at (`graph.deferred`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bevel.core.errors import FORWARD_FAULTS, ModelError, one_line
from bevel.core.modes import evaluating
from bevel.graph.arguments import leaves
from bevel.graph.deferred import Deferred, written
from bevel.graph.holding import holding
from bevel.graph.naming import named_modules, named_tensors
from bevel.graph.recording import Call, Frame, Recording, Value, values_in
from bevel.graph.unknown import LostTrackError, looks, zeros

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""A tensor, the positional arguments of the network's forward, or its keyword arguments."""

LARGEST_INDEX = 1 << 20
"""Integer tensors up to this many elements are kept, because they may be indices."""


def as_arguments(example_inputs: ExampleInputs) -> tuple[Any, ...]:
    """The positional arguments that `example_inputs` stands for; none for a mapping."""
    if isinstance(example_inputs, Mapping):
        return ()
    return (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)


def as_keywords(example_inputs: ExampleInputs) -> dict[str, Any]:
    """The keyword arguments that `example_inputs` stands for."""
    return dict(example_inputs) if isinstance(example_inputs, Mapping) else {}


def run(net: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Call the network on its example inputs."""
    return net(*as_arguments(example_inputs), **as_keywords(example_inputs))


def map_inputs(example_inputs: ExampleInputs, change: Callable[[Any], Any]) -> ExampleInputs:
    """The example inputs with every leaf replaced."""
    if isinstance(example_inputs, Tensor):
        return change(example_inputs)  # type: ignore[no-any-return]
    if isinstance(example_inputs, Mapping):
        return {key: tree_map(change, value) for key, value in example_inputs.items()}
    return tuple(tree_map(change, value) for value in example_inputs)


READS_DATA = frozenset(
    {
        Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.equal, Tensor.allclose,
        Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
        Tensor.__contains__, Tensor.is_nonzero, torch.equal, torch.allclose, torch.is_nonzero,
        torch.is_same_size,
    }
)  # fmt: skip
"""Functions whose Python result depends on a tensor's elements."""


_READS_ALL = frozenset({Tensor.tolist, Tensor.numpy})
"""Those that read the memory and call no operator."""

_HOLDERS = (Tensor, tuple, list, dict)
"""Arguments that are or may hold tensors."""


class ModuleStack:
    """The modules whose forward is running, innermost last, by name."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.names = {id(module): name for name, module in modules.items()}
        self.stack: list[str] = []
        self.entries: list[int] = []
        self.entered = 0

    @property
    def entry(self) -> int:
        """The number of the run that the innermost module is in, 0 outside of all."""
        return self.entries[-1] if self.entries else 0

    @property
    def top(self) -> str:
        """The innermost module, '' for the network itself."""
        return self.stack[-1] if self.stack else ""

    @contextmanager
    def following(self) -> Any:
        """Follow every module's forward inside this context."""
        before = register_module_forward_pre_hook(self._enter)
        after = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield self
        finally:
            before.remove()
            after.remove()

    def _enter(self, module: nn.Module, _inputs: Any) -> None:
        self.stack.append(self.names.get(id(module), self.top))
        self.entered += 1
        self.entries.append(self.entered)

    def _leave(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self.stack.pop()
        self.entries.pop()


class _Operators(TorchDispatchMode):
    """Turns the operators of a pass into `Call`s; `earnest` computes them all at once."""

    def __init__(self, net: nn.Module, *, earnest: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.recording = Recording()
        modules = named_modules(net)
        self.tensors = named_tensors(modules)
        self.names = {id(tensor): name for name, tensor in reversed(self.tensors.items())}
        self.modules = ModuleStack(modules)
        # By address; weak, since an activation may be freed during the pass and its address used
        # again.
        self.values: dict[int, tuple[weakref.ref[Tensor], Value]] = {}
        self.count = 0
        self.earnest = earnest
        self.unknown: set[int] = set()
        self.seen: dict[int, weakref.ref[Tensor]] = {}
        self.deferred = Deferred(self.tensors, self.unknown, self.seen)
        self.looked = False  # who has looked once will look at more that comes of it
        self._looking = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch shall keep its compiler away, which it would import for it: seconds."""
        return False

    def value(self, leaf: Any) -> Any:
        """The `Value` of a tensor; containers leaf by leaf, anything else unchanged."""
        if isinstance(leaf, Tensor):
            return self._known(leaf) or self._new(leaf)
        if type(leaf) in (list, tuple):
            plain = not any(isinstance(item, _HOLDERS) for item in leaf)
            return type(leaf)(leaf if plain else [self.value(item) for item in leaf])
        if not isinstance(leaf, _HOLDERS):  # a number, a dtype, a device
            return leaf
        return tree_map(lambda x: self.value(x) if isinstance(x, Tensor) else x, leaf)

    def _known(self, tensor: Tensor) -> Value | None:
        """The `Value` of a tensor that was met before; some operators reshape it in place."""
        entry = self.values.get(id(tensor))
        if entry is None or entry[0]() is not tensor or entry[1].shape != tensor.shape:
            return None
        return entry[1]

    def _new(self, tensor: Tensor, *, unknown: bool = False) -> Value:
        index = not tensor.is_floating_point() and tensor.numel() <= LARGEST_INDEX
        data = tensor.detach() if index and not unknown and not tensor.is_complex() else None
        name = self.names.get(id(tensor))
        value = Value(self.count, tuple(tensor.shape), name, data, tensor.dtype)
        self.count += 1
        self.seen[value.index] = reference = weakref.ref(tensor)
        self.values[id(tensor)] = (reference, value)
        if unknown:
            self.unknown.add(value.index)
        return value

    def take(self, example_inputs: ExampleInputs) -> None:
        """The elements of the network's own inputs are unknown, unless they may be indices."""
        for leaf in tree_leaves((as_arguments(example_inputs), as_keywords(example_inputs))):
            if isinstance(leaf, Tensor) and not self.earnest:
                value = self._new(leaf, unknown=leaf.is_floating_point())
                if leaf.is_floating_point():
                    self.deferred.hold(value)

    def knows(self, item: Any) -> bool:
        """Whether nothing in an argument is unknown."""
        if isinstance(item, Tensor):
            known = self._known(item)
            return known is None or known.index not in self.unknown
        return not isinstance(item, list | tuple) or all(map(self.knows, item))

    def real(self, item: Any) -> Any:
        """An argument with the true elements of its tensors: computed now, if need be."""
        if isinstance(item, Tensor):
            value = self._known(item)
            if value is None or value.index not in self.unknown:
                return item
            self._looking = True
            try:
                return self.deferred.tensor(value)
            finally:
                self._looking = False
        return type(item)(map(self.real, item)) if isinstance(item, list | tuple) else item

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._looking:  # it was recorded when it was put off
            return func(*args, **kwargs)
        arguments = tuple(self.value(argument) for argument in args)
        keywords = {key: self.value(item) for key, item in kwargs.items()}
        inputs = tuple(values_in((*arguments, *keywords.values()) if keywords else arguments))
        unknown = [value for value in inputs if value.index in self.unknown]
        looked = bool(unknown) and looks(func, args, lambda tensor: not self.knows(tensor))
        writes = func._schema.is_mutable
        self.looked |= looked
        ready = self.looked and not writes and all(map(self.deferred.ready, unknown))
        computed = looked or ready
        with torch._C.DisableTorchFunction():  # a scripted function's operators come here directly
            if not unknown:
                self._write(func, args)
                result = func(*args, **kwargs)
            elif computed:
                if writes:
                    raise LostTrackError
                result = func(*self.real(args), **{k: self.real(x) for k, x in kwargs.items()})
            else:
                result = self._guess(func, args, kwargs)
        outputs = result if isinstance(result, tuple | list) else (result,)
        for output in outputs if unknown else ():
            self._forget(output, looked=looked)
        recorded = tuple(self.value(output) for output in outputs)
        call = Call(func, arguments, keywords, inputs, recorded, self.modules.top)
        self.recording.calls.append(call)
        if unknown and computed:
            self.deferred.done(call)
        elif unknown:
            self.deferred.put_off(call, (args, kwargs))
        return result

    def _write(self, func: torch._ops.OpOverload, args: tuple[Any, ...]) -> None:
        """What was put off and reads the memory that an operator writes to comes first."""
        if not self.earnest and func._schema.is_mutable:
            for position in written(func):
                if position < len(args) and isinstance(args[position], Tensor):
                    self.deferred.before_writing(args[position])

    def _guess(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The result of an operator on unknown tensors: zeros, or what it makes of zeros."""
        writes = func._schema.is_mutable
        if writes and written(func) != [0]:
            raise LostTrackError
        if writes and self.knows(args[0]):
            self._spoil(args[0])
        guess = zeros(func, args, kwargs)
        if guess is not None:
            return guess
        if not writes or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        func(torch.zeros_like(args[0]), *args[1:], **kwargs)  # an error of the network shows here
        return args[0]

    def _spoil(self, target: Tensor) -> None:
        """Whatever lies in the memory of a known tensor becomes unknown.

        Raises:
            LostTrackError: a parameter or buffer lies there.
        """
        self.deferred.before_writing(target)
        memory = target.untyped_storage().data_ptr()
        if not memory:  # without elements
            return
        alive = [(reference(), value) for reference, value in self.values.values()]
        there = [
            value
            for tensor, value in alive
            if tensor is not None and tensor.untyped_storage().data_ptr() == memory
        ]
        for value in there:
            if value.name is not None:
                raise LostTrackError
            self.unknown.add(value.index)
            value.data = None
            self.deferred.hold(value)
        self.deferred.share(there)

    def _forget(self, output: Any, *, looked: bool) -> None:
        """The elements of a result are unknown, but for what was found out by looking."""
        if not isinstance(output, Tensor) or (looked and not output.is_floating_point()):
            return
        value = self._known(output)
        if value is None:
            value = self._new(output, unknown=True)
        else:
            self.unknown.add(value.index)


class _Functions(TorchFunctionMode):
    """Turns the functions that the network's code calls into `Frame`s.

    Attributes:
        running: those that are recording, the innermost last.
        counts: calls so far, by the module's run and function.
        standing_in: whether what is called stands in for a call that was counted already.
    """

    running: ClassVar[list[_Functions]] = []

    def __init__(self, operators: _Operators) -> None:
        super().__init__()
        self.operators = operators
        self.counts: dict[tuple[int, Any], int] = {}
        self.standing_in = False

    def __enter__(self) -> Any:
        self.running.append(self)
        return super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __exit__(self, *error: object) -> None:
        self.running.pop()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def count(self, function: Any) -> int:
        """How many calls of it came before in this run of its module; this one is counted."""
        key = self.operators.modules.entry, function
        self.counts[key] = self.counts.get(key, -1) + 1
        return self.counts[key]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        recording = self.operators.recording
        start = len(recording.calls)
        kwargs = kwargs or {}
        entry = self.operators.modules.entry
        ordinal = -1 if self.standing_in else self.count(func)
        if func in _READS_ALL:
            result = func(*self.operators.real(args), **kwargs)
        else:
            result = func(*args, **kwargs)
        if is_frame(func, result):
            value = self.operators.value
            calls = slice(start, len(recording.calls))
            arguments = (*value(args), *value(tuple(kwargs.values())))
            module = self.operators.modules.top
            frame = Frame(
                func, arguments, tuple(kwargs), value(result), calls, module, entry, ordinal
            )
            recording.frames.append(frame)
        return result


@contextmanager
def standing_in(function: Any) -> Iterator[None]:
    """What is called in here stands in for a call of `function`, which alone is counted."""
    if not _Functions.running:
        yield
        return
    recorder = _Functions.running[-1]
    recorder.count(function)
    recorder.standing_in = True
    try:
        yield
    finally:
        recorder.standing_in = False


def is_frame(function: Any, result: Any) -> bool:
    """Whether a function's result has to be replayed: tensors, or numbers read from tensors."""
    if isinstance(result, Tensor) or function in READS_DATA or function == Tensor.__setitem__:
        return True
    if result is None or isinstance(result, str | int | float | torch.Size):
        return False
    return any(isinstance(leaf, Tensor) for leaf in leaves(result))


@contextmanager
def decomposed() -> Any:
    """Run attention layers as ordinary operators, not as one fused kernel per layer."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def record(net: nn.Module, example_inputs: ExampleInputs) -> Recording:
    """Run the network once in eval mode, without gradients, and return what it did.

    The first try leaves out the arithmetic that nobody looks at, and takes back what the pass
    leaves on the modules; if it fails, or loses track, the network is run in earnest.

    Raises:
        ModelError: the network cannot be called with these inputs.
    """
    try:
        with holding(net):
            return _record(net, example_inputs, _Operators(net, earnest=False))
    except (LostTrackError, *FORWARD_FAULTS):
        pass
    operators = _Operators(net, earnest=True)
    try:
        return _record(net, example_inputs, operators)
    except FORWARD_FAULTS as error:
        calls = operators.recording.calls
        place = calls[-1].module if calls else ""
        raise ModelError(
            f"the network cannot be run on inputs of shape {_shapes(example_inputs)}: "
            f"{one_line(error)} (after {place or 'the first operator'}); "
            f"{_remedy(net, example_inputs)}"
        ) from error


def _remedy(net: nn.Module, example_inputs: ExampleInputs) -> str:
    """What to look at where a network does not take its inputs."""
    given = {leaf.dtype for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)}
    own = {tensor.dtype for tensor in net.parameters() if tensor.is_floating_point()}
    if own and not own & given and any(dtype.is_floating_point for dtype in given):
        names = [" and ".join(sorted(_name(dtype) for dtype in kind)) for kind in (own, given)]
        return f"its weights are {names[0]} and the input {names[1]}: call net.float()"
    return "check the input shape"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _record(net: nn.Module, example_inputs: ExampleInputs, operators: _Operators) -> Recording:
    operators.take(example_inputs)
    with (
        evaluating(net),
        torch.no_grad(),
        decomposed(),
        operators.modules.following(),
        operators,
        _Functions(operators),
    ):
        result = run(net, example_inputs)
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    operators.recording.outputs = [operators.value(leaf) for leaf in leaves]
    return operators.recording


def batch_size(example_inputs: ExampleInputs) -> int:
    """The first dimension of the first tensor with more than one; a list of images counts."""
    values = list(example_inputs.values()) if isinstance(example_inputs, Mapping) else None
    first = (values or as_arguments(example_inputs) or (None,))[0]
    if isinstance(first, list | tuple):
        return max(len(first), 1)
    shape = getattr(first, "shape", (1,))
    return int(shape[0]) if len(shape) else 1


def _shapes(example_inputs: ExampleInputs) -> str:
    arguments = (as_arguments(example_inputs), as_keywords(example_inputs))
    tensors = [a for a in tree_leaves(arguments) if isinstance(a, Tensor)]
    return ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors) or "nothing"
