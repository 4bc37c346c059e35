"""Detectors for the tests of surgery: in the style of YOLOX, and one that takes lists of images.

YOLOv5 and YOLOv8 are those that the tests of pruning have.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from prune.yolo import C3, Conv, Focus, Neck, YoloV5, YoloV8, cell_centres

__all__ = ["Retina", "YoloV5", "YoloV8", "YoloX"]


class SPP(nn.Module):
    """Three max-poolings of growing size, side by side."""

    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, ...] = (5, 9, 13)) -> None:
        super().__init__()
        hidden = inputs // 2
        self.conv1 = Conv(inputs, hidden)
        self.m = nn.ModuleList(nn.MaxPool2d(kernel, 1, kernel // 2) for kernel in kernels)
        self.conv2 = Conv(hidden * (len(kernels) + 1), outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))


class SplitHead(nn.Module):
    """YOLOX's head: classes from one tower of layers, box and objectness from another."""

    stride = (8, 16, 32)

    def __init__(self, classes: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        w = widths[0]
        self.stems = nn.ModuleList(Conv(width, w) for width in widths)
        self.cls_convs, self.reg_convs = (
            nn.ModuleList(nn.Sequential(Conv(w, w, 3), Conv(w, w, 3)) for _ in widths)
            for _ in range(2)
        )
        self.cls_preds, self.reg_preds, self.obj_preds = (
            nn.ModuleList(nn.Conv2d(w, outputs, 1) for _ in widths) for outputs in (classes, 4, 1)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        raw = []
        for i, feature in enumerate(features):
            x = self.stems[i](feature)
            names, boxes = self.cls_convs[i](x), self.reg_convs[i](x)
            found = self.reg_preds[i](boxes), self.obj_preds[i](boxes), self.cls_preds[i](names)
            raw.append(torch.cat(found, 1))
        if self.training:
            return raw
        centres, strides = cell_centres(raw, self.stride)
        flat = torch.cat([x.flatten(2) for x in raw], 2)
        xy, wh, rest = flat[:, :2], flat[:, 2:4], flat[:, 4:]
        decoded = (xy * strides + centres, torch.exp(wh) * strides, rest.sigmoid())
        return torch.cat(decoded, 1).permute(0, 2, 1), raw


class YoloX(nn.Module):
    """Focus, CSPDarknet, neck, decoupled head. Images (N, 3, H, W), H and W multiples of 32.

    Trains on a list of (N, 5 + classes, H / s, W / s); eval gives the decoded boxes as well.
    """

    def __init__(self, classes: int = 4, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = Focus(3, w)
        self.dark2 = nn.Sequential(Conv(w, 2 * w, 3, 2), C3(2 * w, 2 * w))
        self.dark3 = nn.Sequential(Conv(2 * w, 4 * w, 3, 2), C3(4 * w, 4 * w))
        self.dark4 = nn.Sequential(Conv(4 * w, 6 * w, 3, 2), C3(6 * w, 6 * w))
        self.dark5 = nn.Sequential(
            Conv(6 * w, 8 * w, 3, 2), SPP(8 * w, 8 * w), C3(8 * w, 8 * w, shortcut=False)
        )
        widths = (4 * w, 6 * w, 8 * w)
        self.neck = Neck(C3, widths)
        self.head = SplitHead(classes, widths)

    def forward(self, x: Tensor) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        p3 = self.dark3(self.dark2(self.stem(x)))
        p4 = self.dark4(p3)
        return self.head(self.neck(p3, p4, self.dark5(p4)))


class Retina(nn.Module):
    """One head for two levels. Takes a list of images (3, H, W) of any size, gives dicts of boxes.

    Args:
        classes: of objects.
        threshold: the score above which a cell is an object.
    """

    def __init__(self, classes: int = 3, threshold: float = 0.7) -> None:
        super().__init__()
        self.threshold = threshold
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())
        self.tower = nn.Sequential(nn.Conv2d(8, 16, 3, 1, 1), nn.SiLU(inplace=True))
        self.scores, self.boxes = nn.Conv2d(16, classes, 1), nn.Conv2d(16, 4, 1)
        nn.init.normal_(self.scores.weight, std=4.0)  # of some cells it is sure, of some not

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        images = [image - image.mean((1, 2), keepdim=True) for image in images]
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        batch = images[0].new_zeros(len(images), 3, height, width)
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        low = self.stem(batch)
        towers = [self.tower(feature) for feature in (low, self.down(low))]
        scores = torch.cat([self.scores(x).flatten(2) for x in towers], 2).sigmoid()
        boxes = torch.cat([self.boxes(x).flatten(2) for x in towers], 2).exp()
        centres, strides = cell_centres(towers, (4, 8))
        corners = (centres - boxes[:, :2] * strides, centres + boxes[:, 2:] * strides)
        places = torch.cat(corners, 1).transpose(1, 2)
        return [self.found(*pair) for pair in zip(places, scores, strict=True)]

    def found(self, boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """The objects of an image: boxes (M, 4), scores (M,), labels (M,)."""
        best, labels = scores.max(0)
        sure = best > self.threshold
        boxes, best, labels = boxes[sure], best[sure], labels[sure]
        kept = batched_nms(boxes, best, labels, 0.5)
        return {"boxes": boxes[kept], "scores": best[kept], "labels": labels[kept]}
