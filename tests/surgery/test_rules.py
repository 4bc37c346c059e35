"""Rules one by one: what they make of a layer, and what they leave alone and why."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bevel
from bevel.core.errors import SurgeryError
from bevel.core.modes import evaluating
from bevel.rewriting.log import SurgeryLog, replay
from bevel.rewriting.modules import ChannelsLastBatchNorm, PooledLinear

timm = pytest.importorskip("timm")


def images(count: int, size: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    with evaluating(net), torch.no_grad():
        return net(x)


def operate(net: nn.Module, *rules: str, size: int = 24) -> bevel.rewriting.apply.Lite:
    batches = images(32, size, seed=1).split(8)
    return bevel.surgery(net, images(2, size), rules=rules, calibration=batches)


def refusals(net: nn.Module, rule: str, size: int = 24) -> list[str]:
    return [site.reason for site in operate(net, rule, size=size).sites if site.reason is not None]


class Call(nn.Module):
    """A function of an image after a convolution."""

    def __init__(self, function: Callable[[Tensor], Tensor], **arguments: object) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 4, 3, padding=1, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


EXACT: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "average pool of 4": ("large_avg_pool", lambda: nn.Sequential(nn.AvgPool2d(4))),
    "average pool of 9": ("large_avg_pool", lambda: nn.Sequential(nn.AvgPool2d(9))),
    "mean": ("global_pool", lambda: Call(lambda x: x.mean((2, 3)))),
    "mean, kept": ("global_pool", lambda: Call(lambda x: torch.mean(x, [-1, -2], keepdim=True))),
    "pool of all": ("global_pool", lambda: Call(lambda x: F.avg_pool2d(x, x.shape[2:]))),
    "nearest": ("interpolate_size", lambda: Call(lambda x: F.interpolate(x, size=48))),
    "bilinear": (
        "interpolate_size",
        lambda: Call(lambda x: F.interpolate(x, (48, 72), mode="bilinear", align_corners=False)),
    ),
    "dilated": ("dilated_convolution", lambda: Call(lambda x: x, dilation=2)),
    "dilated by group": (
        "dilated_convolution",
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, dilation=(1, 3), groups=3, stride=2)),
    ),
    "hard sigmoid": ("hardsigmoid", lambda: Call(F.hardsigmoid)),
    "hard sigmoid without bias": ("hardsigmoid", lambda: Call(F.hardsigmoid, bias=False)),
    "RepVGG": ("reparametrize", lambda: timm.create_model("repvgg_a0", num_classes=3)),
    "MobileOne": ("reparametrize", lambda: timm.create_model("mobileone_s0", num_classes=3)),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_exact_rules_give_the_same_and_are_done_again_by_the_log(case):
    rule, factory = case
    torch.manual_seed(0)
    net = factory().eval()
    size = 32 if rule == "reparametrize" else 24
    lite = operate(net, rule, size=size)
    assert lite.log.actions
    assert {site.reason for site in lite.sites} == {None}
    assert lite.proven[rule] <= 1e-5
    x = images(2, size, seed=3)
    assert torch.allclose(outputs(lite.net, x), outputs(net, x), rtol=1e-4, atol=1e-5)
    log = SurgeryLog.model_validate_json(lite.log.model_dump_json())
    again = replay(factory().eval(), log)
    again.load_state_dict(lite.net.state_dict())
    assert torch.equal(outputs(again, x), outputs(lite.net, x))


def test_what_exact_rules_leave_of_the_layer_they_replace():
    torch.manual_seed(0)
    pools = operate(nn.Sequential(nn.AvgPool2d(9)), "large_avg_pool").net[0]
    assert [pool.kernel_size for pool in pools] == [3, 3]
    conv = operate(Call(lambda x: x, dilation=2), "dilated_convolution").net.conv
    assert (conv.kernel_size, conv.dilation) == ((5, 5), (1, 1))
    one = operate(timm.create_model("mobileone_s0"), "reparametrize", size=32).net
    wide = sum(p.numel() for p in timm.create_model("mobileone_s0").parameters())
    assert sum(p.numel() for p in one.parameters() if p.requires_grad) < 0.5 * wide
    resized = Call(lambda x: F.interpolate(x, size=48))
    graph = torch.export.export(operate(resized, "interpolate_size").net, (images(1),)).graph
    assert not any("size=" in str(node) for node in graph.nodes)


class InPlace(nn.Module):
    """Overwrites what it gets, as a module, by an argument, and by an underscore."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.Hardswish(inplace=True)
        self.drop = nn.Dropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.act(self.conv(x)), 0.2, True)
        return self.drop(torch.relu_(x - 0.1).sigmoid_())


