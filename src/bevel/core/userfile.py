"""A user's own Python files, and functions named as `path/to/file.py:function`. No torch."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from bevel.core.errors import BevelError, UnknownNameError, one_line, suggestion

FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a mistake in a user's file usually raises; anything else keeps its traceback."""


def is_user_function(name: str) -> bool:
    """Whether the name has the form `file.py:function`."""
    path, colon, _ = name.rpartition(":")
    return bool(colon) and path.endswith(".py")


def load_function(name: str, error: type[BevelError]) -> Callable[..., Any]:
    """The function that `path/to/file.py:function` names.

    A relative path starts at the working folder.

    Args:
        name: file and function, with a colon between them.
        error: what to raise if the file cannot be imported.

    Raises:
        UnknownNameError: there is no such file, or no such function in it.
        error: the file fails while it is imported.
    """
    text, _, function = name.rpartition(":")
    path, module = Path(text).expanduser(), load_file(text, error)
    found = getattr(module, function, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if _defined_here(value, module)]
        raise UnknownNameError(f"no function '{function}' in {path}. {suggestion(function, own)}")
    return found  # type: ignore[no-any-return]


def call(
    function: Callable[..., Any], name: str, arguments: Mapping[str, Any], error: type[BevelError]
) -> Any:
    """Call a user's function with keyword arguments; its own faults become one line.

    Raises:
        error: the arguments do not fit the function, or it fails.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a callable written in C tells no signature
        signature = None
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as problem:
            takes = ", ".join(signature.parameters) or "none"
            raise error(
                f"{name} does not take the arguments given: {problem}; it takes {takes}; "
                f"got {', '.join(arguments) or 'none'}"
            ) from problem
    try:
        return function(**arguments)
    except FAULTS as problem:
        raise error(f"{name} failed: {type(problem).__name__}: {one_line(problem)}") from problem


def load_file(name: str, error: type[BevelError]) -> ModuleType:
    """A user's file as a module; a relative path starts at the working folder.

    Raises:
        UnknownNameError: there is no such file.
        error: the file fails while it is imported.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        near = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UnknownNameError(
            f"no file {path} (looked in {Path.cwd()}). {suggestion(path.name, near)}"
        )
    return _import(path.resolve(), error)


def _import(path: Path, error: type[BevelError]) -> ModuleType:
    """Import a file under a name made of its path and content: no clash, and no second import."""
    digest = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:16]
    unique = f"bevel_user_{digest}"
    if unique in sys.modules:
        return sys.modules[unique]
    spec = importlib.util.spec_from_file_location(unique, path)
    if spec is None or spec.loader is None:
        raise error(f"{path} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    # Registered first: dataclasses and pickling look a class's module up by name.
    sys.modules[unique] = module
    try:
        spec.loader.exec_module(module)
    except FAULTS as problem:
        del sys.modules[unique]
        raise error(
            f"{path} fails on import: {type(problem).__name__}: {one_line(problem)}"
        ) from problem
    return module


def _defined_here(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__
