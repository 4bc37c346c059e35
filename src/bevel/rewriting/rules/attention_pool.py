"""Attention that pools an image into one vector -> the mean and one linear layer, fitted.

Pools like that end networks of CLIP's kind: one query looks at all positions. On an image that is
the same everywhere all positions are weighed alike, and what the pool makes of it is linear, but
for a network behind the attention. That linear map is taken from the pool itself, then moved to
what comes closest on the calibration images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bevel.core.modes import evaluating
from bevel.graph.recording import Value, values_in
from bevel.rewriting.fitting import Error, relative_error
from bevel.rewriting.reconstruction import best_change
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

EXACT = False
ATTENTION = (
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    F.softmax,
    torch.softmax,
    Tensor.softmax,
)
CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
ELEMENTS = 1 << 24
"""Most numbers of the images that are the same everywhere, which the pool is shown at once."""


@dataclass(frozen=True)
class _Pool:
    """A module whose one attention makes a vector of an image or tokens.

    Attributes:
        module: its name.
        first: its first call on what it pools.
        given: what it pools, (N, C, H, W) or (N, positions, C).
        made: the vector, (N, D) or (N, 1, D).
        runs: how often.
    """

    module: str
    first: Node
    given: Value
    made: Value
    runs: int

    @property
    def is_image(self) -> bool:
        """Whether it pools images, not tokens."""
        return len(self.given.shape) == 4

    @property
    def positions(self) -> int:
        """How many are pooled."""
        return math.prod(self.given.shape[2:]) if self.is_image else self.given.shape[1]


def match(seen: Seen) -> Iterator[Node]:
    """The first call of each pool."""
    found = {pool.module: pool for node in seen.calls(ATTENTION) if (pool := _around(seen, node))}
    return (pool.first for pool in found.values())


def check(seen: Seen, node: Node) -> str | None:
    """Why a place cannot be rewritten."""
    pool = _of(seen, node)
    if pool.runs != 1:
        return "its module runs several times"
    if seen.channel_axis(node) != (1 if pool.is_image else 2):
        return "the axes of what it pools are not in the usual order"
    return None


@torch.no_grad()
def rewrite(surgeon: Surgeon, node: Node) -> Error:
    """Put a mean and a linear layer there."""
    pool = _of(surgeon.seen, node)
    module, sizes = surgeon.net.get_submodule(pool.module), pool.given.shape[2:]
    given = _spread_out(surgeon.samples[node.number][0], pool.positions)

    def pooled(x: Tensor) -> Tensor:
        """Of (images, channels, positions)."""
        result: Tensor = module(x.unflatten(2, sizes) if pool.is_image else x.transpose(1, 2))
        return result.flatten(1)

    with evaluating(module):
        wanted, means = pooled(given), given.mean(2)
        naive = _naive(means.shape[1], wanted.shape[1])
        weight = _on_plain_images(pooled, means, pool.positions) if surgeon.fit else naive
    bias = torch.zeros(len(weight))
    if surgeon.fit:
        change = best_change(means.T[None], (wanted - means @ weight.T).T, len(means))
        weight = weight if change is None else weight + change[0].to(weight)
        bias = (wanted - means @ weight.T).mean(0)
    surgeon.replace(
        pool.module,
        "PooledLinear",
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        of_images=pool.is_image,
        keep_axis=len(pool.made.shape) == 3,
    )
    linear = surgeon.net.get_submodule(f"{pool.module}.linear")
    linear.load_state_dict({"weight": weight, "bias": bias})
    fitted = means @ weight.T + bias
    return Error(relative_error(means @ naive.T, wanted), relative_error(fitted, wanted))


def _naive(inputs: int, outputs: int) -> Tensor:
    """Weights of a layer that knows nothing: the mean as it is, where that has the right size."""
    if inputs == outputs:
        return torch.eye(inputs)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)


def _on_plain_images(pooled: Callable[[Tensor], Tensor], means: Tensor, positions: int) -> Tensor:
    """The linear map of means that the pool is on images that are the same everywhere."""
    centre, channels = means.mean(0), means.shape[1]
    step = (means - centre).square().mean().sqrt().clamp(min=1e-3)

    def plain(means: Tensor) -> Tensor:
        return pooled(means[:, :, None].expand(-1, -1, positions).contiguous())

    some = max(ELEMENTS // (channels * positions), 1)
    moved = [plain(centre + part) for part in (step * torch.eye(channels)).split(some)]
    return (torch.cat(moved) - plain(centre[None])).T / step


def _spread_out(samples: Tensor, positions: int) -> Tensor:
    """(images, channels, positions): where fewer were kept, each stands for those near it."""
    step = -(-positions // samples.shape[2])
    return samples.repeat_interleave(step, 2)[:, :, :positions].contiguous()


def _of(seen: Seen, node: Node) -> _Pool:
    """The pool that a call is the first of."""
    pools = (_pool(seen, name) for name in _holders(node.module))
    return next(pool for pool in pools if pool is not None and pool.first is node)


def _around(seen: Seen, attention: Node) -> _Pool | None:
    """The smallest module around an attention that is a pool."""
    pools = (_pool(seen, name) for name in _holders(attention.module))
    return next((pool for pool in pools if pool is not None), None)


def _holders(module: str) -> Iterator[str]:
    """The module and those that hold it, but for the network itself."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _pool(seen: Seen, module: str) -> _Pool | None:
    """What a module pools, if that is what it does."""
    inside = seen.inside(module)
    attentions = [node for node in inside if node.function in ATTENTION]
    runs = seen.runs(attentions[0].module) if attentions else 0
    if len(attentions) != runs or any(node.function in CONVOLUTIONS for node in inside):
        return None
    own = {node.number for node in inside}
    given = {
        ref: node
        for node in reversed(inside)
        for ref in node.inputs
        if (maker := seen.maker(ref)) is not None and maker.number not in own
    }
    made = {
        ref: node
        for node in inside
        for ref in node.outputs
        if ref in seen.outputs or any(reader.number not in own for reader in seen.readers(ref))
    }
    if not len(given) == len(made) == runs > 0:
        return None
    (source, first), (_, last) = next(iter(given.items())), next(iter(made.items()))
    values = values_in(first.frame.arguments)
    entering = next(value for value in values if value.index == source[0])
    leaving = next(values_in((last.frame.result,)))
    vector = len(leaving.shape) == 2 or (len(leaving.shape) == 3 and leaving.shape[1] == 1)
    if not vector or len(entering.shape) not in (3, 4):
        return None
    return _Pool(module, first, entering, leaving, runs)
