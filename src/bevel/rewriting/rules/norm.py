"""Layer, group and instance norm of images -> batch norm that comes closest on calibration images.

A batch norm is a scale and a shift per channel that any convolution takes in; the others have to
look at the whole image before they can go on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevel.rewriting.fitting import Error, by_channel, relative_error
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = False
NORMS = (F.layer_norm, F.group_norm, F.instance_norm)


def match(seen: Seen) -> Iterator[Node]:
    """Calls of these norms."""
    return seen.calls(NORMS)


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    if len(node.shape) != 4:
        return "what it normalises is no image"
    if node.function is F.layer_norm and len(node.frame.arguments[1]) > 1:
        return "it normalises over height and width too, with weights for each place"
    if _whole(seen, node) is None:
        return "its module does more than normalise"
    if seen.runs(node.module) != 1:
        return "its module runs several times"
    return None


def rewrite(surgeon: Surgeon, node: Node) -> Error:
    """Put a batch norm there with the statistics of what it normalises."""
    seen = surgeon.seen
    x = surgeon.samples[node.number][0]
    y = _normalised(surgeon, node, x)
    x, y = by_channel(x).double(), by_channel(y).double()
    mean, variance = x.mean(1), x.var(1, unbiased=False)
    eps = 1e-5
    unit = (x - mean[:, None]) / (variance[:, None] + eps).sqrt()
    own_weight, own_bias = (
        _parameter(surgeon, node, name, value) for name, value in (("weight", 1.0), ("bias", 0.0))
    )
    naive = own_weight.double()[:, None] * unit + own_bias.double()[:, None]
    weight, bias = own_weight, own_bias
    if surgeon.fit:
        bias = y.mean(1)
        slope = (unit * (y - bias[:, None])).sum(1) / unit.square().sum(1).clamp(min=1e-12)
        weight = slope
    fitted = weight.double()[:, None] * unit + bias.double()[:, None]
    last = _whole(seen, node) == 1 and seen.channel_axis(node) == 3
    surgeon.replace(
        node.module,
        "ChannelsLastBatchNorm" if last else "BatchNorm2d",
        num_features=len(mean),
        eps=eps,
    )
    norm = surgeon.net.get_submodule(node.module)
    assert isinstance(norm, nn.BatchNorm2d)  # noqa: S101  # it was put there
    state = {"running_mean": mean, "running_var": variance, "weight": weight, "bias": bias}
    norm.load_state_dict({k: v.to(norm.weight) for k, v in state.items()}, strict=False)
    return Error(relative_error(naive, y), relative_error(fitted, y))


def _normalised(surgeon: Surgeon, node: Node, x: Tensor) -> Tensor:
    """What the norm makes of (images, channels, positions), as if these were all positions."""
    weight, bias = (
        _parameter(surgeon, node, name, value).to(x)
        for name, value in (("weight", 1.0), ("bias", 0.0))
    )
    frame = node.frame
    if node.function is F.layer_norm:
        eps = frame.argument(4, "eps") or 1e-5
        return F.layer_norm(x.transpose(1, 2), weight.shape, weight, bias, eps).transpose(1, 2)
    if node.function is F.group_norm:
        groups = int(frame.argument(1, "num_groups"))
        return F.group_norm(x, groups, weight, bias, frame.argument(4, "eps") or 1e-5)
    eps = frame.argument(7, "eps") or 1e-5
    return F.instance_norm(x, weight=weight, bias=bias, eps=eps)


def _whole(seen: Seen, node: Node) -> int | None:
    """How many calls the module makes in all: 1, or 3 where it turns the axes and back."""
    if seen.are_whole([node]):
        return 1
    inside = seen.inside(node.module)
    turns = [call for call in inside if call is not node]
    plain = all(call.function in (torch.permute, Tensor.permute) for call in turns)
    ordered = len(inside) == 3 and inside[1] is node and plain
    return 3 if ordered and inside[0].frame.arguments[0].shape == inside[2].shape else None


def _parameter(surgeon: Surgeon, node: Node, name: str, default: float) -> Tensor:
    module = surgeon.net.get_submodule(node.module)
    own = getattr(module, name, None)
    channels = node.shape[surgeon.seen.channel_axis(node)]
    return own.detach() if isinstance(own, Tensor) else torch.full((channels,), default)
