"""The commands that try many recipes: search, compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

import bevel.cli.console as console
from bevel.cli.runs import Json, RecipeFile, Set
from bevel.core import recipe as recipes
from bevel.core.errors import SearchError, one_line

if TYPE_CHECKING:
    from bevel.searching import Comparison, SearchRecord

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
    for command in (search, compare):
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
    _show_search(record, json=json)
    folder = out or Path("runs") / f"{loaded.name}-search"
    console.say(f"charts: {folder / 'front.html'}; recipes of the front: {folder / 'front'}")


def _show_search(record: SearchRecord, *, json: bool) -> None:
    """A search's front on stdout."""
    from bevel.searching.results import failures, front_table

    if json:
        console.print_json(record.model_dump(mode="json"))
    else:
        columns, rows = front_table(record)
        title = f"{record.recipe['name']}: the front, {len(rows)} of {len(record.trials)} trials"
        console.print_table(columns, rows, title=title)
    for line in failures(record):
        console.say(line)


def compare(
    recipe: RecipeFile,
    vary: Annotated[
        list[str],
        typer.Option(
            "--vary",
            metavar="KEY=VALUE,VALUE",
            help="Values of a key, such as steps.prune.criterion=l1,l2,random. May be repeated; "
            "those of the first compete.",
        ),
    ],
    overrides: Set = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from the recipe's own.")] = 3,
    jobs: Jobs = 1,
    test: Annotated[
        bool, typer.Option("--test", help="Look at the test images too, once, after all runs.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="The comparison's folder. Default: runs/NAME-compare.")
    ] = None,
    ray: Ray = None,
    json: Json = False,
) -> None:
    """Carry a grid of values out with the same seeds: mean +- std, and who is ahead how often.

    Accuracy is on validation images. A comparison that was stopped continues where it was.
    """
    loaded = recipes.load(recipe, tuple(overrides or ()))
    varied = dict(map(_varied, vary))
    if len(varied) < len(vary):
        raise SearchError("--vary: a key is there twice; give all its values at once")
    from bevel import searching

    with console.working(quiet_stdout=json):
        found = searching.compare(
            loaded, varied, seeds=seeds, out=out, jobs=jobs, ray=ray, test=test
        )
    _show_comparison(found, json=json)
    console.say(f"table: {(out or Path('runs') / f'{loaded.name}-compare') / 'compare.md'}")


def _varied(text: str) -> tuple[str, list[Any]]:
    """The key and the values of one --vary.

    Raises:
        SearchError: it is no KEY=VALUE,VALUE.
    """
    key, equals, values = text.partition("=")
    if not equals or not key:
        raise SearchError(f"--vary {text}: expected KEY=VALUE,VALUE such as steps.prune.align=4,8")
    try:
        parsed = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError as error:
        raise SearchError(f"--vary {text}: no list of values: {one_line(error)}") from error
    if not isinstance(parsed, list) or not parsed:
        raise SearchError(f"--vary {text}: there is no value; expected KEY=VALUE,VALUE")
    return key, parsed


def _show_comparison(found: Comparison, *, json: bool) -> None:
    """A comparison's tables on stdout."""
    from bevel.searching.comparison import cells_table, duels_table, failures

    if json:
        console.print_json(found.model_dump(mode="json"))
    else:
        seeds = ", ".join(map(str, found.seeds))
        title = f"{found.recipe['name']}: mean +- std over the seeds {seeds}"
        console.print_table(*cells_table(found), title=title)
        counted = f"by {found.split} accuracy, over all settings and seeds"
        console.print_table(*duels_table(found), title=counted)
    for line in failures(found):
        console.say(line)
