"""The runner as it is packed: small, the same every time, and of nothing that a device lacks."""

from __future__ import annotations

import ast
import io
import sys
import zipfile
from pathlib import Path

import pytest

import bevel
from bevel.core import plugins
from bevel.devices._bundle import SOURCES, bundle

PACKED = {f"bevel.{name.removesuffix('.py').replace('/', '.')}" for name in SOURCES}
OWN_PACKAGES = {  # of each runtime; a new runtime without a line here may import one of its name
    "eager": {"torch"},
    "executorch": {"executorch", "torch"},  # its wheel does not load without torch
    "litert": {"ai_edge_litert"},
}


def top_level_imports(path: Path) -> set[str]:
    """Modules imported when the file is, `if TYPE_CHECKING` apart."""
    found = set()
    pending = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in PACKED else str(node.module) for name in names}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += list(ast.iter_child_nodes(node))
    return found


def strangers(path: Path, allowed: set[str]) -> set[str]:
    imported = top_level_imports(path)
    known = sys.stdlib_module_names | allowed
    return {name for name in imported if name.split(".")[0] not in known} - PACKED


@pytest.mark.parametrize("name", sorted(plugins.own("runtimes")))
def test_a_runtimes_file_imports_only_what_its_device_has(name):
    path = plugins.find("runtimes", name).path
    assert strangers(path, {"numpy", *OWN_PACKAGES.get(name, {name})}) == set()


@pytest.mark.parametrize("name", SOURCES)
def test_what_goes_along_needs_nothing_that_is_installed(name):
    assert strangers(Path(bevel.__file__).parent / name, set()) == set()


def test_a_stranger_is_found(tmp_path):
    """The mutant check of the two tests above."""
    (tmp_path / "bad.py").write_text(
        "import os\nfrom bevel.core import errors, recipe\ntry:\n    import pydantic\n"
        "except ImportError:\n    pass\ndef later():\n    import torch\n"
    )
    assert strangers(tmp_path / "bad.py", set()) == {"bevel.core", "pydantic"}
    (tmp_path / "bad.py").write_text("from bevel.core.records import TensorSignature\n")
    assert strangers(tmp_path / "bad.py", set()) == {"bevel.core.records"}


def test_the_bundle_is_the_same_every_time_and_holds_every_runtime():
    from bevel.devices import _bundle

    _bundle._bundle.cache_clear()
    first = bundle()
    _bundle._bundle.cache_clear()
    assert bundle(["onnxruntime"]) == first
    members = set(zipfile.ZipFile(io.BytesIO(first)).namelist())
    assert "bevel/runtimes/onnxruntime.py" in members
    assert "bevel/runtimes/__init__.py" in members
    assert not any("_onnx_file" in name for name in members)
