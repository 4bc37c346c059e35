"""The files of a run: exported for every target, measured where they will run, diagnosed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bevel.core.progress import note
from bevel.core.recipe import Recipe, Target
from bevel.core.records import Artifact, Measurement
from bevel.measurement.bench import Subject, images_for, measure_all
from bevel.measurement.doctor import diagnose_all
from bevel.measurement.parity import evaluate_artifacts
from bevel.measurement.shipping import choose
from bevel.pipeline.folder import RunFolder
from bevel.pipeline.int8 import fall_back
from bevel.pipeline.model import Model
from bevel.runtimes import export, load_runtime, open_artifact

Numbers = dict[str, Any]

File = tuple[str, str, str]
"""A file of a run: of which network (original or compressed), its runtime, its precision."""


def export_all(
    recipe: Recipe, folder: RunFolder, models: dict[str, Model], only: File | None = None
) -> dict[File, Artifact]:
    """The files of all targets, or only one of them."""
    artifacts: dict[File, Artifact] = {}
    for number, key in enumerate(files_of(recipe.targets), start=len(recipe.steps) + 1):
        if only not in (None, key):
            continue
        label, runtime, precision = key
        name = f"{number:02d}-export-{label}-{runtime}-{precision}"
        path = artifact_path(folder.path, label, runtime, precision)
        if folder.finished(name) is None:
            begun = time.perf_counter()
            numbers = _export(recipe, models[label], runtime, precision, path)
            folder.finish(name, "export", time.perf_counter() - begun, numbers, [path])
        artifacts[key] = open_artifact(path)
    return artifacts


def _export(recipe: Recipe, model: Model, runtime: str, precision: str, path: Path) -> Numbers:
    """Write a file; returns what is recorded of it."""
    options, calibration, fallback = recipe.quantization, None, None
    if precision == "int8":
        calibration = model.calibration(recipe.calibration.images)
        options, fallback = fall_back(
            model.net,
            model.example,
            runtime,
            options,
            calibration=calibration,
            validation=model.data.batches("validation"),
        )
    artifact = export(
        model.net,
        model.example,
        runtime=runtime,
        precision=precision,
        calibration=calibration,
        quantization=options,
        path=path,
    )
    numbers: Numbers = {"artifact": artifact.model_dump(mode="json")}
    if fallback is not None:
        numbers["fallback"] = fallback
    if precision != "float32":  # in float32 it is that of the step before
        batches = model.data.batches("validation")
        ((accuracy, _),) = evaluate_artifacts([(artifact, None)], batches, "validation")
        numbers["validation_top1"] = accuracy.top1
    return numbers


def measure_files(
    recipe: Recipe,
    folder: RunFolder,
    artifacts: dict[File, Artifact],
    models: dict[str, Model],
) -> None:
    """Measure everything on each device; files of one device are timed in turn."""
    places = {(target.device, target.threads): None for target in recipe.targets}
    measurements: list[Measurement] = []
    for device, threads in places:
        here = [t for t in recipe.targets if (t.device, t.threads) == (device, threads)]
        begun = time.perf_counter()
        images = {
            label: model.data.batches("test", limit=images_for(device))
            for label, model in models.items()
        }
        subjects = [
            Subject(key[0], artifacts[key], models[key[0]].net, images[key[0]])
            for key in files_of(here)
        ]
        measurements += measure_all(subjects, device=device, threads=threads, split="test")
        note(f"measured on {device} in {time.perf_counter() - begun:.0f} s")
    diagnoses = diagnose_all(measurements, models["compressed"].example[:1])
    shipments = choose(measurements, diagnoses, recipe.quantization.accuracy_drop)
    folder.update(measurements=measurements, diagnoses=diagnoses, shipments=shipments)


def artifact_path(run_folder: Path, label: str, runtime: str, precision: str) -> Path:
    """Where a run's file lies; `label` says of which network: original or compressed."""
    name = f"{label}-{runtime}-{precision}{load_runtime(runtime).SUFFIX}"
    return run_folder / "artifacts" / name


def files_of(targets: Sequence[Target]) -> list[File]:
    """The files that targets need.

    The float32 file of both networks is always among them: the original's is what speed is
    compared with, the compressed one's is shipped where int8 is no faster.
    """
    found: dict[File, None] = {}
    for label in ("original", "compressed"):
        found |= {(label, target.runtime, "float32"): None for target in targets}
    found |= {("compressed", target.runtime, target.precision): None for target in targets}
    return list(found)
