"""Sizes that a network's own code has written in it: follow them, or protect what they fix.

A view with numbers, `self.num_heads`, `split([32, 32])`: the rehearsal finds each place where the
code does not follow the new sizes. If an integer attribute of the running module holds the number,
and the code there reads that attribute, the attribute shall follow; the next rehearsal shows
whether that was right. Otherwise the channels that the number fixes are frozen, with the line.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from bevel.graph.attributes import integers
from bevel.graph.faults import Fault, Kind, Written
from bevel.graph.grouping import Grouping
from bevel.graph.layers import Extent
from bevel.graph.nodes import NodeTable
from bevel.graph.prediction import Prediction
from bevel.graph.propagate import Mark, Propagation, SizeSite
from bevel.graph.record import ExampleInputs
from bevel.graph.recording import Recording
from bevel.graph.rehearse import rehearse
from bevel.graph.stage import Stage
from bevel.graph.trials import trials

ROUNDS = 12
"""Attempts to answer faults before everything that is still in question is frozen."""

SMALL = 60
"""Torch functions that a pass of a small network calls; rehearsing it costs little."""

SEARCHES = 24
"""Rehearsals to find the groups behind one kind of fault, before all in question are marked."""

FEW = 3
"""Attributes up to which each is tried alone."""


class PassChangedError(Exception):
    """The network does not do the same twice, as when its first pass fills a cache."""


def follow_sizes(
    net: nn.Module, example_inputs: ExampleInputs, recording: Recording, state: Propagation
) -> Grouping:
    """The groups that the network's own code lets shrink; the others are frozen in `state`.

    Raises:
        PassChangedError: at its old sizes, the network takes another path than was recorded.
    """
    _tie_attention(state)
    stage = Stage(net, example_inputs, state)
    resolver = _Resolver(state)
    table = NodeTable(state)
    known: set[str] = set()  # places of numbers that are marked already
    for attempt in range(ROUNDS):
        grouping = Grouping(state, table)
        for keep in trials(grouping, many=len(recording.frames) <= SMALL):
            prediction = Prediction(grouping, keep)
            faults = [
                fault
                for fault in rehearse(stage, recording, prediction)
                if fault.kind is not Kind.NUMBER or fault.place not in known
            ]
            if faults:
                break
        else:
            return grouping
        if not attempt and any(fault.kind is Kind.PATH for fault in faults):
            same = rehearse(stage, recording, Prediction(grouping, {}))
            if any(fault.kind is Kind.PATH for fault in same):
                raise PassChangedError
        here = [fault for fault in faults if fault.kind is Kind.HERE]
        if here:
            tied = resolver.tie(here, grouping, prediction)
            if tied:  # which may mend others too, so nothing is guessed now
                resolver.follow([fault for fault in here if fault not in tied], guess=False)
            else:
                resolver.resolve(here, patient=attempt < ROUNDS // 2)
            continue
        raised = [fault for fault in faults if fault.kind is Kind.RAISED]
        if raised and resolver.follow(raised[:1]):
            continue
        search = _Search(stage, recording, grouping, keep, prediction)
        elsewhere = [fault for fault in faults if fault.kind is not Kind.NUMBER]
        if elsewhere:
            state.frozen += search.marks(elsewhere, "its size is read elsewhere")
            continue
        state.inexact += search.marks(faults, "its size enters a number")
        known |= {fault.place for fault in faults}
    grouping = Grouping(state, table)
    for number in keep:
        reason = f"{faults[0].error} ({faults[0].place})"
        state.frozen.append(Mark(grouping.ids_of(number), reason, True))
    return Grouping(state, table)


def _tie_attention(state: Propagation) -> None:
    """torch's attention layer is as wide inside as outside, and the number of heads stays."""
    names: list[str] = []
    owner = np.full(state.count, -1, dtype=np.int64)
    for name, module in state.modules.items():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        prefix = f"{name}." if name else ""
        packed = state.axes.get(f"{prefix}in_proj_weight")
        if packed is None or packed[0] is None or packed[1] is None:
            continue
        rows = packed[0].reshape(3, -1)
        if (packed[1] == 0).any():
            state.freeze(torch.from_numpy(rows), f"the input of {name} has a fixed size")
            continue
        for row in rows:
            state.ties.append((row, packed[1]))
        state.inexact.append(Mark(packed[1], f"the scale depends on it: {name}", True))
        owner[rows] = len(names)
        names.append(name)
    for nodes in state.nodes.values() if names else ():
        for number in np.unique(owner[nodes.leaves]).tolist():
            if number >= 0:
                where = f"the number of heads of {names[number]}"
                state.frozen.append(Mark(nodes.nodes, where, True))


