"""Surgery on detectors: lists of images, heads that run several times, outputs of any number."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from detectors import Retina, YoloV5, YoloV8, YoloX
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.ops.misc import SqueezeExcitation

import bevel
from bevel.core.errors import SurgeryError
from bevel.rewriting.apply import Lite, surgery
from bevel.rewriting.log import SurgeryLog, replay
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

Inputs = tuple[object, ...]


def images(count: int, size: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def ssdlite() -> nn.Module:
    return ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4, topk_candidates=20
    )


def map_loss(net: nn.Module, inputs: Inputs) -> Tensor:
    """Every raw map, a little off."""
    return sum(((x - 1).square().mean() for x in net(*inputs)), torch.zeros(()))


def box_loss(net: nn.Module, inputs: Inputs) -> Tensor:
    """The detector's own, with two objects in each image."""
    boxes = 96 * torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.4, 0.3, 0.95, 0.9]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    return sum(net(*inputs, [target] * len(inputs[0])).values(), torch.zeros(()))


@dataclass(frozen=True)
class Case:
    factory: Callable[[], nn.Module]
    batch: Callable[[int, int], Inputs]
    loss: Callable[[nn.Module, Inputs], Tensor]


def one_tensor(count: int, seed: int = 0) -> Inputs:
    return (images(count, 64, seed),)


def one_list(count: int, seed: int = 0) -> Inputs:
    return (list(images(count, 96, seed)),)


CASES = {
    "yolov5": Case(lambda: YoloV5(width=8), one_tensor, map_loss),
    "yolox": Case(lambda: YoloX(width=8), one_tensor, map_loss),
    "yolov8": Case(lambda: YoloV8(width=8), one_tensor, map_loss),
    "ssdlite": Case(ssdlite, one_list, box_loss),
}


