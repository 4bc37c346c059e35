"""What surgery finds in networks, what its fits are worth before any training, and what it saves.

    python benchmarks/surgery_networks.py --shared FOLDER --work DIR \
        --out benchmarks/results/surgery_networks.json

Per network and set of rules: places by rule, the error of the outputs on images that nothing was
fitted on, for the naive swap and for what bevel leaves, and with real weights the top-1 accuracy of
both, all without training. Then the times of one image on one thread, files timed in turn. With
--resume what --out holds is kept, and only what it lacks is done. --table prints it as a page does.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import tempfile
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from int8_networks import Images, Network, build, find, load
from torch import Tensor, nn

import bevel
from bevel.core.files import write_json
from bevel.core.progress import note
from bevel.measurement.bench import Subject, measure_all
from bevel.models.batchnorm import unfold
from bevel.rewriting.apply import Lite
from bevel.runtimes import load_runtime

REAL = (("MobileNetV3-Small", ("squeeze_excite",)), ("MobileNetV3-Small", ("hardswish",)))
"""Single rules on trained weights, besides the sets."""

RANDOM = (
    "torchvision:mobilenet_v3_large", "torchvision:efficientnet_b0", "torchvision:regnet_y_400mf",
    "torchvision:mnasnet0_5", "torchvision:convnext_tiny", "timm:tf_efficientnetv2_b0",
    "timm:ghostnet_100", "timm:lcnet_100", "timm:legacy_seresnet18", "timm:repvgg_a0",
    "timm:mobileone_s0", "timm:deit_tiny_patch16_224",
)  # fmt: skip
"""Networks with random weights, on which the whole of `lite` or `tidl` is tried."""

SETS = {"torchvision:convnext_tiny": "tidl"}
TESTED = 500
PACKAGES = ("bevel", "torch", "torchvision", "timm", "onnxruntime", "openvino",
    "ai-edge-litert", "executorch",
)  # fmt: skip


def outputs(net: nn.Module, images: Images) -> tuple[Tensor, Tensor]:
    """Logits and labels of the test images."""
    with torch.no_grad():
        found = [(net(x), labels) for x, labels in images.test]
    logits, labels = (torch.cat(part)[:TESTED] for part in zip(*found, strict=True))
    return logits, labels


def scores(net: nn.Module, images: Images, wanted: Tensor) -> dict[str, float]:
    """How near a network is to the original without training."""
    found, labels = outputs(net.eval(), images)
    top = found.argmax(1)
    return {
        "error": float((found - wanted).square().sum() / wanted.square().sum()),
        "agreement": float((top == wanted.argmax(1)).float().mean()),
        "top1": float((top == labels).float().mean()),
    }


def times(lite: Lite, net: nn.Module, images: Images, runtime: str) -> dict[str, float]:
    """Median milliseconds of one image, by network and precision."""
    with tempfile.TemporaryDirectory() as folder:
        subjects = []
        for precision in ("float32", "int8"):
            for label, variant in (("original", net), ("lite", lite.net.eval())):
                path = Path(folder) / f"{label}-{precision}{load_runtime(runtime).SUFFIX}"
                artifact = bevel.export(
                    variant,
                    images.calibration[0][:2],
                    runtime=runtime,
                    precision=precision,
                    calibration=images.calibration[:1],  # times do not depend on the ranges
                    path=path,
                )
                subjects.append(Subject(f"{label} {precision}", artifact, variant))
        return {m.label: m.latency.p50_ms for m in measure_all(subjects) if m.latency is not None}


def operate(rules: Any, net: nn.Module, images: Images, *, fit: bool) -> Lite:
    """Surgery, fitted on the calibration images or naive."""
    example = images.calibration[0][:2]
    return bevel.surgery(net, example, rules=rules, calibration=images.calibration, fit=fit)


def entry(
    name: str, rules: Any, net: nn.Module, trained: bool, images: Images, lite: Lite
) -> dict[str, Any]:
    """One network and set of rules, but for the times."""
    wanted, labels = outputs(net, images)
    naive = operate(rules, net, images, fit=False)
    return {
        "network": name,
        "weights": "trained" if trained else "random",
        "rules": rules if isinstance(rules, str) else ", ".join(rules),
        "rewritten": Counter(site.rule for site in lite.sites if site.reason is None),
        "left alone": Counter(f"{s.rule}: {s.reason}" for s in lite.sites if s.reason is not None),
        "proven": lite.proven,
        "layers fitted again": len(lite.refits),
        "top1": float((wanted.argmax(1) == labels).float().mean()) if trained else None,
        "naive": scores(naive.net, images, wanted),
        "lite": scores(lite.net, images, wanted),
        "ms": {},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: times of the original -> the lite network, by runtime."""
    runtimes = list(dict.fromkeys(runtime for row in rows for runtime in row["ms"]))
    heads = ["network", "set", "places", "error, naive", "error, bevel"]
    heads += [f"{runtime}, {kind}" for runtime in runtimes for kind in ("float32", "int8")]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    for row in rows:
        if not row["ms"]:
            continue
        cells = [row["network"], f"`{row['rules']}`", str(sum(row["rewritten"].values()))]
        cells += [_number(row[kind]["error"]) for kind in ("naive", "lite")]
        for runtime in runtimes:
            ms = row["ms"].get(runtime)
            for kind in ("float32", "int8"):
                pair = [f"{ms[f'{net} {kind}']:.2f}" for net in ("original", "lite")] if ms else []
                cells.append(" -> ".join(pair) or "not run")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def main() -> None:
    """Every network in turn; what is finished is written at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, help="checkpoints and images")
    parser.add_argument("--work", type=Path, help="where images are unpacked")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--runtime", action="append", help="may be repeated; onnxruntime")
    parser.add_argument("--only", default="", help="regular expression for networks")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--table", action="store_true", help="print what --out holds")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.out.read_text("utf-8"))["rows"]))
        return
    torch.set_num_threads(1)
    rows = json.loads(given.out.read_text("utf-8"))["rows"] if given.resume else []
    small = "MobileNetV3-Small"
    jobs: list[tuple[Network, Any]] = [(find(name), rules) for name, rules in REAL]
    jobs += [(find(small), "lite")]
    jobs += [(Network(name.partition(":")[2], name), SETS.get(name, "lite")) for name in RANDOM]
    for network, rules in jobs:
        if not re.search(given.only, network.name):
            continue
        said = rules if isinstance(rules, str) else ", ".join(rules)
        asked = (given.runtime or ["onnxruntime"]) if isinstance(rules, str) else []
        row = next((r for r in rows if (r["network"], r["rules"]) == (network.name, said)), None)
        missing = [runtime for runtime in asked if row is None or runtime not in row["ms"]]
        if row is not None and not missing:
            continue
        images = load(network, given.shared, None, given.work)
        net, trained = build(network, given.shared, images)
        unfold(net, images.calibration)
        note(f"{network.name}: {said}")
        if row is None:
            lite = operate(rules, net, images, fit=True)
            row = entry(network.name, rules, net, trained, images, lite)
            rows.append(row)
        else:  # the same layers, whatever they were fitted on
            lite = operate(
                rules, net, replace(images, calibration=images.calibration[:1]), fit=True
            )
        for runtime in missing:
            row["ms"][runtime] = times(lite, net, images, runtime)
            _write(given.out, rows)
        _write(given.out, rows)
        print(json.dumps(row), flush=True)


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    record = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "rows": rows,
    }
    write_json(out, record)


if __name__ == "__main__":
    main()
