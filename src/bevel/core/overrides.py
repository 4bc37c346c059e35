"""Values set at dotted keys of a plain mapping: `steps.prune.align=16`."""

from __future__ import annotations

from typing import Any

import yaml

from bevel.core.errors import RecipeError, one_line


def override(raw: dict[str, Any], text: str) -> None:
    """Set one `KEY=VALUE` of the option --set in place; the value is YAML.

    Raises:
        RecipeError: it is no such text, or the key leads nowhere.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text}: expected KEY=VALUE, such as data.root=/data/cifar10")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"--set {text}: the value is not valid YAML: {one_line(error)}"
        ) from error
    assign(raw, key, parsed, f"--set {text}")


def assign(raw: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set one dotted key in place. A step of a list is also addressed by its verb.

    Raises:
        RecipeError: the key leads nowhere; says so after `source`.
    """
    parts = key.split(".")
    node: Any = raw
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth]) or "the recipe"
        index: str | int = part
        if isinstance(node, list):
            index = _list_index(node, part, source, where)
        elif not isinstance(node, dict):
            raise RecipeError(f"{source}: {where} is a value, it has no key '{part}'")
        if depth == len(parts) - 1:
            by_verb = isinstance(node, list) and not part.isdigit()
            node[index] = {part: value} if by_verb else value
        elif isinstance(index, str):
            if node.get(index) is None:
                node[index] = {}
            node = node[index]
        elif part.isdigit():
            node = node[index]
        else:  # a step by its verb: stay on the one-key mapping's value
            node = node[index][part]


def _list_index(items: list[Any], part: str, source: str, where: str) -> int:
    """Position that `part` (an index, or the verb of the only such step) means in a list."""
    if part.isdigit():
        if int(part) < len(items):
            return int(part)
        raise RecipeError(f"{source}: {where} has {len(items)} elements, counted from 0")
    having = [
        i for i, item in enumerate(items) if isinstance(item, dict) and item.get(part) is not None
    ]
    if len(having) == 1:
        return having[0]
    problem = "no element has" if not having else f"{len(having)} elements have"
    raise RecipeError(f"{source}: {problem} '{part}' in {where}; use an index from 0")
