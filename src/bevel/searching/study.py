"""A search: trials in rounds, each carried out by the workers and then measured one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bevel.core import recipe as recipes
from bevel.core.errors import BevelError, MissingDependencyError, SearchError
from bevel.core.progress import note, track
from bevel.core.recipe import Recipe, SearchSection
from bevel.pipeline.folder import held
from bevel.pipeline.running import compress
from bevel.searching.front import pareto_front
from bevel.searching.objectives import OBJECTIVES, costs, numbers
from bevel.searching.records import SearchRecord, TrialRecord
from bevel.searching.results import write
from bevel.searching.space import check, described
from bevel.searching.trial import Task, attempt, judge
from bevel.searching.workers import Workers, workers

if TYPE_CHECKING:
    import optuna

    from bevel.searching.sampling import Sampler

BASE = "base"
"""Run folder of the steps that all trials have in common, in that of the search."""


def search(
    recipe: Recipe | Path | str,
    *,
    trials: int,
    out: Path | str | None = None,
    jobs: int = 1,
    storage: str | None = None,
    ray: str | None = None,
    overrides: Sequence[str] = (),
) -> SearchRecord:
    """Try values of the recipe's section `search`, or go on with a search that was stopped.

    Args:
        recipe: a recipe with a section `search`, or the path of its YAML file.
        trials: how many in all; those that earlier calls finished count.
        out: the search's folder; default `runs/NAME-search`.
        jobs: trials at once, each in a process of its own; files are measured one by one.
        storage: URL of a database; default a SQLite file in the folder.
        ray: address of a Ray cluster that carries out the trials.
        overrides: `a.b=c` settings, for a recipe given by its path.

    Returns:
        Every trial and the Pareto front, as in `search.json`.

    Raises:
        BevelError: the search cannot begin, or no trial succeeded.
    """
    recipe = recipe if isinstance(recipe, Recipe) else recipes.load(recipe, overrides)
    section = recipe.search
    if section is None:
        raise SearchError(
            "the recipe has no section 'search' that says what to vary, such as "
            "search: {space: {steps.prune.criterion: [l1, l2]}}"
        )
    if trials < 1:
        raise SearchError(f"trials: expected a whole number from 1, got {trials}")
    try:
        from bevel.searching.sampling import Sampler
        from bevel.searching.storage import default_storage, open_study
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"a search needs the package {error.name}: pip install 'bevel[search]'"
        ) from error
    recipe = recipe.model_copy(update={"search": None})
    shared = check(recipe, section.space, "search.space")
    each = workers(jobs, ray)
    folder = Path(out) if out is not None else Path("runs") / f"{recipe.name}-search"
    with held(folder):
        study = open_study(storage or default_storage(folder), recipe, section)
        sampler = Sampler(study, section.space, seed=recipe.seed, total=trials)
        Search(recipe, section, folder, study, sampler, each, jobs, shared).until(trials)
        record = record_of(study, recipe, section, sampler)
        write(record, folder)
    if not record.front:
        reason = next(trial.reason for trial in record.trials if trial.reason)
        raise SearchError(f"all {len(record.trials)} trials failed; the first: {reason}")
    return record


@dataclass(frozen=True)
class Search:
    """The trials of one study in one folder, which have their first `shared` steps in common.

    They go in rounds of `jobs`: first the workers carry all of a round out, then this process
    measures their files one by one, while nothing else runs.
    """

    recipe: Recipe
    section: SearchSection
    folder: Path
    study: optuna.Study
    sampler: Sampler
    each: Workers
    jobs: int
    shared: int

    def until(self, total: int) -> None:
        """Go on until so many trials have ended, or every combination has been tried."""
        ended = sum(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))
        if self.shared and ended < total:
            compress(self.recipe, out=self.folder / BASE, steps=self.shared)
        for _ in track(self._ended(total), "trials", max(0, total - ended)):
            pass

    def _ended(self, total: int) -> Iterator[int]:
        """Numbers of trials as they end."""
        while batch := self._round(total):
            tasks, reasons = {}, {}
            for trial in batch:
                try:
                    tasks[trial.number] = self._task(trial)
                except BevelError as error:  # values that do not go together
                    reasons[trial.number] = str(error)
            begun = list(tasks)
            for position, reason in self.each(attempt, list(tasks.values())):
                if reason is not None:
                    reasons[begun[position]] = reason
            for trial in batch:
                self._tell(trial, tasks.get(trial.number), reasons.get(trial.number))
                yield trial.number

    def _round(self, total: int) -> list[optuna.trial.Trial]:
        """The next trials: those that a killed search had begun, then new ones."""
        from optuna.trial import Trial, TrialState

        known = self.study.get_trials(deepcopy=False)
        begun = [trial for trial in known if trial.state == TrialState.RUNNING]
        found = [Trial(self.study, trial._trial_id) for trial in begun[: self.jobs]]
        left = total - sum(trial.state != TrialState.WAITING for trial in known)
        for _ in range(min(self.jobs - len(found), left)):
            trial = self.sampler.ask()
            if trial is None:
                break
            found.append(trial)
        return found

    def _task(self, trial: optuna.trial.Trial) -> Task:
        values = self.sampler.values(trial.params)
        varied = recipes.vary(self.recipe, values, described(values))
        name = f"{self.recipe.name}-{trial.number:04d}"
        others = [self.folder / BASE, *sorted(self.folder.glob("trials/*"))]
        return Task(
            recipe=varied.model_copy(update={"name": name}),
            out=self.folder / folder_of(trial.number),
            leading=tuple(others),
        )

    def _tell(self, trial: optuna.trial.Trial, task: Task | None, reason: str | None) -> None:
        """Measure a trial and record how it ended."""
        from optuna.trial import TrialState

        values = described(self.sampler.values(trial.params))
        if task is not None and reason is None:
            try:
                found = numbers(judge(task), self.section.objectives)
            except BevelError as error:
                reason = str(error)
            else:
                self.study.tell(trial, list(found.values()))
                texts = (f"{name} {OBJECTIVES[name].text(found[name])}" for name in found)
                note(f"trial {trial.number} ({values}): {', '.join(texts)}")
                return
        trial.set_user_attr("reason", reason)
        self.study.tell(trial, state=TrialState.FAIL)
        note(f"trial {trial.number} ({values}) failed: {reason}")


def record_of(
    study: optuna.Study, recipe: Recipe, section: SearchSection, sampler: Sampler
) -> SearchRecord:
    """The study as plain data."""
    from optuna.trial import TrialState

    states = {TrialState.COMPLETE: "finished", TrialState.RUNNING: "running"}
    trials = [
        TrialRecord.model_validate(
            {
                "number": trial.number,
                "values": sampler.values(trial.params),
                "state": states.get(trial.state, "failed"),
                "objectives": dict(zip(section.objectives, trial.values or [], strict=False)),
                "folder": folder_of(trial.number),
                "reason": trial.user_attrs.get("reason"),
            }
        )
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.WAITING
    ]
    finished = [trial for trial in trials if trial.state == "finished"]
    front = pareto_front([costs(trial.objectives) for trial in finished])
    return SearchRecord(
        recipe=recipe.model_dump(mode="json"),
        objectives=list(section.objectives),
        trials=trials,
        front=[finished[position].number for position in front],
    )


def folder_of(number: int) -> str:
    """A trial's run folder, relative to the search's."""
    return f"trials/{number:04d}"
