"""What a run leaves behind: artifacts, measurements and the record of every step. No torch.

Units are in the names. Statistics are properties, so the raw samples are what is stored.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from bevel.core.signature import TensorSignature as TensorSignature


class Record(BaseModel):
    """Plain data that goes to JSON and back unchanged."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Artifact(Record):
    """An exported file, and what is needed to run it. Stored beside the file as `FILE.json`."""

    path: str
    runtime: str
    precision: str
    inputs: list[TensorSignature]
    outputs: list[TensorSignature]
    size_bytes: int
    sha256: str
    quantizer: str | None = None
    """Which quantizer made an int8 file, and with which types."""


class Operator(Record):
    """One operator of an exported file, as its runtime runs it.

    Attributes:
        name: its name in the file.
        kind: what it does, in the runtime's own words: Conv, CONV_2D, Convolution.
        precision: of its arithmetic: int8, float32, ...; "none" if it only moves data.
        macs: multiply-accumulates for one image.
        channels: width of its output, if it has one.
        delegated: whether a fast kernel library takes it, where the runtime has one.
        reason: why it is not in integers, if that is known.
        latency_ms: time per run from the runtime's own profiler, once it was profiled.
        inputs: names of the operators that make its inputs, where the file says.
    """

    name: str
    kind: str
    precision: str
    macs: int = 0
    channels: int | None = None
    delegated: bool = True
    reason: str | None = None
    latency_ms: float | None = None
    inputs: list[str] = Field(default_factory=list)


class Latency(Record):
    """Wall time of single runs after warm-up, in the order they were taken."""

    samples_ms: list[float]
    warmup_runs: int

    def percentile(self, q: float) -> float:
        """Linear interpolation between the two nearest samples, `q` in 0..100."""
        ordered = sorted(self.samples_ms)
        position = (len(ordered) - 1) * q / 100
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    @property
    def p50_ms(self) -> float:
        """Median, in milliseconds."""
        return self.percentile(50)

    @property
    def p90_ms(self) -> float:
        """Nine of ten runs are at most this, in milliseconds."""
        return self.percentile(90)

    @property
    def p99_ms(self) -> float:
        """99 of 100 runs are at most this, in milliseconds."""
        return self.percentile(99)


class Parity(Record):
    """How far an exported file's outputs are from the torch network's, on the same images."""

    max_difference: float
    mean_difference: float
    top1_agreement: float
    images: int


class Accuracy(Record):
    """Share of images whose highest output is the label."""

    top1: float
    images: int
    split: str


class DeviceFacts(Record):
    """The machine a measurement was taken on; None where the system does not tell."""

    device: str
    system: str
    architecture: str
    processor: str | None
    cores: int
    memory_bytes: int | None
    governor: str | None
    frequency_mhz: float | None
    temperature_c: float | None
    throttling: str | None = None
    """What held the clock down; "none" where the system says that nothing did."""
    runtime_version: str | None
    emulated: bool = False
    """Another machine only imitates it: its answers are true, its times mean nothing."""


class Measurement(Record):
    """An artifact run on a device."""

    label: str
    artifact: Artifact
    threads: int
    device: DeviceFacts
    latency: Latency | None = None
    peak_memory_bytes: int | None = None
    accuracy: Accuracy | None = None
    parity: Parity | None = None
    warnings: list[str] = Field(default_factory=list)


class Finding(Record):
    """Something that keeps a file from being faster, in a line that says what helps.

    `share` is its part of the time of one run; None where nothing was profiled.
    """

    message: str
    share: float | None = None


class Diagnosis(Record):
    """What an exported file is made of, as its runtime runs it, and why it is not faster.

    Attributes:
        label: whose file it is: original, compressed, or a path.
        threads: threads that the profiler's times are for.
        verdict: the answer to "why is it not faster?" in a line.
        findings: the reasons, dearest first.
        operators: in the file's order, with the profiler's times where the runtime has one.
        profiled_ms: sum of those times; the profiler itself takes time as well.
        int8_macs: share of the multiply-accumulates that run in integers; None if none are known.
        channel_step: the number whose multiples are the widths that the runtime runs fast.
        conversions: operators that only convert between float and integers.
        stray_pairs: of them, those that undo each other with no float operator between.
        transposes: operators that only change the order of the axes.
        speedup: time of the float file divided by this one's, where both were timed in turn.
        parity: against the float file or the torch network, where one was given.
    """

    label: str
    artifact: Artifact
    threads: int
    verdict: str
    findings: list[Finding] = Field(default_factory=list)
    operators: list[Operator] = Field(default_factory=list)
    profiled_ms: float | None = None
    int8_macs: float | None = None
    channel_step: int
    conversions: int = 0
    stray_pairs: int = 0
    transposes: int = 0
    speedup: float | None = None
    parity: Parity | None = None


class Shipment(Record):
    """Which file to ship for a target of a run, and why."""

    target: str
    path: str
    precision: str
    reason: str


class Cost(Record):
    """What one image costs: multiply-accumulates of one forward pass, and stored parameters."""

    macs: int
    params: int


class StepRecord(Record):
    """One finished step: its numbers and the files it left, by name relative to the run folder."""

    name: str
    verb: str
    seconds: float
    numbers: dict[str, Any]
    files: dict[str, str]
    """Relative path -> sha256."""


class RunRecord(Record):
    """Everything about a run: `run.json` in the run folder."""

    version: int = 1
    recipe: dict[str, Any]
    started: str
    finished: str | None = None
    versions: dict[str, str]
    machine: dict[str, Any]
    steps: list[StepRecord] = Field(default_factory=list)
    original: Cost | None = None
    compressed: Cost | None = None
    measurements: list[Measurement] = Field(default_factory=list)
    diagnoses: list[Diagnosis] = Field(default_factory=list)
    shipments: list[Shipment] = Field(default_factory=list)
