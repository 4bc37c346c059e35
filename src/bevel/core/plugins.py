"""Everything chosen by name is discovered by file name: the file is the registration.

A plugin is a module. Its first docstring line is its description, which is read without importing
it, so `bevel list` stays fast. Third parties add plugins with an entry point in the group
`bevel.<kind>` (for example `bevel.criteria`) that names a module.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from bevel.core.errors import MissingDependencyError, UnknownNameError, suggestion

PACKAGES: Mapping[str, str] = {
    "datasets": "bevel.data.datasets",
    "criteria": "bevel.pruning.criteria",
    "allocators": "bevel.pruning.allocate",
    "runtimes": "bevel.runtimes",
    "devices": "bevel.devices",
    "rules": "bevel.surgery.rules",
}
"""The kinds of plugin, and the package whose files are bevel's own plugins of that kind."""

SINGULAR: Mapping[str, str] = {
    "datasets": "data set",
    "criteria": "criterion",
    "allocators": "allocator",
    "runtimes": "runtime",
    "devices": "device",
    "rules": "rule",
}


@dataclass(frozen=True)
class Plugin:
    """A plugin that was found but not yet imported."""

    kind: str
    name: str
    module: str

    @property
    def description(self) -> str:
        """First docstring line of the plugin's file, read without importing it."""
        if self.module == f"{PACKAGES[self.kind]}.{self.name}":
            path = _folder(PACKAGES[self.kind]) / f"{self.name}.py"
        else:
            spec = importlib.util.find_spec(self.module)
            if spec is None or spec.origin is None:
                return ""
            path = Path(spec.origin)
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        return text.splitlines()[0] if text else ""


def _folder(package: str) -> Path:
    """Where one of bevel's packages lies, found without importing it (most import torch)."""
    return Path(__file__).parents[1].joinpath(*package.split(".")[1:])


@cache
def _own(kind: str) -> Mapping[str, Plugin]:
    """Bevel's own plugins of a kind by name: its files."""
    package = PACKAGES[kind]
    names = sorted(path.stem for path in _folder(package).glob("*.py"))
    return {name: Plugin(kind, name, f"{package}.{name}") for name in names if name[0] != "_"}


@cache
def discover(kind: str) -> Mapping[str, Plugin]:
    """All plugins of a kind by name: bevel's own files first, then entry points."""
    found = dict(_own(kind))
    for point in entry_points(group=f"bevel.{kind}"):
        found.setdefault(point.name, Plugin(kind, point.name, point.value))
    return found


def find(kind: str, name: str) -> Plugin:
    """The plugin of that name.

    Raises:
        UnknownNameError: there is none; the message names the nearest and lists the rest.
    """
    # To look for entry points reads a file of every installed package: milliseconds.
    plugins = _own(kind) if name in _own(kind) else discover(kind)
    if name not in plugins:
        raise UnknownNameError(f"no {SINGULAR[kind]} called '{name}'. {suggestion(name, plugins)}")
    return plugins[name]


def load(kind: str, name: str) -> Any:
    """Import the plugin and return its module; callers annotate it with the kind's Protocol.

    Raises:
        UnknownNameError: there is no such plugin.
        MissingDependencyError: the plugin imports a package that is not installed.
    """
    plugin = find(kind, name)
    try:
        module: ModuleType = importlib.import_module(plugin.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "bevel":
            raise
        raise MissingDependencyError(
            f"the {SINGULAR[kind]} '{name}' needs the package '{error.name}', which is not "
            f"installed: pip install '{error.name}' or the bevel extra that carries it"
        ) from error
    return module
