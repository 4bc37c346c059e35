"""Random small networks: a readable spec, and the network that it describes.

`build(spec)` is legal for every spec that `specs()` draws: each builder is told the current
channels and sizes, and rounds what it wants to what is possible there. A kind whose name ends in
`_hard` has channel counts as numbers in its forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import weight_norm

BATCH = 2
CLASSES = 5
WIDEST = 32
LARGEST = 9
"""Channels and sizes above these are brought down again before the next block."""

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAXIMUM = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
SMOOTH = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Block:
    """One step. `width` is the wanted number of channels, `pick` chooses among variants."""

    kind: str
    width: int = 8
    pick: int = 0
    inner: tuple[Block, ...] = ()


@dataclass(frozen=True)
class Spec:
    """A network: an optional stem, blocks, a head. `stem` is its width, 0 for none."""

    blocks: tuple[Block, ...]
    space: tuple[int, ...] = (4, 4)
    stem: int = 8
    head: str = "pool"
    inputs: str = "one"
    outputs: str = "tensor"
    seed: int = 0

    def kinds(self) -> set[str]:
        """Everything of `EVERYTHING` that the network contains."""
        found = {self.head, f"inputs_{self.inputs}", f"outputs_{self.outputs}"}
        return found | {f"{len(self.space)}d"} | {block.kind for block in _flat(self.blocks)}


@dataclass(frozen=True)
class State:
    """What a block is given: channels and sizes."""

    channels: int
    space: tuple[int, ...]

    @property
    def dims(self) -> int:
        """1, 2 or 3 dimensions."""
        return len(self.space)

    @property
    def positions(self) -> int:
        """Number of positions."""
        return math.prod(self.space)

    def wide(self, channels: int) -> State:
        """The same sizes with other channels."""
        return replace(self, channels=channels)

    def windowed(self, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> State:
        """The sizes after a convolution or pooling."""
        reach = dilation * (kernel - 1) + 1
        return replace(
            self, space=tuple((n + 2 * padding - reach) // stride + 1 for n in self.space)
        )

    def scaled(self, factor: int) -> State:
        """The sizes after upsampling."""
        return replace(self, space=tuple(n * factor for n in self.space))


Built = tuple[nn.Module, State]
Builder = Callable[[State, Block], Built]


@dataclass(frozen=True)
class Kind:
    """How to build a block, and where it may stand."""

    build: Builder
    dims: tuple[int, ...] = (1, 2, 3)
    resizes: bool = False
    composite: bool = False


KINDS: dict[str, Kind] = {}


def kind(*names: str, **traits: Any) -> Callable[[Builder], Builder]:
    """Register a builder under these names."""

    def register(builder: Builder) -> Builder:
        KINDS.update({name: Kind(builder, **traits) for name in names})
        return builder

    return register


def _flat(blocks: Iterable[Block]) -> Iterator[Block]:
    for block in blocks:
        yield block
        yield from _flat(block.inner)


# -- parts ----------------------------------------------------------------------------------


class Apply(nn.Module):
    """A function of the features, without parameters. Its numbers live in a closure."""

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


def conv(s: State, outputs: int, kernel: int = 1, **options: Any) -> nn.Module:
    """A convolution that keeps the sizes unless `options` say otherwise."""
    options.setdefault("padding", kernel // 2)
    return CONV[s.dims](s.channels, outputs, kernel, **options)


def unit(s: State, block: Block, outputs: int, layer: nn.Module) -> nn.Module:
    """A layer, perhaps followed by a batch norm and an activation."""
    parts = [layer]
    if block.pick % 2:
        parts.append(BATCH_NORM[s.dims](outputs))
    if block.pick // 2 % 2:
        parts.append(nn.ReLU(inplace=True))
    return nn.Sequential(*parts) if len(parts) > 1 else layer


def fitted(s: State, outputs: int) -> tuple[list[nn.Module], State]:
    """A pointwise convolution where the channels are not yet `outputs`."""
    return ([], s) if s.channels == outputs else ([conv(s, outputs)], s.wide(outputs))


def rounded(width: int, multiple: int) -> int:
    """`width` rounded up."""
    return -(-width // multiple) * multiple


def chain(s: State, blocks: Iterable[Block]) -> tuple[list[nn.Module], State]:
    """Blocks one after the other."""
    modules: list[nn.Module] = []
    for block in blocks:
        module, s = make(s, block)
        modules.append(module)
    return modules, s


def make(s: State, block: Block) -> Built:
    """One block, brought back to moderate sizes and channels."""
    module, after = KINDS[block.kind].build(s, block)
    extra: list[nn.Module] = []
    if max(after.space) > LARGEST:
        extra.append(MAXIMUM[s.dims](2))
        after = after.windowed(2, 2)
    if after.channels > WIDEST:
        closing, after = fitted(after, block.width)
        extra += closing
    return (nn.Sequential(module, *extra) if extra else module), after


def spread(vector: Tensor, like: Tensor) -> Tensor:
    """(..., c) as (..., c, 1, ...), to be broadcast over positions."""
    return vector[(..., *[None] * (like.ndim - 2))]


def pooled(x: Tensor) -> Tensor:
    """The mean over positions."""
    return x.flatten(2).mean(2)


# -- convolutions ---------------------------------------------------------------------------


@kind("conv1x1", "conv3x3", "conv_dilated")
def _conv(s: State, b: Block) -> Built:
    options = {
        "conv1x1": {"kernel": 1},
        "conv3x3": {"kernel": 3},
        "conv_dilated": {"kernel": 3, "dilation": 2, "padding": 2},
    }[b.kind]
    layer = conv(s, b.width, bias=b.pick < 8, **options)
    return unit(s, b, b.width, layer), s.wide(b.width)


@kind("conv_strided", resizes=True)
def _strided(s: State, b: Block) -> Built:
    stride = 2 if min(s.space) > 2 else 1
    layer = conv(s, b.width, 3, stride=stride)
    return unit(s, b, b.width, layer), s.windowed(3, stride, 1).wide(b.width)


@kind("conv_even", resizes=True)
def _even(s: State, b: Block) -> Built:
    if b.pick % 3 == 0:  # torch pads asymmetrically, which is another operator
        return conv(s, b.width, 2, padding="same"), s.wide(b.width)
    kernel, padding = (2, 0) if b.pick % 3 == 1 and min(s.space) > 2 else (4, 2)
    layer = conv(s, b.width, kernel, padding=padding)
    return unit(s, b, b.width, layer), s.windowed(kernel, 1, padding).wide(b.width)


@kind("conv_grouped")
def _grouped(s: State, b: Block) -> Built:
    groups = 2 + b.pick % 3
    before, s = fitted(s, rounded(s.channels, groups))
    width = rounded(b.width, groups)
    layer = unit(s, b, width, conv(s, width, 3, groups=groups))
    return nn.Sequential(*before, layer), s.wide(width)


@kind("depthwise", "depthwise_multiplied")
def _depthwise(s: State, b: Block) -> Built:
    width = s.channels * (1 if b.kind == "depthwise" else 2 + b.pick % 2)
    layer = conv(s, width, 3, groups=s.channels)
    return unit(s, b, width, layer), s.wide(width)


@kind("transposed", "transposed_grouped", "transposed_depthwise", resizes=True)
def _transposed(s: State, b: Block) -> Built:
    groups = {"transposed": 1, "transposed_grouped": 2}.get(b.kind, s.channels)
    before, s = fitted(s, rounded(s.channels, groups))
    width = s.channels if b.kind == "transposed_depthwise" else rounded(b.width, groups)
    doubles = max(s.space) <= LARGEST // 2
    options = {"stride": 2} if doubles else {"padding": 1}
    layer = TRANSPOSED[s.dims](s.channels, width, 2 if doubles else 3, groups=groups, **options)
    after = s.scaled(2) if doubles else s
    return nn.Sequential(*before, unit(s, b, width, layer)), after.wide(width)


class _Standardised:
    """Standardises its weight in forward."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.flatten(1)
        weight = (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True).add(1e-5)
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


