"""Runtimes: one file each, with all that a runtime needs. The file name is the runtime's name.

This package and `onnxruntime.py` import no torch, so that a device runs an artifact without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from pydantic import ValidationError

from bevel.core import plugins
from bevel.core.errors import ExportError, MeasurementError, one_line
from bevel.core.files import atomic, sha256, write_text
from bevel.core.recipe import Quantization
from bevel.core.records import Artifact, TensorSignature

if TYPE_CHECKING:
    from torch import Tensor, nn


class Session(Protocol):
    """A loaded artifact."""

    inputs: list[TensorSignature]
    outputs: list[TensorSignature]

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One forward pass: arrays for the inputs, in order, to arrays of the outputs."""
        ...


CHANNEL_STEP = 8
"""The widths that suit a runtime which does not say."""


class Runtime(Protocol):
    """What a runtime's module offers.

    It may also have `channel_step(precision) -> int`: the number whose multiples are the widths
    that it runs fast; `operators(path) -> list[Operator]`: what the file holds, in order; and
    `profile(path, arrays, threads) -> dict[str, float]`: milliseconds per run by operator name,
    from the runtime's own profiler; `quantizer(options)`: the torchao quantizer that says what its
    int8 is, for training and for choosing layers that stay in float. A runtime that is not
    installed where files are written has `signature(path)`: inputs and outputs of a file, told
    without running it.
    """

    SUFFIX: str
    PRECISIONS: tuple[str, ...]

    def version(self) -> str:
        """Version of the runtime that would run an artifact here."""
        ...

    def export(
        self,
        net: nn.Module,
        example_inputs: tuple[Tensor, ...],
        *,
        precision: str,
        calibration: Iterable[Any] | None,
        quantization: Quantization,
        path: Path,
    ) -> str | None:
        """Write the file; return which quantizer made it, with which types, if any."""
        ...

    def open_session(self, path: Path, threads: int) -> Session:
        """Load an artifact for this many threads."""
        ...


def load_runtime(name: str, precision: str | None = None) -> Runtime:
    """The runtime of that name; with a precision, one that has it.

    Raises:
        UnknownNameError: there is no such runtime.
        MissingDependencyError: it is not installed.
        ExportError: it does not have that precision.
    """
    runtime: Runtime = plugins.load("runtimes", name)
    if precision is not None and precision not in runtime.PRECISIONS:
        raise ExportError(
            f"the runtime '{name}' has no precision '{precision}'. "
            f"Available: {', '.join(runtime.PRECISIONS)}."
        )
    return runtime


def channel_step(targets: Iterable[tuple[str, str]]) -> int:
    """The largest step of channels that any of these (runtime, precision) is fast with.

    Steps are powers of two, so widths of the largest suit all of them. They follow from how the
    runtimes' kernels lay channels out; how much a width in between costs on a processor is for
    `bevel measure` to say.

    Raises:
        UnknownNameError: there is no such runtime.
        MissingDependencyError: it is not installed.
        ExportError: it does not have that precision.
    """
    steps = []
    for name, precision in targets:
        step = getattr(load_runtime(name, precision), "channel_step", None)
        steps.append(CHANNEL_STEP if step is None else int(step(precision)))
    return max(steps, default=CHANNEL_STEP)


