"""Carry out a pruning plan, and store the result without pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bevel.core.errors import CheckpointError, ExportError, PruningError, one_line
from bevel.core.files import atomic
from bevel.core.garbage import without_collection
from bevel.graph.attributes import get_integer, resize, set_integer
from bevel.graph.copying import copy_with, like, tensors_of
from bevel.graph.naming import named_modules
from bevel.graph.program import export_program
from bevel.graph.record import ExampleInputs, as_arguments, as_keywords
from bevel.pruning.plan import PruningPlan, TensorCut, indices
from bevel.rewriting.log import SurgeryLog, replay

PIECE = 1 << 17
"""Elements of a tensor that are cut in one go: they stay in the processor's cache."""


@without_collection()
def prune(net: nn.Module, plan: PruningPlan, *, inplace: bool = False) -> nn.Module:
    """The network without what the plan removes.

    The result is made of the same module classes: parameters and buffers are sliced and the
    modules' size attributes follow, so it trains, saves and exports as the original does.

    Args:
        net: the network that the plan was made for.
        plan: which indices stay.
        inplace: shrink `net` itself and return it; else it is unchanged and the result is new.
            Parameters stay the same objects and lose their gradients. No two networks are in
            memory at once, and what one tensor gives up, the next can use, so it is quicker.

    Raises:
        PruningError: the plan does not fit the network (unknown tensor, other shape, index out of
            range), which is then as it was.
    """
    tensors = tensors_of(net)
    _check(named_modules(net), tensors, plan)
    if inplace:
        _shrink(tensors, plan)
        pruned = net
    else:
        pruned = copy_with(net, _sliced(tensors, plan))
    for name, module in named_modules(pruned).items():
        for attribute, value in plan.attributes.get(name, {}).items():
            set_integer(module, attribute, value)
        resize(module)
    return pruned


def _sliced(tensors: Mapping[str, Tensor], plan: PruningPlan) -> dict[int, Tensor]:
    """`id(tensor)` -> what stays of it; a shared tensor is cut once, under any of its names."""
    positions = cache(_positions)  # many tensors of a plan share their runs
    return {
        id(tensor): like(tensor, cut_tensor(tensor.detach(), plan.tensors[name], positions))
        for name, tensor in tensors.items()
        if name in plan.tensors
    }


def _shrink(tensors: Mapping[str, Tensor], plan: PruningPlan) -> None:
    """Give each tensor what stays of it, once, whatever its names."""
    positions = cache(_positions)
    named = {id(tensors[name]): name for name in plan.tensors}
    for name in named.values():
        tensor = tensors[name]
        tensor.grad = None
        tensor.data = cut_tensor(tensor.detach(), plan.tensors[name], positions)


def _positions(runs: str, device: torch.device) -> Tensor:
    return torch.tensor(indices(runs), device=device)


