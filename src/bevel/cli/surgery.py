"""`bevel surgery`: dear layers become cheap ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import bevel.cli.console as console
import bevel.cli.networks as networks
from bevel.cli.files import Arguments, Checkpoint, Factory, Input, Model, RecipeOption
from bevel.cli.runs import Json, Set
from bevel.core.errors import RecipeError
from bevel.core.files import sha256

if TYPE_CHECKING:
    from bevel.core.recipe import Recipe, Target
    from bevel.measurement.payoff import Payoff
    from bevel.reporting.sections import RuleSummary
    from bevel.rewriting.apply import Lite

COLUMNS = ("rule", "places", "rewritten", "error, naive", "error, fitted", "left alone because")


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command()(surgery)


def surgery(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="The file to write.")] = None,
    rules: Annotated[
        str,
        typer.Option(
            help="exact, lite, tidl, edgetpu, tensorrt, xnnpack, or rules joined by commas (bevel "
            "list rules); auto: those of lite that save time on --target."
        ),
    ] = "lite",
    progressive: Annotated[
        bool,
        typer.Option(
            "--progressive", help="Let bevel finetune turn activation functions into ReLU."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="RUNTIME:PRECISION[@DEVICE]",
            help="Measure what each rule alone saves there, such as onnxruntime:int8@local.",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    arguments: Arguments = None,
    input_shape: Input = None,
    factory: Factory = None,
    recipe: RecipeOption = None,
    overrides: Set = None,
    json: Json = False,
) -> None:
    """Replace layers that are dear on embedded processors by cheap ones; then train the result."""
    place = networks.parse_target(target)
    if rules == "auto" and place is None:
        raise RecipeError("--rules auto keeps what saves time: give --target, to measure it there")
    if out is None and not dry_run:
        raise RecipeError("give --out, the file to write, or --dry-run")
    if out is not None:
        networks.check_output(out, networks.SUFFIX)
    source = networks.read_recipe(recipe, overrides)
    with console.working(quiet_stdout=json):
        network = networks.open_network(
            model,
            factory=factory,
            arguments=arguments,
            checkpoint=checkpoint,
            input_shape=input_shape,
        )
        if network.plan is not None and network.plan.tensors:
            raise RecipeError(f"{model} is pruned already; surgery comes before pruning")
        lite, used, found = _operate(network, rules, place, source, progressive)
        written: dict[str, Any] = {}
        if out is not None and not dry_run:
            networks.save_lite(network, lite, out)
            written = {"file": str(out), "size_bytes": out.stat().st_size, "sha256": sha256(out)}
    if json:
        sites = [asdict(site) for site in lite.sites]
        saved = {p.name: {"before_ms": p.before_ms, "after_ms": p.after_ms} for p in found}
        console.print_json(
            {**written, "sites": sites, "proven": lite.proven, "rules": used}
            | {"refits": [asdict(refit) for refit in lite.refits]}
            | ({"measured": saved} if found else {})
        )
        return
    _say(lite, found)
    if written:
        console.print_text(f"{out}: bevel.load_pruned reads it; train it before it is used")


def _operate(
    network: networks.Network,
    rules: str,
    place: Target | None,
    source: Recipe | None,
    progressive: bool,
) -> tuple[Lite, list[str], list[Payoff]]:
    """Measure the rules where a target is given, and apply them.

    Returns:
        The lite network, the names of the rules, and what each saves on the target.
    """
    import bevel
    from bevel.measurement.payoff import payoffs, worthwhile
    from bevel.rewriting.apply import chosen, rule_name

    example, images = network.example(), []
    if source is not None:
        data = networks.fitting_data(source, network)
        limit = source.calibration.images
        images = [batch for batch, _ in data.batches("train", limit=limit)]
        example = images[0][:2]
    wanted = chosen(_rules("lite" if rules == "auto" else rules))
    found: list[Payoff] = []
    if place is not None:
        found = payoffs(network.net, example, place, rules=wanted, calibration=images)
        wanted = worthwhile(found) if rules == "auto" else wanted
    lite = bevel.surgery(
        network.net, example, rules=wanted, calibration=images, progressive=progressive
    )
    return lite, [rule_name(rule) for rule in wanted], found


def _rules(text: str) -> str | Sequence[str]:
    """A set's name, or names of rules."""
    return [name.strip() for name in text.split(",")] if "," in text else text


def _say(lite: Lite, found: Sequence[Payoff]) -> None:
    """The table of rules, for people."""
    from bevel.reporting.sections import by_rule, refitted

    rows = [_row(rule) for rule in by_rule([asdict(site) for site in lite.sites], lite.proven)]
    if rows:
        console.print_table(COLUMNS, rows)
    else:
        console.print_text("no rule matches anything")
    again = refitted([asdict(refit) for refit in lite.refits])
    if again is not None:
        console.print_text(again)
    for payoff in found:
        if payoff.after_ms is not None:
            console.print_text(
                f"{payoff.name}: {payoff.before_ms:.3g} ms -> {payoff.after_ms:.3g} ms alone, "
                f"saves {payoff.saved:.0%}"
            )


def _row(found: RuleSummary) -> list[str]:
    """A rule's line in the table."""
    naive = fitted = ""
    if found.fitted is not None:
        naive, fitted = f"{found.naive:.3f}", f"{found.fitted:.3f}"
    elif found.difference is not None:
        naive = f"exact ({found.difference:.0e})"
    counts = [str(found.places), str(found.done)]
    return [found.rule, *counts, naive, fitted, ", ".join(found.reasons)]
