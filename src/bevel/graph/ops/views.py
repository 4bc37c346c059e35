"""Views: the same elements in the same order, with axes split and merged.

`(N, C, H, W) -> (N, heads, C / heads, H W)`: a split axis keeps its layer, which now shrinks the
innermost part, and gains node layers for the outer parts; merged axes become one, whose ids are
those of its innermost part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from bevel.graph.layers import Layer, compact, settle
from bevel.graph.propagate import Blocks, Handler, Propagation
from bevel.graph.recording import Call

MOST_LAYERS = 4
"""Independent axes that a merged one may stand for: the kernel of a 2-d convolution has four."""


def view(state: Propagation, call: Call) -> None:
    """Any operator that keeps the order of elements: the output's shape says all."""
    source = call.inputs[0]
    output = call.output
    layers = list(state.of(source))
    state.set(output, reshape(state, call.place, layers, source.shape, output.shape))


def reshape(
    state: Propagation,
    place: str,
    layers: Sequence[Layer],
    before: tuple[int, ...],
    after: tuple[int, ...],
) -> list[Layer]:
    """Layers of a tensor of shape `before` seen as `after`: merge first, then split."""
    if before == after or not layers:
        return list(layers)
    parts = list(_parts(before, after))
    flat = tuple(math.prod(before[i] for i in inner) for inner, _ in parts)
    merged: list[Layer] = list(layers)
    if any(len(inner) != 1 for inner, _ in parts):
        merged = _merge(state, place, merged, [inner for inner, _ in parts], flat)
    if any(len(outer) != 1 for _, outer in parts):
        merged = _split(state, place, merged, [outer for _, outer in parts], after)
    return merged


