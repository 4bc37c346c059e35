"""Hard sigmoid, relu6(x + 3) / 6 -> a cut to 0 and 1 of x / 6 + 1 / 2 in the layer before; exact.

What integer engines lack is hard sigmoid; cutting is what they do in any layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True


def match(seen: Seen) -> Iterator[Node]:
    """Calls of it."""
    return seen.calls([F.hardsigmoid])


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    if seen.layer_before(node) is None:
        return "no layer whose output it alone reads comes before it"
    return None


def rewrite(surgeon: Surgeon, node: Node) -> None:
    """Scale and shift the layer before, and cut."""
    axis = surgeon.seen.channel_axis(node)
    channels = torch.ones(node.shape[axis])
    surgeon.scale_output(node, channels / 6, channels / 2)
    surgeon.divert(node, "clip")
