"""A recipe carried out step by step; each finished step is restored instead of repeated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bevel.core import plugins
from bevel.core.progress import note
from bevel.core.recipe import PruneStep, QatStep, Recipe, SurgeryStep, Target, TrainStep
from bevel.core.records import Artifact, Measurement
from bevel.data import Data, check_classes
from bevel.data import load as load_data
from bevel.data.metrics import evaluate
from bevel.devices import split_address
from bevel.finetuning.train import finetune
from bevel.graph.couplings import analyze
from bevel.measurement.bench import Subject, images_for, measure_all
from bevel.measurement.doctor import diagnose_all
from bevel.measurement.parity import evaluate_artifacts
from bevel.measurement.shipping import choose
from bevel.models import build
from bevel.models.batchnorm import recalibrate
from bevel.pipeline.folder import RunFolder
from bevel.pipeline.int8 import fall_back, train_for_int8
from bevel.pruning.apply import load_pruned, prune, read_metadata, read_surgery, save_pruned
from bevel.pruning.plan import PruningPlan, make_plan
from bevel.pruning.planning import LabelledBatches, plan_pruning
from bevel.pruning.verify import verify_pruning
from bevel.rewriting.apply import chosen, surgery
from bevel.rewriting.log import SurgeryLog
from bevel.runtimes import channel_step, export, load_runtime, open_artifact

PROOF_IMAGES = 8
"""Images of the data that a pruned network is proven on, besides random inputs."""

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """What flows from step to step: a network, and what leads to it from the factory."""

    net: nn.Module
    plan: PruningPlan
    surgery: SurgeryLog = field(default_factory=SurgeryLog)


class Flow:
    """The steps of one recipe in one run folder."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe, self.folder = recipe, folder
        check_names(recipe)

    def execute(self) -> None:
        """Everything the recipe says, in order."""
        self._measure(*self.compress())

    def compress(self) -> tuple[dict[tuple[str, str, str], Artifact], dict[str, nn.Module]]:
        """All steps and files; nothing is measured and no test image is looked at."""
        original, compressed = self.advance(len(self.recipe.steps))
        self._save(compressed, self.folder.path / "compressed.safetensors")
        self.folder.update(original=original.plan.before, compressed=compressed.plan.after)
        networks = {"original": original.net, "compressed": compressed.net}
        return self._export(networks), networks

    def advance(self, steps: int) -> tuple[Model, Model]:
        """The first steps; what they start from that is whole, and what they lead to."""
        model = original = self._start()
        changed = False
        for number, step in enumerate(self.recipe.steps[:steps], start=1):
            name = f"{number:02d}-{step.verb}"
            changed = changed or step.verb in ("surgery", "prune")
            model = self._step(name, step.verb, step.settings, model, original)
            if not changed:
                original = model
        return original, model

    # -- the network ----------------------------------------------------------------------

    @cached_property
    def data(self) -> Data:
        """The recipe's data; loaded when it is first needed."""
        return load_data(self.recipe.data, seed=self.recipe.seed)

    @cached_property
    def example(self) -> Tensor:
        """Two images of the validation split, (2, C, H, W)."""
        images, _ = next(iter(self.data.batches("validation", batch_size=2, limit=2)))
        return images

    def _build(self) -> nn.Module:
        torch.manual_seed(self.recipe.seed)
        section = self.recipe.model
        return build(section.name, section.arguments, section.checkpoint)

    def _start(self) -> Model:
        net = self._build()
        check_classes(net, self.data)
        return Model(net, make_plan(analyze(net, self.example), {}))

    def _save(self, model: Model, path: Path) -> None:
        section = self.recipe.model
        description = {
            "name": section.name,
            "arguments": section.arguments,
            "input_shape": list(self.data.input_shape),
        }
        save_pruned(model.net, model.plan, path, model=description, surgery=model.surgery)

    def _restore(self, path: Path) -> Model:
        """The network in a step's file; its plan replaces the starting weights."""
        section = self.recipe.model
        net = load_pruned(lambda: build(section.name, section.arguments), path)
        return Model(net, read_metadata(path)[0], read_surgery(path))

    # -- steps on the network -------------------------------------------------------------

    def _step(
        self,
        name: str,
        verb: str,
        settings: TrainStep | PruneStep | SurgeryStep,
        model: Model,
        original: Model,
    ) -> Model:
        """Do the step, or take up its result."""
        path = self.folder.step_folder(name) / "model.safetensors"
        if self.folder.finished(name) is not None:
            return self._restore(path)
        begun = time.perf_counter()
        if isinstance(settings, PruneStep):
            model, numbers = self._prune(model, settings)
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
        return self._restore(path)

    def _train(
        self, name: str, verb: str, model: Model, settings: TrainStep, original: Model
    ) -> tuple[Model, Numbers]:
        trained = finetune(
            model.net,
            self.data,
            settings,
            seed=self.recipe.seed,
            teacher=original.net if settings.distill is not None else None,
            folder=self.folder.step_folder(name) / "training",
            label=verb,
        )
        numbers = {
            "history": trained.history,
            "validation_top1": trained.history[-1]["validation_top1"],
            "execution": trained.execution,
        }
        return replace(model, net=trained.net), numbers

    def _train_for_int8(
        self, name: str, model: Model, settings: QatStep, original: Model
    ) -> tuple[Model, Numbers]:
        net, trained = train_for_int8(
            model.net,
            self.example,
            self.data,
            settings,
            self.recipe,
            teacher=original.net if settings.distill is not None else None,
            folder=self.folder.step_folder(name) / "training",
        )
        numbers = {
            "history": trained.history,
            "validation_top1_int8": trained.history[-1]["validation_top1"],
            "validation_top1": self._validate(net),
            "execution": trained.execution,
        }
        return replace(model, net=net), numbers

    def _operate(self, model: Model, settings: SurgeryStep) -> tuple[Model, Numbers]:
        images = [batch for batch, _ in self._calibration()]
        lite = surgery(model.net, self.example, rules=settings.rules, calibration=images)
        plan = make_plan(analyze(lite.net, self.example), {})
        before = self._validate(model.net)
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
            "validation_top1": self._validate(lite.net),
        }
        actions = [*model.surgery.actions, *lite.log.actions]
        return Model(lite.net, plan, SurgeryLog(actions=actions)), numbers

    def _prune(self, model: Model, settings: PruneStep) -> tuple[Model, Numbers]:
        held_out = self.data.batches("validation", limit=self.recipe.calibration.images)
        plan = plan_step(model.net, self.example, settings, held_out, self.recipe)
        pruned = prune(model.net, plan)
        images = self.data.batches("validation", batch_size=PROOF_IMAGES, limit=PROOF_IMAGES)
        proof = verify_pruning(
            model.net, pruned, plan, self.example, images=[batch for batch, _ in images]
        )
        before = self._validate(model.net)
        recalibrate(pruned, [batch for batch, _ in self._calibration()])
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
            "validation_top1_before": before,
            "validation_top1": self._validate(pruned),
        }
        return replace(model, net=pruned, plan=model.plan.then(plan)), numbers

    def _validate(self, net: nn.Module) -> float:
        return evaluate(net, self.data.batches("validation"), label="validation").top1

    def _calibration(self) -> Any:
        """Training images without augmentation, for statistics and int8 ranges."""
        return self.data.batches("train", limit=self.recipe.calibration.images)

    # -- artifacts ------------------------------------------------------------------------

    def _export(self, networks: dict[str, nn.Module]) -> dict[tuple[str, str, str], Artifact]:
        """The files of all targets."""
        artifacts: dict[tuple[str, str, str], Artifact] = {}
        for number, key in enumerate(
            files_of(self.recipe.targets), start=len(self.recipe.steps) + 1
        ):
            label, runtime, precision = key
            name = f"{number:02d}-export-{label}-{runtime}-{precision}"
            path = artifact_path(self.folder.path, label, runtime, precision)
            if self.folder.finished(name) is None:
                begun = time.perf_counter()
                numbers = self._export_one(networks[label], runtime, precision, path)
                self.folder.finish(name, "export", time.perf_counter() - begun, numbers, [path])
            artifacts[key] = open_artifact(path)
        return artifacts

    def _export_one(self, net: nn.Module, runtime: str, precision: str, path: Path) -> Numbers:
        """Write a file; returns what is recorded of it."""
        options, calibration, fallback = self.recipe.quantization, None, None
        if precision == "int8":
            calibration = self._calibration()
            options, fallback = fall_back(
                net,
                self.example,
                runtime,
                options,
                calibration=calibration,
                validation=self.data.batches("validation"),
            )
        artifact = export(
            net,
            self.example,
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
            batches = self.data.batches("validation")
            ((accuracy, _),) = evaluate_artifacts([(artifact, None)], batches, "validation")
            numbers["validation_top1"] = accuracy.top1
        return numbers

    def _measure(
        self, artifacts: dict[tuple[str, str, str], Artifact], networks: dict[str, nn.Module]
    ) -> None:
        """Measure everything on each device; files of one device are timed in turn."""
        places = {(target.device, target.threads): None for target in self.recipe.targets}
        measurements: list[Measurement] = []
        for device, threads in places:
            here = [t for t in self.recipe.targets if (t.device, t.threads) == (device, threads)]
            begun = time.perf_counter()
            measurements += measure_all(
                [Subject(key[0], artifacts[key], networks[key[0]]) for key in files_of(here)],
                device=device,
                threads=threads,
                batches=self.data.batches("test", limit=images_for(device)),
                split="test",
            )
            note(f"measured on {device} in {time.perf_counter() - begun:.0f} s")
        diagnoses = diagnose_all(measurements, self.example[:1])
        shipments = choose(measurements, diagnoses, self.recipe.quantization.accuracy_drop)
        self.folder.update(measurements=measurements, diagnoses=diagnoses, shipments=shipments)


def artifact_path(run_folder: Path, label: str, runtime: str, precision: str) -> Path:
    """Where a run's file lies; `label` says of which network: original or compressed."""
    name = f"{label}-{runtime}-{precision}{load_runtime(runtime).SUFFIX}"
    return run_folder / "artifacts" / name


def files_of(targets: Sequence[Target]) -> list[tuple[str, str, str]]:
    """(network, runtime, precision) of the files that targets need.

    The float32 file of both networks is always among them: the original's is what speed is
    compared with, the compressed one's is shipped where int8 is no faster.
    """
    found: dict[tuple[str, str, str], None] = {}
    for label in ("original", "compressed"):
        found |= {(label, target.runtime, "float32"): None for target in targets}
    found |= {("compressed", target.runtime, target.precision): None for target in targets}
    return list(found)


def plan_step(
    net: nn.Module,
    example: Tensor,
    settings: PruneStep,
    calibration: LabelledBatches | None,
    recipe: Recipe,
) -> PruningPlan:
    """The plan that a prune step of a recipe asks for."""
    return plan_pruning(
        net,
        example,
        criterion=settings.criterion,
        allocate=settings.allocate,
        reduction=settings.reduction,
        ratio=settings.ratio,
        budget=settings.budget.limits() if settings.budget else None,
        align=alignment(settings, recipe.targets),
        ignore=settings.ignore,
        calibration=calibration,
        seed=recipe.seed,
    )


def alignment(settings: PruneStep, targets: Sequence[Target]) -> int:
    """The number that widths become multiples of; `auto` asks the targets' runtimes."""
    if settings.align == "auto":
        return channel_step((target.runtime, target.precision) for target in targets)
    return settings.align


def check_names(recipe: Recipe) -> None:
    """Find unknown plugin names before any work is done.

    Raises:
        UnknownNameError: which name, and the nearest that exists.
        MissingDependencyError: a runtime that is not installed.
        ExportError: a runtime has no such precision.
    """
    for step in recipe.steps:
        if step.prune is not None:
            plugins.find("criteria", step.prune.criterion)
            plugins.find("allocators", step.prune.allocate)
        if step.surgery is not None:
            chosen(step.surgery.rules)
    for target in recipe.targets:
        load_runtime(target.runtime, target.precision)
        plugins.find("devices", split_address(target.device)[0])
