"""Latency budgets: the table's estimates, the rounds, and what cannot be reached."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import bevel
import bevel.measurement.latency
from bevel.core.errors import MeasurementError, PruningError
from bevel.core.recipe import Target
from bevel.core.records import Operator
from bevel.graph.couplings import analyze
from bevel.measurement.latency import SAMPLES, Latency, measure_table
from bevel.measurement.stopwatch import Stopwatch
from bevel.pipeline.within import ROUNDS, plan_within
from bevel.pruning.allocate import rank_all
from bevel.pruning.plan import make_plan
from bevel.pruning.sensitivity import Sensitivity
from networks import EXAMPLE, Plain, Projection, randomise

TARGET = Target()


def layers(net: nn.Module) -> list[tuple[int, float]]:
    """MACs and milliseconds of each layer: a staircase of 8 channels, and a bit for the call."""
    found = []

    def hook(module, _, output):
        weight = module.weight
        steps = -(-weight.shape[0] // 8) * -(-weight.shape[1] // 8)
        positions = output[0, 0].numel() if output.ndim == 4 else 1
        kernel = weight[0, 0].numel()
        found.append((weight.numel() * positions, 0.002 + 1e-4 * steps * kernel * positions))

    hooks = [
        m.register_forward_hook(hook) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        net(EXAMPLE[:1])
    for one in hooks:
        one.remove()
    return found


class Fake(Stopwatch):
    """A machine whose times are a sum over layers; `whole` says what it takes for the last look."""

    def __init__(self, net, whole=lambda ms: ms, profiler=True):
        super().__init__(net, EXAMPLE, TARGET)
        self.whole, self.profiler, self.compared, self.last = whole, profiler, 0, net

    def about(self):
        return {"target": str(TARGET), "machine": "fake"}

    def compare(self, net, *, seconds=None):
        self.compared += 1
        self.last = net
        before, after = (0.05 + sum(ms for _, ms in layers(n)) for n in (self.original, net))
        final = seconds is None and net is not self.original
        return before, self.whole(after) if final else after

    def operators(self, net):
        if not self.profiler:
            return []
        kernels = [
            Operator(name=str(i), kind="Conv", precision="float32", macs=macs, latency_ms=ms)
            for i, (macs, ms) in enumerate(layers(net))
        ]
        other = Operator(name="other", kind="Other", precision="none", latency_ms=0.05)
        return [*kernels, other]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BEVEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ranked(net, align=1):
    analysis = analyze(net, EXAMPLE)
    scores = {i: np.zeros(g.size) for i, g in enumerate(analysis.groups)}
    return analysis, [g for g in rank_all(analysis, scores, align) if len(g.levels) > 1]


@pytest.mark.parametrize("network", [Plain, Projection])
def test_the_table_tells_the_time_at_widths_that_were_not_measured(network):
    net = randomise(network())
    analysis, groups = ranked(net)
    with Fake(net) as watch:
        latency = Latency(analysis, measure_table(watch, analysis, groups))
        random = np.random.default_rng(1)
        for _ in range(10):
            rows = [int(random.choice(group.levels)) for group in groups]
            keep = {g.index: g.keep_mask(k) for g, k in zip(groups, rows, strict=True)}
            units = analysis.full()
            for index, mask in keep.items():
                units[index] = mask.sum()
            _, truth = watch.compare(bevel.prune(net, make_plan(analysis, keep)), seconds=1)
            assert latency.at(units) == pytest.approx(truth, rel=0.02)


def test_without_a_profiler_the_whole_is_fitted():
    net = randomise(Plain())
    analysis, groups = ranked(net)
    with Fake(net, profiler=False) as watch:
        table = measure_table(watch, analysis, groups)
        latency = Latency(analysis, table)
        assert not any(sample.layers for sample in table.samples)
        truth = [sample.whole * table.uncut_ms for sample in table.samples]
        found = [latency.at(np.array(sample.units)) for sample in table.samples]
        assert np.corrcoef(truth, found)[0, 1] > 0.8
        assert np.mean(np.abs(np.array(found) / truth - 1)) < 0.15


def test_a_table_is_measured_once_and_goes_on_where_it_was(cache, monkeypatch):
    net = randomise(Plain())
    analysis, groups = ranked(net)
    measure, left = Fake.compare, [5]

    def interrupted(self, one, *, seconds=None):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return measure(self, one, seconds=seconds)

    with Fake(net) as watch:
        monkeypatch.setattr(Fake, "compare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure_table(watch, analysis, groups)
        monkeypatch.setattr(Fake, "compare", measure)
        watch.compared = 0
        table = measure_table(watch, analysis, groups)
        assert len(table.samples) == SAMPLES
        assert watch.compared == SAMPLES - 4  # the uncut network and four samples were there
        assert measure_table(watch, analysis, groups) == table
        assert watch.compared == SAMPLES - 4
        other, theirs = ranked(net, align=4)
        assert measure_table(watch, other, theirs) != table
    (file, _) = sorted((cache / "latency").iterdir(), key=lambda path: path.stat().st_mtime)
    file.write_text("{")
    with Fake(net) as watch, pytest.raises(MeasurementError, match="not a latency table: delete"):
        measure_table(watch, analysis, groups)


def within(net, watch, budget, **request):
    request = {"align": 1, **request}
    return plan_within(net, EXAMPLE, budget=budget, target=TARGET, stopwatch=watch, **request)


@pytest.mark.parametrize("limit", ["70 %", 0.7, "0.15 ms"])
def test_a_limit_holds_as_measured(limit):
    net = randomise(Plain())
    plan, timing = within(net, Fake(net), {"latency_ms": limit, "params": 0.9})
    last = timing.rounds[timing.chosen]
    _, after = Fake(net).compare(bevel.prune(net, plan))
    assert after == last.measured_ms
    assert after <= 0.15 if limit == "0.15 ms" else after <= 0.7 * last.before_ms
    assert plan.after.params <= 0.9 * plan.before.params
    assert plan.request["budget"] == {"latency_ms": limit, "params": 0.9}
    assert last.estimated_ms == pytest.approx(last.measured_ms, rel=0.03)


def test_a_target_that_is_slower_than_its_table_gets_a_narrower_network():
    net = randomise(Plain())
    plan, timing = within(net, Fake(net, whole=lambda ms: 1.2 * ms), {"latency_ms": "70 %"})
    assert 1 < len(timing.rounds) <= ROUNDS
    chosen = timing.rounds[timing.chosen]
    assert timing.rounds[0].share > 0.7 >= chosen.share
    assert chosen.aim < timing.rounds[0].aim
    honest, _ = within(net, Fake(net), {"latency_ms": "70 %"})
    assert plan.after.macs < honest.after.macs
    assert "70% on onnxruntime:float32@local: " in str(timing)
    assert "% measured (" in str(timing)


def test_a_target_that_is_faster_than_its_table_gets_a_wider_network():
    """Nothing more is cut than the limit asks for, though the first plan would do."""
    net = randomise(Plain())
    plan, timing = within(net, Fake(net, whole=lambda ms: 0.7 * ms), {"latency_ms": "60 %"})
    shares = [found.share for found in timing.rounds]
    assert shares[0] < shares[timing.chosen] <= 0.6
    assert shares[timing.chosen] == max(share for share in shares if share <= 0.6)
    honest, _ = within(net, Fake(net), {"latency_ms": "60 %"})
    assert plan.after.macs > honest.after.macs


def test_the_rounds_share_one_sensitivity_map(monkeypatch):
    net = randomise(Plain())
    measure, cuts = Sensitivity._cut, []

    def counted(self, group, kept):
        cuts.append((group.index, kept))
        return measure(self, group, kept)

    monkeypatch.setattr(Sensitivity, "_cut", counted)
    images = torch.randn(32, *EXAMPLE.shape[1:])
    with torch.no_grad():
        data = [(images, net(images).argmax(1))]
    watch = Fake(net, whole=lambda ms: 1.2 * ms)
    request = {"allocate": "t_sensitive", "calibration": data}
    _, timing = within(net, watch, {"latency_ms": "70 %"}, **request)
    assert len(timing.rounds) > 1
    assert cuts and len(cuts) == len(set(cuts))


def test_what_makes_nothing_faster_is_refused():
    net = randomise(Plain())
    with pytest.raises(PruningError, match=r"not faster on onnxruntime:float32@local: .* against"):
        within(net, Fake(net, whole=lambda _: 50.0), {"latency_ms": 0.9})


def test_a_limit_that_is_never_met_says_what_was():
    net = randomise(Plain())
    spoilt = Fake(net, whole=lambda ms: max(ms, 0.8 * spoilt.compare(net)[0]))
    with pytest.raises(
        PruningError, match=r"latency_ms <= 70%, but only 80% \(\S+ of \S+ ms\) was reached as mea"
    ) as caught:
        within(net, spoilt, {"latency_ms": 0.7})
    assert caught.value.reachable["latency_ms"] == pytest.approx(0.8)
    assert "\n" not in str(caught.value)


def test_a_limit_out_of_reach_says_what_the_table_does():
    net = randomise(Plain())
    with pytest.raises(
        PruningError, match=r"latency_ms <= 2% \(\S+ ms\), but only latency_ms \S+% \(\S+ ms\) can"
    ) as e:
        within(net, Fake(net), {"latency_ms": "2 %"})
    assert 0.02 < e.value.reachable["latency_ms"] < 1
    with pytest.raises(PruningError, match="budget is 0, expected a share"):
        within(net, Fake(net), {"latency_ms": 0})


@pytest.mark.parametrize(("share", "limit"), [(1.0, "2 %"), (0.8, "70 %"), (1.1, "70 %")])
@pytest.mark.parametrize("align", [8, 16])
def test_widths_that_the_target_is_slow_with_are_named(share, limit, align):
    net, target = randomise(Plain()), Target(precision="int8")
    spoilt = Fake(net, whole=lambda ms: max(ms, share * spoilt.compare(net)[0]))
    with pytest.raises(PruningError) as caught:
        plan_within(
            net, EXAMPLE, budget={"latency_ms": limit}, target=target, stopwatch=spoilt, align=align
        )
    said = "in int8 is slow with widths that are no multiples of 16, so with align: 8 narrower"
    assert (said in str(caught.value)) == (align == 8)


def test_a_limit_that_holds_already_cuts_nothing():
    net = randomise(Plain())
    plan, _ = within(net, Fake(net), {"latency_ms": "100 %"})
    assert plan.after == plan.before


def test_an_emulated_device_has_no_latency_to_limit(monkeypatch):
    from bevel.devices.local import LocalDevice

    monkeypatch.setattr(LocalDevice, "emulated", True)
    with pytest.raises(MeasurementError, match="emulated: its times mean nothing"):
        plan_within(Plain(), EXAMPLE, budget={"latency_ms": 0.5}, target=TARGET)
