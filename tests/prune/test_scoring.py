"""Scores of channel groups, against numbers computed by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from bevel.core.errors import PruningError
from bevel.graph.couplings import Analysis, Axis, ChannelGroup, analyze
from bevel.pruning.criteria import PIECE, means, sums
from bevel.pruning.members import role_of
from bevel.pruning.scoring import REDUCTIONS, score_groups


def small() -> nn.Sequential:
    """One group of two channels: filters of norm 3 and 1, scales 2 and 4, inputs of 1 and 2."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 4, 1)
    )
    with torch.no_grad():
        net[0].weight[:, 0, 0, 0] = torch.tensor([3.0, -1.0])
        net[1].weight[:] = torch.tensor([-2.0, 4.0])
        net[3].weight[:, 0] = torch.tensor([0.5, -0.5, 0.5, 0.5]).reshape(
            4, 1, 1
        )  # norm 1, mean .5
        net[3].weight[:, 1] = torch.tensor([1.0, 1.0, -1.0, -1.0]).reshape(
            4, 1, 1
        )  # norm 2, mean 1
    return net.eval()


def scores(net: nn.Module, example: torch.Tensor, group: str, criterion: str, **more) -> np.ndarray:
    analysis = analyze(net, example)
    names = [g.name for g in analysis.groups]
    return score_groups(net, analysis, criterion, **more)[names.index(group)]


# Filters divided by their mean: 3/2, 1/2. Inputs: 1/1.5, 2/1.5 (l1: 2/3, 4/3, the same).
MEAN = [(1.5 + 2 / 3) / 2, (0.5 + 4 / 3) / 2]
ROOT = [math.sqrt(1.5 * 2 / 3), math.sqrt(0.5 * 4 / 3)]
BY_HAND = {
    ("l2", "mean"): MEAN,
    ("l2", "max"): [1.5 / (17 / 12), (4 / 3) / (17 / 12)],
    ("l2", "product"): [2 * value / sum(ROOT) for value in ROOT],
    ("l2", "first"): [1.5, 0.5],
    ("l1", "mean"): MEAN,
    ("mean_weight", "mean"): [(3 + 0.5) / 2, (1 + 1) / 2],  # comparable: nothing is divided
    ("mean_weight", "max"): [3, 1],
    ("mean_weight", "product"): [math.sqrt(3 * 0.5), 1],
    ("mean_weight", "first"): [3, 1],
    ("bn_scale", "mean"): [2, 4],
    ("bn_scale", "first"): [2, 4],
}


@pytest.mark.parametrize(("criterion", "reduction"), BY_HAND)
def test_reductions_by_hand(criterion, reduction):
    found = scores(small(), torch.ones(1, 1, 2, 2), "0", criterion, reduction=reduction)
    assert found == pytest.approx(BY_HAND[criterion, reduction], rel=1e-6)


def test_every_reduction_is_tested():
    assert {reduction for _, reduction in BY_HAND} == set(REDUCTIONS)


def test_a_channel_that_nothing_reads_goes_first_by_product_and_can_stay_by_max():
    net = small()
    with torch.no_grad():
        net[3].weight[:, 0] = 0
    example = torch.ones(1, 1, 2, 2)
    assert scores(net, example, "0", "l2", reduction="product")[0] == 0
    assert np.argmax(scores(net, example, "0", "l2", reduction="max")) == 1  # 2 to 1.5
    assert np.argmin(scores(net, example, "0", "l2", reduction="mean")) == 0


def test_groups_are_comparable_whatever_their_units():
    """Scaling a layer changes none of the scores of criteria that are divided by the mean."""
    net, example = small(), torch.ones(1, 1, 2, 2)
    for reduction in REDUCTIONS:
        before = scores(net, example, "0", "l2", reduction=reduction)
        assert before.mean() == pytest.approx(1)
        with torch.no_grad():
            net[0].weight *= 1e4
        assert scores(net, example, "0", "l2", reduction=reduction) == pytest.approx(before)


def test_a_reduction_that_does_not_exist_is_one_line():
    net = small()
    with pytest.raises(PruningError, match=r"no reduction called 'maximum'\. Did you mean 'max'"):
        score_groups(net, analyze(net, torch.ones(1, 1, 2, 2)), "l2", reduction="maximum")


def test_weights_that_are_not_finite_are_named():
    net = small()
    with torch.no_grad():
        net[0].weight[0] = math.nan
    with pytest.raises(PruningError, match="scores for 0 that are not finite"):
        score_groups(net, analyze(net, torch.ones(1, 1, 2, 2)), "l2")


# -- members of other shapes ----------------------------------------------------------------