def overwriting(net: nn.Module) -> set[str]:
    """Operators that change a tensor, but for those of dropout."""
    graph = torch.export.export(net.eval(), (images(1),)).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return {name for name in names if name.split(".")[1].endswith("_") and "drop" not in name}


def test_activations_stop_overwriting_and_nothing_else_changes():
    torch.manual_seed(0)
    net = InPlace().eval()
    assert len(overwriting(net)) == 4
    lite = operate(net, "inplace_activation")
    assert len(lite.sites) == 4
    assert lite.proven["inplace_activation"] == 0
    assert overwriting(lite.net) == set()
    x = images(4, seed=3)
    assert torch.equal(outputs(lite.net, x), outputs(net, x))
    again = replay(InPlace().eval(), SurgeryLog.model_validate_json(lite.log.model_dump_json()))
    again.load_state_dict(net.state_dict())
    assert overwriting(again) == set()
    assert operate(lite.net, "inplace_activation").sites == []
    assert operate(lite.net, "inplace_dropout").net.drop.inplace is False


class GoesOn(nn.Module):
    """Goes on with what was overwritten, not with the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.act(x)
        return x


def test_a_network_that_counts_on_the_overwriting_is_refused():
    with pytest.raises(SurgeryError, match="'inplace_activation' is to be exact and changes"):
        operate(GoesOn().eval(), "inplace_activation")


REFUSED = {
    "overlapping average pool": (
        "large_avg_pool", lambda: nn.Sequential(nn.AvgPool2d(5, 1)), "overlap, pad or round up"
    ),
    "average pool of 5": ("large_avg_pool", lambda: nn.Sequential(nn.AvgPool2d(5)), "no power of"),
    "average pool in a forward": (
        "large_avg_pool", lambda: Call(lambda x: F.avg_pool2d(x, 4)), "as a function"
    ),
    "aligned corners": (
        "interpolate_size",
        lambda: Call(lambda x: F.interpolate(x, 48, mode="bilinear", align_corners=True)),
        "align_corners",
    ),
    "no multiple": (
        "interpolate_size", lambda: Call(lambda x: F.interpolate(x, 30)), "30x30 is no multiple"
    ),
    "dilated widely": (
        "dilated_convolution", lambda: Call(lambda x: x, dilation=4), "be of size 9"
    ),
    "hard sigmoid of the input": (
        "hardsigmoid", lambda: nn.Sequential(nn.Hardsigmoid()), "no layer whose output"
    ),
    "norm with weights per place": (
        "norm", lambda: nn.Sequential(nn.LayerNorm((3, 24, 24))), "for each place"
    ),
    "norm of tokens": (
        "norm", lambda: nn.Sequential(nn.Flatten(2), nn.LayerNorm(576)), "is no image"
    ),
    "norm in a forward": (
        "norm", lambda: Call(lambda x: F.group_norm(F.relu(x), 2)), "more than normalise"
    ),
    "kernel that pads too little": (
        "large_kernel", lambda: nn.Sequential(nn.Conv2d(3, 4, 11)), "pads less"
    ),
    "patches": (
        "large_kernel", lambda: nn.Sequential(nn.Conv2d(3, 4, 8, stride=8)), "into patches"
    ),
    "turned and split": (
        "channels_last",
        lambda: Call(lambda x: x.permute(0, 2, 3, 1).flip(1).permute(0, 3, 1, 2)),
        "needs the axes in this order",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_place_that_is_left_alone_says_why(case):
    rule, factory, words = case
    reasons = refusals(factory().eval(), rule)
    assert len(reasons) == 1
    assert words in reasons[0]


ACTIVATIONS = {
    "prelu": lambda: nn.PReLU(6), "relu6": nn.ReLU6, "leaky_relu": lambda: nn.LeakyReLU(0.2),
}  # fmt: skip


@pytest.mark.parametrize("rule", ACTIVATIONS)
def test_activations_become_relu_close_to_what_they_were(rule):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), ACTIVATIONS[rule](), nn.Conv2d(6, 6, 3)
    ).eval()
    with torch.no_grad():
        net[1].weight.uniform_(1, 9)
        net[1].bias.uniform_(-3, 3)
    batches = images(32, seed=1).split(8)
    lite, naive = (
        bevel.surgery(net, images(2), rules=[rule], calibration=batches, fit=fit)
        for fit in (True, False)
    )
    assert isinstance(lite.net[2], nn.ReLU)
    x = images(8, seed=2)
    apart = [float((outputs(n.net, x) - outputs(net, x)).square().mean()) for n in (lite, naive)]
    assert apart[0] < 0.5 * apart[1]


def test_only_a_clamp_to_six_is_relu6():
    net = Call(lambda x: torch.clamp(x, 0, 6).clamp(0, 5))
    assert [site.place for site in operate(net, "relu6").sites] == ["clamp"]


NORMS = {
    "layer norm, channels last": (
        lambda: Call(Last()), ChannelsLastBatchNorm,
    ),
    "layer norm, channels first": (lambda: Call(timm.layers.LayerNorm2d(4)), nn.BatchNorm2d),
    "group norm": (lambda: Call(nn.GroupNorm(2, 4)), nn.BatchNorm2d),
    "instance norm": (lambda: Call(nn.InstanceNorm2d(4, affine=True)), nn.BatchNorm2d),
}  # fmt: skip


class Last(nn.Module):
    """A layer norm over the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