class StandardConv1d(_Standardised, nn.Conv1d):
    """Weight standardisation, 1d."""


class StandardConv2d(_Standardised, nn.Conv2d):
    """Weight standardisation, 2d."""


class StandardConv3d(_Standardised, nn.Conv3d):
    """Weight standardisation, 3d."""


@kind("weight_standardised")
def _standardised(s: State, b: Block) -> Built:
    classes = {1: StandardConv1d, 2: StandardConv2d, 3: StandardConv3d}
    layer = classes[s.dims](s.channels, b.width, 3, padding=1)
    return unit(s, b, b.width, layer), s.wide(b.width)


@kind("weight_norm")
def _weight_norm(s: State, b: Block) -> Built:
    layer = weight_norm(conv(s, b.width, 3 if b.pick % 2 else 1))
    return unit(s, b, b.width, layer), s.wide(b.width)


# -- norms, activations, learned constants ---------------------------------------------------


@kind("batch_norm")
def _batch_norm(s: State, b: Block) -> Built:
    return BATCH_NORM[s.dims](s.channels, affine=b.pick % 3 > 0), s


@kind("group_norm")
def _group_norm(s: State, b: Block) -> Built:
    groups = 1 + b.pick % 4
    before, s = fitted(s, rounded(s.channels, groups))
    return nn.Sequential(*before, nn.GroupNorm(groups, s.channels)), s


@kind("instance_norm")
def _instance_norm(s: State, b: Block) -> Built:
    options = {"affine": b.pick % 2 == 0, "track_running_stats": b.pick % 4 > 1}
    return INSTANCE_NORM[s.dims](s.channels, **options), s


class ChannelsLast(nn.Module):
    """A module that works on the last dimension, between two permutations."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        last = x.ndim - 1
        x = self.body(x.permute(0, *range(2, last + 1), 1))
        return x.permute(0, last, *range(1, last))


@kind("layer_norm_last")
def _layer_norm_last(s: State, b: Block) -> Built:
    return ChannelsLast(nn.LayerNorm(s.channels, elementwise_affine=b.pick % 4 > 0)), s


class LayerNormFirst(nn.Module):
    """Layer norm over dimension 1, written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = x - mean
        x = x / torch.sqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)
        return spread(self.weight, x) * x + spread(self.bias, x)


