from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bevel.core import recipe as recipes
from bevel.core.errors import RecipeError
from bevel.core.overrides import override
from bevel.core.recipe import DataSection, Recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def minimal() -> dict[str, Any]:
    return {
        "version": 1,
        "name": "test",
        "model": {"name": "bevel:resnet20"},
        "data": {"name": "digits"},
        "steps": [
            {"train": {"epochs": 1}},
            {"prune": {"budget": {"macs": 0.5}}},
            {"finetune": {"epochs": 2}},
        ],
        "targets": [{"runtime": "onnxruntime"}],
    }


def load(tmp_path: Path, raw: object, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw), encoding="utf-8")
    return recipes.load(path, overrides)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_named_recipes_validate(path: Path) -> None:
    assert recipes.load(path).name == path.stem


def test_a_recipe_survives_the_way_to_json_and_back() -> None:
    recipe = recipes.validate(minimal())
    assert recipes.validate(recipe.model_dump(mode="json")) == recipe


def test_a_step_is_addressed_by_verb_or_index(tmp_path: Path) -> None:
    recipe = load(tmp_path, minimal(), "steps.finetune.lr=0.5", "steps.1.prune.align=16")
    assert recipe.steps[2].finetune.lr == 0.5
    assert recipe.steps[1].prune.align == 16
    assert recipe.steps[0].train.lr == 0.1


@pytest.mark.parametrize(("given", "read"), [("16", 16), ("auto", "auto"), ("1", 1)])
def test_align_is_a_number_or_auto(tmp_path: Path, given: str, read: object) -> None:
    assert load(tmp_path, minimal(), f"steps.prune.align={given}").steps[1].prune.align == read


