"""Every operator and structure by itself: what must be prunable is, and a cut is exact."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bevel
from bevel.graph import attributes
from graph.structures import (
    IMAGE,
    Apply,
    Net,
    Structure,
    check,
    check_cut,
    check_expected,
    masks,
    reasons,
)
from networks import conv, randomise

STRUCTURES: dict[str, Structure] = {}


def structure(**options: Any) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Put the network that a class or function builds to the test."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        STRUCTURES[build.__name__.removeprefix("_")] = Structure(build, **options)
        return build

    return register


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


# -- concatenation, slices, necks -------------------------------------------------------------


@structure(exact=["stem.0.weight", "body.0.weight@1", "body.1.0.weight"])
def focus() -> nn.Module:
    parts = Apply(
        lambda x: torch.cat(
            [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1
        )
    )

    class Focus(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](parts(x)))

    return Net(Focus(nn.Conv2d(64, 24, 1), conv(24, 16)))


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = conv(width, width), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


@structure(
    exact=["stem.0.weight", "body.cv1.0.weight", "body.m.0.a.0.weight", "body.cv2.0.weight@1"]
)
class c2f(Net):  # noqa: N801
    class C2f(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cv1, self.cv2 = conv(16, 24), conv(48, 16)
            self.m = nn.ModuleList(Bottleneck(12) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y = list(self.cv1(x).chunk(2, 1))
            y.extend(m(y[-1]) for m in self.m)
            return self.cv2(torch.cat(y, 1))

    def __init__(self) -> None:
        super().__init__(self.C2f())


@structure(exact=["stem.0.weight", "body.cv1.0.weight", "body.cv2.0.weight", "body.m.a.0.weight"])
class c3(Net):  # noqa: N801
    class C3(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cv1, self.cv2, self.cv3 = conv(16, 12), conv(16, 12), conv(24, 16)
            self.m = Bottleneck(12)

        def forward(self, x: Tensor) -> Tensor:
            return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))

    def __init__(self) -> None:
        super().__init__(self.C3())


@structure(exact=["stem.0.weight", "body.cv1.0.weight", "body.cv2.0.weight@1"])
class sppf(Net):  # noqa: N801
    class SPPF(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cv1, self.cv2 = conv(16, 12), conv(48, 16)
            self.pool = nn.MaxPool2d(5, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = [self.cv1(x)]
            y.extend(self.pool(y[-1]) for _ in range(3))
            return self.cv2(torch.cat(y, 1))

    def __init__(self) -> None:
        super().__init__(self.SPPF())


@structure(
    exact=[
        "c2.0.weight",
        "c3.0.weight",
        "c4.0.weight",
        "up.weight",
        "mix.0.weight",
        "mix.0.weight@1",
    ],
    frozen={"p2.weight": "network output", "p3.weight": "network output"},
)
class neck(nn.Module):  # noqa: N801
    def __init__(self) -> None:
        super().__init__()
        self.c2, self.c3, self.c4 = conv(3, 8), conv(8, 12), conv(12, 16)
        self.up = nn.Conv2d(16, 10, 1)
        self.mix = conv(22, 14)
        self.p3, self.p2 = nn.Conv2d(14, 6, 1), nn.Conv2d(8 + 14, 6, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        c2 = self.c2(x)
        c3 = self.c3(F.max_pool2d(c2, 2))
        c4 = self.c4(F.max_pool2d(c3, 2))
        up = F.interpolate(self.up(c4), scale_factor=2.0, mode="nearest")
        mixed = self.mix(torch.cat([up, c3], 1))
        high = F.interpolate(mixed, size=c2.shape[2:], mode="bilinear", align_corners=False)
        return [self.p2(torch.cat([c2, high], 1)), self.p3(mixed)]


@structure(
    exact=["stem.0.weight", "body.layers.0.2.weight", "body.layers.1.2.weight", "after.weight@1"]
)
class dense(Net):  # noqa: N801
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(
                    nn.BatchNorm2d(16 + 8 * i), nn.ReLU(), nn.Conv2d(16 + 8 * i, 8, 3, padding=1)
                )
                for i in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            features = [x]
            for layer in self.layers:
                features.append(layer(torch.cat(features, 1)))
            return torch.cat(features, 1)

    def __init__(self) -> None:
        super().__init__(self.Dense(), after=40)


# -- shuffles ---------------------------------------------------------------------------------


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w)
        return x.transpose(1, 2).contiguous().view(n, -1, h, w)


@structure(exact=["stem.0.weight", "after.weight@1"])
def shuffle_by_shape() -> nn.Module:
    return Net(Shuffle(4))


@structure(exact=["stem.0.weight", "after.weight@1"])
def shuffle_torch() -> nn.Module:
    return Net(nn.ChannelShuffle(4))


@structure(exact=["stem.0.weight", "after.weight@1", "body.0.weight"])
def shuffle_between_grouped() -> nn.Module:
    return Net(
        nn.Sequential(nn.Conv2d(16, 32, 1, groups=4), Shuffle(4), nn.Conv2d(32, 16, 1, groups=4))
    )


@structure(exact=["stem.0.weight", "body.up.weight", "after.weight@1"])
class pixel_shuffle(Net):  # noqa: N801
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.shuffle = nn.Conv2d(16, 32, 1), nn.PixelShuffle(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.shuffle(self.up(x))

    def __init__(self) -> None:
        super().__init__(self.Up(), after=8)


@structure(exact=["stem.0.weight", "after.weight@1"])
def pixel_unshuffle() -> nn.Module:
    return Net(nn.PixelUnshuffle(2), after=64)


# -- norms ------------------------------------------------------------------------------------


@structure(inexact=["stem.0.weight", "body.weight"], exact=["after.weight"])
def group_norm() -> nn.Module:
    return Net(nn.GroupNorm(4, 16))


@structure(inexact=["stem.0.weight", "body.weight"])
def group_norm_of_one_group() -> nn.Module:
    return Net(nn.GroupNorm(1, 16))


class Last(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@structure(inexact=["stem.0.weight", "body.body.weight"])
def layer_norm_last() -> nn.Module:
    return Net(Last(nn.LayerNorm(16)))


@structure(inexact=["stem.0.weight"])
def layer_norm_without_weight() -> nn.Module:
    return Net(Last(nn.LayerNorm(16, elementwise_affine=False)))


@structure(inexact=["stem.0.weight", "body.body.weight"])
def rms_norm() -> nn.Module:
    return Net(Last(nn.RMSNorm(16)))


class ChannelsFirst(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


@structure(inexact=["stem.0.weight", "body.weight"])
def layer_norm_first() -> nn.Module:
    return Net(ChannelsFirst(16))


@structure(inexact=["stem.0.weight"], exact=["after.weight"])
def local_response_norm() -> nn.Module:
    return Net(nn.LocalResponseNorm(3))


@structure(exact=["stem.0.weight", "body.weight", "body.running_mean"])
def instance_norm() -> nn.Module:
    return Net(nn.InstanceNorm2d(16, affine=True, track_running_stats=True))


@structure(exact=["stem.0.weight"])
def instance_norm_plain() -> nn.Module:
    return Net(nn.InstanceNorm2d(16))


# -- weights that are computed ----------------------------------------------------------------


@structure(exact=["body.weight"], inexact=["stem.0.weight", "body.weight@1"])
def std_conv() -> nn.Module:
    timm = pytest.importorskip("timm.layers")
    return Net(timm.StdConv2d(16, 16, 3, padding=1))


@structure(exact=["body.weight", "body.gain"], inexact=["stem.0.weight"])
def scaled_std_conv() -> nn.Module:
    timm = pytest.importorskip("timm.layers")
    return Net(timm.ScaledStdConv2d(16, 16, 3, padding=1))


@structure(exact=["stem.0.weight", "body.weight", "body.mask@1"])
class masked_weight(Net):  # noqa: N801
    class Masked(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(16, 16, 3, padding=1)
            self.mask = nn.Parameter(torch.ones_like(self.weight))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)

    def __init__(self) -> None:
        super().__init__(self.Masked())


@structure(exact=["stem.0.weight", "body.weight@1", "body.weight@2", "after.weight@1"])
class conditional_convolution(Net):  # noqa: N801
    """A mixture of experts by a gate; one kernel for the batch."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 16, 16, 3, 3))
            self.gate = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            gate = torch.sigmoid(self.gate(x.mean((0, 2, 3))))
            weight = (gate[:, None, None, None, None] * self.weight).sum(0)
            return F.conv2d(x, weight, padding=1)

    def __init__(self) -> None:
        super().__init__(self.Mixture())


