"""A pass without its arithmetic: activations hold zeros, and nobody may look at them.

A recording needs the sizes of activations, not their elements. Whatever descends from the inputs
is *unknown*: operators that cost much give zeros of the right shape, the others compute with what
they get. What the network computes from its constants (indices, masks, tables) is computed as
ever. Where the code looks at an unknown element, `LookedError` says that the pass has to be run
in earnest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bevel.graph import memory

aten = torch.ops.aten


class LookedError(BaseException):
    """The pass looked at an unknown element.

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
    if function in _INDEXED:  # positions may be unknown, masks give a shape
        indices = [index for index in arguments[1] if isinstance(index, Tensor)]
        return any(index.dtype in (torch.bool, torch.uint8) and unknown(index) for index in indices)
    return not LOOKS.isdisjoint(function.tags)


_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


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
    """Elementwise on tensors of one type: the broadcast shape."""
    if not _is_float(x):
        return None
    shape = x.shape
    for other in others:
        if isinstance(other, Tensor):
            if other.dtype != x.dtype:
                return None
            if other.shape != shape:
                shape = _broadcast(shape, other.shape)
                if shape is None:
                    return None
    return _alike(x) if shape == x.shape else memory.zeros(x, shape)


def _alike(x: Tensor) -> Tensor:
    """Zeros of the same shape and strides."""
    return memory.zeros(x, x.shape) if x.is_contiguous() else torch.zeros_like(x)


def _broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...] | None:
    try:
        return tuple(torch.broadcast_shapes(a, b))
    except RuntimeError:
        return None


def _in_place(x: Any, *others: Any, **_: Any) -> Any:
    """An elementwise operator that writes to its first argument: it is as unknown as before."""
    result = _same(x, *others)
    return x if result is not None and result.shape == x.shape else None


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
    dims = x.dim() - 2
    sizes = []
    for dim in range(dims):
        step, pad, spread = (p[dim % len(p)] for p in (stride, padding, dilation))
        reach = spread * (weight.shape[dim + 2] - 1) + 1
        sizes.append((x.shape[dim + 2] + 2 * pad - reach) // step + 1)
    if min(sizes, default=1) < 1:
        return None
    shape = (x.shape[0], weight.shape[0], *sizes)
    if dims == 2 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        empty = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        return empty.zero_()
    return memory.zeros(x, shape)


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
    if memory_format in (torch.preserve_format, torch.contiguous_format) and x.is_contiguous():
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
    **_kernels((f"{name}_" for name in _SAME), _in_place),
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
