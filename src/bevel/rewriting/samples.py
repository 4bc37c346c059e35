"""The tensors that some calls are given on calibration images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bevel.core.modes import evaluating
from bevel.graph.record import decomposed, is_frame
from bevel.rewriting.seen import Node

PIXELS = 64
"""Most positions that are kept of each image and channel, evenly spread."""

Samples = Mapping[int, Sequence[Tensor]]
"""By a call's number: its tensor arguments of all images, each (images, channels, positions)."""


class _Watching(TorchFunctionMode):
    """Counts calls as a recording does, and keeps the tensors that some of them are given."""

    def __init__(self, wanted: Iterable[int]) -> None:
        super().__init__()
        self.wanted = frozenset(wanted)
        self.kept: dict[int, list[Tensor]] = {}
        self.number = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.number in self.wanted:
            # Before the call, which may overwrite them. One that turns out not to count leaves
            # the number to the next, which then keeps its own.
            tensors = (arg for arg in args if isinstance(arg, Tensor) and arg.ndim > 1)
            self.kept[self.number] = [_thin(tensor) for tensor in tensors]
        result = func(*args, **kwargs)
        self.number += is_frame(func, result)
        return result


@torch.no_grad()
def take(net: nn.Module, batches: Iterable[Tensor], nodes: Iterable[Node]) -> Samples:
    """Run the network on images and keep what the calls get.

    Args:
        net: as it was recorded.
        batches: images (N, C, H, W).
        nodes: the calls.
    """
    parts: dict[int, list[list[Tensor]]] = defaultdict(list)
    wanted = [node.number for node in nodes]
    with evaluating(net), decomposed():
        for batch in batches:
            with _Watching(wanted) as watching:
                net(batch)
            for number, kept in watching.kept.items():
                parts[number].append(kept)
    return {
        number: [torch.cat(same) for same in zip(*kept, strict=True)]
        for number, kept in parts.items()
    }


def _thin(tensor: Tensor) -> Tensor:
    """(N, C, ...) to (N, C, at most PIXELS), evenly spread; (N, L, C) likewise with C second."""
    if tensor.ndim == 3:
        tensor = tensor.transpose(1, 2)
    flat = tensor.detach().flatten(2) if tensor.ndim > 2 else tensor.detach()[..., None]
    step = -(-flat.shape[2] // PIXELS)
    return flat[:, :, ::step].float().clone()
