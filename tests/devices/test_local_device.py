"""The device `local`: its facts, and processes that fail."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import pytest

from bevel.core.errors import MeasurementError
from bevel.devices import local
from bevel.testing.plugin import assert_readable


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function that writes a module which a fresh process can run, and returns its name."""

    def write(code: str) -> str:
        (tmp_path / "bevel_test_job.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "bevel_test_job"

    return write


def test_facts_are_those_of_this_machine():
    facts = local.facts("runtime 1")
    assert (facts.device, facts.runtime_version) == ("local", "runtime 1")
    assert facts.architecture == platform.machine()
    assert facts.cores == os.cpu_count()
    if hasattr(os, "sysconf") and Path("/proc/meminfo").exists():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert facts.memory_bytes == pytest.approx(total, rel=0.01)


def test_what_the_system_does_not_tell_is_unknown(tmp_path):
    assert local._text(tmp_path / "absent") is None
    assert local._number(tmp_path / "absent") is None
    odd = tmp_path / "odd"
    odd.write_text("not a number\nMemTotal:\nmodel name : chip : v2\n")
    assert local._number(odd) is None
    assert local._field(odd, "MemTotal") is None
    assert local._field(odd, "absent") is None
    assert local._field(odd, "model name") == "chip : v2"


def test_threads_and_arguments_reach_the_process(module, tmp_path, monkeypatch):
    name = module(
        "import json, os, pathlib, sys\n"
        "found = [os.environ[v] for v in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')]\n"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps([*found, sys.argv[2]]))\n"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    local.run_module(name, [str(tmp_path / "out"), "a b"], threads=3)
    assert (tmp_path / "out").read_text() == '["3", "3", "a b"]'
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('out of paper')", "out of paper"),
        ("raise ValueError('odd value')", "ValueError: odd value"),
        ("import sys; sys.exit(3)", "it ended with 3"),
        ("import os; os.kill(os.getpid(), 9)", "it ended with -9"),
        ("import sys; sys.exit('x' * 5000)", "xxx"),
    ],
)
def test_failure_is_one_line(module, code, message, capfd):
    with pytest.raises(MeasurementError, match=message) as caught:
        local.run_module(module(code), [], threads=1)
    assert_readable(caught.value)
    assert capfd.readouterr() == ("", "")


def test_timeout_is_one_line_and_ends_the_process(module, tmp_path, monkeypatch):
    late = tmp_path / "late"
    name = module(f"import time, pathlib; time.sleep(2); pathlib.Path({str(late)!r}).touch()")
    monkeypatch.setattr(local, "TIMEOUT_S", 0.3)
    start = time.monotonic()
    with pytest.raises(MeasurementError, match=r"not done after 0\.3 s") as caught:
        local.run_module(name, [], threads=1)
    assert_readable(caught.value)
    time.sleep(max(0.0, 2.4 - (time.monotonic() - start)))
    assert not late.exists()
