"""What the channels that int8 files for ONNX Runtime get cost or save: docs/benchmarks.md.

    python benchmarks/widths.py --out benchmarks/results/widths.json

Each network, whole or cut to some of its MACs, with random weights (time does not depend on them),
becomes one int8 file as `bevel export` writes it and one without `_onnx_widths.widen`. Their
outputs must be the same to the last bit; float32 and both are timed in turn, one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

import bevel
from bevel.core.files import write_json
from bevel.core.records import Artifact
from bevel.devices import open_device
from bevel.measurement.bench import Subject, time_in_turn
from bevel.runtimes import _onnx_int8
from bevel.runtimes.onnxruntime import open_session

PACKAGES = ("bevel", "torch", "torchvision", "timm", "onnxruntime")


@dataclass(frozen=True)
class Case:
    """A network for images of a size, cut to a share of its MACs with widths in multiples."""

    model: str
    size: int
    macs: float = 1.0
    align: int = 8

    def __str__(self) -> str:
        cut = "" if self.macs == 1 else f", {self.macs:.0%} of the MACs, align {self.align}"
        return f"{self.model.partition(':')[2]}, {self.size} px{cut}"

    def build(self) -> tuple[nn.Module, torch.Tensor]:
        """The network and images."""
        torch.manual_seed(0)
        net, x = bevel.build_model(self.model).eval(), torch.randn(8, 3, self.size, self.size)
        if self.macs < 1:
            plan = bevel.plan_pruning(
                net, x[:1], criterion="l2", allocate="uniform", budget={"macs": self.macs},
                align=self.align,
            )  # fmt: skip
            net = bevel.prune(net, plan)
        return net, x


CASES = (
    Case("timm:mobilenetv1_100", 128, 0.26, 16),
    Case("torchvision:mobilenet_v2", 224),
    Case("torchvision:mobilenet_v2", 224, 0.5),
    Case("timm:tf_mobilenetv3_small_100", 224),
    Case("torchvision:mobilenet_v3_large", 224),
    Case("timm:efficientnet_b0", 224),
    Case("torchvision:regnet_x_400mf", 224),
    Case("torchvision:resnet18", 224),
    Case("bevel:resnet20", 32, 0.3),
    Case("bevel:resnet20", 32, 0.4, 4),
    Case("bevel:resnet56", 32, 0.5, 1),
    Case("bevel:googlenet", 32, 0.5),
    Case("bevel:vgg16_bn", 32, 0.3, 1),
)


def files(case: Case, folder: Path) -> dict[str, Artifact]:
    """Float, int8 without added channels, and int8."""
    net, x = case.build()
    made = {}
    for label, precision, change in (
        ("float32", "float32", _onnx_int8.widen),
        ("as it is", "int8", bool),
        ("widened", "int8", _onnx_int8.widen),
    ):
        with patch.object(_onnx_int8, "widen", change):
            made[label] = bevel.export(
                net, x[:1], runtime="onnxruntime", precision=precision, calibration=[x],
                path=folder / f"{label}.onnx",
            )  # fmt: skip
    plain, wide = (
        open_session(Path(made[label].path), threads=1).run([x[:1].numpy()])[0]
        for label in ("as it is", "widened")
    )
    if not np.array_equal(plain, wide):
        raise SystemExit(f"{case}: the added channels change the outputs")
    return made


def row(case: Case) -> dict[str, Any]:
    """Milliseconds of each file."""
    with tempfile.TemporaryDirectory() as folder:
        made = files(case, Path(folder))
        subjects = [Subject(label, artifact) for label, artifact in made.items()]
        times = time_in_turn(open_device("local"), subjects, 1)
        sizes = {label: artifact.size_bytes for label, artifact in made.items()}
    return {
        "network": str(case),
        "p50_ms": {s.label: t.p50_ms for s, t in zip(subjects, times, strict=True)},
        "bytes": sizes,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| network | float32, ms | int8 as it is, ms | widened, ms | time | size |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for found in rows:
        ms, size = found["p50_ms"], found["bytes"]
        lines.append(
            f"| {found['network']} | {ms['float32']:.3g} | {ms['as it is']:.3g} | "
            f"{ms['widened']:.3g} | {ms['widened'] / ms['as it is'] - 1:+.1%} | "
            f"{size['widened'] / size['as it is'] - 1:+.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Export, compare and time each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    given = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(row(case))
        print(json.dumps(rows[-1]), flush=True)
    device = open_device("local").facts("onnxruntime")
    record = {
        "machine": device.model_dump(mode="json"),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }
    write_json(given.out, record)
    print(table(rows))


if __name__ == "__main__":
    main()
