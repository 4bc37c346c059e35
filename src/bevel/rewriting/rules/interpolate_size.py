"""Interpolation to a size that is a multiple of the input's -> by that factor; exact.

A size is a constant of one input size, a factor holds for all, and engines resize by it in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True
MODES = ("nearest", "bilinear")


def match(seen: Seen) -> Iterator[Node]:
    """Calls with a size."""
    for node in seen.calls([F.interpolate]):
        if node.frame.argument(1, "size") is not None:
            yield node


def check(seen: Seen, node: Node) -> str | None:  # noqa: ARG001
    """Why a place cannot be rewritten."""
    frame = node.frame
    source, made = frame.arguments[0].shape[2:], node.shape[2:]
    if len(made) != 2 or any(new % old for old, new in zip(source, made, strict=True)):
        return f"{'x'.join(map(str, made))} is no multiple of {'x'.join(map(str, source))}"
    mode = frame.argument(3, "mode") or "nearest"
    if mode not in MODES or (frame.argument(3, "mode") and not frame.keyword("mode")):
        return f"only {' and '.join(MODES)}, given by name, are the same by factor"
    if frame.argument(4, "align_corners") or frame.argument(6, "antialias"):
        return "with align_corners or antialias factors give other values"
    return None


def rewrite(surgeon: Surgeon, node: Node) -> None:
    """Give the factor."""
    surgeon.divert(node, "interpolate by factors")
