"""Small detectors in the styles of YOLOv5 and YOLOv8, with a loss each, to be pruned by the tests.

They are written for these tests after the published structures: what a pruner meets in them is the
slicing of the first layer, chunks and concatenations inside a block, pooling pyramids, a neck that
joins three scales, heads whose channels are viewed as anchors, boxes and classes, and a forward
that returns something else when it trains.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Target = tuple[Tensor, Tensor]
"""Boxes (M, 4) as centre, width and height in pixels, and classes (M,), of one image."""


class Conv(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Focus(nn.Module):
    """Every second pixel in each direction, as four times the channels."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = Conv(inputs * 4, outputs, kernel)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.conv(torch.cat(corners, 1))


class Bottleneck(nn.Module):
    """Two convolutions with a shortcut where the widths agree."""

    def __init__(self, inputs: int, outputs: int, *, shortcut: bool, first: int = 1) -> None:
        super().__init__()
        self.cv1 = Conv(inputs, outputs, first)
        self.cv2 = Conv(outputs, outputs, 3)
        self.add = shortcut and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C3(nn.Module):
    """A cross-stage block of YOLOv5: one branch of bottlenecks, one past them."""

    def __init__(self, inputs: int, outputs: int, count: int = 1, *, shortcut: bool = True) -> None:
        super().__init__()
        hidden = outputs // 2
        self.cv1 = Conv(inputs, hidden)
        self.cv2 = Conv(inputs, hidden)
        self.cv3 = Conv(2 * hidden, outputs)
        blocks = [Bottleneck(hidden, hidden, shortcut=shortcut) for _ in range(count)]
        self.m = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C2f(nn.Module):
    """A cross-stage block of YOLOv8: two chunks, and the result of each bottleneck, joined."""

    def __init__(
        self, inputs: int, outputs: int, count: int = 1, *, shortcut: bool = False
    ) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1 = Conv(inputs, 2 * self.c)
        self.cv2 = Conv((2 + count) * self.c, outputs)
        self.m = nn.ModuleList(
            Bottleneck(self.c, self.c, shortcut=shortcut, first=3) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.m)
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """A pyramid of three max-poolings in a row."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 5) -> None:
        super().__init__()
        hidden = inputs // 2
        self.cv1 = Conv(inputs, hidden)
        self.cv2 = Conv(hidden * 4, outputs)
        self.m = nn.MaxPool2d(kernel, 1, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.m(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Neck(nn.Module):
    """Down the scales with upsampling, up again with strides; each step joins two maps."""

    def __init__(self, block: type[C3] | type[C2f], widths: tuple[int, int, int]) -> None:
        super().__init__()
        low, middle, high = widths
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.down4 = block(high + middle, middle, shortcut=False)
        self.down3 = block(middle + low, low, shortcut=False)
        self.stride3 = Conv(low, low, 3, 2)
        self.up4 = block(low + middle, middle, shortcut=False)
        self.stride4 = Conv(middle, middle, 3, 2)
        self.up5 = block(middle + high, high, shortcut=False)

    def forward(self, p3: Tensor, p4: Tensor, p5: Tensor) -> list[Tensor]:
        middle = self.down4(torch.cat((self.up(p5), p4), 1))
        low = self.down3(torch.cat((self.up(middle), p3), 1))
        middle = self.up4(torch.cat((self.stride3(low), middle), 1))
        high = self.up5(torch.cat((self.stride4(middle), p5), 1))
        return [low, middle, high]


def cell_centres(features: list[Tensor], strides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The centres (2, A) of all cells in pixels, and their strides (1, A)."""
    points, sizes = [], []
    for feature, stride in zip(features, strides, strict=True):
        height, width = feature.shape[-2:]
        y = torch.arange(height, device=feature.device, dtype=feature.dtype) + 0.5
        x = torch.arange(width, device=feature.device, dtype=feature.dtype) + 0.5
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        points.append(torch.stack((grid_x, grid_y)).view(2, -1) * stride)
        sizes.append(torch.full((1, height * width), stride, dtype=x.dtype, device=x.device))
    return torch.cat(points, 1), torch.cat(sizes, 1)


