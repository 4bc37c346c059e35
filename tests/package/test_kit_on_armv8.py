"""The kit's program under QEMU: the answers of the report, from the real aarch64 builds."""

from __future__ import annotations

import importlib.metadata

import pytest

from bevel.core.errors import MeasurementError
from bevel.devices.qemu_aarch64 import connect


@pytest.mark.usefixtures("armv8")
def test_the_program_gives_the_same_answers_on_armv8(kit, images):
    wanted = f"onnxruntime=={importlib.metadata.version('onnxruntime')}"
    try:
        python = connect("").python([wanted, "pillow"])
    except MeasurementError as error:
        pytest.skip(str(error))
    here = kit.json(images / "test")
    there = kit.json(images / "test", "--check", python=python)
    assert there["check"]["passed"]
    assert there["summary"]["top1"] == here["summary"]["top1"]
    for one, other in zip(here["images"], there["images"], strict=True):
        assert one["top"][0]["label"] == other["top"][0]["label"]
