"""An SSH connection that comes back: login with strict host keys, a shell, SFTP, and reconnecting.

Settings are those of OpenSSH's client: `~/.ssh/config` (HostName, User, Port, IdentityFile,
UserKnownHostsFile), its known_hosts files, its keys and the agent.
"""

from __future__ import annotations

import errno
import logging
import shlex
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import paramiko

from bevel.core.errors import MeasurementError, one_line

CONNECT_S = 15
"""What a step of the login may take."""

ANSWER_S = 30
"""A connection on which an answer takes longer is a lost one."""

RECONNECT_S = 60
"""For so long a lost connection is tried again."""

RETRY_S = 2.0
KEEPALIVE_S = 5

KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
SYSTEM_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts"

Given = TypeVar("Given")

# Its threads report lost connections through logging, which prints where nobody listens.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Address:
    """Who and where; what is None is taken from the user's SSH settings."""

    host: str
    user: str | None
    port: int | None

    def __str__(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host


class UnreachableError(MeasurementError):
    """Nothing answers, for now."""


class Link:
    """A connection to one machine.

    Every method but `persist` and `open` raises what Paramiko raises when the connection is lost;
    `persist` connects again and repeats.
    """

    def __init__(self, address: Address) -> None:
        self.name = str(address)
        self._address = address
        self._client: Any = None
        self._sftp: Any = None

    def open(self) -> None:
        """Connect and log in.

        Raises:
            UnreachableError: nothing answers there.
            MeasurementError: an unknown or changed host key, or no login.
        """
        settings = _settings(self._address.host)
        host = str(settings.get("hostname", self._address.host))
        port = self._address.port or int(settings.get("port", 22))
        client = paramiko.SSHClient()
        known = str(settings.get("userknownhostsfile", " ".join(KNOWN_HOSTS))).split()
        for name in (*known, SYSTEM_KNOWN_HOSTS):
            if Path(name).expanduser().is_file():
                client.load_system_host_keys(str(Path(name).expanduser()))
        client.set_missing_host_key_policy(_Refuse(self.name, host, port, known[0]))
        try:
            client.connect(
                host,
                port,
                username=self._address.user or settings.get("user"),
                key_filename=_identities(settings),
                timeout=CONNECT_S,
                banner_timeout=CONNECT_S,
                auth_timeout=CONNECT_S,
            )
            client.get_transport().set_keepalive(KEEPALIVE_S)
        except BaseException as error:
            client.close()
            told = _login_error(error, self.name, host, port)
            if told is None:
                raise
            raise told from error
        self._client = client

    def close(self) -> None:
        """End the connection; what is detached goes on."""
        if self._client is not None:
            self._client.close()
        self._client = self._sftp = None

    def persist(self, action: Callable[[], Given]) -> Given:
        """Do what may be done twice, over a new connection whenever this one is lost.

        Raises:
            MeasurementError: the connection was lost and did not come back in time.
        """
        lost_at: float | None = None
        while True:
            try:
                if self._client is None:
                    self.open()
                return action()
            except (EOFError, OSError, paramiko.SSHException, UnreachableError) as error:
                if not self._is_loss(error):
                    raise
                self.close()
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > RECONNECT_S:
                    raise MeasurementError(
                        f"the connection to {self.name} was lost and did not come back within "
                        f"{RECONNECT_S} s; what was pushed is kept, so measure again"
                    ) from error
                time.sleep(RETRY_S)

    def _is_loss(self, error: BaseException) -> bool:
        """Whether an error is the connection's, and not the file system's of the device."""
        if isinstance(error, EOFError | ConnectionError | TimeoutError | UnreachableError):
            return True
        if isinstance(error, paramiko.SSHException) or self._client is None:
            return True
        transport = self._client.get_transport()
        closed = self._sftp is not None and self._sftp.get_channel().closed
        return closed or transport is None or not transport.is_active()

    def shell(self, script: str) -> tuple[int, str, str]:
        """Run a script of `sh` there: its exit code, and what it printed on both streams."""
        command = f"sh -c {shlex.quote(script)}"
        stdin, stdout, stderr = self._client.exec_command(command, timeout=ANSWER_S)
        stdin.close()
        printed = stdout.read().decode(errors="replace")
        told = stderr.read().decode(errors="replace")
        return int(stdout.channel.recv_exit_status()), printed, told

    def sftp(self) -> Any:
        """The file transfer channel, opened once per connection."""
        if self._sftp is None:
            try:
                self._sftp = self._client.open_sftp()
            except paramiko.SSHException as error:
                transport = self._client.get_transport()
                if transport is None or not transport.is_active():
                    raise
                raise MeasurementError(
                    f"{self.name} has no SFTP: turn on `Subsystem sftp` in its sshd_config, or "
                    "install openssh-sftp-server there"
                ) from error
            self._sftp.get_channel().settimeout(ANSWER_S)
        return self._sftp

    def size(self, path: str) -> int | None:
        """Bytes of a file there; None if there is none."""
        try:
            return int(self.sftp().stat(path).st_size)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder."""
        return self.size(path) is not None

    def make_folder(self, path: str) -> None:
        """Make a folder that only its owner may read, unless it is there."""
        if not self.exists(path):
            self.sftp().mkdir(path, 0o700)

    def read(self, path: str) -> str | None:
        """Text of a file there; None if there is none."""
        try:
            with self.sftp().open(path, "r") as file:
                file.prefetch()
                content: bytes = file.read()
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return None
        return content.decode(errors="replace")

    def rename(self, old: str, new: str) -> None:
        """Move a file over another; done before if only the new one is there."""
        if self.exists(old):
            self.sftp().posix_rename(old, new)


class _Refuse:
    """What Paramiko asks about a host key that is in no known_hosts file."""

    def __init__(self, name: str, host: str, port: int, known: str) -> None:
        self.name, self.host, self.port, self.known = name, host, port, known

    def missing_host_key(self, _client: Any, _hostname: str, key: Any) -> None:
        """Refuse, and say how to add it."""
        raise MeasurementError(
            f"the host key of {self.name} is not known ({key.get_name()} {key.fingerprint}): "
            "compare it with the device's own, then add it: "
            f"ssh-keyscan -p {self.port} {self.host} >> {self.known}"
        )


def _login_error(error: BaseException, name: str, host: str, port: int) -> MeasurementError | None:
    """What an error of the login means; None if it means nothing to us."""
    if isinstance(error, paramiko.BadHostKeyException):
        entry = host if port == 22 else f"[{host}]:{port}"
        return MeasurementError(
            f"the host key of {name} has changed (now {error.key.get_name()} "
            f"{error.key.fingerprint}): someone may pose as it, or it was set up anew; if you know "
            f"that it was, forget the old key with: ssh-keygen -R '{entry}', and add the new one"
        )
    refused = isinstance(error, paramiko.AuthenticationException)
    if refused or (isinstance(error, paramiko.SSHException) and "No auth" in str(error)):
        return MeasurementError(
            f"{name} refused the login: it accepts no key of the agent or of ~/.ssh; give it one: "
            f"ssh-copy-id -p {port} {name}"
        )
    if isinstance(error, socket.gaierror):
        return MeasurementError(f"there is no machine called {host}: check the address")
    if isinstance(error, paramiko.ssh_exception.NoValidConnectionsError):
        reason = next(iter(error.errors.values())).strerror.lower()  # of the first way tried
        return UnreachableError(f"nothing answers as SSH at {host}, port {port}: {reason}")
    if isinstance(error, OSError | EOFError | paramiko.SSHException):
        return UnreachableError(
            f"nothing answers as SSH at {host}, port {port}: {one_line(error, 120)}"
        )
    return None


def _settings(host: str) -> Mapping[str, Any]:
    """What the user's SSH configuration says of a host."""
    path = Path("~/.ssh/config").expanduser()
    if not path.is_file():
        return {}
    try:
        found: Mapping[str, Any] = paramiko.SSHConfig.from_path(str(path)).lookup(host)
    except (paramiko.ConfigParseError, OSError) as error:
        raise MeasurementError(f"cannot read {path}: {one_line(error, 120)}") from error
    return found


def _identities(settings: Mapping[str, Any]) -> list[str]:
    """Key files that the configuration names, if they are there."""
    named = [Path(name).expanduser() for name in settings.get("identityfile", ())]
    return [str(path) for path in named if path.is_file()]
