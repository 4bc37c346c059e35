"""Requests: what a plan reaches, its widths, and what it says of what stays whole."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bevel
from bevel.core.errors import PruningError
from bevel.core.recipe import Target
from bevel.core.steps import PruneStep
from bevel.graph.couplings import Axis, ChannelGroup, analyze
from bevel.pipeline.planning import alignment
from bevel.pruning.allocate import LAST_SHARE, Problem, inside_runs, rank, rank_all
from bevel.pruning.scoring import REDUCTIONS
from bevel.runtimes import channel_step
from networks import ALL, EXAMPLE, Plain, Projection, randomise


class Attention(nn.Module):
    """Self-attention in which heads, and the channels of a head, can go."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q(x).view(n, length, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(n, length, self.heads, -1).transpose(1, 2)
        v = self.v(x).view(n, length, self.heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=0.25)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Blocks of attention and of two linear layers, on tokens (N, T, 12)."""

    def __init__(self, depth: int = 2, width: int = 32, heads: int = 4, hidden: int = 40) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, width), nn.Linear(width, 3)
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for attention, hidden in zip(self.attention, self.hidden, strict=True):
            x = x + attention(x)
            x = x + hidden(x)
        return self.head(x.mean(1))


TOKENS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


def ranked_by_name(net: nn.Module, example: Tensor, align: int):
    analysis = analyze(net, example)
    random = np.random.default_rng(0)
    scores = {i: random.random(g.size) for i, g in enumerate(analysis.groups)}
    return analysis, {group.name: group for group in rank_all(analysis, scores, align)}


# -- widths ---------------------------------------------------------------------------------


def test_heads_go_one_by_one_and_their_channels_by_the_step():
    analysis, ranked = ranked_by_name(randomise(Transformer()), TOKENS, 4)
    inside = inside_runs(analysis)
    runs = [r for i, g in enumerate(analysis.groups) if g.runs and (r := ranked.get(g.name))]
    within = [ranked[analysis.groups[i].name] for i in inside if analysis.groups[i].frozen is None]
    assert runs and all(group.step == 1 for group in runs)
    assert any(group.size == 4 and group.levels.tolist() == [4, 3, 2, 1] for group in runs)
    assert within and all(group.step == 4 for group in within)
    assert all(group.levels.tolist() == [8, 4] for group in within)
    assert ranked["hidden.0.0"].levels.tolist() == list(range(40, 3, -4))


@pytest.mark.parametrize("allocate", ["global", "uniform"])
@pytest.mark.parametrize("align", [1, 2, 4, 8])
def test_transformers_meet_their_budget_with_aligned_heads(allocate, align):
    net = randomise(Transformer())
    plan = bevel.plan_pruning(net, TOKENS, allocate=allocate, budget={"macs": 0.6}, align=align)
    assert plan.after.macs <= 0.6 * plan.before.macs
    pruned = bevel.prune(net, plan)
    bevel.verify_pruning(net, pruned, plan, TOKENS)
    for before, after in zip(net.attention, pruned.attention, strict=True):
        assert (after.v.out_features // after.heads) % align == 0
        assert after.v.out_features % after.heads == 0
        assert after.heads <= before.heads
    assert all(block[0].out_features % align == 0 for block in pruned.hidden)


def test_t_sensitive_cuts_heads():
    net = randomise(Transformer(depth=1))
    with torch.no_grad():
        for layer in (net.attention[0].v, net.attention[0].q, net.attention[0].k):
            layer.weight[8:] = 0  # the last three heads say nothing
            layer.bias[8:] = 0
        net.hidden[0][2].weight *= 10
    inputs = torch.randn(64, 5, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = net(inputs).argmax(1)
    plan = bevel.plan_pruning(
        net, TOKENS, allocate="t_sensitive", budget={"macs": 0.8}, calibration=[(inputs, labels)]
    )
    assert plan.after.macs <= 0.8 * plan.before.macs
    pruned = bevel.prune(net, plan)
    bevel.verify_pruning(net, pruned, plan, TOKENS)
    assert pruned.attention[0].heads < 4


@given(
    blocks=st.integers(1, 4),
    width=st.integers(1, 40),
    align=st.sampled_from([1, 2, 3, 8, 16, 32, 64]),
    kind=st.sampled_from(["plain", "runs", "inside"]),
    wanted=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_a_better_channel_never_goes_before_a_worse_one(blocks, width, align, kind, wanted, seed):
    size = blocks * width
    random = np.random.default_rng(seed)
    layout = random.permutation(size).reshape(blocks, width) if blocks > 1 else None
    group = ChannelGroup("g", size, (), layout, None, None, kind == "runs")
    scores = random.integers(0, 5, size).astype(float)  # many are equal
    ranked = rank(0, group, scores, align, inside=kind == "inside")
    assert (np.diff(ranked.scores) >= 0).all()
    assert ranked.levels[0] == ranked.size == width
    step = {"runs": 1, "inside": align}.get(kind)
    for level in ranked.levels[1:]:
        assert level >= LAST_SHARE * width
        assert level % step == 0 if step else level * blocks % align == 0
        assert ranked.above(level) == ranked.levels[list(ranked.levels).index(level) - 1]
    assert ranked.above(width) is None
    kept = ranked.fit(wanted * width)
    assert kept in ranked.levels
    assert all(level < wanted * width for level in ranked.levels if level < kept)
    mask = ranked.keep_mask(kept)
    for block in layout if layout is not None else [np.arange(size)]:
        assert mask[block].sum() == kept  # equally many in every block
        if kept < width:
            assert scores[block][mask[block]].min() >= scores[block][~mask[block]].max()


@settings(max_examples=40, deadline=None)
@given(
    network=st.sampled_from([*ALL, Transformer]),
    criterion=st.sampled_from(["l1", "l2", "mean_weight", "random"]),
    allocate=st.sampled_from(["global", "uniform"]),
    reduction=st.sampled_from(list(REDUCTIONS)),
    align=st.sampled_from([1, 2, 4, 8]),
    budget=st.dictionaries(
        st.sampled_from(["macs", "params"]), st.integers(30, 100).map(lambda n: n / 100), min_size=1
    ),
)
def test_a_plan_holds_its_budget_aligned_or_says_what_can_be_reached(
    network, criterion, allocate, reduction, align, budget
):
    net = randomise(network())
    example = TOKENS if network is Transformer else EXAMPLE
    request = {"criterion": criterion, "allocate": allocate, "reduction": reduction}
    try:
        plan = bevel.plan_pruning(net, example, budget=budget, align=align, **request)
    except PruningError as error:
        assert any(error.reachable[name] > limit for name, limit in budget.items())
        return
    assert plan.request == {**request, "align": align, "seed": 0, "budget": budget}
    for name, limit in budget.items():
        assert getattr(plan.after, name) <= (limit + 1e-9) * getattr(plan.before, name)
    _, ranked = ranked_by_name(net, example, align)
    for group in plan.groups:
        rows = ranked[group.name].rows.shape[1]
        assert group.after % rows == 0
        assert group.after // rows in ranked[group.name].levels


@pytest.mark.parametrize("name", ["macs", "params", "channels"])
def test_an_allocator_reckons_as_the_plan_does(name):
    net = randomise(Transformer())
    analysis, ranked = ranked_by_name(net, TOKENS, 1)
    groups = [group for group in ranked.values() if analysis.groups[group.index].frozen is None]
    problem = Problem(analysis, groups, {name: 0.5})
    random = np.random.default_rng(0)
    for _ in range(20):
        kept = np.array([random.choice(group.levels) for group in groups])
        units = analysis.full()
        for group, rows in zip(groups, kept, strict=True):
            units[group.index] = rows * group.rows.shape[1]
        found = problem.fraction(name, kept)
        if name == "channels":
            assert found == sum(units[g.index] for g in groups) / sum(g.rows.size for g in groups)
        else:
            expected = getattr(analysis.cost(units), name) / getattr(analysis.cost(), name)
            assert found == expected
        assert problem.meets(kept) == (found <= 0.5)


def test_auto_takes_the_largest_step_of_the_targets():
    targets = [Target(precision="float32"), Target(precision="int8")]
    auto = PruneStep.model_validate({"ratio": 0.5, "align": "auto"})
    assert alignment(auto, targets) == 16
    assert alignment(auto, targets[:1]) == 8
    assert alignment(PruneStep(ratio=0.5, align=4), targets) == 4


def test_runtimes_say_which_widths_they_like():
    assert channel_step([("onnxruntime", "float32")]) == 8
    assert channel_step([("onnxruntime", "float32"), ("onnxruntime", "int8")]) == 16
    assert channel_step([]) == 8


def test_a_runtime_that_says_nothing_gets_the_usual_step(monkeypatch):
    from bevel.runtimes import onnxruntime

    monkeypatch.delattr(onnxruntime, "channel_step")
    assert channel_step([("onnxruntime", "int8")]) == 8


# -- never silent ---------------------------------------------------------------------------


def test_a_budget_out_of_reach_says_what_is_in_reach_and_why():
    net = randomise(Plain())
    with pytest.raises(PruningError, match=r"only macs \d+(\.\d+)?% can be reached") as caught:
        bevel.plan_pruning(net, EXAMPLE, budget={"macs": 0.01}, ignore=["features.2.0"])
    error = caught.value
    reachable = error.reachable
    assert set(reachable) == {"macs", "params", "channels"}
    assert 0.01 < reachable["macs"] < 1
    assert f"macs {100 * reachable['macs']:.3g}%" in str(error)
    text = str(error)
    assert text.index("features.2.0") < text.index("network output")  # dearest first
    again = {"macs": reachable["macs"] + 1e-9}  # what is said to be reachable is
    plan = bevel.plan_pruning(net, EXAMPLE, budget=again, ignore=["features.2.0"])
    assert plan.after.macs <= again["macs"] * plan.before.macs


def test_other_refusals_have_nothing_reachable():
    with pytest.raises(PruningError, match="no reduction called 'median'") as caught:
        bevel.plan_pruning(Plain(), EXAMPLE, ratio=0.5, reduction="median")
    assert caught.value.reachable == {}


def test_blocks_that_stay_whole_for_one_reason_are_one_line():
    net = randomise(Transformer(depth=5, hidden=20))
    plan = bevel.plan_pruning(net, TOKENS, budget={"macs": 0.9}, ignore=["hidden.*.0"], align=1)
    (line,) = [note for note in plan.notes if "'hidden.*.0'" in note]
    assert line.startswith("hidden.0.0 and 4 more (20; ")
    analysis = analyze(net, TOKENS)
    share = sum(
        t.at(analysis.shares(analysis.full())) for t in analysis.macs if "hidden" in t.module
    )
    assert f"; {share / analysis.cost().macs:.0%} of MACs)" in line


def test_reasons_that_differ_in_block_numbers_are_one_line():
    net = randomise(Transformer(depth=3))
    plan = bevel.plan_pruning(net, TOKENS, budget={"macs": 0.95}, align=32)
    (line,) = [note for note in plan.notes if "no width below 8 of each run" in note]
    assert line.startswith("attention.0.q and 5 more (32; ")
    assert len({note.split("): ")[1] for note in plan.notes}) == len(plan.notes)


def test_notes_are_dearest_first():
    net = randomise(Projection())
    plan = bevel.plan_pruning(net, EXAMPLE, budget={"macs": 0.9}, ignore=["a.0"], align=1)
    shares = [
        float(note.split("; ")[1].split("%")[0].removeprefix("under ")) for note in plan.notes
    ]
    assert plan.notes[0].startswith("a.0 (24; ") and shares == sorted(shares, reverse=True)


def test_a_group_that_is_too_narrow_says_so():
    net = randomise(Plain())
    plan = bevel.plan_pruning(net, EXAMPLE, budget={"params": 0.9}, align=20)
    (line,) = [note for note in plan.notes if note.startswith("features.0.0 (")]
    assert line.endswith("no width below 16 is a multiple of 20")


def test_units_inside_runs_share_an_index_with_them():
    def group(name: str, units: list[int], runs: bool = False) -> ChannelGroup:
        return ChannelGroup(name, 2, (Axis("w", 0, np.array(units)),), None, None, None, runs)

    class Groups:
        groups = (group("heads", [0, 0, 1, 1, -1, -1], True), group("in", [0, 1, 0, 1, -1, -1]),
                  group("beside", [-1, -1, -1, -1, 0, 1]))  # fmt: skip

    assert inside_runs(Groups()) == {1}


def test_an_analysis_serves_several_plans(monkeypatch):
    net = Plain().eval()
    analysis = bevel.analyze(net, EXAMPLE)
    budgets = [{"macs": 0.8}, {"macs": 0.6}]
    fresh = [bevel.plan_pruning(net, EXAMPLE, budget=b, align=1) for b in budgets]
    monkeypatch.setattr("bevel.pruning.planning.analyze", None)
    for budget, plan in zip(budgets, fresh, strict=True):
        again = bevel.plan_pruning(net, EXAMPLE, budget=budget, align=1, analysis=analysis)
        assert again == plan


def test_an_analysis_of_another_network_or_request_is_refused():
    net = Plain().eval()
    analysis = bevel.analyze(net, EXAMPLE)
    with pytest.raises(PruningError, match=r"give it to bevel\.analyze"):
        bevel.plan_pruning(net, EXAMPLE, budget={"macs": 0.8}, analysis=analysis, ignore=["conv1"])
    wider = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(PruningError, match=r"of another network: 0\.weight is 8x3x3x3 here"):
        bevel.plan_pruning(wider, EXAMPLE, budget={"macs": 0.8}, analysis=analysis)
    fewer = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(PruningError, match=r"1\.weight is missing here and 8x8x3x3 there"):
        bevel.plan_pruning(
            fewer, EXAMPLE, budget={"macs": 0.8}, analysis=bevel.analyze(wider, EXAMPLE)
        )
