"""Real networks, from the plan to a training step, a file in another process, and ONNX Runtime."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torchvision import models
from torchvision.models import detection, optical_flow, segmentation
from torchvision.models.swin_transformer import SwinTransformer
from yolo import YoloV5, YoloV8, yolov5_loss, yolov8_loss

import bevel
from bevel.core.quiet import quiet
from bevel.pruning.plan import PruningPlan
from bevel.runtimes._onnx_file import write_onnx

CLASSES = 5
Inputs = tuple[Any, ...]
Exported = tuple[nn.Module, tuple[Tensor, ...]]


def draw(*shape: int) -> Tensor:
    """Numbers that are the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# -- factories: the other process imports them from here ------------------------------------


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=3, num_classes=CLASSES, pretrained=False
    )


def convnext() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "convnext_atto", depths=(1, 1, 2, 1), num_classes=CLASSES, pretrained=False
    )


def swin() -> nn.Module:
    return SwinTransformer([4, 4], 48, [2, 2], [2, 4], [4, 4], num_classes=CLASSES)


def shufflenet() -> nn.Module:
    return models.shufflenet_v2_x0_5(num_classes=CLASSES)


def densenet() -> nn.Module:
    return models.DenseNet(block_config=(3, 6, 8, 4), num_classes=CLASSES)


def mobilenet() -> nn.Module:
    return models.mobilenet_v3_small(num_classes=CLASSES)


def efficientnet() -> nn.Module:
    return models.efficientnet_b0(num_classes=CLASSES)


def regnet() -> nn.Module:
    return models.regnet_y_400mf(num_classes=CLASSES)


def deeplab() -> nn.Module:
    return segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES
    )


def ssdlite() -> nn.Module:
    return detection.ssdlite320_mobilenet_v3_large(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES,
        score_thresh=0.0,
        topk_candidates=20,
    )


def faster_rcnn() -> nn.Module:
    return detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES,
        min_size=96,
        max_size=96,
        box_score_thresh=0.0,
        rpn_score_thresh=0.0,
        rpn_post_nms_top_n_test=20,
        box_detections_per_img=10,
    )


def raft() -> nn.Module:
    return optical_flow.raft_small()


# -- inputs and losses ----------------------------------------------------------------------


def picture(size: int) -> Callable[[int], Inputs]:
    return lambda batch: (draw(batch, 3, size, size),)


def list_of_pictures(size: int) -> Callable[[int], Inputs]:
    return lambda batch: ([image.sigmoid() for image in draw(batch, 3, size, size)],)


def two_frames(batch: int) -> Inputs:
    both = draw(2 * batch, 3, 128, 128)
    return both[:batch], both[batch:], 2