def outputs(net: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(net.eval()(*inputs))


def apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference, each output relative to its own largest number."""
    assert [x.shape for x in found] == [x.shape for x in wanted]
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if b.numel()]
    assert pairs
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in pairs)


def settled(case: Case) -> nn.Module:
    """A network whose batch norms know its activations; fresh ones let signals die out."""
    torch.manual_seed(0)
    net = case.factory().train()
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    with torch.no_grad():
        case.loss(net, case.batch(8))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net.eval()


@pytest.fixture(scope="module", params=CASES)
def operated(request):
    case = CASES[request.param]
    net = settled(case)
    before = copy.deepcopy(net.state_dict())
    calibration = [case.batch(1, 1), case.batch(2, 2)]
    lite = surgery(net, case.batch(2), rules="lite", calibration=calibration)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    return case, net, lite


# -- what is found --------------------------------------------------------------------------


def in_graph(net: nn.Module, x: Tensor) -> Counter[str]:
    """By a rule, its places in the exported graph."""
    found: Counter[str] = Counter()
    for node in torch.export.export(net, (x,)).graph.nodes:
        target = str(node.target)
        if target.startswith("aten.silu"):
            found["silu"] += 1
        elif target.startswith("aten.max_pool2d") and max(node.args[1]) > 3:
            found["large_max_pool"] += 1
        elif target.startswith("aten.cat") and all(map(halves, node.args[0])):
            found["focus"] += 1
    return found


def halves(node: torch.fx.Node) -> bool:
    return str(node.target).startswith("aten.slice") and node.args[4:] == (2,)


def in_modules(net: nn.Module) -> Counter[str]:
    """By a rule, its places among the modules."""
    names = {nn.Hardswish: "hardswish", SqueezeExcitation: "squeeze_excite"}
    return Counter(names[type(m)] for m in net.modules() if type(m) in names)


def places(case: Case, net: nn.Module) -> Counter[str]:
    return in_modules(net) if case.factory is ssdlite else in_graph(net, *case.batch(2))


def test_no_place_is_missed(operated):
    case, net, lite = operated
    assert places(case, net) == Counter(site.rule for site in lite.sites)
    left = Counter(site.rule for site in lite.sites if site.reason)
    assert places(case, lite.net) == left
    assert not left


EXPECTED = {"yolov5": {"focus", "large_max_pool"}, "yolox": {"focus", "large_max_pool"}}
EXPECTED |= {"yolov8": {"large_max_pool"}, "ssdlite": set()}


def doubled(inputs: Inputs) -> Inputs:
    return tree_map(lambda x: x.double(), inputs)


@pytest.mark.parametrize("name", CASES)
def test_exact_rules_change_no_detection(name):
    """In float64: in float32 these networks make 1e-5 of what one rounding differs by."""
    case = CASES[name]
    net = settled(case)
    lite = surgery(net, case.batch(1), rules="exact", calibration=[case.batch(3, 1)])
    assert set(lite.proven) == EXPECTED[name]
    assert all(difference <= 1e-5 for difference in lite.proven.values())
    unseen = doubled(case.batch(2, 3))
    assert apart(outputs(lite.net.double(), unseen), outputs(net.double(), unseen)) <= 1e-9


# -- what becomes of it ---------------------------------------------------------------------


def test_a_lite_detector_trains_and_a_log_makes_it_again(operated):
    case, _, lite = operated
    trained = copy.deepcopy(lite.net).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
    case.loss(trained, case.batch(2)).backward()
    optimizer.step()
    wanting = [name for name, p in trained.named_parameters() if p.requires_grad and p.grad is None]
    assert wanting == []
    log = SurgeryLog.model_validate_json(lite.log.model_dump_json())
    fresh = replay(case.factory(), log)
    fresh.load_state_dict(trained.state_dict())
    unseen = case.batch(2, 3)
    found, wanted = outputs(fresh, unseen), outputs(trained, unseen)
    assert len(found) == len(wanted)
    assert all(map(torch.equal, found, wanted))
    before = outputs(lite.net, unseen)
    assert not all(map(torch.equal, before, wanted))


@pytest.mark.parametrize("operated", ["yolov5", "yolox", "yolov8"], indirect=True)
def test_a_lite_detector_is_pruned_with_a_proof(operated):
    case, _, lite = operated
    (x,) = case.batch(1)
    plan = bevel.plan_pruning(lite.net, x, budget={"macs": 0.6})
    pruned = bevel.prune(lite.net, plan)
    assert plan.after.macs <= 0.6 * plan.before.macs
    assert bevel.verify_pruning(lite.net, pruned, plan, x).worst <= 1e-9


@pytest.mark.parametrize("operated", ["yolov8"], indirect=True)
def test_a_layer_that_is_not_trained_is_not_fitted(operated):
    _, net, lite = operated
    assert torch.equal(lite.net.head.dfl.weight, net.head.dfl.weight)
    assert "head.dfl" not in {refit.module for refit in lite.refits}
    assert {"head.cv2.0.2", "head.cv3.2.2"} <= {refit.module for refit in lite.refits}


# -- lists of images ------------------------------------------------------------------------


def retina() -> Retina:
    torch.manual_seed(0)
    return Retina().eval()


def test_samples_are_those_of_the_call_however_many_images_there_are():
    """An image more is a call more, before all others."""
    net, pictures = retina(), list(images(6))
    groups = [pictures[:1], pictures[1:3], pictures[3:]]
    split = surgery(net, (pictures[:2],), calibration=[(group,) for group in groups])
    whole = surgery(net, (pictures[:2],), calibration=[(pictures,)])
    for one, other in zip(split.sites, whole.sites, strict=True):
        assert one.error.fitted == pytest.approx(other.error.fitted, rel=1e-4)
    for name, value in split.net.state_dict().items():
        assert torch.allclose(value, whole.net.state_dict()[name], atol=1e-4), name
    # The layers behind it run twice, and no drift reaches the one before.
    assert {refit.module for refit in whole.refits} == {"down.0"}


def test_a_head_that_runs_on_every_level_is_rewritten_once():
    net, pictures = retina(), list(images(4))
    twice = ["silu", "silu"]  # for the second there is nothing left
    lite = surgery(net, (pictures[:2],), rules=twice, calibration=[(pictures,)])
    assert Counter(site.place for site in lite.sites) == {
        "stem.2: silu": 1, "down.2: silu": 1, "tower.1: silu": 2,
    }  # fmt: skip
    by_module = [action.module for action in lite.log.actions]
    assert Counter(by_module)["tower.1"] == 1
    assert not any(isinstance(module, nn.SiLU) for module in lite.net.modules())


@pytest.mark.parametrize("listed", [True, False])
def test_images_of_several_sizes_are_fitted_on(listed):
    sizes = [images(2, 64), images(3, 40, 1), images(4, 96, 2)]
    net = retina() if listed else nn.Sequential(retina().stem, retina().down)
    batches = [(list(batch),) if listed else batch for batch in sizes]
    lite = surgery(net, batches[0], rules=["silu"], calibration=batches)
    errors = [site.error for site in lite.sites[:2]]
    assert all(error.fitted < error.naive for error in errors)
    assert bool(lite.refits) == listed  # a list may hold images of any size, a tensor may not


class Pair(nn.Module):
    """Looks again at what it sees in two images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, images: list[Tensor]) -> Tensor:
        x = F.silu(self.first(torch.stack(images)))
        return F.silu(self.again(x)).mean() if len(images) > 1 else x.mean()


