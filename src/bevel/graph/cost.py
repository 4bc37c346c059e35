"""Multiply-accumulates, parameters and lengths as functions of what each group keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Length:
    """A length: fixed + sum over rows of counts * the kept shares of the row's groups.

    Attributes:
        fixed: indices that never go.
        counts: (rows,) indices per row.
        groups: (rows, depth) groups whose kept shares multiply; -1: none.
    """

    fixed: float
    counts: np.ndarray
    groups: np.ndarray

    def at(self, shares: np.ndarray) -> float:
        """The length with these kept shares per group; the last share is that of no group."""
        return self.fixed + float((self.counts * shares[self.groups].prod(axis=1)).sum())

    def touched(self) -> set[int]:
        """The groups it depends on."""
        return {int(g) for g in np.unique(self.groups) if g >= 0}


@dataclass(frozen=True, eq=False)
class Term:
    """`factor` times the product of lengths; `module` says where, `tensor` of which parameter."""

    module: str
    factor: float
    lengths: tuple[Length, ...]
    tensor: str = ""

    def at(self, shares: np.ndarray) -> float:
        """The value with these kept shares per group."""
        value = self.factor
        for length in self.lengths:
            value *= length.at(shares)
        return value

    def touched(self) -> set[int]:
        """The groups it depends on."""
        return set().union(*(length.touched() for length in self.lengths))


class Total:
    """The sum of many terms, evaluated all at once."""

    def __init__(self, terms: Sequence[Term]) -> None:
        lengths = [length for term in terms for length in term.lengths]
        sizes = [len(length.counts) for length in lengths]
        self._fixed = np.array([length.fixed for length in lengths] + [1.0])
        self._owner = np.repeat(np.arange(len(lengths)), sizes)
        self._counts = np.concatenate([length.counts for length in lengths] or [np.zeros(0)])
        # The small dimension comes first: products over it are products of long vectors.
        depth = max((length.groups.shape[1] for length in lengths), default=1)
        self._groups = np.full((depth, len(self._owner)), -1)
        start = 0
        for length, size in zip(lengths, sizes, strict=True):
            self._groups[: length.groups.shape[1], start : start + size] = length.groups.T
            start += size
        self._factors = np.array([term.factor for term in terms])
        width = max((len(term.lengths) for term in terms), default=0)
        self._lengths = np.full((max(width, 1), len(terms)), len(lengths))
        position = 0
        for number, term in enumerate(terms):
            end = position + len(term.lengths)
            self._lengths[: len(term.lengths), number] = range(position, end)
            position = end

    def at(self, shares: np.ndarray) -> float:
        """The sum with these kept shares per group; the last share is that of no group."""
        return float(self.each(shares).sum())

    def each(self, shares: np.ndarray) -> np.ndarray:
        """The value of every term, (terms,)."""
        rows = self._counts * shares[self._groups].prod(axis=0)
        lengths = self._fixed + np.bincount(self._owner, rows, minlength=len(self._fixed))
        values: np.ndarray = self._factors * lengths[self._lengths].prod(axis=0)
        return values

    def touched(self, groups: np.ndarray) -> np.ndarray:
        """Which terms depend on any of these groups, (terms,) booleans.

        Args:
            groups: (groups + 1,) booleans; the last stands for no group and is False.
        """
        rows = groups[self._groups].any(axis=0)
        lengths = np.bincount(self._owner[rows], minlength=len(self._fixed)) > 0
        any_length: np.ndarray = lengths[self._lengths].any(axis=0)
        return any_length