class Bare(nn.Module):
    """A module whose tensors a test gives groups of its own."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


def score_one(net: nn.Module, *axes: Axis, size: int, runs: bool = False, **request) -> np.ndarray:
    group = ChannelGroup("g", size, axes, None, None, None, runs)
    request = {"criterion": "mean_weight", **request}
    return score_groups(net, Analysis((group,), (), (), (), (), {}), **request)[0]


def test_a_run_has_the_mean_of_all_its_rows():
    """Two heads of two channels each, in a q, k, v weight; the last row belongs to no head."""
    net = Bare(in_proj_weight=torch.tensor([1.0, 3, 5, 7, 10, 20, 30, 40, 99]).repeat(2, 1).T)
    units = np.array([0, 0, 1, 1, 0, 0, 1, 1, -1])
    found = score_one(net, Axis("in_proj_weight", 0, units), size=2, runs=True)
    assert found == pytest.approx([(1 + 3 + 10 + 20) / 4, (5 + 7 + 30 + 40) / 4])


def test_a_grouped_axis_is_another_channel_in_each_block():
    conv = nn.Conv2d(4, 4, 1, groups=2, bias=False)  # (4, 2, 1, 1): two filters to a block
    with torch.no_grad():
        conv.weight[:] = torch.tensor([[1.0, 2], [3, 4], [10, 20], [30, 40]]).reshape(4, 2, 1, 1)
    axis = Axis("weight", 1, np.array([[0, 1], [2, 3]]))
    assert score_one(conv, axis, size=4) == pytest.approx([2, 3, 20, 30])


def test_the_four_gates_of_a_recurrent_layer_count_alike():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lstm, self.head = (
                nn.Embedding(9, 3), nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
            )  # fmt: skip

        def forward(self, tokens):
            return self.head(self.lstm(self.embed(tokens))[0])

    net = Net().eval()
    tokens = torch.zeros(2, 5, dtype=torch.long)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1)
        net.lstm.weight_ih_l0[[1, 5, 9, 13]] = 3  # unit 1 in each gate
        net.embed.weight[:, 2] = 5
    assert scores(net, tokens, "lstm", "mean_weight", reduction="max").tolist() == [1, 3, 1, 1]
    assert np.argmax(scores(net, tokens, "embed.weight", "l2")) == 2


def test_a_parametrised_weight_is_scored_as_it_is_used():
    """The direction's length means nothing: the norm of a filter is |g|."""
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].parametrizations.weight.original0[:] = torch.tensor([[1.0], [2], [3], [4]])
        net[0].parametrizations.weight.original1[0] *= 1e3
    group = "0.parametrizations.weight"
    found = scores(net, torch.ones(2, 3), group, "l2", reduction="first")
    assert found == pytest.approx([0.4, 0.8, 1.2, 1.6])
    both = scores(net, torch.ones(2, 3), group, "l2")  # its two parts are one member
    reads = net[2].weight.detach().norm(dim=0).numpy()
    assert both == pytest.approx((found + reads / reads.mean()) / 2, rel=1e-5)


def test_spectral_norm_keeps_its_state():
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    net.train()
    analysis = analyze(net, torch.ones(2, 3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    score_groups(net, analysis, "l2")
    assert net.training and net[0].training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_position_embeddings_count_only_where_nothing_else_does():
    net = Bare(pos_embed=torch.tensor([[[1.0, 2]]]), proj=torch.tensor([[5.0, 5], [7, 7]]))
    position, weight = Axis("pos_embed", 2, np.array([0, 1])), Axis("proj", 0, np.array([0, 1]))
    assert score_one(net, position, weight, size=2).tolist() == [5, 7]
    assert score_one(net, position, size=2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("module", "leaf", "roles"),
    [
        (nn.Linear(3, 4), "weight", ["filter", "input"]),
        (nn.Linear(3, 4), "bias", ["bias"]),
        (nn.Conv1d(3, 4, 5), "weight", ["filter", "input", "other"]),
        (nn.ConvTranspose2d(3, 4, 5), "weight", ["input", "filter", "other", "other"]),
        (nn.Embedding(3, 4), "weight", ["input", "filter"]),
        (nn.LSTM(3, 4), "weight_hh_l0", ["filter", "input"]),
        (nn.LSTM(3, 4), "bias_hh_l0", ["bias"]),
        (nn.GRUCell(3, 4), "weight_ih", ["filter", "input"]),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", ["filter", "input"]),
        (nn.MultiheadAttention(4, 2), "in_proj_bias", ["bias"]),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=3), "k_proj_weight", ["filter", "input"]),
        (nn.Bilinear(3, 4, 5), "weight", ["filter", "input", "input"]),
        (nn.BatchNorm2d(3), "weight", ["norm"]),
        (nn.BatchNorm2d(3), "running_mean", [None]),
        (nn.RMSNorm(3), "weight", ["norm"]),
        (nn.PReLU(3), "weight", ["other"]),
        (Bare(gamma=torch.ones(3)), "gamma", ["other"]),
        (Bare(cls_token=torch.ones(1, 1, 3)), "cls_token", ["other"] * 3),
        (Bare(pos_embedding=torch.ones(2, 3)), "pos_embedding", ["other"] * 2),
        (Bare(kernel=torch.ones(2, 3)), "kernel", ["filter", "input"]),
    ],
)
def test_roles(module, leaf, roles):
    tensor = getattr(module, leaf)
    assert [role_of(module, leaf, tensor, dim) for dim in range(tensor.ndim)] == roles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("over", [(0,), (1,), (0, 2), (1, 2), (2,)])
def test_sums_go_through_a_weight_in_pieces(over, dtype):
    weight = torch.randn(300, PIECE // 1000, 9).to(dtype)
    expected = weight.double().square().sum(over)
    assert torch.allclose(sums(weight, over, torch.square), expected, rtol=1e-5)
    count = weight.numel() / expected.numel()
    assert torch.allclose(means(weight, over, torch.square), expected / count, rtol=1e-5)