def _parts(
    before: tuple[int, ...], after: tuple[int, ...]
) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions of both shapes that hold equally many elements."""
    i = j = 0
    while i < len(before) or j < len(after):
        inner: list[int] = []
        outer: list[int] = []
        left = right = 1
        while True:
            if i < len(before) and (not inner or left < right):
                inner.append(i)
                left *= before[i]
                i += 1
            elif j < len(after) and (not outer or right < left):
                outer.append(j)
                right *= after[j]
                j += 1
            else:
                break
        # Trailing dimensions of length 1 belong to the last run.
        if i < len(before) and j >= len(after):
            inner += range(i, len(before))
            i = len(before)
        if j < len(after) and i >= len(before):
            outer += range(j, len(after))
            j = len(after)
        yield inner, outer


def _merge(
    state: Propagation,
    place: str,
    layers: Sequence[Layer],
    parts: Sequence[Sequence[int]],
    shape: tuple[int, ...],
) -> list[Layer]:
    """Every run of dimensions becomes one."""
    target = {dim: position for position, part in enumerate(parts) for dim in part}
    found: list[tuple[Layer, Layer]] = []
    for layer in layers:
        part = parts[target[layer.dim]]
        # The last dimension varies fastest: an inner index that goes must go all along it.
        for dim in layer.dims:
            if dim in part and dim > layer.dim:
                state.tie_over(layer, dim, f"its layout is not by channel: {place}")
        moved = layer.moved(_runs_merged(layer, parts, shape), target[layer.dim])
        found.append((layer, moved))
    merged = [
        new
        for old, new in found
        if not any(_inside(old, other, parts[new.dim]) for other, _ in found if other is not old)
        and not _superseded(state, new, found, place)
    ]
    crowded = {
        layer.dim for layer in merged if sum(x.dim == layer.dim for x in merged) > MOST_LAYERS
    }
    for layer in merged:
        if layer.dim in crowded:
            state.freeze_layer(layer, f"many axes merged into one: {place}")
    return [layer for layer in merged if layer.dim not in crowded]


def _runs_merged(layer: Layer, parts: Sequence[Sequence[int]], shape: tuple[int, ...]) -> Tensor:
    """The ids with runs merged; only runs along which they vary are copied."""
    kept: set[int] = set()
    sizes = []
    for size, part in zip(shape, parts, strict=True):
        varies = not set(part).isdisjoint(layer.dims)
        sizes.append(size if varies else 1)
        kept |= set(part) if varies else set()
    return compact(layer.ids, kept).reshape(sizes).expand(shape)


def _runs_split(layer: Layer, parts: Sequence[Sequence[int]], shape: tuple[int, ...]) -> Tensor:
    """The ids with dimensions split into runs; repeated ids are found constant again."""
    sizes = [1] * len(shape)
    for dim in layer.dims:
        for outer in parts[dim]:
            sizes[outer] = shape[outer]
    return settle(layer.compact().reshape(sizes)).expand(shape)


def _inside(node: Layer, leaf: Layer, part: Sequence[int]) -> bool:
    """Whether a layer is implied by another of the same run, whose ids lie within its nodes."""
    own, other = set(node.dims) & set(part), set(leaf.dims) & set(part)
    return leaf.dim in part and node.dim in other and own < other


def _superseded(
    state: Propagation, layer: Layer, found: Sequence[tuple[Layer, Layer]], place: str
) -> bool:
    """A virtual axis merged with a real one has a fixed length."""
    if layer.virtual and any(new.dim == layer.dim and not new.virtual for _, new in found):
        state.freeze_layer(layer, f"merged with channels: {place}")
        return True
    return False


def _split(
    state: Propagation,
    place: str,
    layers: Sequence[Layer],
    parts: Sequence[Sequence[int]],
    shape: tuple[int, ...],
) -> list[Layer]:
    """Every dimension becomes a run; the layer shrinks the innermost that it varies over."""
    split: list[Layer] = []
    for layer in layers:
        part = parts[layer.dim]
        moved = layer.moved(_runs_split(layer, parts, shape), part[-1] if part else 0)
        inner = [dim for dim in moved.dims if dim in part]
        if not inner:
            if part:
                state.freeze_layer(layer, f"used by its position: {place}")
            continue
        if layer.virtual and len(inner) > 1:  # a constant whose blocks nobody needs to cut
            state.freeze_layer(layer, f"cut into blocks: {place}")
            continue
        moved.dim = inner[-1]
        split.append(moved)
        if len(inner) > 1:
            split += _outer(state, place, moved, inner[:-1])
    return split


def _outer(state: Propagation, place: str, leaf: Layer, outer: Sequence[int]) -> list[Layer]:
    """Node layers for the outer dimensions of a split axis, and equal counts in every run."""
    small = leaf.compact()
    order = [*(d for d in leaf.dims if d != leaf.dim), leaf.dim]
    rows = small.permute(*[d for d in range(small.ndim) if d not in order], *order)
    state.blocks.append(Blocks(rows.reshape(-1, small.shape[leaf.dim]).numpy(), place, whole=True))
    layers = []
    for position, dim in enumerate(outer):
        below = [leaf.dim, *outer[position + 1 :]]
        prefix = [d for d in leaf.dims if d not in below]
        rest = [d for d in range(small.ndim) if d not in prefix and d not in below]
        leaves = small.permute(*rest, *prefix, *[d for d in leaf.dims if d in below])
        sizes = [small.shape[d] for d in prefix]
        nodes = state.node_ids(leaves, math.prod(sizes))
        if nodes.numel() > sizes[prefix.index(dim)]:
            last = [*(d for d in prefix if d != dim), dim]
            by_row = nodes.reshape(sizes).permute([prefix.index(d) for d in last])
            state.blocks.append(Blocks(by_row.reshape(-1, small.shape[dim]).numpy(), place, True))
        view = [small.shape[d] if d in prefix else 1 for d in range(small.ndim)]
        ids = nodes.reshape(view).expand(leaf.ids.shape)
        layers.append(Layer(ids, dim, virtual=leaf.virtual))
    return layers


HANDLERS: dict[str, Handler] = {
    f"aten.{name}": view
    for name in (
        "view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "flatten", "unflatten",
        "_reshape_alias", "view_as", "reshape_as",
    )
}  # fmt: skip
