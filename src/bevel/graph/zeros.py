"""Where removed elements are zero in the masked network, and where they are something else.

A masked filter gives zeros, and so does a ReLU of them, but `sigmoid(0)` is 1/2. Whoever reads a
channel through a weight does not care, because the weight that reads it is zero too. A sum over
the channels of two activations does: there, removing is not the same as setting to zero.
"""

from __future__ import annotations

import torch

from bevel.graph.recording import Call, Value

_READERS = frozenset(
    {
        "convolution", "addmm", "linear", "native_batch_norm", "mkldnn_rnn_layer", "embedding",
        "deform_conv2d", "zeros", "zeros_like", "new_zeros",
    }
)  # fmt: skip
"""Operators whose output channels are those of a weight, and zero with it."""

_PRODUCTS = frozenset({"mul", "div", "mm", "bmm", "baddbmm", "addcmul", "masked_fill", "where"})
"""Operators that are zero where one of the inputs is."""

_SHIFTS = frozenset({"add", "sub", "rsub", "lerp"})

_ZERO_AT_ZERO = frozenset(
    {
        "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu", "silu",
        "hardswish", "mish", "tanh", "erf", "sin", "tan", "atan", "asinh", "sinh", "neg", "abs",
        "sqrt", "square", "pow", "sign", "sgn", "expm1", "log1p", "floor", "ceil", "round",
        "trunc", "prelu", "_prelu_kernel", "hardshrink", "softshrink", "threshold", "maximum",
        "minimum", "copy", "native_dropout", "bernoulli", "clamp", "clamp_min", "clamp_max",
        "fmod", "remainder",
    }
)  # fmt: skip
"""Pointwise functions with f(0) = 0."""


class Zeros:
    """Follows a pass; `bent` holds the tensors whose removed elements may be other than zero."""

    def __init__(self) -> None:
        self.bent: set[int] = set()

    def follow(self, call: Call) -> None:
        """Note the outputs of one call."""
        if self._bends(call):
            self.bent.update(o.index for o in call.outputs if isinstance(o, Value))

    def _bends(self, call: Call) -> bool:
        name = call.name.rpartition(".")[2].removesuffix("_")
        if name in _READERS:
            return False
        inputs = call.inputs
        bent = [value.index in self.bent for value in inputs]
        if name in _PRODUCTS:
            return bool(inputs) and all(bent)
        if name in _SHIFTS:
            numbers = call.arguments[1:2]
            shifted = any(isinstance(x, int | float) and x != 0 for x in numbers)
            return any(bent) or shifted or len({value.shape for value in inputs}) > 1
        if torch.Tag.pointwise in call.function.tags and name not in _ZERO_AT_ZERO:
            return True
        return any(bent)

    def summed(self, a: Value, b: Value) -> bool:
        """Whether removed elements count in a sum of products of two tensors."""
        return a.index in self.bent and b.index in self.bent
