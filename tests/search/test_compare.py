"""Comparisons with a stand-in for the runs: the same seeds, means, wins and losses."""

import json
import statistics
from pathlib import Path

import fake_trials
import pytest
from fake_trials import fake, numbers

from bevel.core.errors import BevelError, SearchError
from bevel.core.files import write_json
from bevel.core.recipe import vary
from bevel.searching import Comparison, compare, grid
from bevel.searching.comparison import cells_table, duels_table, spread
from bevel.searching.trial import Task, Verdict

VARY = {"steps.prune.criterion": ["l1", "l2", "random"], "steps.prune.budget.macs": [0.5, 0.25]}


def judge(task: Task, split: str = "validation") -> Verdict:
    verdict = fake_trials.judge(task, split)
    facts = dict.fromkeys(type(verdict.measurement.device).model_fields)
    facts |= {"device": "local", "system": "x", "architecture": "x", "cores": 1, "emulated": False}
    raw = verdict.model_dump(mode="json", warnings=False)
    raw["measurement"]["device"] = facts
    verdict = Verdict.model_validate(raw)
    write_json(task.out / f"{split}.json", verdict.model_dump(mode="json"))
    return verdict


@pytest.fixture(autouse=True)
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "attempt", fake_trials.attempt)
    monkeypatch.setattr(grid, "judge", judge)


def test_every_cell_has_the_same_seeds_and_its_mean_and_deviation(tmp_path: Path) -> None:
    recipe = vary(fake(), {"seed": 5})
    found = compare(recipe, VARY, seeds=3, out=tmp_path)
    assert found.seeds == [5, 6, 7]
    assert len(found.cells) == 6
    columns, rows = cells_table(found)
    for cell, row in zip(found.cells, rows, strict=True):
        expected = [
            numbers(vary(recipe, {**cell.values, "seed": seed}))["accuracy"] for seed in (5, 6, 7)
        ]
        assert [outcome.accuracy for outcome in cell.outcomes] == pytest.approx(expected)
        mean, deviation = statistics.fmean(expected), statistics.stdev(expected)
        text = f"{100 * mean:.2f} % +- {100 * deviation:.2f} %"
        assert row[columns.index("validation accuracy")] == text
    assert json.loads((tmp_path / "compare.json").read_text()) == found.model_dump(mode="json")
    assert "| l2 | 0.25 |" in (tmp_path / "compare.md").read_text()


def test_wins_and_losses_are_over_all_settings_and_seeds(tmp_path: Path) -> None:
    found = compare(fake(), VARY, seeds=2, out=tmp_path)
    scores = {
        (tuple(cell.values.values()), outcome.seed): outcome.accuracy
        for cell in found.cells
        for outcome in cell.outcomes
    }
    assert len(found.duels) == 3
    for duel in found.duels:
        pairs = [
            (scores[(duel.one, macs), seed], scores[(duel.other, macs), seed])
            for macs in (0.5, 0.25)
            for seed in (0, 1)
        ]
        assert duel.wins == sum(one > other for one, other in pairs)
        assert duel.losses == sum(one < other for one, other in pairs)
        assert duel.ties == 0
    columns, rows = duels_table(found)
    assert rows[columns[1:].index("random")] == ["random", "0 - 4", "0 - 4", "-"]


def test_a_comparison_goes_on_and_can_be_widened(tmp_path: Path) -> None:
    compare(fake(), {"steps.prune.criterion": ["l1"]}, seeds=1, out=tmp_path)
    compare(fake(), {"steps.prune.criterion": ["l1", "random"]}, seeds=2, out=tmp_path)
    attempts = tmp_path.glob("cells/*/*/attempts")
    assert [len(path.read_text().splitlines()) for path in attempts] == [1] * 4


def test_the_test_images_are_looked_at_only_where_that_is_asked_for(tmp_path: Path) -> None:
    without = compare(fake(), VARY, seeds=1, out=tmp_path)
    assert not list(tmp_path.glob("cells/*/*/test.json"))
    assert without.cells[0].outcomes[0].test_accuracy is None
    found = compare(fake(), VARY, seeds=1, out=tmp_path, test=True)
    assert found.split == "test"
    for cell in found.cells:
        (outcome,) = cell.outcomes
        assert outcome.test_accuracy == pytest.approx(outcome.accuracy - 0.01)
    assert "test accuracy" in cells_table(found)[0]


def test_failed_runs_are_listed_and_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        grid, "attempt", lambda t: fake_trials.refuse_random(t) or fake_trials.attempt(t)
    )
    found = compare(fake(), VARY, seeds=2, out=tmp_path)
    against = [duel for duel in found.duels if "random" in (duel.one, duel.other)]
    assert {(d.wins, d.losses, d.ties) for d in against} == {(0, 0, 0)}
    assert "criterion=random, macs=0.5, seed 0 failed: no such luck" in (
        (tmp_path / "compare.md").read_text()
    )
    monkeypatch.setattr(grid, "attempt", fake_trials.refuse)
    criteria = {"steps.prune.criterion": ["l1", "l2", "random"]}
    with pytest.raises(SearchError, match="all 3 runs failed; the first: cannot prune fake"):
        compare(fake(), criteria, seeds=1, out=tmp_path / "none")


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({}, "nothing to compare"),
        ({"steps.prune.criterion": []}, "nothing to compare"),
        ({"steps.prune.criterion": ["l2", "l4"]}, "l4"),
        ({"steps.prune.criterio": ["l2"]}, "Did you mean 'criterion'"),
        ({"seed": [1, 2]}, "do not vary seed"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    tmp_path: Path, vary: dict[str, list[object]], message: str
) -> None:
    with pytest.raises(BevelError, match=message) as caught:
        compare(fake(), vary, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_number_has_no_deviation() -> None:
    assert spread([0.5], str) == "0.5"
    assert spread([2.0, 4.0], lambda value: f"{value:.3f}") == "3.000 +- 1.414"
    assert spread([], str) == "-"


def test_a_comparison_goes_to_json_and_back(tmp_path: Path) -> None:
    found = compare(fake(), VARY, seeds=1, out=tmp_path)
    assert Comparison.model_validate_json((tmp_path / "compare.json").read_bytes()) == found
