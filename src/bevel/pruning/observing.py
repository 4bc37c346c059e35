"""What a network does with images, as criteria see it: feature maps, and gradients of gates.

Both are looked at where the layers that read a unit get it (`places.py`): the tensors there are its
feature maps, and factors of 1 on them are its gates.

Each reader is a member of the group and has a row of scores. One that gets a single position for
each image, such as the classifier behind a pooling, counts only where no other does: of a map it
tells no more than the mean. All readers of a group share one gate, as in Group Fisher pruning (Liu
et al., ICML 2021): a unit is removed from all of them, and the derivatives add up before anything
is squared. So a group has one row of gate gradients, and the reduction nothing to do.

A unit of several channels, as an attention head or what a flattened map is read by, has one map
with theirs under each other, and one gate. Rows of a batch count as images, also where a network
cuts images into windows; of gates such rows share that of their image. A tensor whose length does
not grow with the images, as a table of positions, has no gates: no image has a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevel.core import plugins
from bevel.core.errors import FORWARD_FAULTS, PruningError, one_line
from bevel.core.modes import evaluating
from bevel.core.progress import track
from bevel.graph.couplings import Analysis
from bevel.graph.holding import holding
from bevel.graph.record import decomposed
from bevel.pruning.criteria import DataCriterion, Statistic, needing
from bevel.pruning.places import Place, places

Calibration = Iterable[Any]
"""Re-iterable batches: images, or tuples that begin with images and go on with labels (N,)."""

See = Callable[[Place, Any], Tensor | None]
"""Is given a tensor at a place; what it returns, if anything, is what the network goes on with."""


def observe(
    net: nn.Module, analysis: Analysis, criterion: str, calibration: Calibration
) -> dict[int, np.ndarray]:
    """Scores (members, size) of each prunable group of which anything is seen, in one pass.

    The network runs in eval mode; its weights, their gradients and the caller's random numbers are
    as before afterwards.

    Raises:
        PruningError: there is no batch, or none that the network and the criterion can use.
    """
    plugin: DataCriterion = plugins.load("criteria", criterion)
    sight = _Maps(plugin) if plugin.NEEDS == "images" else _Gates(plugin, criterion)
    device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    total = len(calibration) if isinstance(calibration, Sized) else None
    there = places(net, analysis)
    seen = 0
    with (
        holding(net),
        evaluating(net),
        _without_gradients(net),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        decomposed(),
        _watching(there, sight.see),
    ):
        for batch in track(calibration, f"scoring ({criterion})", total):
            images, labels = parted(batch)
            sight.take(net, _moved(images, device), _moved(labels, device))
            seen += 1
    if not seen:
        raise PruningError(f"the criterion '{criterion}' got no batch of images; give at least one")
    return {group: rows.cpu().numpy() for group, rows in sight.rows().items()}


class _Maps:
    """Gathers a statistic of the maps at each place."""

    def __init__(self, plugin: DataCriterion) -> None:
        self.plugin = plugin
        self.statistics: dict[Place, Statistic] = {}
        self.positions: dict[Place, int] = {}

    @torch.no_grad()
    def take(self, net: nn.Module, images: Any, labels: Any) -> None:  # noqa: ARG002
        """Run the network on a batch."""
        _run(net, images)

    def see(self, place: Place, x: Tensor) -> None:
        """Add the maps of a tensor."""
        maps = place.maps(x)
        if not bool(maps.isfinite().all()):
            raise PruningError(
                "the network gives values on the calibration images that are not finite; check "
                "its weights and the images"
            )
        self.statistics.setdefault(place, self.plugin.start()).update(maps)
        self.positions[place] = max(self.positions.get(place, 0), maps.shape[2] * maps.shape[3])

    def rows(self) -> dict[int, Tensor]:
        """For each group the scores of its places, (members, size)."""
        groups: dict[int, list[Place]] = {}
        for place in self.statistics:
            groups.setdefault(place.group, []).append(place)
        found = {}
        for group, seen in groups.items():
            spread = [place for place in seen if self.positions[place] > 1]
            scores = [self.statistics[place].scores() for place in spread or seen]
            found[group] = torch.stack(scores).double()
        return found


class _Gates:
    """Gathers a statistic of the gate gradients of each group."""

    def __init__(self, plugin: DataCriterion, criterion: str) -> None:
        self.plugin, self.criterion = plugin, criterion
        self.statistics: dict[int, Statistic] = {}
        self.lengths: dict[Place, set[int]] | None = None
        self.rows_of_image: dict[Place, set[int]] | None = None
        self.count = 0
        self.gates: dict[int, Tensor] = {}

    def take(self, net: nn.Module, images: Any, labels: Any) -> None:
        """Run the network on a batch, and back from the sum of the losses to the gates."""
        if self.rows_of_image is None:
            once, twice = (self._lengths(net, images[:1], count) for count in (1, 2))
            self.rows_of_image = {
                place: {rows for rows in lengths if 2 * rows in twice.get(place, ())}
                for place, lengths in once.items()
            }
        self.count, self.gates = len(images), {}
        with torch.inference_mode(False), torch.enable_grad():
            outputs = _run(net, images)
            self._check(outputs, labels)
            if not self.gates:
                return
            loss = F.cross_entropy(outputs.float(), labels, reduction="sum")
            try:
                gradients = torch.autograd.grad(loss, list(self.gates.values()), allow_unused=True)
            except RuntimeError as error:
                raise PruningError(
                    f"'{self.criterion}' cannot take the network's gradient: {one_line(error)}; "
                    f"without gradients: {needing('images', 'weights')}"
                ) from error
        for group, gradient in zip(self.gates, gradients, strict=True):
            if gradient is not None:
                self.statistics.setdefault(group, self.plugin.start()).update(gradient)
        self.gates = {}

    def see(self, place: Place, x: Tensor) -> Tensor | None:
        """Put the group's gate on a tensor."""
        if self.lengths is not None:
            self.lengths.setdefault(place, set()).add(len(x))
            return None
        rows, rest = divmod(len(x), self.count)
        if rest or rows not in (self.rows_of_image or {}).get(place, ()):
            return None
        if place.group not in self.gates:
            self.gates[place.group] = torch.ones(
                self.count, place.size, device=x.device, requires_grad=True
            )
        return place.gated(x, self.gates[place.group])

    def rows(self) -> dict[int, Tensor]:
        """For each group one row of scores, (1, size)."""
        return {
            group: statistic.scores().double()[None] for group, statistic in self.statistics.items()
        }

    @torch.no_grad()
    def _lengths(self, net: nn.Module, image: Any, count: int) -> dict[Place, set[int]]:
        """How long the tensors at each place are with one image so many times."""
        lengths: dict[Place, set[int]] = {}
        self.lengths = lengths
        _run(net, torch.cat([image] * count) if isinstance(image, Tensor) else image * count)
        self.lengths = None
        return lengths

    def _check(self, outputs: Any, labels: Any) -> None:
        """Refuse what no cross-entropy can be taken of."""
        needs = f"the criterion '{self.criterion}' takes the gradient of the cross-entropy"
        without = f"without labels: {needing('images', 'weights')}"
        given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if not isinstance(outputs, Tensor) or outputs.ndim < 2:
            raise PruningError(
                f"{needs}, but the network gives {given}, not scores of classes (N, K); {without}"
            )
        if not isinstance(labels, Tensor):
            raise PruningError(f"{needs}: give batches of (images, labels); {without}")
        if outputs.shape[:1] + outputs.shape[2:] != labels.shape:
            raise PruningError(
                f"{needs}, but the network gives {given} for labels {tuple(labels.shape)}"
            )
        if int(labels.max()) >= outputs.shape[1]:
            raise PruningError(
                f"label {int(labels.max())} has no output: the network has {outputs.shape[1]}"
            )


