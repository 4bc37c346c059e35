"""`bevel surgery`: what it would do, what that saves, the file, and what comes after it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("timm")

MODEL = ("timm:mobilenetv3_small_050", "--arg", "num_classes=3", "--input", "2x3x64x64")


def test_surgery_then_pruning_then_export(bevel, tmp_path):
    lite, small, onnx = (
        tmp_path / n for n in ("lite.safetensors", "small.safetensors", "net.onnx")
    )
    done = bevel("surgery", *MODEL, "--out", lite)
    assert done.code == 0, done.err
    for word in ("squeeze_excite", "hardswish", "19", str(lite)):
        assert word in done.out
    assert bevel("prune", lite, "--macs", "0.6", "--out", small).code == 0
    exported = bevel("export", small, "--out", onnx)
    assert exported.code == 0, exported.err
    import onnx as format_

    kinds = {node.op_type for node in format_.load(onnx).graph.node}
    assert not kinds & {"HardSwish", "HardSigmoid", "Sigmoid", "Mul"}
    again = bevel("surgery", small, "--out", tmp_path / "x.safetensors")
    assert (again.code, again.out) == (2, "")
    assert "surgery comes before pruning" in again.err
    proof = bevel("verify", small)
    assert (proof.code, proof.out) == (2, "")
    assert "operated on before it was pruned" in proof.err


def test_dry_run_measures_each_rule_and_auto_keeps_what_pays(bevel, tmp_path):
    given = ("surgery", *MODEL, "--dry-run", "--json", "--target", "onnxruntime:float32")
    done = bevel(*given, "--rules", "auto")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    times = found["measured"]
    assert times["squeeze_excite"]["after_ms"] > 0
    assert times["gelu"]["after_ms"] is None
    saving = [
        rule
        for rule, time in times.items()
        if time["after_ms"] is not None and time["after_ms"] < 0.98 * time["before_ms"]
    ]
    assert found["rules"] == saving
    assert {site["rule"] for site in found["sites"]} == set(saving)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rules", "lihgt", "--dry-run"), "Did you mean 'lite'"),
        (("--rules", "silu,sqeeze_excite", "--dry-run"), "Did you mean 'squeeze_excite'"),
        (("--rules", "auto", "--dry-run"), "--target"),
        ((), "--dry-run"),
        (("--dry-run", "--target", "onnxruntime:int9"), "onnxruntime:int8@local"),
        (("--dry-run", "--target", "onnxrt:int8"), "no runtime called 'onnxrt'"),
        (("--out", "net.txt"), ".safetensors"),
        (("--rules", "silu,nowhere.py", "--dry-run"), "no file nowhere.py"),
    ],
)
def test_mistakes_are_one_line(bevel, arguments, words):
    done = bevel("surgery", *MODEL, *arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert done.err.count("\n") == 1
