"""Rounds of pruning and fine-tuning: their schedule, backing off, and a run that is killed."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bevel
import residual
from bevel.core import recipe as recipes
from bevel.core.errors import PruningError, RecipeError
from bevel.core.steps import IterateStep
from bevel.pipeline.rounds import Round, on_schedule, while_accuracy_holds
from bevel.pipeline.running import compress

PLAIN = {"precision": "float32", "compile": "never"}


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.floats(0.05, 0.95), st.sampled_from(["linear", "cubic"]))
def test_rounds_on_a_schedule_make_the_whole_cut(count, share, schedule):
    step = IterateStep(
        prune={"budget": {"macs": share, "params": "80 %"}},
        finetune={"epochs": 1},
        rounds=count,
        schedule=schedule,
    )
    parts = [round_.budget.limits() for round_ in on_schedule(step)]
    assert len(parts) == count
    assert math.prod(part["macs"] for part in parts) == pytest.approx(share)
    assert math.prod(part["params"] for part in parts) == pytest.approx(0.8)
    left = [math.prod(part["macs"] for part in parts[: k + 1]) for k in range(count)]
    for number, remains in enumerate(left, start=1):
        part = number / count
        done = part if schedule == "linear" else 1 - (1 - part) ** 3
        assert remains == pytest.approx(1 - done * (1 - share))


def test_ratios_are_shared_too():
    step = IterateStep(prune={"ratio": 0.5}, finetune={"epochs": 1}, rounds=2)
    assert [part.ratio for part in on_schedule(step)] == pytest.approx([0.25, 1 / 3])


def searched(accuracy, *, share=0.5, rounds=20):
    """The rounds of a network that is only a size, and is as accurate as `accuracy(size)`."""
    step = IterateStep(
        prune={"budget": {"macs": share}},
        finetune={"epochs": 1},
        rounds=rounds,
        max_accuracy_drop=1.0,
    )
    cuts = []

    def turn(number, cut, size):
        smaller = size * cut.budget.limits()["macs"]
        if smaller < 0.05:
            raise PruningError("nothing is left")
        cuts.append(smaller)
        return Round(number, smaller, accuracy(smaller), round(1e6 * smaller), 0)

    found = while_accuracy_holds(step, 1.0, turn, floor=0.9)
    assert [each.network for each in found] == cuts
    return found


def test_rounds_back_off_and_keep_what_holds():
    found = searched(lambda size: 0.95 if size > 0.3 else 0.5)
    accepted = [each.network for each in found if each.accepted]
    assert accepted == sorted(accepted, reverse=True)
    assert all(each.accepted == (each.network > 0.3) for each in found)
    assert 0.3 < accepted[-1] < 0.3 / 0.95**2
    assert [each.number for each in found] == list(range(1, len(found) + 1))
    assert not any(each.accepted for each in searched(lambda _: 0.1))
    assert searched(lambda _: 1.0)[-1].network < 0.06  # until nothing is left to be cut
    assert len(searched(lambda _: 1.0, share=0.9, rounds=4)) == 4


def recipe(**iterate: object) -> dict[str, object]:
    return {
        "version": 1,
        "name": "rounds",
        "model": {"name": residual.FACTORY},
        "data": {"name": "digits", "batch_size": 64},
        "steps": [
            {"train": {"epochs": 2, **PLAIN}},
            {"iterate": {"finetune": {"epochs": 1, **PLAIN}, **iterate}},
        ],
        "calibration": {"images": 64},
        "targets": [{"runtime": "eager"}],
    }


def test_rounds_are_steps_of_a_run_and_are_not_done_twice(tmp_path):
    asked = recipes.validate(
        recipe(rounds=2, prune={"budget": {"macs": 0.5}, "align": 4}, schedule="cubic")
    )
    compress(asked, out=tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    names = [step["name"] for step in record["steps"] if "export" not in step["name"]]
    assert names == [
        "01-train", "02-iterate.1-prune", "02-iterate.1-finetune", "02-iterate.2-prune",
        "02-iterate.2-finetune", "02-iterate",
    ]  # fmt: skip
    numbers = record["steps"][5]["numbers"]
    assert numbers["macs"] <= 0.5 * numbers["macs_before"]
    assert numbers["macs"] == record["compressed"]["macs"] == numbers["rounds"][-1]["macs"]
    assert numbers["macs"] < numbers["rounds"][0]["macs"] < numbers["macs_before"]
    # The plan of all rounds is one on the original.
    net = bevel.load_pruned(residual.Residual, tmp_path / "run/compressed.safetensors")
    assert sum(p.numel() for p in net.parameters()) < numbers["params_before"]

    identities = [
        json.loads(path.read_text())["identity"]
        for path in tmp_path.glob("run/steps/*/training/execution.json")
    ]
    assert len({identity["seed"] for identity in identities}) == len(identities) == 3

    # Killed before the last round was written down: what was done before is not done again.
    record["steps"], record["finished"], record["measurements"] = record["steps"][:4], None, []
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    before = (tmp_path / "run/steps/02-iterate.1-finetune/model.safetensors").stat().st_mtime_ns
    compress(asked, out=tmp_path / "run")
    again = json.loads((tmp_path / "run/run.json").read_text())
    assert (
        tmp_path / "run/steps/02-iterate.1-finetune/model.safetensors"
    ).stat().st_mtime_ns == before
    assert again["steps"][5]["numbers"] == numbers


def test_as_small_as_the_accuracy_allows(tmp_path):
    asked = recipes.validate(
        recipe(max_accuracy_drop=30, rounds=3, prune={"budget": {"macs": 0.6}, "align": 4})
    )
    compress(asked, out=tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    step = next(step for step in record["steps"] if step["name"] == "02-iterate")
    rounds = step["numbers"]["rounds"]
    floor = step["numbers"]["validation_top1_before"] - 0.3
    assert [each["accepted"] for each in rounds] == [each["accuracy"] >= floor for each in rounds]
    kept = [each["macs"] for each in rounds if each["accepted"]]
    assert record["compressed"]["macs"] == (kept[-1] if kept else record["original"]["macs"])


@pytest.mark.parametrize(
    ("iterate", "words"),
    [
        ({"prune": {"ratios": {"*": 0.5}}}, "not ratios by layer"),
        ({"prune": {"ratio": 0.5}, "max_accuracy_drop": 1}, "what each round leaves"),
        ({"max_accuracy_drop": 0}, "greater than 0"),
        ({"rounds": 0}, "greater than or equal to 1"),
    ],
)
def test_mistakes_are_one_line(iterate, words):
    with pytest.raises(RecipeError, match=words) as caught:
        recipes.validate(recipe(**iterate))
    assert "\n" not in str(caught.value)


def test_amounts_are_no_shares(tmp_path):
    asked = recipes.validate(recipe(prune={"budget": {"params": 100000}}))
    with pytest.raises(PruningError, match="params is an amount"):
        bevel.run(asked, out=tmp_path / "run")
