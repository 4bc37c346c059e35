"""Several processes share a training and end with the same network, resumed or not."""

import os
import socket
import subprocess
import sys
from pathlib import Path

JOB = Path(__file__).with_name("two_processes_job.py")


def test_two_processes_agree_and_resume_exactly(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, str(JOB), str(tmp_path), str(port)],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        check=False,
        timeout=120,
    )
    ranks = [tmp_path / f"rank{number}" for number in range(2)]
    assert all(path.exists() for path in ranks), done.stderr
    whole, resumed = ranks[0].read_text().splitlines()
    assert whole == resumed
    assert ranks[1].read_text().splitlines() == [whole, whole]
    assert float(whole.split()[-1].rstrip("]")) > 0.8
