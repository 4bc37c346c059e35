"""Leaky ReLU -> ReLU with the layer before it scaled and shifted to come closest."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from bevel.rewriting import activations
from bevel.rewriting.fitting import Error
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = False


def match(seen: Seen) -> Iterator[Node]:
    """Calls of leaky_relu."""
    return seen.calls([F.leaky_relu])


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    return activations.check(seen, node)


def rewrite(surgeon: Surgeon, node: Node) -> Error:
    """Make it a ReLU."""
    slope = node.frame.argument(1, "negative_slope")
    slope = 0.01 if slope is None else float(slope)
    return activations.rewrite(surgeon, node, lambda x: F.leaky_relu(x, slope))
