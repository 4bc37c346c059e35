"""A grid of values under one recipe, every cell with the same seeds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bevel.core import recipe as recipes
from bevel.core.errors import BevelError, SearchError
from bevel.core.progress import note, track
from bevel.core.recipe import Recipe
from bevel.pipeline.folder import held
from bevel.searching.comparison import write
from bevel.searching.records import Cell, Comparison, Duel, Outcome
from bevel.searching.space import check, combinations, described, label
from bevel.searching.trial import Task, attempt, judge, recall
from bevel.searching.workers import Workers, workers

Values = Mapping[str, Any]


def compare(
    recipe: Recipe | Path | str,
    vary: Mapping[str, Sequence[Any]],
    *,
    seeds: int = 3,
    out: Path | str | None = None,
    jobs: int = 1,
    ray: str | None = None,
    test: bool = False,
    overrides: Sequence[str] = (),
) -> Comparison:
    """Carry out every combination of values with the same seeds, or go on where that stopped.

    The seeds are the recipe's own and those after it. Each replaces the recipe's seed, so that it
    decides training, the cut of the validation images and all else that is drawn; steps that the
    varied keys have no effect on are done once per seed, and all cells of a seed go on from them.

    Args:
        recipe: a recipe, or the path of its YAML file.
        vary: keys of the recipe with their values; of the first key the values compete.
        seeds: how many.
        out: the comparison's folder; default `runs/NAME-compare`.
        jobs: runs at once, each in a process of its own; files are measured one by one.
        ray: address of a Ray cluster that carries out the runs.
        test: look at the test images too, once, after all runs.
        overrides: `a.b=c` settings, for a recipe given by its path.

    Returns:
        The results per cell and seed, as in `compare.json`, and who is ahead of whom.

    Raises:
        BevelError: the comparison cannot begin, or no run succeeded.
    """
    recipe = recipe if isinstance(recipe, Recipe) else recipes.load(recipe, overrides)
    recipe = recipe.model_copy(update={"search": None})
    if seeds < 1:
        raise SearchError(f"seeds: expected a whole number from 1, got {seeds}")
    if not vary or not all(vary.values()):
        raise SearchError("nothing to compare: vary at least one key, each with values")
    if "seed" in vary:
        raise SearchError("every cell gets the same seeds: say how many, and do not vary seed")
    shared = check(recipe, vary, "--vary")
    each = workers(jobs, ray)
    folder = Path(out) if out is not None else Path("runs") / f"{recipe.name}-compare"
    with held(folder):
        grid = Grid(recipe, vary, folder, range(recipe.seed, recipe.seed + seeds), each)
        grid.prepare(shared)
        reasons = grid.carry_out()
        found = grid.comparison(reasons, test=test)
        write(found, folder)
    outcomes = [outcome for cell in found.cells for outcome in cell.outcomes]
    if all(outcome.accuracy is None for outcome in outcomes):
        raise SearchError(f"all {len(outcomes)} runs failed; the first: {outcomes[0].reason}")
    return found


@dataclass(frozen=True)
class Grid:
    """The runs of a comparison, each in the folder cells/VALUES/seed-N."""

    recipe: Recipe
    vary: Mapping[str, Sequence[Any]]
    folder: Path
    seeds: range
    each: Workers

    def prepare(self, shared: int) -> None:
        """The steps that all cells have in common, once per seed.

        Raises:
            SearchError: one of them fails.
        """
        if not shared or not any(recall(task) is None for _, task in self._runs()):
            return
        tasks = [Task(self._seeded(seed), self._base(seed), steps=shared) for seed in self.seeds]
        self._all(tasks, "common steps", fatal=True)

    def carry_out(self) -> dict[Path, str]:
        """Every run up to its files; those that failed by their folder, with the reason."""
        left = [task for _, task in self._runs() if recall(task) is None]
        return self._all(left, "runs", fatal=False)

    def comparison(self, reasons: Mapping[Path, str], *, test: bool) -> Comparison:
        """Measure what was carried out, one file after the other while nothing else runs."""
        splits = ("validation", "test") if test else ("validation",)
        outcomes: dict[str, list[Outcome]] = {}
        runs = list(self._runs())
        for values, task in track(runs, "measuring", len(runs)):
            outcomes.setdefault(described(values), []).append(self._outcome(task, reasons, splits))
        cells = [
            Cell(values=values, outcomes=outcomes[described(values)]) for values in self._grid()
        ]
        compared = next(iter(self.vary))
        return Comparison(
            recipe=self.recipe.model_dump(mode="json"),
            compared=compared,
            split=splits[-1],
            seeds=list(self.seeds),
            cells=cells,
            duels=duels(cells, compared, splits[-1]),
        )

    def _all(self, tasks: Sequence[Task], title: str, *, fatal: bool) -> dict[Path, str]:
        """Have tasks carried out; the reasons of those that failed."""
        reasons: dict[Path, str] = {}
        ended = self.each(attempt, tasks)
        for position, reason in track(ended, title, len(tasks)):
            if reason is None:
                continue
            if fatal:
                raise SearchError(reason)
            reasons[tasks[position].out] = reason
            note(f"{tasks[position].out.relative_to(self.folder)} failed: {reason}")
        return reasons

    def _outcome(self, task: Task, reasons: Mapping[Path, str], splits: Sequence[str]) -> Outcome:
        place = {"seed": task.recipe.seed, "folder": str(task.out.relative_to(self.folder))}
        if task.out in reasons:
            return Outcome.model_validate({**place, "reason": reasons[task.out]})
        try:
            verdicts = [recall(task, split) or judge(task, split) for split in splits]
        except BevelError as error:
            return Outcome.model_validate({**place, "reason": str(error)})
        tops = [v.measurement.accuracy.top1 if v.measurement.accuracy else None for v in verdicts]
        first = verdicts[0]
        latency = first.measurement.latency
        numbers = {
            "accuracy": tops[0],
            "test_accuracy": tops[1] if len(tops) > 1 else None,
            "latency_ms": latency.p50_ms if latency else None,
            "size_bytes": first.measurement.artifact.size_bytes,
            "macs": first.cost.macs,
        }
        return Outcome.model_validate({**place, **numbers})

    def _grid(self) -> list[dict[str, Any]]:
        return combinations(self.vary) or []

    def _runs(self) -> Iterable[tuple[Values, Task]]:
        """Every (values, task), seed by seed."""
        for seed, values in itertools.product(self.seeds, self._grid()):
            out = self.folder / "cells" / _folder_name(values) / f"seed-{seed}"
            varied = recipes.vary(self._seeded(seed), values, described(values))
            yield values, Task(varied, out, (self._base(seed),))

    def _seeded(self, seed: int) -> Recipe:
        return self.recipe.model_copy(update={"seed": seed})

    def _base(self, seed: int) -> Path:
        return self.folder / "base" / f"seed-{seed}"


def duels(cells: Sequence[Cell], compared: str, split: str) -> list[Duel]:
    """How often each value of the compared key is ahead of each other one, same rest and seed."""
    scores: dict[str, dict[tuple[str, int], float]] = {}
    for cell in cells:
        rest = described({key: value for key, value in cell.values.items() if key != compared})
        own = scores.setdefault(label(cell.values[compared]), {})
        for outcome in cell.outcomes:
            score = outcome.test_accuracy if split == "test" else outcome.accuracy
            if score is not None:
                own[rest, outcome.seed] = score
    found = []
    for one, other in itertools.combinations(scores, 2):
        both = scores[one].keys() & scores[other].keys()
        signs = [scores[one][where] - scores[other][where] for where in both]
        wins, losses = sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)
        ties = len(signs) - wins - losses
        found.append(Duel(one=one, other=other, wins=wins, losses=losses, ties=ties))
    return found


def _folder_name(values: Values) -> str:
    """Values as a file name: the same for the same values, whatever else is compared later."""
    return re.sub(r"[^A-Za-z0-9._=,-]+", "_", described(values).replace(", ", ","))