class _Resolver:
    """Answers faults: an attribute that follows, or a freeze."""

    def __init__(self, state: Propagation) -> None:
        self.state = state
        self.modules = state.modules
        self.tried: dict[tuple[str, str, int, int], list[SizeSite]] = {}
        self.tied: set[tuple[str, str, int]] = set()
        self.bound: dict[bytes, set[int]] = {}
        self.claims: dict[tuple[str, str], Written] = {}
        self.now: set[tuple[str, str, int, int, str, str]] = set()

    def tie(
        self, faults: Sequence[Fault], grouping: Grouping, prediction: Prediction
    ) -> set[Fault]:
        """Tie an axis to the one from which the code takes its size; the faults with such an axis.

        `B, N, C = x.shape; ...; y.reshape(B, N, C)` makes y as wide as x: attention written like
        this keeps as many inner channels as the network has outside.
        """
        found: set[Fault] = set()
        for fault in faults:
            axes = grouping.plain_axes(fault.modules)
            for length in fault.lengths:
                key = (fault.modules[0], fault.place, length.number)
                wrong = [
                    new
                    for old, new in fault.changes
                    if old == length.number and new != length.predicted
                ]
                if len(length.extents) != 1 or key in self.tied or not wrong:
                    continue
                outer = self._as_wide(axes, prediction, length, wrong[0])
                if outer is not None:
                    self._bind(grouping, length.ids, outer, f"as wide as x ({fault.place})")
                    self.tied.add(key)
                    found.add(fault)
        return found

    def _bind(self, grouping: Grouping, inner: np.ndarray, outer: np.ndarray, reason: str) -> None:
        """Each run of inner ids has the outer ones; what holds the inner ids cannot go alone."""
        known = self.bound.setdefault(outer.tobytes(), set())
        for row in inner.reshape(-1, outer.size):
            classes = grouping.same(row).tolist()
            if known.isdisjoint(classes):  # else its length follows from what was tied before
                self.state.ties.append((row, outer))
                known.update(classes)
        for held in grouping.nodes(inner):
            self.state.frozen.append(Mark(np.unique(held[held != 0]), reason, True))

    def _as_wide(
        self, axes: Sequence[np.ndarray], prediction: Prediction, length: Written, width: int
    ) -> np.ndarray | None:
        """The ids of an axis from which the code computes this width, itself or a part of it."""
        for ids in axes:
            parts, rest = divmod(ids.size, length.number)
            if rest or not parts or length.ids.size % ids.size:
                continue
            left = prediction.length((Extent(ids),))
            if left < ids.size and left // parts == width and (ids != 0).all():
                return ids
        return None

    def resolve(self, faults: Sequence[Fault], *, patient: bool) -> None:
        """Change `state` so that the next rehearsal meets none of these faults.

        An attribute that follows may mend other places too, so channels are frozen only when no
        attribute is left to try.
        """
        if patient and self.follow(faults):
            return
        for fault in faults:
            reason = f"its size is written in the code ({fault.place}: {fault.error})"
            if not fault.written:
                self._protect(fault, reason)
            for written in fault.written:
                self._freeze(written.extents, reason)

    def follow(self, faults: Sequence[Fault], *, guess: bool = True) -> bool:
        """Let attributes follow that hold a number at fault; whether there was one.

        Without `guess`, those only that the call at fault names.
        """
        self.now.clear()
        found = False
        for fault in faults:
            met: Counter[int] = Counter()
            for written in fault.written:
                found |= self._attribute(fault, written, met[written.number], guess=guess)
                met[written.number] += 1
        return found

    def _attribute(self, fault: Fault, written: Written, before: int, *, guess: bool) -> bool:
        """Whether an attribute holds the number that was not tried before at this place.

        `before`: lengths of the same number that come before this one in the same call. They may
        be written as attributes of their own: `split([self.key_dim, self.key_dim, self.val_dim])`.
        """
        if len(written.extents) != 1:
            return False
        key = (fault.modules[0], fault.place, written.number, before)
        tried = self.tried.setdefault(key, [])
        for module in fault.modules:
            for path in _paths(self.modules[module], fault, written.number, before, guess=guess):
                if self._counts_others(module, path, written):
                    continue
                if (*key, module, path) in self.now:  # the same place, met again in this round
                    self._claim(module, path, written)
                    return True
                if any((site.module, site.attribute) == (module, path) for site in tried):
                    continue
                self._withdraw(tried)
                tried.append(self._claim(module, path, written))
                self.now.add((*key, module, path))
                return True
        if guess:
            self._withdraw(tried)
        return False

    def _claim(self, module: str, path: str, written: Written) -> SizeSite:
        """Let an attribute follow a length; lengths that share an attribute are tied."""
        first = self.claims.setdefault((module, path), written)
        known = self._site(module, path)
        if known is None:
            known = SizeSite(module, path, written.extents)
            self.state.sizes.append(known)
            self.claims[module, path] = written
        elif first is not written:
            for row in written.ids.reshape(-1, written.number):
                self.state.ties.append((row, first.ids[: first.number]))
            for row in first.ids.reshape(-1, first.number):
                self.state.ties.append((row, first.ids[: first.number]))
        return known

    def _site(self, module: str, path: str) -> SizeSite | None:
        found = (s for s in self.state.sizes if (s.module, s.attribute) == (module, path))
        return next(found, None)

    def _counts_others(self, module: str, path: str, written: Written) -> bool:
        """Whether an attribute follows runs already where these are single channels, or reverse.

        Their number cannot be the same for all widths: a run would go with a channel of each run.
        """
        site = self._site(module, path)
        return site is not None and site.extents[0].level != written.extents[0].level

    def _withdraw(self, sites: Sequence[SizeSite]) -> None:
        drop = {id(site) for site in sites}
        self.state.sizes = [site for site in self.state.sizes if id(site) not in drop]

    def _protect(self, fault: Fault, reason: str) -> None:
        """No number is known: take back what was changed there, then freeze what is involved."""
        changed = [site for site in self.state.sizes if site.module in fault.modules]
        if changed:
            self._withdraw(changed)
            for site in changed:
                self._freeze(site.extents, reason)
            return
        for layer in fault.blamed:
            self.state.freeze_layer(layer, reason)

    def _freeze(self, extents: Sequence[Extent], reason: str) -> None:
        for extent in extents:
            self.state.frozen.append(
                Mark(np.unique(extent.ids[extent.ids != 0]), reason, extent.level)
            )


