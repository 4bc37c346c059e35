"""Networks by name, and checkpoints. Importing this package imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bevel.models.catalog import BUILTIN, build

if TYPE_CHECKING:
    from bevel.models.checkpoint import load_checkpoint

__all__ = ["BUILTIN", "build", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    if name == "load_checkpoint":
        from bevel.models.checkpoint import load_checkpoint

        return load_checkpoint
    raise AttributeError(f"module 'bevel.models' has no attribute '{name}'")
