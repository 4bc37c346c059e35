"""bevel doctor: what an exported file is made of, and why it is not faster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import bevel.cli.console as console
import bevel.cli.networks as networks
from bevel.cli.files import Arguments, Factory
from bevel.cli.runs import Json, Set
from bevel.core.errors import MeasurementError
from bevel.core.recipe import Recipe
from bevel.core.records import Artifact, Diagnosis

if TYPE_CHECKING:
    from torch import Tensor, nn


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command()(doctor)


def doctor(
    artifact: Annotated[Path, typer.Argument(help="A file that bevel export wrote.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="What it should agree with: the exported float file, a file that bevel prune "
            "wrote, or a model's name.",
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images. Default: random numbers.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="For its data: test images; with --images, normalisation."),
    ] = None,
    overrides: Set = None,
    count: Annotated[int, typer.Option(min=1, help="Images for parity.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    factory: Factory = None,
    arguments: Arguments = None,
    json: Json = False,
) -> None:
    """Say why an exported file is not faster: float operators, conversions, widths, times."""
    source = networks.read_recipe(recipe, overrides)
    with console.working(quiet_stdout=json):
        from bevel.measurement.doctor import diagnose
        from bevel.runtimes import open_artifact

        described = open_artifact(artifact)
        other = _reference(against, described, factory, arguments)
        speedup, warnings = _speedup(described, other, threads)
        found = diagnose(
            described,
            threads=threads,
            images=_inputs(described, images, source, count),
            count=count,
            against=other,
            speedup=speedup,
        )
    if json:
        console.print_json(found.model_dump(mode="json") | {"warnings": warnings})
        return
    _show(found)
    for warning in warnings:
        console.say(f"warning: {warning}")


def _reference(
    name: str | None, artifact: Artifact, factory: str | None, arguments: list[str] | None
) -> Artifact | nn.Module | None:
    """The exported file or network that --against names."""
    from bevel.runtimes import open_artifact, sidecar

    if name is None:
        return None
    if sidecar(Path(name)).is_file():
        return open_artifact(name)
    if not name.endswith(networks.SUFFIX) and Path(name).is_file():
        raise MeasurementError(
            f"--against {name} has no description {sidecar(Path(name)).name} beside it: give a "
            "file that bevel export or bevel prune wrote, or a model's name"
        )
    shape = "x".join(str(size if isinstance(size, int) else 1) for size in artifact.inputs[0].shape)
    return networks.open_network(name, factory=factory, arguments=arguments, input_shape=shape).net


def _inputs(
    artifact: Artifact, folder: Path | None, source: Recipe | None, count: int
) -> Tensor | None:
    """Images for the file's input, or None for random numbers."""
    if folder is not None:
        from bevel.data.unlabelled import folder_images

        shape = artifact.inputs[0].shape[1:]
        if len(shape) != 3 or not all(isinstance(size, int) for size in shape):
            raise MeasurementError(
                f"{artifact.path} takes inputs of shape {artifact.inputs[0].shape}, no images "
                "(N, C, H, W) of one size: leave out --images"
            )
        channels, height, width = (int(size) for size in shape)
        normalize = source.data.normalize if source is not None else None
        return folder_images(folder, (channels, height, width), normalize, count)
    if source is not None:
        from bevel.data import load

        data = load(source.data_for(artifact.inputs[0].shape[-1]), seed=source.seed)
        images, _ = next(iter(data.batches("test", batch_size=count, limit=count)))
        return images
    return None


def _speedup(
    artifact: Artifact, other: Artifact | Any, threads: int
) -> tuple[float | None, list[str]]:
    """How much faster than the other file it is, timed in turn, and what makes that uncertain."""
    from bevel.measurement.bench import Subject, measure_all

    if not isinstance(other, Artifact):
        return None, []
    subjects = [Subject("float file", other), Subject("file", artifact)]
    float_file, own = measure_all(subjects, threads=threads)
    if float_file.latency is None or own.latency is None:
        return None, []
    warnings = list(dict.fromkeys([*float_file.warnings, *own.warnings]))
    return float_file.latency.p50_ms / own.latency.p50_ms, warnings


def _show(found: Diagnosis) -> None:
    """A diagnosis on stdout."""
    from bevel.reporting import diagnosis as rows

    console.print_text(f"{rows.title(found)}: {found.verdict}.")
    console.print_table(("", "value"), rows.facts(found))
    if found.operators:
        console.print_table(rows.KINDS, rows.kinds(found))
    if slowest := rows.slowest(found):
        console.print_table(rows.SLOWEST, slowest)
    for position, line in enumerate(rows.findings(found), start=1):
        console.print_text(f"{position}. {line}")
