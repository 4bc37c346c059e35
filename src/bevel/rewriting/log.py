"""What surgery did to a network, as data that can be done again to a fresh one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from bevel.core.errors import SurgeryError
from bevel.models.fading import fades
from bevel.rewriting.calls import DIVERSIONS, OUT_OF_PLACE, divert, function_named, watch
from bevel.rewriting.modules import MODULES


class _Action(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Replace(_Action):
    """Another module takes a module's place, or a new place.

    `repeat` of them in a row where that is more than one.
    """

    action: Literal["replace"] = "replace"
    module: str
    by: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    repeat: int = 1


class Divert(_Action):
    """A call in a module's own forward becomes another; see `calls.divert`."""

    action: Literal["divert"] = "divert"
    module: str
    function: str
    ordinal: int
    becomes: str


class AddBias(_Action):
    """A layer without bias gets one."""

    action: Literal["bias"] = "bias"
    module: str
    channels: int


class OutOfPlace(_Action):
    """A module no longer overwrites what it is given."""

    action: Literal["out of place"] = "out of place"
    module: str


Method = Literal["reparameterize", "switch_to_deploy"]
"""How timm and the authors of RepVGG call what makes one convolution of a block of branches."""


class Reparametrize(_Action):
    """A block of several branches becomes one convolution by a method of its own, in place."""

    action: Literal["reparametrize"] = "reparametrize"
    module: str
    method: Method


AnyAction = Replace | Divert | AddBias | OutOfPlace | Reparametrize
Action = Annotated[AnyAction, Field(discriminator="action")]


class SurgeryLog(BaseModel):
    """Actions in order. Numbers (weights) are not among them: they are in the state dict."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    actions: list[Action] = Field(default_factory=list)

    def do(self, net: nn.Module, action: AnyAction) -> None:
        """Do an action to a network, in place, and note it."""
        perform(net, action)
        self.actions.append(action)

    def settled(self, net: nn.Module) -> SurgeryLog:
        """The log of a network after training: what faded in it is a ReLU now."""
        if fades(net):
            return self
        actions = [
            action.model_copy(update={"by": "ReLU", "arguments": {}})
            if isinstance(action, Replace) and action.by == "Fading"
            else action
            for action in self.actions
        ]
        return SurgeryLog(actions=actions)


def replay(net: nn.Module, log: SurgeryLog) -> nn.Module:
    """Do everything that a log holds to a fresh network of the same class, in place.

    Raises:
        SurgeryError: the log is another network's.
    """
    for action in log.actions:
        perform(net, action)
    return net


def perform(net: nn.Module, action: AnyAction) -> None:
    """Do one action to a network, in place.

    Raises:
        SurgeryError: the network has no such module, or there is no such replacement.
    """
    if isinstance(action, Replace):
        _replace(net, action)
        return
    module = _module(net, action.module)
    if isinstance(action, Divert):
        if function_named(action.function) is None:
            raise SurgeryError(f"torch has no function '{action.function}' to be diverted")
        child = action.becomes.partition(":")[2]
        known = {*DIVERSIONS, OUT_OF_PLACE}
        if action.becomes not in known and not hasattr(module, child or "?"):
            raise SurgeryError(f"no call becomes '{action.becomes}'; there are: {_names(known)}")
        divert(module, action.function, action.ordinal, action.becomes)
    elif isinstance(action, Reparametrize):
        method = getattr(module, action.method, None)
        if method is None:
            raise SurgeryError(f"'{action.module}' has no {action.method}: another network's log")
        method()
    elif isinstance(action, OutOfPlace):
        if not hasattr(module, "inplace"):
            raise SurgeryError(f"'{action.module}' overwrites nothing: another network's log")
        setattr(module, "inplace", False)  # noqa: B010  # nn.Module's type knows no such thing
    else:
        if getattr(module, "bias", None) is not None or not hasattr(module, "weight"):
            raise SurgeryError(f"'{action.module}' takes no new bias: another network's log")
        like = module.weight
        assert isinstance(like, Tensor)  # noqa: S101  # of a layer
        bias = torch.zeros(action.channels, dtype=like.dtype, device=like.device)
        module.bias = nn.Parameter(bias)


def _replace(net: nn.Module, action: Replace) -> None:
    if action.by not in MODULES:
        raise SurgeryError(f"no module becomes '{action.by}'; there are: {_names(MODULES)}")
    parent_name, _, name = action.module.rpartition(".")
    parent = _module(net, parent_name)
    old = parent._modules.get(name)
    try:
        made = [MODULES[action.by](**action.arguments) for _ in range(action.repeat)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise SurgeryError(f"{action.by}({action.arguments}) cannot be made: {error}") from error
    new = made[0] if action.repeat == 1 else nn.Sequential(*made)
    like = next(iter((old if old is not None else net).parameters()), None)
    if like is None:
        like = next(iter(net.parameters()), None)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    new.train((old if old is not None else net).training)
    parent.add_module(name, new)
    watch(parent, new)


def _module(net: nn.Module, name: str) -> nn.Module:
    try:
        return net.get_submodule(name)
    except AttributeError as error:
        raise SurgeryError(
            f"the network has no module '{name}': the log is another network's"
        ) from error


def _names(known: Iterable[str]) -> str:
    return ", ".join(sorted(known))