@structure(exact=["stem.0.weight", "after.weight@1"])
class conditional_convolution_per_image(Net):  # noqa: N801
    """CondConv: one kernel for each image, as a grouped convolution over the batch."""

    class CondConv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 16, 16, 3, 3))
            self.gate = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            gate = torch.sigmoid(self.gate(x.mean((2, 3))))
            weight = torch.einsum("ne,eoikl->noikl", gate, self.weight)
            weight = weight.reshape(-1, *weight.shape[2:])
            out = F.conv2d(x.reshape(1, n * c, h, w), weight, padding=1, groups=n)
            return out.reshape(n, -1, h, w)

    def __init__(self) -> None:
        super().__init__(self.CondConv())


_NORM = torch.nn.utils.parametrizations


@structure(
    exact=["stem.0.weight", "body.parametrizations.weight.original1", "after.weight@1"],
)
def weight_norm() -> nn.Module:
    return Net(_NORM.weight_norm(nn.Conv2d(16, 16, 3, padding=1)))


@structure(exact=["stem.0.weight", "body.weight_v", "body.weight_v@1"])
def weight_norm_of_old() -> nn.Module:
    return Net(torch.nn.utils.weight_norm(nn.Conv2d(16, 16, 3, padding=1)))


@structure(exact=["after.weight"])
def spectral_norm() -> nn.Module:
    return Net(_NORM.spectral_norm(nn.Conv2d(16, 16, 3, padding=1)))


