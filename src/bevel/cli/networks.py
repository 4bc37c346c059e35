"""Networks and data as the command line names them: a model's name or a file, a recipe's data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from bevel.core import recipe as recipes
from bevel.core.errors import BevelError, CheckpointError, ModelError, RecipeError, one_line
from bevel.core.recipe import Recipe, Target
from bevel.core.userfile import is_user_function

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bevel.data import Data
    from bevel.pruning.plan import PruningPlan
    from bevel.rewriting.apply import Lite
    from bevel.rewriting.log import SurgeryLog

SUFFIX = ".safetensors"
COMMAND_LINE = "command-line"
"""The name of a recipe that is made of options: only its data was given."""


@dataclass(frozen=True)
class Network:
    """A network with what it takes to build it again: `plan` is None for an unpruned one."""

    net: nn.Module
    name: str
    arguments: dict[str, Any]
    input_shape: tuple[int, ...]
    plan: PruningPlan | None
    surgery: SurgeryLog | None = None

    def example(self) -> torch.Tensor:
        """An input of the network's shape; the same one at every call."""
        import torch

        return torch.randn(self.input_shape, generator=torch.Generator().manual_seed(0))

    def description(self) -> dict[str, Any]:
        """What `save_pruned` stores, so that the file can be loaded by itself."""
        return {
            "name": self.name,
            "arguments": self.arguments,
            "input_shape": list(self.input_shape),
        }

    def original(self, checkpoint: Path | None) -> nn.Module:
        """The unpruned network with the weights of a checkpoint."""
        from bevel.models import build

        return build(self.name, self.arguments, checkpoint)


def open_network(
    model: str,
    *,
    factory: str | None = None,
    arguments: Sequence[str] | None = None,
    checkpoint: Path | None = None,
    input_shape: str | None = None,
) -> Network:
    """The network that a command was given.

    Args:
        model: a model's name as in a recipe, or a file that `bevel prune` wrote.
        factory: for a file: the model's name, over the one that the file states.
        arguments: `key=value` of the factory.
        checkpoint: weights for a model given by name.
        input_shape: such as `1x3x32x32`; a file states its own.

    Raises:
        BevelError: the network cannot be built, or its input shape is not known.
    """
    shape = parse_shape(input_shape) if input_shape else None
    if model.endswith(SUFFIX):
        if checkpoint is not None:
            raise CheckpointError(f"{model} has its own weights; leave out --checkpoint")
        return _from_file(Path(model), factory, parse_arguments(arguments), shape)
    if shape is None:
        raise ModelError(f"what does {model} take? Give --input, such as --input 1x3x32x32")
    from bevel.models import build

    given = parse_arguments(arguments)
    return Network(build(model, given, checkpoint), model, given, shape, None)


def _from_file(
    path: Path, factory: str | None, arguments: dict[str, Any], shape: tuple[int, ...] | None
) -> Network:
    """A pruned network from its file, built as the file says where the caller does not."""
    from bevel.models import build
    from bevel.pruning.apply import load_pruned, read_metadata, read_surgery

    plan, stated = read_metadata(path)
    stated = stated or {}
    name = factory or stated.get("name")
    if not isinstance(name, str):
        raise CheckpointError(f"{path} does not say which network it is of; give --model NAME")
    if factory is None and is_user_function(name):
        # A file must not choose which code runs: only the person at the keyboard does.
        raise CheckpointError(
            f"{path} is of '{name}', which is code; if you trust it, give --model '{name}'"
        )
    given = arguments or dict(stated.get("arguments") or {})
    shape = shape or tuple(stated.get("input_shape") or ())
    if not shape:
        raise ModelError(f"{path} does not state its input's shape; give --input 1x3x32x32")
    net = load_pruned(lambda: build(name, given), path)
    return Network(net, name, given, shape, plan, read_surgery(path))


def parse_shape(text: str) -> tuple[int, ...]:
    """`1x3x32x32` as numbers.

    Raises:
        ModelError: it is not a shape.
    """
    parts = text.lower().split("x")
    if len(parts) < 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ModelError(f"--input {text}: expected sizes joined by x, such as 1x3x32x32")
    return tuple(int(part) for part in parts)


