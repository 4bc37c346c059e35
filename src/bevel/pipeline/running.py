"""Carry a recipe out, whole or up to its files, or say what it would do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bevel.core import recipe as recipes
from bevel.core.progress import note
from bevel.core.recipe import Recipe
from bevel.core.records import RunRecord
from bevel.pipeline.artifacts import File
from bevel.pipeline.explanation import Explanation
from bevel.pipeline.flow import Flow
from bevel.pipeline.folder import RunFolder, now
from bevel.pipeline.sharing import adopt
from bevel.reporting import read, write


def run(
    recipe: Recipe | Path | str,
    *,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    leading: Path | str | None = None,
) -> RunRecord:
    """Carry out a recipe, or go on where a killed run of the same recipe stopped.

    Args:
        recipe: a recipe, or the path of its YAML file.
        out: the run folder; default `runs/NAME`.
        overrides: `a.b=c` settings, for a recipe given by its path.
        leading: the run folder of another recipe, of which those finished first steps are taken
            over that this recipe has too.

    Returns:
        The record of the whole run, as in `run.json`. A finished run is not run again.

    Raises:
        BevelError: what failed and what to do; everything finished so far stays in the folder.
    """
    recipe = _loaded(recipe, overrides)
    path = Path(out) if out is not None else Path("runs") / recipe.name
    with RunFolder(path, recipe) as folder:
        if folder.record.finished is None:
            if leading is not None:
                _take_over(folder, Path(leading))
            Flow(recipe, folder).execute()
            finished = now()
            write(folder.record.model_copy(update={"finished": finished}), folder.path)
            folder.update(finished=finished)  # last: a finished run has its report
        elif leading is not None:
            note(f"{path} is finished: nothing is taken over from {leading}")
        return folder.record


def _take_over(folder: RunFolder, other: Path) -> None:
    """Adopt the steps of a run, and say which."""
    read(other)  # that it holds none is a mistake here
    before = len(folder.record.steps)
    adopt(folder, [other])
    taken = [step.name for step in folder.record.steps]
    if len(taken) > before:
        note(f"taken over from {other}: {', '.join(taken)}")
    else:
        note(
            f"nothing taken over from {other}: it has no finished first step of this recipe, with "
            "its files as they were, that is not here already"
        )


def compress(
    recipe: Recipe,
    *,
    out: Path,
    leading: Sequence[Path] = (),
    steps: int | None = None,
    only: File | None = None,
) -> RunRecord:
    """Carry out a recipe up to its files, or go on. No test image is looked at.

    `run` in the same folder goes on with what is left: other files, and measuring.

    Args:
        recipe: a recipe.
        out: the run folder.
        leading: run folders of which finished steps are taken over, as far as they are the same.
        steps: stop after so many steps, before the files.
        only: write this file and no other.

    Raises:
        BevelError: what failed and what to do; everything finished so far stays in the folder.
    """
    recipe = _loaded(recipe, ())
    with RunFolder(out, recipe) as folder:
        adopt(folder, leading)
        flow = Flow(recipe, folder)
        if steps is None:
            flow.compress(only)
        else:
            flow.advance(steps)
        return folder.record


def explain(recipe: Recipe | Path | str, *, overrides: Sequence[str] = ()) -> Explanation:
    """What a recipe would do, without training: what can be pruned, what not and why, and costs.

    Raises:
        BevelError: the recipe cannot be carried out; says why.
    """
    return Explanation.of(_loaded(recipe, overrides))


def _loaded(recipe: Recipe | Path | str, overrides: Sequence[str]) -> Recipe:
    loaded = recipe if isinstance(recipe, Recipe) else recipes.load(recipe, overrides)
    return loaded.model_copy(update={"search": None})  # a run is the same with any search
