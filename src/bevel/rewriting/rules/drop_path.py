"""Drop path, stochastic depth -> nothing; exact when not training, and training is without it."""

from __future__ import annotations

from collections.abc import Iterator

from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True
KINDS = ("DropPath", "StochasticDepth")


def match(seen: Seen) -> Iterator[str]:
    """Modules of such a class: when not training they call nothing."""
    return (name for name, module in seen.modules.items() if type(module).__name__ in KINDS)


def check(seen: Seen, place: Node | str) -> str | None:
    """Why a place cannot be rewritten."""
    if isinstance(place, Node) or any(True for _ in seen.modules[place].children()):
        return "it holds other modules"
    return None


def rewrite(surgeon: Surgeon, place: Node | str) -> None:
    """Leave its input as it is."""
    assert isinstance(place, str)  # noqa: S101  # `match` gives names
    surgeon.replace(place, "Identity")
