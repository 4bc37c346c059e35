"""Criteria that look at images, against one image and one channel at a time."""

import importlib
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import bevel
from bevel.core import plugins
from bevel.core.errors import PruningError
from bevel.graph.couplings import ChannelGroup, analyze
from bevel.pruning.criteria import needed
from bevel.pruning.criteria.chip import independence
from bevel.pruning.criteria.entropy import BINS
from bevel.pruning.criteria.hrank import ranks
from bevel.pruning.members import Members
from bevel.pruning.places import Place
from bevel.pruning.scoring import score_groups
from bevel.testing.criteria import DataCriterionContract

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(12) % 5
BATCHES = [(IMAGES[:5], LABELS[:5]), (IMAGES[5:], LABELS[5:])]
DATA = [name for name in plugins.own("criteria") if needed(name) != "weights"]


def randomised(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.5)
                if tensor.ndim == 1:
                    tensor.abs_().add_(0.2)
    return net.eval()


class Residual(nn.Module):
    """Activations as functions; the group of `a` and `b` is read by `b` and `c`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.b, self.c = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 5)

    def read(self, x):
        """What the readers of that group get."""
        first = F.relu(self.norm(self.a(x)) - 1)
        return first, first + F.relu(self.b(first) - 1)

    def forward(self, x):
        return self.head(F.relu(self.c(self.read(x)[1])).mean((2, 3)))


def scored(net: nn.Module, name: str, batches=BATCHES, **more) -> dict[str, np.ndarray]:
    """Scores by the name of the group."""
    analysis = analyze(net, batches[0][0][:1])
    found = score_groups(net, analysis, name, calibration=batches, **more)
    return {analysis.groups[index].name: scores for index, scores in found.items()}


# -- values of one map of one image ---------------------------------------------------------


def rank(maps: np.ndarray, channel: int) -> float:
    singular = np.linalg.svd(maps[channel], compute_uv=False)
    return float((singular > singular[0] * max(maps[channel].shape) * 2.0**-23).sum())


def nuclear(maps: np.ndarray) -> float:
    return float(np.linalg.norm(maps.reshape(len(maps), -1), "nuc"))


def lost_norm(maps: np.ndarray, channel: int) -> float:
    without = maps.copy()
    without[channel] = 0
    return nuclear(maps) - nuclear(without)


def fires(maps: np.ndarray, channel: int) -> float:
    return 1 - float((maps[channel] == 0).sum()) / maps[channel].size


def magnitude(maps: np.ndarray, channel: int) -> float:
    return float(np.abs(maps[channel]).sum()) / maps[channel].size


OF_ONE_MAP = {"hrank": rank, "chip": lost_norm, "apoz": fires, "mean_activation": magnitude}


def averaged(value, maps: torch.Tensor) -> np.ndarray:
    """The mean over the images of a value of each channel: (channels,)."""
    every = maps.double().numpy()
    return np.array(
        [np.mean([value(one, channel) for one in every]) for channel in range(maps.shape[1])]
    )


def entropies(maps: torch.Tensor) -> np.ndarray:
    """With the finest aligned bins that are few enough, looked for one after the other."""
    found = []
    for values in maps.double().mean((2, 3)).T.tolist():
        exponent = -60
        while True:
            bins = [math.floor(value / 2.0**exponent) for value in values]
            if max(bins) - min(bins) < BINS:
                break
            exponent += 1
        shares = [count / len(values) for count in Counter(bins).values()]
        found.append(-sum(share * math.log(share) for share in shares))
    return np.array(found)


@pytest.mark.parametrize("name", [*OF_ONE_MAP, "entropy"])
def test_feature_maps_against_a_loop(name):
    net = randomised(Residual())
    with torch.no_grad():
        read = net.read(IMAGES)
    rows = [entropies(x) if name == "entropy" else averaged(OF_ONE_MAP[name], x) for x in read]
    expected = np.mean([row / row.mean() for row in rows], axis=0)
    assert len(set(np.round(rows[0], 6))) > 1
    assert scored(net, name)["a"] == pytest.approx(expected / expected.mean(), rel=1e-5)
    first = scored(net, name, reduction="first")["a"]
    assert first == pytest.approx(rows[0] / rows[0].mean(), rel=1e-5)


def test_every_data_criterion_has_a_reference():
    assert {*OF_ONE_MAP, "entropy", "taylor", "fisher"} == set(DATA)


@pytest.mark.parametrize("name", DATA)
def test_batches_make_no_difference(name):
    net = randomised(Residual())
    whole = scored(net, name, [(IMAGES, LABELS)])
    for size in (1, 5):
        parts = scored(net, name, list(zip(IMAGES.split(size), LABELS.split(size), strict=True)))
        assert parts.keys() == whole.keys()
        for group, scores in parts.items():
            assert scores == pytest.approx(whole[group], rel=1e-4, abs=1e-9)


# -- fast ways to known quantities ----------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (16, 9), (3, 20), (1, 7), (1, 1)])
def test_ranks_are_those_of_singular_values(shape):
    """Of maps of every rank, with zero rows and columns, and down to the tolerance's edge."""
    random = torch.Generator().manual_seed(0)
    maps = []
    for wanted in range(min(shape) + 1):
        left = torch.randn(40, shape[0], wanted, generator=random)
        full = left @ torch.randn(40, wanted, shape[1], generator=random)
        full[:, :, ::3] *= torch.rand(40, 1, 1, generator=random) > 0.5
        full[:, 1::4] *= torch.rand(40, 1, 1, generator=random) > 0.5
        noise = torch.randn(full.shape, generator=random)
        maps += [full, full + noise * 10 ** (-9 * torch.rand(40, 1, 1, generator=random)), noise]
    stack = torch.stack(maps).relu()
    expected = torch.linalg.matrix_rank(stack.double(), rtol=max(shape) * 2.0**-23)
    assert torch.equal(ranks(stack), expected)
    assert {0, min(shape)} <= set(expected.unique().tolist())
    assert min(shape) < 3 or len(expected.unique()) > 3


