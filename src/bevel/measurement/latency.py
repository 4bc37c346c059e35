"""How long a network takes on a target at given widths: a table of layer times, measured there.

The network is exported at some sets of widths, and each file is run on the target beside the
uncut one. The runtime's profiler says which share of the time each layer took: with the layer's
widths, that is an entry of the table. Layers that are alike share their part of it. At widths that
were met a layer takes the median of its entries; between them it takes what a product of the
widths, each rounded up to the runtime's step of channels, fits best. What is left of the whole is
fitted to the size of the network; so is all of it where there is no profiler.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain, combinations
from math import prod
from pathlib import Path
from statistics import median

import numpy as np
from pydantic import Field, ValidationError
from scipy.optimize import nnls

from bevel.core.cache import cache_folder
from bevel.core.errors import MeasurementError
from bevel.core.files import write_text
from bevel.core.progress import track
from bevel.core.records import Operator, Record
from bevel.graph.cost import Total
from bevel.graph.couplings import Analysis
from bevel.measurement.stopwatch import Stopwatch
from bevel.pruning.allocate import RankedGroup
from bevel.pruning.apply import prune
from bevel.pruning.plan import make_plan
from bevel.runtimes import channel_step

SAMPLES = 14
"""Sets of widths that are measured: the uncut network, the narrowest, and random ones."""

SAMPLE_SECONDS = 1.0
"""Time for each of a sample's two files; the chosen network is measured for longer."""

Widths = tuple[int, ...]


class Sample(Record):
    """The network at some widths: its time and its layers' as shares of the uncut network's time.

    Attributes:
        units: what each group of the analysis keeps.
        whole: median time for one image.
        layers: by the position of the layer's term in `Analysis.macs`; empty without a profiler.
    """

    units: list[int]
    whole: float
    layers: dict[int, float] = Field(default_factory=dict)


class Table(Record):
    """The samples of one network on one target, and what they depend on."""

    about: dict[str, str]
    uncut_ms: float
    samples: list[Sample]


def measure_table(
    watch: Stopwatch, analysis: Analysis, groups: Sequence[RankedGroup], folder: Path | None = None
) -> Table:
    """Measure the samples that the cache does not have; each is kept as soon as it is there.

    Args:
        watch: for the network that was analysed.
        analysis: its groups.
        groups: those that may shrink.
        folder: of the cache; None: `latency` in bevel's own.

    Raises:
        MeasurementError: the target cannot time, or the cache is damaged.
        ExportError: the network cannot be exported for the target.
    """
    about = watch.about() | {"network": _digest(analysis, groups)}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    path = (folder or cache_folder() / "latency") / f"{key}.json"
    table = _load(path) if path.exists() else None
    if table is None:
        table = Table(about=about, uncut_ms=watch.compare(watch.original)[1], samples=[])
    designs = _designs(groups)
    for rows in track(designs[len(table.samples) :], "latency table", len(designs)):
        keep = {g.index: g.keep_mask(k) for g, k in zip(groups, rows, strict=True)}
        cut = prune(watch.original, make_plan(analysis, keep))
        before, after = watch.compare(cut, seconds=SAMPLE_SECONDS)
        units = analysis.full()
        for index, mask in keep.items():
            units[index] = int(mask.sum())
        layers = _by_term(watch.operators(cut), analysis, units, after / before)
        sample = Sample(units=units.tolist(), whole=after / before, layers=layers)
        table = table.model_copy(update={"samples": [*table.samples, sample]})
        write_text(path, table.model_dump_json(indent=1) + "\n")
    return table


