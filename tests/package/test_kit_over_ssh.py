"""The kit carried to another home over SSH, as its README says, with OpenSSH's own programs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest


def test_the_program_gives_the_reports_answers_over_ssh(kit, finished, images, server, tmp_path):
    if shutil.which("ssh") is None or shutil.which("scp") is None:
        pytest.skip("no OpenSSH client here")
    port, home = str(server.port), server.home / ".ssh"
    options = ["-F", "none", "-i", str(home / "id_ed25519"), "-o", "BatchMode=yes"]
    options += ["-o", f"UserKnownHostsFile={home / 'known_hosts'}"]
    host, there = f"{server.user}@127.0.0.1", tmp_path / "there"
    there.mkdir()
    for folder in (kit.folder, images / "test"):
        copy = ["scp", *options, "-q", "-r", "-P", port, str(folder), f"{host}:{there}/"]
        subprocess.run(copy, check=True, capture_output=True)
    program = f"{sys.executable} -I {there / kit.folder.name}/run.py {there}/test --check --json"
    done = subprocess.run(
        ["ssh", *options, "-p", port, host, program], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert found["check"]["passed"]
    record = json.loads((finished / "run.json").read_text())
    measured = [
        m["accuracy"]["top1"]
        for m in record["measurements"]
        if (m["label"], m["artifact"]["precision"]) == ("compressed", "int8")
    ]
    assert [found["summary"]["top1"]] == pytest.approx(measured)
