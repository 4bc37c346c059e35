"""Data from a user's own file: `path/to/file.py:factory` with keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bevel.core import userfile
from bevel.core.errors import DataError
from bevel.core.recipe import DataSection
from bevel.data.splits import Splits


def from_function(section: DataSection) -> Splits:
    """Call the factory; it returns a mapping, or an object with attributes, of these names.

    `train` and `test`, perhaps `validation`: map-style data sets of (PIL image or uint8 tensor,
    label). `classes`: the names, in the order of the labels.

    Raises:
        UnknownNameError: no such file or function.
        DataError: the factory fails, or what it returns lacks something.
    """
    function = userfile.load_function(section.name, DataError)
    made = userfile.call(function, section.name, section.arguments, DataError)

    def get(key: str) -> Any:
        return made.get(key) if isinstance(made, Mapping) else getattr(made, key, None)

    for key in ("train", "test", "classes"):
        if get(key) is None:
            raise DataError(
                f"{section.name} returned a {type(made).__name__} without '{key}'; expected a "
                "mapping or object with train, test, classes and perhaps validation"
            )
    for key in ("train", "validation", "test"):
        source = get(key)
        if source is not None and not (
            hasattr(source, "__len__") and hasattr(source, "__getitem__")
        ):
            raise DataError(
                f"'{key}' of {section.name} is a {type(source).__name__}; expected a map-style "
                "data set: with a length, and (image, label) for each index"
            )
    classes = get("classes")
    if isinstance(classes, str) or not hasattr(classes, "__iter__"):
        raise DataError(f"'classes' of {section.name} must be a list of names, got {classes!r}")
    return Splits(get("train"), get("validation"), get("test"), tuple(str(c) for c in classes))
