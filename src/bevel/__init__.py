"""bevel cuts a trained PyTorch vision network down for embedded devices, and proves it still works.

The public verbs and nouns. Each is loaded on first use, so importing bevel imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bevel.core.errors import BevelError
    from bevel.core.recipe import Recipe
    from bevel.core.recipe import load as load_recipe
    from bevel.core.records import Artifact, Measurement, RunRecord
    from bevel.data import load as load_data
    from bevel.finetuning.train import finetune
    from bevel.graph.attributes import register_resizer
    from bevel.graph.couplings import analyze
    from bevel.measurement.bench import measure
    from bevel.measurement.doctor import diagnose
    from bevel.models import build as build_model
    from bevel.models.fading import fade, settle
    from bevel.packaging import package
    from bevel.pipeline.running import explain, run
    from bevel.pipeline.within import plan_within
    from bevel.pruning.apply import load_pruned, prune, save_pruned
    from bevel.pruning.plan import PruningPlan
    from bevel.pruning.planning import plan_pruning
    from bevel.pruning.verify import verify_pruning
    from bevel.reporting import report
    from bevel.rewriting.apply import surgery
    from bevel.rewriting.reconstruction import reconstruct
    from bevel.rewriting.rule import rule as surgery_rule
    from bevel.runtimes import export
    from bevel.searching import compare, search

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
    "compare",
    "diagnose",
    "explain",
    "export",
    "fade",
    "finetune",
    "load_data",
    "load_pruned",
    "load_recipe",
    "measure",
    "package",
    "plan_pruning",
    "plan_within",
    "prune",
    "reconstruct",
    "register_resizer",
    "report",
    "run",
    "save_pruned",
    "search",
    "settle",
    "surgery",
    "surgery_rule",
    "verify_pruning",
]

_HOMES = {
    "Artifact": "bevel.core.records",
    "BevelError": "bevel.core.errors",
    "Measurement": "bevel.core.records",
    "PruningPlan": "bevel.pruning.plan",
    "Recipe": "bevel.core.recipe",
    "RunRecord": "bevel.core.records",
    "analyze": "bevel.graph.couplings",
    "build_model": "bevel.models:build",
    "compare": "bevel.searching",
    "diagnose": "bevel.measurement.doctor",
    "explain": "bevel.pipeline.running",
    "export": "bevel.runtimes",
    "fade": "bevel.models.fading",
    "finetune": "bevel.finetuning.train",
    "load_data": "bevel.data:load",
    "load_pruned": "bevel.pruning.apply",
    "load_recipe": "bevel.core.recipe:load",
    "measure": "bevel.measurement.bench",
    "package": "bevel.packaging",
    "plan_pruning": "bevel.pruning.planning",
    "plan_within": "bevel.pipeline.within",
    "prune": "bevel.pruning.apply",
    "reconstruct": "bevel.rewriting.reconstruction",
    "register_resizer": "bevel.graph.attributes",
    "report": "bevel.reporting",
    "run": "bevel.pipeline.running",
    "save_pruned": "bevel.pruning.apply",
    "search": "bevel.searching",
    "settle": "bevel.models.fading",
    "surgery": "bevel.rewriting.apply",
    "surgery_rule": "bevel.rewriting.rule:rule",
    "verify_pruning": "bevel.pruning.verify",
}
"""Where each public name lives: its module, and its name there where that differs."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bevel' has no attribute '{name}'")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
