"""Budgets beside MACs and parameters, ratios by layer, and the ranking kind by kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bevel
from bevel.core.errors import PruningError
from bevel.core.limits import QUANTITIES, parse_limit
from bevel.graph.couplings import analyze
from bevel.pruning.allocate import Problem, knapsack, rank_all
from bevel.pruning.allocate.isomorphic import kind
from bevel.pruning.quantities import PeakMemoryKb, SizeKb
from bevel.runtimes import export
from networks import ALL, EXAMPLE, Plain, randomise


def quantity(built, net, precision="float32", example=EXAMPLE):
    analysis = analyze(net, example)
    return built(analysis, precision).at(analysis.full())


# -- limits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "written", "value", "share"),
    [
        ("macs", 0.5, 0.5, True),
        ("macs", "50 %", 0.5, True),
        ("macs", "50%", 0.5, True),
        ("macs", 1, 1, True),
        ("macs", 2.5e6, 2.5e6, False),
        ("macs", "2.5e6", 2.5e6, False),
        ("latency_ms", "0.8 ms", 0.8, False),
        ("latency_ms", 12, 12, False),
        ("latency_ms", 0.8, 0.8, True),
        ("size_kb", "300 KB", 300, False),
    ],
)
def test_one_rule_for_all_limits(name, written, value, share):
    limit = parse_limit(name, written)
    assert (limit.value, limit.share) == (value, share)
    assert limit.of(4 * value) == (value if share else 0.25)
    assert parse_limit(name, str(limit).replace(",", "")) == limit  # what is said can be given


@pytest.mark.parametrize("written", [0, -0.5, "0 %", "101 %", "x", "", "nan", "inf", True, None])
@pytest.mark.parametrize("name", QUANTITIES)
def test_what_is_no_limit_is_refused(name, written):
    with pytest.raises(ValueError, match="expected a share above 0, up to 1"):
        parse_limit(name, written)


# -- size -----------------------------------------------------------------------------------


def test_the_size_is_that_of_the_parameters():
    net = randomise(Plain())
    weights = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    vectors = sum(p.numel() for p in net.parameters() if p.ndim == 1)
    for precision, weight, vector in (("float32", 4, 4), ("int8", 1, 4), ("float16", 2, 2)):
        expected = (weight * weights + vector * vectors) / 1000
        assert quantity(SizeKb, net, precision) == pytest.approx(expected)


@pytest.mark.parametrize(("precision", "graph_kb"), [("float32", 30), ("int8-weights", 30)])
def test_the_size_is_nearly_that_of_the_exported_file(tmp_path, precision, graph_kb):
    """What a file holds besides the weights is its graph, and that does not shrink."""
    net = bevel.build_model("bevel:resnet20").eval()
    example = torch.randn(1, 3, 32, 32)
    for name, one in {
        "whole": net,
        "half": bevel.prune(net, bevel.plan_pruning(net, example, budget={"size_kb": "50 %"})),
    }.items():
        file = tmp_path / f"{name}.onnx"
        size = export(one, example, precision=precision, path=file).size_bytes / 1000
        weights = quantity(SizeKb, one, precision, example)
        assert 0.99 * weights < size < weights + graph_kb


# -- memory ---------------------------------------------------------------------------------


class Residual(nn.Module):
    """x -> relu(b(relu(a(x))) + x), then a wide layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 16, 1)

    def forward(self, x):
        y = torch.relu(self.a(x))
        y = torch.relu(self.norm(self.b(y)) + x)
        return self.head(y).flatten(1)


def test_the_peak_is_what_is_alive_at_once():
    """a holds x and 32 channels; b these and 8 more, which is the most; the rest is in place."""
    net, example = randomise(Residual()), torch.randn(2, 8, 5, 5)
    assert quantity(PeakMemoryKb, net, "float32", example) == 4 * (8 + 32 + 8) * 25 / 1000
    assert quantity(PeakMemoryKb, net, "int8", example) == (8 + 32 + 8) * 25 / 1000
    analysis = analyze(net, example)
    (index,) = [i for i, g in enumerate(analysis.groups) if g.name == "a"]
    units = analysis.full()
    units[index] = 4  # then the head's output, 16, and its input, 8, are the most
    assert PeakMemoryKb(analysis, "int8").at(units) == (16 + 8) * 25 / 1000


def test_a_branch_that_waits_is_alive():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 12, 1)

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x)], 1)

    example = torch.randn(1, 3, 4, 4)
    peak = quantity(PeakMemoryKb, randomise(Branches()), "int8", example)
    assert peak == (16 + 12 + 28) * 16 / 1000