def boxes(batch: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Two objects in each image: corners, and classes from 1."""
    corners = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.4, 0.3, 0.95, 0.9]]) * size
    return [(corners, torch.tensor([1, 2]))] * batch


def class_loss(net: nn.Module, inputs: Inputs) -> Tensor:
    logits = net(*inputs)
    return F.cross_entropy(logits, torch.arange(len(logits)) % CLASSES)


def pixel_loss(net: nn.Module, inputs: Inputs) -> Tensor:
    logits = net(*inputs)["out"]
    return F.cross_entropy(logits, logits.new_ones(logits[:, 0].shape).long())


def box_loss(net: nn.Module, inputs: Inputs) -> Tensor:
    images = inputs[0]
    targets = [
        {"boxes": corners, "labels": labels}
        for corners, labels in boxes(len(images), images[0].shape[-1])
    ]
    return sum(net(images, targets).values(), torch.zeros(()))


def flow_loss(net: nn.Module, inputs: Inputs) -> Tensor:
    return sum(((flow - 1).abs().mean() for flow in net(*inputs)), torch.zeros(()))


def yolo_loss(net: nn.Module, inputs: Inputs) -> Tensor:
    raw = net(*inputs)
    targets = [
        (torch.cat(((c[:, :2] + c[:, 2:]) / 2, c[:, 2:] - c[:, :2]), 1), labels)
        for c, labels in boxes(len(inputs[0]), inputs[0].shape[-1])
    ]
    while not hasattr(net, "head"):  # a wrapper
        net = net.module
    return (yolov5_loss if isinstance(net, YoloV5) else yolov8_loss)(net, raw, targets)


# -- what is exported -----------------------------------------------------------------------


def whole(net: nn.Module, inputs: Inputs) -> Exported:
    return net, inputs


class Heads(nn.Module):
    """What is left of a detector without its resizing, anchors and suppression."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


class SingleStage(Heads):
    def forward(self, image: Tensor) -> list[Tensor]:
        return tree_leaves(self.net.head(list(self.net.backbone(image).values())))


class TwoStage(Heads):
    def forward(self, image: Tensor, regions: Tensor) -> list[Tensor]:
        features = list(self.net.backbone(image).values())
        proposed = self.net.rpn.head(features)
        found = self.net.roi_heads.box_predictor(self.net.roi_heads.box_head(regions))
        return tree_leaves((features, proposed, found))


class Flow(Heads):
    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        return self.net(first, second, 2)


def single_stage(net: nn.Module, _: Inputs) -> Exported:
    return SingleStage(net), (draw(1, 3, 320, 320),)


def two_stage(net: nn.Module, _: Inputs) -> Exported:
    depth = net.backbone.out_channels
    return TwoStage(net), (draw(1, 3, 96, 96), draw(2, depth, 7, 7))


def flow(net: nn.Module, inputs: Inputs) -> Exported:
    return Flow(net), inputs[:2]


# -- the networks ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network, what it takes, how it is trained and what of it is exported."""

    factory: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    loss: Callable[[nn.Module, Inputs], Tensor] = class_loss
    exported: Callable[[nn.Module, Inputs], Exported] = whole
    macs: float = 0.6


CASES = {
    "vit": Case(vit, picture(64)),
    "swin": Case(swin, picture(64)),
    "convnext": Case(convnext, picture(64)),
    "shufflenet": Case(shufflenet, picture(64)),
    "densenet": Case(densenet, picture(64)),
    "mobilenet": Case(mobilenet, picture(64)),
    "efficientnet": Case(efficientnet, picture(96)),
    "regnet": Case(regnet, picture(64)),
    "deeplab": Case(deeplab, picture(64), pixel_loss),
    "ssdlite": Case(ssdlite, list_of_pictures(320), box_loss, single_stage),
    "faster_rcnn": Case(faster_rcnn, list_of_pictures(96), box_loss, two_stage),
    "raft": Case(raft, two_frames, flow_loss, flow),
    "yolov5": Case(YoloV5, picture(64), yolo_loss),
    "yolov8": Case(YoloV8, picture(64), yolo_loss),
}


def outputs(net: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(net(*inputs)) if isinstance(leaf, Tensor)]


def randomised(net: nn.Module, inputs: Inputs) -> nn.Module:
    """Constant parameters become random, statistics near to those of the inputs; eval.

    A fresh network's norms compute x * 1 + 0, which hides a channel taken from the wrong place;
    statistics that do not fit let the signal die out on its way.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) - 0.5

    def fit(norm: nn.Module, arguments: Inputs) -> None:
        values = arguments[0].transpose(0, 1).flatten(1)
        if values.shape[1] < 2:
            return
        variance = values.var(1).clamp(min=1e-4)
        norm.running_mean.copy_(values.mean(1) + 0.5 * noise(len(values)) * variance.sqrt())
        norm.running_var.copy_(variance * (1 + 0.5 * noise(len(values))))

    for parameter in net.parameters():
        low, high = parameter.detach().aminmax()
        if low == high:
            spread = 0.1 * noise(*parameter.shape)
            parameter.data = 0.15 + spread if 0 < low < 0.1 else low + spread
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    handles = [norm.register_forward_pre_hook(fit) for norm in norms]
    outputs(net.eval(), inputs)
    for handle in handles:
        handle.remove()
    return net


def planned(case: Case) -> tuple[nn.Module, nn.Module, PruningPlan]:
    """The network, the pruned one and the plan."""
    torch.manual_seed(0)
    net = randomised(case.factory(), case.inputs(2))
    plan = bevel.plan_pruning(net, case.inputs(1), budget={"macs": case.macs})
    return net, bevel.prune(net, plan), plan


def step_of_training(net: nn.Module, case: Case) -> set[str]:
    """One step of SGD; the names of the parameters that got a gradient, all of them finite."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    loss = case.loss(net.train(), case.inputs(2))
    loss.backward()
    optimizer.step()
    net.eval()
    assert loss.isfinite()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert [name for name, grad in gradients.items() if not grad.isfinite().all()] == []
    assert all(p.isfinite().all() for p in net.parameters())
    return set(gradients)


# -- another process ------------------------------------------------------------------------


def answer() -> None:
    """What the other process does: loads each file it is told of and compares the outputs."""
    for line in sys.stdin:
        name, folder = json.loads(line)
        case, place = CASES[name], Path(folder)
        net = bevel.load_pruned(case.factory, place / "pruned.safetensors")
        expected = torch.load(place / "outputs.pt", weights_only=True)
        got = outputs(net, case.inputs(1))
        same = [relative(a, b) for a, b in zip(expected, got, strict=True)]
        sys.stdout.write(json.dumps(same) + "\n")
        sys.stdout.flush()


@pytest.fixture(scope="module")
def reader() -> Iterator[Callable[[str, Path], list[float]]]:
    """A process that has not seen the networks; it starts once, for imports take seconds."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import test_real_networks; test_real_networks.answer()"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(name: str, folder: Path) -> list[float]:
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps([name, str(folder)]), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    with process:
        yield ask


def relative(expected: Tensor, got: Tensor) -> float:
    """The largest difference as a share of the largest magnitude."""
    assert expected.shape == got.shape
    if expected.numel() == 0:
        return 0.0
    scale = expected.double().abs().max().clamp(min=1e-30)
    return float((expected.double() - got.double()).abs().max() / scale)


def onnx_differences(net: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> list[float]:
    """Exported and run by ONNX Runtime: each output's difference from torch."""
    expected = outputs(net, inputs)
    with quiet(), torch.no_grad():
        program = torch.export.export(net, inputs)
    write_onnx(program, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    arrays: list[np.ndarray] = session.run(
        None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    )
    return [relative(a, torch.from_numpy(b)) for a, b in zip(expected, arrays, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_prunes_trains_reloads_and_exports(
    name: str, tmp_path: Path, reader: Callable[[str, Path], list[float]]
) -> None:
    case = CASES[name]
    net, pruned, plan = planned(case)
    assert plan.after.macs <= case.macs * plan.before.macs
    bevel.verify_pruning(net, pruned, plan, case.inputs(1))
    assert step_of_training(pruned, case) == step_of_training(net, case)

    bevel.save_pruned(pruned, plan, tmp_path / "pruned.safetensors")
    torch.save(outputs(pruned, case.inputs(1)), tmp_path / "outputs.pt")
    differences = reader(name, tmp_path)
    assert differences
    assert max(differences) <= 1e-6

    module, inputs = case.exported(pruned, case.inputs(1))
    differences = onnx_differences(module.eval(), inputs, tmp_path / "pruned.onnx")
    assert differences
    assert max(differences) <= 1e-4


def test_compiles_and_trains_as_part_of_a_group_of_processes(tmp_path: Path) -> None:
    case = CASES["yolov8"]
    _, pruned, _ = planned(case)
    compiled = torch.compile(pruned, backend="eager")
    for a, b in zip(
        outputs(pruned, case.inputs(1)), outputs(compiled, case.inputs(1)), strict=True
    ):
        assert relative(a, b) <= 1e-6
    alone = copy.deepcopy(pruned)
    torch.distributed.init_process_group(
        "gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1
    )
    try:
        step_of_training(DistributedDataParallel(pruned), case)
    finally:
        torch.distributed.destroy_process_group()
    step_of_training(alone, case)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(pruned.state_dict()[name], tensor)
