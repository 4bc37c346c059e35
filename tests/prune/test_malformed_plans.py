"""Plans and files that are damaged, or another network's: one line that says what and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import bevel
from bevel.cli import main
from bevel.core.errors import BevelError, CheckpointError, PruningError
from bevel.pruning.plan import PruningPlan
from networks import EXAMPLE, Grouped, Padded, Plain, Projection, randomise

FIRST = "features.0.0.weight"
Change = Callable[[dict[str, Any]], object]


def plan_of(network: type[Any], **request: Any) -> PruningPlan:
    request = {"budget": {"macs": 0.6}, "align": 2, "allocate": "uniform"} | request
    return bevel.plan_pruning(randomise(network()), EXAMPLE, **request)


def one_line(kind: type[BevelError], function: Callable[..., object], *arguments: Any) -> str:
    """The message of the error that the function raises."""
    with pytest.raises(kind) as info:
        function(*arguments)
    message = str(info.value)
    assert message
    assert "\n" not in message
    assert len(message) < 400
    return message


def at(*path: str | int, value: Any) -> Change:
    """Put a value at a path of the plan's JSON."""

    def change(plan: dict[str, Any]) -> None:
        inner: Any = plan
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def without(key: str) -> Change:
    return lambda plan: plan.pop(key)


# -- a plan's file --------------------------------------------------------------------------

NO_PLAN: dict[str, tuple[Change, str]] = {
    "another version": (at("version", value=2), "version Input should be 1"),
    "no tensors": (without("tensors"), "tensors Field required"),
    "no cost": (without("after"), "after Field required"),
    "tensors as a list": (at("tensors", value=[]), "tensors Input should be an object"),
    "a cut as a number": (at("tensors", FIRST, value=3), f"tensors.{FIRST} "),
    "a shape as text": (at("tensors", FIRST, "shape", value="16x3"), f"tensors.{FIRST}.shape "),
    "a shape of text": (at("tensors", FIRST, "shape", value=["a", 3]), f"tensors.{FIRST}.shape.0"),
    "runs as numbers": (at("tensors", FIRST, "keep", "0", value=[0, 1]), f"tensors.{FIRST}.keep.0"),
    "a dimension as text": (
        at("tensors", FIRST, "keep", value={"first": "0-3"}),
        f"tensors.{FIRST}.keep.first",
    ),
    "an attribute as text": (
        at("attributes", value={"features.0.0": {"groups": "many"}}),
        "attributes.features.0.0.groups",
    ),
    "an unknown key": (at("tensor", value={}), "tensor Extra inputs"),
    "a group without a name": (at("groups", value=[{"before": 4, "after": 2}]), "groups.0.name"),
}