@structure(exact=["stem.0.weight", "a.weight", "a.weight@1"])
class shared_weights(nn.Module):  # noqa: N801
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            conv(3, 16),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(16, 16, 1),
        )
        self.tied = nn.Conv2d(16, 16, 3, padding=1)
        self.tied.weight = self.a.weight
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tied(self.b(self.a(self.stem(x)).relu())))


# -- convolutions -----------------------------------------------------------------------------


@structure(exact=["stem.0.weight", "body.0.weight@1", "body.1.weight", "after.weight@1"])
def transposed() -> nn.Module:
    return Net(
        nn.Sequential(
            nn.ConvTranspose2d(16, 24, 2, stride=2, groups=4),
            nn.ConvTranspose2d(24, 24, 3, padding=1, groups=24),
            nn.ConvTranspose2d(24, 16, 3, padding=1),
        )
    )


@structure(exact=["0.weight", "1.weight", "3.weight", "5.weight"])
def one_dimension() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Conv1d(16, 16, 3, groups=16), nn.MaxPool1d(2), nn.Conv1d(16, 12, 3),
        nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


STRUCTURES["one_dimension"] = Structure(
    one_dimension,
    torch.randn(2, 4, 20, generator=generator()),
    ["0.weight", "5.weight", "8.weight@1"],
)


def three_dimensions() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(),
        nn.ConvTranspose3d(16, 12, 2, stride=2), nn.MaxPool3d(2), nn.Conv3d(12, 12, 1, groups=3),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


STRUCTURES["three_dimensions"] = Structure(
    three_dimensions,
    torch.randn(2, 2, 4, 4, 4, generator=generator()),
    ["0.weight", "3.weight@1", "5.weight"],
)


# -- recurrent --------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.rnn = kind(12, 10, batch_first=True, **options)
        self.head = nn.Linear(10 * (1 + self.rnn.bidirectional), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0].mean(1))


for _name, _kind in (("lstm", nn.LSTM), ("gru", nn.GRU), ("rnn", nn.RNN)):
    for _suffix, _options in (
        ("", {}), ("_two_layers", {"num_layers": 2}), ("_bidirectional", {"bidirectional": True}),
        ("_both", {"num_layers": 2, "bidirectional": True}),
    ):  # fmt: skip
        STRUCTURES[_name + _suffix] = Structure(
            lambda kind=_kind, options=_options: Recurrent(kind, **options),
            torch.randn(2, 7, 6, generator=generator()),
            ["embed.weight", "rnn.weight_ih_l0@1"],
        )


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))


STRUCTURES["embedding"] = Structure(
    embedding,
    torch.arange(8).reshape(2, 4),
    ["0.weight@1", "1.weight", "1.weight@1"],
)


# -- attention --------------------------------------------------------------------------------

TOKENS = torch.randn(2, 6, 10, generator=generator())
SCALED = {
    "inputs": TOKENS,
    "exact": ["embed.weight"],
    "inexact": ["body.qkv.weight"],
    "heads": ["body.qkv.weight", "body.proj.weight@1"],
}


class Tokens(nn.Module):
    """Tokens with attention in a residual branch."""

    def __init__(self, body: nn.Module, width: int = 24) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(10, width), body, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.body(x)).mean(1))


