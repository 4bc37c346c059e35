"""`meta.json` of a deployment kit: all that a program needs to use the file in it. No torch.

`on_device/run.py` reads it, and so may any other program: it says what the network's input is, how
an image becomes it, and what its output means.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bevel.core.recipe import Quantization
from bevel.core.records import Accuracy, DeviceFacts, Record

SCHEMA = 1
"""Raised when a program that reads the old `meta.json` would misread the new one."""


class File(Record):
    """The exported network."""

    file: str
    runtime: str
    precision: str
    size_bytes: int
    sha256: str
    quantizer: str | None
    """Which quantizer made an int8 file, and with which types."""
    quantization: Quantization | None
    """The recipe's settings for it; None for a float file."""


class Input(Record):
    """The network's only input, for one image."""

    name: str
    shape: list[int]
    dtype: str
    layout: Literal["NCHW"] = "NCHW"
    colour: Literal["RGB", "L"]
    """Order of the channels; L is grayscale."""


class Preprocessing(Record):
    """How an image becomes the input, in this order.

    Attributes:
        resize: the shorter side is scaled to this many pixels; None leaves the image as it is.
        interpolation: how; over the whole area that a pixel comes from, as Pillow does it.
        crop: side of the central square that is kept; None keeps all.
        scale: what a value of 0..255 is multiplied by.
        mean: subtracted per channel, after the scale.
        std: divided by per channel, after the mean.
    """

    resize: int | None
    interpolation: Literal["bilinear"] = "bilinear"
    antialias: Literal[True] = True
    crop: int | None
    scale: float = 1 / 255
    mean: list[float]
    std: list[float]


class Output(Record):
    """The network's first output: one value per label."""

    name: str
    shape: list[int | str]
    activation: Literal["softmax", "none"]
    """What makes probabilities of it; none: it holds probabilities already."""


class Sample(Record):
    """An image of the test split, and what the file makes of it where the kit was made."""

    file: str
    sha256: str
    label: str
    top1: str
    probability: float


class Reported(Record):
    """What the run's report says of the file."""

    device: DeviceFacts
    threads: int
    latency_p50_ms: float | None
    accuracy: Accuracy | None


class Meta(Record):
    """`meta.json`. `schema` is its version."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    name: str
    artifact: File
    input: Input
    preprocessing: Preprocessing
    output: Output
    labels: list[str]
    samples: list[Sample]
    reported: Reported
    versions: dict[str, str]
    """Of bevel, Python and the packages that the run was made with."""
