"""Debian 13's Python for arm64 and its QEMU, unpacked into a folder without root's rights.

    FOLDER/emulator        QEMU's user mode for aarch64, a static program
    FOLDER/system/         Python, the C and C++ libraries
    FOLDER/packages/NAME/  wheels for aarch64, one folder for each requirement

Each of them is made in a folder of another name and renamed when it is whole, so what exists is
complete, and a making that was interrupted goes on where it was.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bevel.core.errors import MeasurementError, one_line
from bevel.core.progress import note

RELEASE = "trixie"
PYTHON = "3.13"
"""Of that release."""
SYSTEM_PACKAGES = (f"python{PYTHON}-minimal", f"libpython{PYTHON}-stdlib", "libstdc++6")
LEAST_QEMU = 10
"""QEMU 7.2 of Debian 12 crashes in the wheels of ONNX Runtime."""
GLIBC = range(17, 42)
"""Wheels for these minor versions of glibc 2 run with that release's 2.41."""
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR_VARIABLE = "BEVEL_DEBIAN_MIRROR"
TIMEOUT_S = 900

APT_CONFIGURATION = """\
Dir::State "{state}";
Dir::State::status "{state}/status";
Dir::Cache "{state}/cache";
Dir::Etc "{state}/etc";
Dir::Etc::sourcelist "{state}/etc/sources.list";
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; "amd64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "2";
"""


class Root:
    """A folder that holds, or will hold, the aarch64 Python and its emulator."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.system = folder / "system"

    def prepare(self) -> Path:
        """Fetch what is absent; return the emulator.

        Raises:
            MeasurementError: something cannot be fetched; one line says what and why.
        """
        emulator = installed_qemu()
        with self._held():
            if emulator is None:
                emulator = self.folder / "emulator"
                if not emulator.exists():
                    self._fetch(["qemu-user:amd64"], self._place_emulator, "QEMU")
            if not self.system.exists():
                self._fetch(SYSTEM_PACKAGES, self._place_system, f"Python {PYTHON} for arm64")
        return emulator

    def install(self, requirement: str) -> Path:
        """Install a requirement's wheels for aarch64, such as `onnxruntime==1.22.0`, once.

        Returns:
            The folder to import them from.

        Raises:
            MeasurementError: pip does not find such wheels.
        """
        target = self.folder / "packages" / requirement
        with self._held():
            if not target.exists():
                note(f"qemu-aarch64: fetching {requirement} for aarch64, once")
                with self._new(target) as part:
                    _pip(requirement, part)
        return target

    # -- making -----------------------------------------------------------------------------

    def _fetch(
        self, names: Sequence[str], place: Callable[[Sequence[Path]], None], what: str
    ) -> None:
        """Download Debian packages with all that they depend on, and put them in place."""
        note(f"qemu-aarch64: fetching {what} from Debian {RELEASE} into {self.folder}, once")
        for program in ("apt-get", "dpkg-deb"):
            if shutil.which(program) is None:
                raise MeasurementError(
                    f"qemu-aarch64 fetches Debian packages with apt-get and dpkg-deb, and there is "
                    f"no {program} here: copy {self.folder} from a Debian or Ubuntu machine"
                )
        if not KEYRING.exists():
            raise MeasurementError(
                f"{KEYRING} is absent, so Debian's packages cannot be trusted: install the package "
                "debian-archive-keyring"
            )
        # Its downloads stay if a later step fails, and are taken up the next time.
        state = self.folder / "apt"
        environment = _apt(state)
        run(["apt-get", "update"], what, environment)
        for old in (state / "cache/archives").glob("*.deb"):
            old.unlink()
        # Nothing counts as installed there, so the dependencies come along; QEMU has none.
        if names == ["qemu-user:amd64"]:
            archives = state / "cache/archives"
            run(["apt-get", "download", *names], what, environment, folder=archives)
        else:
            run(["apt-get", "install", "--yes", "--download-only", *names], what, environment)
        place(sorted((state / "cache/archives").glob("*.deb")))
        shutil.rmtree(state)

    def _place_emulator(self, archives: Sequence[Path]) -> None:
        with self._new(self.folder / "unpacked-qemu", keep=False) as part:
            for archive in archives:
                run(["dpkg-deb", "--extract", str(archive), str(part)], "QEMU")
            (part / "usr/bin/qemu-aarch64").replace(self.folder / "emulator")

    def _place_system(self, archives: Sequence[Path]) -> None:
        with self._new(self.system) as part:
            for archive in archives:
                run(["dpkg-deb", "--extract", str(archive), str(part)], "Python")
            lib = part / "lib"
            if not lib.exists():  # a whole Debian gets it from a package that Python does not need
                lib.symlink_to("usr/lib")

    @contextmanager
    def _new(self, target: Path, *, keep: bool = True) -> Iterator[Path]:
        """A folder that becomes `target` if the block succeeds and it is to be kept."""
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=target.parent, prefix=".part-"))
        try:
            yield part
            if keep:
                part.chmod(0o755)
                part.replace(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Let one process at a time change the folder.

        Raises:
            MeasurementError: it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise MeasurementError(
                f"cannot write {self.folder}: {(error.strerror or str(error)).lower()}; name "
                "another folder: qemu-aarch64:FOLDER"
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            except OSError as error:
                raise MeasurementError(
                    f"qemu-aarch64 could not be made in {self.folder}: "
                    f"{(error.strerror or str(error)).lower()}"
                ) from error


def installed_qemu() -> Path | None:
    """The machine's own `qemu-aarch64`, if it is new enough."""
    found = shutil.which("qemu-aarch64")
    if found is None:
        return None
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
    version = re.search(r"version (\d+)\.", said.stdout)
    return Path(found) if version and int(version[1]) >= LEAST_QEMU else None