@pytest.mark.parametrize(("units", "shape"), [(5, (6, 6)), (16, (4, 2)), (6, (1, 1)), (1, (3, 3))])
@pytest.mark.parametrize("kind", ["dense", "relu", "dependent", "tiny"])
def test_channel_independence_is_the_loss_of_nuclear_norm(units, shape, kind):
    maps = torch.randn(4, units, *shape, generator=torch.Generator().manual_seed(units))
    if kind == "relu":
        maps = (maps - 0.5).relu()
    if kind == "dependent":
        maps[:, -1], maps[:, : units // 3] = 2 * maps[:, 0], 0
    if kind == "tiny":
        maps[:, 0] *= 1e-6
    found = independence(maps)
    for image, losses in zip(maps.double().numpy(), found, strict=True):
        expected = [lost_norm(image, channel) for channel in range(units)]
        assert losses.numpy() == pytest.approx(expected, rel=1e-6, abs=1e-7 * nuclear(image))


def test_maps_of_zeros_lose_nothing():
    assert independence(torch.zeros(2, 3, 4, 4)).tolist() == [[0] * 3] * 2
    assert ranks(torch.zeros(2, 3, 4, 4)).tolist() == [[0] * 3] * 2


def test_bins_follow_values_of_any_size_in_any_order():
    random = torch.Generator().manual_seed(0)
    values = torch.randn(60, 5, 1, 1, generator=random, dtype=torch.float64)
    values *= torch.tensor([1e-12, 1e-3, 1, 1e6, 0]).reshape(5, 1, 1)
    values[30:, 2] *= 1000  # the range grows late
    expected = entropies(values)
    assert expected[4] == 0
    for order in (torch.arange(60), torch.randperm(60, generator=random)):
        for size in (1, 7, 60):
            statistic = plugins.load("criteria", "entropy").start()
            for part in values[order].split(size):
                statistic.update(part)
            assert statistic.scores().numpy() == pytest.approx(expected, abs=1e-12)


# -- gradients, against weights that are moved a little -------------------------------------


class Grouped(nn.Module):
    """A grouped convolution that reads, a depthwise one, and one that is run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, groups=2)
        self.deep, self.up = nn.Conv2d(6, 6, 3, groups=6), nn.ConvTranspose2d(6, 4, 2)
        self.again, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        x = self.deep(F.silu(self.b(torch.tanh(self.a(x)))))
        x = torch.sigmoid(self.up(F.gelu(x)))
        return self.head(self.again(self.again(x)).mean((2, 3)))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.head = (
            nn.Conv2d(3, 4, 3), nn.Linear(4 * 9, 7), nn.Linear(7, 5)
        )  # fmt: skip

    def forward(self, x):
        x = F.max_pool2d(torch.tanh(self.conv(x)), 2).flatten(1)
        return self.head(torch.tanh(self.hidden(x)))


class Attention(nn.Module):
    """Patches as tokens in two windows to an image; heads with 3 queries, 3 keys, 4 values."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.q, self.k = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 6), nn.Linear(6, 6)
        self.v, self.proj = nn.Linear(6, 8), nn.Linear(8, 6)
        self.wide, self.narrow, self.head = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 5)
        self.heads = 2

    def forward(self, x):
        x = torch.tanh(self.patch(x)).flatten(2).transpose(1, 2)  # (N, 16, 6)
        windows = x.reshape(-1, 8, x.shape[2])
        q, k, v = (
            layer(windows).reshape(len(windows), 8, self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(mixed).reshape(x.shape)
        x = x + self.narrow(F.gelu(self.wide(x)))
        return self.head(x.mean(1))


def slices(net: nn.Module, group: ChannelGroup, unit: int) -> list[tuple[torch.Tensor, object]]:
    """What reads a unit; where nothing does, what makes it, with the bias."""
    members = Members(net)
    found = members.of(group, ({"input"},)) or members.of(group, ({"filter"},))
    found += [] if members.of(group, ({"input"},)) else members.of(group, ({"bias"},))
    places = []
    for weight, axis in found:
        tensor = dict(net.named_parameters())[axis.tensor]
        if axis.units.ndim == 2:
            split = tensor.unflatten(0, (len(axis.units), -1))
            places += [
                (split[block].movedim(axis.dim, 0), np.flatnonzero(units == unit))
                for block, units in enumerate(axis.units)
            ]
        else:
            places.append((tensor.movedim(axis.dim, 0), np.flatnonzero(axis.units == unit)))
        assert weight.tensor.shape == tensor.shape
    return places


def slope(net: nn.Module, group: ChannelGroup, unit: int) -> np.ndarray:
    """The change of each image's loss when the unit is scaled everywhere: (images,)."""
    step, losses = 1e-5, []
    for factor in (1 + step, 1 - step):
        for tensor, rows in slices(net, group, unit):
            tensor.data[rows] *= factor
        with torch.no_grad():
            losses.append(F.cross_entropy(net(IMAGES.double()), LABELS, reduction="none").numpy())
        for tensor, rows in slices(net, group, unit):
            tensor.data[rows] /= factor
    return (losses[0] - losses[1]) / (2 * step)


@pytest.mark.parametrize("network", [Residual, Grouped, Flat, Attention])
def test_gates_are_the_change_of_the_loss_when_all_readers_let_go(network):
    net = randomised(network()).double()
    batches = [(images.double(), labels) for images, labels in BATCHES]
    analysis = analyze(net, batches[0][0][:1])
    taylor, fisher = (
        score_groups(net, analysis, name, calibration=batches) for name in ("taylor", "fisher")
    )
    assert taylor.keys() == {i for i, g in enumerate(analysis.groups) if g.frozen is None}
    for index, scores in taylor.items():
        group = analysis.groups[index]
        slopes = np.array([slope(net, group, unit) for unit in range(group.size)])
        assert np.abs(slopes).max() > 1e-3
        close = {"rel": 1e-4, "abs": 1e-9}
        assert scores == pytest.approx(slopes.mean(1) ** 2, **close)
        assert fisher[index] == pytest.approx((slopes**2).mean(1) / 2, **close)


def test_there_are_groups_of_every_kind():
    """Heads, channels of heads that nothing reads, blocks, flattened maps."""
    groups = {g.name: g for net in (Grouped(), Flat(), Attention()) for g in every(net)}
    assert any(group.runs for group in groups.values())
    assert groups["conv"].size == 4
    assert any(a.units.ndim == 2 for a in groups["a"].axes)
    members = Members(net := Attention())
    assert any(not members.of(group, ({"input"},)) for group in every(net))


def every(net: nn.Module) -> list[ChannelGroup]:
    return analyze(net.eval(), IMAGES[:1]).prunable


@given(
    size=st.integers(1, 5),
    channels=st.integers(1, 4),
    others=st.integers(0, 3),
    image=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_maps_and_gates_are_those_of_a_units_channels(size, channels, others, image):
    random = np.random.default_rng((size, channels, others))
    units = np.r_[np.repeat(np.arange(size), channels), np.full(others, -1)]
    units = torch.from_numpy(random.permutation(units))
    module = nn.Conv2d(len(units), 1, 1) if image else nn.Linear(len(units), 1)
    place = Place(0, size, module, reads=True, units=units)
    shape = (4, len(units), 3, 2) if image else (4, 3, 2, len(units))
    x, gates = torch.randn(shape), torch.randn(2, size)  # two rows of each image
    assert place.fits(x)
    assert not place.fits(x.narrow(place.axis, 0, len(units) - 1))
    maps, gated = place.maps(x), place.gated(x, gates)
    for unit in range(size):
        own = [x.movedim(place.axis, 1)[:, i] for i in np.flatnonzero(units == unit)]
        assert torch.equal(maps[:, unit], torch.cat(own, dim=1))
    for channel, unit in enumerate(units.tolist()):
        for row in range(4):
            factor = gates[row // 2, unit] if unit >= 0 else 1
            before, after = (v.movedim(place.axis, 1)[row, channel] for v in (x, gated))
            assert torch.allclose(after, before * factor)


# -- where units are seen -------------------------------------------------------------------


def test_a_flattened_map_is_one_map_again():
    net = randomised(Flat())
    with torch.no_grad():
        maps = F.max_pool2d(torch.tanh(net.conv(IMAGES)), 2)
    for name in ("chip", "mean_activation"):
        expected = averaged(OF_ONE_MAP[name], maps)
        assert scored(net, name)["conv"] == pytest.approx(expected / expected.mean(), rel=1e-5)


def test_a_grouped_reader_sees_another_channel_in_each_block():
    net = randomised(Grouped())
    with torch.no_grad():
        expected = averaged(rank, torch.tanh(net.a(IMAGES)))
    assert scored(net, "hrank")["a"] == pytest.approx(expected / expected.mean())


def test_a_head_is_seen_where_it_is_read_and_queries_where_they_are_made():
    net = randomised(Attention())
    analysis = analyze(net, IMAGES[:1])
    found = score_groups(net, analysis, "mean_activation", calibration=[IMAGES])
    seen = {}
    net.proj.register_forward_pre_hook(lambda _, x: seen.update(read=x[0]))
    net.q.register_forward_hook(lambda _, x, y: seen.update(q=y))  # noqa: ARG005
    net.k.register_forward_hook(lambda _, x, y: seen.update(k=y))  # noqa: ARG005
    with torch.no_grad():
        net(IMAGES)
    heads = seen["read"].unflatten(2, (2, 4)).abs().mean((0, 1, 3))
    made = [seen[name].abs().mean((0, 1)) for name in ("q", "k")]
    whole, queries = (
        next(found[i] for i, g in enumerate(analysis.groups) if g.runs == runs and g.name == name)
        for name, runs in (("q#2", True), ("q", False))
    )
    assert whole == pytest.approx((heads / heads.mean()).numpy(), rel=1e-4)
    expected = sum(row / row.mean() for row in made) / 2
    assert queries == pytest.approx(expected.numpy(), rel=1e-4)


def test_a_pooled_reader_counts_only_where_there_is_no_other():
    class Net(Residual):
        def forward(self, x):
            return self.head(F.relu(self.c(self.read(x)[1])).mean((2, 3))) + self.side(
                self.read(x)[1].mean((2, 3))
            )

    net = Net()
    net.side = nn.Linear(6, 5)
    randomised(net)
    with torch.no_grad():
        maps, pooled = net.read(IMAGES), F.relu(net.c(net.read(IMAGES)[1])).mean((2, 3))
    rows = [averaged(magnitude, x) for x in (*maps, maps[0])]  # `b` is run twice
    expected = np.mean([row / row.mean() for row in rows[:2]], axis=0)
    assert scored(net, "mean_activation")["a"] == pytest.approx(expected, rel=1e-5)
    assert scored(net, "mean_activation")["c"] == pytest.approx(
        (pooled.mean(0) / pooled.mean()).numpy(), rel=1e-5
    )


class Functional(nn.Module):
    """The middle convolution's weights are a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 6, 3), nn.Linear(8, 5)
        self.kernel, self.reader = (
            nn.Parameter(torch.randn(8, 6, 3, 3)), nn.Parameter(torch.randn(8, 8, 1, 1))
        )  # fmt: skip

    def forward(self, x):
        x = F.relu(F.conv2d(F.relu(self.a(x)), self.kernel))
        return self.head(F.relu(F.conv2d(x, self.reader)).mean((2, 3)))


def test_what_no_layer_reads_or_makes_is_left_whole_with_the_reason():
    net = randomised(Functional())
    found = scored(net, "apoz")
    assert "a" in found
    assert "kernel" not in found
    plan = bevel.plan_pruning(
        net, IMAGES[:1], criterion="apoz", ratio=0.1, align=1, calibration=BATCHES
    )
    assert [n for n in plan.notes if "kernel" in n and "'apoz' has nothing to score" in n]


class Table(nn.Module):
    """A bias of each position that a small network makes of a table, as in Swin V2."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 5)
        self.hidden, self.bias = nn.Linear(2, 7), nn.Linear(7, 1)
        self.register_buffer("table", torch.ones(4, 2))

    def forward(self, x):
        x = F.relu(self.patch(x)).flatten(2) + self.bias(F.relu(self.hidden(self.table))).T
        return self.head(x.mean(2))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 12])
def test_no_image_has_a_part_of_a_table(size):
    """Whatever the batch size; though four positions could be one of each of four images."""
    net = randomised(Table())
    batches = list(zip(IMAGES.split(size), LABELS.split(size), strict=True))
    assert "hidden" in {group.name for group in every(net)}
    assert scored(net, "fisher", batches).keys() == {"patch"}
    assert scored(net, "mean_activation", batches).keys() > {"patch", "hidden"}


# -- what is kept ---------------------------------------------------------------------------


class Counting(Residual):
    runs = 0

    def forward(self, x):
        self.__class__.runs += 1
        return super().forward(x)


def test_scores_are_found_again_without_a_pass(tmp_path):
    net = randomised(Counting())
    analysis = analyze(net, IMAGES[:1])

    def runs(name="apoz", batches=BATCHES, network=net, **more):
        Counting.runs = 0
        found = score_groups(
            network, analysis, name, calibration=batches, folder=tmp_path / "scores", **more
        )
        return Counting.runs, {group: scores.tolist() for group, scores in found.items()}

    count, first = runs()
    assert count == 2  # batches
    assert runs() == (0, first)
    assert runs(batches=[IMAGES]) == (0, first)  # other batches, no labels: the same images
    assert runs(reduction="first")[0] == 0
    assert runs(batches=[IMAGES + 1])[0] == 1
    assert runs("mean_activation")[0] == 2
    assert runs("taylor")[0] == 4  # batches, and one image to begin with, alone and twice
    assert runs("taylor")[0] == 0
    assert runs("taylor", [(IMAGES, LABELS.flip(0))])[0] == 3
    assert runs("taylor", [(IMAGES, LABELS)])[0] == 0
    with torch.no_grad():
        net.b.weight[0, 0, 0, 0] += 1
    assert runs()[0] == 2
    net.b.padding, net.b.dilation = (2, 2), (2, 2)
    assert runs()[0] == 2
    for file in (tmp_path / "scores").iterdir():
        file.write_bytes(b"no scores")
    assert runs()[0] == 2
    assert runs()[0] == 0


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scored(randomised(Residual()), "apoz")
    assert not list(tmp_path.iterdir())


# -- mistakes -------------------------------------------------------------------------------


class Detector(Residual):
    def forward(self, x):
        return {"boxes": self.c(self.read(x)[1])}


@pytest.mark.parametrize(
    ("name", "network", "batches", "message"),
    [
        ("taylor", Residual, [IMAGES], r"give batches of \(images, labels\)"),
        ("taylor", Residual, [(IMAGES, LABELS + 1)], "label 5 has no output: the network has 5"),
        ("fisher", Detector, BATCHES, "the network gives dict, not scores of classes"),
        ("fisher", Residual, [(IMAGES, LABELS[:, None])], r"for labels \(12, 1\)"),
        ("apoz", Residual, [], "got no batch"),
        ("chip", Residual, [IMAGES * math.nan], "not finite"),
        ("hrank", Residual, [IMAGES[:, :2]], r"cannot be run on calibration images \(12x2x8x8\)"),
    ],
)
def test_mistakes_are_one_line(name, network, batches, message):
    net = randomised(network())
    with pytest.raises(PruningError, match=message) as caught:
        score_groups(net, analyze(net, IMAGES[:1]), name, calibration=batches)
    assert "\n" not in str(caught.value)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_detector_is_scored_by_its_feature_maps():
    assert scored(randomised(Detector()), "hrank").keys() == {"a"}


def test_the_example_of_the_page_keeps_the_contract(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs/criteria.md"
    (code,) = re.findall(r"```python\n(\"\"\"Largest.*?)```", page.read_text(), re.DOTALL)
    (tmp_path / "largest_value.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    plugin, suite = importlib.import_module("largest_value"), DataCriterionContract()
    suite.test_says_what_it_looks_at(plugin)
    suite.test_one_finite_score_per_unit(plugin)
    suite.test_batches_make_no_difference(plugin)
    suite.test_memory_does_not_grow_with_the_images(plugin)
    maps = suite.observed(plugin)
    expected = maps.flatten(2).max(2).values.double().mean(0)
    assert torch.allclose(suite.given(plugin, maps).scores(), expected)


def test_callers_modes_do_not_matter():
    net = randomised(Residual())
    expected = scored(net, "taylor")
    with torch.no_grad():
        assert scored(net, "taylor")["a"] == pytest.approx(expected["a"])
    with torch.enable_grad():
        assert scored(net, "taylor")["a"] == pytest.approx(expected["a"])
