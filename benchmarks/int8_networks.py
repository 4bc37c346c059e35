"""The networks of int8.py, with their weights and images where a folder holds them.

The folder that --shared names may hold `weights/` and `cifar10.zip`, `imagenet_val500.zip` (a
folder per wnid of 224x224 images, and wnids.txt with the 1000 wnids in order), `coco128.zip`.
Without it the weights are random, with batch-norm statistics of the calibration images.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the process that starts the others needs no torch
    from torch import Tensor, nn

    from bevel.core.recipe import Normalize

Batches = list[tuple["Tensor", "Tensor"]]

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
PLAIN = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
"""Means and standard deviations that the weights were trained with."""

CALIBRATION = 256
"""Images that int8 takes its ranges from."""

RANDOM_TEST = 128
"""Random images for agreement where there are no real ones."""

BATCH = 64


@dataclass(frozen=True)
class Network:
    """A network of the benchmark.

    Attributes:
        size: side of its images in pixels.
        drop: share of images that may get another answer in int8 than in float; layers go back to
            float until that holds on the calibration images.
    """

    name: str
    model: str
    size: int = 224
    weights: str | None = None
    data: str = "imagenet_val500"
    normalize: tuple[list[float], list[float]] = IMAGENET
    drop: float | None = None


NETWORKS = (
    Network("ResNet-56", "bevel:resnet56", 32, "resnet56-4bfd9763.th", "cifar10"),
    Network(
        "MobileNetV1",
        "timm:mobilenetv1_100",
        weights="timm.mobilenetv1_100.safetensors",
        normalize=PLAIN,
    ),
    Network(
        "MobileNetV2",
        "torchvision:mobilenet_v2",
        weights="torchvision.mobilenet_v2.safetensors",
        drop=0.05,
    ),
    Network(
        "MobileNetV3-Small",
        "timm:tf_mobilenetv3_small_100",
        weights="timm.tf_mobilenetv3_small_100.safetensors",
        normalize=PLAIN,
        drop=0.15,
    ),
    Network("ResNet-50", "torchvision:resnet50"),
    Network("EfficientNet-B0", "torchvision:efficientnet_b0"),
    Network("RegNetX-400MF", "torchvision:regnet_x_400mf"),
)


def find(name: str) -> Network:
    """The network of that name."""
    return next(network for network in NETWORKS if network.name == name)


@dataclass(frozen=True)
class Images:
    """What a network is calibrated and tested on, in batches; labels are 0 where unknown."""

    calibration: list[Tensor]
    test: Batches
    labelled: bool
    said: str


def build(network: Network, shared: Path | None, images: Images) -> tuple[nn.Module, bool]:
    """The network in eval mode, and whether its weights are trained ones."""
    import torch

    from bevel import build_model
    from bevel.models.batchnorm import recalibrate

    torch.manual_seed(0)
    checkpoint = shared / "weights" / network.weights if shared and network.weights else None
    if checkpoint is not None and checkpoint.is_file():
        return build_model(network.model, {}, checkpoint).eval(), True
    net = build_model(network.model)
    recalibrate(net, images.calibration)
    return net.eval(), False


def load(network: Network, shared: Path | None, data: Path | None, unpacked: Path) -> Images:
    """Real images where there are some: of the shared folder, of --data, or random numbers."""
    if data is not None:
        return _unlabelled(network, data)
    if shared is not None and (shared / f"{network.data}.zip").is_file():
        if network.data == "cifar10":
            return _cifar10(network, _unpack(shared, "cifar10", unpacked))
        if (shared / "coco128.zip").is_file():
            return _imagenet(network, shared, unpacked)
    return _random(network)


def _cifar10(network: Network, root: Path) -> Images:
    """Calibrated on training images, tested on all 10,000."""
    from bevel import load_data
    from bevel.core.recipe import DataSection

    section = DataSection(name="imagefolder", root=root, normalize=_normalize(network))
    data = load_data(section, seed=0)
    calibration = [images for images, _ in data.batches("train", BATCH, limit=CALIBRATION)]
    said = f"{CALIBRATION} training images for calibration, all test images of CIFAR-10"
    return Images(calibration, list(data.batches("test", 256)), labelled=True, said=said)


def _imagenet(network: Network, shared: Path, unpacked: Path) -> Images:
    """Calibrated on photographs of COCO, tested on ImageNet's: no image is in both."""
    import torch

    from bevel.data.unlabelled import folder_images

    root = _unpack(shared, "imagenet_val500", unpacked)
    wnids = next(root.rglob("wnids.txt")).read_text(encoding="utf-8").split()
    test: Batches = []
    for folder in sorted(path for path in root.rglob("n*") if path.is_dir()):
        images = folder_images(folder, _shape(network), _normalize(network), 10**6)
        test.append((images, torch.full((len(images),), wnids.index(folder.name))))
    coco = _unpack(shared, "coco128", unpacked)
    calibration = folder_images(coco, _shape(network), _normalize(network), CALIBRATION)
    said = (
        f"{len(calibration)} images of COCO for calibration, "
        f"{sum(len(images) for images, _ in test)} of ImageNet's validation split"
    )
    return Images(list(calibration.split(BATCH)), test, labelled=True, said=said)


def _unlabelled(network: Network, folder: Path) -> Images:
    """Every second image of a folder for calibration, the others for agreement."""
    from bevel.data.unlabelled import folder_images

    images = folder_images(folder, _shape(network), _normalize(network), 2 * CALIBRATION)
    calibration, test = images[::2], images[1::2]
    said = f"{len(calibration)} images of --data for calibration, {len(test)} others"
    return Images(list(calibration.split(BATCH)), _without_labels(test), labelled=False, said=said)


def _random(network: Network) -> Images:
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(RANDOM_TEST + BATCH, *_shape(network), generator=generator)
    said = f"{BATCH} random images for calibration, {RANDOM_TEST} others"
    test = _without_labels(images[BATCH:])
    return Images([images[:BATCH]], test, labelled=False, said=said)


def _without_labels(images: Tensor) -> Batches:
    import torch

    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(BATCH)]


def _shape(network: Network) -> tuple[int, int, int]:
    return 3, network.size, network.size


def _normalize(network: Network) -> Normalize:
    from bevel.core.recipe import Normalize

    mean, std = network.normalize
    return Normalize(mean=mean, std=std)


def _unpack(shared: Path, name: str, folder: Path) -> Path:
    """The unpacked folder of a zip file; unpacked once."""
    target = folder / name
    done = folder / f"{name}.done"
    if not done.exists():
        with zipfile.ZipFile(shared / f"{name}.zip") as archive:
            archive.extractall(folder)
        done.touch()
    return target
