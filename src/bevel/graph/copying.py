"""Copies of a network in which some tensors are already replaced, so that none is copied twice."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bevel.graph.naming import named_modules


def copy_with(net: nn.Module, replaced: dict[int, Any]) -> nn.Module:
    """A deep copy that holds `replaced[id(tensor)]` in place of each tensor named there.

    Tensors that a forward has left on a module are no parameters, and torch refuses to deep-copy
    those with a history; they are cloned.
    """
    memo = dict(replaced)
    plain = []
    for module in named_modules(net).values():
        for name, value in vars(module).items():
            if name in _OF_MODULES or _is_atom(value):
                continue
            for leaf in tree_leaves(value) if isinstance(value, list | tuple | dict) else (value,):
                if isinstance(leaf, Tensor) and id(leaf) not in memo and not leaf.is_leaf:
                    memo[id(leaf)] = leaf.detach().clone()
        state = _state(module)
        if state is not None and id(module) not in memo:
            memo[id(module)] = blank = type(module).__new__(type(module))
            plain.append((blank, state))
    for blank, state in plain:  # all of them are in the memo: modules may refer to each other
        blank.__setstate__({name: _copied(name, value, memo) for name, value in state.items()})
    return copy.deepcopy(net, memo)


def _state(module: nn.Module) -> dict[str, Any] | None:
    """What `copy.deepcopy` would copy of a module; None if it would do more than that."""
    if hasattr(type(module), "__deepcopy__"):
        return None
    reduced = module.__reduce_ex__(4)
    if reduced[:2] != (copyreg.__newobj__, (type(module),)) or any(reduced[3:]):  # type: ignore[attr-defined]
        return None
    return reduced[2] if isinstance(reduced[2], dict) else None


def _copied(name: str, value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy; that of a module's many empty dictionaries without the detours of the rest."""
    if _is_atom(value):
        return value
    if name in _OF_MODULES and not value and type(value) in (dict, OrderedDict, set):
        return type(value)()
    return copy.deepcopy(value, memo)


def _is_atom(value: Any) -> bool:
    """Whether a value needs no copy: a number, a text, or a tuple of these."""
    if type(value) is tuple:
        return all(type(item) in _ATOMS for item in value)
    return type(value) in _ATOMS


_ATOMS = frozenset((bool, int, float, str, type(None)))

_OF_MODULES = frozenset(vars(nn.Module()))
"""What every module holds: parameters, submodules, hooks."""


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name that it has."""
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in named_modules(net, repeated=True).items()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    }


def laid_out(tensor: Tensor) -> Tensor:
    """A copy whose elements lie in the order of its dimensions."""
    return tensor.new_empty(tensor.shape).copy_(tensor)


def in_order(net: nn.Module) -> nn.Module:
    """The network with tensors whose elements lie in the order of their dimensions, as by default.

    A copy if any lies otherwise, as in channels_last; else the network itself.
    """
    turned = {
        id(tensor): like(tensor, laid_out(tensor.detach()))
        for tensor in tensors_of(net).values()
        if tensor.stride() != torch.empty(tensor.shape, device="meta").stride()
    }
    return copy_with(net, turned) if turned else net


def meta(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor or parameter like this one, of another shape and without data."""
    new = torch.empty(tuple(shape), dtype=tensor.dtype, device="meta")
    return like(tensor, new)


def like(tensor: Tensor, new: Tensor) -> Tensor:
    """`new` as a parameter if `tensor` is one."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new