class Attention(nn.Module):
    """As timm's, fused."""

    def __init__(self, dim: int = 24, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.prepare()

    def prepare(self) -> None:
        """More parameters."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = self.meet(*qkv.unbind(0))
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))

    def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@structure(
    inputs=TOKENS, exact=["embed.weight"], inexact=[],
    heads=["body.qkv.weight", "body.proj.weight@1"],
)  # fmt: skip
def attention_fused() -> nn.Module:
    return Tokens(Attention())


@structure(
    inputs=TOKENS, exact=["embed.weight", "body.qkv.weight"],
    heads=["body.qkv.weight", "body.proj.weight@1"],
)  # fmt: skip
class attention_unfused(Tokens):  # noqa: N801
    class Unfused(Attention):
        def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v

    def __init__(self) -> None:
        super().__init__(self.Unfused())


@structure(inputs=TOKENS, heads=["body.attn.qkv.weight"], inexact=["embed.weight"])
def attention_timm_block() -> nn.Module:
    timm = pytest.importorskip("timm.models.vision_transformer")
    return Tokens(timm.Block(24, 4, qkv_bias=True, init_values=0.1))


@structure(
    inputs=TOKENS, exact=["embed.weight", "body.q.weight", "body.k.weight", "body.v.weight"],
    heads=["body.q.weight", "body.k.weight", "body.v.weight", "body.proj.weight@1"],
)  # fmt: skip
class attention_separate(Tokens):  # noqa: N801
    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h, self.d = 4, 6
            self.scale = self.d**-0.5
            self.q, self.k, self.v, self.proj = (nn.Linear(24, 24) for _ in range(4))

        def split(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0], -1, self.h, self.d).transpose(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
            scores = torch.matmul(q, k.transpose(-1, -2)) * self.scale
            x = torch.matmul(scores.softmax(-1), v).transpose(1, 2).contiguous()
            return self.proj(x.view(x.shape[0], -1, self.h * self.d))

    def __init__(self) -> None:
        super().__init__(self.Separate())


@structure(
    inputs=TOKENS, exact=["embed.weight", "body.k.weight"],
    heads=["body.k.weight", "body.q.weight", "body.proj.weight@1"],
)  # fmt: skip
class attention_grouped_query(Tokens):  # noqa: N801
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.num_kv_heads, self.head_dim = 4, 2, 6
            self.q, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 12), nn.Linear(24, 12)
            self.proj = nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            q = self.q(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
            k = self.k(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2)
            v = self.v(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2)
            x = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.4)
            return self.proj(x.transpose(1, 2).reshape(b, n, -1))

    def __init__(self) -> None:
        super().__init__(self.Grouped())


@structure(inputs=TOKENS, exact=["embed.weight"], inexact=["body.k.weight"])
class attention_grouped_query_with_positions(Tokens):  # noqa: N801
    """Keys and queries that are not zero where their weights are: their product is a sum."""

    class Shifted(attention_grouped_query.Grouped):
        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            positions = torch.arange(n)[:, None] / n
            q = self.q(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2) + positions
            k = self.k(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2) + positions
            v = self.v(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2)
            x = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.4)
            return self.proj(x.transpose(1, 2).reshape(b, n, -1))

    def __init__(self) -> None:
        super().__init__(self.Shifted())


@structure(
    inputs=TOKENS, exact=["embed.weight", "body.qkv.weight"],
    heads=["body.qkv.weight", "body.table@1"],
)  # fmt: skip
class attention_relative_position(Tokens):  # noqa: N801
    class Relative(Attention):
        def prepare(self) -> None:
            self.table = nn.Parameter(torch.zeros(11, self.num_heads))
            steps = torch.arange(6)
            self.register_buffer("index", steps[:, None] - steps[None] + 5)

        def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            bias = self.table[self.index.view(-1)].view(6, 6, -1).permute(2, 0, 1).contiguous()
            scores = (q * self.scale) @ k.transpose(-2, -1) + bias.unsqueeze(0)
            return scores.softmax(-1) @ v

    def __init__(self) -> None:
        super().__init__(self.Relative())


@structure(
    inputs=TOKENS, exact=["embed.weight"], heads=["body.proj.weight@1"],
)  # fmt: skip
class attention_talking_heads(Tokens):  # noqa: N801
    class Talking(Attention):
        def prepare(self) -> None:
            self.before = nn.Linear(self.num_heads, self.num_heads)
            self.behind = nn.Linear(self.num_heads, self.num_heads)

        def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            scores = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
            scores = self.behind(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return scores @ v

    def __init__(self) -> None:
        super().__init__(self.Talking())


@structure(inputs=TOKENS, exact=["embed.weight"], heads=["body.qkv.weight", "body.proj.weight@1"])
class attention_linear(Tokens):  # noqa: N801
    class Linear(Attention):
        def meet(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = F.elu(q) + 1, F.elu(k) + 1
            context = torch.einsum("bhnd,bhne->bhde", k, v)
            weight = 1 / (torch.einsum("bhnd,bhd->bhn", q, k.sum(2)) + 1e-6)
            return torch.einsum("bhnd,bhde,bhn->bhne", q, context, weight)

    def __init__(self) -> None:
        super().__init__(self.Linear())


@structure(exact=["stem.0.weight"], heads=["body.attention.qkv.weight"])
class attention_windows(Net):  # noqa: N801
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.window_size = 4
            self.attention = Attention(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.permute(0, 2, 3, 1)
            b, h, w, c = x.shape
            s = self.window_size
            windows = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).contiguous()
            windows = self.attention(windows.view(-1, s * s, c)).view(-1, s, s, c)
            x = windows.view(b, h // s, w // s, s, s, -1).permute(0, 1, 3, 2, 4, 5).contiguous()
            return x.view(b, h, w, -1).permute(0, 3, 1, 2)

    def __init__(self) -> None:
        super().__init__(self.Windows())


@structure(exact=["stem.0.weight", "after.weight@1"])
class einsum(Net):  # noqa: N801
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bchw,oc->bohw", x, self.weight)

    def __init__(self) -> None:
        super().__init__(self.Mix())


# -- gates and branches -----------------------------------------------------------------------


class Excite(nn.Module):
    def __init__(self, *, linear: bool) -> None:
        super().__init__()
        layer: Any = nn.Linear if linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.linear, self.down, self.up = linear, layer(16, 8), layer(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        gate = F.adaptive_avg_pool2d(x, 1)
        gate = self.up(self.down(gate.view(n, c) if self.linear else gate).relu()).sigmoid()
        return x * (gate.view(n, c, 1, 1) if self.linear else gate)


@structure(exact=["stem.0.weight", "body.down.weight", "body.down.weight@1", "body.up.weight"])
def squeeze_excite() -> nn.Module:
    return Net(Excite(linear=True))


@structure(exact=["stem.0.weight", "body.down.weight", "body.down.weight@1", "body.up.weight"])
def squeeze_excite_conv() -> nn.Module:
    return Net(Excite(linear=False))


@structure(
    exact=["stem.0.weight", "body.paths.0.0.weight", "body.paths.1.0.weight", "body.down.weight",
           "body.up.0.weight"],
)  # fmt: skip
class selective_kernels(Net):  # noqa: N801
    class Selective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.paths = nn.ModuleList([conv(16, 16), conv(16, 16)])
            self.down = nn.Conv2d(16, 8, 1)
            self.up = nn.ModuleList([nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1)])

        def forward(self, x: Tensor) -> Tensor:
            x = torch.stack([path(x) for path in self.paths], 1)
            gate = self.down(x.sum(1).mean((2, 3), keepdim=True)).relu()
            gate = torch.stack([up(gate) for up in self.up], 1).softmax(1)
            return (x * gate).sum(1)

    def __init__(self) -> None:
        super().__init__(self.Selective())


@structure(exact=["stem.0.weight", "body.conv.weight", "body.down.weight", "body.up.weight"])
class split_attention(Net):  # noqa: N801
    """As ResNeSt, of radix 2 and one group."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.radix = 2
            self.conv = nn.Conv2d(16, 32, 3, padding=1, groups=2)
            self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 32, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).relu()
            b, rc, h, w = x.shape
            x = x.reshape(b, self.radix, rc // self.radix, h, w)
            gate = self.up(self.down(x.sum(1).mean((2, 3), keepdim=True)).relu())
            gate = gate.view(b, 1, self.radix, -1).transpose(1, 2).softmax(1)
            gate = gate.reshape(b, -1, 1, 1).reshape(b, self.radix, rc // self.radix, 1, 1)
            return (x * gate).sum(1).contiguous()

    def __init__(self) -> None:
        super().__init__(self.Split())


@structure(exact=["stem.0.weight", "body.0.weight"])
def glu() -> nn.Module:
    return Net(nn.Sequential(nn.Conv2d(16, 32, 1), nn.GLU(1)))


@structure(exact=["stem.0.weight"])
class bilinear(nn.Module):  # noqa: N801
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 16), nn.Linear(16, 8), nn.Linear(16, 10)
        self.mix, self.head = nn.Bilinear(8, 10, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3))
        return self.head(self.mix(self.a(x), self.b(x)))


