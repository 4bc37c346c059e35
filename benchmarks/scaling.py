"""How the cost of planning and slicing grows with the depth of a network.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json --docs docs/scaling.md

times ResNet-20 to ResNet-1202 (He et al. 2016, 32x32 images) and a vision transformer of 12 to 96
blocks (192 wide, 224x224 images): one forward pass, the analysis, the whole plan (analysis, l2
scores, global allocation of 50 % of the MACs) and the slicing, each the best of several
repetitions, and fits the exponent of the growth by least squares on logarithms.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import bevel
from bevel.models.resnet import ResNet

RESNETS = (20, 56, 110, 218, 434, 866, 1202)
VITS = (12, 24, 48, 96)
MEASURED = ("forward", "analysis", "plan", "slicing")


def networks() -> Iterator[tuple[str, int, nn.Module, Tensor]]:
    """Family, depth, network and input."""
    for depth in RESNETS:
        yield "ResNet", depth, ResNet((depth - 2) // 6), torch.randn(1, 3, 32, 32)
    for depth in VITS:
        vit = VisionTransformer(embed_dim=192, depth=depth, num_heads=3)
        yield "ViT", depth, vit, torch.randn(1, 3, 224, 224)


def best(call: Callable[[], Any], repetitions: int) -> tuple[float, Any]:
    """Seconds of the fastest of several calls, and the last result."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return min(times), result


def measure(net: nn.Module, image: Tensor, repetitions: int) -> dict[str, float]:
    """Seconds for a forward pass, the analysis, the plan with it, and the slicing."""
    net.eval()
    with torch.no_grad():
        net(image)
        forward, _ = best(lambda: net(image), repetitions)
    analysis, _ = best(lambda: bevel.analyze(net, image), repetitions)
    plan, found = best(lambda: bevel.plan_pruning(net, image, budget={"macs": 0.5}), repetitions)
    slicing, _ = best(lambda: bevel.prune(net, found), repetitions)
    return {"forward": forward, "analysis": analysis, "plan": plan, "slicing": slicing}


def exponent(points: list[dict[str, Any]], what: str) -> float:
    """The p of seconds ~ depth ** p, by least squares on logarithms; 1 is linear."""
    x = [math.log(point["depth"]) for point in points]
    y = [math.log(point[what]) for point in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def page(report: dict[str, Any]) -> str:
    """docs/scaling.md: a chart and a table for each family."""
    lines = [
        "# Growth with depth",
        "",
        f"`{report['command']}`, {report['date']}, {report['machine']}, "
        f"{report['threads']} threads, torch {report['versions']['torch']}, "
        f"timm {report['versions']['timm']}. Seconds, the best of {report['repetitions']}; "
        "the plan includes the analysis. An exponent of 1 is linear growth.",
    ]
    for family in ("ResNet", "ViT"):
        points = [point for point in report["points"] if point["family"] == family]
        lines += ["", f"## {family}", "", *_chart(family, points), "", *_table(points), ""]
        fits = ", ".join(f"{what} {exponent(points, what):.2f}" for what in MEASURED)
        lines.append(f"Exponents: {fits}.")
    return "\n".join(lines) + "\n"


def _chart(family: str, points: list[dict[str, Any]]) -> list[str]:
    depths = ", ".join(str(point["depth"]) for point in points)
    rows = [", ".join(f"{point[what]:.3f}" for point in points) for what in ("analysis", "plan")]
    low, high = points[0]["depth"], points[-1]["depth"]
    return [
        "```mermaid",
        "xychart-beta",
        f'    title "{family}: seconds by depth (lower line: analysis, upper: plan)"',
        f'    x-axis "depth" [{depths}]',
        f'    y-axis "seconds, depth {low} to {high}"',
        *(f"    line [{row}]" for row in rows),
        "```",
    ]


def _table(points: list[dict[str, Any]]) -> list[str]:
    head = "| depth | " + " | ".join(MEASURED) + " | analysis in forward passes |"
    lines = [head, "| ---: " * (len(MEASURED) + 2) + "|"]
    for point in points:
        cells = " | ".join(f"{point[what]:.3f}" for what in MEASURED)
        ratio = point["analysis"] / point["forward"]
        lines.append(f"| {point['depth']} | {cells} | {ratio:.1f} |")
    return lines


def main() -> None:
    """Measure, write the JSON and, if asked, the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    points = []
    for family, depth, net, image in networks():
        numbers = measure(net, image, options.repetitions)
        points.append({"family": family, "depth": depth, **numbers})
        print(family, depth, {what: round(value, 3) for what, value in numbers.items()})
    report = {
        "command": "python benchmarks/scaling.py --out benchmarks/results/scaling.json "
        "--docs docs/scaling.md",
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "repetitions": options.repetitions,
        "versions": {
            "torch": torch.__version__, "timm": timm.__version__,
            "python": platform.python_version(), "bevel": bevel.__version__,
        },
        "points": points,
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.docs:
        options.docs.write_text(page(report), encoding="utf-8")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.processor()


if __name__ == "__main__":
    main()
