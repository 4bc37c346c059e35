"""bevel package: a finished run as a kit for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import bevel.cli.console as console
from bevel.cli.runs import Json


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command()(package)


def package(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The zip to write.")],
    target: Annotated[
        str | None,
        typer.Option(
            metavar="RUNTIME[:PRECISION][@DEVICE]",
            help="Which file. Default, and without a precision: the one that the report ships.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Pack a run's file for the device, with a program that classifies images there.

    The program needs Python 3.9, numpy, Pillow and the runtime.
    """
    from bevel.packaging import package as pack

    with console.working(quiet_stdout=json):
        kit = pack(run, out, target=target)
    file = kit.meta.artifact
    if json:
        console.print_json(
            {"file": str(kit.path), "size_bytes": kit.path.stat().st_size}
            | {"meta": kit.meta.model_dump(mode="json", by_alias=True)}
        )
        return
    console.print_text(
        f"{kit.path}: {file.file} ({file.runtime} {file.precision}), meta.json, run.py, README.md"
    )
    console.say("on the device: unzip it, follow README.md, then: python3 run.py --check")
