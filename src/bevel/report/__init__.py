"""From a run's record to something a person reads: a table, Markdown, one HTML page. No torch."""

from bevel.report.page import html
from bevel.report.sections import warnings
from bevel.report.summary import COLUMNS, MEASURED, measured, rows, table
from bevel.report.text import markdown
from bevel.report.write import read, report, write

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
