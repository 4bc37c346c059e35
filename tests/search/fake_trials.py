"""Stand-ins for carrying out and measuring a trial, importable by processes that tests start.

Accuracy, latency and size are smooth functions of the recipe, so that results can be recomputed.
Run as a program it is a search that can be killed: `python fake_trials.py FOLDER JOBS TRIALS`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from bevel.core import recipe as recipes
from bevel.core.recipe import Recipe
from bevel.core.records import Accuracy, Artifact, Cost, DeviceFacts, Latency, Measurement
from bevel.searching import study
from bevel.searching.trial import Task, Verdict

RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "fake",
    "model": {"name": "bevel:resnet20", "arguments": {"in_channels": 1}},
    "data": {"name": "digits"},
    "steps": [
        {"prune": {"criterion": "l2", "budget": {"macs": 0.5}}},
        {"finetune": {"epochs": 1}},
    ],
    "targets": [{"runtime": "onnxruntime"}],
    "search": {
        "space": {
            "steps.prune.criterion": ["l1", "l2", "random"],
            "steps.prune.budget.macs": {"low": 0.3, "high": 0.7, "step": 0.2},
        }
    },
}


def fake(**search: Any) -> Recipe:
    """The recipe, with changes of its section `search`."""
    return recipes.validate({**RECIPE, "search": {**RECIPE["search"], **search}})


def numbers(recipe: Recipe) -> dict[str, float]:
    """Accuracy, latency in ms, and size in bytes of a recipe's file."""
    prune = recipe.steps[0].prune
    assert prune is not None
    assert prune.budget is not None
    assert prune.budget.macs is not None
    macs = prune.budget.macs
    bonus = {"l1": 0.01, "l2": 0.03, "random": 0.0}[prune.criterion]
    return {
        "accuracy": 0.7 + 0.2 * macs + bonus + 0.001 * recipe.seed * (1 + macs),
        "latency_ms": 2 * macs + bonus,
        "size_bytes": round(1000 * macs),
    }


def attempt(task: Task) -> str | None:
    """Leave a line per attempt; wait where the test said so, until it kills this process."""
    task.out.mkdir(parents=True, exist_ok=True)
    with (task.out / "attempts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if (hanging := Path(os.environ.get("HANG", "-"))).name == task.out.name and hanging.exists():
        time.sleep(120)
    return None


def refuse_random(task: Task) -> str | None:
    """Fail as an impossible budget does."""
    prune = task.recipe.steps[0].prune
    return "no such luck" if prune is not None and prune.criterion == "random" else None


def refuse(task: Task) -> str | None:
    """Fail."""
    return f"cannot prune {task.recipe.name}"


def killed(task: Task) -> str | None:
    """End as a process does that takes too much memory."""
    if task.recipe.seed == 1:
        os.kill(os.getpid(), 9)
    return None


def judge(task: Task, split: str = "validation") -> Verdict:
    """What `numbers` says; a hundredth less on the test images."""
    found = numbers(task.recipe)
    top1 = found["accuracy"] - (0.01 if split == "test" else 0)
    return Verdict(
        recipe=task.recipe.model_dump(mode="json"),
        measurement=Measurement(
            label="compressed",
            artifact=Artifact(
                path="-",
                runtime="onnxruntime",
                precision="float32",
                inputs=[],
                outputs=[],
                size_bytes=int(found["size_bytes"]),
                sha256="-",
            ),
            threads=1,
            device=DeviceFacts.model_construct(device="local"),
            latency=Latency(samples_ms=[found["latency_ms"]], warmup_runs=0),
            accuracy=Accuracy(top1=top1, images=100, split=split),
        ),
        cost=Cost(macs=1000, params=100),
    )


if __name__ == "__main__":
    study.attempt = attempt
    study.judge = judge
    study.search(fake(), out=sys.argv[1], jobs=int(sys.argv[2]), trials=int(sys.argv[3]))
