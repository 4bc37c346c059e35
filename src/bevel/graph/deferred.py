"""Operators that a pass has put off, carried out once somebody looks at what they give."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bevel.graph.recording import Call, Value

Seen = dict[int, "weakref.ref[Tensor]"]
"""What the network's code has of values."""

FEW = 1 << 16
"""Elements up to which computing takes no longer than putting off."""


MANY = 100
"""Tensors from which on it is worth while to look for those that are needed no more."""


class Deferred:
    """The calls of a pass that were not computed, and what is known of the tensors they need.

    Values that share memory are told from the operators' schemas. A call is carried out after all
    earlier ones that write to the memory it reads and, where it writes itself, after those that
    read what was there before.
    """

    def __init__(self, named: Mapping[str, Tensor], unknown: set[int], seen: Seen) -> None:
        """`unknown` and `seen` are the recorder's, by the values' indices, and go on changing.

        `named` are parameters and buffers.
        """
        self._named = named
        self._unknown = unknown
        self._seen = seen
        self._new: list[tuple[Call, Any]] = []
        self._lent: set[int] = set()  # the memory that other known inputs of calls lie in
        self._own: set[int] = set()  # that of what is named
        self._real: dict[int, Tensor] = {}  # by the value's index: its elements
        self._given: dict[int, Tensor] = {}  # of those that were never unknown
        self._true: set[int] = set()  # of those seen, the unknown ones with the right elements
        self._memory: dict[int, int] = {}
        self._pending: dict[int, Call] = {}
        self._writers: defaultdict[int, set[int]] = defaultdict(set)
        self._readers: defaultdict[int, set[int]] = defaultdict(set)
        self._uses: Counter[int] = Counter()
        self._count = 0
        self._kept = MANY

    def __len__(self) -> int:
        """How many calls have not been carried out."""
        return len(self._new) + len(self._pending)

    def hold(self, value: Value) -> None:
        """The tensor that the network's code has of an unknown value has its elements."""
        self._true.add(value.index)

    def share(self, values: Iterable[Value]) -> None:
        """These values lie in the same memory."""
        first, *others = (value.index for value in values)
        self._memory |= dict.fromkeys(others, self._memory.get(first, first))

    def put_off(self, call: Call, arguments: Any) -> None:
        """Carry a call out later.

        Args:
            call: what was recorded of it.
            arguments: its positional arguments and its keyword arguments, with their tensors.
        """
        loose = any(
            value.name is None and (value.index not in self._unknown or value.index in self._true)
            for value in call.inputs
        )
        self._new.append((call, arguments if loose else ()))
        if loose:
            for value, tensor in pairs((call.arguments, call.keywords), arguments):
                if value.index not in self._unknown:
                    self._lent.add(tensor.untyped_storage().data_ptr())

    def _take_in(self) -> None:
        """Note what the new calls need: only a pass that looks has to."""
        for call, arguments in self._new:
            self._take(call, arguments)
        self._new.clear()

    def _take(self, call: Call, arguments: Any) -> None:
        position, self._count = self._count, self._count + 1
        for value in call.inputs:
            if value.name is not None:
                self._given[value.index] = self._named[value.name]
        if arguments:
            for value, tensor in pairs((call.arguments, call.keywords), arguments):
                if value.index in self._true:
                    self._real[value.index] = tensor
                elif value.index not in self._unknown:
                    self._given[value.index] = tensor
        outputs = self._placed(call)
        self._pending[position] = call
        for value in outputs:
            self._writers[self._place(value)].add(position)
        for value in call.inputs:
            self._readers[self._place(value)].add(position)
        self._uses.update(value.index for value in call.inputs)

    def done(self, call: Call) -> None:
        """A call was not put off: what the network's code has of its results are the elements."""
        self._true.update(value.index for value in self._placed(call))

    def ready(self, value: Value) -> bool:
        """Whether the elements of an unknown value are there, and few."""
        tensor = self._elements(value)
        if tensor is None or tensor.numel() > FEW:
            return False
        self._take_in()
        writers = self._writers[self._place(value)]
        return not any(self._pending[p].function._schema.is_mutable for p in writers)

    def _placed(self, call: Call) -> list[Value]:
        """The results of a call, noted to lie where its schema says."""
        outputs = [value for value in call.outputs if isinstance(value, Value)]
        source = shared(call.function)
        if source is not None and isinstance(call.arguments[source], Value):
            self.share([call.arguments[source], *outputs])
        return outputs

    def tensor(self, value: Value) -> Tensor:
        """The elements of an unknown value."""
        self._take_in()
        self._carry_out(self._writers[self._place(value)])
        tensor = self._elements(value)
        if tensor is None:
            raise RuntimeError(f"nothing has computed the value {value.index}")
        return tensor

    def _elements(self, value: Value) -> Tensor | None:
        tensor = self._real.get(value.index)
        return self._seen[value.index]() if tensor is None and value.index in self._true else tensor

    def before_writing(self, target: Tensor) -> None:
        """Carry out what reads a known tensor's memory, before the network writes to it."""
        memory = target.untyped_storage().data_ptr()
        if not self._new and not self._pending:
            return
        if not self._own:
            self._own = {t.untyped_storage().data_ptr() for t in self._named.values()}
        if memory not in self._lent and memory not in self._own:
            return
        self._take_in()
        for index, tensor in self._given.items():
            readers = self._readers[self._memory.get(index, index)]
            if readers and memory and tensor.untyped_storage().data_ptr() == memory:
                self._carry_out(readers)

    def _place(self, value: Value) -> int:
        return self._memory.get(value.index, value.index)

    def _carry_out(self, positions: Iterable[int]) -> None:
        """Carry out pending calls, and before them all that they depend on."""
        due: set[int] = set()
        stack = list(positions)
        while stack:
            position = stack.pop()
            if position in due:
                continue
            due.add(position)
            call = self._pending[position]
            before = [self._writers[self._place(value)] for value in call.inputs]
            if call.function._schema.is_mutable:
                before.append(self._readers[self._place(call.inputs[0])])
            stack += [other for group in before for other in group if other < position]
        for position in sorted(due):
            self._run(position)
        if len(self._real) > 2 * self._kept:
            self._forget(list(self._real))
            self._kept = max(MANY, len(self._real))

    def _run(self, position: int) -> None:
        call = self._pending.pop(position)
        result = call.function(*map(self._filled, call.arguments), **self._filled(call.keywords))
        results = result if isinstance(result, tuple | list) else (result,)
        for value, tensor in zip(call.outputs, results, strict=True):
            if isinstance(value, Value):
                self._real[value.index] = tensor
                self._writers[self._place(value)].discard(position)
        for value in call.inputs:
            self._readers[self._place(value)].discard(position)
            self._uses[value.index] -= 1
        self._forget(x.index for x in (*call.inputs, *call.outputs) if isinstance(x, Value))

    def _filled(self, item: Any) -> Any:
        """An argument with the tensors that its values stand for."""
        if isinstance(item, Value):
            real = self._real.get(item.index)
            return self._given[item.index] if real is None else real
        if isinstance(item, list | tuple):
            return type(item)([self._filled(part) for part in item])
        if isinstance(item, dict):
            return {key: self._filled(part) for key, part in item.items()}
        return item

    def _forget(self, indices: Iterable[int]) -> None:
        """Let go of elements that no call and no code can ask for any more."""
        for index in indices:
            seen = self._seen.get(index)
            if not self._uses[index] and (seen is None or seen() is None):
                self._real.pop(index, None)


def pairs(recorded: Any, given: Any) -> Iterator[tuple[Value, Tensor]]:
    """The values of recorded arguments with the tensors in the same places."""
    if isinstance(recorded, Value):
        yield recorded, given
    elif isinstance(recorded, Mapping):
        for key, item in recorded.items():
            yield from pairs(item, given[key])
    elif isinstance(recorded, list | tuple):
        for one, other in zip(recorded, given, strict=True):
            yield from pairs(one, other)


@cache
def shared(function: torch._ops.OpOverload) -> int | None:
    """The position of the argument in whose memory the results lie; None: they have their own."""
    schema = function._schema
    if all(output.alias_info is None for output in schema.returns):
        return None
    return next((i for i, a in enumerate(schema.arguments) if a.alias_info is not None), None)


@cache
def written(function: torch._ops.OpOverload) -> list[int]:
    """The positions of the arguments that it writes to."""
    arguments = enumerate(function._schema.arguments)
    return [i for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
