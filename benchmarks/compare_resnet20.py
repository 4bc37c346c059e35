"""Compare all pruning criteria, random included, on ResNet-20 and CIFAR-10 at half and a quarter.

    python benchmarks/compare_resnet20.py --data DIR --checkpoint FILE --out RUN

DIR holds train/CLASS/* and test/CLASS/*; FILE is the public checkpoint of ResNet-20. Each criterion
prunes to 50 % and 25 % of the MACs with three seeds, fine-tunes, and is measured; test images are
looked at once, at the end. Writes benchmarks/results/compare_resnet20.json and prints the tables.
A short check that everything runs: `--epochs 1 --seeds 1 --criteria l2,random`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import bevel
from bevel.core import plugins
from bevel.core import recipe as recipes
from bevel.core.recipe import Recipe
from bevel.searching.comparison import markdown

RESULTS = Path(__file__).parent / "results"


def recipe_of(data: Path, checkpoint: Path, epochs: int) -> Recipe:
    """Prune, fine-tune as bevel does where nothing is said, measure as float32."""
    raw: dict[str, Any] = {
        "version": 1,
        "name": "compare_resnet20",
        "model": {"name": "bevel:resnet20", "checkpoint": str(checkpoint)},
        "data": {
            "name": "imagefolder",
            "root": str(data),
            "size": 32,
            "normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
            "augment": {"flip": True, "crop": "pad", "padding": 4},
            "validation": 0.05,
        },
        "steps": [
            {"prune": {"budget": {"macs": 0.5}, "align": 4}},
            {"finetune": {"epochs": epochs}},
        ],
        "targets": [{"runtime": "onnxruntime"}],
    }
    return recipes.validate(raw)


def main() -> None:
    """Parse, compare, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--criteria", default=None, help="default: all that there are")
    given = parser.parse_args()
    criteria = given.criteria.split(",") if given.criteria else sorted(plugins.discover("criteria"))
    found = bevel.compare(
        recipe_of(given.data, given.checkpoint, given.epochs),
        {"steps.prune.criterion": criteria, "steps.prune.budget.macs": [0.5, 0.25]},
        seeds=given.seeds,
        jobs=given.jobs,
        out=given.out,
        test=True,
    )
    RESULTS.mkdir(exist_ok=True)
    record = found.model_dump(mode="json", exclude={"recipe": {"model", "data"}})
    path = RESULTS / "compare_resnet20.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
