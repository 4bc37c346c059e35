"""Module attributes that say how large a module's tensors are: they follow a cut.

`RESIZERS` maps a module type to the function that makes its attributes agree with its sliced
parameters, `NAMED` does so for types of libraries that bevel does not import; `register_resizer`
adds a user's own. Attributes that a forward reads for its views (`num_heads`, `head_dim`) are found
without a table, see `graph.hardwired`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Resizer = Callable[[Any], None]


def conv_transpose(module: _ConvTransposeNd) -> None:
    """Weight (in, out / groups, ...)."""
    module.in_channels = module.weight.shape[0]
    module.out_channels = module.weight.shape[1] * module.groups


def conv(module: _ConvNd) -> None:
    """Weight (out, in / groups, ...); the groups of a depthwise convolution are in the plan."""
    module.out_channels = module.weight.shape[0]
    module.in_channels = module.weight.shape[1] * module.groups


def linear(module: nn.Linear) -> None:
    """Weight (out, in)."""
    module.out_features, module.in_features = module.weight.shape


def norm(module: _NormBase) -> None:
    """Batch and instance norm."""
    for tensor in (module.weight, module.running_mean):
        if tensor is not None:
            module.num_features = tensor.shape[0]


def group_norm(module: nn.GroupNorm) -> None:
    """The number of groups stays."""
    if module.weight is not None:
        module.num_channels = module.weight.shape[0]


def layer_norm(module: nn.LayerNorm | nn.RMSNorm) -> None:
    """The normalised shape is the weight's."""
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def recurrent(module: nn.RNNBase) -> None:
    """Hidden and input size of all layers and directions."""
    weights = dict(module.named_parameters())
    module.hidden_size = weights["weight_hh_l0"].shape[1]
    module.input_size = weights["weight_ih_l0"].shape[1]


def embedding(module: nn.Embedding) -> None:
    """Weight (number, dimension)."""
    module.num_embeddings, module.embedding_dim = module.weight.shape


def prelu(module: nn.PReLU) -> None:
    """One slope per channel, or one for all."""
    module.num_parameters = module.weight.shape[0]


def attention(module: nn.MultiheadAttention) -> None:
    """As wide inside as outside; the number of heads stays."""
    if module.in_proj_weight is not None:
        module.embed_dim = module.kdim = module.vdim = module.in_proj_weight.shape[1]
        module.head_dim = module.embed_dim // module.num_heads


def halves(module: Any) -> None:
    """Ultralytics' exporter has another forward for these blocks, which splits by this number."""
    module.c = module.cv1.conv.weight.shape[0] // 2


RESIZERS: dict[type[nn.Module], Resizer] = {
    _ConvTransposeNd: conv_transpose,
    _ConvNd: conv,
    nn.Linear: linear,
    _NormBase: norm,
    nn.GroupNorm: group_norm,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: layer_norm,
    nn.RNNBase: recurrent,
    nn.Embedding: embedding,
    nn.PReLU: prelu,
    nn.MultiheadAttention: attention,
}

NAMED: dict[str, Resizer] = {
    "ultralytics.nn.modules.block.C2f": halves,
    "ultralytics.nn.modules.block.C2fAttn": halves,
    "ultralytics.nn.modules.block.RepNCSPELAN4": halves,
}


def register_resizer(kind: type[nn.Module], resizer: Resizer) -> None:
    """Teach bevel the size attributes of a module type and its subclasses.

    Args:
        kind: the module's class.
        resizer: called with a module whose parameters are already sliced; sets its attributes.
    """
    RESIZERS[kind] = resizer


def resize(module: nn.Module) -> None:
    """Make a module's size attributes agree with its sliced parameters."""
    kinds = type(module).__mro__
    resizer = next((RESIZERS[kind] for kind in kinds if kind in RESIZERS), None) or _named(kinds)
    if resizer is not None:
        resizer(module)


@cache
def _named(kinds: tuple[type, ...]) -> Resizer | None:
    """That of the first of these classes that `NAMED` has."""
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    return next((NAMED[name] for name in names if name in NAMED), None)


LONGEST = 64
"""Items of a list or tuple of sizes; longer ones are tables of something else."""

_ITEM = re.compile(r"(\w+)\[(\d+)\]")


def integers(module: nn.Module) -> dict[str, int]:
    """A module's own integer attributes by path: `num_heads`, or `split[1]` within a tuple."""
    found: dict[str, int] = {}
    for name, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool):
            found[name] = value
        elif isinstance(value, list | tuple) and len(value) <= LONGEST:
            for position, item in enumerate(value):
                if isinstance(item, int) and not isinstance(item, bool):
                    found[f"{name}[{position}]"] = item
    return found


def get_integer(module: nn.Module, path: str) -> int | None:
    """The integer at a path, None where there is none."""
    return integers(module).get(path)


def set_integer(module: nn.Module, path: str, value: int) -> None:
    """Set an integer attribute, or an item of a list or tuple attribute."""
    item = _ITEM.fullmatch(path)
    if item is None:
        setattr(module, path, value)
        return
    name, position = item[1], int(item[2])
    old = getattr(module, name)
    new = [value if i == position else x for i, x in enumerate(old)]
    setattr(module, name, tuple(new) if isinstance(old, tuple) else new)
