"""What is varied: dotted keys of a recipe, each with choices or a range of numbers."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bevel.core.errors import BevelError, SearchError
from bevel.core.recipe import Range, Recipe, vary
from bevel.pipeline.flow import check_names
from bevel.pipeline.sharing import common_steps

Dimensions = Mapping[str, Sequence[Any] | Range]


def label(value: Any) -> str:
    """A value as a short text: words as they are, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last word of each key, where only one key ends with it; else the key."""
    lasts = [key.rpartition(".")[2] for key in keys]
    return {
        key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)
    }


def described(values: Mapping[str, Any]) -> str:
    """`criterion=l2, macs=0.5`."""
    names = short_names(list(values))
    return ", ".join(f"{names[key]}={label(value)}" for key, value in values.items())


def check(recipe: Recipe, dimensions: Dimensions, source: str) -> int:
    """Try every value, of a range both ends, alone on the recipe, before any work is done.

    Returns:
        How many leading steps of the recipe none of the values has an effect on.

    Raises:
        BevelError: the first value that cannot be, after `source`.
    """
    shared = len(recipe.steps)
    for key, dimension in dimensions.items():
        values = [dimension.low, dimension.high] if isinstance(dimension, Range) else dimension
        labels = [label(value) for value in values]
        if len(set(labels)) < len(labels):
            raise SearchError(f"{source} {key}: a value is there twice ({', '.join(labels)})")
        for value in values:
            varied = vary(recipe, {key: value}, f"{source} {key}={label(value)}")
            try:
                check_names(varied)
            except BevelError as error:
                raise type(error)(f"{source} {key}={label(value)}: {error}") from error
            shared = min(shared, common_steps(recipe, varied))
    return shared


def values_of(dimension: Sequence[Any] | Range) -> Sequence[Any] | None:
    """All values of a dimension in order; None of a range of real numbers."""
    if not isinstance(dimension, Range):
        return dimension
    whole = is_whole(dimension)
    if dimension.step is None and (dimension.log or not whole):
        return None
    step = dimension.step or 1
    count = math.floor((dimension.high - dimension.low) / step + 1e-9) + 1
    return [on_step(dimension.low + position * step, dimension) for position in range(count)]


def on_step(number: float, span: Range) -> float:
    """The number without the rounding error of low + n * step, such as 0.6000000000000001."""
    return number if span.step is None or is_whole(span) else round(number, 12)


def is_whole(span: Range) -> bool:
    """Whether a range is of whole numbers."""
    return all(isinstance(number, int) for number in (span.low, span.high, span.step or 1))


def combinations(dimensions: Dimensions, limit: float = math.inf) -> list[dict[str, Any]] | None:
    """Every combination of values, the last key changing fastest; None above the limit."""
    axes = [values_of(dimension) for dimension in dimensions.values()]
    finite = [axis for axis in axes if axis is not None]
    if len(finite) < len(axes) or math.prod(map(len, finite)) > limit:
        return None
    return [dict(zip(dimensions, chosen, strict=True)) for chosen in itertools.product(*finite)]