def _run(net: nn.Module, images: Any) -> Any:
    try:
        return net(images)
    except FORWARD_FAULTS as error:
        shape = "x".join(map(str, images.shape)) if isinstance(images, Tensor) else len(images)
        raise PruningError(
            f"the network cannot be run on calibration images ({shape}): {one_line(error)}"
        ) from error


def parted(batch: Any) -> tuple[Any, Any]:
    """Images, and labels where there are any."""
    if isinstance(batch, Tensor):
        return batch, None
    return batch[0], batch[1] if len(batch) > 1 else None


def _moved(given: Any, device: torch.device) -> Any:
    if isinstance(given, list | tuple):  # the images of a detector
        return type(given)(_moved(item, device) for item in given)
    return given.to(device) if isinstance(given, Tensor) else given


@contextmanager
def _without_gradients(net: nn.Module) -> Iterator[None]:
    """Inside the block no parameter asks for a gradient; afterwards each does as before."""
    asking = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _watching(there: Sequence[Place], see: See) -> Iterator[None]:
    """Inside the block, `see` is called with every place and the tensor there, when it comes."""
    handles = [
        place.module.register_forward_pre_hook(partial(_before, place, see), with_kwargs=True)
        if place.reads
        else place.module.register_forward_hook(partial(_after, place, see))
        for place in there
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(
    place: Place, see: See, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    x: Any = args[0] if args else kwargs.get("input")
    changed = see(place, x) if place.fits(x) else None
    if changed is None:
        return None
    return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"input": changed})


def _after(place: Place, see: See, _module: nn.Module, _args: Any, output: Any) -> Tensor | None:
    return see(place, output) if place.fits(output) else None
