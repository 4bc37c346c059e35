"""Surgery: rules in order on a copy of a network, each site with its reason and its error."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bevel.core import plugins
from bevel.core.errors import FORWARD_FAULTS, SurgeryError, UnknownNameError, one_line, suggestion
from bevel.core.modes import evaluating
from bevel.core.userfile import load_file
from bevel.rewriting import samples
from bevel.rewriting.fitting import Error
from bevel.rewriting.log import SurgeryLog
from bevel.rewriting.reconstruction import Affine, Refit, reconstruct
from bevel.rewriting.rule import Place, Rule
from bevel.rewriting.seen import Node, Seen
from bevel.rewriting.surgeon import Surgeon

_EXACT = ("drop_path", "inplace_dropout", "focus", "large_max_pool")
_SMOOTH = ("squeeze_excite", "silu", "hardswish", "gelu", "mish", "elu")

SETS: dict[str, tuple[str, ...]] = {
    "exact": _EXACT,
    "lite": (*_EXACT, *_SMOOTH),
    "tidl": (*_EXACT, *_SMOOTH, "leaky_relu", "even_kernel"),
}
"""Rules by the name of what they are for, in the order in which they run. `tidl`: what accelerators
that know odd kernels and ReLU only ask for."""

TOLERANCE = 1e-5
"""Largest difference that an exact rule may make, relative to the largest output."""


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
            on the calibration images, relative to the largest output.
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
    example: Tensor,
    *,
    rules: str | Sequence[str | Rule] = "lite",
    calibration: Iterable[Tensor] = (),
    fit: bool = True,
) -> Lite:
    """Rewrite a copy of a network by rules; the original is not touched.

    Args:
        net: the network.
        example: images (N, C, H, W) that it can be called with.
        rules: the name of a set, or names of rules in the order in which they run; a rule of your
            own is the name of a file, `path/to/rule.py`, or any object that is a `Rule`.
        calibration: batches of images like those it will see, for what is fitted; without them
            the example is all there is.
        fit: fit what is not exact; without it the cheap layer is put in place as it is.

    Raises:
        UnknownNameError: there is no such rule or set.
        SurgeryError: a rule breaks the network, or an exact rule changes its answers.
        ModelError: the network cannot be called on the example.
    """
    wanted = chosen(rules)
    batches = list(calibration) or [example]
    lite = Lite(copy.deepcopy(net), SurgeryLog())
    for rule in wanted:
        name, loaded = _loaded(rule)
        _apply(name, loaded, lite, example, batches, fit=fit)
    images = torch.cat(batches)
    if fit and len(images) > 1 and any(site.error is not None for site in lite.sites):
        lite.refits.extend(reconstruct(lite.net, net, images, lite.wanted))
    return lite


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
    name: str, rule: Rule, lite: Lite, example: Tensor, batches: Sequence[Tensor], *, fit: bool
) -> None:
    seen = Seen.of(lite.net, example)
    try:
        found = [(place, rule.check(seen, place)) for place in rule.match(seen)]
        places = [place for place, why in found if why is None]
        before = _outputs(lite.net, batches) if places else []
        nodes = [place for place in places if isinstance(place, Node)]
        given = {} if rule.EXACT else samples.take(lite.net, batches, nodes)
        surgeon = Surgeon(lite.net, seen, given, lite.log, lite.wanted, fit=fit)
        errors = [rule.rewrite(surgeon, place) for place in places]
        after = _outputs(lite.net, batches) if places else []
    except FORWARD_FAULTS as error:
        raise SurgeryError(f"the rule '{name}' fails: {one_line(error, 160)}") from error
    lite.sites.extend(SiteReport(name, _said(p), why) for p, why in found if why is not None)
    lite.sites.extend(
        SiteReport(name, _said(place), None, error)
        for place, error in zip(places, errors, strict=True)
    )
    difference = _difference(before, after)
    if not math.isfinite(difference):
        raise SurgeryError(
            f"after the rule '{name}' the network's outputs are of other shapes, or not finite"
        )
    if rule.EXACT and places:
        lite.proven[name] = difference
        if difference > TOLERANCE:
            raise SurgeryError(
                f"the rule '{name}' is to be exact and changes the outputs by {difference:.1e}"
            )


def _said(place: Place) -> str:
    return place.place if isinstance(place, Node) else place


@torch.no_grad()
def _outputs(net: nn.Module, batches: Iterable[Tensor]) -> list[Tensor]:
    with evaluating(net):
        results = [net(batch) for batch in batches]
    return [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return float("inf")
    largest = max((float(tensor.abs().max()) for tensor in before if tensor.numel()), default=0.0)
    apart = max(
        (float((b - a).abs().max()) for b, a in zip(before, after, strict=True) if b.numel()),
        default=0.0,
    )
    return apart / max(largest, 1e-30)
