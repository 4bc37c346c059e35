"""What a rule may do to a network: replace modules, divert calls, fold numbers into layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevel.core.errors import SurgeryError
from bevel.rewriting.calls import name_of
from bevel.rewriting.log import (
    AddBias,
    Divert,
    Method,
    OutOfPlace,
    Reparametrize,
    Replace,
    SurgeryLog,
)
from bevel.rewriting.reconstruction import Affine
from bevel.rewriting.samples import Samples
from bevel.rewriting.seen import Node, Ref, Seen


class Surgeon:
    """The hand of one rule.

    Attributes:
        net: the copy that is changed.
        seen: what it called before the rule.
        samples: what the calls that the rule rewrites were given on calibration images.
        log: what was done, by this rule and those before it.
        wanted: what layers give now of what they gave in the original, where that is not the same;
            by rules before it too.
        fit: whether cheap layers are fitted to the dear ones; without that they only replace them.
        progressive: whether activation functions are to become ReLUs in training only.
    """

    def __init__(
        self,
        net: nn.Module,
        seen: Seen,
        samples: Samples,
        log: SurgeryLog,
        wanted: dict[str, Affine],
        *,
        fit: bool = True,
        progressive: bool = False,
    ) -> None:
        self.net, self.seen, self.samples, self.log = net, seen, samples, log
        self.wanted, self.fit, self.progressive = wanted, fit, progressive

    def replace(self, module: str, by: str, *, repeat: int = 1, **arguments: Any) -> None:
        """Put another module in place of one; see `log.MODULES`."""
        self.log.do(self.net, Replace(module=module, by=by, arguments=arguments, repeat=repeat))

    def divert(self, node: Node, becomes: str) -> None:
        """Make another call of one; see `calls.DIVERSIONS`."""
        frame = node.frame
        if frame.ordinal < 0:
            raise SurgeryError(f"{node.place} stands in for another call already")
        name = name_of(frame.function)
        self.log.do(
            self.net,
            Divert(module=node.module, function=name, ordinal=frame.ordinal, becomes=becomes),
        )

    def out_of_place(self, module: str) -> None:
        """Have a module keep what it is given."""
        self.log.do(self.net, OutOfPlace(module=module))

    def reparametrize(self, module: str, method: Method) -> None:
        """Have a block of several branches become one convolution, by its own method."""
        self.log.do(self.net, Reparametrize(module=module, method=method))

    @torch.no_grad()
    def put_convolution(
        self, module: str, kernel: Tensor, *, stride: list[int], padding: list[int], groups: int = 1
    ) -> None:
        """Put a 2-d convolution with another kernel in place of one; its bias stays.

        Args:
            module: a convolution; the new one is not dilated.
            kernel: (outputs, inputs of a group, height, width).
            stride: of height and width.
            padding: with zeros, of height and width.
            groups: of channels.
        """
        _, bias = _parameters(self.net.get_submodule(module))
        self.replace(
            module,
            "Conv2d",
            in_channels=groups * kernel.shape[1],
            out_channels=kernel.shape[0],
            kernel_size=list(kernel.shape[2:]),
            stride=stride,
            padding=padding,
            groups=groups,
            bias=bias is not None,
        )
        weight, own = _parameters(self.net.get_submodule(module))
        weight.copy_(kernel)
        if own is not None and bias is not None:
            own.copy_(bias)

    @torch.no_grad()
    def scale_output(self, node: Node, scale: Tensor, shift: Tensor) -> None:
        """Let the layer before a call give s y + t for its y, channel by channel, exactly.

        Args:
            node: a call that `seen.layer_before` finds a layer for.
            scale: (channels,).
            shift: (channels,).
        """
        maker = self.seen.maker(node.inputs[0])
        assert maker is not None  # noqa: S101  # the caller asked
        weight, _ = _parameters(self.net.get_submodule(maker.module))
        scale, shift = scale.to(weight), shift.to(weight)
        bias = self._bias(maker.module, len(scale))
        weight.mul_(scale.reshape(-1, *[1] * (weight.ndim - 1)))
        bias.mul_(scale).add_(shift)
        self._want(maker.module, scale, shift)

    def readers(self, ref: Ref) -> list[Node] | None:
        """The layers that read a tensor, if these are all and each can scale what it reads."""
        found = self.seen.readers(ref)
        fits = all(
            reader.function in SCALABLE
            and reader.inputs[0] == ref
            and self.seen.owner_of_weight(reader) is not None
            for reader in found
        )
        return found if found and fits and ref not in self.seen.outputs else None

    @torch.no_grad()
    def scale_input(self, readers: list[Node], scale: Tensor) -> None:
        """Let layers compute what they would of s x, channel by channel, exactly.

        Args:
            readers: from `readers`.
            scale: (channels,).
        """
        for reader in readers:
            weight, _ = _parameters(self.net.get_submodule(reader.module))
            groups = len(scale) // weight.shape[1]
            split = weight.reshape(groups, -1, *weight.shape[1:])
            along = scale.to(weight).reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
            weight.copy_((split * along).reshape(weight.shape))

    @torch.no_grad()
    def shift_input(self, readers: list[Node], shift: Tensor) -> None:
        """Let layers compute what they would of x + e, channel by channel.

        Exact but for the edges, where zeros are padded to x instead of to x + e.

        Args:
            readers: from `readers`.
            shift: (channels,).
        """
        for reader in readers:
            weight, _ = _parameters(self.net.get_submodule(reader.module))
            groups = len(shift) // weight.shape[1]
            along = shift.to(weight).reshape(groups, -1)
            summed = weight.reshape(*weight.shape[:2], -1).sum(2)  # (outputs, inputs of a group)
            more = (summed.reshape(groups, -1, along.shape[1]) * along[:, None]).sum(2).flatten()
            norm = self.seen.norm_behind(reader)
            if norm is not None:  # keeps the layer as it is: a norm would take a bias away again
                mean = self.net.get_submodule(norm.module).running_mean
                assert isinstance(mean, Tensor)  # noqa: S101  # `norm_behind` found it
                mean.sub_(more.to(mean))
                self._want(reader.module, torch.ones_like(more), -more)
                continue
            self._bias(reader.module, len(more)).add_(more)

    def _want(self, module: str, scale: Tensor, shift: Tensor) -> None:
        """What a layer gives is now s y + t of what it gave."""
        before = self.wanted.get(module, (torch.ones_like(scale), torch.zeros_like(scale)))
        self.wanted[module] = scale * before[0], scale * before[1] + shift

    def _bias(self, module: str, channels: int) -> Tensor:
        """A layer's bias; one of zeros where it had none."""
        _, bias = _parameters(self.net.get_submodule(module))
        if bias is None:
            self.log.do(self.net, AddBias(module=module, channels=channels))
            _, bias = _parameters(self.net.get_submodule(module))
        assert bias is not None  # noqa: S101  # there is one now
        return bias


SCALABLE = (torch.conv1d, torch.conv2d, torch.conv3d, F.linear)


def _parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)  # noqa: S101  # `owner_of_weight` found it
    return weight, bias if isinstance(bias, Tensor) else None
