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
    "rules": "bevel.rewriting.rules",
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
        try:
            source = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        text = ast.get_docstring(ast.parse(source))
        return text.splitlines()[0] if text else ""

    @property
    def path(self) -> Path:
        """The plugin's file.

        Raises:
            FileNotFoundError: an installed package names a module that is not there.
        """
        package, _, stem = self.module.rpartition(".")
        if package == PACKAGES[self.kind]:
            return _folder(package) / f"{stem}.py"
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(self.module)
        return Path(spec.origin)


def _folder(package: str) -> Path:
    """Where one of bevel's packages lies, found without importing it (most import torch)."""
    return Path(__file__).parents[1].joinpath(*package.split(".")[1:])


@cache
def own(kind: str) -> Mapping[str, Plugin]:
    """Bevel's own plugins of a kind by name: its files."""
    package = PACKAGES[kind]
    stems = sorted(path.stem for path in _folder(package).glob("*.py"))
    # A device's name is the beginning of an address, where words are joined by dashes.
    names = {s: s.replace("_", "-") if kind == "devices" else s for s in stems if s[0] != "_"}
    return {name: Plugin(kind, name, f"{package}.{stem}") for stem, name in names.items()}


@cache
def discover(kind: str) -> Mapping[str, Plugin]:
    """All plugins of a kind by name: bevel's own files first, then entry points."""
    found = dict(own(kind))
    for point in entry_points(group=f"bevel.{kind}"):
        found.setdefault(point.name, Plugin(kind, point.name, point.value))
    return found


def find(kind: str, name: str) -> Plugin:
    """The plugin of that name.

    Raises:
        UnknownNameError: there is none; the message names the nearest and lists the rest.
    """
    # To look for entry points reads a file of every installed package: milliseconds.
    plugins = own(kind) if name in own(kind) else discover(kind)
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
