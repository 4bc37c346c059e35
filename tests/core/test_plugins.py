import subprocess
import sys
from pathlib import Path

import pytest

from bevel.core import plugins
from bevel.core.errors import MissingDependencyError, UnknownNameError


def test_every_kind_has_a_word_for_one_of_it() -> None:
    assert set(plugins.SINGULAR) == set(plugins.PACKAGES)


@pytest.mark.parametrize("kind", [kind for kind in plugins.PACKAGES if kind != "rules"])
def test_own_plugins_are_found_and_described(kind: str) -> None:
    found = plugins.discover(kind)
    assert found
    for plugin in found.values():
        assert plugin.description.endswith("."), f"{plugin.module} needs a docstring line"


def test_discovery_and_descriptions_import_no_torch() -> None:
    code = (
        "import sys; from bevel.core import plugins\n"
        "for kind in plugins.PACKAGES:\n"
        "    [p.description for p in plugins.discover(kind).values()]\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"no criterion called 'l3'\. Did you mean 'l[12]'"):
        plugins.find("criteria", "l3")


def _installed(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """Put a plugin called `extra` where an installed package would have it."""
    (folder / "extra_rule.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    found = {"extra": plugins.Plugin("rules", "extra", "extra_rule")}
    monkeypatch.setattr(plugins, "discover", lambda _kind: found)
    monkeypatch.delitem(sys.modules, "extra_rule", raising=False)


def test_a_third_partys_plugin_is_described_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(monkeypatch, tmp_path, '"""Fold A into B.\n\nMore."""\nVALUE = 3\n')
    assert plugins.find("rules", "extra").description == "Fold A into B."
    assert plugins.load("rules", "extra").VALUE == 3


def test_a_plugin_whose_package_is_missing_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(monkeypatch, tmp_path, "import a_package_that_is_not_there\n")
    with pytest.raises(MissingDependencyError, match="'a_package_that_is_not_there'"):
        plugins.load("rules", "extra")
