"""SiLU, x * sigmoid(x) -> ReLU with the layer before it scaled and shifted to come closest."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bevel.rewriting import activations
from bevel.rewriting.fitting import Error
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = False
GATES = (torch.sigmoid, torch.Tensor.sigmoid, torch.special.expit, F.sigmoid)


def match(seen: Seen) -> Iterator[Node]:
    """Calls of silu, and products with a sigmoid written by hand."""
    yield from seen.calls([F.silu])
    yield from activations.products(seen, GATES)


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    gate = None if node.function is F.silu else activations.gate_of(seen, node, GATES)
    return activations.check(seen, node, gate)


def rewrite(surgeon: Surgeon, node: Node) -> Error:
    """Make it a ReLU."""
    by_hand = node.function is not F.silu
    gate = activations.gate_of(surgeon.seen, node, GATES) if by_hand else None
    return activations.rewrite(surgeon, node, F.silu, gate)