def cut_tensor(
    tensor: Tensor, cut: TensorCut, positions: Callable[[str, torch.device], Tensor] = _positions
) -> Tensor:
    """A contiguous copy of what stays of a tensor."""
    original = tensor
    kept = {}
    for dim, runs in cut.keep.items():
        if isinstance(runs, str):
            kept[dim] = positions(runs, tensor.device)
        else:  # blocks of dimension 0 are cut before dimension 0
            parts = [
                part.index_select(dim, positions(block, tensor.device))
                for part, block in zip(tensor.chunk(len(runs)), runs, strict=True)
            ]
            tensor = torch.cat(parts)
    step = max(PIECE // max(tensor[:1].numel(), 1), 1)
    if 0 in kept and len(kept) > 1 and len(kept[0]) > step:
        return _cut_in_pieces(tensor, kept, step)
    for dim in sorted(kept):
        tensor = tensor.index_select(dim, kept[dim])
    return tensor.clone() if tensor is original else tensor.contiguous()


def _cut_in_pieces(tensor: Tensor, kept: Mapping[int, Tensor], step: int) -> Tensor:
    """Dimension 0 and others cut `step` rows at a time, so that nothing is written out twice."""
    new = tensor.new_empty([len(kept.get(d, range(n))) for d, n in enumerate(tensor.shape)])
    *between, last = sorted(kept.keys() - {0})
    for rows, part in zip(kept[0].split(step), new.split(step), strict=True):
        piece = tensor.index_select(0, rows)
        for dim in between:
            piece = piece.index_select(dim, kept[dim])
        torch.index_select(piece, last, kept[last], out=part)
    return new


def _check(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], plan: PruningPlan
) -> None:
    """Every cut names a tensor of the stated shape and keeps at least one index within it."""
    counts: dict[tuple[str, int], int] = {}  # many tensors of a plan share their runs
    for name, cut in plan.tensors.items():
        if name not in tensors:
            raise PruningError(
                f"the plan cuts '{name}', which this network does not have: "
                "it is another network's plan"
            )
        shape = list(tensors[name].shape)
        if shape != cut.shape:
            raise PruningError(
                f"the plan was made for '{name}' of shape {cut.shape}, got {shape}: "
                "it is another network's plan, or the network is already pruned"
            )
        for dim, runs in cut.keep.items():
            if not 0 <= dim < len(shape):
                raise PruningError(
                    f"the plan cuts dimension {dim} of '{name}', which has {len(shape)}"
                )
            blocks = runs if isinstance(runs, list) else [runs]
            for block in blocks:
                if (block, shape[dim]) not in counts:
                    counts[block, shape[dim]] = _count(name, dim, block, shape[dim])
            kept = {counts[block, shape[dim]] for block in blocks}
            if 0 in kept:
                raise PruningError(f"the plan keeps nothing of dimension {dim} of '{name}'")
            if len(kept) != 1:
                raise PruningError(
                    f"the plan keeps unequal numbers in the blocks of dimension {dim} of '{name}'"
                )
            if isinstance(runs, list) and (shape[0] % len(runs) or dim == 0):
                raise PruningError(
                    f"the plan cuts '{name}' into {len(runs)} blocks, which do not divide it"
                )
    for name, attributes in plan.attributes.items():
        for attribute, value in attributes.items():
            if name not in modules or get_integer(modules[name], attribute) is None:
                raise PruningError(
                    f"the plan sets {name}.{attribute}, which this network does not have"
                )
            if value < 0:
                raise PruningError(
                    f"the plan sets {name}.{attribute} to {value}, expected 0 or more"
                )


def _count(name: str, dim: int, runs: str, size: int) -> int:
    """How many indices the runs keep of a dimension.

    Raises:
        PruningError: they are no ascending runs of indices below `size`.
    """
    # Before the runs are written out: a run of 10**12 would fill the memory. Of ascending runs, the
    # last number is the largest, and `indices` refuses others before it writes them out.
    last = re.search(r"\d+$", runs)
    for number in re.findall(r"\d+", runs) if last is None or _beyond(last[0], size) else ():
        if _beyond(number, size):
            raise PruningError(
                f"the plan keeps index {one_line(number, 20)} of dimension {dim} of '{name}', "
                f"which is out of range: the dimension has {size}"
            )
    try:
        return len(indices(runs))
    except PruningError as error:
        raise PruningError(f"dimension {dim} of '{name}' in the plan: {error}") from error


def _beyond(number: str, size: int) -> bool:
    return len(number) > 18 or int(number) >= size


_DIRECTIONS = ("weight_v", "parametrizations.weight.original1")
"""Parameters of weight normalisation that are divided by their norm: a filter of zeros would be
0 / 0. Its length, another parameter, is set to zero, which makes the same filter."""


def mask(net: nn.Module, plan: PruningPlan) -> nn.Module:
    """The original network with the plan's slices set to zero: what the pruned one must equal."""
    masked = copy_with(net, {})
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for name, cut in plan.tensors.items():
            parameter = parameters.get(name)
            if parameter is None:  # statistics of a removed channel no longer matter
                continue
            for dim, runs in cut.keep.items():
                if dim == 0 and name.endswith(_DIRECTIONS):
                    continue
                blocks = runs if isinstance(runs, list) else [runs]
                parts = parameter.chunk(len(blocks)) if isinstance(runs, list) else (parameter,)
                for part, block in zip(parts, blocks, strict=True):
                    gone = np.setdiff1d(np.arange(cut.shape[dim]), indices(block))
                    part.index_fill_(dim, torch.from_numpy(gone), 0)
    return masked