# -- indices, padding, copies -----------------------------------------------------------------


@structure(frozen={"stem.0.weight": "index"}, exact=["after.weight"])
class permuted(Net):  # noqa: N801
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("order", torch.randperm(16, generator=generator()))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.order]

    def __init__(self) -> None:
        super().__init__(self.Permuted())


@structure(exact=["stem.0.weight", "after.weight"])
class gathered_positions(Net):  # noqa: N801
    class Gathered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.tensor([0, 2, 4, 6]))

        def forward(self, x: Tensor) -> Tensor:
            x = x[:, :, self.rows].index_select(3, self.rows)
            index = self.rows.view(1, 1, 1, -1).expand(*x.shape[:3], -1) // 2
            return torch.gather(x, 3, index)

    def __init__(self) -> None:
        super().__init__(self.Gathered())


@structure(exact=["stem.0.weight", "body.0.weight"], frozen={})
class padded_channels(nn.Module):  # noqa: N801
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv(3, 16), conv(20, 12)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(F.pad(self.stem(x), (0, 0, 0, 0, 1, 3))))


@structure(exact=["stem.0.weight", "after.weight@1"])
def expanded() -> nn.Module:
    def spread(x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[2:])
        return torch.cat([pooled.expand_as(x), x], 1)

    return Net(Apply(spread), after=32)


