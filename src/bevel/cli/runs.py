"""The commands about recipes and runs: run, init, explain, report, schema."""

from __future__ import annotations

import json as json_
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

import bevel.cli.console as console
from bevel.core import recipe as recipes
from bevel.core.errors import RecipeError
from bevel.core.files import write_text
from bevel.core.records import RunRecord

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe, such as data.root=DIR or steps.finetune.epochs=4. "
        "May be repeated.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for command in (run, init, explain, report, schema):
        app.command()(command)


def run(
    recipe: RecipeFile,
    overrides: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/NAME, by the recipe's name.")
    ] = None,
    leading: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="A run of another recipe: its finished first steps that this recipe has too are "
            "taken over.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Do everything a recipe says, and report original against compressed.

    A run that was stopped continues where it was; a finished one only prints its table.
    """
    loaded = recipes.load(recipe, tuple(overrides or ()))  # mistakes show before torch loads
    from bevel.pipeline import running

    with console.working(quiet_stdout=json):
        record = running.run(loaded, out=out, leading=leading)
    _show(record, json=json)
    console.say(f"report: {(out or Path('runs') / loaded.name) / 'report.html'}")


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    json: Json = False,
) -> None:
    """Rewrite a run's report.md and report.html, and print its table."""
    from bevel.reporting import report as rewrite

    record = rewrite(folder)
    _show(record, json=json)
    console.say(f"report: {folder / 'report.html'}")


def _show(record: RunRecord, *, json: bool) -> None:
    """A run's result on stdout."""
    from bevel.reporting import COLUMNS, table, warnings

    if json:
        console.print_json(record.model_dump(mode="json"))
        return
    console.print_table(COLUMNS, table(record), title=str(record.recipe.get("name", "")))
    for warning in warnings(record):
        console.say(f"warning: {warning}")
    for shipment in record.shipments:
        console.say(f"ship for {shipment.target}: {shipment.path} ({shipment.reason})")


def explain(recipe: RecipeFile, overrides: Set = None, json: Json = False) -> None:
    """Say what a run would do, without training.

    What can be pruned and what not and why, and what each stage costs.
    """
    loaded = recipes.load(recipe, tuple(overrides or ()))
    from bevel.pipeline import running

    with console.working(quiet_stdout=json):
        found = running.explain(loaded)
    if json:
        console.print_json(found.model_dump(mode="json"))
    else:
        console.print_text(str(found))


def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file.")] = False,
) -> None:
    """Write a starter recipe with comments."""
    if path.exists() and not force:
        raise RecipeError(f"{path} exists; give another path, or --force to overwrite it")
    write_text(path, files("bevel.cli").joinpath("starter.yaml").read_text(encoding="utf-8"))
    console.say(f"wrote {path}; now: bevel explain {path}, then: bevel run {path}")


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    console.print_text(json_.dumps(recipes.Recipe.model_json_schema(), indent=1))
