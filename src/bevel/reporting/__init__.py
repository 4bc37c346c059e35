"""From a run's record to something a person reads: a table, Markdown, one HTML page. No torch."""

from bevel.reporting.page import html
from bevel.reporting.sections import warnings
from bevel.reporting.summary import COLUMNS, MEASURED, measured, rows, table
from bevel.reporting.text import markdown
from bevel.reporting.write import read, report, write

__all__ = [
    "COLUMNS",
    "MEASURED",
    "html",
    "markdown",
    "measured",
    "read",
    "report",
    "rows",
    "table",
    "warnings",
    "write",
]
