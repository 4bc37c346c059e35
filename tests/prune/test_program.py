"""The `torch.export` program that `save_pruned` writes beside the weights."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bevel
from bevel.cli import main
from bevel.core.errors import ExportError
from networks import EXAMPLE, conv, randomise

READER = """
import sys, torch
program, pictures, results = sys.argv[1:]
net = torch.export.load(program).module()
torch.save([net(picture) for picture in torch.load(pictures)], results)
assert not {"bevel", "networks", "test_program"} & set(sys.modules)
"""
"""Runs a program without the code of the network, or of bevel."""


class OnlyHere(nn.Module):
    """A network that no other process has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = conv(3, 16), conv(16, 24), conv(16, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((self.left(x) * self.right(x).sigmoid()).mean((2, 3)))


class TwoInputs(OnlyHere):
    """One more input, and a batch that is mixed: no program takes batches of any size."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y).sum(0, keepdim=True)


class Deciding(OnlyHere):
    """Looks at its numbers to decide what to compute."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if float(y.sum()) > 0 else 2 * y


def pruned_and_plan(net: nn.Module, *inputs: Tensor) -> tuple[nn.Module, bevel.PruningPlan]:
    plan = bevel.plan_pruning(randomise(net), inputs, budget={"macs": 0.6}, align=4)
    return bevel.prune(net, plan), plan


def test_runs_batches_of_any_size_where_the_class_is_not(tmp_path: Path) -> None:
    pruned, plan = pruned_and_plan(OnlyHere(), EXAMPLE)
    pruned.train()
    path = tmp_path / "small.v1.safetensors"
    bevel.save_pruned(pruned, plan, path, program=True, example_inputs=EXAMPLE[:1])
    assert pruned.training
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "small.v1.pt2"}

    pictures = [torch.randn(batch, 3, 8, 8) for batch in (1, 2, 5)]
    torch.save(pictures, tmp_path / "pictures.pt")
    files = [tmp_path / name for name in ("small.v1.pt2", "pictures.pt", "results.pt")]
    subprocess.run([sys.executable, "-c", READER, *files], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = [pruned.eval()(picture) for picture in pictures]
    for a, b in zip(expected, torch.load(tmp_path / "results.pt"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    again = bevel.load_pruned(OnlyHere, path)
    assert torch.equal(again(EXAMPLE), pruned(EXAMPLE)), "the weights are written as ever"


def test_several_inputs_and_one_image_where_a_batch_is_mixed(tmp_path: Path) -> None:
    both = EXAMPLE[:1], EXAMPLE[1:]
    pruned, plan = pruned_and_plan(TwoInputs(), *both)
    bevel.save_pruned(pruned, plan, tmp_path / "a.safetensors", program=True, example_inputs=both)
    loaded = torch.export.load(tmp_path / "a.pt2").module()
    torch.testing.assert_close(loaded(*both), pruned(*both), rtol=1e-6, atol=1e-6)


def test_no_program_unless_asked(tmp_path: Path) -> None:
    pruned, plan = pruned_and_plan(OnlyHere(), EXAMPLE)
    bevel.save_pruned(pruned, plan, tmp_path / "a.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    "inputs",
    [None, {"x": EXAMPLE}, ([EXAMPLE],), (EXAMPLE, 2), ()],
    ids=["none", "mapping", "nested", "number", "empty"],
)
def test_inputs_that_are_no_tensors_are_one_line(tmp_path: Path, inputs: object) -> None:
    pruned, plan = pruned_and_plan(OnlyHere(), EXAMPLE)
    with pytest.raises(ExportError, match="pass example_inputs") as info:
        bevel.save_pruned(
            pruned, plan, tmp_path / "a.safetensors", program=True, example_inputs=inputs
        )
    assert "\n" not in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_has_no_program_leaves_the_old_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    pruned, plan = pruned_and_plan(OnlyHere(), EXAMPLE)
    bevel.save_pruned(pruned, plan, path, program=True, example_inputs=EXAMPLE)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    deciding = copy.deepcopy(pruned)
    deciding.__class__ = Deciding
    with pytest.raises(ExportError, match=r"torch\.export refuses the network") as info:
        bevel.save_pruned(deciding, plan, path, program=True, example_inputs=EXAMPLE)
    assert "\n" not in str(info.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_command_line_writes_a_program(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.safetensors"
    model = ["bevel:resnet20", "--input", "1x3x32x32", "--ratio", "0.5", "--align", "4"]
    assert main(["prune", *model, "--out", str(out), "--program", "--json"]) == 0
    written = json.loads(capfd.readouterr().out)
    assert written["program"] == str(tmp_path / "p.pt2")
    picture = torch.randn(3, 3, 32, 32)
    loaded = torch.export.load(written["program"]).module()
    again = bevel.load_pruned(lambda: bevel.build_model("bevel:resnet20"), out)
    torch.testing.assert_close(loaded(picture), again(picture), rtol=1e-5, atol=1e-5)
