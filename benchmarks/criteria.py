"""How long every criterion takes on ResNet-56, and the table of docs/criteria.md.

    OMP_WAIT_POLICY=passive python benchmarks/criteria.py --shared FOLDER --cifar10 FOLDER \
        --threads 2 --out benchmarks/results/criteria.json --docs docs/criteria.md

scores all channel groups of the CIFAR-10 ResNet-56 with each criterion, on 500 training images in
batches of 100 where it looks at images. Without --shared the weights are random, without --cifar10
the images are, and the page says so. Beside the time on the clock stands the time that the
processor spent on it, since other work may run on the machine; its load is noted, and threads that
wait for each other do so without spending time. A criterion's
formula and paper are those of its docstring. `--merge` keeps the rows of other thread counts that
the file has already.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bevel
from bevel.core import plugins
from bevel.core.files import write_json
from bevel.core.recipe import DataSection, Normalize
from bevel.graph.couplings import Analysis
from bevel.pruning.criteria import needed
from bevel.pruning.scoring import score_groups

WEIGHTS = "weights/resnet56-4bfd9763.th"
IMAGES = 500
BATCH = 100
NORMALIZE = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
BEGIN, END = "<!-- written by benchmarks/criteria.py -->", "<!-- end of what it writes -->"

Batches = list[tuple[Tensor, Tensor]]


def images(folder: Path | None) -> Batches:
    """Training images of CIFAR-10 without augmentation, or noise."""
    if folder is None:
        torch.manual_seed(0)
        return [
            (torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,)))
            for _ in range(IMAGES // BATCH)
        ]
    section = DataSection(name="imagefolder", root=folder, size=32, normalize=NORMALIZE)
    data = bevel.load_data(section, seed=0)
    return list(data.batches("train", batch_size=BATCH, limit=IMAGES))


def measure(net: nn.Module, analysis: Analysis, criterion: str, batches: Batches) -> dict[str, Any]:
    """Seconds of scoring the whole network once."""
    clock, processor = time.perf_counter(), time.process_time()
    scores = score_groups(net, analysis, criterion, calibration=batches)
    return {
        "criterion": criterion,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - clock,
        "processor_seconds": time.process_time() - processor,
        "load": os.getloadavg()[0],
        "groups": len(scores),
    }


def described(criterion: str) -> tuple[str, str]:
    """Formula and paper, from the docstring of the criterion's file."""
    text = ast.get_docstring(ast.parse(plugins.find("criteria", criterion).path.read_text()))
    paragraphs = [" ".join(part.split()) for part in (text or "").split("\n\n")]
    found = re.search(r"score_\w [=~] .*?(?=, with|, over|, from|; what|\. |\.$)", paragraphs[1])
    if found is None:
        raise SystemExit(f"the docstring of {criterion} has no formula")
    return found[0], paragraphs[-1] if len(paragraphs) > 2 else ""


def table(report: dict[str, Any]) -> str:
    """What the page shows: the machine, and a row for each criterion."""
    rows = report["points"]
    threads = sorted({row["threads"] for row in rows})
    load = f"{min(r['load'] for r in rows):.1f} to {max(r['load'] for r in rows):.1f}"
    heads = [f"{count} thread{'s'[: count - 1]}" for count in threads]
    lines = [
        f"`{report['command']}`, {report['date']}, {report['machine']}, torch {report['torch']}. "
        f"ResNet-56 ({report['weights']}), {report['groups']} prunable groups, {IMAGES} images "
        f"({report['images']}). Seconds on the clock, and in brackets those of the processor; "
        "where other work runs, the clock shows more than a machine of its own would (load, this "
        f"script's own included: {load} on {report['cores']} cores).",
        "",
        "| criterion | formula | needs | comparable | " + " | ".join(heads) + " | paper |",
        "| --- | --- | --- | --- |" + " ---: |" * len(heads) + " --- |",
    ]
    for name in sorted({row["criterion"] for row in rows}):
        formula, paper = described(name)
        cells = [f"`{name}`", "`" + formula.replace("|", "\\|") + "`", needed(name)]
        cells.append("yes" if plugins.load("criteria", name).COMPARABLE else "no")
        for count in threads:
            own = [r for r in rows if r["criterion"] == name and r["threads"] == count]
            cells.append(
                f"{own[0]['seconds']:.2g} ({own[0]['processor_seconds']:.2g})" if own else ""
            )
        lines.append("| " + " | ".join([*cells, paper]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the JSON and, if asked, the page's table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--shared", type=Path, help="folder with the checkpoint")
    parser.add_argument("--cifar10", type=Path, help="folder with train/CLASS/*")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--merge", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    checkpoint = given.shared / WEIGHTS if given.shared else None
    net = bevel.build_model("bevel:resnet56", {}, checkpoint).eval()
    batches = images(given.cifar10)
    analysis = bevel.analyze(net, batches[0][0][:1])
    points: list[dict[str, Any]] = []
    if given.merge:
        kept = json.loads(given.out.read_text(encoding="utf-8"))["points"]
        points = [point for point in kept if point["threads"] != given.threads]
    for name in plugins.own("criteria"):
        points.append(measure(net, analysis, name, batches))
        print({key: points[-1][key] for key in ("criterion", "seconds", "processor_seconds")})
    report = {
        "command": "OMP_WAIT_POLICY=passive python benchmarks/criteria.py --shared FOLDER "
        "--cifar10 FOLDER --threads N --merge --out benchmarks/results/criteria.json "
        "--docs docs/criteria.md",
        "date": datetime.now(tz=UTC).date().isoformat(),
        "machine": _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "bevel": bevel.__version__,
        "weights": "trained" if checkpoint else "random weights",
        "images": "CIFAR-10, training" if given.cifar10 else "noise",
        "groups": len(analysis.prunable),
        "points": points,
    }
    write_json(given.out, report)
    if given.docs:
        text = given.docs.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        written = f"{before}{BEGIN}\n{table(report)}\n{END}{rest.partition(END)[2]}"
        given.docs.write_text(written, encoding="utf-8")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
