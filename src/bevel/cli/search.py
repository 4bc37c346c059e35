"""The commands that try many recipes: search, compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import bevel.cli.console as console
from bevel.cli.runs import Json, RecipeFile, Set
from bevel.core import recipe as recipes

if TYPE_CHECKING:
    from bevel.searching import SearchRecord

Jobs = Annotated[
    int,
    typer.Option(min=1, help="Trials at once, each in its own process with its share of threads."),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", help="Carry trials out on this Ray cluster; 'local' starts one here."
    ),
]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for command in (search,):
        app.command()(command)


def search(
    recipe: RecipeFile,
    overrides: Set = None,
    trials: Annotated[int, typer.Option(min=1, help="How many in all; finished ones count.")] = 20,
    jobs: Jobs = 1,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Database of the trials. Default: SQLite in the folder."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The search's folder. Default: runs/NAME-search.")
    ] = None,
    ray: Ray = None,
    json: Json = False,
) -> None:
    """Try values of the recipe's section 'search', and print the Pareto front.

    Accuracy is on validation images. A search that was stopped continues where it was.
    """
    loaded = recipes.load(recipe, tuple(overrides or ()))
    from bevel import searching

    with console.working(quiet_stdout=json):
        record = searching.search(
            loaded, trials=trials, out=out, jobs=jobs, storage=storage, ray=ray
        )
    _show(record, json=json)
    folder = out or Path("runs") / f"{loaded.name}-search"
    console.say(f"charts: {folder / 'front.html'}; recipes of the front: {folder / 'front'}")


def _show(record: SearchRecord, *, json: bool) -> None:
    """A search's front on stdout."""
    from bevel.searching.results import failures, front_table

    if json:
        console.print_json(record.model_dump(mode="json"))
    else:
        columns, rows = front_table(record)
        title = (
            f"{record.recipe['name']}: {len(rows)} of {len(record.trials)} trials are on the front"
        )
        console.print_table(columns, rows, title=title)
    for line in failures(record):
        console.say(line)
