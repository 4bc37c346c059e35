"""Copies of a network in which some tensors are already replaced, so that none is copied twice."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def copy_with(net: nn.Module, replaced: dict[int, Any]) -> nn.Module:
    """A deep copy that holds `replaced[id(tensor)]` in place of each tensor named there.

    Tensors that a forward has left on a module are no parameters, and torch refuses to deep-copy
    those with a history; they are cloned.
    """
    memo = dict(replaced)
    for module in net.modules():
        for name, value in vars(module).items():
            if name in _OF_MODULES:
                continue
            for leaf in tree_leaves(value) if isinstance(value, list | tuple | dict) else (value,):
                if isinstance(leaf, Tensor) and id(leaf) not in memo and not leaf.is_leaf:
                    memo[id(leaf)] = leaf.detach().clone()
    return copy.deepcopy(net, memo)


_OF_MODULES = frozenset(vars(nn.Module()))
"""What every module holds: parameters, submodules, hooks."""


def meta(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor or parameter like this one, of another shape and without data."""
    new = torch.empty(tuple(shape), dtype=tensor.dtype, device="meta")
    return like(tensor, new)


def like(tensor: Tensor, new: Tensor) -> Tensor:
    """`new` as a parameter if `tensor` is one."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new
