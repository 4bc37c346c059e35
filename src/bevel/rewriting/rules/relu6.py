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
        low, high = (
            node.frame.argument(1, "min_val"), node.frame.argument(2, "max_val")
        ) if node.function is F.hardtanh else (
            node.frame.argument(1, "min"), node.frame.argument(2, "max")
        )  # fmt: skip
        if node.function is F.relu6 or (low, high) == (0, 6):
            yield node
