"""Verbs on exported files: export, measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import bevel.cli.console as console
import bevel.cli.networks as networks
from bevel.cli.files import Arguments, Checkpoint, Factory, Input, Model, Out, Runtime
from bevel.cli.listing import completing
from bevel.cli.runs import Json, Set
from bevel.core.errors import RecipeError
from bevel.core.recipe import Quantization, Recipe
from bevel.core.records import Artifact


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (export, measure):
        app.command()(command)


def export(
    model: Model,
    out: Out,
    runtime: Runtime = "onnxruntime",
    precision: Annotated[
        str, typer.Option(help="float32, float16, bfloat16, int8 or int8-weights.")
    ] = "float32",
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="For its data: int8 is calibrated on images.")
    ] = None,
    overrides: Set = None,
    factory: Factory = None,
    checkpoint: Checkpoint = None,
    arguments: Arguments = None,
    input_shape: Input = None,
    quantizer: Annotated[
        str | None, typer.Option(help="torch, native or auto; over the recipe's.")
    ] = None,
    observer: Annotated[
        str | None, typer.Option(help="minmax, percentile or mse; over the recipe's.")
    ] = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(help="Modules (globs) that stay in float. May be repeated."),
    ] = None,
    json: Json = False,
) -> None:
    """Export a network for a runtime, quantized if asked; writes FILE and FILE.json.

    With a recipe, its quantization section says how, accuracy_drop included.
    """
    networks.check_output(out)
    source = networks.read_recipe(recipe, overrides)
    options = _quantization(source, quantizer, observer, keep_float)
    if precision == "int8" and source is None:
        raise RecipeError("int8 is calibrated on images: give --recipe with a data section")
    with console.working(quiet_stdout=json):
        import bevel

        network = networks.open_network(
            model,
            factory=factory,
            arguments=arguments,
            checkpoint=checkpoint,
            input_shape=input_shape,
        )
        calibration = None
        if source is not None and precision != "float32":
            calibration, options = _calibrated(source, network, runtime, precision, options)
        artifact = bevel.export(
            network.net,
            network.example(),
            runtime=runtime,
            precision=precision,
            calibration=calibration,
            quantization=options,
            path=out,
        )
    if json:
        console.print_json(artifact.model_dump(mode="json"))
    else:
        console.print_text(f"{out}: {artifact.size_bytes:,} bytes, sha256 {artifact.sha256}")


def _test_images(source: Recipe, artifacts: Sequence[Artifact], limit: int | None) -> list[Any]:
    """For each file the test images of the recipe's data, in the size that it takes."""
    from bevel.data import load

    images: dict[str, Any] = {}
    sections = [source.data_for(artifact.inputs[0].shape[-1]) for artifact in artifacts]
    for section in sections:
        if section.model_dump_json() not in images:
            data = load(section, seed=source.seed)
            images[section.model_dump_json()] = data.batches("test", limit=limit)
    return [images[section.model_dump_json()] for section in sections]


def _calibrated(
    source: Recipe,
    network: networks.Network,
    runtime: str,
    precision: str,
    options: Quantization,
) -> tuple[Any, Quantization]:
    """Training images for the ranges, and the options with the layers that stay in float."""
    data = networks.fitting_data(source, network)
    calibration = data.batches("train", limit=source.calibration.images)
    if precision == "int8":
        from bevel.pipeline.int8 import fall_back

        options, _ = fall_back(
            network.net,
            network.example(),
            runtime,
            options,
            calibration=calibration,
            validation=data.batches("validation"),
        )
    return calibration, options


def _quantization(
    source: Recipe | None,
    quantizer: str | None,
    observer: str | None,
    keep_float: list[str] | None,
) -> Quantization:
    """The recipe's quantization section with the options over it.

    Raises:
        RecipeError: an option is none of its choices.
    """
    from pydantic import ValidationError

    given = {"quantizer": quantizer, "observer": observer, "keep_float": keep_float}
    recorded = source.quantization.model_dump() if source is not None else {}
    try:
        return Quantization.model_validate(
            recorded | {name: value for name, value in given.items() if value is not None}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise RecipeError(f"--{name}: {first['msg']}, got {first['input']!r}") from error


def measure(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Files that bevel export wrote.")
    ],
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    device: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Such as local or ssh:pi@raspberrypi.local; see: bevel list devices.",
            **completing("devices"),
        ),
    ] = "local",
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="For its data: accuracy on the test images.")
    ] = None,
    overrides: Set = None,
    json: Json = False,
) -> None:
    """Run exported files: latency (interleaved), memory and, with a recipe's data, accuracy."""
    source = networks.read_recipe(recipe, overrides)
    with console.working(quiet_stdout=json):
        from bevel.measurement.bench import Subject, images_for, measure_all
        from bevel.runtimes import open_artifact

        opened = [open_artifact(path) for path in artifacts]
        images = [None] * len(opened)
        if source is not None:
            images = _test_images(source, opened, images_for(device))
        subjects = [
            Subject(str(path), artifact, batches=own)
            for path, artifact, own in zip(artifacts, opened, images, strict=True)
        ]
        found = measure_all(subjects, device=device, threads=threads)
    if json:
        console.print_json({"measurements": [m.model_dump(mode="json") for m in found]})
        return
    from bevel.reporting import MEASURED, measured

    console.print_table(MEASURED, measured(found))
    for measurement in found:
        for warning in measurement.warnings:
            console.say(f"warning: {measurement.label}: {warning}")
