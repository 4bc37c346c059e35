"""A machine reached with SSH, such as ssh:pi@raspberrypi.local; it needs Python and the runtime.

The address is `ssh:[USER@]HOST[:PORT][/PATH/TO/PYTHON]`. Keys, the agent, `~/.ssh/known_hosts` and
`~/.ssh/config` are those of `ssh` itself; a host key that is not known is refused. What is pushed
lies on the device in `~/.cache/bevel` (or under its XDG_CACHE_HOME):

    files/SHA256/NAME   the runner and the artifacts, kept
    jobs/TOKEN/         one job, detached, so that it outlives a connection; removed at its end

Whoever waits for a job renews the time of `beat` in its folder. A job that nobody waits for any
more ends itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
import shlex
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from bevel.core.errors import MeasurementError, one_line
from bevel.core.files import sha256
from bevel.devices import THREAD_VARIABLES, TIMEOUT_S, Device, result_of
from bevel.devices._bundle import LEAST_PYTHON, bundle, runtimes_of
from bevel.devices._ssh_link import Address, Link

ABANDONED_S = 120
"""A job ends itself when nobody has asked for it for so long; a lost link is given up before."""

STALE_MINUTES = 10
"""What a host that vanished left behind is removed after this time."""

BEAT_S = 5.0
POLL_S = (0.1, 2.0)
"""Shortest and longest pause between two looks at a job: a look costs the device some work."""

ROOM = 64 * 1024
"""Bytes that must be free besides what is written, or the disk counts as full."""

ADDRESS = re.compile(
    r"(?:(?P<user>[^@/:\s]+)@)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^@/:\[\]\s]+)"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<python>/\S+)?"
)


def connect(rest: str) -> Device:
    """Log in; see `bevel.devices.Place`."""
    found = ADDRESS.fullmatch(rest)
    if found is None:
        raise MeasurementError(
            f"ssh:{rest} is no address: write ssh:USER@HOST, ssh:USER@HOST:PORT, or either with "
            "/PATH/TO/PYTHON behind it"
        )
    address = Address(
        host=found["host"].strip("[]"),
        user=found["user"],
        port=int(found["port"]) if found["port"] else None,
    )
    return SshDevice(f"ssh:{rest}", Link(address), found["python"] or "python3")


@dataclass(frozen=True)
class _Job:
    """A job's folder on the device."""

    folder: PurePosixPath

    @property
    def result(self) -> str:
        """Where the runner writes."""
        return str(self.folder / "result.json")


