"""One verb per stage on networks in files: prune, verify, finetune."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import bevel.cli.console as console
import bevel.cli.networks as networks
from bevel.cli.listing import complete_model, completing
from bevel.cli.runs import Json, Set
from bevel.core import plugins
from bevel.core import recipe as recipes
from bevel.core.errors import ProofError, RecipeError
from bevel.core.files import sha256
from bevel.core.limits import QUANTITIES
from bevel.core.recipe import Recipe, Target
from bevel.core.steps import FinetuneStep, PruneStep

if TYPE_CHECKING:
    from bevel.pipeline.within import Timing
    from bevel.pruning.plan import PruningPlan
    from bevel.pruning.verify import Proof

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model's name as in a recipe, or a file that bevel prune wrote.",
        autocompletion=complete_model,
    ),
]
PrunedFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="A file that bevel prune or finetune wrote.")
]
Factory = Annotated[
    str | None,
    typer.Option("--model", help="For a file: the model's name, over what the file states."),
]
Arguments = Annotated[
    list[str] | None,
    typer.Option("--arg", metavar="NAME=VALUE", help="Argument of the model. May be repeated."),
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Trained weights of the original: .safetensors, .pt, .pth, .th.")
]
Input = Annotated[
    str | None,
    typer.Option("--input", metavar="NxCxHxW", help="Shape of an input, such as 1x3x32x32."),
]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", help="A recipe, for its data and settings.")
]
Runtime = Annotated[str, typer.Option(help="See: bevel list runtimes.", **completing("runtimes"))]
Out = Annotated[Path, typer.Option(help="The file to write.")]
Criterion = Annotated[str, typer.Option(help="See: bevel list criteria.", **completing("criteria"))]
Allocate = Annotated[
    str, typer.Option(help="See: bevel list allocators.", **completing("allocators"))
]
Reduction = Annotated[
    str, typer.Option(help="mean, max, product or first: over all that goes with a channel.")
]
Macs = Annotated[str | None, typer.Option(help="MACs that may remain: 0.5, 50% or a number.")]
Params = Annotated[str | None, typer.Option(help="Parameters that may remain, likewise.")]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="NAME=LIMIT",
        help=f"What may remain of {', '.join(QUANTITIES)}, such as size_kb=300 or "
        "latency_ms=40%. May be repeated: all hold.",
    ),
]
BudgetTarget = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="RUNTIME:PRECISION@DEVICE",
        help="Where latency, size and memory count. Default: of the recipe, the first int8 "
        "target or the first.",
    ),
]
Ratios = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB=SHARE",
        help="Share of the channels to remove by layer. May be repeated: later ones win.",
    ),
]
Ratio = Annotated[
    float | None, typer.Option(help="Share of the channels to remove; instead of a budget.")
]
Align = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help="Widths become multiples of this; auto: what the recipe's targets like.",
    ),
]
Ignore = Annotated[
    list[str] | None, typer.Option(help="Modules (globs) that keep all. May be repeated.")
]
DataName = Annotated[
    str | None,
    typer.Option(
        help="Data, for allocators and criteria that look at images.", **completing("datasets")
    ),
]
Program = Annotated[
    bool,
    typer.Option(
        "--program",
        help="Write OUT's name with .pt2 too: a torch.export program, runs without the code.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for command in (prune, verify, finetune):
        app.command()(command)


def prune(
    model: Model,
    out: Out,
    checkpoint: Checkpoint = None,
    arguments: Arguments = None,
    input_shape: Input = None,
    factory: Factory = None,
    criterion: Criterion = "l2",
    allocate: Allocate = "global",
    reduction: Reduction = "mean",
    macs: Macs = None,
    params: Params = None,
    budget: Budgets = None,
    target: BudgetTarget = None,
    ratio: Ratio = None,
    ratios: Ratios = None,
    align: Align = "8",
    ignore: Ignore = None,
    recipe: RecipeOption = None,
    overrides: Set = None,
    data: DataName = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the data.")] = None,
    program: Program = False,
    json: Json = False,
) -> None:
    """Remove channels from a network, prove that nothing else changed, and save it."""
    networks.check_output(out, networks.SUFFIX)
    step = _prune_step(
        criterion=criterion,
        allocate=allocate,
        reduction=reduction,
        budget=networks.parse_budget(budget, {"macs": macs, "params": params}),
        ratio=ratio,
        ratios=networks.parse_ratios(ratios),
        align=align,
        ignore=ignore or [],
    )
    source = networks.read_recipe(recipe, overrides, data=data, root=root)
    _check_calibration(step, source)
    place = _budget_target(step, source, networks.parse_target(target))
    with console.working(quiet_stdout=json):
        network = networks.open_network(
            model,
            factory=factory,
            arguments=arguments,
            checkpoint=checkpoint,
            input_shape=input_shape,
        )
        plan, proof, timing = _prune_and_save(network, step, source, place, out, program=program)
    _tell_pruned(out, plan, proof, timing, program=program, json=json)


def _tell_pruned(
    out: Path,
    plan: PruningPlan,
    proof: Proof,
    timing: Timing | None,
    *,
    program: bool,
    json: bool,
) -> None:
    """What was written, as one JSON object or for people."""
    written = _written(out) | ({"program": str(out.with_suffix(".pt2"))} if program else {})
    if timing is not None:
        written |= {"latency": timing.model_dump(mode="json") | {"summary": str(timing)}}
    if json:
        console.print_json(_pruned_json(written, plan, proof))
    else:
        _say_pruned(written, plan, proof)


def _check_calibration(step: PruneStep, source: Recipe | None) -> None:
    """Refuse an allocator or a criterion that looks at images where there are none.

    Raises:
        RecipeError: the allocator needs a recipe.
        PruningError: the criterion does.
        UnknownNameError: there is no such allocator or criterion.
    """
    if source is not None:
        return
    from bevel.pruning.scoring import check_calibration

    give = "give --recipe, or --data and --root"
    if plugins.load("allocators", step.allocate).NEEDS_CALIBRATION and step.ratios is None:
        raise RecipeError(f"--allocate {step.allocate} measures on held-out images: {give}")
    check_calibration(step.criterion, give)


def _budget_target(step: PruneStep, source: Recipe | None, target: Target | None) -> Target:
    """Where latency, size and memory count.

    Raises:
        RecipeError: a latency is limited, and nothing says where.
    """
    if target is not None:
        return target
    if source is not None and source.name != networks.COMMAND_LINE:
        from bevel.pipeline.planning import budget_target

        return budget_target(source.targets)
    if step.budget is not None and step.budget.latency_ms is not None:
        raise RecipeError(
            "latency_ms is measured on a target: give --target, such as onnxruntime:int8@local, or "
            "--recipe"
        )
    return Target()


def _prune_and_save(
    network: networks.Network,
    step: PruneStep,
    source: Recipe | None,
    target: Target,
    out: Path,
    *,
    program: bool,
) -> tuple[PruningPlan, Proof, Timing | None]:
    """Plan, slice, prove, and write the file; a file that was pruned before keeps its first plan.

    Returns:
        The plan on the network as it was opened, its proof, and how its latency came about.
    """
    import bevel
    from bevel.pipeline.planning import plan_step

    example = network.example()
    # Training images are for int8; without a recipe none: its times do not depend on the ranges.
    held_out, images = _images(source, network) if source is not None else (None, tuple)
    plan, timing = plan_step(
        network.net,
        example,
        step,
        held_out,
        target=target,
        align=_alignment(step, source),
        seed=source.seed if source else 0,
        quantization=source.quantization if source else None,
        images=images,
    )
    pruned = bevel.prune(network.net, plan)
    proof = bevel.verify_pruning(network.net, pruned, plan, example)
    whole = network.plan.then(plan) if network.plan is not None else plan
    bevel.save_pruned(
        pruned,
        whole,
        out,
        model=network.description(),
        surgery=network.surgery,
        program=program,
        example_inputs=example,
    )
    return plan, proof, timing


def _pruned_json(written: dict[str, Any], plan: PruningPlan, proof: Proof) -> dict[str, Any]:
    """What --json prints of a pruning."""
    groups = [group.model_dump(mode="json") for group in plan.groups]
    return (
        written
        | {"before": plan.before.model_dump(), "after": plan.after.model_dump()}
        | {"groups": groups, "proof": proof.model_dump(mode="json"), "notes": plan.notes}
    )


def _say_pruned(written: dict[str, Any], plan: PruningPlan, proof: Proof) -> None:
    """What stayed whole, what is left, and the proof, for people."""
    for note in plan.notes:
        console.say(f"note: {note}")
    console.print_text(
        f"{written['file']}: MACs {plan.before.macs:,} -> {plan.after.macs:,} "
        f"({plan.after.macs / plan.before.macs:.0%}), parameters {plan.before.params:,} -> "
        f"{plan.after.params:,} ({plan.after.params / plan.before.params:.0%})\n{_proven(proof)}"
    )
    if "latency" in written:
        console.print_text(written["latency"]["summary"])
    if "program" in written:
        console.print_text(f"{written['program']}: torch.export.load runs it without the code")


def _prune_step(**options: Any) -> PruneStep:
    """The options checked as a recipe's prune step is.

    Raises:
        RecipeError: one of them is out of range, or budget and ratio are mixed up.
    """
    from pydantic import ValidationError

    try:
        return PruneStep.model_validate(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [part for part in first["loc"] if part in (*QUANTITIES, *options)]
        option = f"--{path[-1]}: " if path else ""
        message = first["msg"].removeprefix("Value error, ")
        if path == ["align"]:
            message += f", got {options['align']}"
        elif not path:
            message = (
                "give --macs, --params or --budget (what may remain) or --ratio (what is removed), "
                "or --ratios by layer"
            )
        raise RecipeError(f"{option}{message}") from error


def _alignment(step: PruneStep, source: Recipe | None) -> int:
    """The step of widths, asked of the recipe's targets where it is `auto`."""
    if step.align != "auto":
        return step.align
    if source is None:
        raise RecipeError("--align auto asks the targets of a recipe: give --recipe, or a number")
    from bevel.pipeline.planning import alignment

    return alignment(step, source.targets)


