"""Post-training quantization of a traced network: prepare, calibrate, convert (PT2E)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from bevel.core.errors import FORWARD_FAULTS, ExportError, one_line
from bevel.core.progress import track
from bevel.core.quiet import quiet
from bevel.core.recipe import Quantization
from bevel.graph.program import fixed_batch

Rewrite = Callable[[GraphModule], object]

CORRECTION_IMAGES = 256
"""Images that errors of biases are averaged over, and rounding is learned on."""


def quantize(
    program: ExportedProgram,
    quantizer: Any,
    calibration: Iterable[Any],
    options: Quantization | None = None,
    *,
    fold_weights: bool = True,
    rewrites: Sequence[Rewrite] = (),
) -> GraphModule:
    """A network that computes what the int8 file will compute, in torch.

    Scale and zero point of each tensor are those of its observer, which the quantizer's types
    name (`u8s8(options.ranges)`).

    Args:
        program: a traced network.
        quantizer: a torchao `Quantizer`: bevel's `FusingQuantizer`, or a runtime's own.
        calibration: re-iterable batches (see `inputs_of`), which are cut to pieces of the
            program's batch size where that is fixed.
        options: what is done besides; the modules in `keep_float` stay in float.
        fold_weights: store weights as integers; without it as float, followed by Quantize.
        rewrites: changes to the traced network, in place, that keep what it computes in float.

    Raises:
        ExportError: calibration is empty, or its batches do not fit the network.
    """
    prepared = calibrated(program, quantizer, calibration, options, rewrites)
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        from bevel.quantization.folding import converted

        return converted(prepared, partial(convert_pt2e, fold_quantize=fold_weights))


def calibrated(
    program: ExportedProgram,
    quantizer: Any,
    calibration: Iterable[Any],
    options: Quantization | None = None,
    rewrites: Sequence[Rewrite] = (),
) -> GraphModule:
    """The network in float, with an observer that knows the range at every tensor to quantize.

    As `quantize`, which goes on from here.
    """
    options = options or Quantization()
    with quiet():  # not around calibration, which shows its progress
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

        from bevel.quantization import rounding, weights
        from bevel.quantization.folding import keep_apart, rejoin
        from bevel.quantization.keeping import KeepingFloat

        module = program.module()
    keep_apart(module)
    if options.equalize:
        weights.fold_batch_norms(module)
        weights.equalize(module)
    for rewrite in rewrites:
        rewrite(module)
    with quiet():
        if options.keep_float:
            quantizer = KeepingFloat(quantizer, options.keep_float)
        prepared: GraphModule = prepare_pt2e(module, quantizer)
    rejoin(prepared)
    count = len(program.graph_signature.user_inputs)
    static_batch = fixed_batch(program)
    _calibrate(prepared, calibration, count, static_batch)
    if options.learn_rounding:
        pieces = _pieces(calibration, count, static_batch, CORRECTION_IMAGES)
        rounding.learn_rounding(prepared, track(pieces, "inputs of layers", len(pieces)))
    if options.correct_bias:
        pieces = _pieces(calibration, count, static_batch, CORRECTION_IMAGES)
        weights.correct_biases(prepared, track(pieces, "correct biases", len(pieces)))
    return prepared


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


def _pieces(
    calibration: Iterable[Any], count: int, static_batch: int | None, images: int
) -> list[tuple[Tensor, ...]]:
    """The first images of the calibration, as inputs of the network."""
    found: list[tuple[Tensor, ...]] = []
    for batch in calibration:
        if sum(len(piece[0]) for piece in found) >= images:
            break
        found += _chunks(inputs_of(batch, count), static_batch)
    return found


def _chunks(inputs: tuple[Tensor, ...], static_batch: int | None) -> Iterator[tuple[Tensor, ...]]:
    """The batch as it is, or in whole pieces of the only size the network takes."""
    if static_batch is None:
        yield inputs
        return
    for start in range(0, len(inputs[0]) - static_batch + 1, static_batch):
        yield tuple(item[start : start + static_batch] for item in inputs)
