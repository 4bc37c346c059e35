"""A runtime that does what a test tells it, packed and run as any other."""

from __future__ import annotations

from pathlib import Path

from bevel.core import plugins

TOP = """
import json, os, pathlib, subprocess, sys, time

from bevel.core.errors import MeasurementError

def version():
    return "stand-in 1.0"

def open_session(path, threads):
"""


def install(monkeypatch, folder: Path, body: str) -> str:
    """Make a runtime whose `open_session(path, threads)` has this body; its name."""
    source = folder / "bevel_stand_in.py"
    source.write_text(TOP + "".join(f"    {line}\n" for line in body.splitlines()))
    monkeypatch.syspath_prepend(str(folder))
    real = plugins.discover
    found = {"stand_in": plugins.Plugin("runtimes", "stand_in", "bevel_stand_in")}
    monkeypatch.setattr(
        plugins, "discover", lambda kind: found if kind == "runtimes" else real(kind)
    )
    # The bundle is made anew, whatever a test before packed under this name.
    from bevel.devices import _bundle

    _bundle._bundle.cache_clear()
    return "stand_in"


def memory_job(runtime: str, file: str = "artifact") -> dict:
    return {"task": "memory", "subjects": [{"runtime": runtime, "file": file}]}