class SshDevice(Device):
    """A machine behind an SSH connection.

    Raises:
        MeasurementError: it does not let us in, or has no Python that will do.
    """

    def __init__(self, address: str, link: Link, python: str) -> None:
        self.address, self._link, self._python = address, link, python
        self._base = PurePosixPath()
        try:
            link.open()
            self._prepare()
        except BaseException:
            link.close()
            raise

    def run(
        self, job: Mapping[str, Any], files: Mapping[str, Path], *, threads: int = 1
    ) -> dict[str, Any]:
        """Do a job there; see `Device.run`."""
        kept = {subject["file"] for subject in job.get("subjects", ())}
        here = _Job(self._base / "jobs" / secrets.token_hex(8))
        self._make(here.folder)
        try:
            self._send(b"", here.folder / "beat")
            program = bundle(runtimes_of(job))
            runner = self._keep(program, "runner.pyz", hashlib.sha256(program).hexdigest())
            paths = {
                name: self._keep(path, path.name, sha256(path))
                if name in kept
                else self._send(path, here.folder / f"{number}-{path.name}")
                for number, (name, path) in enumerate(files.items())
            }
            watch = {"folder": str(here.folder), "file": "beat", "seconds": ABANDONED_S}
            described = {**job, "threads": threads, "files": paths, "watch": watch}
            self._send(json.dumps(described).encode(), here.folder / "job.json")
            self._link.persist(lambda: self._start(here, runner, threads))
            self._wait(here)
            found = self._link.persist(lambda: self._result(here))
        finally:
            self._clean(here)
        return result_of(found, self._link.name)

    def close(self) -> None:
        """End the connection."""
        self._link.close()

    # -- the device's side ----------------------------------------------------------------

    def _prepare(self) -> None:
        """Find Python and the cache, and remove what a host that vanished left there."""
        probe = "import sys; print(*sys.version_info[:2])"
        code, printed, _ = self._link.shell(
            f'base="${{XDG_CACHE_HOME:-$HOME/.cache}}/bevel"; echo "$base"; '
            'umask 077; mkdir -p "$base/jobs" "$base/files" 2>/dev/null; '
            f'find "$base/jobs" -mindepth 2 -maxdepth 2 -name beat -mmin +{STALE_MINUTES} '
            "-exec sh -c 'rm -rf \"${1%/*}\"' sh {} ';' 2>/dev/null; "
            f"find \"$base/files\" -name '.part-*' -mmin +{STALE_MINUTES} "
            "-exec rm -f {} ';' 2>/dev/null; "
            f"{shlex.quote(self._python)} -c {shlex.quote(probe)}"
        )
        lines = printed.splitlines()
        need = ".".join(map(str, LEAST_PYTHON))
        if code:
            raise MeasurementError(
                f"there is no {self._python} on {self._link.name}: install Python {need} or newer "
                f"there, or name one in the address: {self.address.removesuffix(self._python)}"
                "/path/to/python"
            )
        self._base = PurePosixPath(lines[-2])
        version = tuple(map(int, lines[-1].split()))
        if version < LEAST_PYTHON:
            raise MeasurementError(
                f"{self._python} on {self._link.name} is Python {'.'.join(map(str, version))}; "
                f"{need} or newer is needed"
            )

    def _make(self, folder: PurePosixPath) -> None:
        """A folder of a job or of a kept file."""
        try:
            self._link.persist(lambda: self._link.make_folder(str(folder)))
        except OSError as error:
            raise self._unwritable(folder, 0, one_line(error, 120)) from error

    def _keep(self, source: Path | bytes, name: str, digest: str) -> str:
        """Push a file unless it is there; its path on the device."""
        path = self._base / "files" / digest / name
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if self._link.persist(lambda: self._link.size(str(path))) != size:
            self._make(path.parent)
            part = path.with_name(f".part-{secrets.token_hex(8)}")
            self._send(source, part)
            self._link.persist(lambda: self._link.rename(str(part), str(path)))
        return str(path)

    def _send(self, source: Path | bytes, path: PurePosixPath) -> str:
        """Write a file on the device; its path there."""

        def write() -> None:
            stream: BinaryIO = (
                io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
            )
            with stream:
                self._link.sftp().putfo(stream, str(path))

        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        try:
            self._link.persist(write)
        except OSError as error:
            with suppress(OSError):
                self._link.sftp().remove(str(path))
            raise self._unwritable(path, size, one_line(error, 120)) from error
        return str(path)

    def _unwritable(self, path: PurePosixPath, size: int, told: str) -> MeasurementError:
        """Why a file could not be written."""
        free = self._free()
        if free is not None and free < size + ROOM:
            return MeasurementError(
                f"the disk of {self._link.name} is full: {size + ROOM:,} bytes are needed in "
                f"{self._base} and {free:,} are free; make room there and measure again"
            )
        return MeasurementError(f"cannot write {path} on {self._link.name}: {told}")

    def _free(self) -> int | None:
        """Bytes that are free where the cache is, or would be."""
        base = _quoted(self._base)
        code, printed, _ = self._link.shell(f"df -Pk {base} || df -Pk $(dirname {base})")
        fields = printed.splitlines()[-1].split() if code == 0 and printed else []
        return int(fields[3]) * 1024 if len(fields) >= 4 and fields[3].isdigit() else None

    # -- a job ----------------------------------------------------------------------------

    def _start(self, job: _Job, runner: str, threads: int) -> None:
        """Start the runner in a session of its own; a second call finds it started."""
        command = shlex.join([self._python, runner, "job.json", "result.json"])
        settings = " ".join(f"{name}={threads}" for name in THREAD_VARIABLES)
        supervised = f"{settings} {command} >out 2>err; echo $? >code; mv running ended"
        self._link.shell(
            f"cd {_quoted(job.folder)} && mkdir running 2>/dev/null || exit 0; "
            f"setsid sh -c {shlex.quote(supervised)} </dev/null >/dev/null 2>&1 & echo $! > pid"
        )

    def _wait(self, job: _Job) -> None:
        """Until the job has ended, whatever the connection does meanwhile.

        Raises:
            MeasurementError: it takes too long, or the connection does not come back.
        """
        begun = beaten = time.monotonic()
        pause = POLL_S[0]
        while not self._link.persist(lambda: self._ended(job)):
            now = time.monotonic()
            if now - begun > TIMEOUT_S:
                raise MeasurementError(
                    f"the measurement on {self._link.name} was not done after {TIMEOUT_S} s"
                )
            if now - beaten > BEAT_S:
                self._link.persist(lambda: self._beat(job))
                beaten = now
                if not self._link.persist(lambda: self._alive(job)):
                    return
            time.sleep(pause)
            pause = min(1.5 * pause, POLL_S[1])

    def _ended(self, job: _Job) -> bool:
        return self._link.exists(str(job.folder / "ended"))

    def _beat(self, job: _Job) -> None:
        """Say that somebody waits; by the device's own clock."""
        self._link.sftp().open(str(job.folder / "beat"), "w").close()

    def _alive(self, job: _Job) -> bool:
        """Whether the job's process is there: it is not after a restart of the device."""
        code, _, _ = self._link.shell(f'kill -0 "$(cat {_quoted(job.folder / "pid")})"')
        return code == 0 or self._ended(job)

    def _result(self, job: _Job) -> dict[str, Any]:
        """What the runner wrote, or how it ended."""
        text = self._link.read(job.result)
        if text:
            found: dict[str, Any] = json.loads(text)
            return found
        free = self._free()
        if free is not None and free < ROOM:
            raise self._unwritable(job.folder, 0, "")
        lines = (self._link.read(str(job.folder / "err")) or "").strip().splitlines()
        if lines:
            return {"error": one_line(lines[-1])}
        code = (self._link.read(str(job.folder / "code")) or "").strip()
        return {"error": f"it ended with {code}" if code else "it ended without a word"}

    def _clean(self, job: _Job) -> None:
        """End the job if it still runs, and remove its folder."""
        pid = _quoted(job.folder / "pid")
        command = (
            f"if [ -s {pid} ] && [ ! -e {_quoted(job.folder / 'ended')} ]; then "
            f'kill -s KILL -- "-$(cat {pid})"; fi 2>/dev/null; rm -rf {_quoted(job.folder)}'
        )
        # A link that is lost for good was reported; the job then ends and cleans up by itself.
        with suppress(MeasurementError):
            self._link.persist(lambda: self._link.shell(command))


def _quoted(path: PurePosixPath) -> str:
    return shlex.quote(str(path))
