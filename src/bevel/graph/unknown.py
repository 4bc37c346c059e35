"""A pass without its arithmetic: activations hold zeros until somebody looks at them.

A recording needs the sizes of activations, not their elements. Whatever descends from the inputs
is *unknown*: operators that cost much give zeros of the right shape, the others compute with what
they get. What the network computes from its constants (indices, masks, tables) is computed as
ever. Where the code looks at an unknown element, what was left out is made up for
(`graph.deferred`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bevel.graph import memory

aten = torch.ops.aten


class LostTrackError(BaseException):
    """Unknown elements went where they cannot be followed: the pass has to be run in earnest.

    Not an `Exception`, so that no `except` in the network's code takes it for its own.
    """


LOOKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operators whose result is a number, or has a shape, that depends on elements."""


def looks(function: torch._ops.OpOverload, arguments: Sequence[Any], unknown: Any) -> bool:
    """Whether an operator with an unknown tensor among its arguments looks at its elements.

    Args:
        function: the operator.
        arguments: its positional arguments.
        unknown: tells whether a tensor is unknown.
    """
    if function.namespace != "aten":  # what it does with elements is its own business
        return True
    if function == aten.index.Tensor:  # positions may be unknown, masks give a shape
        indices = [index for index in arguments[1] if isinstance(index, Tensor)]
        return any(index.dtype in (torch.bool, torch.uint8) and unknown(index) for index in indices)
    if function in _ASSIGNED:
        return False
    return not LOOKS.isdisjoint(function.tags)


_ASSIGNED = {aten.index_put.default, aten.index_put_.default}


