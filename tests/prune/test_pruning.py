"""Plans, what they remove, and the proof."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import bevel
from bevel.core.errors import PruningError
from bevel.graph.couplings import analyze
from bevel.pruning.allocate import rank
from bevel.pruning.apply import mask, prune
from bevel.pruning.plan import PruningPlan, TensorCut, indices, make_plan, runs_of
from bevel.pruning.verify import compare
from networks import ALL, EXAMPLE, Concat, Grouped, HardWired, Plain, Projection, Shared, randomise

CRITERIA = ("l1", "l2", "mean_weight", "bn_scale", "random")


def plan_for(net: nn.Module, **request) -> PruningPlan:
    request.setdefault("budget", {"macs": 0.5})
    request.setdefault("align", 4)
    return bevel.plan_pruning(net, EXAMPLE, **request)


@pytest.mark.parametrize("network", ALL)
@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_pruned_network_is_smaller_proven_and_costs_what_the_plan_says(network, allocate):
    net = randomise(network())
    plan = plan_for(net, allocate=allocate, budget={"macs": 0.7})
    pruned = bevel.prune(net, plan)
    proof = bevel.verify_pruning(net, pruned, plan, EXAMPLE)
    assert proof.worst < 1e-12
    assert analyze(pruned, EXAMPLE).cost() == plan.after
    assert plan.after.params == sum(p.numel() for p in pruned.parameters())
    assert plan.after.macs <= 0.7 * plan.before.macs


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_meets_a_budget_of_macs_and_parameters(criterion):
    net = randomise(Projection())
    plan = plan_for(net, criterion=criterion, budget={"macs": 0.6, "params": 0.5}, align=2)
    assert plan.after.macs <= 0.6 * plan.before.macs
    assert plan.after.params <= 0.5 * plan.before.params
    bevel.verify_pruning(net, bevel.prune(net, plan), plan, EXAMPLE)


def test_the_input_network_is_unchanged_and_the_result_trains():
    net = randomise(Concat())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pruned = bevel.prune(net, plan_for(net)).train()
    loss = pruned(EXAMPLE).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_size_attributes_follow():
    net = randomise(Grouped())
    pruned = bevel.prune(net, plan_for(net, ratio=0.5, budget=None, allocate="uniform"))
    grouped, depthwise = pruned.grouped[0], pruned.depthwise[0]
    assert (grouped.in_channels, grouped.out_channels, grouped.groups) == (8, 16, 4)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (16, 32, 16)
    assert pruned.depthwise[1].num_features == 32
    assert pruned.head.in_features == pruned.point.out_channels


def test_grouped_convolution_keeps_the_best_channels_of_each_group():
    net = randomise(Grouped())
    with torch.no_grad():
        net.stem[0].weight.fill_(1.0)
        for channel in (0, 5, 10, 15):  # the weakest sits elsewhere in each group
            net.stem[0].weight[channel] = 0.01
    plan = plan_for(net, ratio=0.25, budget=None, align=1, allocate="uniform")
    assert plan.tensors["stem.0.weight"].keep[0] == "1-4,6-9,11-14"
    assert plan.tensors["grouped.0.weight"].keep[1] == ["1-3", "0,2-3", "0-1,3", "0-2"]
    bevel.verify_pruning(net, bevel.prune(net, plan), plan, EXAMPLE)


def test_l2_removes_the_smallest_filters():
    net = randomise(Plain())
    with torch.no_grad():
        net.features[0][0].weight[[2, 3, 7, 9]] *= 1e-3
    plan = plan_for(net, ratio=0.25, budget=None, allocate="uniform")
    assert plan.tensors["features.0.0.weight"].keep[0] == "0-1,4-6,8,10-15"


def test_mean_weight_ranks_as_l1_within_a_layer_and_ignores_fan_in_across_layers():
    net = randomise(Plain())
    with torch.no_grad():
        for module in (net.features[0][0], net.features[2][0], net.head[0]):
            module.weight.fill_(0.1)  # fan-in 27, 144 and 96
    scores = {}
    for criterion in ("l1", "mean_weight"):
        from bevel.pruning.scoring import score_groups

        scores[criterion] = score_groups(net, analyze(net, EXAMPLE), criterion, reduction="first")
    means = [value.mean() for value in scores["mean_weight"].values()]
    assert np.allclose(means, 0.1, atol=1e-6)
    assert all(np.allclose(value, 1.0) for value in scores["l1"].values())


@pytest.mark.parametrize("align", [1, 2, 4, 8])
def test_widths_are_multiples_of_the_alignment(align):
    net = randomise(Projection())
    plan = plan_for(net, align=align, budget={"macs": 0.6})
    widths = {g.name: g.after for g in plan.groups if g.after < g.before}
    assert widths and all(width % align == 0 for width in widths.values())
    assert plan.after.macs <= 0.6 * plan.before.macs


def test_sizes_written_in_forward_are_found_and_protected():
    net = randomise(HardWired())
    plan = plan_for(net, allocate="uniform", budget={"macs": 0.6})
    note = next(note for note in plan.notes if note.startswith("features.2.0"))
    assert "its size is written in the code" in note
    bevel.verify_pruning(net, bevel.prune(net, plan), plan, EXAMPLE)


def test_a_width_that_the_network_asserts_is_protected():
    class Asserting(Projection):
        def forward(self, x):
            assert self.a(self.stem(x)).shape[1] == 24, "a must be 24 wide"
            return super().forward(x)

    net = randomise(Asserting())
    plan = plan_for(net, allocate="uniform", budget={"macs": 0.8})
    assert any(note.startswith("a.0") and "must be 24 wide" in note for note in plan.notes)
    bevel.verify_pruning(net, bevel.prune(net, plan), plan, EXAMPLE)


def test_unreachable_budget_says_what_can_be_reached_and_why():
    with pytest.raises(
        PruningError, match=r"asked for macs <= 1%, but only macs \d+\.\d% can be"
    ) as info:
        plan_for(randomise(Plain()), budget={"macs": 0.01})
    assert "network output" in str(info.value)


def test_group_without_a_batch_norm_is_kept_and_noted_by_bn_scale():
    plan = plan_for(randomise(Plain()), criterion="bn_scale", budget={"macs": 0.7})
    assert any("has nothing to score" in note and note.startswith("head.0") for note in plan.notes)


def test_t_sensitive_cuts_what_does_not_matter_and_spares_what_does():
    net = randomise(Plain())
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        net.head[0].weight[8:] = 0  # three quarters of head.0 say nothing
        net.head[0].bias[8:] = -1
        net.head[2].weight *= 20
        labels = net(images).argmax(1)
    request = {"align": 1, "budget": {"params": 0.75}}
    plan = plan_for(net, allocate="t_sensitive", calibration=[(images, labels)], **request)
    widths = {g.name: g.after / g.before for g in plan.groups}
    assert plan.after.params <= 0.75 * plan.before.params
    assert widths.pop("head.0") < min(widths.values())


def test_t_sensitive_without_images_is_refused():
    with pytest.raises(PruningError, match="'t_sensitive' measures on held-out images"):
        plan_for(Plain(), allocate="t_sensitive")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"ratio": 0.5, "budget": {"macs": 0.5}}, "either ratio"),
        ({"ratio": 1.5, "budget": None}, "ratio is 1.5"),
        ({"budget": {}}, "budget is empty"),
        ({"budget": {"mac": 0.5}}, "no budget called 'mac'"),
        ({"budget": {"macs": 0.0}}, "expected a share above 0"),
        ({"budget": {"macs": "50 kb"}}, "the macs budget is 50 kb, expected a share"),
        ({"budget": {"latency_ms": 0.5}}, "is measured on a target"),
        ({"budget": None}, "or ratios by layer"),
        ({"align": 0}, "align is 0"),
    ],
)
def test_contradicting_requests_are_one_line(request_, message):
    with pytest.raises(PruningError, match=message):
        plan_for(Plain(), **request_)


# -- plans as data --------------------------------------------------------------------------


def test_plan_replays_on_a_fresh_network_and_survives_json(tmp_path):
    net = randomise(Concat())
    plan = plan_for(net)
    plan.save(tmp_path / "plan.json")
    again = PruningPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert torch.equal(prune(net, again)(EXAMPLE), prune(net, plan)(EXAMPLE))


def test_saved_network_reloads_from_the_factory(tmp_path):
    net = randomise(Shared())
    plan = plan_for(net, budget={"macs": 0.7})
    pruned = bevel.prune(net, plan)
    bevel.save_pruned(pruned, plan, tmp_path / "x.safetensors")
    loaded = bevel.load_pruned(Shared, tmp_path / "x.safetensors")
    expected, got = pruned.eval()(EXAMPLE), loaded(EXAMPLE)
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize("network", [Plain, Projection, Grouped, Concat])
def test_plans_compose(network):
    net = randomise(network())
    first = plan_for(net, budget={"macs": 0.8}, align=2)
    once = prune(net, first)
    second = plan_for(once, budget={"macs": 0.7}, align=1)
    both = first.then(second)
    assert torch.equal(prune(once, second)(EXAMPLE), prune(net, both)(EXAMPLE))
    bevel.verify_pruning(net, prune(net, both), both, EXAMPLE)


def test_malformed_plans_are_one_line(tmp_path):
    net = randomise(Plain())
    plan = plan_for(net)
    name = "features.0.0.weight"
    cut = plan.tensors[name]

    def changed(**tensors):
        return plan.model_copy(update={"tensors": {**plan.tensors, **tensors}})

    cases = {
        "which this network does not have": changed(nothing=cut),
        "of shape": changed(**{name: TensorCut(shape=[1, 2, 3, 3], keep={})}),
        "out of range": changed(**{name: TensorCut(shape=cut.shape, keep={0: "0-99"})}),
        "not ascending": changed(**{name: TensorCut(shape=cut.shape, keep={0: "5,3"})}),
        "not a run of indices": changed(**{name: TensorCut(shape=cut.shape, keep={0: "a-b"})}),
        "cuts dimension 7": changed(**{name: TensorCut(shape=cut.shape, keep={7: "0"})}),
        "sets stem.front": plan.model_copy(update={"attributes": {"stem": {"front": 3}}}),
    }
    for message, bad in cases.items():
        with pytest.raises(PruningError, match=message) as info:
            prune(net, bad)
        assert "\n" not in str(info.value)
    with pytest.raises(PruningError, match="already pruned"):
        prune(prune(net, plan), plan)
    (tmp_path / "cut.json").write_text(plan.model_dump_json()[:100])
    with pytest.raises(PruningError, match="is not a pruning plan"):
        PruningPlan.load(tmp_path / "cut.json")
    with pytest.raises(PruningError, match="cannot read the pruning plan"):
        PruningPlan.load(tmp_path / "absent.json")


def test_the_proof_fails_for_a_wrong_network_and_names_the_group():
    from bevel.core.errors import ProofError

    net = randomise(Plain())
    plan = plan_for(net)
    wrong = prune(net, plan)
    with torch.no_grad():
        wrong.head[2].bias += 1e-6
    with pytest.raises(ProofError, match="differs from its masked original by"):
        bevel.verify_pruning(net, wrong, plan, EXAMPLE)


def test_random_inputs_that_the_original_cannot_run_are_skipped_and_named():
    class Cropping(nn.Module):
        """Takes an image and a box, a float tensor of (left, width) as shares of the image."""

        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x, box):
            if not bool(((box >= 0) & (box <= 1)).all()):
                raise ValueError("the box lies outside the image")
            return self.head(self.body(x).relu())

    net = randomise(Cropping())
    inputs = (EXAMPLE, torch.tensor([0.25, 0.5, 0.1, 0.9]))
    plan = bevel.plan_pruning(net, inputs, budget={"macs": 0.6}, align=4)
    proof = bevel.verify_pruning(net, bevel.prune(net, plan), plan, inputs)
    assert proof.passed
    assert proof.inputs == 1
    assert len(proof.skipped) == 2
    assert "the box lies outside the image" in proof.skipped[0]


# -- index arithmetic -----------------------------------------------------------------------


@given(st.sets(st.integers(0, 300)))
def test_runs_are_the_inverse_of_indices(kept):
    assert indices(runs_of(sorted(kept))).tolist() == sorted(kept)


@settings(max_examples=60, deadline=None)
@given(
    network=st.sampled_from(ALL),
    seed=st.integers(0, 10_000),
    share=st.floats(0.0, 0.9),
)
def test_any_admissible_choice_of_channels_is_exact(network, seed, share):
    """Random masks over every group, not only what a criterion would choose."""
    net = randomise(network(), seed)
    analysis = analyze(net, EXAMPLE)
    random = np.random.default_rng(seed)
    keep = {}
    for index, group in enumerate(analysis.groups):
        if group.frozen is None and not (network is HardWired and group.name == "features.2.0"):
            ranked = rank(index, group, random.random(group.size), 1)
            keep[index] = ranked.keep_mask(
                max(1, round(ranked.size * (1 - share * random.random())))
            )
    plan = make_plan(analysis, keep)
    pruned = prune(net, plan)
    assert max(compare(mask(net, plan), pruned, [(EXAMPLE,)])) < 1e-12
    assert analyze(pruned, EXAMPLE).cost() == plan.after


@given(
    blocks=st.integers(1, 4),
    width=st.integers(1, 20),
    align=st.integers(1, 16),
    wanted=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_rounding_keeps_at_least_what_was_wanted_and_the_best(blocks, width, align, wanted, seed):
    from bevel.graph.couplings import ChannelGroup

    size = blocks * width
    layout = np.arange(size).reshape(blocks, width) if blocks > 1 else None
    group = ChannelGroup("g", size, (), layout, None)
    scores = np.random.default_rng(seed).random(size)
    ranked = rank(0, group, scores, align)
    kept = ranked.fit(wanted * ranked.size)
    assert kept >= wanted * ranked.size - 1e-6
    assert kept == ranked.size or kept * blocks % align == 0
    mask_ = ranked.keep_mask(kept)
    assert mask_.sum() == kept * blocks
    for block in layout if layout is not None else [np.arange(size)]:
        assert mask_[block].sum() == kept
        if 0 < kept < len(block):
            assert scores[block][mask_[block]].min() >= scores[block][~mask_[block]].max()


def test_shared_parameters_stay_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = (
                nn.Conv2d(3, 16, 1),
                nn.Conv2d(16, 16, 1),
                nn.Conv2d(16, 16, 1),
            )
            self.b.weight = self.a.weight
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x):
            return self.head(self.b(self.a(self.stem(x))))

    net = Tied().eval()
    plan = plan_for(net, budget={"macs": 0.6})
    pruned = prune(net, plan)
    for result in (pruned, prune(copy.deepcopy(net), plan, inplace=True)):
        assert result.a.weight is result.b.weight
        assert result.a.in_channels == result.b.in_channels < 16
        bevel.verify_pruning(net, result, plan, EXAMPLE)
    assert copy.deepcopy(pruned)(EXAMPLE).shape == (2, 4, 8, 8)


def total(net: nn.Module) -> torch.Tensor:
    return sum(leaf.square().sum() for leaf in tree_leaves(net(EXAMPLE)))


@pytest.mark.parametrize("network", ALL)
def test_in_place_gives_the_same_network_of_the_same_parameters(network):
    net = randomise(network())
    plan = plan_for(net, budget={"macs": 0.7})
    expected = prune(net, plan)
    before = dict(net.named_parameters())
    total(net).backward()
    assert prune(net, plan, inplace=True) is net
    state, wanted = net.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())
    assert torch.equal(total(net), total(expected))
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    held = sum(p.untyped_storage().nbytes() for p in net.parameters())
    assert held == sum(p.numel() * p.element_size() for p in expected.parameters())
    total(net.train()).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


def test_in_place_shrinks_what_refers_to_the_parameters():
    net = nn.Sequential(nn.Conv1d(3, 16, 1), Rows(), nn.LSTM(16, 8, batch_first=True)).eval()
    x = torch.randn(2, 3, 5)
    plan = bevel.plan_pruning(net, x, ratio=0.4, align=1)
    expected = prune(net, plan)
    prune(net, plan, inplace=True)
    assert net[2].input_size < 16
    assert torch.equal(net(x)[0], expected(x)[0])


class Rows(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_a_plan_that_does_not_fit_changes_nothing_in_place():
    net = randomise(Plain())
    plan = plan_for(net)
    name = list(plan.tensors)[-1]
    plan.tensors[name].shape[0] += 1
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(PruningError, match=name):
        prune(net, plan, inplace=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_a_large_tensor_is_cut_in_pieces_as_in_one():
    from bevel.pruning.apply import PIECE, cut_tensor

    rows, columns = np.arange(0, 40, 3), np.r_[0:7, 9:31:2, 60:700]
    tensor = torch.randn(40, 800, PIECE // 4000)
    cut = TensorCut(shape=list(tensor.shape), keep={0: runs_of(rows), 1: runs_of(columns)})
    assert PIECE // tensor[0].numel() < len(rows)
    assert torch.equal(cut_tensor(tensor, cut), tensor[rows][:, columns])


def test_a_copy_keeps_what_modules_share_and_refer_to():
    from bevel.graph.copying import copy_with

    class Child(nn.Module):
        def __init__(self, parent, cache):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.cache, self.up = cache, [parent]  # a list, so that torch does not register it

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            cache = {}
            self.a, self.b = Child(self, cache), Child(self, cache)
            self.c = self.a
            self.attention = nn.MultiheadAttention(4, 2)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.register_buffer("steps", torch.zeros(1))

    net = Parent()
    replaced = nn.Parameter(torch.zeros(2, 4))
    new = copy_with(net, {id(net.a.lin.weight): replaced})
    assert type(new) is Parent
    assert new is not net
    assert new.a.lin.weight is replaced
    assert new.c is new.a
    assert new.a.up[0] is new
    assert new.a.cache is new.b.cache is not net.a.cache
    assert new.b.lin.weight is not net.b.lin.weight
    assert new.a._forward_hooks is not net.a._forward_hooks
    assert torch.equal(new.normed.weight, net.normed.weight)
    assert new.normed.parametrizations is not net.normed.parametrizations
    assert new.steps is not net.steps
    assert new.attention(*[torch.ones(1, 1, 4)] * 3)[0].shape == (1, 1, 4)


def test_padded_resnet_prunes_its_residual_stream():
    from bevel.models import build

    net = randomise(build("bevel:resnet20"))
    example = torch.randn(2, 3, 32, 32)
    plan = bevel.plan_pruning(net, example, budget={"macs": 0.4}, align=4, allocate="uniform")
    pruned = bevel.prune(net, plan)
    bevel.verify_pruning(net, pruned, plan, example)
    cut = {g.name: g.after for g in plan.groups if g.after < g.before}
    assert "conv1" in cut
    fronts = {name for name, values in plan.attributes.items() if "front" in values}
    assert len(fronts) == 2


class Masking(nn.Module):
    """Leaves out random places in eval mode too, as masked autoencoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(len(x), 1, *x.shape[2:]) > 0.5
        return self.second(self.first(x).relu() * kept)


def test_a_network_that_draws_random_numbers_is_proven_and_leaves_the_users_alone():
    net, image = Masking().eval(), torch.randn(2, 3, 8, 8)
    plan = bevel.plan_pruning(net, image, criterion="l2", ratio=0.5, align=4)
    before = torch.get_rng_state()
    proof = bevel.verify_pruning(net, bevel.prune(net, plan), plan, image)
    assert proof.passed and not proof.unproven
    assert torch.equal(torch.get_rng_state(), before)