def test_a_call_that_no_image_reaches_is_left_alone():
    pictures = list(images(3, 16))
    lite = surgery(Pair(), (pictures[:2],), rules=["silu"], calibration=[(pictures[2:],)])
    assert Counter(site.reason for site in lite.sites) == {
        None: 1, "no calibration image reaches it": 1,
    }  # fmt: skip
    assert [action.ordinal for action in lite.log.actions if action.action == "divert"] == [0]


class Looker(nn.Module):
    """Looks closer at the cells of which it is sure."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.cells, self.closer = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, images: list[Tensor]) -> Tensor:
        cells = F.silu(self.cells(torch.stack(images))).permute(0, 2, 3, 1).flatten(0, 2)
        return F.silu(self.closer(cells[cells.mean(1) > self.threshold]))


@pytest.mark.parametrize(("threshold", "done"), [(0.0, 2), (torch.inf, 1)])
def test_a_second_stage_that_gets_nothing_is_left_alone(threshold, done):
    torch.manual_seed(0)
    net, pictures = Looker(threshold), list(images(4, 16))
    lite = surgery(net, (pictures[:2],), rules=["silu"], calibration=[(pictures,)])
    assert sum(site.reason is None for site in lite.sites) == done
    assert len(outputs(lite.net, (pictures,))[0]) > 0 or threshold == torch.inf


def test_images_that_come_by_name_are_taken_as_they_are():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 1))

        def forward(self, *, pixels: Tensor) -> Tensor:
            return self.layers(pixels)

    batches = [{"pixels": images(2, 16)}, {"pixels": images(3, 24)}]
    lite = surgery(Named(), batches[0], rules=["silu"], calibration=batches)
    assert [site.reason for site in lite.sites] == [None]
    assert isinstance(lite.net.layers[1], nn.ReLU)


# -- outputs of any number ------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A rule that does something to the network's weights."""

    change: Callable[[nn.Module], object]
    EXACT: bool

    def match(self, seen: Seen) -> list[Node]:
        return list(seen.calls([torch.conv2d]))[:1]

    def check(self, *_: object) -> None:
        return None

    def rewrite(self, surgeon: Surgeon, _: Node) -> None:
        self.change(surgeon.net)


def surer(net: nn.Module, by: float = 0.5) -> None:
    with torch.no_grad():
        net.scores.bias.add_(by)


def unbounded(net: nn.Module) -> None:
    """More objects, too, so that nothing is compared."""
    surer(net)
    with torch.no_grad():
        net.boxes.bias.fill_(torch.inf)


def fewer_columns(net: nn.Module) -> None:
    found = net.found
    net.found = lambda *given: {name: x[..., :3] for name, x in found(*given).items()}


def operated_by(change: Callable[[nn.Module], object], *, exact: bool) -> Lite:
    pictures = list(images(2))
    return surgery(retina(), (pictures,), rules=[Change(change, exact)])


def test_a_rule_that_is_not_exact_may_find_more_objects():
    found, wanted = (
        outputs(net, (list(images(2)),)) for net in (operated_by(surer, exact=False).net, retina())
    )
    assert 0 < len(wanted[0]) < len(found[0])


@pytest.mark.parametrize(
    ("change", "exact", "words"),
    [
        (surer, True, "outputs are of other shapes"),
        (fewer_columns, False, "outputs are of other shapes"),
        (unbounded, False, "not finite"),
        (lambda net: surer(net, 1e-4), True, "is to be exact and changes the outputs by"),
    ],
    ids=["more objects", "other shapes", "not finite", "other scores"],
)
def test_what_a_rule_may_not_do_to_detections(change, exact, words):
    with pytest.raises(SurgeryError, match=words):
        operated_by(change, exact=exact)


def turned(net: nn.Module) -> None:
    """The same sums in another order."""
    with torch.no_grad():
        for tensor, axis in ((net[0].weight, 0), (net[0].bias, 0), (net[1].weight, 1)):
            tensor.copy_(tensor.flip(axis))


def steeper(net: nn.Module) -> None:
    with torch.no_grad():
        net[1].weight.mul_(1.01)


def test_rounding_is_told_from_a_fault():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1)), images(2, 16)
    with torch.no_grad():  # large numbers that cancel out: rounding is what is left
        net[0].bias.fill_(1e4)
        weights = torch.randn(8)
        net[1].weight.copy_((weights - weights.mean()).reshape(1, 8, 1, 1))
    lite = surgery(net, x, rules=[Change(turned, EXACT=True)])
    assert apart(outputs(lite.net, (x,)), outputs(net, (x,))) > 1e-5
    assert max(lite.proven.values()) < 1e-9
    with pytest.raises(SurgeryError, match="is to be exact and changes the outputs by"):
        surgery(net, x, rules=[Change(steeper, EXACT=True)])