def _apt(state: Path) -> dict[str, str]:
    """An apt of its own in a folder, for the release's arm64; the variables that make it used."""
    mirror = _mirror()
    for name in ("lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    (state / "etc/sources.list").write_text(
        f"deb [signed-by={KEYRING} arch=arm64,amd64] {mirror} {RELEASE} main\n", encoding="utf-8"
    )
    configuration = state / "apt.conf"
    configuration.write_text(APT_CONFIGURATION.format(state=state.resolve()), encoding="utf-8")
    return {"APT_CONFIG": str(configuration)}


def _mirror() -> str:
    """The Debian archive that this machine's own apt uses.

    Raises:
        MeasurementError: it uses none, as on another distribution, and the variable names none.
    """
    named = os.environ.get(MIRROR_VARIABLE)
    if named:
        return named
    listed = run(["apt-get", "indextargets", "--format", "$(REPO_URI)"], "the list of mirrors")
    for uri in listed.split():
        if uri.rstrip("/").endswith("/debian"):
            return uri
    raise MeasurementError(
        f"this machine's apt uses no Debian archive: set {MIRROR_VARIABLE} to the address of one"
    )


def _pip(requirement: str, target: Path) -> None:
    """Install wheels for aarch64 into a folder."""
    platforms = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in GLIBC)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]
    command += ["--disable-pip-version-check", "--no-input", "--target", str(target)]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    command += [word for name in platforms for word in ("--platform", name)]
    run([*command, requirement], f"{requirement} for aarch64")


def run(
    command: Sequence[str],
    what: str,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> str:
    """What a program prints.

    Raises:
        MeasurementError: it failed; its first line about an error says why.
    """
    try:
        done = subprocess.run(  # noqa: S603 - programs of the system, no shell
            command,
            env={**os.environ, **(environment or {}), "LC_ALL": "C"},
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(
            f"qemu-aarch64: {what} was not there after {TIMEOUT_S} s: check the connection"
        ) from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith(("E:", "ERROR:", "dpkg-deb: error"))]
        reason = one_line((told or lines or [f"it ended with {done.returncode}"])[0], 200)
        raise MeasurementError(
            f"qemu-aarch64: cannot fetch {what} ({Path(command[0]).name}: {reason}); "
            "check the connection and try again"
        )
    return done.stdout
