"""Networks by name, and what each mistake is answered with."""

from __future__ import annotations

import importlib

import pytest
import torch

from bevel.core.errors import MissingDependencyError, ModelError, UnknownNameError
from bevel.models import build
from bevel.models.catalog import importlib as catalog_importlib

USER_FILE = """
import torch
from torch import nn

def small(outputs=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, outputs))

def number():
    return 7

def broken():
    raise KeyError("inner")
"""


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "nets.py"


def test_torchvision_without_weights():
    net = build("torchvision:mobilenet_v2", {"num_classes": 5})
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert not net.training


def test_timm():
    pytest.importorskip("timm")
    net = build("timm:mobilenetv3_small_100", {"num_classes": 4})
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


def test_timm_missing_names_the_extra(monkeypatch):
    real = importlib.import_module

    def without_timm(name, *rest):
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        return real(name, *rest)

    monkeypatch.setattr(catalog_importlib, "import_module", without_timm)
    with pytest.raises(MissingDependencyError, match=r"bevel\[timm\]"):
        build("timm:resnet18")


def test_user_file_relative_to_the_working_folder(user_file):
    assert build("nets.py:small", {"outputs": 6})(torch.zeros(1, 2, 2)).shape == (1, 6)
    assert build(f"{user_file}:small")[1].out_features == 3


def test_a_changed_user_file_is_read_again(user_file):
    build("nets.py:small")
    user_file.write_text(USER_FILE.replace("outputs=3", "outputs=8"))
    assert build("nets.py:small")[1].out_features == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet56", "Did you mean 'bevel:resnet56'"),
        ("bevel:resnet57", "Did you mean 'resnet56'"),
        ("torchvison:resnet18", "no model source 'torchvison'.*'torchvision'"),
        ("torchvision:mobilnet_v2", "Did you mean 'mobilenet_v2'"),
        ("nets.py:smal", "no function 'smal' in nets.py. Did you mean 'small'"),
        ("net.py:small", "no file net.py.*Did you mean 'nets.py'"),
    ],
)
@pytest.mark.usefixtures("user_file")
def test_unknown_names_get_the_nearest(name, message):
    with pytest.raises(UnknownNameError, match=message) as caught:
        build(name)
    assert "\n" not in str(caught.value)


def test_unknown_timm_name():
    pytest.importorskip("timm")
    with pytest.raises(UnknownNameError, match="Did you mean 'mobilenetv3_small_100'"):
        build("timm:mobilenetv3_smal_100")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bevel:resnet20", {"classes": 3}, "unexpected keyword argument 'classes'.*num_classes"),
        ("torchvision:resnet18", {"foo": 3}, "torchvision:resnet18 failed: TypeError.*foo"),
        ("nets.py:small", {"k": 1}, "nets.py:small does not take.*'k'; it takes outputs"),
        ("nets.py:number", {}, "returned int, expected a torch.nn.Module"),
        ("nets.py:broken", {}, "nets.py:broken failed: KeyError: 'inner'"),
        ("bevel:mobilenet_v1", {"input_stride": 4}, "input_stride 1 or 2"),
        ("bevel:resnet20", {"shortcuts": "none"}, "padded or projection, got 'none'"),
    ],
)
@pytest.mark.usefixtures("user_file")
def test_factories_that_fail(name, arguments, message):
    with pytest.raises(ModelError, match=message) as caught:
        build(name, arguments)
    assert "\n" not in str(caught.value)


def test_user_file_with_a_syntax_error(user_file):
    user_file.write_text("def small(:\n")
    with pytest.raises(ModelError, match=r"nets\.py fails on import: SyntaxError"):
        build("nets.py:small")