def verify(
    file: PrunedFile,
    checkpoint: Checkpoint = None,
    factory: Factory = None,
    arguments: Arguments = None,
    input_shape: Input = None,
    json: Json = False,
) -> None:
    """Prove that a pruned network equals its original with the same channels zeroed.

    For a file as bevel prune wrote it: fine-tuned weights differ from the original's.
    """
    with console.working(quiet_stdout=json):
        import bevel

        network = networks.open_network(
            str(file), factory=factory, arguments=arguments, input_shape=input_shape
        )
        if network.plan is None:
            raise RecipeError(f"{file} is not a file that bevel prune wrote (*.safetensors)")
        if network.surgery is not None and network.surgery.actions:
            raise RecipeError(
                f"{file} was operated on before it was pruned, and that network's weights are not "
                "a checkpoint's; prove it in Python: bevel.verify_pruning(lite, pruned, plan, x)"
            )
        original = network.original(checkpoint)
        try:
            proof = bevel.verify_pruning(original, network.net, network.plan, network.example())
        except ProofError as error:
            weights = "other weights" if checkpoint else "untrained weights: give --checkpoint"
            raise ProofError(
                f"{file} is not its original pruned, or that has {weights}, or the file was "
                f"fine-tuned since: {error}"
            ) from error
    if json:
        console.print_json({"file": str(file), "proof": proof.model_dump(mode="json")})
    else:
        console.print_text(_proven(proof))


