"""Checkpoints: every accepted form loads, everything else is refused in one line."""

from __future__ import annotations

import os
import pickle
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

from bevel.core.errors import CheckpointError
from bevel.models import build, load_checkpoint


def small(classes=3, width=4):
    torch.manual_seed(classes)
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, classes)
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b, strict=True))


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [
        (".pt", lambda s: s),
        (".pth", lambda s: {"state_dict": s, "epoch": 3}),
        (".th", lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}),
        (".pt", lambda s: {"net": {f"_orig_mod.module.{k}": v for k, v in s.items()}}),
        (".pt", lambda s: {"model_state": s}),
        (
            ".pt",
            lambda s: {
                "model": {k: torch.zeros_like(v) for k, v in s.items()},
                "model_ema": {f"module.{k}": v for k, v in s.items()}
                | {"n_averaged": torch.tensor(9)},
            },
        ),
        (".pt", lambda s: {k: v for k, v in s.items() if "num_batches" not in k}),
    ],
)
def test_accepted_forms(tmp_path, suffix, wrap):
    saved = small().state_dict()
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap(saved), path)
    net = small()
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    load_checkpoint(net, path)
    assert same(net, saved.values())


def test_safetensors(tmp_path):
    saved = small().state_dict()
    safetensors.torch.save_file(saved, tmp_path / "weights.safetensors")
    net = small()
    nn.init.zeros_(net[0].weight)
    load_checkpoint(net, tmp_path / "weights.safetensors")
    assert same(net, saved.values())


@pytest.mark.parametrize(
    ("name", "file"),
    [("resnet20", "resnet20-12fca82f.th"), ("resnet56", "resnet56-4bfd9763.th")],
)
def test_public_resnets(shared_data, name, file):
    path = shared_data / "weights" / file
    if not path.exists():
        pytest.skip(f"no {path}")
    net = build(f"bevel:{name}", checkpoint=path)
    assert net.linear.weight.abs().sum() > 0
    with pytest.raises(CheckpointError, match="for 10 classes and the network has 100"):
        build(f"bevel:{name}", {"num_classes": 100}, checkpoint=path)


def refused(net, path, match):
    before = [v.clone() for v in net.state_dict().values()]
    with (
        warnings.catch_warnings(),
        pytest.raises(CheckpointError, match=match) as caught,
    ):
        warnings.simplefilter("error")
        load_checkpoint(net, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same(net, before)


def test_mismatches_list_keys_and_shapes(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(small(width=6).state_dict(), path)
    refused(
        small(), path, r"of another shape \(0.weight got \(6, 1, 3, 3\) expected \(4, 1, 3, 3\)"
    )
    torch.save({"0.weight": torch.zeros(4, 1, 3, 3), "extra": torch.zeros(1)}, path)
    refused(small(), path, r"7 missing \(0.bias, 1.weight, 1.bias, …\); 1 unexpected \(extra\)")


def test_class_count_is_named(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(small(classes=5).state_dict(), path)
    refused(small(), path, "for 5 classes and the network has 3 .layer '3'.*num_classes to 5")


def test_a_new_head_keeps_all_other_weights(tmp_path):
    path = tmp_path / "weights.pt"
    trained, net = small(classes=5), small()
    torch.save(trained.state_dict(), path)
    head = [value.clone() for value in net[3].state_dict().values()]
    load_checkpoint(net, path, new_head=True)
    assert same(net[:3], trained[:3].state_dict().values())
    assert same(net[3], head)
    load_checkpoint(net, path_of(tmp_path, small()), new_head=True)  # of the same classes: all
    assert same(net, small().state_dict().values())
    torch.save(small(width=6).state_dict(), path)  # another network stays another network
    with pytest.raises(CheckpointError, match="of another shape"):
        load_checkpoint(net, path, new_head=True)


def path_of(folder, net):
    torch.save(net.state_dict(), folder / "same.pt")
    return folder / "same.pt"


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def test_pickles_are_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": small().state_dict(), "extra": Harmful()}, path)
    refused(small(), path, "pickled Python objects.*can run any code")
    path.write_bytes(pickle.dumps(Harmful()))
    refused(small(), path, "pickled Python objects|no torch checkpoint")
    torch.save(small(), path)
    refused(small(), path, r"pickled Python objects \(torch.nn.*save net.state_dict")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.999])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_files(tmp_path, form, share):
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    state = small(classes=40, width=40).state_dict()
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(small(40, 40), path, "truncated|damaged")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("w.onnx", b"x", "a file with the suffix '.onnx'; expected a .safetensors"),
        ("w.pt", b"", "is empty"),
        ("w.pt", b"hello world", "no torch checkpoint"),
        ("w.pth", b"<!DOCTYPE html><html>", "no torch checkpoint"),
        ("w.safetensors", b"<!DOCTYPE html><html>", "no safetensors file"),
    ],
)
def test_other_files(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    refused(small(), tmp_path / file, message)


def test_missing_folder_and_tensorless(tmp_path):
    refused(small(), tmp_path / "none.pt", "no checkpoint at")
    refused(small(), tmp_path, "is a folder")
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    refused(small(), tmp_path / "w.pt", r"holds no tensors under the keys it has \(epoch\)")
    torch.save(torch.zeros(3), tmp_path / "w.pt")
    refused(small(), tmp_path / "w.pt", "holds a Tensor")


def test_weights_that_are_not_finite(tmp_path):
    state = small().state_dict()
    state["0.weight"][0] = float("nan")
    torch.save(state, tmp_path / "w.pt")
    refused(small(), tmp_path / "w.pt", "not finite in 1 tensors, first in 0.weight")