@pytest.mark.parametrize("wrong", ["0", "-8", "1.5", "true", "often"])
def test_other_alignments_are_one_line(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(RecipeError, match=r"prune\.align: expected a whole number from 1, or auto"):
        load(tmp_path, minimal(), f"steps.prune.align={wrong}")


def test_a_whole_step_is_replaced_by_its_verb(tmp_path: Path) -> None:
    recipe = load(tmp_path, minimal(), "steps.prune={ratio: 0.25}")
    assert recipe.steps[1].prune.ratio == 0.25
    assert recipe.steps[1].prune.budget is None


def test_an_override_makes_the_sections_it_needs(tmp_path: Path) -> None:
    recipe = load(tmp_path, minimal(), "data.augment.flip=true", "model.arguments.num_classes=3")
    assert recipe.data.augment.flip is True
    assert recipe.model.arguments == {"num_classes": 3}


@given(
    epochs=st.integers(1, 10**6),
    lr=st.floats(1e-6, 10, allow_nan=False),
    name=st.from_regex(r"[A-Za-z][A-Za-z0-9._-]{0,20}", fullmatch=True),
)
def test_an_override_is_what_the_same_yaml_would_be(epochs: int, lr: float, name: str) -> None:
    value = yaml.safe_load(f"{name!r}")
    raw = minimal()
    for text in (
        f"steps.0.train.epochs={epochs}",
        f"steps.train.lr={lr:.9f}",
        f"name={name!r}",
    ):
        override(raw, text)
    expected = minimal()
    expected["name"] = value
    expected["steps"][0]["train"] = {"epochs": epochs, "lr": float(f"{lr:.9f}")}
    assert raw == expected


@given(st.text(max_size=40))
def test_any_override_is_applied_or_refused_in_one_line(text: str) -> None:
    raw = minimal()
    try:
        override(raw, text)
        recipes.validate(raw)
    except RecipeError as error:
        assert str(error)
        if "\n" not in text:
            assert "\n" not in str(error)


KEYS = st.sampled_from(["steps", "train", "prune", "0", "7", "model", "name", "data", "lr", "x"])


@given(
    st.lists(KEYS, min_size=1, max_size=4),
    st.sampled_from(["1", "", "[1]", "{a: 1}", "null", "x", "{", "1e999"]),
)
def test_any_path_is_applied_or_refused(keys: list[str], value: str) -> None:
    raw = minimal()
    try:
        override(raw, f"{'.'.join(keys)}={value}")
        recipes.validate(raw)
    except RecipeError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"versoin": 1}, "unknown key 'versoin'. Did you mean 'version'?"),
        ({"version": 2}, "version: "),
        ({"name": "a/b"}, "name: "),
        ({"seed": -1}, "seed: "),
        ({"model": None}, "model: "),
        ({"data": {"name": "digits", "rot": "x"}}, "unknown key 'data.rot'. Did you mean 'root'?"),
        ({"data": {"name": "digits", "validation": 1.5}}, "data.validation: "),
        ({"steps": []}, "steps: "),
        ({"steps": [{"prune": {}}]}, "give either budget (what may remain) or ratio"),
        ({"steps": [{"prune": {"budget": {}}}]}, "a budget needs at least one of macs, params"),
        ({"steps": [{"prune": {"budget": {"macs": 0}}}]}, "budget.macs: expected a share above 0"),
        ({"steps": [{"prune": {"budget": {"macs": True}}}]}, "expected a share above 0"),
        ({"steps": [{"prune": {"budget": {"size_kb": "120 %"}}}]}, "up to 1 (or 100 %)"),
        ({"steps": [{"prune": {"budget": {"latency_ms": "3 kb"}}}]}, "such as 300 or '0.8 ms'"),
        ({"steps": [{"prune": {"budget": {"size": 0.5}}}]}, "Did you mean 'size_kb'?"),
        ({"steps": [{"prune": {"ratio": 0.5, "ratios": {"*": 0.1}}}]}, "or ratios by layer"),
        ({"steps": [{"prune": {"ratios": {"a": 1}}}]}, "steps.0.prune.ratios.a: "),
        ({"steps": [{"prune": {"ratios": {}}}]}, "steps.0.prune.ratios: "),
        ({"steps": [{"prune": {"ratio": 0.5}, "train": {"epochs": 1}}]}, "exactly one of"),
        ({"steps": [{"prun": {"ratio": 0.5}}]}, "Did you mean 'prune'?"),
        (
            {"data": {"name": "digits", "unlabelled": "photographs"}},
            "data.unlabelled is for steps with distill: {unlabelled: true}",
        ),
        ({"targets": []}, "targets: "),
        ({"targets": [{"precision": "int4"}]}, "targets.0.precision: "),
        ({"targets": [{"threads": 0}]}, "targets.0.threads: "),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, minimal() | change)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    raw = minimal()
    del raw["data"]
    with pytest.raises(RecipeError, match="'data' is missing"):
        load(tmp_path, raw)


@pytest.mark.parametrize(
    "text", ["- a list", "just text", "", "a: [1, 2", "a: !!python/name:os.system ''"]
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_binary_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read"):
        recipes.load(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match="cannot read"):
        recipes.load(tmp_path)


@pytest.mark.parametrize(
    ("size", "resize", "smaller"),
    [
        (224, 256, (112, 128)),
        (224, None, (112, None)),
        (224, 224, (112, 112)),
        (None, None, (112, None)),
    ],
)
def test_another_size_shows_the_same_part_of_an_image(
    size: int | None, resize: int | None, smaller: tuple[int, int | None]
) -> None:
    section = DataSection(name="digits", size=size, resize=resize).at(112)
    assert (section.size, section.resize) == smaller


@given(st.integers(1, 600), st.integers(0, 200), st.integers(1, 600))
def test_another_size_is_never_larger_than_what_it_is_cut_from(
    size: int, border: int, other: int
) -> None:
    section = DataSection(name="digits", size=size, resize=size + border).at(other)
    assert section.size == other
    assert section.resize is not None
    # |resize / other - (size + border) / size| <= 0.5 / other, in integers
    assert 2 * abs(section.resize * size - (size + border) * other) <= size
    assert section.resize >= other