@pytest.mark.parametrize("case", NO_PLAN)
def test_json_of_the_wrong_form_says_the_file_and_the_place(case: str, tmp_path: Path) -> None:
    change, expected = NO_PLAN[case]
    content = plan_of(Plain).model_dump(mode="json")
    change(content)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    message = one_line(PruningError, PruningPlan.load, path)
    assert message.startswith(f"{path} is not a pruning plan: ")
    assert expected in message


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_plan_cut_short_anywhere(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan_of(Plain).save(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert "is not a pruning plan" in one_line(PruningError, PruningPlan.load, path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[]", b"null", b"3", b'{"version": 1}'])
def test_a_file_that_is_something_else(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    assert str(path) in one_line(PruningError, PruningPlan.load, path)


def test_a_folder_is_no_plan(tmp_path: Path) -> None:
    assert "cannot read" in one_line(PruningError, PruningPlan.load, tmp_path)


# -- a plan that does not fit ---------------------------------------------------------------


def keep(name: str, dim: int, runs: str | list[str]) -> Change:
    return at("tensors", name, "keep", str(dim), value=runs)


def attribute(module: str, path: str, value: int) -> Change:
    return at("attributes", value={module: {path: value}})


GROUPED = "grouped.0.weight"
MISFITS: dict[str, tuple[type[Any], Change, str]] = {
    "a tensor that is not there": (
        Plain,
        at("tensors", "features.9.weight", value={"shape": [4], "keep": {}}),
        "cuts 'features.9.weight', which this network does not have",
    ),
    "a shape of another width": (
        Plain,
        at("tensors", FIRST, "shape", value=[32, 3, 3, 3]),
        f"'{FIRST}' of shape [32, 3, 3, 3], got [16, 3, 3, 3]",
    ),
    "a shape of fewer dimensions": (
        Plain,
        at("tensors", FIRST, "shape", value=[16]),
        f"'{FIRST}' of shape [16], got",
    ),
    "a dimension beyond the last": (Plain, keep(FIRST, 4, "0"), f"dimension 4 of '{FIRST}'"),
    "a negative dimension": (Plain, keep(FIRST, -1, "0"), f"dimension -1 of '{FIRST}'"),
    "an index beyond the last": (
        Plain,
        keep(FIRST, 0, "0-3,16"),
        f"index 16 of dimension 0 of '{FIRST}', which is out of range: the dimension has 16",
    ),
    "a run that would fill the memory": (
        Plain,
        keep(FIRST, 0, "0-999999999999999"),
        f"of dimension 0 of '{FIRST}', which is out of range",
    ),
    "a number of a million digits": (
        Plain,
        keep(FIRST, 0, "9" * 1_000_000),
        f"of dimension 0 of '{FIRST}', which is out of range",
    ),
    "a negative index": (Plain, keep(FIRST, 0, "-3"), f"dimension 0 of '{FIRST}'"),
    "indices that descend": (
        Plain,
        keep(FIRST, 0, "5,3"),
        f"dimension 0 of '{FIRST}' in the plan: the runs '5,3' are not ascending",
    ),
    "an index twice": (Plain, keep(FIRST, 0, "0-3,3"), "are not ascending"),
    "a run backwards": (Plain, keep(FIRST, 0, "7-4"), "are not ascending"),
    "no number": (Plain, keep(FIRST, 0, "a-b"), "'a-b' is not a run of indices"),
    "a run of three": (Plain, keep(FIRST, 0, "1-2-3"), "'1-2-3' is not a run of indices"),
    "nothing kept": (Plain, keep(FIRST, 0, ""), f"keeps nothing of dimension 0 of '{FIRST}'"),
    "nothing kept of one block": (
        Grouped,
        keep(GROUPED, 1, ["0", "1", "", "3"]),
        f"keeps nothing of dimension 1 of '{GROUPED}'",
    ),
    "blocks of unequal length": (
        Grouped,
        keep(GROUPED, 1, ["0", "1", "2-3", "3"]),
        f"unequal numbers in the blocks of dimension 1 of '{GROUPED}'",
    ),
    "no blocks": (Grouped, keep(GROUPED, 1, []), f"dimension 1 of '{GROUPED}'"),
    "blocks that do not divide it": (
        Grouped,
        keep(GROUPED, 1, ["0", "1", "2"]),
        f"cuts '{GROUPED}' into 3 blocks, which do not divide it",
    ),
    "blocks of the first dimension": (
        Grouped,
        keep(GROUPED, 0, ["0", "1"]),
        f"cuts '{GROUPED}' into 2 blocks",
    ),
    "a module that is not there": (
        Plain,
        attribute("features.9", "out_channels", 4),
        "sets features.9.out_channels, which this network does not have",
    ),
    "an attribute that is not there": (
        Plain,
        attribute("features.0.0", "heads", 4),
        "sets features.0.0.heads, which this network does not have",
    ),
    "an attribute that is no number": (
        Plain,
        attribute("features.0.0", "bias", 4),
        "sets features.0.0.bias, which",
    ),
    "an attribute that is code": (
        Plain,
        attribute("features.0.0", "forward", 4),
        "sets features.0.0.forward, which",
    ),
    "a place beyond a tuple's last": (
        Plain,
        attribute("features.0.0", "padding[2]", 4),
        "sets features.0.0.padding[2], which",
    ),
    "a place in a number": (
        Plain,
        attribute("features.0.0", "groups[0]", 1),
        "sets features.0.0.groups[0], which",
    ),
    "a negative size": (
        Plain,
        attribute("features.0.0", "groups", -1),
        "sets features.0.0.groups to -1, expected 0 or more",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_plan_that_does_not_fit_says_the_tensor_or_attribute(case: str) -> None:
    network, change, expected = MISFITS[case]
    content = plan_of(network).model_dump(mode="json")
    change(content)
    plan = PruningPlan.parse(json.dumps(content), "the plan")
    net = randomise(network())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert expected in one_line(PruningError, bevel.prune, net, plan)
    assert all(bool((tensor == before[name]).all()) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("network", [Projection, Grouped, Padded])
def test_the_plan_of_another_network(network: type[Any]) -> None:
    message = one_line(PruningError, bevel.prune, Plain(), plan_of(network))
    assert "another network's plan" in message


def test_a_plan_applied_twice() -> None:
    plan = plan_of(Plain)
    once = bevel.prune(Plain(), plan)
    assert "already pruned" in one_line(PruningError, bevel.prune, once, plan)


# -- plans in a row -------------------------------------------------------------------------


def second_plan(plan: PruningPlan, name: str, cut: dict[str, Any]) -> PruningPlan:
    """The plan with this cut alone."""
    content = plan.model_dump(mode="json") | {"tensors": {name: cut}}
    return PruningPlan.parse(json.dumps(content), "the plan")


def test_a_second_plan_of_the_original_instead_of_the_pruned() -> None:
    first = plan_of(Plain)
    left = first.tensors[FIRST].keep[0]
    message = one_line(PruningError, first.then, plan_of(Plain, budget={"macs": 0.9}))
    assert "made for 'features.0.0.weight' of shape [16, 3, 3, 3], the first leaves" in message
    assert left != "0-15"


def test_a_second_plan_of_another_shape_whose_indices_happen_to_fit() -> None:
    later = second_plan(plan_of(Plain), FIRST, {"shape": [99, 3, 3, 3], "keep": {"0": "0-3"}})
    assert FIRST in one_line(PruningError, plan_of(Plain).then, later)


def test_a_second_plan_in_other_blocks() -> None:
    first = plan_of(Grouped)
    later = second_plan(first, GROUPED, {"shape": [24, 3, 3, 3], "keep": {"1": ["0", "0"]}})
    assert GROUPED in one_line(PruningError, first.then, later)


def test_a_second_plan_of_other_names_is_refused_when_it_is_used() -> None:
    def both() -> None:
        bevel.prune(Plain(), plan_of(Plain).then(plan_of(Projection)))

    assert "which this network does not have" in one_line(PruningError, both)


# -- files of pruned networks ---------------------------------------------------------------

RESNET = "bevel:resnet20"


@pytest.fixture(scope="module")
def pruned_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned resnet20, written with all that the command line needs to read it."""
    path = tmp_path_factory.mktemp("pruned") / "good.safetensors"
    net, picture = bevel.build_model(RESNET), EXAMPLE.new_ones(1, 3, 32, 32)
    plan = bevel.plan_pruning(net, picture, budget={"macs": 0.7})
    model = {"name": RESNET, "arguments": {}, "input_shape": [1, 3, 32, 32]}
    bevel.save_pruned(bevel.prune(net, plan), plan, path, model=model)
    return path


def rewritten(
    good: Path,
    path: Path,
    *,
    tensors: dict[str, Tensor] | None = None,
    record: Change | None = None,
    text: str | None = None,
) -> None:
    """The good file with other weights, a changed record, or a record of this text."""
    from safetensors import safe_open

    with safe_open(good, framework="pt") as file:
        content = json.loads(file.metadata()["bevel"])
    if record is not None:
        record(content)
    metadata = {"bevel": json.dumps(content) if text is None else text}
    save_file(load_file(good) if tensors is None else tensors, path, metadata=metadata)


def cut_short(share: float) -> Callable[[Path, Path], None]:
    def write(good: Path, path: Path) -> None:
        data = good.read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    return write


def no_plan(good: Path, path: Path) -> None:
    save_file(load_file(good), path, metadata={"format": "pt"})


def record_is(text: str) -> Callable[[Path, Path], None]:
    return lambda good, path: rewritten(good, path, text=text)


def recorded(change: Change) -> Callable[[Path, Path], None]:
    return lambda good, path: rewritten(good, path, record=change)


def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path, Path], None]:
    def write(good: Path, path: Path) -> None:
        tensors = load_file(good)
        change(tensors)
        rewritten(good, path, tensors=tensors)

    return write


def unpruned(good: Path, path: Path) -> None:
    rewritten(good, path, tensors=dict(bevel.build_model(RESNET).state_dict()))


def of_another_network(good: Path, path: Path) -> None:
    rewritten(good, path, tensors=dict(Projection().state_dict()))


DAMAGE: dict[str, tuple[Callable[[Path, Path], None], type[BevelError], str]] = {
    "empty": (cut_short(0), CheckpointError, "cannot read"),
    "cut in the header": (cut_short(0.001), CheckpointError, "cannot read"),
    "cut in the weights": (cut_short(0.8), CheckpointError, "cannot read"),
    "no plan": (no_plan, CheckpointError, "bevel did not write it"),
    "a record cut short": (record_is('{"plan": '), CheckpointError, "damaged record"),
    "a record that is a list": (record_is("[]"), CheckpointError, "damaged record"),
    "a record without a plan": (record_is("{}"), CheckpointError, "damaged record"),
    "a record of no model": (recorded(at("model", value=3)), CheckpointError, "damaged record"),
    "a plan that is a number": (recorded(at("plan", value=3)), PruningError, "is not a pruning"),
    "a plan of another version": (
        recorded(at("plan", "version", value=7)),
        PruningError,
        "version Input should be 1",
    ),
    "a plan that does not fit": (
        recorded(at("plan", "tensors", value={"conv1.weight": {"shape": [1], "keep": {}}})),
        PruningError,
        "'conv1.weight' of shape [1]",
    ),
    "another network": (
        recorded(at("model", "name", value="bevel:vgg16_bn")),
        PruningError,
        "another network's plan",
    ),
    "weights before pruning": (unpruned, CheckpointError, "' has shape ["),
    "weights of another network": (of_another_network, CheckpointError, "' differs"),
    "a weight missing": (
        weights(lambda tensors: tensors.pop("conv1.weight")),
        CheckpointError,
        "'conv1.weight' differs",
    ),
    "a weight too many": (
        weights(lambda tensors: tensors.update(more=tensors["conv1.weight"].clone())),
        CheckpointError,
        "'more' differs",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_one_line_in_python_and_at_the_command_line(
    case: str, pruned_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write, kind, expected = DAMAGE[case]
    path = tmp_path / "bad.safetensors"
    write(pruned_file, path)
    if case != "another network":  # which only the command line builds by its name
        load = one_line(kind, bevel.load_pruned, lambda: bevel.build_model(RESNET), path)
        assert expected in load
    capfd.readouterr()
    assert main(["verify", str(path)]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    (line,) = shown.err.strip().splitlines()
    assert line.startswith("bevel: ")
    assert expected in line
