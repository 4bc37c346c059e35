"""A calibrated network in torch whose layers switch between float and integers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import UniformQuantizationObserverBase
from torchao.quantization.pt2e.quantizer import SharedQuantizationSpec

from bevel.quantization.keeping import ANNOTATION, module_path, moved

FOLLOW = 0.01
"""Share of a new batch in the range of an activation while it is trained."""


class FakeQuantize(nn.Module):
    """Rounds a tensor to what its integers can say; gradients pass as if it did not.

    Values outside the range are cut, and get no gradient.

    Args:
        observer: a calibrated torchao observer, whose scale and zero point it takes.

    Attributes:
        enabled: without that, values pass as they are.
        following: while it trains, its range follows the values.
        of_weight: whether it rounds a parameter, whose range is known at any time.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, observer: Any) -> None:
        super().__init__()
        self.observer = observer
        self.axis: int | None = getattr(observer, "ch_axis", None)
        self.enabled = True
        self.following = self.of_weight = False
        scale, zero_point = observer.calculate_qparams()
        self.register_buffer("scale", scale.detach().float().reshape(-1).clone())
        self.register_buffer("zero_point", zero_point.detach().int().reshape(-1).clone())
        least = (observer.quant_min - self.zero_point) * self.scale
        most = (observer.quant_max - self.zero_point) * self.scale
        self.register_buffer("low", least)
        self.register_buffer("high", most)

    def forward(self, values: Tensor) -> Tensor:
        """A tensor of any shape, rounded."""
        if not self.enabled:
            return values
        if self.following and self.training:
            self.follow(values.detach().float())
        ends = self.observer.quant_min, self.observer.quant_max
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(
                values.float(), self.scale, self.zero_point, *ends
            )
        return torch.fake_quantize_per_channel_affine(
            values.float(), self.scale, self.zero_point, self.axis, *ends
        )

    @torch.no_grad()
    def follow(self, values: Tensor) -> None:
        """Weights: the range they have now; activations: an average of the batches' ranges."""
        if self.of_weight:
            self.observer.reset_min_max_vals()
            self.observer(values)
            scale, zero_point = self.observer.calculate_qparams()
        else:
            low, high = torch.aminmax(values)
            self.low.lerp_(low.reshape(1), FOLLOW)
            self.high.lerp_(high.reshape(1), FOLLOW)
            scale, zero_point = self.observer._calculate_qparams(self.low, self.high)
        self.scale.copy_(scale.reshape(-1))
        self.zero_point.copy_(zero_point.reshape(-1))


def fake_quantize(observer: nn.Module) -> nn.Module | None:
    """Its rounding, where it describes 8 bits: a runtime's biases have 32 and lose nothing."""
    if not isinstance(observer, UniformQuantizationObserverBase):
        return None
    if observer.quant_max - observer.quant_min > 255:
        return None
    return FakeQuantize(observer)


def observed(prepared: GraphModule) -> dict[Node, Node]:
    """The observer nodes of a prepared graph, each with the node whose value it sees."""
    found: dict[Node, Node] = {}
    for node in prepared.graph.nodes:
        if node.op == "call_module" and hasattr(
            prepared.get_submodule(str(node.target)), "calculate_qparams"
        ):
            source = node.args[0]
            assert isinstance(source, Node)  # noqa: S101  # an observer sees a tensor
            found[node] = found.get(source, source)
    return found


class Simulation:
    """What the int8 file will compute, with every layer in float or in integers as asked.

    Attributes:
        net: the network to run; it computes in float32 on rounded values.
        layers: names of the modules that can be switched, in the order in which they run.
        tensors: every rounded tensor, activation or weight, with the modules on whose account it
            is rounded: those that write it or read it in integers.
    """

    def __init__(self, prepared: GraphModule) -> None:
        owners: dict[str, set[str]] = {}  # by module: some nodes share one
        for observer, names in _owners(prepared).items():
            owners.setdefault(str(observer.target), set()).update(names)
        self.layers = _layers(prepared)
        self.tensors: dict[str, frozenset[str]] = {}
        module = copy.deepcopy(prepared)
        for name, modules in owners.items():
            replacement = fake_quantize(module.get_submodule(name))
            module.set_submodule(name, replacement or nn.Identity())
            if replacement is not None:
                self.tensors[name] = frozenset(modules)
        # A new module: the prepared one refuses to be asked for a mode.
        self.net: nn.Module = GraphModule(module, module.graph).eval()

    def keep_float(self, layers: Collection[str]) -> None:
        """Everything in integers but these layers."""
        self._switch(lambda tensor: not all(within(name, layers) for name in self.tensors[tensor]))

    def quantize_only(self, layers: Collection[str]) -> None:
        """Everything in float but these layers."""
        self._switch(lambda tensor: any(within(name, layers) for name in self.tensors[tensor]))

    def quantize_tensor(self, tensor: str) -> None:
        """Everything in float but one of `tensors`."""
        self._switch(lambda name: name == tensor)

    def _switch(self, quantized: Callable[[str], bool]) -> None:
        for name in self.tensors:
            module = self.net.get_submodule(name)
            assert isinstance(module, FakeQuantize)  # noqa: S101  # `tensors` are
            module.enabled = quantized(name)


def within(name: str, layers: Collection[str]) -> bool:
    """Whether a module is one of these, or in one of them."""
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


def _unit(node: Node) -> str:
    """The module whose layer an annotated node belongs to.

    An activation is fused into the layer before it, and data movement goes with what it moves.
    """
    annotation = node.meta[ANNOTATION]
    source = moved(node)
    if source is not None and ANNOTATION in source.meta:
        return _unit(source)
    if not annotation.input_qspec_map and node.args and isinstance(node.args[0], Node):
        before = node.args[0].meta.get(ANNOTATION)
        if before is not None and before.output_qspec is None:
            return module_path(node.args[0])
    return module_path(node)


def _owners(prepared: GraphModule) -> dict[Node, list[str]]:
    """Each observer node with the modules on whose account it is there."""
    owners: dict[Node, list[str]] = {}
    for observer, source in observed(prepared).items():
        names = []
        annotation = source.meta.get(ANNOTATION)
        if annotation is not None and annotation.output_qspec is not None:
            names.append(_unit(source))
        for user in observer.users:
            annotation = user.meta.get(ANNOTATION)
            if annotation is not None and source in annotation.input_qspec_map:
                names.append(_unit(user))
        owners[observer] = names
    return owners


def _layers(prepared: GraphModule) -> list[str]:
    """Modules with an operator of their own in integers, and none of these inside another."""
    names: dict[str, None] = {}
    for node in prepared.graph.nodes:
        annotation = node.meta.get(ANNOTATION)
        if annotation is None or not annotation.input_qspec_map:
            continue
        if not isinstance(annotation.output_qspec, SharedQuantizationSpec):
            names[_unit(node)] = None
    return [
        name for name in names if name and not any(other.startswith(f"{name}.") for other in names)
    ]
