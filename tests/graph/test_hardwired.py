"""Attributes of the same number: each length follows the one that the code writes for it."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import bevel
from bevel.graph import hardwired
from bevel.graph.attributes import integers
from bevel.graph.faults import given_names
from bevel.pruning.plan import make_plan
from graph.structures import Net, Structure, check
from networks import randomise

IMAGE = torch.randn(2, 3, 8, 8)


class KeysAndValues(nn.Module):
    """Attention whose keys are as long as its values, and something beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.key_dim, self.val_dim, self.rest = 12, 12, 6
        self.qkv = nn.Conv2d(16, 42, 1)
        self.head = nn.Conv2d(12, 10, 1)
        self.beside = nn.Conv2d(6, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, rest = self.qkv(self.stem(x)).split(
            [self.key_dim, self.key_dim, self.val_dim, self.rest], dim=1
        )
        weight = (q.flatten(2).transpose(1, 2) @ k.flatten(2)).softmax(-1)
        mixed = (weight @ v.flatten(2).transpose(1, 2)).transpose(1, 2)
        return self.head(mixed.reshape(len(x), self.val_dim, 8, 8)) + self.beside(rest)


class Branches(nn.Module):
    """A tuple of widths, three of which are the same number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 40, 3, padding=1)
        self.widths = (16, 8, 8, 8)
        self.own = nn.ModuleList(nn.Conv2d(n, 6, 1) for n in self.widths)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.stem(x), self.widths, dim=1)
        return torch.cat([layer(part) for layer, part in zip(self.own, parts, strict=True)], 1)


def cut(net: nn.Module, sizes: dict[str, int]) -> nn.Module:
    """The network with so many units left of the groups of these attributes, and proven."""
    analysis = bevel.analyze(net, IMAGE)
    held = {site.attribute: site for site in analysis.attributes}
    keep = {}
    for attribute, left in sizes.items():
        (number,) = {int(group) for group in held[attribute].groups.reshape(-1) if group >= 0}
        keep[number] = torch.arange(analysis.groups[number].size).numpy() < left
    plan = make_plan(analysis, keep)
    pruned = bevel.prune(net, plan)
    assert bevel.verify_pruning(net, pruned, plan, IMAGE).worst < 1e-9
    return pruned


def test_lengths_of_the_same_number_follow_the_attributes_that_the_call_names():
    pruned = cut(randomise(KeysAndValues()), {"key_dim": 5, "val_dim": 9})
    assert (pruned.key_dim, pruned.val_dim) == (5, 9)
    assert pruned.qkv.out_channels == 2 * 5 + 9 + 6


def test_items_of_a_tuple_follow_in_their_order():
    pruned = cut(randomise(Branches()), {"widths[1]": 3, "widths[2]": 5, "widths[3]": 7})
    assert pruned.widths == (16, 3, 5, 7)
    assert [layer.in_channels for layer in pruned.own] == [16, 3, 5, 7]


class Square(nn.Module):
    """Sees 16 channels as 4 runs of 4, and writes both numbers as one attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.side = 4

    def forward(self, x: Tensor) -> Tensor:
        seen = x.view(x.shape[0], self.side, self.side, *x.shape[2:])
        return seen.transpose(1, 2).flatten(1, 2)


def test_an_attribute_does_not_count_runs_and_the_channels_in_them_at_once():
    analysis = check(Structure(lambda: Net(Square())))
    assert len({int(site.groups.max()) for site in analysis.attributes}) <= 1


class OfWidth(nn.Module):
    """Gives a tensor that cannot shrink the shape of one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(16, 16, 1)
        self.gate = nn.Parameter(torch.randn(1, 64, 16))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        fixed = self.gate.cumsum(-1)  # its channels have positions
        return self.mix(x) * fixed.expand(n, h * w, 16).reshape(n, h, w, c).mean(-1)[:, None]


def test_a_size_that_is_read_from_another_tensor_is_found_without_a_search(monkeypatch):
    monkeypatch.setattr(hardwired._Search, "_found", None)
    check(Structure(lambda: Net(OfWidth()), frozen={"stem.0.weight": "its size is read elsewhere"}))


class Spy:
    """Says what the call that reaches it was given."""

    a, b, sizes = 4, 4, (4, 4)

    def split(self, *_args: object, **_kwargs: object) -> tuple[str, ...]:
        return given_names(sys._getframe(1))

    def same(self, *_args: object) -> Spy:
        return self


def test_the_names_that_a_call_is_given_are_those_among_its_own_arguments():
    spy = Spy()
    assert spy.same(spy.b, 3).split([spy.a, spy.a, spy.b], dim=1) == ("a", "a", "b")
    assert spy.split(spy.a - spy.b, -1) == ("a", "b")
    several = spy.same().split(
        1,
        spy.sizes,
        (spy.a),
    )
    assert several == ("sizes", "a")
    assert spy.split(8) == ()
    assert given_names(None) == ()


class Scaled(nn.Module):
    """Channels in heads, scaled by how many a head has, and something beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.hc = 2, 12
        self.asked, self.told = nn.Conv2d(20, 24, 1), nn.Conv2d(24, 20, 1)
        self.value = nn.Conv2d(20, 20, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        asked = self.asked(x).view(b, self.heads, self.hc, h, w) / self.hc**0.5
        return self.value(x) * self.told(asked.flatten(1, 2)).sigmoid()


def test_a_number_computed_from_an_attribute_is_put_down_to_its_group(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), *(Scaled() for _ in range(12)))
    net.append(nn.Conv2d(20, 4, 1))
    runs = []
    rehearse = hardwired.rehearse
    monkeypatch.setattr(hardwired, "rehearse", lambda *a, **k: runs.append(1) or rehearse(*a, **k))
    analysis = bevel.analyze(randomise(net), IMAGE)
    scaled = {site.module: site for site in analysis.attributes if site.attribute == "hc"}
    own = {int(g) for site in scaled.values() for g in site.groups.reshape(-1) if g >= 0}
    assert len(scaled) == 12
    inexact = {n for n, group in enumerate(analysis.groups) if group.inexact is not None}
    assert inexact == own  # not what is beside it
    assert len(runs) < 8  # no search: 12 blocks would take dozens


class Table(nn.Module):
    """A long list of numbers beside a size, as tables of relative positions are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.table = 12, list(range(20_000))
        self.first, self.last = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(x).split([self.width, self.width], 1)
        return self.last(torch.cat([second, first], 1))


def test_a_long_table_is_not_searched_for_sizes():
    assert set(integers(Table())) == {"width"}
    assert cut(randomise(Table()), {"width": 7}).first.out_channels == 14


class Bounded(nn.Module):
    """Cuts out a part between bounds that a buffer holds, and writes into it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
        self.register_buffer("bounds", torch.tensor([2, 6]))

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.bounds[0], self.bounds[1]
        y = self.last(self.first(x).relu())
        middle = y[:, :, low:high].sigmoid()
        y[:, :, low:high] = middle
        return y


def test_bounds_of_a_slice_may_be_tensors():
    net = randomise(Bounded())
    plan = bevel.plan_pruning(net, IMAGE, criterion="l2", ratio=0.5, align=4)
    pruned = bevel.prune(net, plan)
    assert pruned.first.out_channels == 8
    assert not bevel.verify_pruning(net, pruned, plan, IMAGE).unproven
