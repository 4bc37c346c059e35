"""The tensors that some calls are given on calibration images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bevel.core.modes import evaluating
from bevel.graph.naming import named_modules
from bevel.graph.record import ExampleInputs, ModuleStack, as_arguments, decomposed, is_frame, run
from bevel.rewriting.seen import Function, Node, Seen

PIXELS = 64
"""Most positions that are kept of each image and channel, evenly spread."""

Samples = Mapping[int, Sequence[Tensor]]
"""By a call's number: its tensor arguments of all images, each (images, channels, positions)."""

Name = tuple[str, int, Function, int]
"""A call: its module, which run of that, the function, and which call of it in that run. A detector
may go through its images one by one, so a call's number depends on how many they are."""


class _Naming:
    """Names the calls of a pass as they come."""

    def __init__(self) -> None:
        self.runs: dict[str, list[int]] = defaultdict(list)
        self.calls: Counter[tuple[str, int, Function]] = Counter()

    def name(self, module: str, entry: int, function: Function) -> Name:
        """What the next such call in this run of its module is called."""
        runs = self.runs[module]
        key = module, runs.index(entry) if entry in runs else len(runs), function
        return *key, self.calls[key]

    def count(self, name: Name, entry: int) -> None:
        """The call, and with it the run, is one that a recording holds."""
        if name[1] == len(self.runs[name[0]]):
            self.runs[name[0]].append(entry)
        self.calls[name[:3]] += 1


class _Watching(TorchFunctionMode):
    """Names calls, and keeps the tensors that some of them are given.

    Args:
        modules: whose forward is running.
        wanted: by a call's name, the axis of its tensors that holds the channels.
    """

    def __init__(self, modules: ModuleStack, wanted: Mapping[Name, int]) -> None:
        super().__init__()
        self.modules, self.wanted = modules, wanted
        self.naming = _Naming()
        self.kept: dict[Name, list[Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        entry = self.modules.entry
        name = self.naming.name(self.modules.top, entry, func)
        if name in self.wanted:
            # Before the call, which may overwrite them. One that turns out not to count leaves
            # the name to the next, which then keeps its own.
            tensors = (arg for arg in args if isinstance(arg, Tensor) and arg.ndim > 1)
            self.kept[name] = [_thin(tensor, self.wanted[name]) for tensor in tensors]
        result = func(*args, **kwargs)
        if is_frame(func, result):
            self.naming.count(name, entry)
        return result


@torch.no_grad()
def take(
    net: nn.Module, batches: Iterable[ExampleInputs], seen: Seen, nodes: Iterable[Node]
) -> Samples:
    """Run the network on images and keep what the calls get.

    Args:
        net: the network.
        batches: what it is called with, of any number and size of images.
        seen: a recording of it.
        nodes: calls of that; those that no batch reaches have no samples.
    """
    names, naming = [], _Naming()
    for node in seen.nodes:
        names.append(naming.name(node.module, node.frame.entry, node.function))
        naming.count(names[-1], node.frame.entry)
    numbers = {names[node.number]: node.number for node in nodes}
    wanted = {names[node.number]: seen.channel_axis(node) for node in nodes}
    parts: dict[int, list[list[Tensor]]] = defaultdict(list)
    with evaluating(net), decomposed():
        for batch in batches:
            modules = ModuleStack(named_modules(net))
            with modules.following(), _Watching(modules, wanted) as watching:
                run(net, batch)
            for name, kept in watching.kept.items():
                if all(map(len, kept)):  # a detector may have found nothing to look at
                    parts[numbers[name]].append(kept)
    return {
        number: [_one_behind_another(same) for same in zip(*kept, strict=True)]
        for number, kept in parts.items()
    }


def joined(batches: Iterable[ExampleInputs]) -> Tensor | list[Tensor] | None:
    """The images of all batches as one, which a network can be called with.

    Returns:
        Images (N, C, H, W), or a list of images (C, H, W) as detectors take them; None where the
        batches are something else, or images of different sizes that no list holds.
    """
    given = [as_arguments(batch) for batch in batches]
    if any(len(arguments) != 1 for arguments in given):
        return None
    images = [arguments[0] for arguments in given]
    if all(isinstance(part, Tensor) for part in images):
        same = len({part.shape[1:] for part in images}) == 1
        return torch.cat(images) if same else None
    listed = all(isinstance(part, list | tuple) for part in images)
    found = [image for part in images for image in part] if listed else []
    return found if found and all(isinstance(image, Tensor) for image in found) else None


def _one_behind_another(parts: Sequence[Tensor]) -> Tensor:
    """Samples of images that may differ in size: of each as many positions as the fewest have."""
    fewest = min(part.shape[2] for part in parts)
    spread = torch.arange(fewest)
    return torch.cat([part[:, :, spread * part.shape[2] // fewest] for part in parts])


def _thin(tensor: Tensor, axis: int) -> Tensor:
    """To (N, channels, at most PIXELS), evenly spread; `axis` holds the channels."""
    moved = tensor.detach().movedim(min(axis, tensor.ndim - 1), 1)
    flat = moved[..., None] if moved.ndim == 2 else moved.flatten(2)
    step = -(-flat.shape[2] // PIXELS)
    return flat[:, :, ::step].float().clone()
