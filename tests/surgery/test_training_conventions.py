"""A lite network trains as any other: with the utilities of timm, and as torchvision does it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision import models
from torchvision.ops._utils import split_normalization_params

from bevel.rewriting.apply import Lite, surgery
from bevel.rewriting.log import SurgeryLog, replay

timm = pytest.importorskip("timm")
from timm.data import Mixup  # noqa: E402
from timm.layers import convert_sync_batchnorm  # noqa: E402
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy  # noqa: E402
from timm.models import load_checkpoint, resume_checkpoint  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, dispatch_clip_grad  # noqa: E402

CLASSES = 5
STEPS = 10
LABELS = torch.arange(8) % CLASSES


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm.create_model("tf_mobilenetv3_small_100", num_classes=CLASSES),
    "torchvision": lambda: models.mobilenet_v3_small(num_classes=CLASSES),
}


@dataclass(frozen=True)
class Operated:
    factory: Callable[[], nn.Module]
    lite: Lite

    @property
    def net(self) -> nn.Module:
        """A copy that may be trained."""
        torch.manual_seed(0)
        return copy.deepcopy(self.lite.net).train()

    def fresh(self) -> nn.Module:
        """As another process makes it: from the factory and the log's text."""
        log = SurgeryLog.model_validate_json(self.lite.log.model_dump_json())
        return replay(self.factory(), log)


@pytest.fixture(scope="module", params=NETWORKS)
def operated(request):
    torch.manual_seed(0)
    factory = NETWORKS[request.param]
    lite = surgery(factory().eval(), images(4))
    assert {site.rule for site in lite.sites} >= {"squeeze_excite", "hardswish"}
    return Operated(factory, lite)