@structure(exact=["stem.0.weight", "after.weight@1"])
def repeated() -> nn.Module:
    return Net(Apply(lambda x: x.repeat(1, 2, 1, 1)), after=32)


@structure(exact=["stem.0.weight", "after.weight@1"])
def repeat_interleaved() -> nn.Module:
    return Net(Apply(lambda x: x.repeat_interleave(2, 1)), after=32)


@structure(exact=["stem.0.weight", "body.0.weight@1"])
def unfolded() -> nn.Module:
    return Net(
        nn.Sequential(
            nn.Unfold(2, stride=2), nn.Conv1d(64, 16, 1), Apply(lambda x: x.unflatten(2, (4, 4)))
        )
    )


STRUCTURES["turned_in_place"] = Structure(
    lambda: Net(Apply(lambda x: x * x.mean((2, 3)).t_().sigmoid().t()[..., None, None])),
    exact=["stem.0.weight", "after.weight@1"],
)
STRUCTURES["unfolded"] = Structure(
    unfolded, exact=["stem.0.weight", "body.1.weight@1", "body.1.weight", "after.weight@1"]
)


@structure(exact=["stem.0.weight", "after.weight@1", "body.0.weight"])
def folded() -> nn.Module:
    return Net(
        nn.Sequential(
            nn.Conv2d(16, 32, 1),
            Apply(lambda x: F.fold(x.flatten(2), (16, 16), 2, stride=2)),
        ),
        after=8,
    )


@structure(exact=["stem.0.weight", "after.weight@1"])
def sampled() -> nn.Module:
    steps = torch.linspace(-1, 1, 5)
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)
    return Net(
        Apply(
            lambda x: F.grid_sample(x, grid.to(x).expand(len(x), -1, -1, -1), align_corners=False)
        )
    )


@structure(exact=["stem.0.weight", "after.weight@1", "body.deform.weight"])
class deformable(Net):  # noqa: N801
    class Deformable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from torchvision.ops import DeformConv2d

            self.offset, self.mask = nn.Conv2d(16, 18, 3, padding=1), nn.Conv2d(16, 9, 3, padding=1)
            self.deform = DeformConv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.deform(x, self.offset(x), self.mask(x).sigmoid())

    def __init__(self) -> None:
        super().__init__(self.Deformable())


@structure(
    inputs=(IMAGE, torch.tensor([[0, 0, 0, 5, 5], [1, 1, 1, 7, 6]])),
    exact=["stem.0.weight", "head.weight@1"],
)
class regions(nn.Module):  # noqa: N801
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 16), nn.Linear(16 * 4, 5)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        from torchvision.ops import roi_align

        return self.head(roi_align(self.stem(x), boxes.to(x), (2, 2)).flatten(1))


# -- code -------------------------------------------------------------------------------------


@structure(exact=["stem.0.weight", "body.conv.0.weight", "after.weight@1"])
class written_in_place(Net):  # noqa: N801
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(16, 12)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            out = torch.zeros(len(x), x.shape[1] + y.shape[1], *x.shape[2:], dtype=x.dtype)
            out[:, : x.shape[1]] = x
            out[:, x.shape[1] :] = y
            return out

    def __init__(self) -> None:
        super().__init__(self.Written(), after=28)


@torch.jit.script
def scripted_mish(x: Tensor) -> Tensor:
    return x.mul(F.softplus(x).tanh())


@structure(exact=["stem.0.weight", "after.weight@1"])
def scripted() -> nn.Module:
    return Net(Apply(lambda x: scripted_mish(x)))


