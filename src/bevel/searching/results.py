"""A search's results: the front as a table, as a page of charts, and as recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.io
import yaml

from bevel.core.files import write_json, write_text
from bevel.core.recipe import Recipe, vary
from bevel.reporting.charts import AFTER, BEFORE, Figure, figure
from bevel.searching.objectives import OBJECTIVES
from bevel.searching.records import SearchRecord, TrialRecord
from bevel.searching.space import described, label, short_names


def front_table(record: SearchRecord) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the front: varied values, objectives, run folder."""
    keys = list(record.trials[0].values)
    names = short_names(keys)
    columns = [
        "trial",
        *(names[key] for key in keys),
        *(OBJECTIVES[name].title for name in record.objectives),
        "run folder",
    ]
    rows = [
        [
            str(trial.number),
            *(_short(trial.values[key]) for key in keys),
            *(OBJECTIVES[name].text(value) for name, value in trial.objectives.items()),
            trial.folder,
        ]
        for trial in on_front(record)
    ]
    return columns, rows


def on_front(record: SearchRecord) -> list[TrialRecord]:
    """The trials of the front, in its order."""
    return [record.trials[number] for number in record.front]


def failures(record: SearchRecord) -> list[str]:
    """A line for each trial that failed."""
    return [
        f"trial {trial.number} ({described(trial.values)}) failed: {trial.reason}"
        for trial in record.trials
        if trial.state == "failed"
    ]


def write(record: SearchRecord, folder: Path) -> None:
    """Write search.json, front.html and front/NN.yaml into the search's folder, each atomically."""
    write_json(folder / "search.json", record.model_dump(mode="json"))
    base = Recipe.model_validate(record.recipe)
    written = set()
    for position, trial in enumerate(on_front(record)):
        varied = vary(base, trial.values).model_copy(
            update={"name": f"{base.name}-{trial.number:04d}"}
        )
        path = folder / "front" / f"{position:02d}.yaml"
        raw = varied.model_dump(mode="json", exclude={"search"})
        write_text(path, yaml.safe_dump(raw, sort_keys=False))
        written.add(path)
    for path in folder.glob("front/*.yaml"):
        if path not in written:
            path.unlink()  # of a front that was longer
    if record.front:
        write_text(folder / "front.html", _page(record))


def _page(record: SearchRecord) -> str:
    """One self-contained page with every chart; Plotly's script is inside once."""
    parts = [
        plotly.io.to_html(chart, full_html=False, include_plotlyjs=position == 0, validate=False)
        for position, chart in enumerate(_charts(record))
    ]
    head = '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
    title = f"<title>bevel search: {record.recipe['name']}</title></head>"
    return "\n".join([head + title, "<body>", *parts, "</body>", "</html>", ""])


def _charts(record: SearchRecord) -> list[Figure]:
    """The first objective against each of the others, or over the trials where it is alone."""
    first, *others = record.objectives
    finished = [trial for trial in record.trials if trial.state == "finished"]
    groups = (
        ("other trials", BEFORE, [t for t in finished if t.number not in record.front]),
        ("Pareto front", AFTER, on_front(record)),
    )
    charts = []
    for other in others or (None,):
        data = [_points(name, colour, group, first, other) for name, colour, group in groups]
        x = OBJECTIVES[other].title if other else "trial"
        title = f"{record.recipe['name']}: {OBJECTIVES[first].title} and {x}"
        charts.append(figure(data, title, x=x, y=OBJECTIVES[first].title, height=460))
    return charts


def _points(
    name: str, colour: str, trials: list[TrialRecord], first: str, other: str | None
) -> dict[str, Any]:
    """One group of trials as markers that tell their values."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [trial.objectives[other] if other else trial.number for trial in trials],
        "y": [trial.objectives[first] for trial in trials],
        "text": [f"trial {trial.number}: {described(trial.values)}" for trial in trials],
        "marker": {"color": colour, "size": 10},
    }


def _short(value: Any) -> str:
    """A value for a table cell."""
    return f"{value:.4g}" if isinstance(value, float) else label(value)
