"""The session that run.py uses for a runtime answers as bevel's own."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from torch import nn

from bevel.core.errors import BevelError
from bevel.packaging.program import package_of, runtimes
from bevel.runtimes import export, load_runtime


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 5),
        ).eval()


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("runtime", runtimes())
def test_the_answers_are_those_of_bevels_session(runtime, precision, tmp_path):
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    try:
        plugin = load_runtime(runtime, precision)
    except BevelError as error:  # an extra that is not installed
        pytest.skip(str(error))
    path = tmp_path / f"model{plugin.SUFFIX}"
    export(
        network(), images[:2], runtime=runtime, precision=precision, calibration=[images], path=path
    )
    session = importlib.import_module(f"bevel.packaging.on_device.sessions.{runtime}").Session(
        str(path), 1, precision
    )
    reference = plugin.open_session(path, 1)
    for image in images.split(1):
        expected = reference.run([image.numpy()])[0].ravel()
        assert np.allclose(session(image.numpy()), expected, atol=1e-6)
    assert session.version == plugin.version()
    assert package_of(runtime).replace("-", "") in session.version.replace("-", "")
