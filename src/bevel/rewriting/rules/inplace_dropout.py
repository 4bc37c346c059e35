"""Dropout in place -> dropout; exact, and a ReLU before it can be trained."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True
KINDS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def match(seen: Seen) -> Iterator[str]:
    """Dropout modules that overwrite what they get: ReLU's gradient needs its output."""
    for name, module in seen.modules.items():
        if isinstance(module, KINDS) and module.inplace:
            yield name


def check(seen: Seen, place: Node | str) -> str | None:
    """Why a place cannot be rewritten."""
    if isinstance(place, Node) or type(seen.modules[place]) not in KINDS:
        return "it is a class of its own"
    return None


def rewrite(surgeon: Surgeon, place: Node | str) -> None:
    """The same class, out of place."""
    assert isinstance(place, str)  # noqa: S101  # `match` gives names
    module = surgeon.seen.modules[place]
    assert isinstance(module, KINDS)  # noqa: S101  # `match` saw that
    surgeon.replace(place, type(module).__name__, p=module.p)