def run(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(x)


def loss_of(net: nn.Module) -> float:
    """On the fixed batch, with the batch's own statistics and without dropout."""
    probe = copy.deepcopy(net).eval()
    for module in probe.modules():
        if isinstance(module, _NormBase):
            module.train()
    with torch.no_grad():
        return float(F.cross_entropy(probe(images(8)), LABELS))


def without_gradient(net: nn.Module) -> list[str]:
    return [
        name
        for name, p in net.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]


def falls(before: float, net: nn.Module) -> bool:
    return loss_of(net) < 0.9 * before


def is_average(average: nn.Module, net: nn.Module) -> bool:
    """Whether it gives finite outputs of the network's shape that are not the network's."""
    found, wanted = run(average, images(3, seed=1)), run(net, images(3, seed=1))
    same = found.shape == wanted.shape == (3, CLASSES)
    return same and bool(found.isfinite().all()) and not torch.equal(found, wanted)


def are_all(net: nn.Module, groups: Iterable[Iterable[nn.Parameter]]) -> bool:
    """Whether each parameter is in one group, and once."""
    return sorted(id(p) for group in groups for p in group) == sorted(map(id, net.parameters()))


# -- timm -----------------------------------------------------------------------------------


def timm_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer_v2(net, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-3)


def test_with_the_utilities_of_timm(operated, tmp_path):
    np.random.seed(0)  # mixup draws from it
    net = operated.net
    before, optimizer = loss_of(net), timm_optimizer(net)
    plain, decayed = (group["params"] for group in optimizer.param_groups)
    assert are_all(net, [plain, decayed])
    assert {p.ndim for p in plain} == {1} < {p.ndim for p in [*plain, *decayed]}
    schedule, _ = create_scheduler_v2(
        optimizer, num_epochs=STEPS, warmup_epochs=2, warmup_lr=1e-3, sched="cosine"
    )
    average, scaler = ModelEmaV3(net, decay=0.5), NativeScaler(device="cpu")
    mixup = Mixup(mixup_alpha=0.1, cutmix_alpha=0.1, label_smoothing=0.1, num_classes=CLASSES)
    for step in range(STEPS):
        mixed, targets = mixup(images(8), LABELS)
        optimizer.zero_grad()
        loss = SoftTargetCrossEntropy()(net(mixed), targets)
        scaler(loss, optimizer, clip_grad=2.0, parameters=net.parameters())
        average.update(net, step=step)
        schedule.step(step + 1)
    assert without_gradient(net) == []
    assert falls(before, net)
    assert is_average(average.module, net)
    saver = CheckpointSaver(net, optimizer, model_ema=average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=1.0)
    restored(operated, net, average.module, tmp_path / "last.pth.tar")


def restored(operated: Operated, net: nn.Module, average: nn.Module, path: Path) -> None:
    """Training goes on in another process, or its average is used there, as timm does it."""
    again, used, x = operated.fresh(), operated.fresh(), images(3, seed=1)
    assert resume_checkpoint(again, str(path), timm_optimizer(again), log_info=False) == 1
    assert torch.equal(run(again, x), run(net, x))
    load_checkpoint(used, str(path), use_ema=True)
    assert torch.equal(run(used, x), run(average, x))


@pytest.mark.parametrize("operated", ["timm"], indirect=True)
def test_with_rates_by_depth_and_gradients_clipped_by_weight(operated):
    """timm knows how deep a layer is by its name, which surgery keeps."""
    net = operated.net
    before = loss_of(net)
    optimizer = create_optimizer_v2(net, opt="adamw", lr=3e-3, weight_decay=0.01, layer_decay=0.8)
    assert are_all(net, [group["params"] for group in optimizer.param_groups])
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 3
    for _ in range(STEPS):
        optimizer.zero_grad()
        LabelSmoothingCrossEntropy(0.1)(net(images(8)), LABELS).backward()
        dispatch_clip_grad(net.parameters(), 0.02, mode="agc")
        optimizer.step()
    assert falls(before, net)


# -- torchvision ----------------------------------------------------------------------------


def test_as_the_references_of_torchvision_do_it(operated, tmp_path):
    net = operated.net
    before = loss_of(net)
    norms, others = split_normalization_params(net)
    assert are_all(net, [norms, others])
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 1e-3}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    schedule = SequentialLR(
        optimizer,
        [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, STEPS - 2)],
        milestones=[2],
    )
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for _ in range(STEPS):
        loss = criterion(net(images(8)), LABELS)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optimizer.step()
        average.update_parameters(net)
        schedule.step()
    assert without_gradient(net) == []
    assert falls(before, net)
    assert is_average(average, net)
    torch.save({"model": net.state_dict(), "ema": average.state_dict()}, tmp_path / "model.pth")
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    loaded = torch.load(tmp_path / "model.pth", weights_only=True)
    for weights in (loaded["model"], load_file(tmp_path / "model.safetensors")):
        again = operated.fresh()
        again.load_state_dict(weights)
        assert torch.equal(run(again, images(3, seed=1)), run(net, images(3, seed=1)))
    resumed = AveragedModel(operated.fresh())
    resumed.load_state_dict(loaded["ema"])
    assert torch.equal(run(resumed, images(3, seed=1)), run(average, images(3, seed=1)))


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "timm": convert_sync_batchnorm,
    "torchvision": nn.SyncBatchNorm.convert_sync_batchnorm,
}
"""By library; torch's takes the activations out of timm's batch norms, of any network of timm."""


def test_batch_norms_that_several_processes_share_are_put_in(operated, request):
    """They train on accelerators only; here they are put in, and answer."""
    net, x = operated.net, images(3, seed=1)
    norms = [name for name, m in net.named_modules() if isinstance(m, _NormBase)]
    wanted = run(net, x)
    converted = CONVERSIONS[request.node.callspec.params["operated"]](net)
    shared = [name for name, m in converted.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    assert shared == norms != []
    assert torch.equal(run(converted, x), wanted)
    again = operated.fresh()
    again.load_state_dict(converted.state_dict())
    assert torch.equal(run(again, x), wanted)


def test_statistics_are_taken_again_for_an_average(operated):
    """`update_bn`, as stochastic weight averaging needs it."""
    average = AveragedModel(operated.net)
    before = copy.deepcopy(average.state_dict())
    update_bn([images(8), images(8, seed=1)], average)
    moved = {n for n, value in average.state_dict().items() if not torch.equal(value, before[n])}
    assert moved
    assert all(name.rpartition(".")[2] in STATISTICS for name in moved)
    assert run(average, images(3)).isfinite().all()


STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
