"""bevel cuts a trained PyTorch vision network down for embedded devices, and proves it still works.

The public verbs and nouns. Each is loaded on first use, so importing bevel imports no torch.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bevel.core.errors import BevelError
    from bevel.core.recipe import Recipe
    from bevel.core.recipe import load as load_recipe
    from bevel.core.records import Artifact, Measurement, RunRecord
    from bevel.data import load as load_data
    from bevel.finetune.train import finetune
    from bevel.graph.couplings import analyze
    from bevel.measure.bench import measure
    from bevel.models import build as build_model
    from bevel.pipeline import explain, run
    from bevel.prune.apply import load_pruned, prune, save_pruned
    from bevel.prune.plan import PruningPlan
    from bevel.prune.planning import plan_pruning
    from bevel.prune.verify import verify_pruning
    from bevel.report import report
    from bevel.runtimes import export

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "BevelError",
    "Measurement",
    "PruningPlan",
    "Recipe",
    "RunRecord",
    "analyze",
    "build_model",
    "explain",
    "export",
    "finetune",
    "load_data",
    "load_pruned",
    "load_recipe",
    "measure",
    "plan_pruning",
    "prune",
    "report",
    "run",
    "save_pruned",
    "verify_pruning",
]

_HOMES = {
    "Artifact": "bevel.core.records",
    "BevelError": "bevel.core.errors",
    "Measurement": "bevel.core.records",
    "PruningPlan": "bevel.prune.plan",
    "Recipe": "bevel.core.recipe",
    "RunRecord": "bevel.core.records",
    "analyze": "bevel.graph.couplings",
    "build_model": "bevel.models:build",
    "explain": "bevel.pipeline",
    "export": "bevel.runtimes",
    "finetune": "bevel.finetune.train",
    "load_data": "bevel.data:load",
    "load_pruned": "bevel.prune.apply",
    "load_recipe": "bevel.core.recipe:load",
    "measure": "bevel.measure.bench",
    "plan_pruning": "bevel.prune.planning",
    "prune": "bevel.prune.apply",
    "report": "bevel.report",
    "run": "bevel.pipeline",
    "save_pruned": "bevel.prune.apply",
    "verify_pruning": "bevel.prune.verify",
}
"""Where each public name lives: its module, and its name there where that differs."""


def _public(name: str) -> Any:
    """Import the home of a public name and return what it names."""
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bevel' has no attribute '{name}'")
    value = _public(name)
    # Importing the home of `prune` has bound the folder of that name: it is the verb, see below.
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Verb(ModuleType):
    """A stage's folder that is its verb too: `bevel.prune(net, plan)` and `bevel.prune.plan`.

    Python binds an imported subpackage on its parent under the folder's name, over whatever was
    there. Some stages (prune, finetune, measure, report) are called like their verb, so the folder
    itself is made callable; both ways to use the name work, in any order of imports.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _public(self.__name__.rpartition(".")[2])(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_public(self.__name__.rpartition(".")[2]))


class _Package(ModuleType):
    """This package: makes the folders that are called like a verb callable as they are bound."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
