"""The sensitivity map: right, saved as it is measured, resumed, never that of something else."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import bevel
from bevel.core.errors import PruningError
from bevel.graph.couplings import analyze
from bevel.models.batchnorm import recalibrate
from bevel.pruning.allocate import Problem, rank_all
from bevel.pruning.allocate.t_sensitive import _probed, allocate
from bevel.pruning.plan import make_plan
from bevel.pruning.sensitivity import FILE, Sensitivity, SensitivityMap
from networks import EXAMPLE, Plain, randomise


def batches(net, count: int = 48, seed: int = 1):
    images = torch.randn(count, *EXAMPLE.shape[1:], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return [(part, net(part).argmax(1)) for part in images.split(16)]


def ranked(net):
    analysis = analyze(net, EXAMPLE)
    random = np.random.default_rng(0)
    scores = {i: random.random(g.size) for i, g in enumerate(analysis.groups)}
    groups = [g for g in rank_all(analysis, scores, 4) if len(g.levels) > 1]
    return analysis, groups


def every_probe(groups):
    return [(group, int(level)) for group in groups for level in _probed(group)]


def score(net, data):
    """Naively: loss and accuracy over all images at once."""
    recalibrate(net, [images for images, _ in data])
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        outputs = net.eval()(images)
    return float(F.cross_entropy(outputs, labels)), float(
        (outputs.argmax(1) == labels).float().mean()
    )


def test_every_point_is_that_of_the_cut_network():
    net = randomise(Plain())
    data = batches(net)
    analysis, groups = ranked(net)
    sensitivity = Sensitivity(net, analysis, groups, data)
    probes = every_probe(groups)
    rises = sensitivity(probes)
    loss, accuracy = score(bevel.prune(net, make_plan(analysis, {})), data)
    points = {(point.index, point.kept): point for point in sensitivity.map.points}
    assert len(points) == len(probes) > 8
    for (group, kept), rise in zip(probes, rises, strict=True):
        cut = bevel.prune(net, make_plan(analysis, {group.index: group.keep_mask(kept)}))
        cut_loss, cut_accuracy = score(cut, data)
        assert rise == pytest.approx(cut_loss - loss, abs=1e-5)
        point = points[group.index, kept]
        assert point.accuracy == pytest.approx(accuracy - cut_accuracy, abs=1e-6)
        assert (point.group, point.loss, point.rows) == (group.name, rise, group.size)


def test_an_interrupted_map_goes_on_with_equal_bytes(tmp_path, monkeypatch):
    net = randomise(Plain())
    data = batches(net)
    analysis, groups = ranked(net)
    probes = every_probe(groups)
    Sensitivity(net, analysis, groups, data, tmp_path / "whole")(probes)
    measure, done = Sensitivity._cut, []

    def interrupted(self, group, kept):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(kept)
        return measure(self, group, kept)

    monkeypatch.setattr(Sensitivity, "_cut", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Sensitivity(net, analysis, groups, data, tmp_path / "part")(probes)
    saved = SensitivityMap.load(tmp_path / "part" / FILE)
    assert 0 < len(saved.points) <= 4
    again = []
    monkeypatch.setattr(
        Sensitivity, "_cut", lambda self, g, k: again.append(k) or measure(self, g, k)
    )
    Sensitivity(net, analysis, groups, data, tmp_path / "part")(probes)
    assert len(again) == len(probes) - len(saved.points)
    assert (tmp_path / "part" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


SCRIPT = """
import sys, torch, bevel
from pathlib import Path
torch.manual_seed(0)
net = bevel.build_model("bevel:resnet20", {"in_channels": 1}).eval()
images = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    data = [(images, net(images).argmax(1))]
plan = bevel.plan_pruning(net, images[:2], allocate="t_sensitive", budget={"macs": 0.4}, align=4,
                          calibration=data, folder=sys.argv[1])
plan.save(Path(sys.argv[1]) / "plan.json")
"""


def test_a_killed_map_goes_on(tmp_path):
    def start(name: str) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / name)], env=environment
        )

    whole, killed = start("whole"), start("killed")
    file = tmp_path / "killed" / FILE
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and killed.poll() is None:
        if file.exists() and len(json.loads(file.read_text())["points"]) >= 3:
            break
        time.sleep(0.005)
    assert killed.poll() is None, "it ended before it could be killed"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    before = json.loads(file.read_text())["points"]
    assert start("killed").wait() == 0
    assert whole.wait() == 0
    for name in (FILE, "plan.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert all(point in json.loads(file.read_text())["points"] for point in before)


def test_the_map_of_something_else_is_refused(tmp_path):
    net = randomise(Plain())
    data = batches(net)
    request = {"allocate": "t_sensitive", "budget": {"macs": 0.8}, "folder": tmp_path}
    bevel.plan_pruning(net, EXAMPLE, calibration=data, **request)
    with pytest.raises(PruningError, match="map of another network: delete it"):
        bevel.plan_pruning(randomise(Plain(), 1), EXAMPLE, calibration=data, **request)
    with pytest.raises(PruningError, match="map of another ranking of its channels"):
        bevel.plan_pruning(net, EXAMPLE, calibration=data, criterion="random", **request)
    with pytest.raises(PruningError, match="map of other images"):
        bevel.plan_pruning(net, EXAMPLE, calibration=batches(net, seed=2), **request)
    (tmp_path / FILE).write_text('{"points": [')
    with pytest.raises(PruningError, match="is not a sensitivity map"):
        bevel.plan_pruning(net, EXAMPLE, calibration=data, **request)


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_stopping_early_does_not_change_the_plan(limit, seed):
    """Against every width of every group, with degradations that also fall on the way down."""
    net = randomise(Plain(), seed)
    analysis, groups = ranked(net)
    random = np.random.default_rng(seed)
    known = {(g.index, k): float(random.normal(g.size - k, 4)) for g, k in every_probe(groups)}
    asked = []

    def degradation(probes):
        asked.extend((group.index, kept) for group, kept in probes)
        return [known[group.index, kept] for group, kept in probes]

    problem = Problem(analysis, groups, {"macs": limit}, degradation)
    kept = allocate(problem)
    assert len(asked) == len(set(asked))
    worst = {g.index: {g.size: 0.0} for g in groups}
    for group, level in every_probe(groups):
        own = worst[group.index]
        own[level] = max(known[group.index, level], *own.values())
    thresholds = sorted({w for own in worst.values() for w in own.values()})

    def at(threshold):
        return np.array(
            [min(k for k, w in worst[g.index].items() if w <= threshold) for g in groups]
        )

    first = next(at(threshold) for threshold in thresholds if problem.meets(at(threshold)))
    assert (kept >= first).all() and problem.meets(kept)

    def worth(group, level):
        below = [k for k in worst[group.index] if k < level]
        return worst[group.index][max(below)] if below else 0.0

    assert (kept == problem.refill(first, worth)).all()
    if limit == 0.9:
        assert len(asked) < len(known)
