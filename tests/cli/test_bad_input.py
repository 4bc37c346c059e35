"""What a user can get wrong: one line on stderr, exit code 2, nothing half-written."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from .conftest import Result, Workplace, write_images

Case = Callable[[Workplace], list[object]]
CASES: dict[str, tuple[Case, str]] = {}


def case(expected: str) -> Callable[[Case], Case]:
    """Register a command line and what its one line must contain."""

    def add(function: Case) -> Case:
        CASES[function.__name__] = (function, expected)
        return function

    return add


def run(place: Workplace, *more: object, **changes: object) -> list[object]:
    return ["run", place.recipe(**changes), "--out", place.out, *more]


@case("no recipe at nowhere.yaml; 'bevel init' writes a starter recipe")
def missing_recipe(_: Workplace) -> list[object]:
    return ["run", "nowhere.yaml"]


@case("is not valid YAML")
def no_yaml(place: Workplace) -> list[object]:
    (place.folder / "bad.yaml").write_text("a: [1,\nb: }")
    return ["run", "bad.yaml"]


@case("unknown key 'data.rot'. Did you mean 'root'?")
def unknown_key(place: Workplace) -> list[object]:
    return run(place, data={"rot": "x"})


@case("targets.0.precision")
def unknown_precision(place: Workplace) -> list[object]:
    return run(place, targets=[{"precision": "int4"}])


@case("--set data.root: expected KEY=VALUE")
def malformed_override(place: Workplace) -> list[object]:
    return run(place, "--set", "data.root")


@case("no element has 'train' in steps")
def override_of_no_step(place: Workplace) -> list[object]:
    return run(place, "--set", "steps.train.epochs=1")


@case("Did you mean 'resnet20'")
def unknown_model(place: Workplace) -> list[object]:
    return run(place, model={"name": "bevel:resnet_20"})


@case("Did you mean 'resnet18'")
def unknown_torchvision_model(place: Workplace) -> list[object]:
    return run(place, model={"name": "torchvision:resnet_18"})


@case("net.py")
def unknown_factory(place: Workplace) -> list[object]:
    return run(place, model={"name": "net.py:tinny"})


@case("elsewhere.py")
def missing_factory_file(place: Workplace) -> list[object]:
    return run(place, model={"name": "elsewhere.py:tiny"})


@case("no such luck")
def factory_that_raises(place: Workplace) -> list[object]:
    return run(place, model={"name": "net.py:broken"})


@case("returned int, expected a torch.nn.Module")
def factory_of_no_module(place: Workplace) -> list[object]:
    return run(place, model={"name": "net.py:nothing"})


@case("classes_num")
def unknown_argument(place: Workplace) -> list[object]:
    return run(place, model={"arguments": {"classes_num": 2}})


@case("name a folder of them, --set data.unlabelled=DIR")
def no_images_to_ask_about(place: Workplace) -> list[object]:
    step = {"epochs": 1, "distill": {"unlabelled": True}}
    return run(place, steps=[{"prune": {"budget": {"macs": 0.5}}}, {"finetune": step}])


@case("no checkpoint at weights.safetensors")
def missing_checkpoint(place: Workplace) -> list[object]:
    return run(place, model={"checkpoint": "weights.safetensors"})


@case("other.safetensors")
def checkpoint_of_another_network(place: Workplace) -> list[object]:
    save_file(nn.Linear(3, 2).state_dict(), place.folder / "other.safetensors")
    return run(place, model={"checkpoint": "other.safetensors"})


@case("torn.pt")
def damaged_checkpoint(place: Workplace) -> list[object]:
    torch.save(nn.Linear(300, 200).state_dict(), place.folder / "torn.pt")
    (place.folder / "torn.pt").write_bytes((place.folder / "torn.pt").read_bytes()[:2000])
    return run(place, model={"checkpoint": "torn.pt"})


@case("module.pt")
def checkpoint_with_code(place: Workplace) -> list[object]:
    torch.save(nn.Linear(3, 2), place.folder / "module.pt")
    return run(place, model={"checkpoint": "module.pt"})


@case("linear")
def class_count_of_the_checkpoint(place: Workplace) -> list[object]:
    tensors = {
        "one.weight": torch.zeros(8, 3, 3, 3),
        "one.bias": torch.zeros(8),
        "norm.weight": torch.zeros(8),
        "norm.bias": torch.zeros(8),
        "norm.running_mean": torch.zeros(8),
        "norm.running_var": torch.zeros(8),
        "norm.num_batches_tracked": torch.zeros((), dtype=torch.int64),
        "two.weight": torch.zeros(8, 8, 3, 3),
        "two.bias": torch.zeros(8),
        "linear.weight": torch.zeros(10, 8),
        "linear.bias": torch.zeros(10),
    }
    save_file(tensors, place.folder / "ten.safetensors")
    return run(place, model={"checkpoint": "ten.safetensors"})


@case("the network has 5 outputs and the data has 2 classes")
def class_count_of_the_data(place: Workplace) -> list[object]:
    return run(place, model={"arguments": {"num_classes": 5}})


@case("the network does not take images of 3x8x8")
def channels_of_the_data(place: Workplace) -> list[object]:
    return run(place, model={"arguments": {"channels": 1}})


@case("Did you mean 'imagefolder'")
def unknown_data(place: Workplace) -> list[object]:
    return run(place, data={"name": "imagefoldr"})


@case("nowhere")
def missing_data(place: Workplace) -> list[object]:
    return run(place, data={"root": "nowhere"})


@case("empty")
def empty_data(place: Workplace) -> list[object]:
    (place.folder / "empty" / "train").mkdir(parents=True)
    (place.folder / "empty" / "test").mkdir()
    return run(place, data={"root": "empty"})


@case("class")
def one_class(place: Workplace) -> list[object]:
    write_images(place.folder / "one", classes=1, images=4)
    return run(place, data={"root": "one"})


@case("007.png")
def corrupt_image(place: Workplace) -> list[object]:
    image = place.folder / "images" / "train" / "class1" / "007.png"
    image.write_bytes(image.read_bytes()[:40])
    return run(place)


@case("no runtime called 'onnxruntme'. Did you mean 'onnxruntime'?")
def unknown_runtime(place: Workplace) -> list[object]:
    return run(place, targets=[{"runtime": "onnxruntme"}])


@case("no device called 'locl'. Did you mean 'local'?")
def unknown_device(place: Workplace) -> list[object]:
    return run(place, targets=[{"device": "locl"}])


@case("no criterion called 'l3'")
def unknown_criterion(place: Workplace) -> list[object]:
    return run(place, steps=[{"prune": {"ratio": 0.5, "criterion": "l3"}}])


@case("no allocator called 'globl'. Did you mean 'global'?")
def unknown_allocator(place: Workplace) -> list[object]:
    return run(place, steps=[{"prune": {"ratio": 0.5, "allocate": "globl"}}])


@case("macs")
def budget_out_of_reach(place: Workplace) -> list[object]:
    return run(place, steps=[{"prune": {"budget": {"macs": 0.0001}, "align": 1}}])


@case("export")
def network_that_does_not_export(place: Workplace) -> list[object]:
    return run(place, model={"name": "net.py:stubborn"})


@case("out")
def output_that_is_a_file(place: Workplace) -> list[object]:
    place.out.write_text("mine")
    return run(place)


@case("another recipe")
def run_folder_of_another_recipe(place: Workplace) -> list[object]:
    place.out.mkdir()
    (place.out / "recipe.yaml").write_text("version: 1\nname: other\n")
    (place.out / "run.json").write_text(
        '{"recipe": {}, "started": "", "versions": {}, "machine": {}}'
    )
    return run(place)


@case("holds no run: expected run.json")
def takes_over_from_no_run(place: Workplace) -> list[object]:
    return run(place, "--from", place.out.parent)


@case("No such command 'runn'")
def unknown_command(_: Workplace) -> list[object]:
    return ["runn"]


@case("Missing argument 'RECIPE'")
def missing_argument(_: Workplace) -> list[object]:
    return ["run"]


@case("No such option")
def unknown_option(place: Workplace) -> list[object]:
    return run(place, "--seed", "3")


@case("there is no list of 'runtime'. Did you mean 'runtimes'?")
def unknown_kind(_: Workplace) -> list[object]:
    return ["list", "runtime"]


@case("holds no run")
def report_of_no_run(place: Workplace) -> list[object]:
    return ["report", place.folder]


@case("recipe.yaml exists; give another path, or --force to overwrite it")
def init_over_a_file(place: Workplace) -> list[object]:
    return ["init", place.recipe()]


@case("--input 32: expected sizes joined by x")
def malformed_shape(_: Workplace) -> list[object]:
    return ["prune", "net.py:tiny", "--input", 32, "--ratio", 0.5, "--out", "a.safetensors"]


@case("what does net.py:tiny take? Give --input")
def no_shape(_: Workplace) -> list[object]:
    return ["prune", "net.py:tiny", "--ratio", 0.5, "--out", "a.safetensors"]


@case("--ratio: ")
def ratio_out_of_range(_: Workplace) -> list[object]:
    return ["prune", "net.py:tiny", "--input", "1x3x8x8", "--ratio", 2, "--out", "a.safetensors"]


PRUNE = ["prune", "net.py:tiny", "--input", "1x3x8x8", "--out", "a.safetensors", "--align", 1]


@case("give --macs, --params or --budget (what may remain) or --ratio (what is removed)")
def neither_budget_nor_ratio(_: Workplace) -> list[object]:
    return ["prune", "net.py:tiny", "--input", "1x3x8x8", "--out", "a.safetensors"]


@case("latency_ms is measured on a target: give --target")
def latency_without_a_target(_: Workplace) -> list[object]:
    return [*PRUNE, "--budget", "latency_ms=40%"]


@case("--size_kb: expected a share above 0, up to 1 (or 100 %)")
def budget_over_the_whole(_: Workplace) -> list[object]:
    return [*PRUNE, "--budget", "size_kb=140%"]


@case("--budget macs=0.5: macs is limited to 0.4 already")
def budget_given_twice(_: Workplace) -> list[object]:
    return [*PRUNE, "--macs", "0.4", "--budget", "macs=0.5"]


@case("--budget size: expected NAME=LIMIT")
def budget_without_a_limit(_: Workplace) -> list[object]:
    return [*PRUNE, "--budget", "size"]


@case("no channel group of 'three'. ")
def ratio_of_nothing(_: Workplace) -> list[object]:
    return [*PRUNE, "--ratios", "three=0.5"]


@case("expected a name that ends in .safetensors")
def other_suffix(_: Workplace) -> list[object]:
    return ["prune", "net.py:tiny", "--input", "1x3x8x8", "--ratio", 0.5, "--out", "a.pt"]


@case("measures on held-out images: give --recipe")
def allocator_without_images(_: Workplace) -> list[object]:
    model = ["net.py:tiny", "--input", "1x3x8x8"]
    return ["prune", *model, "--ratio", 0.5, "--allocate", "t_sensitive", "--out", "a.safetensors"]


@case("looks at labelled images: give --recipe, or --data and --root; without images: bn_scale")
def criterion_without_images(_: Workplace) -> list[object]:
    model = ["net.py:tiny", "--input", "1x3x8x8"]
    return ["prune", *model, "--ratio", 0.5, "--criterion", "taylor", "--out", "a.safetensors"]


@case("bevel did not write it")
def weights_without_a_plan(place: Workplace) -> list[object]:
    save_file(nn.Linear(3, 2).state_dict(), place.folder / "plain.safetensors")
    return ["verify", "plain.safetensors"]


@case("int8 is calibrated on images")
def int8_without_images(_: Workplace) -> list[object]:
    return ["export", "net.py:tiny", "--input", "1x3x8x8", "--precision", "int8", "--out", "a.onnx"]


@case("nowhere.onnx")
def measuring_a_missing_file(_: Workplace) -> list[object]:
    return ["measure", "nowhere.onnx"]


WORKED_BEFORE = {"corrupt_image", "network_that_does_not_export"}
"""Cases that may have shown progress on stderr before they failed."""


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_half_written(
    name: str, place: Workplace, bevel: Callable[..., Result]
) -> None:
    command, expected = CASES[name]
    result = bevel(*command(place))
    print(result.err)  # noqa: T201  (pytest -s -k one_line shows every line a user gets)
    assert result.code == 2, result
    lines = [line for line in result.err.splitlines() if line.startswith("bevel: ")]
    assert len(lines) == 1, result.err
    if name not in WORKED_BEFORE:
        assert len(result.err.strip().splitlines()) == 1, result.err
    assert expected in lines[0]
    assert "Traceback" not in result.err
    assert result.out == ""
    half = [path.name for path in place.folder.rglob(".*") if path.is_file()]
    assert set(half) <= {".lock"}
    assert not (place.folder / "a.safetensors").exists()


def test_debug_shows_the_traceback(bevel: Callable[..., Result]) -> None:
    result = bevel("run", "nowhere.yaml", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("bevel: no recipe at nowhere.yaml")


def test_a_full_disk_is_one_line() -> None:
    if not Path("/dev/full").exists() or shutil.which("sh") is None:
        pytest.skip("needs /dev/full")
    command = f"{sys.executable} -m bevel schema > /dev/full"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("bevel: ")
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1