def save_pruned(
    pruned: nn.Module,
    plan: PruningPlan,
    path: Path | str,
    *,
    model: dict[str, Any] | None = None,
    surgery: SurgeryLog | None = None,
    program: bool = False,
    example_inputs: ExampleInputs | None = None,
) -> None:
    """Write weights and plan as one safetensors file, and a program beside it if asked.

    A program, `NAME.pt2` beside `NAME.safetensors`, is what `torch.export` traces of the network
    in eval mode, weights included: `torch.export.load(path).module()` runs it in a process that
    does not have the network's code. It takes batches of any size where that is possible, else
    one image. Loading a program unpickles part of it, so `torch.export.load` is to be used only
    on files that one trusts; `load_pruned` never runs what a file holds.

    Args:
        pruned: the pruned network, trained further or not.
        plan: the plan on the original network, or on what surgery made of it.
        path: a `.safetensors` file; it appears whole or not at all, as the program does.
        model: how to build the original (`name`, `arguments`, `input_shape`), so that the file
            can be loaded by itself.
        surgery: what was done to the original before the plan.
        program: write the program as well.
        example_inputs: what the program is traced with: a tensor, or the forward's positional
            arguments, all tensors with the batch first.

    Raises:
        ExportError: a program cannot be made of this network or these inputs; nothing is written.
    """
    path = Path(path)
    exported = export_program(pruned, _tensors(example_inputs)) if program else None
    tensors = {name: tensor.contiguous() for name, tensor in _unshared(pruned).items()}
    content = {"plan": plan.model_dump(mode="json"), "model": model}
    if surgery is not None and surgery.actions:
        content["surgery"] = surgery.model_dump(mode="json")
    metadata = json.dumps(content)
    if exported is not None:
        with atomic(program_path(path)) as temporary:
            torch.export.save(exported, temporary)
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"bevel": metadata})


def program_path(path: Path) -> Path:
    """Where `save_pruned` writes the program of a network that it saves at `path`."""
    return path.with_suffix(".pt2")


def _tensors(example_inputs: ExampleInputs | None) -> tuple[Tensor, ...]:
    """The positional arguments, of which `torch.export` needs each to be a tensor here."""
    given = () if example_inputs is None else as_arguments(example_inputs)
    keywords = example_inputs is not None and as_keywords(example_inputs)
    if keywords or not given or not all(isinstance(value, Tensor) for value in given):
        raise ExportError(
            "a program is traced with tensors: pass example_inputs, a tensor or a tuple of the "
            "forward's positional arguments"
        )
    return given


def load_pruned(factory: Callable[[], nn.Module], path: Path | str) -> nn.Module:
    """Build the original network, replay surgery and plan, and load the weights; eval mode.

    Raises:
        CheckpointError: the file is missing, damaged, or was not written by `save_pruned`, or its
            weights are another network's.
        SurgeryError: the surgery does not fit what the factory builds.
        PruningError: the plan is malformed, or does not fit what the factory builds.
    """
    plan, _ = read_metadata(path)
    pruned = prune(replay(factory(), read_surgery(path)), plan)
    with safe_open(Path(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = pruned.state_dict()
    absent = set(_unshared(pruned)) - set(tensors)
    unexpected = set(tensors) - set(expected)
    if absent or unexpected:
        name = sorted([*absent, *unexpected])[0]
        raise CheckpointError(f"{path} does not hold the weights of this network: '{name}' differs")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path} does not hold the weights of this network: '{name}' has shape "
                f"{list(tensor.shape)}, expected {list(expected[name].shape)}"
            )
    pruned.load_state_dict(tensors, strict=False)
    return pruned.eval()


def read_metadata(path: Path | str) -> tuple[PruningPlan, dict[str, Any] | None]:
    """The plan and the model description of a file written by `save_pruned`.

    Raises:
        CheckpointError: the file is missing, damaged, or was not written by `save_pruned`.
        PruningError: the plan in it is malformed.
    """
    try:
        content = json.loads(_metadata(path))
        plan, model = content["plan"], content["model"]
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(
            f"{path} has a damaged record of its pruning plan: {one_line(error)}"
        ) from error
    if not isinstance(model, dict | None):
        raise CheckpointError(f"{path} has a damaged record of its model: {one_line(model, 60)}")
    return PruningPlan.parse(json.dumps(plan), str(path)), model


def read_surgery(path: Path | str) -> SurgeryLog:
    """What was done to the original before the plan; an empty log where there was no surgery.

    Raises:
        CheckpointError: as `read_metadata`, or the log is malformed.
    """
    try:
        return SurgeryLog.model_validate(json.loads(_metadata(path)).get("surgery") or {})
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has a damaged record of its surgery: {one_line(error, 120)}"
        ) from error


def _metadata(path: Path | str) -> str:
    """bevel's record in a safetensors file."""
    try:
        with safe_open(Path(path), framework="pt") as file:
            text: str | None = (file.metadata() or {}).get("bevel")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {one_line(error)}") from error
    if text is None:
        raise CheckpointError(f"{path} holds weights but no pruning plan: bevel did not write it")
    return text


def _unshared(net: nn.Module) -> dict[str, Tensor]:
    """The state dict with each shared tensor once, under its first name."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in net.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors
