"""One trial: a recipe carried out in its own run folder, and its file measured."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bevel.core.errors import BevelError, RunFolderError
from bevel.core.files import write_json
from bevel.core.recipe import DataSection, Recipe
from bevel.core.records import Cost, Measurement, Record
from bevel.data import Data
from bevel.data import load as load_data
from bevel.measurement.bench import Subject, images_for, measure_all
from bevel.pipeline.artifacts import File, artifact_path
from bevel.pipeline.running import compress
from bevel.reporting import read
from bevel.runtimes import open_artifact


@dataclass(frozen=True)
class Task:
    """A recipe to carry out up to the file that is judged, or only its first `steps`.

    `leading` are run folders of which finished steps are taken over.
    """

    recipe: Recipe
    out: Path
    leading: tuple[Path, ...] = ()
    steps: int | None = None


class Verdict(Record):
    """What one file was measured to be, and the recipe that led to it."""

    recipe: dict[str, Any]
    measurement: Measurement
    cost: Cost


def attempt(task: Task) -> str | None:
    """Carry out a task, or go on with it; the reason if that failed."""
    try:
        compress(
            task.recipe,
            out=task.out,
            leading=task.leading,
            steps=task.steps,
            only=_judged(task.recipe),
        )
    except BevelError as error:
        return str(error)
    return None


def judge(task: Task, split: str = "validation") -> Verdict:
    """Measure the compressed file of the recipe's first target, on images of a split.

    Whoever calls keeps other work off the processors meanwhile. What was measured is kept in the
    run folder.

    Raises:
        BevelError: the file cannot be measured.
    """
    target = task.recipe.targets[0]
    path = artifact_path(task.out, *_judged(task.recipe))
    (measurement,) = measure_all(
        [Subject("compressed", open_artifact(path))],
        device=target.device,
        threads=target.threads,
        batches=_data(task.recipe.compressed_data.model_dump_json(), task.recipe.seed).batches(
            split, limit=images_for(target.device)
        ),
        split=split,
    )
    cost = read(task.out).compressed
    if cost is None:
        raise RunFolderError(f"{task.out} has no compressed network; delete it")
    recipe = task.recipe.model_dump(mode="json")
    verdict = Verdict(recipe=recipe, measurement=measurement, cost=cost)
    write_json(_verdict_file(task, split), verdict.model_dump(mode="json"))
    return verdict


def _judged(recipe: Recipe) -> File:
    """The file that a trial goes by: that of the compressed network for the first target."""
    target = recipe.targets[0]
    return "compressed", target.runtime, target.precision


def recall(task: Task, split: str = "validation") -> Verdict | None:
    """The verdict that was reached on this recipe earlier, if any."""
    try:
        verdict = Verdict.model_validate_json(_verdict_file(task, split).read_bytes())
    except (OSError, ValidationError):
        return None
    return verdict if verdict.recipe == task.recipe.model_dump(mode="json") else None


def _verdict_file(task: Task, split: str) -> Path:
    return task.out / f"{split}.json"


@functools.lru_cache(maxsize=1)
def _data(section: str, seed: int) -> Data:
    """The data of the trial before are mostly those of this one."""
    return load_data(DataSection.model_validate_json(section), seed=seed)
