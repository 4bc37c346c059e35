"""`bevel list`: what can be named in a recipe."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import bevel.cli.console as console
from bevel.core import plugins
from bevel.core.errors import UnknownNameError, suggestion

KINDS = ("models", *plugins.PACKAGES)

MODELS_ELSEWHERE = (
    "Also: torchvision:NAME (such as torchvision:resnet18), timm:NAME (such as "
    "timm:mobilenetv3_small_100; needs the extra 'timm') and path/to/file.py:factory."
)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("list")(list_)


def complete_kind(incomplete: str) -> list[str]:
    """Kinds that begin with what was typed."""
    return [kind for kind in KINDS if kind.startswith(incomplete)]


def completing(kind: str) -> dict[str, Any]:
    """The option's argument that completes plugin names of a kind."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        return [
            (name, plugin.description)
            for name, plugin in plugins.discover(kind).items()
            if name.startswith(incomplete)
        ]

    return {"autocompletion": complete}


def complete_model(incomplete: str) -> list[tuple[str, str]]:
    """bevel's own model names that begin with what was typed."""
    return [(name, text) for name, text in models() if name.startswith(incomplete)]


def models() -> list[tuple[str, str]]:
    """bevel's own models by name, with their descriptions."""
    from bevel.models import BUILTIN

    return [(f"bevel:{name}", text) for name, (_, text) in BUILTIN.items()]


def list_(
    kind: Annotated[
        str, typer.Argument(help=f"One of {', '.join(KINDS)}.", autocompletion=complete_kind)
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the models, data sets, criteria, ... that a recipe can name."""
    if kind not in KINDS:
        raise UnknownNameError(f"there is no list of '{kind}'. {suggestion(kind, KINDS)}")
    if kind == "models":
        found = models()
    else:
        found = [(name, plugin.description) for name, plugin in plugins.discover(kind).items()]
    if json:
        console.print_json({kind: [{"name": n, "description": text} for n, text in found]})
        return
    if found:
        console.print_list(found)
    else:
        console.print_text(f"No {kind} are installed.")
    if kind == "models":
        console.print_text(MODELS_ELSEWHERE)
    if kind == "datasets":
        console.print_text("Also: path/to/file.py:factory.")
