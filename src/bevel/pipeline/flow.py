"""A recipe carried out step by step; each finished step is restored instead of repeated."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bevel.core import plugins
from bevel.core.errors import FORWARD_FAULTS, PruningError, RecipeError, one_line
from bevel.core.recipe import Recipe
from bevel.core.records import Artifact
from bevel.core.steps import (
    IterateStep,
    PruneStep,
    QatStep,
    ResizeStep,
    SparsifyStep,
    StepSettings,
    SurgeryStep,
    TrainStep,
    pruning_at,
)
from bevel.data import Data, check_classes
from bevel.data import load as load_data
from bevel.data.metrics import evaluate
from bevel.devices import split_address
from bevel.finetuning.distill import teacher_of
from bevel.finetuning.train import finetune, seed_of
from bevel.graph.couplings import analyze
from bevel.models import build
from bevel.models.batchnorm import recalibrate
from bevel.pipeline.artifacts import File, export_all, measure_files
from bevel.pipeline.folder import RunFolder
from bevel.pipeline.int8 import train_for_int8
from bevel.pipeline.model import Model, example_of
from bevel.pipeline.planning import alignment, budget_target, plan_step
from bevel.pipeline.rounds import Round, on_schedule, shares, while_accuracy_holds
from bevel.pipeline.within import Timing
from bevel.pruning.apply import load_pruned, prune, read_metadata, read_surgery, save_pruned
from bevel.pruning.plan import PruningPlan, make_plan
from bevel.pruning.sensitivity import FILE as SENSITIVITY
from bevel.pruning.sparsity import growing, slimming
from bevel.pruning.verify import verify_pruning
from bevel.rewriting.apply import chosen, surgery
from bevel.rewriting.log import SurgeryLog
from bevel.rewriting.reconstruction import Refit, reconstruct
from bevel.runtimes import load_runtime

PROOF_IMAGES = 8
"""Images of the data that a pruned network is proven on, besides random inputs."""

GROWING, SLIMMING = 1.0, 1e-4
"""Strengths of the penalties of a sparsify step that names none."""

NO_IMAGES = (
    "a step with distill.unlabelled learns from images without labels: name a folder of them, "
    "--set data.unlabelled=DIR"
)

Numbers = dict[str, Any]


class Flow:
    """The steps of one recipe in one run folder."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe, self.folder = recipe, folder
        check_names(recipe)
        if recipe.asks_unlabelled and recipe.data.unlabelled is None:
            raise RecipeError(NO_IMAGES)

    def execute(self) -> None:
        """Everything the recipe says, in order."""
        measure_files(self.recipe, self.folder, *self.compress())

    def compress(self, only: File | None = None) -> tuple[dict[File, Artifact], dict[str, Model]]:
        """All steps and files, or one file; nothing is measured, no test image is looked at."""
        original, compressed = self.advance(len(self.recipe.steps))
        self._save(compressed, self.folder.path / "compressed.safetensors")
        self.folder.update(original=original.plan.before, compressed=compressed.plan.after)
        models = {"original": original, "compressed": compressed}
        return export_all(self.recipe, self.folder, models, only), models

    def advance(self, steps: int) -> tuple[Model, Model]:
        """The first steps; what they start from that is whole, and what they lead to."""
        model = original = self._start()
        changed = False
        for number, step in enumerate(self.recipe.steps[:steps], start=1):
            name = f"{number:02d}-{step.verb}"
            changed = changed or step.verb in ("surgery", "prune", "iterate", "resize", "sparsify")
            model = self._step(name, step.verb, step.settings, model, original)
            if not changed:
                original = model
        return original, model

    # -- the network ----------------------------------------------------------------------

    def _data(self, size: int | None = None) -> Data:
        """The recipe's data, of another size where one is given."""
        section = self.recipe.data
        return load_data(section if size is None else section.at(size), seed=self.recipe.seed)

    def _build(self) -> nn.Module:
        torch.manual_seed(self.recipe.seed)
        section = self.recipe.model
        return build(
            section.name, section.arguments, section.checkpoint, new_head=section.head == "new"
        )

    def _start(self) -> Model:
        net, data = self._build(), self._data()
        check_classes(net, data)
        return Model(net, data, make_plan(analyze(net, example_of(data)), {}))

    def _save(self, model: Model, path: Path) -> None:
        section = self.recipe.model
        description = {
            "name": section.name,
            "arguments": section.arguments,
            "input_shape": [1, *model.data.input_shape],
        }
        save_pruned(model.net, model.plan, path, model=description, surgery=model.surgery)

    def _restore(self, path: Path, data: Data) -> Model:
        """The network in a step's file; its plan replaces the starting weights."""
        section = self.recipe.model
        net = load_pruned(lambda: build(section.name, section.arguments), path)
        return Model(net, data, read_metadata(path)[0], read_surgery(path))

    # -- steps on the network -------------------------------------------------------------

    def _step(
        self,
        name: str,
        verb: str,
        settings: StepSettings,
        model: Model,
        original: Model,
    ) -> Model:
        """Do the step, or take up its result."""
        path = self.folder.step_folder(name) / "model.safetensors"
        if isinstance(settings, ResizeStep):
            model = replace(model, data=self._data(settings.size))
        if self.folder.finished(name) is not None:
            return self._restore(path, model.data)
        begun = time.perf_counter()
        if isinstance(settings, PruneStep):
            model, numbers = self._prune(model, settings, path.parent)
        elif isinstance(settings, IterateStep):
            model, numbers = self._iterate(name, model, settings, original)
        elif isinstance(settings, ResizeStep):
            model, numbers = self._resize(model)
        elif isinstance(settings, SurgeryStep):
            model, numbers = self._operate(model, settings)
        elif isinstance(settings, QatStep):
            model, numbers = self._train_for_int8(name, model, settings, original)
        else:
            model, numbers = self._train(name, verb, model, settings, original)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._save(model, path)
        self.folder.finish(name, verb, time.perf_counter() - begun, numbers, [path])
        # Go on from the file, as a resumed run does, so that both see the same network.
        return self._restore(path, model.data)

    def _resize(self, model: Model) -> tuple[Model, Numbers]:
        """The costs with images of another size; the network stays."""
        plan = make_plan(analyze(model.net, model.example), {})
        numbers = {
            "input_shape": list(model.data.input_shape),
            "macs_before": model.plan.after.macs,
            "macs": plan.after.macs,
            "validation_top1": self._validate(model),
        }
        return replace(model, plan=model.plan.then(plan)), numbers

    def _train(
        self, name: str, verb: str, model: Model, settings: TrainStep, original: Model
    ) -> tuple[Model, Numbers]:
        folder = self.folder.step_folder(name)
        sparsity = None
        if isinstance(settings, SparsifyStep):
            sparsity = self._penalty(model, settings, folder)
        trained = finetune(
            model.net,
            model.data,
            settings,
            seed=step_seed(self.recipe.seed, name),
            teacher=_teacher(original, model, settings),
            folder=folder / "training",
            label=verb,
            penalty=sparsity,
        )
        numbers = {
            "history": trained.history,
            "validation_top1": trained.history[-1]["validation_top1"],
            "execution": trained.execution,
        }
        return replace(model, net=trained.net, surgery=model.surgery.settled(trained.net)), numbers

    def _penalty(self, model: Model, settings: SparsifyStep, folder: Path) -> Callable[..., None]:
        """What draws channels to zero: those that the next prune step would remove now, or all."""
        if settings.penalty == "slimming":
            return slimming(settings.strength or SLIMMING)
        steps = self.recipe.steps
        position = next(i for i, step in enumerate(steps) if step.settings is settings)
        removal = pruning_at(steps, position)
        assert removal is not None  # noqa: S101  # the recipe was validated
        plan, _ = self._plan(model, removal, folder)
        return growing(model.net, plan, settings.strength or GROWING)

    def _train_for_int8(
        self, name: str, model: Model, settings: QatStep, original: Model
    ) -> tuple[Model, Numbers]:
        net, trained = train_for_int8(
            model.net,
            model.example,
            model.data,
            settings,
            self.recipe,
            seed=step_seed(self.recipe.seed, name),
            teacher=_teacher(original, model, settings),
            folder=self.folder.step_folder(name) / "training",
        )
        numbers = {
            "history": trained.history,
            "validation_top1_int8": trained.history[-1]["validation_top1"],
            "validation_top1": self._validate(replace(model, net=net)),
            "execution": trained.execution,
        }
        return replace(model, net=net), numbers

    def _operate(self, model: Model, settings: SurgeryStep) -> tuple[Model, Numbers]:
        images = [batch for batch, _ in self._calibration(model)]
        lite = surgery(
            model.net,
            model.example,
            rules=settings.rules,
            calibration=images,
            progressive=settings.progressive,
        )
        plan = make_plan(analyze(lite.net, model.example), {})
        before = self._validate(model)
        recalibrate(lite.net, images)
        numbers = {
            "macs_before": model.plan.after.macs,
            "macs": plan.after.macs,
            "params_before": model.plan.after.params,
            "params": plan.after.params,
            "sites": [asdict(site) for site in lite.sites],
            "proven": lite.proven,
            "refits": [asdict(refit) for refit in lite.refits],
            "validation_top1_before": before,
            "validation_top1": self._validate(replace(model, net=lite.net)),
        }
        actions = [*model.surgery.actions, *lite.log.actions]
        log = SurgeryLog(actions=actions)
        return replace(model, net=lite.net, plan=plan, surgery=log), numbers

    def _plan(
        self, model: Model, settings: PruneStep, folder: Path
    ) -> tuple[PruningPlan, Timing | None]:
        """What a prune step asks for; `folder` is where it keeps what it measures."""
        return plan_step(
            model.net,
            model.example,
            settings,
            model.data.batches("validation", limit=self.recipe.calibration.images),
            target=budget_target(self.recipe.targets),
            align=alignment(settings, self.recipe.targets),
            seed=self.recipe.seed,
            quantization=self.recipe.quantization,
            images=lambda: self._calibration(model),
            folder=folder,
        )

    def _prune(self, model: Model, settings: PruneStep, folder: Path) -> tuple[Model, Numbers]:
        plan, timing = self._plan(model, settings, folder)
        pruned = prune(model.net, plan)
        images = model.data.batches("validation", batch_size=PROOF_IMAGES, limit=PROOF_IMAGES)
        proof = verify_pruning(
            model.net, pruned, plan, model.example, images=[batch for batch, _ in images]
        )
        before = self._validate(model)
        refits = self._mend(pruned, model, plan, settings)
        numbers = {
            "macs_before": plan.before.macs,
            "macs": plan.after.macs,
            "params_before": plan.before.params,
            "params": plan.after.params,
            "groups": [group.model_dump() for group in plan.groups],
            "proof": {
                "max_relative_difference": proof.worst,
                "outputs": len(proof.max_relative_difference),
                "inputs": proof.inputs,
                "passed": proof.passed,
            },
            "notes": plan.notes,
            "refits": [asdict(refit) for refit in refits],
            "validation_top1_before": before,
            "validation_top1": self._validate(replace(model, net=pruned)),
        }
        if timing is not None:
            numbers["latency"] = timing.model_dump(mode="json") | {"summary": str(timing)}
        if (folder / SENSITIVITY).exists():
            numbers["sensitivity"] = json.loads((folder / SENSITIVITY).read_text(encoding="utf-8"))
        return replace(model, net=pruned, plan=model.plan.then(plan)), numbers

    def _iterate(
        self, name: str, model: Model, settings: IterateStep, original: Model
    ) -> tuple[Model, Numbers]:
        """Rounds of pruning and fine-tuning, each a pair of steps of its own."""

        def turn(number: int, cut: PruneStep, network: Model) -> Round[Model]:
            pruned = self._step(f"{name}.{number}-prune", "prune", cut, network, original)
            tuned = f"{name}.{number}-finetune"
            done = self._step(tuned, "finetune", settings.finetune, pruned, original)
            step = self.folder.finished(tuned)
            assert step is not None  # noqa: S101  # it was done just now
            after = done.plan.after
            return Round(number, done, step.numbers["validation_top1"], after.macs, after.params)

        before = self._validate(original)
        if settings.max_accuracy_drop is None:
            rounds: list[Round[Model]] = []
            for number, cut in enumerate(on_schedule(settings), start=1):
                rounds.append(turn(number, cut, rounds[-1].network if rounds else model))
        else:
            floor = before - settings.max_accuracy_drop / 100
            rounds = while_accuracy_holds(settings, model, turn, floor)
        kept = next((each for each in reversed(rounds) if each.accepted), None)
        result = kept.network if kept is not None else model
        numbers = {
            "macs_before": model.plan.after.macs,
            "macs": result.plan.after.macs,
            "params_before": model.plan.after.params,
            "params": result.plan.after.params,
            "validation_top1_before": before,
            "validation_top1": kept.accuracy if kept is not None else self._validate(model),
            "rounds": [each.record() for each in rounds],
        }
        return result, numbers

    def _mend(
        self, pruned: nn.Module, model: Model, plan: PruningPlan, settings: PruneStep
    ) -> list[Refit]:
        """Have the layers that are left give what they gave, or their norms' statistics right."""
        images = [batch for batch, _ in self._calibration(model)]
        if not settings.reconstruct:
            recalibrate(pruned, images)
            return []
        try:
            return reconstruct(pruned, model.net, torch.cat(images), kept=plan.outputs())
        except FORWARD_FAULTS as error:
            raise PruningError(
                f"the pruned network's layers cannot be fitted again: {one_line(error, 160)}; set "
                "reconstruct: false in the prune step"
            ) from error

    def _validate(self, model: Model) -> float:
        return evaluate(model.net, model.data.batches("validation"), label="validation").top1

    def _calibration(self, model: Model) -> Any:
        return model.calibration(self.recipe.calibration.images)


def step_seed(seed: int, name: str) -> int:
    """The seed of one step's training: no two steps of a run see their images in the same order.

    Rounds that all began from the recipe's own seed would crop, mirror and shuffle alike.
    """
    return seed_of(f"{seed} {name}")


def _teacher(original: Model, model: Model, settings: TrainStep) -> nn.Module | None:
    known, shown = original.data.input_shape, model.data.input_shape
    return teacher_of(original.net, settings, known=known[1:], shown=shown[1:])


def check_names(recipe: Recipe) -> None:
    """Find unknown plugin names before any work is done.

    Raises:
        UnknownNameError: which name, and the nearest that exists.
        MissingDependencyError: a runtime that is not installed.
        ExportError: a runtime has no such precision.
    """
    for step in recipe.steps:
        if step.pruning is not None:
            plugins.find("criteria", step.pruning.criterion)
            plugins.find("allocators", step.pruning.allocate)
        if step.iterate is not None and step.iterate.prune.ratio is None:
            shares(step.iterate.prune)
        if step.surgery is not None:
            chosen(step.surgery.rules)
    for target in recipe.targets:
        load_runtime(target.runtime, target.precision)
        plugins.find("devices", split_address(target.device)[0])