@structure(exact=["stem.0.weight", "after.weight@1"])
class cached(Net):  # noqa: N801
    """Fills a cache of positions on the first call."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grid: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.grid is None or self.grid.shape[-2:] != x.shape[-2:]:
                rows = torch.arange(x.shape[-2]).view(-1, 1)
                self.grid = (rows + torch.arange(x.shape[-1])).to(x)
            return x * self.grid.to(x)

    def __init__(self) -> None:
        super().__init__(self.Cached())


@structure(exact=["stem.0.weight", "after.weight@1"])
class asserting(Net):  # noqa: N801
    class Asserting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dim = 16

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == self.dim, "wrong width"
            return x.relu()

    def __init__(self) -> None:
        super().__init__(self.Asserting())


@structure(frozen={"stem.0.weight": "test_operators.py:"}, exact=["after.weight"])
def numbers_in_view() -> nn.Module:
    return Net(Apply(lambda x: x.reshape(-1, 4, 4, 8, 8).transpose(1, 2).reshape(-1, 16, 8, 8)))


@structure(frozen={"stem.0.weight": "test_operators.py:"}, exact=["after.weight"])
class numbers_in_assert(Net):  # noqa: N801
    class Asserting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 16:
                raise ValueError("wrong width")
            return x.relu()

    def __init__(self) -> None:
        super().__init__(self.Asserting())


@structure(frozen={"stem.0.weight": "test_operators.py:"}, exact=["after.weight"])
def numbers_in_split() -> nn.Module:
    return Net(Apply(lambda x: torch.cat(x.split([6, 10], 1)[::-1], 1)))


@structure(exact=["stem.0.weight", "body.cv1.0.weight", "body.m.a.0.weight", "after.weight@1"])
class split_by_attribute(Net):  # noqa: N801
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = 12
            self.cv1, self.cv2, self.m = conv(16, 2 * self.c), conv(3 * self.c, 16), Bottleneck(12)

        def forward(self, x: Tensor) -> Tensor:
            y = list(self.cv1(x).split((self.c, self.c), 1))
            y.append(self.m(y[-1]))
            return self.cv2(torch.cat(y, 1))

    def __init__(self) -> None:
        super().__init__(self.Split())


@structure(exact=["stem.0.weight", "body.cv1.0.weight", "after.weight@1"])
class split_by_two_attributes(Net):  # noqa: N801
    """As PConv of FasterNet: a part of the channels is convolved, the rest goes through."""

    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dim_conv, self.dim_untouched = 4, 12
            self.cv1 = conv(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            a, b = torch.split(x, [self.dim_conv, self.dim_untouched], dim=1)
            return torch.cat((self.cv1(a), b), 1)

    def __init__(self) -> None:
        super().__init__(self.Partial())


@structure(exact=["after.weight"])
class plain_tensor(Net):  # noqa: N801
    """A constant that is no buffer has a fixed size."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.linspace(0.5, 1.5, 16).view(1, -1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.to(x)

    def __init__(self) -> None:
        super().__init__(self.Constant())


STRUCTURES["plain_tensor"] = Structure(
    plain_tensor, exact=["after.weight"], frozen={"stem.0.weight": "fixed"}
)


