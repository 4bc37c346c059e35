"""A pass recorded without its arithmetic says what one in earnest says."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bevel
from bevel.core.errors import ModelError
from bevel.graph import deferred
from bevel.graph import record as recording
from bevel.graph.holding import holding
from bevel.graph.record import record
from bevel.graph.recording import Recording, Value
from bevel.graph.unknown import aten, looks, zeros


def both(net: nn.Module, inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """The recording as it is made, and in earnest."""
    with monkeypatch.context() as patch:
        patch.setattr(recording, "zeros", lambda *_: None)
        earnest = record(net, inputs)
    return [record(net, inputs), earnest]


def outline(recorded: Recording) -> list[tuple[str, list[tuple[int, ...]]]]:
    return [
        (call.name, [value.shape for value in call.outputs if isinstance(value, Value)])
        for call in recorded.calls
    ]


@pytest.mark.parametrize(
    "net",
    [
        lambda: torchvision.models.resnet18(),
        lambda: torchvision.models.mobilenet_v3_small(),
        lambda: torchvision.models.shufflenet_v2_x0_5(),
        lambda: timm.create_model("vit_tiny_patch16_224"),
        lambda: timm.create_model("convnext_atto"),
    ],
    ids=["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "vit_tiny", "convnext_atto"],
)
def test_the_same_operators_and_shapes(net, monkeypatch):
    guessed, computed = both(net().eval(), torch.randn(2, 3, 224, 224), monkeypatch)
    assert outline(guessed) == outline(computed)


SHAPES = [(2, 6, 8, 8), (1, 6, 5, 7), (6, 4)]


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("stride, padding, dilation", [(1, 0, 1), (2, 1, 1), ((1, 2), (2, 0), 2)])
def test_convolutions_have_the_size_that_torch_gives(shape, groups, stride, padding, dilation):
    net = nn.Conv2d(6, 12, 3, stride, padding, dilation, groups)
    arguments = (
        torch.randn(shape), net.weight, net.bias, net.stride, net.padding, net.dilation, False,
        (0, 0), groups,
    )  # fmt: skip
    guess = zeros(aten.convolution.default, arguments, {})
    real = aten.convolution.default(*arguments)
    assert guess.shape == real.shape
    assert guess.stride() == real.stride()
    assert not guess.any()


def laid_out(shape: tuple[int, ...], how: str) -> Tensor:
    """Larger than what has memory of its own, and laid out in one of four ways."""
    x = torch.randn(shape)
    if how == "last":
        return x.to(memory_format=torch.channels_last)
    if how == "turned":
        return torch.randn(shape[0], *shape[:0:-1]).permute(0, 3, 2, 1)
    return torch.randn(*shape[:3], shape[3] + 1)[..., 1:] if how == "gaps" else x


ONE = [
    (aten.max_pool2d_with_indices.default, ([3, 3], [2, 2], [1, 1])),
    (aten.max_pool2d_with_indices.default, ([2, 2],)),
    (aten.max_pool2d_with_indices.default, ([3, 2], [2, 1], [1, 0], [2, 1])),
    (aten.max_pool2d_with_indices.default, ([3, 3], [2, 2], [0, 0], [1, 1], True)),
    (aten.avg_pool2d.default, ([3, 3], [1, 1], [1, 1])),
    (aten.avg_pool2d.default, ([2, 3], [], [0, 0], True)),
    (aten.constant_pad_nd.default, ([1, 2, 0, 3], 1.0)),
    (aten.constant_pad_nd.default, ([-1, 1, -1, 1],)),
    (aten.constant_pad_nd.default, ([0, 0, 0, 0, 2, 1],)),
    (aten.relu.default, ()),
    (aten.clone.default, ()),
    (aten._softmax.default, (1, False)),
]


@pytest.mark.parametrize("how", ["contiguous", "last", "turned", "gaps"])
@pytest.mark.parametrize("operator, arguments", ONE)
def test_guesses_are_laid_out_as_torch_lays_results_out(operator, arguments, how):
    x = laid_out((2, 8, 40, 30), how)
    guess, real = zeros(operator, (x, *arguments), {}), operator(x, *arguments)
    if guess is None:  # left to torch
        assert how != "contiguous" or (len(arguments) > 3 and arguments[-1])
        return
    pairs = zip(guess, real, strict=True) if isinstance(real, tuple) else [(guess, real)]
    for ours, theirs in pairs:
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.stride() == theirs.stride()
        assert not ours.any()


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("first", ["contiguous", "last", "turned", "gaps"])
@pytest.mark.parametrize("second", ["contiguous", "last", "turned", "gaps"])
def test_what_is_put_together_is_laid_out_as_torch_does(first, second, dim):
    parts = [laid_out((2, 8, 40, 30), how) for how in (first, second)]
    guess, real = zeros(aten.cat.default, (parts, dim), {}), torch.cat(parts, dim)
    if guess is None:
        assert "last" in (first, second) or "turned" in (first, second)
        return
    assert guess.shape == real.shape
    assert guess.stride() == real.stride()


def test_parts_that_do_not_fit_are_left_to_torch():
    x = torch.randn(2, 8, 40, 30)
    for other in (torch.randn(2, 8, 40, 31), torch.randn(8, 40, 30), x.double(), torch.empty(0)):
        assert zeros(aten.cat.default, ([x, other], 1), {}) is None
    assert zeros(aten.cat.default, ([x, x], 4), {}) is None
    assert zeros(aten.avg_pool2d.default, (x, [50, 50]), {}) is None
    assert zeros(aten.avg_pool2d.default, (x, [3, 3], [1, 1], [2, 2]), {}) is None
    assert zeros(aten.constant_pad_nd.default, (x, [-30, 0]), {}) is None


class Writing(nn.Module):
    """Writes to an activation, and to a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).fill_(1.0)
        marked = self.conv(x[:, :3])
        marked[:, 1:].fill_(1.0)
        return marked


