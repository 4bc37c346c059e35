"""Hard swish, x * relu6(x + 3) / 6 -> ReLU, the layer before it scaled and shifted to fit."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from bevel.rewriting import activations
from bevel.rewriting.fitting import Error
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = False
GATES = (F.hardsigmoid,)


def match(seen: Seen) -> Iterator[Node]:
    """Calls of hardswish, and products with a hard sigmoid written by hand."""
    yield from seen.calls([F.hardswish])
    yield from activations.products(seen, GATES)


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    gate = None if node.function is F.hardswish else activations.gate_of(seen, node, GATES)
    return activations.check(seen, node, gate)


def rewrite(surgeon: Surgeon, node: Node) -> Error:
    """Make it a ReLU."""
    by_hand = node.function is not F.hardswish
    gate = activations.gate_of(surgeon.seen, node, GATES) if by_hand else None
    return activations.rewrite(surgeon, node, F.hardswish, gate)
