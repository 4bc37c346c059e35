"""Surgery: rules in order on a copy of a network, each site with its reason and its error."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bevel.core import plugins
from bevel.core.errors import FORWARD_FAULTS, SurgeryError, UnknownNameError, one_line, suggestion
from bevel.core.modes import evaluating
from bevel.core.userfile import load_file
from bevel.graph.record import ExampleInputs, map_inputs, run
from bevel.rewriting import samples
from bevel.rewriting.fitting import Error
from bevel.rewriting.log import SurgeryLog
from bevel.rewriting.reconstruction import Affine, Refit, reconstruct
from bevel.rewriting.rule import Place, Rule
from bevel.rewriting.samples import Samples, joined
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

_EXACT = ("drop_path", "inplace_dropout", "reparametrize", "focus", "large_max_pool")
_SMOOTH = ("squeeze_excite", "silu", "hardswish", "gelu", "mish", "elu")
_PLAIN = ("large_avg_pool", "global_pool", "interpolate_size")

SETS: dict[str, tuple[str, ...]] = {
    "exact": _EXACT,
    "lite": (*_EXACT, *_SMOOTH),
    "tidl": (
        *_EXACT, *_SMOOTH, "hardsigmoid", "leaky_relu", "prelu", "norm", "channels_last",
        "even_kernel", "large_kernel", "attention_pool", *_PLAIN,
    ),
    "edgetpu": (
        *_EXACT, *_SMOOTH, "hardsigmoid", "norm", "channels_last", "attention_pool", *_PLAIN,
    ),
    "tensorrt": (*_EXACT, *_SMOOTH[1:], "norm", "channels_last", "interpolate_size"),
    "xnnpack": (*_EXACT, "silu", "gelu", "mish", "elu", "norm", "channels_last", "hardsigmoid"),
}  # fmt: skip
"""Rules by the name of what they are for, in the order in which they run.

