"""What int8 asks of a run before the export: training for it, and layers that stay in float."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bevel.core.quiet import quiet
from bevel.core.recipe import Quantization, Recipe
from bevel.core.steps import QatStep
from bevel.data import Data
from bevel.finetuning.train import Trained, finetune
from bevel.graph.program import export_program
from bevel.runtimes import load_runtime


def quantizer_of(runtime: str, options: Quantization) -> Any:
    """The torchao quantizer that says what this runtime's int8 is.

    A runtime's module has it as `quantizer(options)`; without that its int8 is taken to be uint8
    activations and int8 weights at every operator that can be fused.
    """
    own = getattr(load_runtime(runtime), "quantizer", None)
    if own is not None:
        return own(options)
    with quiet():  # torchao talks while it is imported
        from bevel.quantization.annotate import FusingQuantizer
        from bevel.quantization.ranges import u8s8
    return FusingQuantizer(u8s8(options.ranges))


def train_for_int8(
    net: nn.Module,
    example: Tensor,
    data: Data,
    settings: QatStep,
    recipe: Recipe,
    *,
    seed: int,
    teacher: nn.Module | None,
    folder: Path,
) -> tuple[nn.Module, Trained]:
    """Fine-tune a copy of the network with int8 in its forward.

    Returns:
        The network in float with the weights learned, and the training, whose validation
        accuracy is that of int8.
    """
    with quiet():
        from bevel.quantization.aware import freeze, quantization_aware, trained_weights
    runtime = settings.runtime or int8_runtime(recipe)
    aware = quantization_aware(
        export_program(net, (example,)),
        quantizer_of(runtime, recipe.quantization),
        data.batches("train", limit=recipe.calibration.images),
        recipe.quantization,
    )
    trained = finetune(
        aware,
        data,
        settings,
        seed=seed,
        teacher=teacher,
        folder=folder,
        label="qat",
        freeze=freeze,
    )
    return trained_weights(net, trained.net), trained


def int8_runtime(recipe: Recipe) -> str:
    """The runtime of the first int8 target."""
    return next(target.runtime for target in recipe.targets if target.precision == "int8")


def fall_back(
    net: nn.Module,
    example: Tensor,
    runtime: str,
    options: Quantization,
    *,
    calibration: Iterable[Any],
    validation: Iterable[tuple[Tensor, Tensor]],
) -> tuple[Quantization, dict[str, Any] | None]:
    """The options with enough layers in float for `accuracy_drop` to hold.

    Returns:
        The options, and for the record what was kept, why, and every tensor's noise; None
        where no limit was set.
    """
    if options.accuracy_drop is None:
        return options, None
    with quiet():
        from bevel.quantization.pt2e import calibrated
        from bevel.quantization.sensitivity import fewest_in_float
        from bevel.quantization.simulation import Simulation
    program = export_program(net, (example,))
    prepared = calibrated(program, quantizer_of(runtime, options), calibration, options)
    found = fewest_in_float(Simulation(prepared), calibration, validation, options.accuracy_drop)
    keep = [*options.keep_float, *found.keep_float]
    record = {**asdict(found), "summary": str(found)}
    return options.model_copy(update={"keep_float": keep}), record