class AnchorHead(nn.Module):
    """YOLOv5's head: per cell and anchor a box, an objectness and the classes."""

    stride = (8, 16, 32)

    def __init__(self, classes: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.nc, self.no, self.na = classes, classes + 5, 3
        sizes = torch.tensor([[10, 13], [16, 30], [33, 23]])
        self.register_buffer("anchors", torch.stack([sizes * 2**i for i in range(3)]).float())
        self.m = nn.ModuleList(nn.Conv2d(width, self.no * self.na, 1) for width in widths)

    def forward(self, features: list[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        raw, decoded = [], []
        for i, layer in enumerate(self.m):
            x = layer(features[i])
            batch, _, height, width = x.shape
            x = x.view(batch, self.na, self.no, height, width).permute(0, 1, 3, 4, 2).contiguous()
            raw.append(x)
            if self.training:
                continue
            y, x_ = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
            grid_y, grid_x = torch.meshgrid(y, x_, indexing="ij")
            grid = torch.stack((grid_x, grid_y), 2).to(x.dtype)
            xy, wh, rest = x.sigmoid().split((2, 2, self.nc + 1), 4)
            xy = (xy * 2 - 0.5 + grid) * self.stride[i]
            wh = (wh * 2) ** 2 * self.anchors[i].view(1, self.na, 1, 1, 2)
            decoded.append(torch.cat((xy, wh, rest), 4).view(batch, -1, self.no))
        return raw if self.training else (torch.cat(decoded, 1), raw)


class DecoupledHead(nn.Module):
    """YOLOv8's head: boxes as distributions of distances, and classes, from separate layers."""

    stride = (8, 16, 32)

    def __init__(self, classes: int, widths: tuple[int, int, int], bins: int = 8) -> None:
        super().__init__()
        self.nc, self.reg_max = classes, bins
        self.no = classes + bins * 4
        box, name = max(16, widths[0] // 4, bins * 4), max(widths[0], classes)
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(w, box, 3), Conv(box, box, 3), nn.Conv2d(box, 4 * bins, 1))
            for w in widths
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(Conv(w, name, 3), Conv(name, name, 3), nn.Conv2d(name, classes, 1))
            for w in widths
        )
        self.dfl = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.data[:] = torch.arange(bins).view(1, -1, 1, 1)

    def forward(self, features: list[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        raw = [
            torch.cat((box(x), name(x)), 1)
            for box, name, x in zip(self.cv2, self.cv3, features, strict=True)
        ]
        if self.training:
            return raw
        boxes, names = self.flat(raw)
        centres, strides = cell_centres(raw, self.stride)
        left_top, right_bottom = self.sides(boxes).chunk(2, 1)
        centre = centres + (right_bottom - left_top) / 2 * strides
        size = (left_top + right_bottom) * strides
        return torch.cat((centre, size, names.sigmoid()), 1), raw

    def flat(self, raw: list[Tensor]) -> list[Tensor]:
        """Box distributions (N, 4 * bins, A) and class logits (N, classes, A) of all cells."""
        joined = torch.cat([x.view(x.shape[0], self.no, -1) for x in raw], 2)
        return list(joined.split((self.reg_max * 4, self.nc), 1))

    def sides(self, boxes: Tensor) -> Tensor:
        """Distances (N, 4, A) from the cell's centre: the mean of each distribution."""
        batch, _, cells = boxes.shape
        bins = boxes.view(batch, 4, self.reg_max, cells).transpose(2, 1).softmax(1)
        return self.dfl(bins).view(batch, 4, cells)


class YoloV5(nn.Module):
    """Focus, C3, SPPF, neck, anchors. Images (N, 3, H, W), H and W multiples of 32.

    Trains on a list of (N, 3, H / s, W / s, 5 + classes); eval gives the decoded boxes as well.
    """

    def __init__(self, classes: int = 4, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(Focus(3, w), Conv(w, 2 * w, 3, 2), C3(2 * w, 2 * w))
        self.stage3 = nn.Sequential(Conv(2 * w, 4 * w, 3, 2), C3(4 * w, 4 * w, 2))
        self.stage4 = nn.Sequential(Conv(4 * w, 6 * w, 3, 2), C3(6 * w, 6 * w))
        self.stage5 = nn.Sequential(Conv(6 * w, 8 * w, 3, 2), C3(8 * w, 8 * w), SPPF(8 * w, 8 * w))
        widths = (4 * w, 6 * w, 8 * w)
        self.neck = Neck(C3, widths)
        self.head = AnchorHead(classes, widths)

    def forward(self, x: Tensor) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        p3 = self.stage3(self.stem(x))
        p4 = self.stage4(p3)
        return self.head(self.neck(p3, p4, self.stage5(p4)))


class YoloV8(nn.Module):
    """C2f, SPPF, neck, decoupled head. Images (N, 3, H, W), H and W multiples of 32.

    Trains on a list of (N, 4 * bins + classes, H / s, W / s); eval gives the decoded boxes as well.
    """

    def __init__(self, classes: int = 4, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(
            Conv(3, w, 3, 2), Conv(w, 2 * w, 3, 2), C2f(2 * w, 2 * w, shortcut=True)
        )
        self.stage3 = nn.Sequential(Conv(2 * w, 4 * w, 3, 2), C2f(4 * w, 4 * w, 2, shortcut=True))
        self.stage4 = nn.Sequential(Conv(4 * w, 6 * w, 3, 2), C2f(6 * w, 6 * w, 2, shortcut=True))
        self.stage5 = nn.Sequential(
            Conv(6 * w, 8 * w, 3, 2), C2f(8 * w, 8 * w, shortcut=True), SPPF(8 * w, 8 * w)
        )
        widths = (4 * w, 6 * w, 8 * w)
        self.neck = Neck(C2f, widths)
        self.head = DecoupledHead(classes, widths)

    def forward(self, x: Tensor) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        p3 = self.stage3(self.stem(x))
        p4 = self.stage4(p3)
        return self.head(self.neck(p3, p4, self.stage5(p4)))


def yolov5_loss(net: YoloV5, raw: list[Tensor], targets: list[Target]) -> Tensor:
    """Objectness everywhere; box and class in the cell of each target's centre, all anchors."""
    loss = raw[0].new_zeros(())
    for x, stride in zip(raw, net.head.stride, strict=True):
        wanted = torch.zeros_like(x[..., 4])
        for image, (boxes, classes) in enumerate(targets):
            column, row = (boxes[:, :2] / stride).long().unbind(1)
            wanted[image, :, row, column] = 1
            found = x[image, :, row, column]
            offset = (boxes[:, :2] / stride) % 1
            loss = loss + F.l1_loss(found[..., :2].sigmoid(), offset.expand(3, -1, -1))
            size = (boxes[:, 2:] / 64).expand(3, -1, -1)
            loss = loss + F.l1_loss((found[..., 2:4].sigmoid() * 2) ** 2, size)
            kinds = F.one_hot(classes, net.head.nc).to(x.dtype).expand(3, -1, -1)
            loss = loss + F.binary_cross_entropy_with_logits(found[..., 5:], kinds)
        loss = loss + F.binary_cross_entropy_with_logits(x[..., 4], wanted)
    return loss


def yolov8_loss(net: YoloV8, raw: list[Tensor], targets: list[Target]) -> Tensor:
    """Classes everywhere; the sides of the box in all cells whose centre it covers."""
    boxes, names = net.head.flat(raw)
    centres, strides = cell_centres(raw, net.head.stride)
    sides = net.head.sides(boxes)
    wanted = torch.zeros_like(names)
    loss = names.new_zeros(())
    for image, (found, classes) in enumerate(targets):
        for box, kind in zip(found, classes, strict=True):
            left_top = centres - (box[:2] - box[2:] / 2)[:, None]
            right_bottom = (box[:2] + box[2:] / 2)[:, None] - centres
            distances = torch.cat((left_top, right_bottom))
            inside = (distances > 0).all(0)
            wanted[image, kind, inside] = 1
            goal = (distances / strides)[:, inside].clamp(max=net.head.reg_max - 1)
            loss = loss + F.l1_loss(sides[image][:, inside], goal)
    return loss + F.binary_cross_entropy_with_logits(names, wanted)
