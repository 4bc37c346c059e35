"""Searches with a stand-in for the trials: sampling, resume after a kill, failures, storage."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fake_trials
import pytest
from fake_trials import fake, numbers

from bevel.core import recipe as recipes
from bevel.core.errors import RunFolderError, SearchError
from bevel.core.recipe import vary
from bevel.searching import SearchRecord, search, study
from bevel.searching.storage import _without_password

FREE = {
    "space": {
        "steps.prune.criterion": ["l1", "l2"],
        "steps.prune.budget.macs": {"low": 0.3, "high": 0.7},
    }
}


@pytest.fixture(autouse=True)
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "attempt", fake_trials.attempt)
    monkeypatch.setattr(study, "judge", fake_trials.judge)


def tried(record: SearchRecord) -> list[tuple[int, dict[str, object], dict[str, float]]]:
    return [(t.number, t.values, t.objectives) for t in record.trials]


def test_few_combinations_are_all_tried_once_and_the_front_is_theirs(tmp_path: Path) -> None:
    record = search(fake(), trials=20, out=tmp_path)
    assert len(record.trials) == 9
    expected = {}
    for criterion in ("l1", "l2", "random"):
        for macs in (0.3, 0.5, 0.7):
            values = {"steps.prune.criterion": criterion, "steps.prune.budget.macs": macs}
            expected[criterion, macs] = numbers(vary(fake(), values))
    found = {}
    for trial in record.trials:
        criterion, macs = trial.values.values()
        found[criterion, macs] = trial.objectives
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(expected[key]) for key in expected)

    def beaten(one: dict[str, float]) -> bool:
        return any(
            other != one
            and other["accuracy"] >= one["accuracy"]
            and other["latency_ms"] <= one["latency_ms"]
            and other["size_bytes"] <= one["size_bytes"]
            for other in found.values()
        )

    unbeaten = {trial.number for trial in record.trials if not beaten(trial.objectives)}
    assert set(record.front) == unbeaten


def test_choices_are_of_any_kind(tmp_path: Path) -> None:
    space = {
        "steps.prune.budget": [{"macs": 0.5}, {"macs": 0.25}],
        "steps.prune.align": [4, "auto"],
        "data.download": [True, False],
    }
    for trials, name in ((8, "each"), (5, "sampled")):
        record = search(fake(space=space), trials=trials, out=tmp_path / name)
        assert {trial.state for trial in record.trials} == {"finished"}
        for trial in record.trials:
            assert all(trial.values[key] in choices for key, choices in space.items())
        different = {json.dumps(trial.values) for trial in record.trials}
        assert len(different) == 8 or name == "sampled"


def test_what_is_left_is_what_was_returned_and_each_point_has_its_recipe(tmp_path: Path) -> None:
    record = search(fake(), trials=9, out=tmp_path)
    assert json.loads((tmp_path / "search.json").read_text()) == record.model_dump(mode="json")
    page = (tmp_path / "front.html").read_text()
    assert "Plotly.newPlot" in page
    assert "http" not in page.partition("<body>")[0]
    files = sorted((tmp_path / "front").iterdir())
    assert len(files) == len(record.front)
    for file, number in zip(files, record.front, strict=True):
        trial = record.trials[number]
        assert numbers(recipes.load(file)) == pytest.approx(trial.objectives)


@pytest.mark.parametrize("objectives", [["accuracy"], ["accuracy", "latency_ms", "size_bytes"]])
def test_a_search_in_two_parts_is_the_search_in_one(tmp_path: Path, objectives: list[str]) -> None:
    recipe = fake(**FREE, objectives=objectives)
    whole = search(recipe, trials=18, out=tmp_path / "whole")
    search(recipe, trials=11, out=tmp_path / "parts")
    assert tried(search(recipe, trials=18, out=tmp_path / "parts")) == tried(whole)
    assert len({str(trial.values) for trial in whole.trials[:16]}) == 16  # resumed, not repeated
    again = search(recipe, trials=18, out=tmp_path / "parts")  # nothing left to do
    assert tried(again) == tried(whole)
    attempts = (tmp_path / "parts").glob("trials/*/attempts")
    assert [len(path.read_text().splitlines()) for path in attempts] == [1] * 18


def test_another_seed_tries_other_values(tmp_path: Path) -> None:
    one = search(fake(**FREE), trials=3, out=tmp_path / "0")
    recipe = vary(fake(**FREE), {"seed": 1})
    other = search(recipe, trials=3, out=tmp_path / "1")
    assert [t.values for t in one.trials] != [t.values for t in other.trials]


def test_processes_try_the_same_grid_as_one(tmp_path: Path) -> None:
    recipe = fake(space={"steps.prune.criterion": ["l1", "l2", "random"]})
    one = search(recipe, trials=3, out=tmp_path / "one")
    two = search(recipe, trials=3, jobs=2, out=tmp_path / "two")
    assert tried(one) == tried(two)
    assert one.front == two.front
    pids = {path.read_text() for path in (tmp_path / "two").glob("trials/*/attempts")}
    assert len(pids) == 3
    assert f"{os.getpid()}\n" not in pids


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_search_goes_on_with_the_trial_it_was_in(tmp_path: Path, jobs: int) -> None:
    folder = tmp_path / "killed"
    hang = tmp_path / "0003"
    hang.touch()
    command = [sys.executable, str(fake_trials.__file__), str(folder), str(jobs), "4"]
    process = subprocess.Popen(command, env={**os.environ, "HANG": str(hang)})
    attempts = [folder / f"trials/{number:04d}/attempts" for number in range(4)]
    try:
        begun = wait_for(lambda: all(a.exists() and a.read_text() != "" for a in attempts), 240)
        assert begun
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    inside = int(attempts[3].read_text())
    assert (inside == process.pid) == (jobs == 1)
    assert wait_for(lambda: not alive(inside), 60), "a trial outlived its search"
    hang.unlink()
    search(fake(), trials=4, jobs=jobs, out=folder)
    resumed = SearchRecord.model_validate_json((folder / "search.json").read_bytes())
    assert tried(resumed) == tried(search(fake(), trials=4, out=tmp_path / "whole"))
    again = {3} if jobs == 1 else {2, 3}  # a round is measured once all of it is carried out
    counts = [len(path.read_text().splitlines()) for path in attempts]
    assert counts == [2 if number in again else 1 for number in range(4)]


def test_failed_trials_are_recorded_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "attempt", fake_trials.refuse_random)
    record = search(fake(), trials=9, out=tmp_path)
    failed = [trial for trial in record.trials if trial.state == "failed"]
    assert [trial.values["steps.prune.criterion"] for trial in failed] == ["random"] * 3
    assert {trial.reason for trial in failed} == {"no such luck"}
    assert not {trial.number for trial in failed} & set(record.front)
    assert sum(trial.state == "finished" for trial in record.trials) == 6


def test_if_all_fail_that_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "attempt", fake_trials.refuse)
    with pytest.raises(SearchError, match="all 2 trials failed; the first: cannot prune fake-0000"):
        search(fake(), trials=2, out=tmp_path)
    assert len(json.loads((tmp_path / "search.json").read_text())["trials"]) == 2


def test_an_interrupted_search_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(task: study.Task) -> str | None:
        if task.out.name == "0002":
            raise KeyboardInterrupt
        return None

    with monkeypatch.context() as patch:
        patch.setattr(study, "attempt", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(fake(), trials=4, out=tmp_path)
    record = search(fake(), trials=4, out=tmp_path)
    assert [trial.state for trial in record.trials] == ["finished"] * 4
    assert not (tmp_path / "trials/0000/attempts").exists()  # by the first search, not again


def test_a_storage_that_does_not_open_is_one_line(tmp_path: Path) -> None:
    for url in ("nonsense", f"sqlite:///{tmp_path}/absent/study.db", "postgresql://u:secret@x/y"):
        with pytest.raises(SearchError, match="does not open") as caught:
            search(fake(), trials=1, out=tmp_path / "out", storage=url)
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_a_password_is_never_shown() -> None:
    assert _without_password("postgresql://me:pass@word@host/x") == "postgresql://me@host/x"
    assert _without_password("sqlite:///a@b.db") == "sqlite:///a@b.db"


def test_another_recipe_in_the_same_storage_is_refused(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/shared.db"
    search(fake(), trials=1, out=tmp_path / "a", storage=storage)
    with pytest.raises(SearchError, match=r"another recipe .*seed: 0 there, 3 here"):
        search(vary(fake(), {"seed": 3}), trials=1, out=tmp_path / "b", storage=storage)
    renamed = search(vary(fake(), {"name": "other"}), trials=1, out=tmp_path / "c", storage=storage)
    assert len(renamed.trials) == 1


def test_two_searches_in_one_folder_are_refused(tmp_path: Path) -> None:
    from bevel.pipeline.folder import held

    with held(tmp_path), pytest.raises(RunFolderError, match="another process is running"):
        search(fake(), trials=1, out=tmp_path)


def test_a_recipe_without_a_space_says_what_to_write(tmp_path: Path) -> None:
    recipe = fake().model_copy(update={"search": None})
    with pytest.raises(SearchError, match="no section 'search'"):
        search(recipe, trials=1, out=tmp_path)
