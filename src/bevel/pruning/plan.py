"""The pruning plan: pure data that says which indices of which tensors stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from bevel.core.errors import PruningError, one_line
from bevel.core.files import write_text
from bevel.core.records import Cost, Record
from bevel.graph.couplings import Analysis


class TensorCut(Record):
    """What stays of one parameter or buffer.

    `keep` maps a dimension to its kept indices as runs ("0-3,7"). A list holds one entry per
    block of the first dimension: the input axis of a grouped convolution.
    """

    shape: list[int]
    keep: dict[int, str | list[str]]


class GroupCut(Record):
    """How many units of a channel group stay."""

    name: str
    before: int
    after: int
    inexact: str | None = None
    """Why removing its units is not the same as setting them to zero."""

    @property
    def cut(self) -> bool:
        """Whether any unit goes."""
        return self.after < self.before


class PruningPlan(Record):
    """Everything that is needed to prune a fresh network of the same class, in any process."""

    version: Literal[1] = 1
    tensors: dict[str, TensorCut]
    attributes: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Module name -> attribute -> new value."""
    groups: list[GroupCut] = Field(default_factory=list)
    before: Cost
    after: Cost
    request: dict[str, Any] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    """What the request could not touch, and why."""

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON, atomically."""
        write_text(Path(path), self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(path: Path | str) -> PruningPlan:
        """Read a plan written by `save`.

        Raises:
            PruningError: the file is missing, truncated, or not a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PruningError(f"cannot read the pruning plan {path}: {one_line(error)}") from error
        return PruningPlan.parse(text, str(path))

    @staticmethod
    def parse(text: str, source: str) -> PruningPlan:
        """A plan from its JSON text.

        Raises:
            PruningError: the text is not a plan.
        """
        try:
            return PruningPlan.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise PruningError(
                f"{source} is not a pruning plan: {where} {one_line(first['msg'])}"
            ) from error

    def outputs(self) -> dict[str, np.ndarray]:
        """By the name of a layer that lost output channels, the indices of those that are left."""
        runs = {
            name.removesuffix(".weight"): cut.keep.get(0)
            for name, cut in self.tensors.items()
            if name.endswith(".weight")
        }
        return {name: indices(kept) for name, kept in runs.items() if isinstance(kept, str)}

    def then(self, later: PruningPlan) -> PruningPlan:
        """The plan on the original network that equals this one followed by `later`.

        Raises:
            PruningError: `later` was not made for the network that this plan leaves.
        """
        tensors = dict(self.tensors)
        for name, cut in later.tensors.items():
            first = tensors.get(name)
            tensors[name] = cut if first is None else _compose(name, first, cut)
        attributes = {name: dict(values) for name, values in self.attributes.items()}
        for name, values in later.attributes.items():
            attributes.setdefault(name, {}).update(values)
        after = {group.name: group for group in later.groups}
        groups = [
            GroupCut(
                name=g.name,
                before=g.before,
                after=after[g.name].after if g.name in after else g.after,
                inexact=g.inexact,
            )
            for g in self.groups
        ]
        return PruningPlan(
            tensors=tensors,
            attributes=attributes,
            groups=groups,
            before=self.before,
            after=later.after,
            request=later.request,
            notes=later.notes,
        )


def _compose(name: str, first: TensorCut, second: TensorCut) -> TensorCut:
    keep: dict[int, str | list[str]] = dict(first.keep)
    left = list(first.shape)
    for dim, runs in first.keep.items():
        left[dim] = len(indices(runs if isinstance(runs, str) else runs[0]))
    if left != second.shape:
        raise PruningError(
            f"the second plan was made for '{name}' of shape {second.shape}, the first leaves "
            f"{left}: it was made for another network"
        )
    for dim, runs in second.keep.items():
        earlier = first.keep.get(dim)
        if earlier is None:
            keep[dim] = runs
            continue
        blocks = max(len(r) if isinstance(r, list) else 1 for r in (earlier, runs))
        one = earlier if isinstance(earlier, list) else [earlier] * blocks
        two = runs if isinstance(runs, list) else [runs] * blocks
        if len(one) != len(two):
            raise PruningError(f"the plans cut {name} into {len(one)} and {len(two)} blocks")
        joined = []
        for a, b in zip(one, two, strict=True):
            kept, chosen = indices(a), indices(b)
            if len(chosen) and chosen.max() >= len(kept):
                raise PruningError(
                    f"the second plan keeps index {chosen.max()} of {name}, dimension {dim}, "
                    f"of which the first leaves {len(kept)}: it was made for another network"
                )
            joined.append(runs_of(kept[chosen]))
        keep[dim] = joined if blocks > 1 else joined[0]
    return TensorCut(shape=first.shape, keep=keep)


