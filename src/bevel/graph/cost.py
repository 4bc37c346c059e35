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
    """`factor` times the product of lengths; `module` says where."""

    module: str
    factor: float
    lengths: tuple[Length, ...]

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
        self._fixed = np.array([length.fixed for length in lengths] + [1.0])
        self._owner = np.repeat(np.arange(len(lengths)), [len(x.counts) for x in lengths])
        depth = max((x.groups.shape[1] for x in lengths), default=1)
        rows = [
            np.pad(x.groups, ((0, 0), (0, depth - x.groups.shape[1])), constant_values=-1)
            for x in lengths
        ]
        self._groups = np.concatenate(rows) if rows else np.zeros((0, depth), dtype=np.int64)
        self._counts = np.concatenate([x.counts for x in lengths]) if rows else np.zeros(0)
        width = max((len(term.lengths) for term in terms), default=0)
        self._factors = np.array([term.factor for term in terms])
        self._lengths = np.full((len(terms), max(width, 1)), len(lengths))
        position = 0
        for row, term in enumerate(terms):
            for column in range(len(term.lengths)):
                self._lengths[row, column] = position
                position += 1

    def at(self, shares: np.ndarray) -> float:
        """The sum with these kept shares per group; the last share is that of no group."""
        rows = self._counts * shares[self._groups].prod(axis=1)
        lengths = self._fixed + np.bincount(self._owner, rows, minlength=len(self._fixed))
        return float((self._factors * lengths[self._lengths].prod(axis=1)).sum())