def finetune(
    file: PrunedFile,
    out: Out,
    recipe: Annotated[Path, typer.Option("--recipe", help="For its data, model and settings.")],
    overrides: Set = None,
    factory: Factory = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Over the recipe's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Over the recipe's.")] = None,
    json: Json = False,
) -> None:
    """Train a pruned network as the recipe's last finetune step says."""
    networks.check_output(out, networks.SUFFIX)
    source = recipes.load(recipe, tuple(overrides or ()))
    settings = _finetune_settings(source, epochs, lr)
    with console.working(quiet_stdout=json):
        import bevel

        network = networks.open_network(str(file), factory=factory)
        if network.plan is None:
            raise RecipeError(f"{file} is not a file that bevel prune wrote (*.safetensors)")
        data = networks.fitting_data(source, network)
        teacher = _teacher(source, settings, shown=data.input_shape[1:])
        trained = bevel.finetune(network.net, data, settings, seed=source.seed, teacher=teacher)
        bevel.save_pruned(
            trained.net,
            network.plan,
            out,
            model=network.description(),
            surgery=network.surgery and network.surgery.settled(trained.net),
        )
    top1 = trained.history[-1]["validation_top1"]
    if json:
        console.print_json(
            _written(out) | {"history": trained.history, "execution": trained.execution}
        )
    else:
        console.print_text(f"{out}: validation accuracy {top1:.2%}")


def _finetune_settings(source: Recipe, epochs: int | None, lr: float | None) -> FinetuneStep:
    """The recipe's last finetune step with the options over it."""
    steps = [step.finetune for step in source.steps if step.finetune is not None]
    if not steps:
        raise RecipeError(f"the recipe {source.name} has no finetune step: add one to its steps")
    if lr is not None and lr <= 0:
        raise RecipeError(f"--lr {lr}: expected more than 0")
    given = {"epochs": epochs, "lr": lr}
    return steps[-1].model_copy(update={k: v for k, v in given.items() if v is not None})


def _teacher(source: Recipe, settings: FinetuneStep, *, shown: tuple[int, int]) -> Any:
    """The recipe's original, if the network learns from it; `shown` is the images' (H, W)."""
    from bevel.finetuning.distill import teacher_of
    from bevel.models import build

    if settings.distill is None:
        return None
    if source.model.head == "new":
        raise RecipeError("the original's new head is trained in a run only: use bevel run")
    original = build(source.model.name, source.model.arguments, source.model.checkpoint)
    size = source.data.size
    known = (size, size) if size is not None else shown
    return teacher_of(original, settings, known=known, shown=shown)


def _images(source: Recipe, network: networks.Network) -> tuple[Any, Callable[[], Iterable[Any]]]:
    """Labelled held-out images for what measures, and what gives training images."""
    data, limit = networks.fitting_data(source, network), source.calibration.images
    return data.batches("validation", limit=limit), partial(data.batches, "train", limit=limit)


def _proven(proof: Proof) -> str:
    """A proof in a sentence, and a second one if inputs were skipped."""
    proven = (
        f"proof: equals the original with the removed channels zeroed, to {proof.worst:.1e} of the "
        f"largest output (float64, {proof.inputs} inputs; allowed {proof.tolerance:.0e})"
    )
    if proof.skipped:
        proven += f"; skipped, as the original does not run on it: {'; '.join(proof.skipped)}"
    return proven


def _written(path: Path) -> dict[str, Any]:
    """A file that a command wrote, for --json."""
    return {"file": str(path), "size_bytes": path.stat().st_size, "sha256": sha256(path)}