`tidl`: accelerators that know odd kernels and ReLU only. `edgetpu`: int8 only, no gates.
`tensorrt`: gates are cheap there, and a ReLU is merged with the convolution before it. `xnnpack`
(LiteRT, ExecuTorch): hard swish is a table there, the other smooth functions are not.
"""

TOLERANCE = 1e-5
"""Largest difference that an exact rule may make, relative to the largest output of its kind."""


@dataclass(frozen=True)
class SiteReport:
    """What became of a place that a rule matched.

    Attributes:
        rule: its name.
        place: module and function.
        reason: why it was left alone; None where it was rewritten.
        error: what the rewriting costs at the place itself; None where it is exact.
    """

    rule: str
    place: str
    reason: str | None
    error: Error | None = None


@dataclass(frozen=True)
class Lite:
    """A rewritten network.

    Attributes:
        net: an ordinary module of the original's classes.
        log: what was done; `replay` does it to a fresh network, which then takes the weights.
        sites: every place that a rule matched, rewritten or not.
        proven: of each exact rule that rewrote something, the largest difference of the outputs
            on the calibration images, relative to the largest output of its kind.
        wanted: what layers give of what they gave, where that is not the same.
        refits: the layers that were fitted again, after everything was replaced.
    """

    net: nn.Module
    log: SurgeryLog
    sites: list[SiteReport] = field(default_factory=list)
    proven: dict[str, float] = field(default_factory=dict)
    wanted: dict[str, Affine] = field(default_factory=dict)
    refits: list[Refit] = field(default_factory=list)


def surgery(
    net: nn.Module,
    example: ExampleInputs,
    *,
    rules: str | Sequence[str | Rule] = "lite",
    calibration: Iterable[ExampleInputs] = (),
    fit: bool = True,
    progressive: bool = False,
) -> Lite:
    """Rewrite a copy of a network by rules; the original is not touched.

    Args:
        net: the network.
        example: what it can be called with: images (N, C, H, W), or positional or keyword
            arguments, such as the list of images (C, H, W) of a detector, `([image, image],)`.
        rules: the name of a set, or names of rules in the order in which they run; a rule of your
            own is the name of a file, `path/to/rule.py`, or any object that is a `Rule`.
        calibration: batches of images like those it will see, each given as the example is, for
            what is fitted; without them the example is all there is.
        fit: fit what is not exact; without it the cheap layer is put in place as it is.
        progressive: let activation functions stay what they are for now and turn into ReLUs while
            the network is trained: `finetune` does so, `bevel.fade` and `bevel.settle` are for
            training scripts of your own.

    Raises:
        UnknownNameError: there is no such rule or set.
        SurgeryError: a rule breaks the network, or an exact rule changes its answers.
        ModelError: the network cannot be called on the example.
    """
    wanted = chosen(rules)
    batches = list(calibration) or [example]
    lite = Lite(copy.deepcopy(net), SurgeryLog())
    now = _State(lite.net, example, batches)
    for rule in wanted:
        name, loaded = _loaded(rule)
        now = _apply(name, loaded, lite, now, _How(fit, progressive))
    images, inexact = joined(batches), any(site.error is not None for site in lite.sites)
    if fit and inexact and images is not None and len(images) > 1:
        try:
            lite.refits.extend(reconstruct(lite.net, net, images, lite.wanted))
        except FORWARD_FAULTS as error:
            raise SurgeryError(
                f"the lite network's layers cannot be fitted on {len(images)} images at once: "
                f"{one_line(error, 160)}; in Python fit=False leaves it out"
            ) from error
    return lite


@dataclass(frozen=True)
class _How:
    """What rules are told: see `surgery`."""

    fit: bool
    progressive: bool


class _State:
    """What is known of a network as it is now; each is found out once, if it is asked for."""

    def __init__(
        self, net: nn.Module, example: ExampleInputs, batches: Sequence[ExampleInputs]
    ) -> None:
        self.net, self.example, self.batches = net, example, batches

    @cached_property
    def seen(self) -> Seen:
        """Its calls."""
        return Seen.of(self.net, self.example)

    @cached_property
    def outputs(self) -> list[Tensor]:
        """What it gives on the batches."""
        return _outputs(self.net, self.batches)

    def changed(self) -> _State:
        """Nothing, now that the network is another."""
        return _State(self.net, self.example, self.batches)


def chosen(rules: str | Sequence[str | Rule]) -> Sequence[str | Rule]:
    """The rules of a set, or those that were named, each found to be a rule.

    Raises:
        UnknownNameError: there is no such set, rule or file.
        SurgeryError: a file cannot be loaded, or something is no rule.
    """
    found = SETS.get(rules, (rules,)) if isinstance(rules, str) else tuple(rules)
    for rule in found:
        if isinstance(rule, str) and not _is_file(rule) and rule not in plugins.discover("rules"):
            known = [*SETS, *plugins.discover("rules")]
            raise UnknownNameError(
                f"no rule or set of rules called '{rule}'. {suggestion(rule, known)}"
            )
        _loaded(rule)
    return found


def rule_name(rule: str | Rule) -> str:
    """What a rule is called in reports."""
    if isinstance(rule, str):
        return Path(rule).stem if _is_file(rule) else rule
    return str(getattr(rule, "__name__", type(rule).__name__)).rpartition(".")[2]


def _is_file(rule: str) -> bool:
    return rule.endswith(".py")


def _loaded(rule: str | Rule) -> tuple[str, Rule]:
    """A rule's name and the rule.

    Raises:
        UnknownNameError: there is no such file.
        SurgeryError: a file cannot be loaded, or is no rule.
    """
    name, found = rule_name(rule), rule
    if isinstance(rule, str):
        found = load_file(rule, SurgeryError) if _is_file(rule) else plugins.load("rules", rule)
    for part in ("EXACT", "match", "check", "rewrite"):
        if not hasattr(found, part):
            raise SurgeryError(f"'{name}' is no surgery rule: it has no {part}")
    return name, cast("Rule", found)


def _apply(
    name: str,
    rule: Rule,
    lite: Lite,
    now: _State,
    how: _How,
) -> _State:
    """Rewrite what a rule matches; the state afterwards."""
    seen, apart, later = now.seen, 0.0, now
    try:
        found = [(place, rule.check(seen, place)) for place in rule.match(seen)]
        nodes = [place for place, why in found if why is None and isinstance(place, Node)]
        given = samples.take(lite.net, now.batches, seen, nodes) if nodes and not rule.EXACT else {}
        if not rule.EXACT:
            found = [(place, why or _unreached(place, given)) for place, why in found]
        places = [place for place, why in found if why is None]
        before = now.outputs if places else []
        earlier = copy.deepcopy(lite.net) if places and rule.EXACT else None
        surgeon = Surgeon(lite.net, seen, given, lite.log, lite.wanted, **asdict(how))
        errors = [rule.rewrite(surgeon, place) for place in places]
        if places:
            later = now.changed()
            apart = _difference(before, later.outputs, exact=rule.EXACT)
            if earlier is not None and not apart <= TOLERANCE:
                again = Surgeon(earlier, seen, {}, SurgeryLog(), {}, **asdict(how))
                apart = _apart_in_float64(rule, again, places, now, otherwise=apart)
    except FORWARD_FAULTS as error:
        raise SurgeryError(f"the rule '{name}' fails: {one_line(error, 160)}") from error
    lite.sites.extend(SiteReport(name, _said(p), why) for p, why in found if why is not None)
    lite.sites.extend(
        SiteReport(name, _said(place), None, error)
        for place, error in zip(places, errors, strict=True)
    )
    if not math.isfinite(apart):
        raise SurgeryError(
            f"after the rule '{name}' the network's outputs are of other shapes, or not finite"
        )
    if rule.EXACT and places:
        lite.proven[name] = apart
        if apart > TOLERANCE:
            raise SurgeryError(
                f"the rule '{name}' is to be exact and changes the outputs by {apart:.1e}"
            )
    return later


def _said(place: Place) -> str:
    return place.place if isinstance(place, Node) else place


def _unreached(place: Place, given: Samples) -> str | None:
    """Why there is nothing to fit a place on: batches may be of fewer images than the example."""
    missing = isinstance(place, Node) and place.number not in given
    return "no calibration image reaches it" if missing else None


def _apart_in_float64(
    rule: Rule, surgeon: Surgeon, places: Sequence[Place], now: _State, *, otherwise: float
) -> float:
    """How far an exact rule changes the outputs, where in float32 it seems to change them.

    Rounding grows from layer to layer, and a detector takes boxes or leaves them by it; weights
    that a rule computes are rounded too. So the rule is done again to a copy in float64.
    `otherwise`: what float32 says, for networks that ask for it somewhere.
    """
    wide = [map_inputs(batch, _widened) for batch in now.batches]
    try:
        net = surgeon.net.double()
        before = _outputs(net, wide)
        for place in places:
            rule.rewrite(surgeon, place)
        after = _outputs(net, wide)
    except FORWARD_FAULTS:  # it asks for float32 somewhere
        return otherwise
    return _difference(before, after, exact=True)


def _widened(leaf: Any) -> Any:
    """Floating point numbers as float64."""
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@torch.no_grad()
def _outputs(net: nn.Module, batches: Iterable[ExampleInputs]) -> list[Tensor]:
    with evaluating(net):
        leaves = tree_leaves([run(net, batch) for batch in batches])
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
    return [leaf.long() if leaf.dtype is torch.bool else leaf for leaf in tensors]


def _difference(before: Sequence[Tensor], after: Sequence[Tensor], *, exact: bool) -> float:
    """The largest difference of outputs, relative to the largest number in those of one kind.

    A detector that is not to be the same may find more or fewer objects, which are along the first
    axis; what it finds is then not compared.

    Returns:
        Infinite where the outputs are of other shapes, not a number where they are not finite.
    """
    kinds = [_kind(tensor) for tensor in before]
    same = [b.shape == a.shape for b, a in zip(before, after, strict=False)]
    if kinds != [_kind(tensor) for tensor in after] or (exact and not all(same)):
        return math.inf
    if not all(bool(tensor.isfinite().all()) for tensor in (*before, *after)):
        return math.nan
    largest: dict[object, float] = defaultdict(lambda: 1e-30)
    apart: dict[object, float] = defaultdict(float)
    for kind, b, a in zip(kinds, before, after, strict=True):
        if b.shape == a.shape and b.numel():
            largest[kind] = max(largest[kind], float(b.abs().max()))
            apart[kind] = max(apart[kind], float((b - a).abs().max()))
    return max((apart[kind] / largest[kind] for kind in apart), default=0.0)


def _kind(tensor: Tensor) -> tuple[object, ...]:
    """What boxes, scores and classes differ in, and the outputs of several batches do not."""
    return tensor.ndim, tensor.shape[1:], tensor.dtype
