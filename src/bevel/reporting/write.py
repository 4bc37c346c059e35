"""The report's files in a run folder."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from bevel.core.errors import RunFolderError, one_line
from bevel.core.files import write_text
from bevel.core.records import RunRecord
from bevel.reporting.page import html
from bevel.reporting.text import markdown

RECORD = "run.json"
"""The record's name in its run folder."""


def write(record: RunRecord, folder: Path) -> None:
    """Write report.md and report.html into the folder, each atomically."""
    write_text(folder / "report.md", markdown(record))
    write_text(folder / "report.html", html(record))


def report(run_folder: Path | str) -> RunRecord:
    """Rewrite a run's report.md and report.html from its run.json, and return the record.

    Raises:
        RunFolderError: the folder holds no run.json that this version of bevel reads.
    """
    folder = Path(run_folder)
    record = read(folder)
    write(record, folder)
    return record


def read(folder: Path) -> RunRecord:
    """The record in a run folder.

    Raises:
        RunFolderError: there is none, or it is not one that this version of bevel reads.
    """
    path = folder / RECORD
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunFolderError(
            f"{folder} holds no run: expected {RECORD} in it, as 'bevel run' writes it"
        ) from error
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RunFolderError(
            f"{path} is not the record of a run: {where}: {one_line(first['msg'], 120)}"
        ) from error