@kind("layer_norm_first")
def _layer_norm_first(s: State, _: Block) -> Built:
    return LayerNormFirst(s.channels), s


@kind("relu_inplace")
def _relu_inplace(s: State, b: Block) -> Built:
    return nn.Sequential(conv(s, b.width), nn.ReLU(inplace=True)), s.wide(b.width)


@kind("relu", "silu", "hardswish", "gelu", "sigmoid_gate", "softmax_positions", "prelu")
def _activation(s: State, b: Block) -> Built:
    if b.kind == "prelu":
        return nn.PReLU(s.channels), s
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "silu": F.silu,
        "hardswish": F.hardswish,
        "gelu": F.gelu,
        "sigmoid_gate": lambda x: x * torch.sigmoid(x),
        "softmax_positions": lambda x: x * x.flatten(2).softmax(-1).view_as(x),
    }
    return Apply(b.kind, functions[b.kind]), s


class ScaleBias(nn.Module):
    """A scale and a bias per channel, as parameters or constants."""

    def __init__(self, s: State, learned: bool, flat: bool) -> None:
        super().__init__()
        shape = (s.channels,) if flat else (1, s.channels, *[1] * s.dims)
        if learned:
            self.scale = nn.Parameter(torch.ones(shape))
            self.bias = nn.Parameter(torch.zeros(shape))
        else:
            steps = torch.arange(s.channels, dtype=torch.get_default_dtype()).view(shape)
            self.register_buffer("scale", steps / s.channels + 0.5)
            self.register_buffer("bias", steps / s.channels - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.scale.ndim == 1
        scale = spread(self.scale, x) if flat else self.scale
        bias = spread(self.bias, x) if flat else self.bias
        return x * scale + bias


@kind("scale_bias", "scale_bias_buffer")
def _scale_bias(s: State, b: Block) -> Built:
    return ScaleBias(s, b.kind == "scale_bias", b.pick % 2 == 1), s


class PositionEmbedding(nn.Module):
    """A learned value for every channel and position."""

    def __init__(self, s: State) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(1, s.channels, *s.space))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.embedding


@kind("position_embedding")
def _position_embedding(s: State, _: Block) -> Built:
    return PositionEmbedding(s), s


