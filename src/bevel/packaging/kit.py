"""From a finished run to a zip: the file, what it needs to know, a program and its instructions."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from bevel.core import recipe as recipes
from bevel.core.errors import MeasurementError, RunFolderError
from bevel.core.files import atomic
from bevel.core.recipe import Recipe
from bevel.core.records import Artifact, Measurement, RunRecord, TensorSignature
from bevel.data import Data, load
from bevel.data.batches import FixedBatches
from bevel.data.images import convert
from bevel.data.splits import fetch
from bevel.measurement.parity import run_batch
from bevel.packaging.choice import select
from bevel.packaging.meta import (
    File,
    Input,
    Meta,
    Output,
    Preprocessing,
    Reported,
    Sample,
)
from bevel.packaging.program import package_of, program
from bevel.reporting import read
from bevel.runtimes import load_runtime, open_artifact

SAMPLES = 8
"""Images of the test split that go along, for `run.py --check`."""

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every member, so that the same run makes the same bytes."""

README = Path(__file__).with_name("on_device") / "README.md"


@dataclass(frozen=True)
class Kit:
    """A kit that was written: its path, and its `meta.json`."""

    path: Path
    meta: Meta


def package(run: Path | str, out: Path | str, *, target: str | None = None) -> Kit:
    """Write a finished run's file and all that a device needs to use it, as a zip.

    The kit holds the exported file, `meta.json`, `run.py` (numpy, Pillow and the runtime are all it
    needs), a README and a few images of the test split with what the file makes of them here.

    Args:
        run: a run folder.
        out: the zip to write; it appears whole or not at all.
        target: which file, see `choice.select`.

    Raises:
        RunFolderError: no finished run is there, or no one file fits the target.
        MeasurementError: the file is missing or damaged, or `run.py` cannot serve it.
        DataError: the run's data, of which the labels and samples are, cannot be read.
    """
    folder = Path(run)
    record = read(folder)
    if record.finished is None:
        raise RunFolderError(f"the run in {folder} is not finished: 'bevel run' goes on with it")
    recipe = recipes.validate(record.recipe, str(folder / "run.json"))
    chosen = select(record, recipe, target)
    runtime = chosen.artifact.runtime
    source = program(runtime)
    artifact = open_artifact(folder / "artifacts" / Path(chosen.artifact.path).name)
    data = load(recipe.compressed_data, seed=recipe.seed)
    signature = _image_input(artifact, data)
    samples, images, activation = _samples(artifact, data)
    meta = Meta(
        name=recipe.name,
        artifact=_file(artifact, recipe),
        input=_input(signature, data),
        preprocessing=_preprocessing(recipe, data),
        output=_output(artifact, activation),
        labels=list(data.classes),
        samples=samples,
        reported=_reported(chosen),
        versions=record.versions,
    )
    members = {
        "README.md": _readme(meta, record).encode(),
        "meta.json": (meta.model_dump_json(by_alias=True, indent=1) + "\n").encode(),
        "run.py": source.encode(),
        meta.artifact.file: Path(artifact.path).read_bytes(),
        **images,
    }
    path = Path(out)
    _write(path, members)
    return Kit(path, meta)


def _image_input(artifact: Artifact, data: Data) -> TensorSignature:
    """The file's only input, if it is a batch of the data's images."""
    shapes = [signature.shape[1:] for signature in artifact.inputs]
    if shapes != [list(data.input_shape)]:
        raise MeasurementError(
            f"run.py feeds one image of {list(data.input_shape)} to a file; {artifact.path} takes "
            f"{' and '.join(map(str, shapes))}"
        )
    return artifact.inputs[0]


