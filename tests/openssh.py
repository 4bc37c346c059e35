"""A real OpenSSH server on loopback, with its own keys, a free port and a client's home folder."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

UNPACKED = Path(sys.prefix) / "sshd/usr/sbin/sshd"
"""Where `make test` puts a server that is not installed."""


def find_sshd() -> str | None:
    if UNPACKED.is_file():
        return str(UNPACKED)
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin")


def make_key(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(command, check=True)


class Server:
    """One server. `home` is the client's: its keys and the hosts that it knows."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.cache = folder / "device-cache"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        make_key(self.home / ".ssh/id_ed25519")
        make_key(folder / "host_key")
        shutil.copy(self.home / ".ssh/id_ed25519.pub", folder / "authorized_keys")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.user = getpass.getuser()
        self.process: subprocess.Popen[bytes] | None = None
        self.disk: int | None = None
        self.know((folder / "host_key.pub").read_text())

    def address(self, python: str = sys.executable) -> str:
        return f"ssh:{self.user}@127.0.0.1:{self.port}{python}"

    def know(self, public_key: str) -> None:
        kind, key, *_ = public_key.split()
        known = f"[127.0.0.1]:{self.port} {kind} {key}\n"
        (self.home / ".ssh/known_hosts").write_text(known)

    def start(self) -> None:
        """Run in the foreground of a mount namespace, so that nothing outside it is changed."""
        lines = [
            f"ListenAddress 127.0.0.1:{self.port}",
            f"HostKey {self.folder}/host_key",
            f"AuthorizedKeysFile {self.folder}/authorized_keys",
            f"SetEnv HOME={self.folder}/device-home XDG_CACHE_HOME={self.cache}",
            "Subsystem sftp internal-sftp",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "UsePAM no",
            "StrictModes no",
            "PermitRootLogin prohibit-password",
            "PidFile none",
        ]
        (self.folder / "sshd_config").write_text("\n".join(lines) + "\n")
        self.cache.mkdir(exist_ok=True)
        (self.folder / "device-home").mkdir(exist_ok=True)
        mounts = []
        if os.geteuid() == 0:  # it then wants a user `sshd` and an empty folder
            users = Path("/etc/passwd").read_text()
            (self.folder / "passwd").write_text(
                f"{users}sshd:x:65533:65534::/run/sshd:/bin/false\n"
            )
            mounts += [f"mount --bind {self.folder}/passwd /etc/passwd"]
            mounts += ["mount -t tmpfs -o mode=755 tmpfs /run", "mkdir /run/sshd"]
        if self.disk is not None:
            mounts += [f"mount -t tmpfs -o mode=777,size={self.disk} tmpfs {self.cache}"]
        sshd = f"exec {find_sshd()} -D -e -f {self.folder}/sshd_config"
        command = ["sh", "-c", " && ".join([*mounts, sshd])]
        if mounts:
            command = ["unshare", "-m" if os.geteuid() == 0 else "-Urm", *command]
        with (self.folder / "log").open("ab") as log:
            libraries = ":".join(
                str(path) for path in sorted(UNPACKED.parents[2].glob("usr/lib/*"))
            )
            environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
            self.process = subprocess.Popen(
                command, stderr=log, start_new_session=True, env=environment
            )
        self._wait()

    def _wait(self) -> None:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        pytest.skip(f"sshd does not start here: {(self.folder / 'log').read_text()[-300:].strip()}")

    def descendants(self) -> list[int]:
        """Processes of the open connections, not the server itself."""
        found, seen = [self.process.pid], []
        while found:
            listing = Path(f"/proc/{found[-1]}/task/{found.pop()}/children")
            if listing.exists():
                children = [int(child) for child in listing.read_text().split()]
                found += children
                seen += children
        return seen

    def cut(self) -> int:
        """Kill every open connection; how many processes that were."""
        pids = [
            pid
            for pid in self.descendants()
            if Path(f"/proc/{pid}/comm").read_text().startswith("sshd")
        ]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return len(pids)

    def stop(self) -> None:
        """End the server and its connections."""
        if self.process is not None:
            self.cut()
            self.process.terminate()
            self.process.wait(timeout=10)
            self.process = None

    def jobs(self) -> list[Path]:
        """What is left of jobs on the device."""
        return sorted(self.cache.glob("bevel/jobs/*"))

    def runners(self) -> list[int]:
        """Processes of the runner that belong to this server's cache."""
        mark = str(self.cache).encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:  # it ended meanwhile
                continue
            if mark in line and b"runner.pyz" in line:
                found.append(int(entry.name))
        return found


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A running server that the client's settings fit."""
    pytest.importorskip("paramiko")
    if find_sshd() is None or shutil.which("ssh-keygen") is None:
        pytest.skip("no OpenSSH server here: `make test` fetches one on Debian")
    started = Server(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(started.home))
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        started.start()
        yield started
        started.stop()
