"""The report as one HTML page that needs nothing else: script, style and data are inside."""

from __future__ import annotations

import json
from importlib.resources import files

import jinja2
import yaml
from markupsafe import Markup

import bevel.reporting.diagnosis as doctor
import bevel.reporting.sections as sections
from bevel.core.records import RunRecord
from bevel.reporting.charts import charts
from bevel.reporting.summary import COLUMNS, table


def html(record: RunRecord) -> str:
    """The whole report as a self-contained page (about 5 MB: it carries Plotly's script)."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("bevel.reporting").joinpath("page.html.j2").read_text(encoding="utf-8")
    figures = charts(record)
    return environment.from_string(source).render(
        name=record.recipe.get("name", "run"),
        headline=sections.headline(record),
        columns=COLUMNS,
        table=table(record),
        sections=sections,
        doctor=doctor,
        record=record,
        charts=list(figures),
        figures=_script_data(figures),
        plotly=Markup(_plotly_script()) if figures else "",  # noqa: S704  (plotly's own file)
        recipe=yaml.safe_dump(record.recipe, sort_keys=False, allow_unicode=True),
    )


def _script_data(value: object) -> Markup:
    """JSON that cannot end the script element it stands in, whatever names it holds."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character, escape in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(character, escape)
    return Markup(text)  # noqa: S704  (escaped above)


def _plotly_script() -> str:
    """The minified Plotly script that the package ships, with nothing fetched from anywhere."""
    return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
