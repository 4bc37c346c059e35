"""Steps that two runs have in common are done once: one takes them over from the other's folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from bevel.core.errors import RecipeError, RunFolderError
from bevel.core.files import atomic, sha256
from bevel.core.recipe import DataSection, Recipe, validate
from bevel.core.records import StepRecord
from bevel.core.steps import PruneStep, Step, pruning_at
from bevel.pipeline.folder import RunFolder
from bevel.reporting import read

ALWAYS = ("model", "seed")
"""Sections of a recipe that every step depends on."""

CALIBRATED = ("surgery", "sparsify", "prune", "iterate", "qat")
"""Verbs of steps that look at calibration images."""


def common_steps(one: Recipe, other: Recipe) -> int:
    """How many leading steps of two recipes give the same network, as do all steps before them."""
    for position, (step, counterpart) in enumerate(zip(one.steps, other.steps, strict=False)):
        removed = pruning_at(one.steps, position)
        sections = (*ALWAYS, *_sections(step, removed))
        if (
            step != counterpart
            or removed != pruning_at(other.steps, position)
            or any(getattr(one, s) != getattr(other, s) for s in sections)
            or _images(one, step) != _images(other, step)
        ):
            return position
    return min(len(one.steps), len(other.steps))


def _images(recipe: Recipe, step: Step) -> DataSection:
    """The images that a step sees: few steps see those without labels."""
    asks = step.distill is not None and step.distill.unlabelled
    return recipe.data if asks else recipe.data.model_copy(update={"unlabelled": None})


def _sections(step: Step, removed: PruneStep | None) -> tuple[str, ...]:
    """What else the step's result depends on."""
    asks_target = step.qat is not None or (removed is not None and removed.asks_target)
    return (
        *(("calibration",) if step.verb in CALIBRATED else ()),
        *(("quantization", "targets") if asks_target else ()),
    )


def adopt(folder: RunFolder, others: Sequence[Path]) -> None:
    """Take over the most finished steps that one of the other run folders has.

    Their files are copied and their lines are recorded as they are. Folders without a run are
    passed over.
    """
    source, steps = folder.path, folder.record.steps
    for other in others:
        found = _finished(other, folder.recipe)
        if len(found) > len(steps):
            source, steps = other, found
    if source != folder.path:
        # A file that has changed since ends it: from that step on they are done again.
        taken = takewhile(lambda step: _copied(step, source, folder.path), steps)
        folder.update(steps=list(taken))


def _copied(step: StepRecord, source: Path, target: Path) -> bool:
    """Copy a step's files; whether they are there and those that were recorded."""
    for name, digest in step.files.items():
        if not (source / name).is_file():
            return False
        with atomic(target / name) as temporary:
            shutil.copyfile(source / name, temporary)
        if sha256(target / name) != digest:
            return False
    return True


def _finished(other: Path, recipe: Recipe) -> list[StepRecord]:
    """The leading steps of a run that are done and are steps of this recipe too."""
    try:
        record = read(other)
        theirs = validate(record.recipe)
    except (RunFolderError, RecipeError):
        return []
    common = common_steps(theirs, recipe)  # the rounds of a step have its number too
    return [step for step in record.steps if int(step.name.partition("-")[0]) <= common]
