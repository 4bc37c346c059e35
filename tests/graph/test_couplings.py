"""What hangs together, what cannot go and why, and what it costs."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bevel.core.errors import ModelError
from bevel.graph.couplings import analyze
from bevel.graph.record import record
from networks import ALL, EXAMPLE, Concat, Grouped, Padded, Plain, Projection, Shared, conv


def group(analysis, name):
    return next(g for g in analysis.groups if g.name == name)


def axes(found):
    return {(axis.tensor, axis.dim) for axis in found.axes}


def test_plain_network_couples_filters_norms_and_flattened_inputs():
    analysis = analyze(Plain(), EXAMPLE)
    found = group(analysis, "features.2.0")
    assert axes(found) == {
        ("features.2.0.weight", 0),
        ("features.2.1.weight", 0),
        ("features.2.1.bias", 0),
        ("features.2.1.running_mean", 0),
        ("features.2.1.running_var", 0),
        ("head.0.weight", 1),
    }
    flattened = next(axis for axis in found.axes if axis.tensor == "head.0.weight")
    assert flattened.units.tolist() == np.repeat(np.arange(24), 4).tolist()


def test_projection_ties_both_branches():
    analysis = analyze(Projection(), EXAMPLE)
    found = group(analysis, "b")
    assert {("b.weight", 0), ("b.bias", 0), ("shortcut.weight", 0), ("head.weight", 1)} <= axes(
        found
    )
    assert found.frozen is None


def test_network_input_and_output_are_frozen_with_the_reason():
    frozen = {g.name: g.frozen for g in analyze(Plain(), EXAMPLE).frozen}
    assert frozen["head.2"] == "network output"
    assert "fixed number of channels" in frozen["features.0.0.weight"]


def test_grouped_convolution_keeps_equal_counts_and_depthwise_follows_its_input():
    analysis = analyze(Grouped(), EXAMPLE)
    assert group(analysis, "stem.0").blocks.shape == (4, 4)
    found = group(analysis, "grouped.0")
    assert found.blocks.shape == (4, 8)
    assert ("depthwise.0.weight", 0) in axes(found)
    depthwise = next(axis for axis in found.axes if axis.tensor == "depthwise.0.weight")
    assert depthwise.units.tolist() == np.repeat(np.arange(32), 2).tolist()


def test_concatenation_offsets_and_gate():
    analysis = analyze(Concat(), EXAMPLE)
    joined = next(a for a in group(analysis, "b.0").axes if a.tensor == "mix.0.weight")
    assert joined.units.tolist() == [-1] * 16 + list(range(8)) + [-1] * 3
    gated = axes(group(analysis, "mix.0"))
    assert {("gate.0.weight", 1), ("gate.2.weight", 0), ("head.weight", 1)} <= gated


def test_shared_module_and_transposed_convolution():
    analysis = analyze(Shared(), EXAMPLE)
    stream = axes(group(analysis, "stem.0"))
    assert {("twice.0.weight", 0), ("twice.0.weight", 1), ("up.weight", 0)} <= stream
    assert {g.name for g in analysis.frozen} >= {"one", "two"}
    assert ("up.weight", 1) in axes(
        next(g for g in analysis.groups if ("one.weight", 1) in axes(g))
    )


def test_fixed_padding_freezes_only_what_was_padded():
    analysis = analyze(Padded(), EXAMPLE)
    reasons = {g.name: g.frozen for g in analysis.groups}
    assert reasons["stem.0"] is None
    frozen = [g for g in analysis.frozen if ("a.0.weight", 0) in axes(g)]
    assert [g.size for g in frozen] == [16]
    assert "fixed amount of padding" in frozen[0].frozen


def test_unknown_operator_freezes_what_it_touches_by_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 16), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cummax(self.a(x), dim=1).values)

    found = group(analyze(Odd(), EXAMPLE), "a.0")
    assert found.frozen == "bevel does not know the operator cummax in the network itself"


class Reduced(nn.Module):
    """Joins a reduction over channels to them."""

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.reduce = conv(3, 16), nn.Conv2d(17, 4, 1), reduce

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(torch.cat([x, self.reduce(x)], 1))


@pytest.mark.parametrize(
    "reduce",
    [lambda x: x.mean(1, keepdim=True), lambda x: x.softmax(1).amax(1, keepdim=True)],
    ids=["mean", "softmax"],
)
def test_a_statistic_over_channels_can_be_cut_but_not_proven(reduce):
    found = group(analyze(Reduced(reduce), EXAMPLE), "a.0")
    assert found.frozen is None
    assert "a statistic across it" in found.inexact


def test_a_position_among_channels_freezes_them():
    net = Reduced(lambda x: x.argmax(1, keepdim=True).to(x))
    assert "it is reduced over: argmax" in group(analyze(net, EXAMPLE), "a.0").frozen


def test_a_group_without_statistics_is_exact_and_no_run():
    assert {(g.inexact, g.runs) for g in analyze(Projection(), EXAMPLE).groups} == {(None, False)}


class Heads(nn.Module):
    """Attention whose heads and their channels can go."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 4, 6
        self.qkv, self.proj = nn.Linear(12, 72), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        qkv = self.qkv(x).view(n, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = (q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, length, -1))