def runs_of(kept: np.ndarray | Sequence[int]) -> str:
    """Ascending indices as runs: [0, 1, 2, 5] -> "0-2,5"."""
    array = np.asarray(kept, dtype=np.int64)
    if array.size == 0:
        return ""
    breaks = np.flatnonzero(np.diff(array) != 1)
    first, last = array[np.append(0, breaks + 1)], array[np.append(breaks, -1)]
    return ",".join(
        str(a) if a == b else f"{a}-{b}" for a, b in zip(first.tolist(), last.tolist(), strict=True)
    )


@lru_cache(maxsize=4096)
def indices(runs: str) -> np.ndarray:
    """The inverse of `runs_of`; many tensors of a plan share their runs, so it is remembered.

    Raises:
        PruningError: the text is not a list of ascending runs.
    """
    if not runs:
        return np.array([], dtype=np.int64)
    starts, ends = [], []
    for run in runs.split(","):
        start, _, end = run.partition("-")
        if not start.isdecimal() or not (end or start).isdecimal():
            raise PruningError(f"'{run}' is not a run of indices such as 4 or 0-15")
        starts.append(int(start))
        ends.append(int(end or start) + 1)
    first, last = np.array(starts), np.array(ends)
    if (first >= last).any() or (first[1:] < last[:-1]).any():
        raise PruningError(f"the runs '{runs}' are not ascending")
    lengths = last - first
    joined: np.ndarray = np.arange(lengths.sum()) + np.repeat(
        first - np.cumsum(lengths) + lengths, lengths
    )
    joined.flags.writeable = False  # it is shared
    return joined


def make_plan(
    analysis: Analysis,
    keep: Mapping[int, np.ndarray],
    *,
    request: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> PruningPlan:
    """The plan that keeps, in each group, the units whose mask is True.

    Args:
        analysis: the network's groups.
        keep: index of a group -> boolean mask of shape (size,); groups left out keep everything.
        request: what was asked for; stored with the plan.
        notes: stored with the plan.
    """
    kept = analysis.full()
    for index, mask in keep.items():
        kept[index] = int(mask.sum())
    attributes: dict[str, dict[str, int]] = {}
    for site in analysis.attributes:
        value = site.value(keep)
        if value != site.value({}):
            attributes.setdefault(site.module, {})[site.attribute] = value
    return PruningPlan(
        tensors=_tensor_cuts(analysis, keep),
        attributes=attributes,
        groups=[
            GroupCut(
                name=group.name,
                before=group.size,
                after=int(kept[index]),
                inexact=group.inexact,
            )
            for index, group in enumerate(analysis.groups)
            if group.frozen is None
        ],
        before=analysis.cost(),
        after=analysis.cost(kept),
        request=dict(request or {}),
        notes=list(notes),
    )


def _tensor_cuts(analysis: Analysis, keep: Mapping[int, np.ndarray]) -> dict[str, TensorCut]:
    """What stays of each tensor that the groups touch."""
    masks: dict[str, dict[int, np.ndarray]] = {}
    for index, mask in keep.items():
        if mask.all():
            continue
        stays = np.append(mask, True)  # the last is where -1 points to, no unit: it stays
        for axis in analysis.groups[index].axes:
            dims = masks.setdefault(axis.tensor, {})
            if axis.dim in dims:
                dims[axis.dim] &= stays[axis.units]
            else:
                dims[axis.dim] = stays[axis.units]
    known: dict[bytes, str] = {}

    def kept_runs(stays: np.ndarray) -> str:
        """The runs of a mask; most masks are those of several tensors."""
        key = stays.tobytes()
        if key not in known:
            known[key] = runs_of(np.flatnonzero(stays))
        return known[key]

    return {
        name: TensorCut(
            shape=list(analysis.shapes[name]),
            keep={
                dim: kept_runs(mask) if mask.ndim == 1 else [kept_runs(block) for block in mask]
                for dim, mask in dims.items()
            },
        )
        for name, dims in masks.items()
    }