def zeros(
    function: torch._ops.OpOverload, arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> Any:
    """What an operator gives for unknown tensors, without computing it; None: compute it.

    Only arguments that the operator accepts are answered, so an error of the network is met when
    the operator is computed.
    """
    kernel = _KERNELS.get(function)
    return None if kernel is None else kernel(*arguments, **keywords)


def _same(x: Any, *others: Any, **_: Any) -> Any:
    """Elementwise on tensors of one type: zeros of the broadcast shape."""
    shape = _together(x, *others)
    if shape is None:
        return None
    return _alike(x) if shape == x.shape else memory.zeros(x, shape)


def _together(x: Any, *others: Any) -> Sequence[int] | None:
    """The broadcast shape of tensors of one floating type."""
    if not _is_float(x):
        return None
    shape: Sequence[int] | None = x.shape
    for other in others:
        if isinstance(other, Tensor):
            if other.dtype != x.dtype or shape is None:
                return None
            if other.shape != shape:
                shape = _broadcast(shape, other.shape)
    return shape


def _alike(x: Tensor) -> Tensor:
    """Zeros of the same shape, laid out as torch lays out what it makes from `x`."""
    if x.is_contiguous():
        return memory.zeros(x, x.shape)
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    if not x.permute(order).is_contiguous():  # with gaps, or one element in several places
        return torch.zeros_like(x)
    back = sorted(range(x.dim()), key=order.__getitem__)
    return memory.zeros(x, [x.shape[dim] for dim in order]).permute(back)


def _broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(tuple(a), tuple(b))
    except ValueError:
        return None


def _in_place(x: Any, *others: Any, **_: Any) -> Any:
    """An elementwise operator that writes to its first argument: it is as unknown as before."""
    return x if _is_float(x) and _together(x, *others) == x.shape else None


def _is_float(*tensors: Any) -> bool:
    return all(isinstance(x, Tensor) and x.is_floating_point() for x in tensors)


def _convolution(
    x: Tensor,
    weight: Tensor,
    _: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    __: Sequence[int],
    groups: int,
) -> Tensor | None:
    if x.dim() != weight.dim() or x.dtype != weight.dtype or transposed:
        return None
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    sizes = _swept(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    if min(sizes, default=1) < 1:
        return None
    last = torch.channels_last
    if len(sizes) == 2 and not x.is_contiguous() and x.is_contiguous(memory_format=last):
        return memory.zeros(x, (x.shape[0], *sizes, weight.shape[0])).permute(0, 3, 1, 2)
    return memory.zeros(x, (x.shape[0], weight.shape[0], *sizes))


def _swept(
    lengths: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:  # fmt: skip
    """At how many places a window fits, in each dimension; a setting of one number is of all."""
    sizes = []
    for dim, length in enumerate(lengths):
        step, pad, spread = (p[dim % len(p)] for p in (stride, padding, dilation))
        reach = spread * (kernel[dim % len(kernel)] - 1) + 1
        sizes.append((length + 2 * pad - reach) // step + 1)
    return sizes


def _windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool,
) -> Tensor | None:  # fmt: skip
    """What a pool gives for a contiguous tensor."""
    dims = len(kernel)
    if ceil_mode or not _is_float(x) or x.dim() != dims + 2 or not x.is_contiguous():
        return None
    if any(2 * p > k for p, k in zip(padding, kernel, strict=False)):
        return None
    sizes = _swept(x.shape[2:], kernel, stride or kernel, padding, dilation)
    return memory.zeros(x, (*x.shape[:2], *sizes)) if min(sizes) >= 1 else None


def _max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Any:
    result = _windows(x, kernel, stride, padding, dilation, ceil_mode)
    return None if result is None else (result, memory.zeros(x, result.shape, torch.int64))


def _avg_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    *_: Any,
) -> Tensor | None:
    return _windows(x, kernel, stride, padding, (1,), ceil_mode)


def _in_order(x: Tensor) -> bool:
    """Whether torch does not take the tensor for one with its channels last."""
    return x.dim() not in (4, 5) or x.is_contiguous() or x.stride(1) > x.stride(-1)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    if not all(_is_float(x) and x.dtype == first.dtype and _in_order(x) for x in tensors):
        return None
    if not -first.dim() <= dim < first.dim():
        return None
    sides = _without(first.shape, dim)
    if any(x.dim() != first.dim() or _without(x.shape, dim) != sides for x in tensors):
        return None
    shape = list(first.shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return memory.zeros(first, shape)


def _without(shape: Sequence[int], dim: int) -> list[int]:
    sides = list(shape)
    del sides[dim]
    return sides


def _pad(x: Tensor, pads: Sequence[int], *_: Any) -> Tensor | None:
    if not _is_float(x) or not x.is_contiguous() or len(pads) > 2 * x.dim() or len(pads) % 2:
        return None
    shape = list(x.shape)
    for place in range(len(pads) // 2):
        shape[-1 - place] += pads[2 * place] + pads[2 * place + 1]
    return memory.zeros(x, shape) if min(shape) >= 1 else None


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> Tensor | None:
    result = _mm(a, b)
    fits = result is not None and _broadcast(bias.shape, result.shape) == result.shape
    return result if fits and bias.dtype == a.dtype else None


def _mm(a: Tensor, b: Tensor) -> Tensor | None:
    if a.dtype != b.dtype or a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        return None
    return memory.zeros(a, (*a.shape[:-1], b.shape[-1])) if _is_float(a, b) else None


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    *_: Any,
) -> Any:
    vectors = (weight, bias, mean, variance)
    if training or any(v is not None and v.shape != x.shape[1:2] for v in vectors):
        return None
    return _alike(x), x.new_empty(0), x.new_empty(0)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, _: float
) -> Any:
    start = x.dim() - len(shape)
    if list(x.shape[start:]) != list(shape):
        return None
    if any(v is not None and list(v.shape) != list(shape) for v in (weight, bias)):
        return None
    statistic = x.new_zeros((*x.shape[:start], *[1] * len(shape)))
    return memory.zeros(x, x.shape), statistic, statistic.clone()  # contiguous, whatever x is


def _clone(x: Tensor, *, memory_format: torch.memory_format = torch.preserve_format) -> Any:
    if not _is_float(x):
        return None
    if memory_format == torch.contiguous_format:
        return memory.zeros(x, x.shape)
    if memory_format == torch.preserve_format:
        return _alike(x)
    return torch.zeros_like(x, memory_format=memory_format)


def _softmax(x: Tensor, _: int, half_to_float: bool) -> Any:
    return None if half_to_float or not _is_float(x) else memory.zeros(x, x.shape)


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        return None
    batch, heads, length, width = q.shape
    out = memory.zeros(q, (batch, length, heads, width)).transpose(
        1, 2
    )  # as the kernel lays it out
    return out, torch.zeros((batch, length, heads), dtype=torch.float32).transpose(1, 2)


def _kernels(names: Iterable[str], kernel: Callable[..., Any]) -> Mapping[Any, Callable[..., Any]]:
    """All overloads of these operators that return a new tensor or their first argument."""
    found = {}
    for name in names:
        packet = getattr(aten, name)
        for overload in packet.overloads():
            if not overload.endswith("out") and "grad" not in overload:
                found[getattr(packet, overload)] = kernel
    return found


_SAME = ("relu", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "tanh",
    "leaky_relu", "elu", "mish", "add", "sub", "mul", "div")  # fmt: skip

_KERNELS: dict[Any, Callable[..., Any]] = {
    **_kernels(_SAME, _same),
    **_kernels((f"{name}_" for name in (*_SAME, "copy")), _in_place),
    **_kernels(("max_pool2d_with_indices", "max_pool3d_with_indices"), _max_pool),
    **_kernels(("avg_pool2d", "avg_pool3d"), _avg_pool),
    aten.cat.default: _cat,
    aten.constant_pad_nd.default: _pad,
    aten.clone.default: _clone,
    aten._softmax.default: _softmax,
    aten.convolution.default: _convolution,
    aten.addmm.default: _addmm,
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
}
