"""`import bevel`: fast, without torch, and every public name where it should be."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import bevel


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


def seconds(imports: str) -> float:
    """Of the processor's time, which other work on the machine does not take; the best of three."""
    code = f"import time; s = time.process_time(); import {imports}; print(time.process_time() - s)"
    return min(float(python(code)) for _ in range(3))


def test_importing_bevel_is_fast_and_imports_no_torch() -> None:
    everything = "bevel, bevel.cli, bevel.reporting"
    dear = "{'torch', 'torchvision', 'onnxruntime', 'plotly', 'numpy', 'optuna'}"
    assert python(f"import sys, {everything}; print({dear} & set(sys.modules))") == "set()"
    # Machines differ by more than a limit in seconds allows for: the libraries are the yardstick.
    libraries = seconds("pydantic, typer, yaml, rich.console, rich.progress, jinja2")
    assert seconds(everything) < 4 * libraries
    assert seconds("bevel") < libraries / 3


@pytest.mark.parametrize("name", bevel.__all__)
def test_every_public_name_loads(name: str) -> None:
    value = getattr(bevel, name)
    assert callable(value)
    if not inspect.isclass(value):
        assert inspect.signature(value).parameters  # also of a folder that is a verb
    assert name in dir(bevel)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prunee'"):
        bevel.prunee  # noqa: B018


def test_editors_see_the_names_that_exist_at_run_time() -> None:
    tree = ast.parse(Path(bevel.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {
        name: (home.partition(":")[0], home.partition(":")[2] or name)
        for name, home in bevel._HOMES.items()
    }
    assert seen == homes
    assert sorted(bevel.__all__) == sorted(homes)


def test_no_folder_is_called_like_a_public_name() -> None:
    """Importing a subpackage binds it on `bevel`, over a public name that is spelled the same."""
    folders = {path.name for path in Path(bevel.__file__).parent.iterdir()}
    folders |= {path.stem for path in Path(bevel.__file__).parent.glob("*.py")}
    assert not folders & set(bevel.__all__)