# -- plans ----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    network=st.sampled_from(ALL),
    allocate=st.sampled_from(["global", "uniform", "isomorphic", "knapsack"]),
    precision=st.sampled_from(["float32", "int8"]),
    budget=st.dictionaries(
        st.sampled_from(["macs", "params", "size_kb", "peak_memory_kb"]),
        st.integers(40, 100).map(lambda n: f"{n} %"),
        min_size=2,
    ),
)
def test_all_limits_hold_in_the_network_that_is_built(network, allocate, precision, budget):
    """Measured anew on the pruned network, by what it is and not by what the plan reckoned."""
    net = randomise(network())
    request = {"allocate": allocate, "precision": precision, "budget": budget, "align": 2}
    try:
        plan = bevel.plan_pruning(net, EXAMPLE, **request)
    except PruningError as error:
        shares = {name: parse_limit(name, limit).value for name, limit in budget.items()}
        assert any(error.reachable[name] > share for name, share in shares.items())
        return
    pruned = bevel.prune(net, plan)
    for name, limit in budget.items():
        share = parse_limit(name, limit).value + 1e-9
        if name in ("macs", "params"):
            assert getattr(plan.after, name) <= share * getattr(plan.before, name)
        else:
            built = SizeKb if name == "size_kb" else PeakMemoryKb
            before = quantity(built, net, precision)
            assert quantity(built, pruned, precision) <= share * before


def test_an_amount_is_met():
    net = randomise(Plain())
    whole = quantity(SizeKb, net)
    plan = bevel.plan_pruning(net, EXAMPLE, budget={"size_kb": f"{0.6 * whole} kb"}, align=1)
    assert 0.5 * whole < quantity(SizeKb, bevel.prune(net, plan)) <= 0.6 * whole
    assert plan.request["budget"] == {"size_kb": f"{0.6 * whole} kb"}


def test_what_is_out_of_reach_says_what_is_not_for_each_quantity():
    with pytest.raises(
        PruningError,
        match=r"asked for macs <= 90%, size_kb <= 1% \(\S+ kb\), but only macs \S+%, "
        r"size_kb \S+% \(\S+ kb\) can be reached",
    ) as caught:
        bevel.plan_pruning(randomise(Plain()), EXAMPLE, budget={"macs": 0.9, "size_kb": "1 %"})
    assert caught.value.reachable["size_kb"] > 0.01
    assert "\n" not in str(caught.value)


# -- ratios by layer ------------------------------------------------------------------------


def widths(plan):
    return {group.name: group.after for group in plan.groups}


def test_ratios_by_layer_are_taken_as_given():
    net = randomise(Plain())
    plan = bevel.plan_pruning(net, EXAMPLE, ratios={"features.*": 0.25, "head.0": 0.5}, align=4)
    assert widths(plan) == {"features.0.0": 12, "features.2.0": 20, "head.0": 16}
    assert plan.request["ratios"] == {"features.*": 0.25, "head.0": 0.5}
    bevel.verify_pruning(net, bevel.prune(net, plan), plan, EXAMPLE)


def test_the_last_ratio_that_matches_holds():
    plan = bevel.plan_pruning(
        randomise(Plain()), EXAMPLE, ratios={"*": 0.5, "features.0.0": 0}, align=1
    )
    assert widths(plan) == {"features.0.0": 16, "features.2.0": 12, "head.0": 16}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"ratios": {"feature.0.0": 0.5}}, r"no channel group of 'feature.0.0'. Did you mean 'f"),
        ({"ratios": {"head.2": 0.5}}, r"'head.2' matches only what keeps its width: head.2: netw"),
        ({"ratios": {"head.0": 0.5}, "align": 32}, "no width below 32 is a multiple of 32"),
        ({"ratios": {"head.0": 1}}, "the ratio of 'head.0' is 1, expected"),
        ({"ratios": {}}, "ratios is empty"),
        ({"ratios": {"head.0": 0.5}, "ratio": 0.5}, "give either"),
        ({"budget": {"macs": 0.5}, "precision": "int4"}, "no precision 'int4'. Did you mean"),
    ],
)
def test_mistaken_requests_are_one_line(request_, message):
    with pytest.raises(PruningError, match=message) as caught:
        bevel.plan_pruning(randomise(Plain()), EXAMPLE, **request_)
    assert "\n" not in str(caught.value)


