"""What may be varied: mistakes in one line, shared steps, combinations."""

from pathlib import Path
from typing import Any

import pytest
from fake_trials import RECIPE, fake

from bevel.core import recipe as recipes
from bevel.core.errors import BevelError, RecipeError
from bevel.core.recipe import Range, vary
from bevel.pipeline.folder import RunFolder
from bevel.pipeline.sharing import adopt, common_steps
from bevel.searching.space import check, combinations, described, values_of

LONG = recipes.validate(
    {
        **RECIPE,
        "steps": [
            {"train": {"epochs": 1}},
            {"prune": {"criterion": "l2", "budget": {"macs": 0.5}}},
            {"finetune": {"epochs": 1}},
            {"qat": {"epochs": 1}},
        ],
        "targets": [{"precision": "int8"}],
    }
)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"steps.prune.criterion": []}, "should have at least 1 item"),
        ({"steps.prune.criterion": "l2"}, "expected a list of choices, or a range such as"),
        ({"steps.prune.budget.macs": {"low": "small", "high": 1}}, "range.low"),
        ({"steps.prune.budget.macs": {"low": 0.7, "high": 0.3}}, "low (0.7) must be below"),
        ({"steps.prune.budget.macs": {"low": 0, "high": 1, "log": True}}, "log needs low above 0"),
        ({"steps.prune.budget.macs": {"low": 0.1, "hihg": 1}}, "search.space"),
        ({}, "search.space"),
    ],
)
def test_a_malformed_space_is_one_line(space: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.validate({**RECIPE, "search": {"space": space}})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"steps.prune.criterio": ["l1"]}, "Did you mean 'criterion'"),
        ({"steps.prune.criterion": ["l2", "l3"]}, "steps.prune.criterion=l3"),
        ({"steps.prune.criterion": ["l2", "l2"]}, "a value is there twice"),
        ({"steps.train.epochs": [1, 2]}, "no element has 'train' in steps"),
        ({"steps.prune.budget.macs": Range(low=-0.5, high=0.5)}, "macs=-0.5"),
    ],
)
def test_a_value_that_cannot_be_is_found_before_any_work(
    space: dict[str, Any], message: str
) -> None:
    with pytest.raises(BevelError) as caught:
        check(fake(), space, "search.space")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "values", "shared"),
    [
        ("steps.train.epochs", [1, 2], 0),
        ("data.batch_size", [128, 64], 0),
        ("steps.prune.criterion", ["l2", "l1"], 1),
        ("calibration.images", [512, 64], 1),
        ("steps.prune.align", ["auto", 4], 1),
        ("steps.finetune.lr", [0.1, 0.2], 2),
        ("quantization.observer", ["minmax", "mse"], 3),
        ("steps.qat.lr", [0.1, 0.005], 3),
        ("name", ["one", "two"], 4),
    ],
)
def test_steps_before_the_first_varied_one_are_shared(
    key: str, values: list[Any], shared: int
) -> None:
    assert check(LONG, {key: values}, "search.space") == shared


def test_targets_matter_to_a_prune_step_that_asks_them_for_widths() -> None:
    auto = vary(LONG, {"steps.prune.align": "auto"})
    target = {"targets": [{"precision": "int8"}, {"runtime": "openvino"}]}
    assert common_steps(LONG, vary(LONG, target)) == 3
    assert common_steps(auto, vary(auto, target)) == 1


def test_targets_matter_to_budgets_that_are_of_a_target() -> None:
    target = {"targets": [{"precision": "float32"}], "steps.3": {"finetune": {"epochs": 1}}}
    for limit, shared in (({"macs": 0.5, "params": 0.5}, 3), ({"size_kb": 0.5}, 1)):
        asked = vary(LONG, {"steps.prune.budget": limit})
        assert common_steps(asked, vary(asked, target)) == shared


def test_images_without_labels_matter_to_a_step_that_learns_from_them() -> None:
    asking = {"steps.2": {"finetune": {"epochs": 1, "distill": {"unlabelled": True}}}}
    one = vary(LONG, {**asking, "data.unlabelled": "some"})
    assert common_steps(one, vary(one, {"data.unlabelled": "others"})) == 2
    assert common_steps(one, LONG) == 2
    assert common_steps(one, vary(one, {"name": "other"})) == 4


def test_every_kind_of_step_is_shared() -> None:
    leading = [
        {"surgery": {"progressive": True}},
        {"resize": {"size": 8}},
        {"sparsify": {"epochs": 1}},
    ]
    iterate = {"prune": {"ratio": 0.5}, "finetune": {"epochs": 1}}
    after = [{"iterate": iterate}, {"finetune": {"epochs": 1}}]
    whole = vary(LONG, {"steps": [*leading, *after]})
    assert common_steps(whole, vary(whole, {"name": "other"})) == 5
    assert common_steps(whole, vary(whole, {"steps.finetune.epochs": 2})) == 4
    assert common_steps(whole, vary(whole, {"calibration.images": 3})) == 0
    # What a growing penalty holds down is what a later step removes.
    assert common_steps(whole, vary(whole, {"steps.iterate.rounds": 2})) == 3
    assert common_steps(whole, vary(whole, {"steps.iterate.prune.criterion": "l1"})) == 2


def test_rounds_are_taken_over_with_their_step(tmp_path: Path) -> None:
    steps = [{"train": {"epochs": 1}}, {"iterate": {"finetune": {"epochs": 1}, "rounds": 1}}]
    recipe = vary(LONG, {"steps": [*steps, {"finetune": {"epochs": 1}}]})
    names = ("01-train", "02-iterate.1-prune", "02-iterate.1-finetune", "02-iterate")
    with RunFolder(tmp_path / "one", recipe) as folder:
        for name in names:
            file = folder.step_folder(name) / "model.safetensors"
            file.parent.mkdir(parents=True)
            file.write_bytes(name.encode())
            folder.finish(name, name.rpartition("-")[2], 1.0, {}, [file])
    with RunFolder(tmp_path / "two", vary(recipe, {"steps.finetune.epochs": 2})) as other:
        adopt(other, [tmp_path / "one"])
        assert tuple(step.name for step in other.record.steps) == names
    with RunFolder(tmp_path / "three", vary(recipe, {"steps.iterate.rounds": 2})) as other:
        adopt(other, [tmp_path / "one"])
        assert [step.name for step in other.record.steps] == ["01-train"]


def test_ranges_with_a_step_are_all_their_values() -> None:
    assert values_of(Range(low=0.3, high=0.7, step=0.1)) == [0.3, 0.4, 0.5, 0.6, 0.7]
    assert values_of(Range(low=1, high=4)) == [1, 2, 3, 4]
    assert values_of(Range(low=4, high=12, step=4)) == [4, 8, 12]
    assert values_of(Range(low=0.3, high=0.7)) is None
    assert values_of(Range(low=1, high=100, log=True)) is None


def test_combinations_are_the_product_up_to_the_limit() -> None:
    dimensions = {"a.x": [1, 2], "b.y": Range(low=1, high=3)}
    expected = [{"a.x": a, "b.y": b} for a in (1, 2) for b in (1, 2, 3)]
    assert combinations(dimensions) == expected
    assert combinations(dimensions, limit=5) is None


def test_values_are_described_by_the_last_word_unless_that_is_ambiguous() -> None:
    assert described({"steps.1.prune.criterion": "l2", "a.b": None}) == "criterion=l2, b=null"
    assert described({"steps.0.lr": 1, "steps.2.lr": 2}) == "steps.0.lr=1, steps.2.lr=2"
