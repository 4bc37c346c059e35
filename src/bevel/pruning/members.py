"""The members of channel groups: which axis of which weight holds a group's units, and as what.

A *member* is one axis of one parameter on which the group's units lie: a filter that makes them,
an input slice that reads them, a normalisation's scale.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bevel.graph.couplings import Axis, ChannelGroup
from bevel.graph.naming import named_modules


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor as a module uses it.

    Attributes:
        key: the module's name and the tensor's in it; parts of a parametrised weight share them.
        module: the module.
        tensor: its value.
    """

    key: tuple[str, str]
    module: nn.Module
    tensor: Tensor


Member = tuple[Weight, Axis]


class Members:
    """Finds the members of a network's channel groups."""

    def __init__(self, net: nn.Module) -> None:
        self.modules = named_modules(net, repeated=True)
        self._weights: dict[str, Weight | None] = {}
        self._roles: dict[tuple[str, int], str | None] = {}

    def of(self, group: ChannelGroup, roles: Sequence[Set[str]]) -> list[Member]:
        """Those of the first set of roles that the group has any of, filters before the rest."""
        by_role: dict[str, list[Member]] = {}
        for axis in group.axes:
            weight, role = self._weight(axis.tensor), self._role(axis)
            if weight is not None and role is not None:
                by_role.setdefault(role, []).append((weight, axis))
        wanted = next((some for some in roles if some & by_role.keys()), set())
        members: dict[tuple[str, str, int], Member] = {}
        for role in sorted(wanted & by_role.keys(), key=lambda role: (role != "filter", role)):
            for weight, axis in by_role[role]:  # of a weight in parts, the first counts
                members.setdefault((*weight.key, axis.dim), (weight, axis))
        return list(members.values())

    def _weight(self, name: str) -> Weight | None:
        """The weight that a parameter is or is a part of; None for statistics and the like."""
        if name not in self._weights:
            self._weights[name] = self._found(name)
        return self._weights[name]

    def _found(self, name: str) -> Weight | None:
        head, parametrised, rest = f".{name}".partition(".parametrizations.")
        if parametrised:
            leaf, _, part = rest.partition(".")
            owner = head.removeprefix(".")
            if not part.startswith("original"):  # a state of the parametrisation
                return None
        else:
            owner, _, leaf = name.rpartition(".")
        module = self.modules[owner]
        if not parametrised:
            stem = leaf.rpartition("_")[0]  # torch.nn.utils: weight_g and weight_v, weight_orig
            if leaf in (f"{stem}_g", f"{stem}_v", f"{stem}_orig") and hasattr(module, stem):
                leaf = stem
        holder, _, part = name.rpartition(".")
        held = self.modules[holder]
        own: Tensor | None = held._parameters.get(part)
        if own is None and leaf == "weight":  # a frozen normalisation's scale
            own = held._buffers.get(part)
        if own is None:
            return None
        tensor = getattr(module, leaf, own)
        if not isinstance(tensor, Tensor) or tensor.ndim < own.ndim:
            tensor = own
        return Weight((owner, leaf), module, tensor.detach())

    def _role(self, axis: Axis) -> str | None:
        key = (axis.tensor, axis.dim)
        if key not in self._roles:
            weight = self._weight(axis.tensor)
            role = None
            if weight is not None and weight.tensor.shape[axis.dim] == axis.units.shape[-1]:
                role = role_of(weight.module, weight.key[1], weight.tensor, axis.dim)
            self._roles[key] = role
        return self._roles[key]


def role_of(module: nn.Module, leaf: str, tensor: Tensor, dim: int) -> str | None:
    """What an axis of a module's tensor is to the channels on it; None: nothing to score."""
    if "bias" in leaf:
        return "bias" if tensor.ndim == 1 else "other"
    if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
        return "norm" if leaf == "weight" else None
    if isinstance(module, nn.PReLU):
        return "other"
    if leaf == "weight" and tensor.ndim == 1:  # somebody's own normalisation
        return "norm"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag | _ConvTransposeNd):
        return ("input", "filter", "other")[min(dim, 2)]
    if isinstance(module, _ConvNd):
        return ("filter", "input", "other")[min(dim, 2)]
    if any(word in leaf for word in ("pos", "token", "cls", "class", "embed")):
        return "other"
    if sum(size > 1 for size in tensor.shape) < 2:
        return "other"
    return "filter" if dim == 0 else "input"