def export(
    net: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    runtime: str = "onnxruntime",
    precision: str = "float32",
    calibration: Iterable[Any] | None = None,
    quantization: Quantization | None = None,
    path: Path | str,
) -> Artifact:
    """Write a network as a file that the runtime runs, and `FILE.json` beside it.

    The same network and calibration give the same bytes.

    Args:
        net: the network; it is exported in eval mode and not changed.
        example_inputs: a tensor or the forward's positional tensors, batch first. The file takes
            any batch size where the network allows it, else one image at a time.
        runtime: see `bevel list runtimes`.
        precision: float32, or another that the runtime has.
        calibration: re-iterable batches of images (N, C, H, W), or tuples that start with one;
            int8 takes its ranges from them.
        quantization: how float becomes int8; default: see `Quantization`.
        path: the file to write; it appears whole or not at all.

    Raises:
        ExportError: the network cannot be exported, shortened to its reason, or is not in float32;
            or int8 without calibration; or the file cannot be written.
        UnknownNameError: there is no such runtime.
    """
    from bevel.graph.copying import laid_out

    plugin = load_runtime(runtime, precision)
    if precision == "int8" and calibration is None:
        raise ExportError("int8 takes its ranges from calibration images: pass calibration")
    _check_precision(net)
    path = Path(path)
    given_inputs = example_inputs if isinstance(example_inputs, Sequence) else (example_inputs,)
    # ExecuTorch has a file take its inputs in the order in which the examples lie, and does not
    # notice arrays that lie otherwise; images out of a data loader are often in channels_last.
    inputs = tuple(map(laid_out, given_inputs))
    try:
        with atomic(path) as temporary:
            quantizer = plugin.export(
                net,
                inputs,
                precision=precision,
                calibration=calibration,
                quantization=quantization or Quantization(),
                path=temporary,
            )
            taken, given = _signature(plugin, temporary)
            artifact = Artifact(
                path=path.name,
                runtime=runtime,
                precision=precision,
                inputs=taken,
                outputs=given,
                size_bytes=temporary.stat().st_size,
                sha256=sha256(temporary),
                quantizer=_with_kept(quantizer, quantization),
            )
        write_text(sidecar(path), artifact.model_dump_json(indent=1) + "\n")
    except OSError as error:
        if not _is_about(error, path):
            raise
        raise ExportError(
            f"cannot write {path}: {(error.strerror or str(error)).lower()}; check the folder and "
            "its permissions"
        ) from error
    return artifact.model_copy(update={"path": str(path)})


def _check_precision(net: nn.Module) -> None:
    """Files are made from float32; runtimes differ in what they do with anything else.

    Raises:
        ExportError: a weight is of another floating type.
    """
    for name, tensor in net.named_parameters():
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_floating_point() and kind != "float32":
            raise ExportError(
                f"the network's weights are {kind} ({name}), and files are made from float32: call "
                "net.float() first; the precision of the file is chosen by precision="
            )


def _signature(plugin: Any, path: Path) -> tuple[list[TensorSignature], list[TensorSignature]]:
    """Inputs and outputs of a file: by loading it, unless the runtime can tell without."""
    if hasattr(plugin, "signature"):
        inputs, outputs = plugin.signature(path)
    else:
        session = plugin.open_session(path, 1)
        inputs, outputs = session.inputs, session.outputs
    return list(inputs), list(outputs)


def _with_kept(quantizer: str | None, options: Quantization | None) -> str | None:
    """The quantizer's description, with the layers that were left in float."""
    if quantizer is None or options is None or not options.keep_float:
        return quantizer
    return f"{quantizer}; in float: {', '.join(options.keep_float)}"


def _is_about(error: OSError, path: Path) -> bool:
    """Whether the system refused this file or its folder, not something that the network reads."""
    if error.filename is None:
        return False
    named, path = Path(error.filename).absolute(), path.absolute()
    return path.is_relative_to(named) or named.parent == path.parent


def sidecar(path: Path) -> Path:
    """Where an artifact's description lies."""
    return path.with_name(path.name + ".json")


def open_artifact(path: Path | str) -> Artifact:
    """The description of an exported file.

    Raises:
        MeasurementError: the file or its description is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise MeasurementError(f"no exported file at {path}")
    try:
        text = sidecar(path).read_text(encoding="utf-8")
        artifact = Artifact.model_validate_json(text)
    except FileNotFoundError as error:
        raise MeasurementError(
            f"{path} has no description {sidecar(path).name} beside it: export it with bevel, "
            "and keep both files together"
        ) from error
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise MeasurementError(f"{sidecar(path)} is damaged: {one_line(error, 120)}") from error
    if sha256(path) != artifact.sha256:
        raise MeasurementError(
            f"{path} is not the file that {sidecar(path).name} describes (its hash differs): "
            "it is damaged or was replaced; export it again"
        )
    return artifact.model_copy(update={"path": str(path)})
