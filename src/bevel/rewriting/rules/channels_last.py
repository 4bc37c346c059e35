"""Linear layers between two turns of the axes (ConvNeXt) -> 1x1 convolutions without turns; exact.

Liu et al., "A ConvNet for the 2020s", CVPR 2022: the two are the same function, and embedded
engines pay for every turn. Layer norms there have to become batch norms before.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevel.rewriting.modules import ChannelsLastBatchNorm
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True
TURNS = (torch.permute, Tensor.permute)
LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
POINTWISE = (
    F.relu, F.relu6, F.hardtanh, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.mish, F.elu,
    F.leaky_relu, F.dropout, torch.sigmoid, torch.tanh,
)  # fmt: skip


def match(seen: Seen) -> Iterator[Node]:
    """Turns to channels last, outside of norms, that a linear layer or a batch norm follows."""
    for node in seen.calls(TURNS):
        inside_norm = isinstance(seen.modules.get(node.module), ChannelsLastBatchNorm)
        if _axes(node) == LAST and not inside_norm and len(node.shape) == 4:
            yield node


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    found = _between(seen, node)
    if isinstance(found, str):
        return found
    if not any(call.function is F.linear for call in found):
        return "no linear layer is between it and the turn back"
    return None


def rewrite(surgeon: Surgeon, node: Node) -> None:
    """Make the layers in between those of images, and leave the axes as they are."""
    found = _between(surgeon.seen, node)
    assert not isinstance(found, str)  # noqa: S101  # `check` saw that
    for call in found:
        if call.function is F.linear:
            _convolve(surgeon, call.module)
        elif call.function is F.batch_norm:
            _normalise(surgeon, call.module)
    surgeon.divert(node, "first")
    surgeon.divert(found[-1], "first")


def _between(seen: Seen, node: Node) -> list[Node] | str:
    """The calls that follow, up to and with the turn back; or why they cannot be rewritten."""
    calls: list[Node] = []
    while True:
        ref = (calls[-1] if calls else node).outputs[0]
        readers = seen.readers(ref)
        if len(readers) != 1 or ref in seen.outputs:
            return "several calls read what is turned"
        call = readers[0]
        module = seen.modules.get(call.module)
        calls.append(call)
        if isinstance(module, ChannelsLastBatchNorm):
            continue
        if call.function in TURNS:
            turned = _axes(call) == FIRST
            return calls if turned else f"{call.place} turns to other axes"
        if call.function is F.linear:
            if type(module) is not nn.Linear or seen.owner_of_weight(call) is None:
                return f"{call.place} is no nn.Linear of its own"
        elif call.function not in POINTWISE:
            return f"{call.place} needs the axes in this order"


def _axes(node: Node) -> tuple[int, ...]:
    """The order that a turn gives, none negative."""
    given = node.frame.arguments[1:]
    order = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    return tuple(int(axis) % len(order) for axis in order)


@torch.no_grad()
def _convolve(surgeon: Surgeon, name: str) -> None:
    linear = surgeon.net.get_submodule(name)
    assert isinstance(linear, nn.Linear)  # noqa: S101  # `check` saw that
    surgeon.replace(
        name,
        "Conv2d",
        in_channels=linear.in_features,
        out_channels=linear.out_features,
        kernel_size=1,
        bias=linear.bias is not None,
    )
    conv = surgeon.net.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)  # noqa: S101  # it was put there
    conv.weight.copy_(linear.weight[:, :, None, None])
    if conv.bias is not None:
        conv.bias.copy_(linear.bias)


def _normalise(surgeon: Surgeon, name: str) -> None:
    norm = surgeon.net.get_submodule(name)
    assert isinstance(norm, ChannelsLastBatchNorm)  # noqa: S101  # `_between` saw that
    surgeon.replace(name, "BatchNorm2d", num_features=norm.num_features, eps=norm.eps)
    surgeon.net.get_submodule(name).load_state_dict(norm.state_dict())
