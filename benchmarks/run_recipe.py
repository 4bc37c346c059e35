"""Run a recipe (or take up its finished run folder) and write down what it reached.

    python benchmarks/run_recipe.py recipes/resnet56_cifar10.yaml --out RUN \
        --set data.root=DIR --set model.checkpoint=FILE

writes benchmarks/results/NAME.json, from which docs/benchmarks.md is filled, and prints the
section for that page. The JSON holds every number of the run but the raw samples, which stay in
RUN/run.json, and no path of the machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import bevel
from bevel.core import recipe as recipes
from bevel.core.records import RunRecord
from bevel.reporting import COLUMNS, rows, table
from bevel.reporting.summary import duration
from bevel.reporting.text import markdown_table

RESULTS = Path(__file__).parent / "results"

PLACES = ("data.root=", "data.unlabelled=", "model.checkpoint=")
"""Settings that say where things are on this machine, and nothing of the run."""


def summary(record: RunRecord) -> dict[str, Any]:
    """The numbers of a run that are worth keeping, without raw samples and paths."""
    steps = [
        {"name": step.name, "seconds": step.seconds, "numbers": _without(step.numbers, "artifact")}
        for step in record.steps
    ]
    return {
        "started": record.started,
        "finished": record.finished,
        "versions": record.versions,
        "machine": record.machine,
        "processor": record.measurements[0].device.processor,
        "recipe": {key: record.recipe[key] for key in ("name", "seed", "steps", "targets")},
        "rows": [_without(row, "file") for row in rows(record)],
        "steps": steps,
        "warnings": sorted({w for m in record.measurements for w in m.warnings}),
    }


def section(record: RunRecord, command: str) -> str:
    """The Markdown section of docs/benchmarks.md."""
    device = record.measurements[0].device
    times = ", ".join(f"{step.name} {duration(step.seconds)}" for step in record.steps)
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return "\n\n".join(
        [
            f"## {record.recipe['name']}",
            f"`{command}`, {record.started[:10]}, {device.processor}, {device.cores} cores, "
            f"{device.system.split('-')[0]}.",
            markdown_table(COLUMNS, table(record)),
            f"Time per step: {times}.",
            f"Versions: {versions}.",
        ]
    )


def _without(numbers: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if name != key}


def main() -> None:
    """Parse, run, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from", type=Path, dest="leading", help="a run to take first steps from")
    given = parser.parse_args()
    recipe = recipes.load(given.recipe, given.overrides)
    record = bevel.run(recipe, out=given.out, leading=given.leading)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{recipe.name}.json"
    path.write_text(json.dumps(summary(record), indent=1) + "\n", encoding="utf-8")
    settings = [f" --set {each}" for each in given.overrides if not each.startswith(PLACES)]
    print(section(record, f"bevel run {given.recipe}{''.join(settings)}"))


if __name__ == "__main__":
    main()