def parse_arguments(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`key=value` pairs as keyword arguments; values are YAML.

    Raises:
        ModelError: a pair is not of that form.
    """
    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ModelError(f"--arg {pair}: expected NAME=VALUE, such as num_classes=3")
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ModelError(f"--arg {pair}: not a value: {one_line(error, 120)}") from error
    return found


def parse_target(text: str | None) -> Target | None:
    """`onnxruntime:int8@local` as a recipe's target.

    Raises:
        RecipeError: it is none.
    """
    if text is None:
        return None
    what, _, device = text.partition("@")
    runtime, _, precision = what.partition(":")
    given = {"runtime": runtime, "precision": precision or "float32", "device": device or "local"}
    try:
        return Target.model_validate(given)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        raise RecipeError(
            f"--target {text}: {message}; expected RUNTIME:PRECISION@DEVICE, such as "
            "onnxruntime:int8@local"
        ) from error


def parse_budget(
    pairs: Sequence[str] | None, shares: Mapping[str, str | None]
) -> dict[str, str] | None:
    """`NAME=LIMIT` pairs and the options of their own, as a recipe's budget; None without any.

    Raises:
        RecipeError: a pair is not of that form, or a limit is given twice.
    """
    found = {name: value for name, value in shares.items() if value is not None}
    for pair in pairs or ():
        name, equals, limit = (part.strip() for part in pair.partition("="))
        if not equals or not limit:
            raise RecipeError(f"--budget {pair}: expected NAME=LIMIT, such as latency_ms=40%")
        if name in found:
            raise RecipeError(f"--budget {pair}: {name} is limited to {found[name]} already")
        found[name] = limit
    return found or None


def parse_ratios(pairs: Sequence[str] | None) -> dict[str, str] | None:
    """`GLOB=SHARE` pairs as a recipe's ratios; None without any.

    Raises:
        RecipeError: a pair is not of that form.
    """
    found = {}
    for pair in pairs or ():
        glob, equals, share = pair.rpartition("=")
        if not equals or not glob:
            raise RecipeError(f"--ratios {pair}: expected GLOB=SHARE, such as layer1.*=0.25")
        found[glob] = share
    return found or None


def read_recipe(
    path: Path | None,
    overrides: Sequence[str] | None,
    *,
    data: str | None = None,
    root: Path | None = None,
) -> Recipe | None:
    """The recipe whose data a command uses, or one made of --data and --root; None for neither.

    Raises:
        RecipeError: both are given, or the recipe does not validate.
    """
    if path is not None:
        if data is not None or root is not None:
            raise RecipeError("give either --recipe or --data and --root, not both")
        return recipes.load(path, tuple(overrides or ()))
    if overrides:
        raise RecipeError("--set changes a recipe; give it with --recipe")
    if data is None:
        if root is not None:
            raise RecipeError(f"--root {root} of which data? Add --data imagefolder, for instance")
        return None
    section = {"name": data} | ({"root": str(root)} if root is not None else {})
    return recipes.validate(
        {
            "version": 1,
            "name": COMMAND_LINE,
            "model": {"name": "given"},
            "data": section,
            "steps": [{"prune": {"ratio": 0.5}}],
            "targets": [{}],
        },
        source="--data",
    )


def fitting_data(source: Recipe, network: Network) -> Data:
    """The recipe's data, checked against the network before anything is computed.

    What was pruned after a resize step gets images of its own size.

    Raises:
        BevelError: the data cannot be read, or the network does not fit it.
    """
    from bevel.data import check_classes, load

    data = load(source.data_for(network.input_shape[-1]), seed=source.seed)
    check_classes(network.net, data)
    return data


def check_output(path: Path, suffix: str | None = None) -> None:
    """Refuse an output that cannot be written before the work is done rather than after.

    Raises:
        BevelError: it has the wrong suffix, is a folder, or its folder takes no files.
    """
    if suffix is not None and path.suffix != suffix:
        raise BevelError(f"--out {path}: expected a name that ends in {suffix}")
    if path.is_dir():
        raise BevelError(f"--out {path} is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise BevelError(f"--out {path}: the folder {path.parent} cannot be written to")


def save_lite(network: Network, lite: Lite, out: Path) -> None:
    """Write what surgery made of a network, on top of the surgery that it had."""
    from bevel.graph.couplings import analyze
    from bevel.pruning.apply import save_pruned
    from bevel.pruning.plan import make_plan
    from bevel.rewriting.log import SurgeryLog

    before = network.surgery.actions if network.surgery is not None else []
    save_pruned(
        lite.net,
        make_plan(analyze(lite.net, network.example()), {}),
        out,
        model=network.description(),
        surgery=SurgeryLog(actions=[*before, *lite.log.actions]),
    )
