"""Squeeze and excite, x * gate(x) -> the mean gate, folded into the layers that read it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bevel.rewriting.activations import PRODUCTS
from bevel.rewriting.fitting import Error, by_channel, relative_error
from bevel.rewriting.seen import Node, Ref, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = False
SPATIAL = 4
"""Axes of the tensors that are gated: images, channels, height, width."""


def match(seen: Seen) -> Iterator[Node]:
    """Products of a tensor (N, C, H, W) and one (N, C, 1, 1) that is computed from it alone."""
    for node in seen.calls(PRODUCTS):
        if len(node.inputs) == 2 and _branch(seen, node) is not None:
            yield node


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    x, _, branch = _parts(seen, node)
    own = {part.number for part in branch} | {node.number}
    for part in branch:
        for ref in part.outputs:
            if ref in seen.outputs or any(r.number not in own for r in seen.readers(ref)):
                return "something else reads the gate or what it is made of"
        if part.module and seen.runs(part.module) != 1 and part.module != node.module:
            return f"{part.module} runs several times"
    if seen.runs(node.module) != 1:
        return "its module runs several times"
    if node.overwrites and len(seen.readers(x)) > len(branch) + 1:
        return "it overwrites what others read"
    return None


def rewrite(surgeon: Surgeon, node: Node) -> Error:
    """Scale each channel by the one number that comes closest, sum of g x^2 over sum of x^2."""
    seen = surgeon.seen
    _, position, branch = _parts(seen, node)
    given = surgeon.samples[node.number]
    values, gate = given[position], given[1 - position]
    squares = values.double().square().sum((0, 2))
    scale = (gate.double() * values.double().square()).sum((0, 2)) / squares.clamp(min=1e-12)
    scale = torch.where(squares > 1e-12, scale, gate.double().mean((0, 2))).float()
    if not surgeon.fit:
        scale = torch.ones_like(scale)
    wanted = by_channel(values * gate)
    plain = by_channel(values)
    error = Error(relative_error(plain, wanted), relative_error(scale[:, None] * plain, wanted))
    whole = _whole_module(seen, node, branch)
    readers = surgeon.readers(node.outputs[0])
    kept = "Identity" if readers is not None else "ChannelScale"
    arguments = {} if readers is not None else {"channels": len(scale)}
    if readers is not None:
        surgeon.scale_input(readers, scale)
    if whole is not None:
        surgeon.replace(whole, kept, **arguments)
        target = whole
    else:
        target = f"{node.module}.gate_mean".lstrip(".")
        if readers is None:
            surgeon.replace(target, kept, **arguments)
            _remove(surgeon, node, branch)
            surgeon.divert(
                node, "module:gate_mean" if position == 0 else "module of second:gate_mean"
            )
        else:
            _remove(surgeon, node, branch)
            surgeon.divert(node, "first" if position == 0 else "second")
    if readers is None:
        weight = surgeon.net.get_submodule(target).weight
        assert isinstance(weight, Tensor)  # noqa: S101  # a ChannelScale's
        with torch.no_grad():
            weight.copy_(scale)
    return error


def _parts(seen: Seen, node: Node) -> tuple[Ref, int, list[Node]]:
    found = _branch(seen, node)
    assert found is not None  # noqa: S101  # `match` saw it
    return found


def _branch(seen: Seen, node: Node) -> tuple[Ref, int, list[Node]] | None:
    """What is gated, its position among the factors, and the calls that make the gate."""
    for position in (0, 1):
        x, gate = node.inputs[position], node.inputs[1 - position]
        maker = seen.maker(gate)
        if maker is None or len(node.shape) != SPATIAL or not _is_gate(maker, node.shape):
            continue
        branch: dict[int, Node] = {}
        if _made_of(seen, maker, x, branch) and len(branch) > 1:
            return x, position, [branch[number] for number in sorted(branch)]
    return None


def _is_gate(maker: Node, shape: tuple[int, ...]) -> bool:
    made = maker.shape
    return len(made) == SPATIAL and made[1] == shape[1] and made[2:] == (1, 1) != shape[2:]


def _made_of(seen: Seen, node: Node, x: Ref, branch: dict[int, Node]) -> bool:
    """Whether a call's result depends on x and parameters alone; `branch` takes the calls."""
    if node.number in branch:
        return True
    branch[node.number] = node
    depends = False
    for ref in node.inputs:
        if ref == x:
            depends = True
            continue
        maker = seen.maker(ref)
        if maker is None:
            continue  # a parameter, a buffer or a constant; inputs are no parts of a gate
        if maker.number > node.number or not _made_of(seen, maker, x, branch):
            return False
        depends = True
    return depends and len(branch) < LONGEST


LONGEST = 24
"""Most calls that make a gate; more are a branch of the network and no gate."""


def _whole_module(seen: Seen, node: Node, branch: list[Node]) -> str | None:
    """The module that does all of it and nothing else."""
    own = {part.number for part in branch} | {node.number}
    module = node.module
    if not module or {part.number for part in seen.inside(module)} != own:
        return None
    return module


def _remove(surgeon: Surgeon, node: Node, branch: list[Node]) -> None:
    """Nothing of the gate is computed any more, and its layers are gone."""
    own = {part.number for part in branch}
    gone: list[str] = []
    for part in branch:
        if part.module == node.module:
            surgeon.divert(part, "first")
            continue
        child = part.module[len(node.module) :].lstrip(".").split(".")[0]
        path = f"{node.module}.{child}".lstrip(".")
        inside = {other.number for other in surgeon.seen.inside(path)}
        if path not in gone and inside <= own:
            surgeon.replace(path, "Identity")
            gone.append(path)