def test_norms_become_the_closest_batch_norm(case):
    factory, kind = case
    torch.manual_seed(0)
    net = factory().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "function" in name:
                parameter.uniform_(0.5, 2)
    lite = operate(net, "norm")
    assert any(type(module) is kind for module in lite.net.modules())
    (site,) = lite.sites
    assert site.error is not None
    assert site.error.fitted <= site.error.naive + 1e-9
    wanted = outputs(net, images(8, seed=2))
    apart = (outputs(lite.net, images(8, seed=2)) - wanted).square().mean()
    assert apart < 0.5 * wanted.var()
    lite.net.train()(images(4)).sum().backward()


def test_a_convnext_loses_its_norms_and_its_turns():
    torch.manual_seed(0)
    net = timm.create_model("convnext_atto", num_classes=4, conv_mlp=False, depths=(1, 1, 1, 1))
    lite = operate(net.eval(), "norm", "gelu", "channels_last", size=64)
    assert not any(isinstance(m, nn.LayerNorm) for m in lite.net.stages.modules())
    assert not any(isinstance(m, nn.Linear) for m in lite.net.stages.modules())
    graph = torch.export.export(lite.net.eval(), (images(1, 64),)).graph
    assert not any("permute" in str(node.target) for node in graph.nodes)
    assert lite.proven["channels_last"] <= 1e-5


def test_a_large_kernel_is_fitted_to_what_it_gave():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 11, padding=5), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():  # most of it is in the middle, as in a trained one
        ring = torch.linspace(-1, 1, 11).abs()
        net[0].weight.mul_(torch.exp(-3 * torch.maximum(ring[:, None], ring[None])))
    batches = images(64, seed=1).split(16)
    lite, naive = (
        bevel.surgery(net, images(2), rules=["large_kernel"], calibration=batches, fit=fit)
        for fit in (True, False)
    )
    assert lite.net[0].kernel_size == (7, 7)
    x = images(16, seed=2)
    apart = [float((outputs(n.net, x) - outputs(net, x)).square().mean()) for n in (lite, naive)]
    assert apart[0] < apart[1]
    assert {refit.module for refit in lite.refits} == {"0", "2"}


class ClipPool(nn.Module):
    """Pools an image by torch's attention, whose query is the mean, as CLIP's networks do."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.places = nn.Parameter(0.1 * torch.randn(37, 1, channels))
        self.attention = nn.MultiheadAttention(channels, 2)
        self.project = nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.places
        return self.project(self.attention(x[:1], x, x, need_weights=False)[0][0])


class Tokens(nn.Module):
    """Tokens (N, positions, C), pooled, then classified."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.patch, self.pool, self.head = nn.Conv2d(3, 16, 4, 4), pool, nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.patch(x).flatten(2).transpose(1, 2)))


def pools(name: str) -> nn.Module:
    layers = timm.layers
    if name == "latent":
        return Tokens(layers.AttentionPoolLatent(16, num_heads=2, mlp_ratio=1))
    pool = {
        "learnt places": lambda: layers.AttentionPool2d(
            16, feat_size=6, out_features=8, head_dim=8
        ),
        "rotary places": lambda: layers.RotAttentionPool2d(16, out_features=16, head_dim=8),
        "torch's": lambda: ClipPool(16, 8),
    }[name]()
    classes = nn.Linear(16 if name == "rotary places" else 8, 5)
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), pool, classes)


@pytest.mark.parametrize("name", ["learnt places", "rotary places", "torch's", "latent"])
def test_attention_that_pools_becomes_a_mean_and_a_layer(name):
    torch.manual_seed(0)
    net = pools(name).eval()
    shades = torch.linspace(-1, 1, 64)[torch.randperm(64)].reshape(-1, 1, 1, 1)
    batches = (images(64, seed=1) + shades).split(16)
    lite, naive = (
        bevel.surgery(net, images(2), rules=["attention_pool"], calibration=batches, fit=fit)
        for fit in (True, False)
    )
    (site,) = lite.sites
    assert site.reason is None
    assert site.error.fitted < 0.2 * site.error.naive
    assert any(isinstance(module, PooledLinear) for module in lite.net.modules())
    x = images(16, seed=2) + shades[:16]
    apart = [float((outputs(n.net, x) - outputs(net, x)).square().mean()) for n in (lite, naive)]
    assert apart[0] < 0.2 * apart[1]
    assert apart[0] < 0.2 * outputs(net, x).var(0).mean()
    again = replay(pools(name).eval(), SurgeryLog.model_validate(lite.log.model_dump()))
    again.load_state_dict(lite.net.state_dict())
    assert torch.equal(outputs(again, x), outputs(lite.net, x))


def test_attention_that_does_not_pool_is_no_place_for_the_rule():
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    assert operate(net, "attention_pool", size=32).sites == []


class Twice(Call):
    """The function of two images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(-x)


def test_a_pool_that_runs_twice_stays():
    net = Twice(timm.layers.AttentionPool2d(4, feat_size=24, out_features=4, head_dim=2))
    (reason,) = refusals(net, "attention_pool")
    assert "runs several times" in reason


def test_a_rule_can_be_a_function():
    @bevel.surgery_rule(F.softplus)
    def plain(surgeon, node):
        surgeon.divert(node, "relu")

    net = Call(F.softplus)
    before = copy.deepcopy(net.state_dict())
    lite = bevel.surgery(net, images(2), rules=[plain])
    assert [(site.rule, site.reason) for site in lite.sites] == [("plain", None)]
    assert torch.equal(outputs(lite.net, images(2)), F.relu(net.conv(images(2))))
    assert all(map(torch.equal, before.values(), net.state_dict().values()))
    with pytest.raises(SurgeryError, match="name the torch functions"):
        bevel.surgery_rule()
    with pytest.raises(SurgeryError, match="'wrong' is to be exact and changes the outputs"):

        @bevel.surgery_rule(F.softplus, exact=True)
        def wrong(surgeon, node):
            surgeon.divert(node, "relu")

        bevel.surgery(net, images(2), rules=[wrong])


@pytest.mark.parametrize("name", ["tidl", "edgetpu", "tensorrt", "xnnpack"])
def test_every_set_runs_on_a_network_with_everything(name):
    torch.manual_seed(0)
    net = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=4)
    other = timm.create_model("convnext_atto", num_classes=4, depths=(1, 1, 1, 1))
    for one in (net, other):
        lite = operate(one.eval(), *bevel.rewriting.apply.SETS[name], size=64)
        assert torch.isfinite(outputs(lite.net, images(2, 64))).all()


def test_a_convolution_becomes_a_separable_one_that_is_fitted():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, dilation=2),
        nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1),
    ).eval()  # fmt: skip
    batches = images(64, seed=1).split(16)
    lite, naive = (
        bevel.surgery(net, images(2), rules=["depthwise_separable"], calibration=batches, fit=fit)
        for fit in (True, False)
    )
    reasons = [site.reason for site in lite.sites]
    assert reasons == ["it makes so few channels that nothing is saved", None, None]
    assert [part.groups for part in lite.net[2]] == [12, 1]
    assert "2.pointwise" in {refit.module for refit in lite.refits}
    x = images(16, seed=2)
    apart = [float((outputs(n.net, x) - outputs(net, x)).square().mean()) for n in (lite, naive)]
    assert apart[0] < 0.8 * apart[1]
    again = replay(copy.deepcopy(net), lite.log)
    again.load_state_dict(lite.net.state_dict())
    assert torch.equal(outputs(again, x), outputs(lite.net, x))
