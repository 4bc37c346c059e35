"""ReLU6, min(relu(x), 6) -> ReLU with the layers around it fitted to come closest."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bevel.rewriting.activations import ToRelu
from bevel.rewriting.seen import Node, Seen

EXACT = False
_RULE = ToRelu(
    F.relu6, also=(F.hardtanh, torch.clamp, torch.clip, torch.Tensor.clamp, torch.Tensor.clip)
)
check, rewrite = _RULE.check, _RULE.rewrite


def match(seen: Seen) -> Iterator[Node]:
    """Calls that cut below 0 and above 6."""
    for node in _RULE.match(seen):
        ends = ("min_val", "max_val") if node.function is F.hardtanh else ("min", "max")
        cut = tuple(node.frame.argument(place, end) for place, end in enumerate(ends, 1))
        if node.function is F.relu6 or cut == (0, 6):
            yield node
