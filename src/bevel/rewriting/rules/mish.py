"""Mish -> ReLU with the layer before it scaled and shifted to come closest."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from bevel.rewriting import activations
from bevel.rewriting.fitting import Error
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = False


def match(seen: Seen) -> Iterator[Node]:
    """Calls of mish."""
    return seen.calls([F.mish])


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    return activations.check(seen, node)


def rewrite(surgeon: Surgeon, node: Node) -> Error:
    """Make it a ReLU."""
    return activations.rewrite(surgeon, node, F.mish)