class Latency:
    """Estimated milliseconds for one image, as a quantity that a budget can limit."""

    def __init__(self, analysis: Analysis, table: Table) -> None:
        self.analysis, self.table = analysis, table
        target = table.about["target"].partition("@")[0]
        runtime, _, precision = target.partition(":")
        self._step = channel_step([(runtime, precision)])
        self._activations = Total([held.elements for held in analysis.activations])
        self._known: dict[tuple[int, bytes], float] = {}

    def at(self, units: np.ndarray) -> float:
        """Estimated for these kept units per group."""
        shares = self.analysis.shares(units)
        total = float(self._features(shares) @ self._rest)
        for position in self._timed:
            key = position, units[self._touched[position]].tobytes()
            if key not in self._known:  # an allocator asks again and again for a few widths
                widths = self._widths(position, shares)
                self._known[key] = self._layer(self._kinds[position], widths)
            total += self._known[key]
        return total * self.table.uncut_ms

    # -- layers ---------------------------------------------------------------------------

    @cached_property
    def _timed(self) -> list[int]:
        """The layers that the profiler told of in every sample."""
        told = [set(sample.layers) for sample in self.table.samples]
        return sorted(set.intersection(*told)) if told else []

    @cached_property
    def _touched(self) -> dict[int, list[int]]:
        """The groups that a layer's time depends on."""
        return {i: sorted(self.analysis.macs[i].touched()) for i in self._timed}

    @cached_property
    def _kinds(self) -> dict[int, tuple[object, ...]]:
        """What makes layers alike: the multiply-accumulates per product of widths, the widths."""
        full = self.analysis.shares(self.analysis.full())
        return {
            i: (round(self.analysis.macs[i].factor, 3), self._widths(i, full)) for i in self._timed
        }

    @cached_property
    def _entries(self) -> dict[tuple[object, ...], dict[Widths, list[float]]]:
        """The table: kind of layer -> widths -> times."""
        found: dict[tuple[object, ...], dict[Widths, list[float]]] = {}
        for sample in self.table.samples:
            shares = self.analysis.shares(np.array(sample.units))
            for position in self._timed:
                own = found.setdefault(self._kinds[position], {})
                entry = own.setdefault(self._widths(position, shares), [])
                entry.append(sample.layers[position])
        return found

    @cached_property
    def _fits(self) -> dict[tuple[object, ...], np.ndarray]:
        """For widths that were not met: coefficients of the products of widths."""
        return {
            kind: _fit(
                [self._products(widths) for widths in entries],
                [median(times) for times in entries.values()],
            )
            for kind, entries in self._entries.items()
        }

    def _layer(self, kind: tuple[object, ...], widths: Widths) -> float:
        times = self._entries[kind].get(widths)
        return median(times) if times else float(self._products(widths) @ self._fits[kind])

    def _widths(self, position: int, shares: np.ndarray) -> Widths:
        return tuple(round(length.at(shares)) for length in self.analysis.macs[position].lengths)

    def _products(self, widths: Widths) -> np.ndarray:
        """1, each width, each product of widths, all in steps of channels; and once more, for what
        it costs if a width is no whole number of steps: it may take longer than a larger one."""
        steps = [-(-width // self._step) for width in widths]
        subsets = chain.from_iterable(combinations(steps, n) for n in range(len(steps) + 1))
        products = np.array([prod(subset) for subset in subsets], dtype=float)
        uneven = any(width % self._step for width in widths)
        return np.concatenate([products, uneven * products])

    # -- the rest -------------------------------------------------------------------------

    @cached_property
    def _rest(self) -> np.ndarray:
        """Coefficients of what the layers leave: for each run, per MAC and per activation."""
        samples = self.table.samples
        left = [
            max(sample.whole - sum(sample.layers[i] for i in self._timed), 0.0)
            for sample in samples
        ]
        shares = [self.analysis.shares(np.array(sample.units)) for sample in samples]
        return _fit([self._features(share) for share in shares], left)

    def _features(self, shares: np.ndarray) -> np.ndarray:
        macs, _ = self.analysis.totals
        return np.array([1.0, macs.at(shares) / 1e6, self._activations.at(shares) / 1e3])


def _fit(features: Sequence[np.ndarray], values: Sequence[float]) -> np.ndarray:
    """Coefficients, none negative: more width never takes less time."""
    found: np.ndarray = nnls(np.array(features), np.array(values))[0]
    return found


def _designs(groups: Sequence[RankedGroup]) -> list[list[int]]:
    """Sets of kept rows: all, the fewest, then each group at all its widths in random order."""
    random = np.random.default_rng(0)
    designs = [[group.size for group in groups], [int(group.levels[-1]) for group in groups]]
    rounds = -(-SAMPLES // min((len(group.levels) for group in groups), default=1))
    orders = [
        np.concatenate([random.permutation(group.levels) for _ in range(rounds)])
        for group in groups
    ]
    return [*designs, *([int(order[i]) for order in orders] for i in range(SAMPLES - 2))]


def _by_term(
    operators: Sequence[Operator], analysis: Analysis, units: np.ndarray, whole: float
) -> dict[int, float]:
    """Position of a MAC term -> its share of the time, by the profile of the whole file.

    An operator is that of the first term in order with just its multiply-accumulates.
    """
    profiled = sum(operator.latency_ms or 0.0 for operator in operators)
    if not profiled:
        return {}
    values = analysis.totals[0].each(analysis.shares(units)).round().astype(int).tolist()
    waiting: dict[int, list[int]] = {}
    for position, value in enumerate(values):
        waiting.setdefault(value, []).append(position)
    found = {}
    for operator in operators:
        if operator.macs and waiting.get(operator.macs) and operator.latency_ms is not None:
            position = waiting[operator.macs].pop(0)
            found[position] = operator.latency_ms / profiled * whole
    return found


def _digest(analysis: Analysis, groups: Sequence[RankedGroup]) -> str:
    """What makes the widths and times of two networks the same: shapes, layers and levels."""
    described: Mapping[str, object] = {
        "shapes": {name: list(shape) for name, shape in analysis.shapes.items()},
        "groups": [[g.index, g.name, g.rows.shape[1], g.levels.tolist()] for g in groups],
        "macs": [[term.module, term.factor] for term in analysis.macs],
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _load(path: Path) -> Table:
    try:
        return Table.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise MeasurementError(
            f"{path} is not a latency table: delete it, and it is measured anew"
        ) from error
