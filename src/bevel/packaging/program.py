"""`run.py`, put together for one runtime."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

from bevel.core.errors import MeasurementError

PARTS = Path(__file__).with_name("on_device")
PLACE = "from bevel.packaging.on_device.sessions.onnxruntime import Session\n"
"""The line of the template that gives way to the session of the runtime."""


def runtimes() -> list[str]:
    """The runtimes that `run.py` can serve."""
    return sorted(path.stem for path in (PARTS / "sessions").glob("[!_]*.py"))


def program(runtime: str) -> str:
    """The source of `run.py` for a runtime; it imports nothing of bevel.

    Raises:
        MeasurementError: there is no session for that runtime.
    """
    if runtime not in runtimes():
        raise MeasurementError(
            f"no run.py can be made for the runtime '{runtime}'; it serves {', '.join(runtimes())}"
        )
    template = (PARTS / "run.py").read_text(encoding="utf-8")
    return template.replace(PLACE, "\n" + _session(runtime))


def package_of(runtime: str) -> str:
    """What pip installs for a runtime."""
    module = importlib.import_module(f"bevel.packaging.on_device.sessions.{runtime}")
    return str(module.PACKAGE)


def _session(runtime: str) -> str:
    """The class in a session's file, as it is written there."""
    source = (PARTS / "sessions" / f"{runtime}.py").read_text(encoding="utf-8")
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef))
    text = ast.get_source_segment(source, node)
    return f"{text}\n"
