"""Focus, four shifted halves joined + convolution of size k -> one of size 2 k, stride 2; exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = True


def match(seen: Seen) -> Iterator[Node]:
    """Concats along channels of four slices of one tensor that take every second pixel."""
    for node in seen.calls([torch.cat, torch.concat]):
        if _shifts(seen, node) is not None:
            yield node


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    readers = seen.readers(node.outputs[0])
    if len(readers) != 1 or node.outputs[0] in seen.outputs:
        return "more than one layer reads the joined slices"
    conv = seen.modules.get(readers[0].module)
    if not isinstance(conv, nn.Conv2d) or seen.owner_of_weight(readers[0]) is None:
        return "no nn.Conv2d of its own reads the joined slices"
    plain = conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    if not plain or isinstance(conv.padding, str) or not seen.are_whole(readers):
        return "the convolution is grouped, dilated, or pads with other than a number of zeros"
    slices = [seen.maker(ref) for ref in node.inputs]
    if any(s is None or s.module != node.module or len(seen.readers(r)) != 1
           for s, r in zip(slices, node.inputs, strict=True)):  # fmt: skip
        return "something else reads a slice"
    return None


def rewrite(surgeon: Surgeon, node: Node) -> None:
    """Move the slices into the convolution's kernel."""
    seen = surgeon.seen
    shifts = _shifts(seen, node)
    reader = seen.readers(node.outputs[0])[0]
    conv = seen.modules[reader.module]
    assert shifts is not None  # noqa: S101  # `match` saw them
    assert isinstance(conv, nn.Conv2d)  # noqa: S101  # `check` saw that
    joined = conv.weight.detach()
    outputs, count = joined.shape[0], joined.shape[1] // 4
    kernel = joined.new_zeros(outputs, count, 2 * joined.shape[2], 2 * joined.shape[3])
    for part, (down, right) in enumerate(shifts):
        piece = joined[:, part * count : (part + 1) * count]
        kernel[:, :, down::2, right::2] = piece
    surgeon.put_convolution(
        reader.module,
        kernel,
        stride=[2 * step for step in conv.stride],
        padding=[2 * int(pad) for pad in conv.padding],
    )
    for ref in node.inputs:
        taken = seen.maker(ref)
        assert taken is not None  # noqa: S101  # `check` saw them
        surgeon.divert(taken, "first")
    surgeon.divert(node, "first of them")


def _shifts(seen: Seen, node: Node) -> list[tuple[int, int]] | None:
    """(down, right) of each slice; None where it is no such concat."""
    axis = node.frame.argument(1, "dim")
    if axis not in (1, -3) or len(node.inputs) != 4:
        return None
    found, sources = [], set()
    for ref in node.inputs:
        taken = seen.maker(ref)
        if taken is None or taken.function is not Tensor.__getitem__:
            return None
        index = taken.frame.arguments[1]
        steps = index if isinstance(index, tuple) else (index,)
        starts = [_start(step) for step in steps[-2:]]
        rest = steps[:-2]
        if any(start is None for start in starts) or not all(map(_everything, rest)):
            return None
        if len(steps) < 2 or (Ellipsis not in rest and len(rest) != 2):
            return None
        found.append((int(starts[0] or 0), int(starts[1] or 0)))
        sources.add(taken.inputs[0])
    complete = sorted(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    return found if complete and len(sources) == 1 else None


def _start(step: Any) -> int | None:
    """Where a slice of every second element starts, 0 or 1."""
    if not isinstance(step, slice) or step.step != 2 or step.stop is not None:
        return None
    return step.start if step.start in (0, 1) else 0 if step.start is None else None


def _everything(step: Any) -> bool:
    return step is Ellipsis or step == slice(None)
