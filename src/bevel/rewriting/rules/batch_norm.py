"""Convolution or linear layer + batch norm -> the layer with other numbers; exact in eval mode."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bevel.models.batchnorm import affine
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True


def match(seen: Seen) -> Iterator[Node]:
    """Batch norms."""
    return seen.calls([F.batch_norm])


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    norm = seen.modules.get(node.module)
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return "it keeps no running statistics"
    if seen.runs(node.module) != 1:
        return "it runs several times"
    layer = seen.layer_before(node)
    if layer is None or isinstance(layer, _BatchNorm):
        return "no layer whose output it alone reads comes before it"
    return None


def rewrite(surgeon: Surgeon, node: Node) -> None:
    """gamma (y - mean) / sqrt(var + eps) + beta, taken into the layer that makes y."""
    norm = surgeon.net.get_submodule(node.module)
    assert isinstance(norm, _BatchNorm)  # noqa: S101  # `check` saw that
    surgeon.scale_output(node, *affine(norm))
    if type(norm) in PLAIN:
        surgeon.replace(node.module, "Identity")
    else:  # a class of its own may do more, such as an activation
        surgeon.divert(node, "first")


PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