def _samples(artifact: Artifact, data: Data) -> tuple[list[Sample], dict[str, bytes], Any]:
    """Images of the test split, and what the file makes of them; also by name as PNG files."""
    batches = data.batches("test", limit=SAMPLES)
    session = load_runtime(artifact.runtime).open_session(Path(artifact.path), 1)
    outputs = np.concatenate([run_batch(session, pixels.numpy()) for pixels, _ in batches])
    values = outputs.astype(np.float64)
    # A network that ends in a softmax must not get a second one.
    sums = np.abs(values.sum(axis=1) - 1)
    activation = "none" if values.min() >= 0 and sums.max() < 0.01 else "softmax"
    if activation == "softmax":
        powers = np.exp(values - values.max(axis=1, keepdims=True))
        values = powers / powers.sum(axis=1, keepdims=True)
    samples, images = [], {}
    for number, row in enumerate(values):
        image, label = _original(batches, number)
        name = f"samples/{number:03}.png"
        images[name] = _png(image, data.input_shape[0])
        samples.append(
            Sample(
                file=name,
                sha256=hashlib.sha256(images[name]).hexdigest(),
                label=data.classes[label],
                top1=data.classes[int(row.argmax())],
                probability=round(float(row.max()), 6),
            )
        )
    return samples, images, activation


def _original(batches: FixedBatches, number: int) -> tuple[Any, int]:
    """One image as its source gives it, before any transform, and its label."""
    images = batches.images
    return fetch(images.source, images.name, int(images.indices[batches.order[number]]))


def _png(image: Any, channels: int) -> bytes:
    """A source's image as the content of a PNG file, which loses nothing."""
    if isinstance(image, Tensor):
        pixels = image.numpy().transpose(1, 2, 0)
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    content = io.BytesIO()
    convert(image, channels).save(content, format="PNG")
    return content.getvalue()


def _file(artifact: Artifact, recipe: Recipe) -> File:
    path = Path(artifact.path)
    return File(
        file=f"model{path.suffix}",
        runtime=artifact.runtime,
        precision=artifact.precision,
        size_bytes=artifact.size_bytes,
        sha256=artifact.sha256,
        quantizer=artifact.quantizer,
        quantization=recipe.quantization if artifact.precision.startswith("int8") else None,
    )


def _input(signature: TensorSignature, data: Data) -> Input:
    return Input(
        name=signature.name,
        shape=[1, *data.input_shape],
        dtype=signature.dtype,
        colour="L" if data.input_shape[0] == 1 else "RGB",
    )


def _preprocessing(recipe: Recipe, data: Data) -> Preprocessing:
    section = recipe.compressed_data
    channels = data.input_shape[0]
    normalize = section.normalize
    return Preprocessing(
        resize=section.resize or section.size,
        crop=section.size,
        mean=normalize.mean if normalize else [0.0] * channels,
        std=normalize.std if normalize else [1.0] * channels,
    )


def _output(artifact: Artifact, activation: Any) -> Output:
    first = artifact.outputs[0]
    return Output(name=first.name, shape=first.shape, activation=activation)


def _reported(chosen: Measurement) -> Reported:
    return Reported(
        device=chosen.device,
        threads=chosen.threads,
        latency_p50_ms=chosen.latency.p50_ms if chosen.latency else None,
        accuracy=chosen.accuracy,
    )


def _readme(meta: Meta, record: RunRecord) -> str:
    """The instructions for the device."""
    reported = meta.reported
    measured = []
    if reported.accuracy is not None:
        measured.append(
            f"- accuracy {reported.accuracy.top1:.2%} of {reported.accuracy.images} images "
            f"({reported.accuracy.split})"
        )
    if reported.latency_p50_ms is not None:
        measured.append(
            f"- {reported.latency_p50_ms:.3g} ms for one image (median), {reported.threads} "
            f"thread(s), on {reported.device.processor or reported.device.architecture}"
        )
    package = package_of(meta.artifact.runtime)
    return Template(README.read_text(encoding="utf-8")).substitute(
        name=meta.name,
        file=meta.artifact.file,
        runtime=meta.artifact.runtime,
        precision=meta.artifact.precision,
        package=package,
        version=reported.device.runtime_version or f"{package} (version not recorded)",
        labels=len(meta.labels),
        samples=len(meta.samples),
        measured="\n".join(measured) or "- nothing was measured",
        finished=record.finished,
    )


def _write(path: Path, members: Mapping[str, bytes]) -> None:
    """The zip, atomically and with the same bytes for the same members."""
    try:
        with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name, content in members.items():
                entry = zipfile.ZipInfo(name, EPOCH)
                entry.external_attr = 0o644 << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, content)
    except OSError as error:
        raise RunFolderError(
            f"cannot write {path}: {(error.strerror or str(error)).lower()}; choose another with -o"
        ) from error
