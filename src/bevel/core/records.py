"""What a run leaves behind: artifacts, measurements and the record of every step. No torch.

Units are in the names. Statistics are properties, so the raw samples are what is stored.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """Plain data that goes to JSON and back unchanged."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSignature(Record):
    """Name, shape and type of one input or output; a text in the shape is a dynamic size."""

    name: str
    shape: list[int | str]
    dtype: str


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
    runtime_version: str | None


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
