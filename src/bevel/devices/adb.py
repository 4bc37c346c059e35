"""An Android phone over adb, timed by a benchmark program that you name.

The address is `adb:SERIAL,PROGRAM`, or `adb:,PROGRAM` where only one phone is attached. PROGRAM is
a file here, built for the phone: LiteRT's `benchmark_model` (latency and memory of .tflite files)
or ExecuTorch's `executor_runner` (latency of .pte files); its name says which. It and the exported
files stay on the phone under their hash, in `/data/local/tmp/bevel`.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bevel.core.errors import MeasurementError, one_line
from bevel.core.files import sha256
from bevel.core.records import DeviceFacts
from bevel.devices import TIMEOUT_S, Device
from bevel.devices._android import FACTS_SCRIPT, STAT_SCRIPT, busy_cores, facts

FOLDER = "/data/local/tmp/bevel"
"""Where the phone's shell may write and run programs."""

REPORT_MEMORY = "--report_peak_memory_footprint=true"

ADDRESS = "adb:SERIAL,PROGRAM (the path of benchmark_model or executor_runner here)"


def connect(rest: str) -> Device:
    """The phone at `SERIAL,PROGRAM`; see `bevel.devices.Place`."""
    serial, _, name = rest.partition(",")
    if not name:
        raise MeasurementError(f"adb:{rest} names no benchmark program; expected {ADDRESS}")
    program = Path(name).expanduser()
    kind = next(
        (kind for kind in (BenchmarkModel, ExecutorRunner) if kind.NAME in program.name), None
    )
    if kind is None:
        raise MeasurementError(
            f"adb cannot tell what {program} prints: expected {BenchmarkModel.NAME} or "
            f"{ExecutorRunner.NAME} in its name"
        )
    if not program.is_file():
        raise MeasurementError(
            f"there is no benchmark program {program}: docs/deployment.md says where to get it"
        )
    return kind(f"adb:{rest}", attached(serial), program)


def attached(serial: str) -> str:
    """The serial number of the phone that is meant, once it is ready.

    Args:
        serial: "" for the only one.

    Raises:
        MeasurementError: there is no such phone, it does not accept this machine, or it is not
            clear which is meant.
    """
    found = {}
    for line in _adb(["devices"]).splitlines()[1:]:
        name, _, state = line.partition("\t")
        if state:
            found[name.strip()] = state.strip()
    there = ", ".join(f"{name} ({state})" for name, state in found.items())
    if not found:
        raise MeasurementError(
            "adb sees no device: connect it and switch on USB debugging in its developer options"
        )
    if not serial and len(found) > 1:
        raise MeasurementError(f"adb sees several devices: name one, adb:SERIAL,PROGRAM; {there}")
    serial = serial or next(iter(found))
    state = found.get(serial, "")
    if not state:
        raise MeasurementError(f"adb sees no device {serial}; it sees {there}")
    if state == "unauthorized":
        raise MeasurementError(
            f"the device {serial} does not accept this machine: allow USB debugging on its screen"
        )
    if state != "device":
        raise MeasurementError(f"the device {serial} is not ready ({state}): unplug it, plug it in")
    return serial


class AdbDevice(Device):
    """A phone, and a benchmark program that runs one kind of file there.

    Args:
        address: as in the recipe.
        serial: of a phone that is ready.
        program: the benchmark program's file here.

    Attributes:
        NAME: what the program's file name holds.
        RUNTIME: whose files the program runs.
        ROUNDS: how often it is started for each file; each start gives one sample.
    """

    NAME: str
    RUNTIME: str
    ROUNDS: int
    WARMUP_RUNS: int

    def __init__(self, address: str, serial: str, program: Path) -> None:
        self.address = address
        self._serial = serial
        self._program = program

    def run(
        self, job: Mapping[str, Any], files: Mapping[str, Path], *, threads: int = 1
    ) -> dict[str, Any]:
        """Time files, or state the memory of one; see `Device.run`."""
        if job["task"] not in self.tasks:
            raise MeasurementError(f"{self.NAME} on {self._serial} cannot do '{job['task']}'")
        wrong = [s["runtime"] for s in job["subjects"] if s["runtime"] != self.RUNTIME]
        if wrong:
            raise MeasurementError(
                f"{self.NAME} runs files of {self.RUNTIME}, not of the runtime '{wrong[0]}'"
            )
        program = self._push(self._program, executable=True)
        pushed = [self._push(files[subject["file"]]) for subject in job["subjects"]]
        if job["task"] == "memory":
            return {"peak_memory_bytes": self.peak_bytes(program, pushed[0], threads)}
        samples: list[list[float]] = [[] for _ in pushed]
        for _ in range(self.ROUNDS):  # in turn, so that all meet the same heat and clock
            for file, times in zip(pushed, samples, strict=True):
                times.append(self.sample_ms(program, file, threads))
        return {"samples_ms": samples, "warmup_runs": self.WARMUP_RUNS}

    @abstractmethod
    def sample_ms(self, program: str, file: str, threads: int) -> float:
        """Start the program once; milliseconds of a run after warm-up."""

    def peak_bytes(self, program: str, file: str, threads: int) -> int:
        """Peak memory of the program as it runs a file."""
        raise NotImplementedError

    def facts(self, runtime: str | None = None) -> DeviceFacts:
        """What the phone tells of itself; the program stands for the runtime's version."""
        program = f"{self._program.name} {sha256(self._program)[:12]}"
        return DeviceFacts(
            device=self.address,
            runtime_version=program if runtime is not None else None,
            **facts(self._shell(FACTS_SCRIPT)),
        )

    def busy_cores(self) -> float | None:
        """What else the phone does; see `Device.busy_cores`."""
        return busy_cores(self._shell(STAT_SCRIPT))

    def _push(self, path: Path, *, executable: bool = False) -> str:
        """Put a file on the phone unless it is there; its path there."""
        digest = sha256(path)
        target = f"{FOLDER}/{digest[:16]}-{re.sub(r'[^A-Za-z0-9._-]', '_', path.name)}"
        there = self._shell(f"mkdir -p {FOLDER}; sha256sum {target} 2>/dev/null || true")
        if digest not in there:
            _adb(["-s", self._serial, "push", str(path), f"{target}.part"])
            mode = "755" if executable else "644"
            self._shell(f"chmod {mode} {target}.part && mv {target}.part {target}")
        return target

    def _shell(self, script: str) -> str:
        """What a script prints on the phone."""
        return _adb(["-s", self._serial, "shell", script])

    def _measure(self, command: Sequence[str], log: str | None = None) -> str:
        """What the program prints; with `log`, also what it writes to the system's log."""
        script = f"cd {FOLDER} && {shlex.join(command)} 2>&1"
        if log is not None:
            script = (
                f"began=$(date +'%m-%d %H:%M:%S.000'); {script}; code=$?; "
                f'logcat -d -t "$began" -s {log} 2>/dev/null; exit $code'
            )
        return self._shell(script)

    def _number(self, pattern: str, output: str) -> float:
        """The number that a pattern finds last in what the program printed.

        Raises:
            MeasurementError: it did not print it.
        """
        found = re.findall(pattern, output)
        if not found:
            lines = output.strip().splitlines() or ["nothing"]
            raise MeasurementError(
                f"cannot read what {self._program.name} printed on {self._serial}: "
                f"{one_line(lines[-1], 160)}"
            )
        return float(found[-1])


