"""What every plugin must do, whatever its kind."""
# ruff: noqa: S101  a contract is stated in assertions

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from bevel.core import plugins
from bevel.core.errors import BevelError, MissingDependencyError


class PluginContract:
    """Base of the suites: finds the plugin.

    Attributes:
        kind: a kind of plugin, such as "runtimes"; each suite sets it.
        name: the plugin's name; a subclass sets it.
    """

    kind: ClassVar[str]
    name: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def plugin(cls) -> Any:
        """The plugin's module."""
        try:
            return plugins.load(cls.kind, cls.name)
        except MissingDependencyError as error:
            pytest.skip(str(error))

    def test_is_found_and_described(self) -> None:
        """`bevel list` shows a sentence for it, without importing it."""
        found = plugins.discover(self.kind)
        assert self.name in found
        description = found[self.name].description
        assert description.endswith("."), "the first docstring line is no sentence"
        assert len(description) <= 120


def assert_readable(error: BaseException) -> None:
    """The error is one of bevel's, with a message of one line that is not too long to read."""
    assert isinstance(error, BevelError)
    message = str(error)
    assert message.strip()
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 700