def test_what_a_network_writes_does_not_show_in_other_guesses():
    x = torch.randn(1, 3, 64, 64)
    convolution = (x, torch.randn(8, 3, 3, 3), None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    before = zeros(aten.convolution.default, convolution, {})
    recorded = record(Writing().eval(), x)
    assert [call.name for call in recorded.calls].count("aten.fill_") == 2
    assert not before.any()
    assert not zeros(aten.convolution.default, convolution, {}).any()


def test_what_does_not_fit_is_left_to_torch():
    x, weight = torch.randn(1, 4, 8, 8), torch.randn(8, 3, 3, 3)
    arguments = (x, weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    assert zeros(aten.convolution.default, arguments, {}) is None
    assert zeros(aten.mm.default, (torch.randn(2, 3), torch.randn(4, 2)), {}) is None
    assert zeros(aten.add.Tensor, (torch.randn(2, 3), torch.randn(4)), {}) is None
    assert zeros(aten.add.Tensor, (torch.randn(2), torch.randn(2).double()), {}) is None
    assert zeros(aten.add.Tensor, (torch.arange(2), torch.arange(2)), {}) is None


def test_only_masks_are_looked_at_among_indices():
    x, mask, places = torch.randn(4), torch.ones(4).bool(), torch.tensor([1])
    assert looks(aten.index.Tensor, (x, [mask]), lambda _: True)
    assert not looks(aten.index.Tensor, (x, [places]), lambda _: True)
    assert looks(aten.nonzero.default, (x,), lambda _: True)
    assert looks(torch.ops.torchvision.nms.default, (x, x, 0.5), lambda _: True)


class Looking(nn.Module):
    """Takes another way where the activations are all zero, as they are where nobody looks."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.more = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "item" and x.abs().sum().item() > 0:
            x = self.more(x)
        if self.how == "bool" and (x != 0).any():
            x = self.more(x)
        if self.how == "list" and max(x.flatten().tolist()) > 0:
            x = self.more(x)
        if self.how == "numpy" and np.any(x.numpy()):
            x = self.more(x)
        if self.how == "mask":
            return x[x != 0]
        return x


@pytest.fixture
def no_second_pass(monkeypatch):
    """A pass that cannot be recorded at the first attempt fails."""
    once = recording._record

    def first(net, inputs, operators):
        assert not operators.earnest
        return once(net, inputs, operators)

    monkeypatch.setattr(recording, "_record", first)


@pytest.mark.parametrize("how", ["item", "bool", "list", "numpy", "mask"])
@pytest.mark.usefixtures("no_second_pass")
def test_a_network_that_looks_sees_what_it_has_computed(how):
    net, x = Looking(how).eval(), torch.randn(1, 3, 8, 8)
    recorded = record(net, x)
    with torch.no_grad():
        assert recorded.outputs[0].shape == net(x).shape
    if how != "mask":
        assert [call.name for call in recorded.calls].count("aten.convolution") == 2


SIDE = 4


class Program(nn.Module):
    """Steps drawn at random on a growing list of tensors, some of which share memory.

    `seen` is what it has looked at.
    """

    def __init__(self, steps: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.linear, self.conv = nn.Linear(SIDE, SIDE), nn.Conv2d(1, 1, 1)
        self.seen: list[object] = []

    def forward(self, x: Tensor) -> Tensor:
        seen: list[object] = []
        tensors = [x, self.linear(x), torch.ones(SIDE, SIDE)]
        for step, first, second in self.steps:
            a, b = tensors[first % len(tensors)], tensors[second % len(tensors)]
            self.do(step, a, b, tensors, seen)
        self.seen = seen
        return tensors[-1].sum()

    def do(self, step: int, a: Tensor, b: Tensor, tensors: list[Tensor], seen: list) -> None:
        match step:
            case 0:
                tensors.append(self.linear(a))
            case 1:
                tensors.append(torch.relu(a) - b)
            case 2:
                tensors.append(a.t())
            case 3:
                tensors.append(a[1:].view(-1, SIDE).expand(SIDE - 1, SIDE)[:1] + b)
            case 4:
                a.mul_(0.5)
            case 5 if a.data_ptr() != b.data_ptr() or a is b:
                a.add_(b.clone())
            case 6:
                a[1] = b[2].clone()
            case 7:
                tensors.append(torch.full((SIDE, SIDE), 2.0))
            case 8:
                tensors.append(tensors[2].t())  # of what was known at first
            case 9:
                seen.append(a.sum().item())
            case 10:
                seen.append(a.tolist())
            case 11:
                seen.append(int((a > 0).nonzero().shape[0]))
            case 12:
                tensors.append(torch.zeros(SIDE, SIDE) + a[a > b].sum())
            case 13:
                a[b > 0] = 1.0
            case 14:
                tensors.append(torch.cat([a, b])[torch.argsort(a[:, 0])])
            case 15:
                a.copy_(b.double())
            case 16:
                self.conv.weight.mul_(0.5)
            case 17:
                tensors.append(self.conv(a[None, None])[0, 0])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.integers(0, 17), st.integers(0, 12), st.integers(0, 12)),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from([0, deferred.FEW]),
)
@example(
    [(8, 0, 0), (1, 0, 3), (5, 2, 1), (9, 2, 0), (9, 4, 0)], 0
)  # reads a view of what is written to
@example([(1, 0, 2), (4, 2, 0), (9, 3, 0)], 0)  # a constant
@example([(17, 0, 0), (16, 0, 0), (9, 3, 0)], 0)  # a weight
def test_whatever_a_network_looks_at_is_right(steps, few):
    torch.manual_seed(0)
    net, x = Program(steps).eval(), torch.randn(SIDE, SIDE)
    weights = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net(x.clone())
    expected = net.seen
    net.load_state_dict(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferred, "FEW", few)
        recording._record(net, x.clone(), recording._Operators(net, earnest=False))
    for ours, theirs in zip(net.seen, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "small"),
    [
        ("ssdlite320_mobilenet_v3_large", {}),
        ("keypointrcnn_resnet50_fpn", {"min_size": 160, "max_size": 160}),
    ],
)
@pytest.mark.usefixtures("no_second_pass")
def test_detectors_are_recorded_at_once(build, small, monkeypatch):
    torch.manual_seed(0)
    net = getattr(torchvision.models.detection, build)(
        weights=None, weights_backbone=None, **small
    ).eval()
    image = [torch.rand(3, 160, 160)]
    guessed = record(net, (image,))
    earnest = recording._Operators(net, earnest=True)
    monkeypatch.undo()
    assert outline(guessed) == outline(recording._record(net, (image,), earnest))


class Scoring(nn.Module):
    """Looks at one head's answer; writes that of another head into a table, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.score = nn.Linear(4, 4), nn.Linear(4, 1)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        best = int(self.score(x).argmax().item())
        answers, table = self.head(x), torch.zeros(3, 2)
        for row in range(3):
            table[row] = answers[best] * row
        return table


def test_what_nobody_looks_at_is_not_computed():
    net = Scoring().eval()
    operators = recording._Operators(net, earnest=False)
    ran: list[str] = []
    once = deferred.Deferred._run

    def run(self, position):
        ran.append(self._pending[position].module)
        once(self, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferred.Deferred, "_run", run)
        recording._record(net, torch.randn(5, 4), operators)
    assert set(ran) == {"trunk", "score", ""}


class Keeping(nn.Module):
    """Leaves things behind on its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.seen: list[Tensor] = []
        self.register_buffer("total", torch.zeros(8))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.last = x
        self.seen.append(x)
        return x


def test_nothing_is_left_on_the_modules():
    net = Keeping().eval()
    bevel.analyze(net, torch.randn(1, 3, 8, 8))
    assert net.last is None
    assert net.seen == []


class Counting(Keeping):
    """Writes what it computes into a buffer: that has to be the truth."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.total += x.mean((0, 2, 3))
        return x


def test_a_buffer_is_never_written_with_guesses():
    net, image = Counting().eval(), torch.randn(1, 3, 8, 8)
    record(net, image)
    with torch.no_grad():
        assert torch.allclose(net.total, net.conv(image).mean((0, 2, 3)), atol=1e-6)


class Tables(nn.Module):
    """Indices that are constant, and indices that are computed from the activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        constant = torch.arange(8, device=x.device).flip(0)
        computed = x.mean((0, 2, 3)).argsort()
        return x[:, constant] + x[:, computed]


def test_indices_from_constants_are_known_and_others_are_not():
    recorded = record(Tables().eval(), torch.randn(1, 3, 8, 8))
    flips = [call for call in recorded.calls if call.name == "aten.flip"]
    sorts = [call for call in recorded.calls if call.name in ("aten.argsort", "aten.sort")]
    assert flips[0].output.data.tolist() == list(range(7, -1, -1))
    assert [value.data for value in sorts[0].outputs if value.dtype == torch.int64] == [None]


def test_an_error_of_the_network_is_its_own():
    with pytest.raises(ModelError, match=r"expected input.* to have 3 channels"):
        record(nn.Conv2d(3, 8, 3), torch.randn(1, 4, 8, 8))


def test_what_a_module_holds_is_put_back():
    net = Keeping()
    contents, extra = net.seen, {"a": 1}
    net.extra = extra
    with holding(net):
        net.seen.append(torch.zeros(1))
        net.extra["b"] = 2
        net.extra = {}
        net.new = 1
        net.total = torch.ones(8)
    assert net.seen is contents
    assert contents == []
    assert net.extra is extra
    assert extra == {"a": 1}
    assert not hasattr(net, "new")
    assert not net.total.any()


KEEPS_TABLES = """
import sys
import torch
import bevel
from torch import nn


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
        self.table, self.row = torch.rand(1, 4, 8, 8), torch.rand(1, 8)

    def forward(self, x):
        y = self.outer(self.inner(x).relu())
        return torch.cat([self.table - y, y * self.row, self.table.add(y)], 1)


net, x = Positions().eval(), torch.randn(1, 3, 8, 8)
plan = bevel.plan_pruning(net, x, criterion="l2", ratio=0.5, align=1)
pruned = bevel.prune(net, plan)
proof = bevel.verify_pruning(net, pruned, plan, x)
assert pruned.inner.out_channels == 8 and not proof.unproven, proof
assert not {"torch._dynamo", "sympy"} & set(sys.modules)
"""


def test_tables_beside_the_parameters_do_not_call_torchs_compiler():
    # Its import takes seconds; arithmetic of a meta tensor with one on the CPU would need it.
    subprocess.run([sys.executable, "-c", KEEPS_TABLES], check=True, capture_output=True)
