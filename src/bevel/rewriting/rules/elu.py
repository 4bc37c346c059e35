"""ELU -> ReLU with the layer before it scaled and shifted to come closest."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from bevel.rewriting import activations
from bevel.rewriting.fitting import Error
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = False


def match(seen: Seen) -> Iterator[Node]:
    """Calls of elu."""
    return seen.calls([F.elu])


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    return activations.check(seen, node)


def rewrite(surgeon: Surgeon, node: Node) -> Error:
    """Make it a ReLU."""
    alpha = node.frame.argument(1, "alpha")
    alpha = 1.0 if alpha is None else float(alpha)
    return activations.rewrite(surgeon, node, lambda x: F.elu(x, alpha))