@structure(exact=["stem.0.weight", "body.scale@1"])
class buffer(Net):  # noqa: N801
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.linspace(0.5, 1.5, 16).view(1, -1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    def __init__(self) -> None:
        super().__init__(self.Constant())


# -- inputs and outputs -----------------------------------------------------------------------


class Two(nn.Module):
    """Two inputs and three outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 16), conv(3, 16), nn.Linear(4, 16)
        self.head, self.other = nn.Linear(16, 5), nn.Conv2d(16, 2, 1)

    def forward(self, left: Tensor, right: Any, scale: Tensor | None = None) -> Any:
        right = right["image"] if isinstance(right, dict) else right
        x = self.a(left) + self.b(right)
        if scale is not None:
            x = x * self.c(scale)[:, :, None, None]
        return self.head(x.mean((2, 3))), {"maps": [self.other(x)], "none": None}


SCALE = torch.randn(2, 4, generator=generator())
_TWO = ["a.0.weight", "b.0.weight"]
STRUCTURES["several_inputs"] = Structure(Two, (IMAGE, IMAGE + 1, SCALE), [*_TWO, "c.weight"])
STRUCTURES["list_of_inputs"] = Structure(Two, [IMAGE, IMAGE + 1], _TWO)
STRUCTURES["nested_inputs"] = Structure(Two, (IMAGE, {"image": IMAGE}), _TWO)
STRUCTURES["keyword_inputs"] = Structure(
    Two, {"left": IMAGE, "right": IMAGE + 1, "scale": SCALE}, [*_TWO, "c.weight"]
)


# -- tests ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", STRUCTURES)
def test_structure(name):
    check(STRUCTURES[name])


def test_multihead_attention_is_as_wide_inside_as_outside():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(24, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    width = ["embed.weight", "body.attention.in_proj_weight", "body.attention.in_proj_weight@1"]
    analysis = check(Structure(lambda: Tokens(Block()), TOKENS, inexact=width))
    why = reasons(analysis, "body.attention.in_proj_weight")
    assert all("body.attention" in reason for reason in why), why


def test_attention_between_different_widths_is_cut_outside():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(24, 18)
            self.attention = nn.MultiheadAttention(24, 4, kdim=18, vdim=18, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.other(x)
            return self.attention(x, y, y)[0]

    analysis = check(Structure(lambda: Tokens(Block()), TOKENS))
    assert all(reasons(analysis, "body.attention.q_proj_weight"))


def test_a_transformer_encoder_layer_is_pruned():
    def build() -> nn.Module:
        return Tokens(nn.TransformerEncoderLayer(24, 4, 32, batch_first=True))

    check(Structure(build, TOKENS, exact=["body.linear1.weight"], inexact=["body.linear2.weight"]))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["c2f", "split_attention", "attention_windows", "flattened"])
def test_the_batch_makes_no_difference(name, batch):
    def flattened() -> nn.Module:
        return nn.Sequential(conv(3, 16), nn.Flatten(), nn.Linear(16 * 64, 12), nn.Linear(12, 5))

    net = randomise(flattened() if name == "flattened" else STRUCTURES[name].build())

    def groups(count: int) -> list[Any]:
        found = bevel.analyze(net, IMAGE.repeat(2, 1, 1, 1)[:count]).groups
        return [(g.name, g.size, g.frozen, g.inexact, g.runs) for g in found]

    assert groups(batch) == groups(2)


@torch.library.custom_op("bevel_tests::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    return x.flip(1) * 2


@twist.register_fake
def _twisted(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_custom_operator_freezes_what_it_touches_by_name():
    net = randomise(Net(Apply(lambda x: twist(x))))
    analysis = bevel.analyze(net, IMAGE)
    check_expected(
        analysis,
        Structure(lambda: net, exact=["after.weight"], frozen={"stem.0.weight": "bevel_tests"}),
    )
    check_cut(net, IMAGE, analysis, masks(analysis, np.random.default_rng(0)))


class Scaled(nn.Module):
    """A layer of one's own that states its size, and checks it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.config = {"size": size}
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.config["size"]:
            raise ValueError(f"{x.shape[1]} channels instead of {self.config['size']}")
        return x * self.weight[:, None, None]


def test_a_size_in_a_dictionary_is_frozen_with_its_place():
    net = randomise(Net(Scaled(16)))
    analysis = bevel.analyze(net, IMAGE)
    check_expected(
        analysis,
        Structure(
            lambda: net, exact=["after.weight"], frozen={"stem.0.weight": "test_operators.py:"}
        ),
    )


def test_a_registered_resizer_lets_it_follow(monkeypatch):
    monkeypatch.setattr(attributes, "RESIZERS", dict(attributes.RESIZERS))
    attributes.register_resizer(
        Scaled, lambda module: module.config.update(size=module.weight.shape[0])
    )
    check(Structure(lambda: Net(Scaled(16)), exact=["stem.0.weight", "body.weight"]))


class Halves(nn.Module):
    """Ultralytics' C2f in small: the exporter puts `forward_split` in the place of `forward`."""

    __module__, __qualname__ = "ultralytics.nn.modules.block", "C2f"

    def __init__(self) -> None:
        super().__init__()
        self.c = 12
        self.cv1 = nn.Sequential(OrderedDict(conv=nn.Conv2d(16, 24, 1), act=nn.SiLU()))
        self.m = nn.Conv2d(12, 10, 3, padding=1)
        self.cv2 = nn.Conv2d(12 + 12 + 10, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.cv1(x).chunk(2, 1)
        return self.cv2(torch.cat([first, second, self.m(second)], 1))

    def forward_split(self, x: Tensor) -> Tensor:
        first, second = self.cv1(x).split((self.c, self.c), 1)
        return self.cv2(torch.cat([first, second, self.m(second)], 1))


def test_what_only_another_forward_of_a_known_library_reads_follows():
    net = randomise(Net(Halves()))
    plan = bevel.plan_pruning(net, IMAGE, criterion="l2", ratio=0.5, align=2)
    pruned = bevel.prune(net, plan)
    assert pruned.body.c == 6
    expected = pruned(IMAGE)
    pruned.body.forward = pruned.body.forward_split
    assert torch.equal(pruned(IMAGE), expected)


def test_sizes_in_numbers_do_not_change_the_network_they_are_rehearsed_on():
    net = STRUCTURES["split_by_attribute"].build()
    before = {name: dict(vars(module)) for name, module in net.named_modules()}
    bevel.analyze(net, IMAGE)
    assert net.body.c == 12
    assert {name: dict(vars(module)) for name, module in net.named_modules()} == before
    assert math.prod(net.stem[0].weight.shape) == 16 * 27
