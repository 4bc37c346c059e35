"""Blocks of several branches that add up to one convolution (RepVGG, MobileOne) -> that; exact.

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from bevel.rewriting.log import Method
from bevel.rewriting.rule import Place
from bevel.rewriting.seen import Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True
DONE = ("reparam_conv", "rbr_reparam")
"""What a block has when it is one convolution."""


def match(seen: Seen) -> Iterator[str]:
    """Modules with a method for it: timm's name, and that of RepVGG's authors."""
    for name, module in seen.modules.items():
        if name and _method(module) is not None:
            yield name


def check(seen: Seen, place: Place) -> str | None:
    """Why a place cannot be rewritten."""
    module = seen.modules[str(place)]
    if any(getattr(module, done, None) is not None for done in DONE):
        return "it is one convolution already"
    return None


def rewrite(surgeon: Surgeon, place: Place) -> None:
    """Have the block do it."""
    method = _method(surgeon.net.get_submodule(str(place)))
    assert method is not None  # noqa: S101  # `match` saw it
    surgeon.reparametrize(str(place), method)


def _method(module: Any) -> Method | None:
    return next((name for name in get_args(Method) if callable(getattr(module, name, None))), None)
