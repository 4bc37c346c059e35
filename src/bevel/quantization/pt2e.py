"""Post-training quantization of a traced network: prepare, calibrate, convert (PT2E)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from bevel.core.errors import FORWARD_FAULTS, ExportError, one_line
from bevel.core.progress import track
from bevel.core.quiet import quiet
from bevel.graph.program import fixed_batch


def quantize(program: ExportedProgram, quantizer: Any, calibration: Iterable[Any]) -> GraphModule:
    """A network that computes what the int8 file will compute, in torch.

    `quantizer` is a torchao `Quantizer`; `calibration` yields batches (see `inputs_of`), which are
    cut to pieces of the program's batch size where that is fixed. Scale and zero point of each
    tensor are those of its observer.

    Raises:
        ExportError: calibration is empty, or its batches do not fit the network.
    """
    with quiet():  # not around calibration, which shows its progress
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        prepared = prepare_pt2e(program.module(), quantizer)
    count = len(program.graph_signature.user_inputs)
    _calibrate(prepared, calibration, count, fixed_batch(program))
    with quiet():
        converted: GraphModule = convert_pt2e(prepared)
    return converted


def inputs_of(batch: Any, count: int) -> tuple[Tensor, ...]:
    """The network's `count` inputs in a batch: a tensor, or a sequence that starts with them.

    Raises:
        ExportError: the batch does not hold that many tensors.
    """
    items = (batch,) if isinstance(batch, Tensor) else batch
    if not isinstance(items, list | tuple):
        raise ExportError(
            f"a calibration batch is a {type(batch).__name__}; expected a tensor, or a pair of "
            "images and labels"
        )
    inputs = tuple(items[:count])
    if len(inputs) < count or not all(isinstance(item, Tensor) for item in inputs):
        raise ExportError(
            f"a calibration batch holds {len(inputs)} tensors, and the network takes {count}"
        )
    return inputs


def _calibrate(
    prepared: GraphModule, calibration: Iterable[Any], count: int, static_batch: int | None
) -> None:
    """Run all batches through the observed network."""
    total = len(calibration) if isinstance(calibration, Sized) else None
    seen = 0
    with torch.no_grad():
        for batch in track(calibration, "calibrate", total):
            for inputs in _chunks(inputs_of(batch, count), static_batch):
                try:
                    prepared(*inputs)
                except FORWARD_FAULTS as error:
                    shapes = ", ".join(str(tuple(item.shape)) for item in inputs)
                    raise ExportError(
                        f"the network does not run on a calibration batch of shape {shapes}: "
                        f"{one_line(error, 160)}; give batches like the example inputs"
                    ) from error
                seen += len(inputs[0])
    if not seen:
        raise ExportError(
            "int8 needs calibration images and got none"
            + (f" (whole batches of {static_batch})" if static_batch else "")
            + "; give a list or another collection that can be read more than once"
        )


def _chunks(inputs: tuple[Tensor, ...], static_batch: int | None) -> Iterator[tuple[Tensor, ...]]:
    """The batch as it is, or in whole pieces of the only size the network takes."""
    if static_batch is None:
        yield inputs
        return
    for start in range(0, len(inputs[0]) - static_batch + 1, static_batch):
        yield tuple(item[start : start + static_batch] for item in inputs)