class BenchmarkModel(AdbDevice):
    """LiteRT's `benchmark_model`: started once per sample, which is one run after warm-up."""

    NAME = "benchmark_model"
    RUNTIME = "litert"
    ROUNDS = 100
    WARMUP_RUNS = 10
    tasks = frozenset({"latency", "memory"})

    def sample_ms(self, program: str, file: str, threads: int) -> float:
        """One run, after the warm-up of this start; see `AdbDevice.sample_ms`."""
        flags = ["--num_runs=1", "--min_secs=0", f"--warmup_runs={self.WARMUP_RUNS}"]
        output = self._measure(
            [program, f"--graph={file}", f"--num_threads={threads}", "--warmup_min_secs=0", *flags]
        )
        # Of the two lines of statistics the second is of what comes after the warm-up.
        return self._number(r"Inference \(avg\): ([\d.e+]+)", output) / 1e3

    def peak_bytes(self, program: str, file: str, threads: int) -> int:
        """The program's own figure, taken while it runs; see `AdbDevice.peak_bytes`."""
        output = self._measure(
            [program, f"--graph={file}", f"--num_threads={threads}", REPORT_MEMORY]
        )
        pattern = r"peak memory footprint \(MB\) via periodic monitoring: ([\d.e+]+)"
        return round(self._number(pattern, output) * 2**20)


class ExecutorRunner(AdbDevice):
    """ExecuTorch's `executor_runner`: it tells only the sum over its runs, the first included.

    So each sample takes two starts, of 1 and of 1 + `RUNS` runs; their difference divided by `RUNS`
    is the mean of warm runs.
    """

    NAME = "executor_runner"
    RUNTIME = "executorch"
    ROUNDS = 20
    RUNS = 20
    WARMUP_RUNS = 1
    tasks = frozenset({"latency"})

    def sample_ms(self, program: str, file: str, threads: int) -> float:
        """The mean of `RUNS` warm runs; see `AdbDevice.sample_ms`."""
        cold = self._total_ms(program, file, threads, 1)
        return max(0.0, self._total_ms(program, file, threads, 1 + self.RUNS) - cold) / self.RUNS

    def _total_ms(self, program: str, file: str, threads: int, runs: int) -> float:
        command = [program, f"--model_path={file}", f"--num_executions={runs}"]
        output = self._measure([*command, f"--cpu_threads={threads}"], log="ExecuTorch")
        return self._number(rf"executed successfully {runs} time\(s\) in ([\d.e+]+) ms", output)


def _adb(arguments: Sequence[str]) -> str:
    """What adb prints.

    Raises:
        MeasurementError: there is no adb, or it failed; its last line says why.
    """
    if shutil.which("adb") is None:
        raise MeasurementError(
            "there is no program adb here: install Android's platform tools and put adb on the PATH"
        )
    try:
        done = subprocess.run(  # noqa: S603 - no shell on this machine
            ["adb", *arguments],  # noqa: S607 - the one on the PATH is meant
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"adb did not come back within {TIMEOUT_S} s") from error
    if done.returncode:
        lines = f"{done.stdout}\n{done.stderr}".strip().splitlines()
        reason = one_line(lines[-1], 200) if lines else f"it ended with {done.returncode}"
        raise MeasurementError(f"adb failed: {reason}")
    return done.stdout