def test_heads_are_runs_of_the_channels_within_them():
    analysis = analyze(Heads(), torch.randn(2, 7, 12))
    inner = next(g for g in analysis.prunable if not g.runs)
    heads = next(g for g in analysis.prunable if g.runs)
    assert {("qkv.weight", 0), ("qkv.bias", 0), ("proj.weight", 1)} == axes(inner)
    assert heads.size == 4
    assert heads.blocks is None
    assert {("qkv.weight", 0), ("proj.weight", 1)} <= axes(heads)
    columns = next(axis.units for axis in heads.axes if axis.tensor == "proj.weight")
    assert columns.tolist() == np.repeat(np.arange(4), 6).tolist()
    # q, k and v share the attribute `size`, so that each of them keeps the same channels.
    assert inner.size == 6
    rows = next(axis.units for axis in inner.axes if axis.tensor == "qkv.weight")
    assert (rows.reshape(12, 6) == rows[:6]).all()
    assert {(a.module, a.attribute) for a in analysis.attributes} == {("", "heads"), ("", "size")}


def test_ignored_modules_keep_their_channels():
    analysis = analyze(Plain(), EXAMPLE, ignore=["features.2*"])
    assert group(analysis, "features.2.0").frozen == "ignored on request ('features.2*')"
    assert group(analysis, "features.0.0").frozen is None


@pytest.mark.parametrize("network", ALL)
def test_parameters_are_counted_exactly(network):
    net = network()
    assert analyze(net, EXAMPLE).cost().params == sum(p.numel() for p in net.parameters())


def test_macs_are_per_image_and_counted_by_hand():
    net = Grouped()
    expected = (
        16 * 3 * 9 * 64  # stem, 8x8 positions
        + 32 * 4 * 9 * 64  # 4 groups of 4 channels
        + 64 * 1 * 9 * 64  # depthwise
        + 24 * 64 * 64
        + 24 * 5
    )
    assert analyze(net, EXAMPLE).cost().macs == expected
    assert analyze(net, EXAMPLE[:1]).cost().macs == expected


def test_the_network_is_left_as_it_was():
    net = Concat().train()
    net.gate.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    analyze(net, EXAMPLE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training and net.a.training and not net.gate.training


def test_recording_names_parameters_and_modules():
    calls = record(Plain(), EXAMPLE).calls
    first = next(call for call in calls if call.name == "aten.convolution")
    assert first.module == "features.0.0"
    assert first.arguments[1].name == "features.0.0.weight"
    assert first.outputs[0].shape == (2, 16, 8, 8)


def test_wrong_input_is_one_line_that_says_the_shape():
    with pytest.raises(
        ModelError, match=r"inputs of shape 2x4x8x8: .*check the input shape"
    ) as info:
        analyze(Plain(), torch.zeros(2, 4, 8, 8))
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_network_of_another_precision_than_its_input_is_named_so(kind):
    name = str(kind).removeprefix("torch.")
    message = rf"its weights are {name} and the input float32: call net\.float\(\)"
    with pytest.raises(ModelError, match=message):
        analyze(Plain().to(kind), EXAMPLE)


def test_a_network_that_asserts_its_input_size_is_one_line_too():
    class Asserting(Plain):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] == 8, "expected 8x8"
            return super().forward(x)

    with pytest.raises(ModelError, match="inputs of shape 2x3x16x16: expected 8x8"):
        analyze(Asserting(), torch.zeros(2, 3, 16, 16))