class SqueezeExcite(nn.Module):
    """A gate per channel."""

    def __init__(self, s: State, width: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        if linear:
            self.down, self.up = nn.Linear(s.channels, width), nn.Linear(width, s.channels)
        else:
            self.down, self.up = conv(s, width), conv(s.wide(width), s.channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = pooled(x) if self.linear else ADAPTIVE[x.ndim - 2](x, 1)
        gate = torch.sigmoid(self.up(F.relu(self.down(gate))))
        return x * (spread(gate, x) if self.linear else gate)


@kind("squeeze_excite")
def _squeeze_excite(s: State, b: Block) -> Built:
    return SqueezeExcite(s, b.width, b.pick % 2 == 1), s


# -- composition ----------------------------------------------------------------------------


class Residual(nn.Module):
    """Features and what a body makes of them, joined by an operator."""

    def __init__(self, name: str, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.name, self.body, self.shortcut = name, body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.body(x), self.shortcut(x)
        if self.name == "sub":
            return x - y
        return x * y if self.name == "mul" else x + y

    def extra_repr(self) -> str:
        return self.name


@kind("add", "sub", "mul", composite=True)
def _residual(s: State, b: Block) -> Built:
    modules, inside = chain(s, b.inner)
    if b.pick % 2:  # a projection shortcut
        shortcut, s = fitted(s, inside.channels)
        return Residual(b.kind, nn.Sequential(*modules), nn.Sequential(*shortcut)), s
    closing, _ = fitted(inside, s.channels)
    return Residual(b.kind, nn.Sequential(*modules, *closing), nn.Identity()), s


class InplaceAdd(nn.Module):
    """As Residual, but adds into the body's result."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += x
        return y


@kind("add_inplace")
def _add_inplace(s: State, _: Block) -> Built:
    return InplaceAdd(conv(s, s.channels, 3)), s


class Concat(nn.Module):
    """Branches joined along channels."""

    def __init__(self, branches: Iterable[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


@kind("concat", composite=True)
def _concat(s: State, b: Block) -> Built:
    built = [make(s, inner) for inner in b.inner]
    branches, widths = [m for m, _ in built], [a.channels for _, a in built]
    if b.pick % 2 or len(branches) < 2:
        branches, widths = [*branches, nn.Identity()], [*widths, s.channels]
    return Concat(branches), s.wide(sum(widths))


class ConcatInput(nn.Module):
    """Joins the network's own input to the features."""

    def __init__(self, front: bool) -> None:
        super().__init__()
        self.front = front

    def forward(self, x: Tensor, raw: Tensor) -> Tensor:
        raw = ADAPTIVE[x.ndim - 2](raw, x.shape[2:])
        return torch.cat([raw, x] if self.front else [x, raw], 1)


@kind("concat_input", resizes=True)  # not for inner blocks, which see no input
def _concat_input(s: State, b: Block) -> Built:
    return ConcatInput(b.pick % 2 == 1), s.wide(s.channels + 3)


class Dense(nn.Module):
    """Each layer sees the concatenation of all before it."""

    def __init__(self, s: State, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                BATCH_NORM[s.dims](s.channels + i * width),
                nn.ReLU(),
                conv(s.wide(s.channels + i * width), width, 3),
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


@kind("dense")
def _dense(s: State, b: Block) -> Built:
    width, layers = max(2, b.width // 3), 2 + b.pick % 2
    return Dense(s, width, layers), s.wide(s.channels + layers * width)


class Shared(nn.Module):
    """One layer used twice, in a row or on two tensors."""

    def __init__(self, layer: nn.Module, row: bool) -> None:
        super().__init__()
        self.layer, self.row = layer, row

    def forward(self, x: Tensor) -> Tensor:
        if self.row:
            return self.layer(F.relu(self.layer(x)))
        return self.layer(x) + self.layer(torch.tanh(x))


@kind("shared")
def _shared(s: State, b: Block) -> Built:
    row = b.pick % 2 == 0
    width = s.channels if row else b.width
    return Shared(unit(s, replace(b, pick=b.pick // 2), width, conv(s, width, 3)), row), s.wide(
        width
    )


# -- splitting and slicing --------------------------------------------------------------------


class Parts(nn.Module):
    """Splits the channels, runs a module on one part, and joins them in another order."""

    def __init__(self, name: str, cut: Callable[[Tensor], Any], body: nn.Module) -> None:
        super().__init__()
        self.name, self.cut, self.body = name, cut, body

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.cut(x)
        return torch.cat([*others, self.body(first)], 1)

    def extra_repr(self) -> str:
        return self.name


def _thirds(channels: int) -> list[int]:
    return [channels // 3, channels // 3, channels - 2 * (channels // 3)]


@kind("split", "split_hard", "chunk", "tensor_split")
def _split(s: State, b: Block) -> Built:
    before, s = fitted(s, max(s.channels, 4))
    sizes, half, parts = _thirds(s.channels), s.channels // 2, 2 + b.pick % 2
    cuts: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
        "split": (half, lambda x: x.split([x.shape[1] // 2, x.shape[1] - x.shape[1] // 2], 1)),
        "split_hard": (sizes[0], lambda x: x.split(sizes, 1)),
        "chunk": (-(-s.channels // parts), lambda x: x.chunk(parts, 1)),
        "tensor_split": (-(-s.channels // parts), lambda x: x.tensor_split(parts, 1)),
    }
    first, cut = cuts[b.kind]
    body = unit(s, b, b.width, conv(s.wide(first), b.width, 3))
    return nn.Sequential(*before, Parts(b.kind, cut, body)), s.wide(s.channels - first + b.width)


def _gated(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, 1)
    return value * torch.sigmoid(gate)


@kind("chunk_gate", "glu")
def _chunk_gate(s: State, b: Block) -> Built:
    before, s = fitted(s, rounded(s.channels, 2))
    function = _gated if b.kind == "chunk_gate" else lambda x: F.glu(x, 1)
    return nn.Sequential(*before, Apply(b.kind, function)), s.wide(s.channels // 2)


@kind("slice_strided", "slice_half", "slice_hard")
def _slice(s: State, b: Block) -> Built:
    before, s = fitted(s, max(s.channels, 4))
    kept = max(2, s.channels * 2 // 3)
    functions: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
        "slice_strided": (-(-s.channels // 2), lambda x: x[:, ::2]),
        "slice_half": (s.channels // 2, lambda x: x[:, : x.shape[1] // 2]),
        "slice_hard": (kept, lambda x: x[:, :kept]),
    }
    width, function = functions[b.kind]
    return nn.Sequential(*before, Apply(b.kind, function)), s.wide(width)


# -- shapes -----------------------------------------------------------------------------------


@kind("reshape", "reshape_view", "reshape_hard")
def _reshape(s: State, b: Block) -> Built:
    channels, space = s.channels, s.space

    def by_shape(x: Tensor) -> Tensor:
        tokens = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
        return torch.tanh(tokens).permute(0, 2, 1).reshape(x.shape)

    def by_view(x: Tensor) -> Tensor:
        n, c, *sizes = x.shape
        tokens = x.contiguous().view(n, c, -1).transpose(1, 2).contiguous()
        return torch.tanh(tokens).transpose(1, 2).contiguous().view(n, c, *sizes)

    def by_numbers(x: Tensor) -> Tensor:
        tokens = x.reshape(-1, channels, math.prod(space)).permute(0, 2, 1)
        return torch.tanh(tokens).permute(0, 2, 1).reshape(-1, channels, *space)

    functions = {"reshape": by_shape, "reshape_view": by_view, "reshape_hard": by_numbers}
    return Apply(b.kind, functions[b.kind]), s


@kind("channel_shuffle", "channel_shuffle_hard", "channel_shuffle_torch")
def _channel_shuffle(s: State, b: Block) -> Built:
    groups = 2 + b.pick % 3
    before, s = fitted(s, rounded(s.channels, groups))
    channels = s.channels

    def by_shape(x: Tensor) -> Tensor:
        n, c, *space = x.shape
        return x.reshape(n, groups, c // groups, *space).transpose(1, 2).reshape(n, c, *space)

    def by_numbers(x: Tensor) -> Tensor:
        n, _, *space = x.shape
        grouped = x.reshape(n, groups, channels // groups, *space)
        return grouped.transpose(1, 2).reshape(n, channels, *space)

    functions = {
        "channel_shuffle": by_shape,
        "channel_shuffle_hard": by_numbers,
        "channel_shuffle_torch": lambda x: F.channel_shuffle(x, groups),
    }
    return nn.Sequential(*before, Apply(f"{b.kind}, {groups}", functions[b.kind])), s


@kind("pixel_shuffle", dims=(2,), resizes=True)
def _pixel_shuffle(s: State, _: Block) -> Built:
    before, s = fitted(s, rounded(s.channels, 4))
    return nn.Sequential(*before, nn.PixelShuffle(2)), s.scaled(2).wide(s.channels // 4)


@kind("pixel_unshuffle", dims=(2,), resizes=True)
def _pixel_unshuffle(s: State, _: Block) -> Built:
    even = [n - n % 2 for n in s.space]
    crop = Apply("crop", lambda x: x[:, :, : even[0], : even[1]])
    after = State(s.channels * 4, tuple(n // 2 for n in even))
    modules, after = [crop, nn.PixelUnshuffle(2)], after
    if min(after.space) < 2:
        modules.append(nn.Upsample(scale_factor=2))
        after = after.scaled(2)
    return nn.Sequential(*modules), after


@kind("max_pool", "avg_pool", resizes=True)
def _pool(s: State, b: Block) -> Built:
    halves = min(s.space) >= 4
    kernel, stride, padding = (2, 2, 0) if halves else (2, 1, 1)
    after = s.windowed(kernel, stride, padding)
    if b.kind == "max_pool":
        return MAXIMUM[s.dims](kernel, stride, padding), after
    return Apply(b.kind, lambda x: AVERAGE[x.ndim - 2](x, kernel, stride, padding)), after


@kind("adaptive_pool", resizes=True)
def _adaptive_pool(s: State, b: Block) -> Built:
    sizes = tuple(2 + (b.pick + i) % 3 for i in range(s.dims))
    return Apply(b.kind, lambda x: ADAPTIVE[x.ndim - 2](x, sizes)), replace(s, space=sizes)


@kind("interpolate", "interpolate_smooth", resizes=True)
def _interpolate(s: State, b: Block) -> Built:
    sizes = tuple(3 + (b.pick + i) % 4 for i in range(s.dims))
    if b.kind == "interpolate_smooth":
        mode = SMOOTH[s.dims]
        function = lambda x: F.interpolate(x, size=sizes, mode=mode)  # noqa: E731
        return Apply(b.kind, function), replace(s, space=sizes)
    return Apply(b.kind, lambda x: F.interpolate(x, scale_factor=2)), s.scaled(2)


@kind("pad_space", resizes=True)
def _pad_space(s: State, b: Block) -> Built:
    value = float(b.pick % 2)
    after = replace(s, space=(*s.space[:-1], s.space[-1] + 2))
    return Apply(b.kind, lambda x: F.pad(x, (1, 1), value=value)), after


@kind("pad_channels")
def _pad_channels(s: State, b: Block) -> Built:
    front, back, value = b.pick % 3, 1 + b.pick % 4, float(b.pick // 4 % 2)
    amounts = (*[0, 0] * s.dims, front, back)
    return Apply(b.kind, lambda x: F.pad(x, amounts, value=value)), s.wide(
        s.channels + front + back
    )


@kind("expand", "repeat", "repeat_interleave")
def _expand(s: State, b: Block) -> Built:
    if b.kind == "expand":
        context = lambda x: spread(pooled(x), x)  # noqa: E731
        return Apply(b.kind, lambda x: torch.tanh(context(x).expand_as(x)) + x), s
    if b.kind == "repeat":
        return Apply(b.kind, lambda x: x.repeat(1, 2, *[1] * (x.ndim - 2))), s.wide(2 * s.channels)
    return Apply(b.kind, lambda x: x.repeat_interleave(2, 1)), s.wide(2 * s.channels)


@kind("linear_last")
def _linear_last(s: State, b: Block) -> Built:
    wide = nn.Linear(s.channels, b.width)
    return ChannelsLast(nn.Sequential(wide, nn.GELU(), nn.Linear(b.width, s.channels))), s


@kind("mean_channels")
def _mean_channels(s: State, b: Block) -> Built:
    return Apply(b.kind, lambda x: torch.cat([x, x.mean(1, keepdim=True)], 1)), s.wide(
        s.channels + 1
    )


# -- attention over branches ------------------------------------------------------------------


class SelectiveKernels(nn.Module):
    """Branches stacked, and summed with weights that depend on the features."""

    def __init__(self, s: State, width: int, hidden: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv(s, width, kernel) for kernel in (1, 3))
        self.squeeze = nn.Linear(width, hidden)
        self.excite = nn.ModuleList(nn.Linear(hidden, width) for _ in self.branches)

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([branch(x) for branch in self.branches], 1)
        vector = F.relu(self.squeeze(pooled(stacked.sum(1))))
        weights = torch.stack([layer(vector) for layer in self.excite], 1).softmax(1)
        return (stacked * spread(weights, x)).sum(1)


@kind("stack_sum")
def _stack_sum(s: State, b: Block) -> Built:
    return SelectiveKernels(s, b.width, 3 + b.pick % 3), s.wide(b.width)


class RadixSplit(nn.Module):
    """Split attention, as in ResNeSt with one cardinal group."""

    def __init__(self, s: State, width: int, radix: int) -> None:
        super().__init__()
        self.radix = radix
        self.wide = conv(s, width * radix, 3)
        self.down = conv(s.wide(width), 4)
        self.up = conv(s.wide(4), width * radix)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.wide(x))
        n, c, *space = x.shape
        parts = x.reshape(n, self.radix, c // self.radix, *space)
        gate = self.up(F.relu(self.down(ADAPTIVE[len(space)](parts.sum(1), 1))))
        gate = gate.view(n, self.radix, -1).softmax(1)
        return (parts * gate[(..., *[None] * len(space))]).sum(1)


class RadixSplitList(RadixSplit):
    """As RadixSplit, with split instead of reshape."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.wide(x))
        parts = x.split(x.shape[1] // self.radix, 1)
        gate = self.up(F.relu(self.down(ADAPTIVE[x.ndim - 2](sum(parts), 1))))
        gate = gate.view(len(x), self.radix, -1).softmax(1).reshape(gate.shape)
        gates = gate.split(x.shape[1] // self.radix, 1)
        return sum(g * part for g, part in zip(gates, parts, strict=True))


@kind("radix_reshape", "radix_split")
def _radix(s: State, b: Block) -> Built:
    form = RadixSplit if b.kind == "radix_reshape" else RadixSplitList
    return form(s, b.width, 2 + b.pick % 2), s.wide(b.width)


# -- attention over positions -----------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self attention; subclasses say how q, k and v come about and meet.

    The result is shaped as the input was, or infers its channels.
    """

    infers = False

    def __init__(self, s: State, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        self.prepare(s)
        self.proj = nn.Linear(heads * head_dim, s.channels)

    def prepare(self, s: State) -> None:
        self.qkv = nn.Linear(s.channels, 3 * self.num_heads * self.head_dim)

    def heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, length, _ = tokens.shape
        qkv = self.qkv(tokens).reshape(n, length, 3, self.num_heads, self.head_dim)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed = self.meet(*self.heads(tokens)).transpose(1, 2)
        out = self.proj(mixed.reshape(*tokens.shape[:2], -1))
        out = out.transpose(1, 2)
        return out.reshape(len(x), -1, *x.shape[2:]) if self.infers else out.reshape(x.shape)


class FixedScale(Attention):
    """The scale is a number from the construction."""

    def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


class Unfused(Attention):
    """Written out, as in timm."""

    def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v


class ScaledByShape(Attention):
    """The scale follows the tensor's size."""

    def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v


class Separate(Unfused):
    """Three projections; the head size is inferred."""

    def prepare(self, s: State) -> None:
        width = self.num_heads * self.head_dim
        self.q, self.k, self.v = (nn.Linear(s.channels, width) for _ in range(3))

    def heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (*tokens.shape[:2], self.num_heads, -1)
        q, k, v = (layer(tokens).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return q, k, v


class Einsum(Separate):
    """The products as einsum."""

    def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.scale
        return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


class PositionBias(Unfused):
    """A table of biases per head, read through a constant index."""

    def prepare(self, s: State) -> None:
        super().prepare(s)
        self.table = nn.Parameter(torch.zeros(2 * s.positions - 1, self.num_heads))
        steps = torch.arange(s.positions)
        self.register_buffer("index", steps[:, None] - steps[None] + s.positions - 1)

    def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[-2]
        bias = self.table[self.index.view(-1)].view(length, length, -1).permute(2, 0, 1)
        scores = (q * self.scale) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        return scores.softmax(-1) @ v


class Grouped(Attention):
    """Grouped-query attention: two query heads share a key and a value head."""

    def prepare(self, s: State) -> None:
        self.num_kv_heads, self.num_heads = self.num_heads, 2 * self.num_heads
        self.q = nn.Linear(s.channels, self.num_heads * self.head_dim)
        self.k, self.v = (
            nn.Linear(s.channels, self.num_kv_heads * self.head_dim) for _ in range(2)
        )

    def __init__(self, s: State, heads: int, head_dim: int) -> None:
        super().__init__(s, heads, head_dim)
        self.proj = nn.Linear(self.num_heads * head_dim, s.channels)

    def heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = tokens.shape[:2]
        q = self.q(tokens).view(*size, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k(tokens).view(*size, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(tokens).view(*size, self.num_kv_heads, self.head_dim).transpose(1, 2)
        return q, k, v

    def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v


class GroupedExpanded(Grouped):
    """The shared heads are expanded."""

    def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, heads, length, size = k.shape
        k, v = (
            t[:, :, None].expand(n, heads, 2, length, size).reshape(n, 2 * heads, length, size)
            for t in (k, v)
        )
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


class GroupedFused(Grouped):
    """The operator shares the heads."""

    def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=True)


class Convolutional(nn.Module):
    """Attention whose projections are 1x1 convolutions."""

    def __init__(self, s: State, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        self.qkv = conv(s, 3 * heads * head_dim)
        self.proj = conv(s.wide(heads * head_dim), s.channels)

    def forward(self, x: Tensor) -> Tensor:
        n, _, *space = x.shape
        parts = self.qkv(x).flatten(2).chunk(3, 1)
        q, k, v = (part.reshape(n, self.num_heads, self.head_dim, -1) for part in parts)
        scores = (q.transpose(-2, -1) @ k * self.scale).softmax(-1)
        return self.proj((v @ scores.transpose(-2, -1)).reshape(n, -1, *space))


class HardHeads(Unfused):
    """The numbers of heads and of their channels are constants of the code."""

    NUMBERS: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        heads, head_dim = self.NUMBERS
        n, c, *space = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).reshape(n, -1, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        mixed = self.meet(*qkv.unbind(0)).transpose(1, 2).reshape(n, -1, heads * head_dim)
        return self.proj(mixed).transpose(1, 2).reshape(n, c, *space)


ATTENTION: dict[str, type[nn.Module]] = {
    "attention_fused": Attention,
    "attention_fused_scale": FixedScale,
    "attention_matmul": Unfused,
    "attention_scale_by_shape": ScaledByShape,
    "attention_separate": Separate,
    "attention_einsum": Einsum,
    "attention_position_bias": PositionBias,
    "attention_conv": Convolutional,
    "attention_gqa": Grouped,
    "attention_gqa_expand": GroupedExpanded,
    "attention_gqa_fused": GroupedFused,
    "attention_hard": HardHeads,
}


@kind(*ATTENTION)
def _attention(s: State, b: Block) -> Built:
    heads, head_dim = (2, 3, 4, 1)[b.pick % 4], 2 + b.width % 5
    form = ATTENTION[b.kind]
    if b.kind == "attention_hard":
        form = type("HardHeads", (HardHeads,), {"NUMBERS": (heads, head_dim)})
    attention = form(s, heads, head_dim)
    attention.infers = b.pick // 8 % 2 == 0
    return (Residual("add", attention, nn.Identity()) if b.pick // 4 % 2 else attention), s


class ClassToken(nn.Module):
    """A learned token that attends to the positions and is added to them."""

    def __init__(self, s: State) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, s.channels))
        self.mix = nn.Linear(s.channels, s.channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.mix(torch.cat([self.token.expand(len(x), -1, -1), tokens], 1))
        tokens = tokens[:, 1:] + tokens[:, :1]
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


@kind("class_token")
def _class_token(s: State, _: Block) -> Built:
    return ClassToken(s), s


class Mix(nn.Module):
    """A pointwise convolution and a gate as einsum."""

    def __init__(self, s: State, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, s.channels))

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("bcn,oc->bon", x.flatten(2), self.weight)
        gated = torch.einsum("bon,bo->bon", mixed, torch.sigmoid(mixed.mean(2)))
        return gated.unflatten(2, x.shape[2:])


@kind("einsum")
def _einsum(s: State, b: Block) -> Built:
    return Mix(s, b.width), s.wide(b.width)


# -- whole networks ---------------------------------------------------------------------------

HEADS = ("pool", "flatten", "flatten_hard", "conv")
INPUTS = ("one", "image", "vector")
OUTPUTS = ("tensor", "tuple", "dict")
DIMS = (1, 2, 3)
EVERYTHING = frozenset(
    [*KINDS, *HEADS, *(f"inputs_{n}" for n in INPUTS), *(f"outputs_{n}" for n in OUTPUTS)]
    + [f"{d}d" for d in DIMS]
)


def _head(s: State, name: str) -> nn.Module:
    size = s.channels * s.positions
    flatten: dict[str, Callable[[Tensor], Tensor]] = {
        "pool": lambda x: ADAPTIVE[x.ndim - 2](x, 1).flatten(1),
        "flatten": lambda x: x.flatten(1),
        "flatten_hard": lambda x: x.reshape(-1, size),
    }
    if name == "conv":
        return conv(s, CLASSES)
    inputs = s.channels if name == "pool" else size
    return nn.Sequential(Apply(name, flatten[name]), nn.Linear(inputs, CLASSES))


class RandomNetwork(nn.Module):
    """The network of a spec."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.inputs, self.outputs = spec.inputs, spec.outputs
        s = State(3, spec.space)
        self.stem: nn.Module = nn.Identity()
        if spec.stem:
            self.stem = unit(s, Block("stem", pick=3), spec.stem, conv(s, spec.stem, 3))
            s = s.wide(spec.stem)
        if spec.inputs != "one":
            self.second = conv(State(4, spec.space), s.channels) if spec.inputs == "image" else None
            self.second = self.second or nn.Linear(4, s.channels)
        auxiliary = s
        self.blocks = nn.ModuleList()
        for block in spec.blocks:
            module, s = make(s, block)
            self.blocks.append(module)
        self.head = _head(s, spec.head)
        self.auxiliary = _head(auxiliary, "pool") if spec.outputs != "tensor" else None

    def forward(self, x: Tensor, second: Tensor | None = None) -> Any:
        raw, x = x, self.stem(x)
        if second is not None:
            second = self.second(second)
            x = x + second if self.inputs == "image" else x * spread(second, x)
        early = x
        for block in self.blocks:
            x = self._step(block, x, raw)
        if self.auxiliary is None:
            return self.head(x)
        if self.outputs == "tuple":
            return self.head(x), self.auxiliary(early)
        return {"main": self.head(x), "auxiliary": self.auxiliary(early)}

    def _step(self, block: nn.Module, x: Tensor, raw: Tensor) -> Tensor:
        if isinstance(block, ConcatInput):
            return block(x, raw)
        if isinstance(block, nn.Sequential) and isinstance(block[0], ConcatInput):
            return block[1:](block[0](x, raw))
        return block(x)


def randomise(net: nn.Module, seed: int) -> None:
    """Weights, biases and statistics from a seed; norms scale by 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = parameter.numel() // parameter.shape[0] if parameter.ndim > 1 else 1
            parameter.normal_(generator=generator).div_(math.sqrt(fan_in))
        for module in net.modules():
            positive = [getattr(module, "running_var", None)]
            if isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm | LayerNormFirst):
                positive.append(module.weight)
            for tensor in positive:
                if tensor is not None:
                    tensor.uniform_(0.5, 1.5, generator=generator)
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(generator=generator)


def build(spec: Spec) -> nn.Module:
    """The network of a spec with its random weights, in eval mode."""
    net = RandomNetwork(spec)
    randomise(net, spec.seed)
    return net.eval()


def example(spec: Spec) -> tuple[Tensor, ...]:
    """Inputs for the network of a spec."""
    generator = torch.Generator().manual_seed(spec.seed + 1)
    shapes = [(BATCH, 3, *spec.space)]
    if spec.inputs != "one":
        shapes.append((BATCH, 4, *(spec.space if spec.inputs == "image" else ())))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


# -- strategies -------------------------------------------------------------------------------

_WIDTHS = st.integers(4, 24)
_PICKS = st.integers(0, 15)


def _names(dims: int, *, inner: bool) -> list[str]:
    return [
        name
        for name, traits in KINDS.items()
        if dims in traits.dims and not (inner and (traits.resizes or traits.composite))
    ]


_TOP = {dims: st.sampled_from(_names(dims, inner=False)) for dims in DIMS}
_INNER = {
    dims: st.builds(Block, st.sampled_from(_names(dims, inner=True)), _WIDTHS, _PICKS)
    for dims in DIMS
}
_INNERS = {
    dims: st.lists(inner, min_size=1, max_size=3).map(tuple) for dims, inner in _INNER.items()
}
_SIZES = {
    1: st.tuples(st.integers(4, 8)),
    2: st.tuples(st.integers(4, 8), st.integers(4, 8)),
    3: st.tuples(st.integers(2, 4), st.integers(2, 4), st.integers(2, 4)),
}


def _block(draw: st.DrawFn, dims: int, name: str) -> Block:
    inner = draw(_INNERS[dims]) if KINDS[name].composite else ()
    return Block(name, draw(_WIDTHS), draw(_PICKS), inner)


@st.composite
def specs(draw: st.DrawFn, focus: str | None = None) -> Spec:
    """Specs of legal networks; all contain `focus`, if given."""
    allowed = KINDS[focus].dims if focus else DIMS
    dims = draw(st.sampled_from([d for d in (2, 2, 2, 1, 3) if d in allowed]))
    names = draw(st.lists(_TOP[dims], min_size=0 if focus else 1, max_size=3))
    if focus:
        names.insert(draw(st.integers(0, len(names))), focus)
    return Spec(
        tuple(_block(draw, dims, name) for name in names),
        draw(_SIZES[dims]),
        draw(st.one_of(_WIDTHS, st.just(0))),
        draw(st.sampled_from(HEADS)),
        draw(st.sampled_from(("one", "one", "one", "image", "vector"))),
        draw(st.sampled_from(("tensor", "tensor", "tensor", "tuple", "dict"))),
        draw(st.integers(0, 999)),
    )