# -- kinds ----------------------------------------------------------------------------------


def test_groups_built_alike_are_of_one_kind_however_wide():
    net = bevel.build_model("bevel:resnet20").eval()
    analysis = analyze(net, torch.randn(1, 3, 32, 32))
    scores = {i: np.arange(g.size, dtype=float) for i, g in enumerate(analysis.groups)}
    kinds = {g.name: kind(analysis, g) for g in rank_all(analysis, scores, 1)}
    inner = {kinds[f"layer{stage}.{block}.conv1"] for stage in (1, 2, 3) for block in (0, 1, 2)}
    assert len(inner) == 1
    assert inner.isdisjoint(own for name, own in kinds.items() if not name.endswith("conv1"))


def test_scores_are_compared_within_a_kind_only():
    """A kind whose scores are a thousand times larger loses the same share of its channels."""
    net = bevel.build_model("bevel:resnet20").eval()
    analysis = analyze(net, torch.randn(1, 3, 32, 32))
    random = np.random.default_rng(0)
    scores = {i: random.random(g.size) for i, g in enumerate(analysis.groups)}

    def allocated(factor):
        own = {
            i: s * (factor if ".conv1" in analysis.groups[i].name else 1) for i, s in scores.items()
        }
        groups = rank_all(analysis, own, 1)
        from bevel.pruning.allocate.isomorphic import allocate

        return allocate(Problem(analysis, groups, {"macs": 0.5})).tolist()

    assert allocated(1) == allocated(1000)


# -- knapsack ---------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two inner layers of equal widths, the first on nine times the positions of the second."""

    def __init__(self, width=8):
        super().__init__()
        self.large = nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, 3, 1))
        self.small = nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, 3, 1))

    def forward(self, x):
        return self.small(nn.functional.avg_pool2d(self.large(x), 3))


def knapsack_of(scores, limits, **options):
    """Both inner layers of a `Pair`, with these scores."""
    analysis = analyze(Pair().eval(), torch.randn(1, 3, 9, 9))
    numbers = [number for number, group in enumerate(analysis.groups) if group.size == 8]
    groups = rank_all(analysis, dict(zip(numbers, scores, strict=True)), options.pop("align", 1))
    assert [group.name for group in groups] == ["large.0", "small.0"]
    return Problem(analysis, groups, limits, **options)


def test_of_two_channels_of_one_worth_the_dearer_goes():
    ask = knapsack_of(np.ones((2, 8)), {"macs": 0.8})
    assert knapsack.allocate(ask).tolist() == [6, 8]  # one channel is 11.25 % of all MACs, or 1.25


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 16), limit=st.floats(0.25, 0.95), align=st.sampled_from([1, 2]))
def test_no_other_widths_lose_less_by_more_than_one_step(seed, limit, align):
    """Greedy against every choice that there is."""
    ask = knapsack_of(np.random.default_rng(seed).random((2, 8)), {"macs": limit}, align=align)

    def lost(kept):
        return sum(g.scores[: g.size - k].sum() for g, k in zip(ask.groups, kept, strict=True))

    every = [np.array([a, b]) for a in ask.groups[0].levels for b in ask.groups[1].levels]
    best = min(lost(kept) for kept in every if ask.meets(kept))
    kept = knapsack.allocate(ask)
    assert ask.meets(kept)
    assert lost(kept) <= best + max(g.scores[-align:].sum() for g in ask.groups) + 1e-9


def test_scores_that_do_not_compare_count_by_their_share_of_the_group():
    scores = np.random.default_rng(0).random((2, 8))
    kept = [
        knapsack.allocate(knapsack_of(s, {"macs": 0.6}, comparable=False)).tolist()
        for s in (scores, scores * [[1000], [1]])
    ]
    assert kept[0] == kept[1]
    assert knapsack.allocate(knapsack_of(scores * [[1000], [1]], {"macs": 0.95})).tolist()[0] == 8


class Stairs:
    """A time that falls with every fourth channel."""

    def at(self, kept):
        return float(sum(-(-int(k) // 4) for k in kept))


@pytest.mark.parametrize("limit", [0.9, 0.8, 0.75])
def test_widths_end_where_time_falls(limit):
    scores = np.random.default_rng(0).random((2, 8))
    ask = knapsack_of(scores, {"latency_ms": limit}, quantities={"latency_ms": Stairs()})
    kept = knapsack.allocate(ask)
    assert set(kept.tolist()) <= {4, 8}
    assert kept.tolist() != [8, 8]