def _paths(module: nn.Module, fault: Fault, number: int, before: int, *, guess: bool) -> list[str]:
    """A module's attributes that hold a number and that the code at fault names, likely ones first.

    Those among the arguments of the call stand in the order of the lengths; then, with `guess`,
    come the others that the function names.
    """
    held: defaultdict[str, list[str]] = defaultdict(list)
    for path, value in integers(module).items():
        if value == number:
            held[path.partition("[")[0]].append(path)
    given = [path for name in fault.given for path in held[name]]
    first = min(before, max(len(given) - 1, 0))
    others = [path for name in held if guess and name in fault.names for path in held[name]]
    return list(dict.fromkeys([*given[first:], *given[:first], *others]))


def _follows(change: tuple[int, int], size: int, left: int) -> bool:
    """Whether a number was a part or a multiple of a length, and is of what is left of it."""
    old, new = change
    if old < 1:
        return False
    if size % old == 0:
        return left // (size // old) == new
    return old % size == 0 and left * (old // size) == new


class _Search:
    """Finds the groups behind a fault by rehearsing with fewer and fewer of them cut."""

    def __init__(
        self,
        stage: Stage,
        recording: Recording,
        grouping: Grouping,
        keep: dict[int, np.ndarray],
        prediction: Prediction,
    ) -> None:
        self.stage, self.recording = stage, recording
        self.grouping, self.keep, self.prediction = grouping, keep, prediction
        self.left = SEARCHES
        self.until = 0

    def marks(self, faults: Sequence[Fault], what: str) -> list[Mark]:
        """A mark on every group that causes one of these faults when it is cut alone."""
        read: defaultdict[int, set[str]] = defaultdict(set)
        for fault in faults:
            for number in self._read(fault):
                read[number].add(fault.place)
        if set().union(*read.values()) == {fault.place for fault in faults}:
            found = [(number, ", ".join(sorted(places))) for number, places in read.items()]
        else:
            found = self._found(faults)
        said = {f.place: f": {f.error}" for f in faults if f.kind is Kind.RAISED}
        return [
            Mark(self.grouping.ids_of(number), f"{what} ({place}{said.get(place, '')})", True)
            for number, place in found
        ]

    def _read(self, fault: Fault) -> list[int]:
        """The groups along an axis of the running module whose length is the number at fault."""
        if fault.kind is not Kind.ELSEWHERE:
            return []
        found: set[int] = set()
        for ids in self.grouping.plain_axes(fault.modules):
            extent = Extent(ids)
            left = self.prediction.length((extent,))
            if left < ids.size and any(
                _follows(change, ids.size, left) for change in fault.changes
            ):
                found |= self._cut_along(extent)
        return sorted(found)

    def _cut_along(self, extent: Extent) -> set[int]:
        """The groups that a length depends on, of those that are cut."""
        return set(np.unique(self.grouping.members(extent)[0]).tolist()) & self.keep.keys()

    def _found(self, faults: Sequence[Fault]) -> list[tuple[int, str]]:
        """The groups that cause faults when they are cut alone, and where."""
        places = {(fault.place, fault.kind) for fault in faults}
        self.until = max(fault.position for fault in faults)
        for held in self._held(faults):
            if not self._faulty(places, [number for number in self.keep if number not in held]):
                return [(number, min(place for place, _ in places)) for number in sorted(held)]
        likely = self._touched(faults) if faults[0].kind is Kind.NUMBER else self._sized(faults)
        rest = [number for number in self.keep if number not in likely]
        if faults[0].kind is Kind.NUMBER:  # a mark too many costs some proof, a search costs time
            found = [(number, faults[0].place) for number in likely]
        else:
            found = list(self._culprits(places, likely)) if likely else []
        found += self._culprits(places, rest) if rest else []
        return found

    def _held(self, faults: Sequence[Fault]) -> list[set[int]]:
        """The groups whose size an attribute follows that the code at fault names.

        Attribute by attribute, where there are few, and then all together.
        """
        found: defaultdict[str, set[int]] = defaultdict(set)
        for site in self.grouping.state.sizes:
            name = site.attribute.partition("[")[0]
            if any(site.module == fault.modules[0] and name in fault.names for fault in faults):
                found[name] |= self._cut_along(site.extents[0])
        alone = [groups for groups in found.values() if groups]
        together = [set().union(*alone)] if len(alone) > 1 else []
        return [*(alone if len(alone) <= FEW else []), *together]

    def _touched(self, faults: Sequence[Fault]) -> list[int]:
        """The groups of the tensors that the number meets."""
        layers = [layer.compact().reshape(-1).numpy() for f in faults for layer in f.blamed]
        if not layers:
            return []
        groups = np.unique(self.grouping.group_of(np.unique(np.concatenate(layers))))
        return [int(number) for number in groups if int(number) in self.keep]

    def _sized(self, faults: Sequence[Fault]) -> list[int]:
        """The groups whose size may be the number that changed."""
        changes = {change for fault in faults for change in fault.changes}
        return [number for number in self.keep if self._explains(number, changes)]

    def _explains(self, number: int, changes: set[tuple[int, int]]) -> bool:
        """Whether a number in the code that changed may be this group's size, or a part of it."""
        before, after = len(self.keep[number]), int(self.keep[number].sum())
        return any(
            old and before >= old and after // (before // old) == new for old, new in changes
        )

    def _culprits(
        self, places: set[tuple[str, Kind]], numbers: list[int]
    ) -> Iterator[tuple[int, str]]:
        if not self.left:  # rather too much than too long
            yield from ((number, min(place for place, _ in places)) for number in numbers)
            return
        self.left -= 1
        here = self._faulty(places, numbers)
        if here and len(numbers) == 1:
            yield numbers[0], ", ".join(here)
        elif here:
            middle = len(numbers) // 2
            yield from self._culprits(places, numbers[:middle])
            yield from self._culprits(places, numbers[middle:])

    def _faulty(self, places: set[tuple[str, Kind]], numbers: Sequence[int]) -> list[str]:
        """Those of the places that are at fault when these groups alone are cut."""
        prediction = Prediction(self.grouping, {n: self.keep[n] for n in numbers})
        found = rehearse(self.stage, self.recording, prediction, until=self.until)
        return sorted({f.place for f in found if (f.place, f.kind) in places})
