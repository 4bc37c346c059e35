"""Networks by name: bevel's own, torchvision's, timm's, and a user's file. No torch until built."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bevel.core import userfile
from bevel.core.errors import (
    CheckpointError,
    MissingDependencyError,
    ModelError,
    UnknownNameError,
    suggestion,
)

if TYPE_CHECKING:
    from torch import nn

BUILTIN: Mapping[str, tuple[str, str]] = {
    "resnet20": ("resnet", "CIFAR ResNet-20, padded shortcuts: 0.27 M parameters, 41 M MACs"),
    "resnet32": ("resnet", "CIFAR ResNet-32, padded shortcuts: 0.46 M parameters, 69 M MACs"),
    "resnet44": ("resnet", "CIFAR ResNet-44, padded shortcuts: 0.66 M parameters, 97 M MACs"),
    "resnet56": ("resnet", "CIFAR ResNet-56, padded shortcuts: 0.85 M parameters, 125 M MACs"),
    "resnet110": ("resnet", "CIFAR ResNet-110, padded shortcuts: 1.73 M parameters, 253 M MACs"),
    "vgg16_bn": ("vgg", "CIFAR VGG-16 with batch norm: 14.98 M parameters, 314 M MACs"),
    "googlenet": ("googlenet", "CIFAR GoogLeNet: 6.17 M parameters, 1.53 G MACs"),
    "densenet40": ("densenet", "CIFAR DenseNet-40, growth 12: 1.06 M parameters, 283 M MACs"),
    "mobilenet_v1": ("mobilenet", "MobileNetV1, CIFAR form: 3.2 M parameters, 46 M MACs"),
}
"""bevel's own networks: name -> (module in bevel.models, one-line description)."""

SOURCES = ("bevel", "torchvision", "timm")


def build(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    *,
    new_head: bool = False,
) -> nn.Module:
    """Build a network in eval mode, and load its weights if a checkpoint is given.

    Args:
        name: `bevel:NAME`, `torchvision:NAME`, `timm:NAME` or `path/to/file.py:factory`.
        arguments: keyword arguments of the factory, such as `{"num_classes": 3}`.
        checkpoint: see `bevel.models.load_checkpoint`; weights are never downloaded.
        new_head: a last layer that the checkpoint has for other classes starts fresh.

    Raises:
        UnknownNameError: there is no such network; the message names the nearest.
        MissingDependencyError: timm is not installed.
        ModelError: the factory refuses the arguments, fails, or returns no nn.Module.
        CheckpointError: the weights cannot be read or do not fit.
    """
    if checkpoint is not None and not Path(checkpoint).expanduser().exists():
        # Before the network is built: a wrong path should not cost a minute.
        raise CheckpointError(f"no checkpoint at {checkpoint}: check model.checkpoint")
    factory, fixed = _factory(name)
    given = {**fixed, **(arguments or {})}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # torchvision and timm warn about their own defaults
        net = userfile.call(factory, name, given, ModelError)
    from torch import nn

    if not isinstance(net, nn.Module):
        raise ModelError(
            f"{name} returned {type(net).__name__}, expected a torch.nn.Module: "
            "the factory must return the network itself"
        )
    if checkpoint is not None:
        from bevel.models.checkpoint import load_checkpoint

        load_checkpoint(net, Path(checkpoint), new_head=new_head)
    return net.eval()


def _factory(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function that builds a network of that name, and the arguments that keep it offline."""
    if userfile.is_user_function(name):
        return userfile.load_function(name, ModelError), {}
    source, colon, short = name.partition(":")
    if colon and source == "bevel":
        return _bevel(short), {}
    if colon and source == "torchvision":
        return _torchvision(short)
    if colon and source == "timm":
        return _timm(short)
    if colon and not any(mark in source for mark in "/\\."):
        raise UnknownNameError(
            f"no model source '{source}' in '{name}'. {suggestion(source, SOURCES)}"
        )
    own = [f"bevel:{known}" for known in BUILTIN]
    nearest = suggestion(f"bevel:{name}", own)
    raise UnknownNameError(
        f"no model called '{name}'. {nearest} Also torchvision:NAME, timm:NAME, "
        "path/to/file.py:factory."
    )


def _bevel(short: str) -> Callable[..., Any]:
    if short not in BUILTIN:
        raise UnknownNameError(f"no model 'bevel:{short}'. {suggestion(short, BUILTIN)}")
    module = importlib.import_module(f"bevel.models.{BUILTIN[short][0]}")
    return getattr(module, short)  # type: ignore[no-any-return]


def _torchvision(short: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    import inspect

    from torchvision import models

    known: list[str] = models.list_models()
    if short not in known:
        raise UnknownNameError(f"no model 'torchvision:{short}'. {suggestion(short, known)}")
    builder: Callable[..., Any] = models.get_model_builder(short)
    parameters = inspect.signature(builder).parameters
    offline = {"weights": None, "weights_backbone": None}
    return builder, {key: value for key, value in offline.items() if key in parameters}


def _timm(short: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    timm = _import_timm()
    known: list[str] = timm.list_models()
    if short.partition(".")[0] not in known:
        raise UnknownNameError(f"no model 'timm:{short}'. {suggestion(short, known)}")

    def create(**arguments: Any) -> Any:
        return timm.create_model(short, **arguments)

    return create, {"pretrained": False}


def _import_timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise MissingDependencyError(
            "timm models need the package 'timm', which is not installed: pip install 'bevel[timm]'"
        ) from error
