"""Name, shape and type of what goes into an exported file and comes out. Standard library only.

Sessions need it, and sessions also run on devices that have neither bevel nor pydantic.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSignature:
    """Name, shape and type of one input or output; a text in the shape is a dynamic size."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by the records that hold it

    name: str
    shape: list[int | str]
    dtype: str
