"""The runner as one zip file that any Python with numpy and the runtime can run.

It is made of bevel's own sources: the runner, the runtimes' files and the few core modules that
these need. So a session is written once, and runs the same on every device.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from bevel.core import plugins

SOURCES = (
    "core/errors.py",
    "core/hardware.py",
    "core/quiet.py",
    "core/signature.py",
    "measurement/runner.py",
)
"""What goes along, relative to the package. These, and the top level of a runtime's file, import
the standard library, numpy, the runtime's own package and each other, nothing else."""

PACKAGES = ("", "core/", "measurement/", "runtimes/")
MAIN = "from bevel.measurement.runner import run\n\nrun()\n"
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every member, so that the same sources make the same bytes."""

LEAST_PYTHON = (3, 10)
"""What these sources need."""


def bundle(runtimes: Iterable[str] = ()) -> bytes:
    """The runner with bevel's own runtimes and those that are named.

    Raises:
        UnknownNameError: there is no such runtime.
    """
    names = {*plugins.own("runtimes"), *runtimes}
    return _bundle(frozenset(names))


@cache
def _bundle(runtimes: frozenset[str]) -> bytes:
    root = Path(__file__).parents[1]
    members = {"__main__.py": MAIN}
    members |= {f"bevel/{package}__init__.py": "" for package in PACKAGES}
    members |= {f"bevel/{name}": (root / name).read_text(encoding="utf-8") for name in SOURCES}
    for name in runtimes:
        source = plugins.find("runtimes", name).path
        members[f"bevel/runtimes/{name}.py"] = source.read_text(encoding="utf-8")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in sorted(members.items()):
            archive.writestr(zipfile.ZipInfo(name, EPOCH), text)
    return buffer.getvalue()


def runtimes_of(job: Mapping[str, Any]) -> set[str]:
    """The runtimes that a job names."""
    named = {job.get("runtime"), *(subject["runtime"] for subject in job.get("subjects", ()))}
    return {name for name in named if name is not None}
