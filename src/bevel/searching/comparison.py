"""A comparison's results as tables: each cell over the seeds, and who is ahead of whom."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from bevel.core.files import write_json, write_text
from bevel.reporting.summary import NONE, count, milliseconds, size
from bevel.reporting.text import bullets, markdown_table
from bevel.searching.records import Cell, Comparison
from bevel.searching.space import described, label, short_names

Table = tuple[list[str], list[list[str]]]


def cells_table(found: Comparison) -> Table:
    """Headings and rows: one row per cell, mean and sample standard deviation over the seeds."""
    keys = list(found.cells[0].values)
    names = short_names(keys)
    tested = ["test accuracy"] if found.split == "test" else []
    columns = [
        *(names[key] for key in keys),
        "validation accuracy",
        *tested,
        "MACs",
        "latency p50, ms",
        "size",
        "seeds",
    ]
    return columns, [_row(cell, tested=bool(tested)) for cell in found.cells]


def _row(cell: Cell, *, tested: bool) -> list[str]:
    def column(name: str, text: Callable[[float], str]) -> str:
        numbers = [getattr(outcome, name) for outcome in cell.outcomes]
        return spread([number for number in numbers if number is not None], text)

    done = sum(outcome.accuracy is not None for outcome in cell.outcomes)
    return [
        *(label(value) for value in cell.values.values()),
        column("accuracy", _percent),
        *([column("test_accuracy", _percent)] if tested else []),
        column("macs", count),
        column("latency_ms", milliseconds),
        column("size_bytes", size),
        str(done) if done == len(cell.outcomes) else f"{done} of {len(cell.outcomes)}",
    ]


def spread(numbers: Sequence[float], text: Callable[[float], str]) -> str:
    """Mean and sample standard deviation; the mean alone where nothing varies or is alone."""
    if not numbers:
        return NONE
    mean = text(statistics.fmean(numbers))
    if len(numbers) < 2 or min(numbers) == max(numbers):
        return mean
    return f"{mean} +- {text(statistics.stdev(numbers))}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def duels_table(found: Comparison) -> Table:
    """Headings and rows: wins - losses (ties) of the row's value against each column's."""
    names = list(dict.fromkeys(label(cell.values[found.compared]) for cell in found.cells))
    score = {(duel.one, duel.other): (duel.wins, duel.losses, duel.ties) for duel in found.duels}
    score |= {(duel.other, duel.one): (duel.losses, duel.wins, duel.ties) for duel in found.duels}
    rows = []
    for one in names:
        row = [one]
        for other in names:
            wins, losses, ties = score.get((one, other), (0, 0, 0))
            row.append(NONE if one == other else f"{wins} - {losses}" + f" ({ties})" * bool(ties))
        rows.append(row)
    key = short_names([found.compared])[found.compared]
    return [f"{key}: ahead - behind (equal)", *names], rows


def failures(found: Comparison) -> list[str]:
    """A line for each run that failed."""
    return [
        f"{described(cell.values)}, seed {outcome.seed} failed: {outcome.reason}"
        for cell in found.cells
        for outcome in cell.outcomes
        if outcome.reason
    ]


def markdown(found: Comparison) -> str:
    """Both tables as GitHub-flavoured Markdown."""
    seeds = ", ".join(map(str, found.seeds))
    about = f"Mean +- sample standard deviation over the seeds {seeds}."
    counted = f"Counted over all settings and seeds, by {found.split} accuracy."
    blocks = [
        f"# bevel compare: {found.recipe['name']}",
        about,
        markdown_table(*cells_table(found)),
        counted,
        markdown_table(*duels_table(found)),
    ]
    failed = failures(found)
    blocks += ["## Failed", bullets(failed)] if failed else []
    return "\n\n".join(blocks) + "\n"


def write(found: Comparison, folder: Path) -> None:
    """Write compare.json and compare.md into the comparison's folder, each atomically."""
    write_json(folder / "compare.json", found.model_dump(mode="json"))
    write_text(folder / "compare.md", markdown(found))
