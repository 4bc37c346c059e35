"""Training and fine-tuning: one plain loop on Accelerate."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn

import bevel.finetuning.execution as execution
from bevel.core.errors import DataError, ModelError, TrainingError, one_line
from bevel.core.progress import track
from bevel.core.steps import TrainStep
from bevel.data.metrics import evaluate
from bevel.finetuning.embedding import with_embeddings, without_embeddings
from bevel.finetuning.optimizer import averaged, learning_rate
from bevel.finetuning.state import EpochStore, digest
from bevel.finetuning.step import Stepper
from bevel.finetuning.unfreezing import Unfreezing
from bevel.models.batchnorm import folded, unfold
from bevel.models.fading import fade, fades, settle

FROZEN_SHARE = 1 / 3
"""Of all steps, the last that run with `freeze`."""

CHECK_EVERY = 25
"""Steps between looks at the loss where looking makes the processor wait for an accelerator."""


UNFOLDING = 8
"""Batches that the statistics of folded batch norms are estimated on."""


class Penalty(Protocol):
    """What is added to the gradients of training."""

    def __call__(self, net: nn.Module, *, over: float) -> None:
        """Add it in place; `over`: how much of the training is over, from 0 to 1."""


class Batches(Protocol):
    """Pairs of images (N, C, H, W) and labels (N,), and how many there are."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


class TrainingData(Protocol):
    """What training needs to know of data; `bevel.data.Data` is one.

    For `distill.unlabelled` it also has `with_unlabelled() -> TrainingData`: with images without
    labels among those of training, their label -1.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""

    def train_batches(self, *, seed: int, epoch: int) -> Batches:
        """An epoch, shuffled and augmented: a pure function of the seed and the epoch."""

    def batches(self, split: str) -> Batches:
        """A split in fixed order, unchanged; training reads "validation"."""


@dataclass(frozen=True)
class Trained:
    """A trained network: on the CPU, float32, contiguous, uncompiled, in evaluation mode.

    `history` has a row per epoch: epoch (from 1), loss (mean of the training loss), lr (of its
    last step), seconds, validation_top1. `execution` says how steps ran, and why.
    """

    net: nn.Module
    history: list[dict[str, Any]]
    execution: dict[str, Any]


def finetune(
    net: nn.Module,
    data: TrainingData,
    settings: TrainStep,
    *,
    seed: int = 0,
    teacher: nn.Module | None = None,
    folder: Path | None = None,
    label: str = "finetune",
    freeze: Callable[[nn.Module], None] | None = None,
    penalty: Penalty | None = None,
) -> Trained:
    """Train a copy of the network; the network itself stays as it is.

    All randomness of an epoch follows from `seed` and the epoch. With `folder`, the choice of
    execution and the state after every epoch are kept there: a training killed at any point and
    started again continues from its last finished epoch and ends with the same weights, bit for
    bit (on the same machine with as many threads). Under `accelerate launch` each process takes
    its share of every batch.

    Batch norms that a checkpoint has folded get statistics again before the first step, so that
    training starts from the function that the network is (`bevel.models.batchnorm.unfold`).
    Activation functions that progressive surgery left turn into ReLUs (`bevel.models.fading`).

    Args:
        net: gives logits of shape (N, classes) for images (N, C, H, W).
        data: training and validation images.
        settings: epochs, learning rate, precision and so on.
        seed: of shuffling, augmentation and dropout.
        teacher: gives the outputs to learn from where `settings.distill` is set.
        folder: where the resumable state lies; None keeps none.
        label: what progress and errors call this training.
        freeze: called with the network in training mode, to hold what should no longer move in
            the last third of the steps.
        penalty: called with the network and how much of the training is over (0 to 1), before
            every step, to add to the gradients; see `bevel.pruning.sparsity`.

    Raises:
        TrainingError: the loss is no longer finite, or there is nothing to train.
        ModelError: the network's outputs do not fit the data or the teacher's.
        DataError: images without labels are asked for and there are none.
        RunFolderError: the folder holds another training, or cannot be read or written.
    """
    if settings.distill is not None and teacher is None:
        raise TrainingError(
            f"{label}: distill is set but there is no teacher; give one, or remove distill"
        )
    if settings.distill is not None and settings.distill.unlabelled:
        data = _with_unlabelled(data)
    with torch.random.fork_rng():  # the caller's random numbers go on as if this had not run
        start = _unfolded(net, data, seed)
        loop = _Loop(start, data, settings, seed, teacher, folder, label)
        loop.freeze, loop.penalty = freeze, penalty
        return loop.run()


def _with_unlabelled(data: TrainingData) -> TrainingData:
    """The data with its images without labels.

    Raises:
        DataError: it has none.
    """
    joined = getattr(data, "with_unlabelled", None)
    if joined is None:
        raise DataError(
            f"distill.unlabelled needs images without labels, and {type(data).__name__} has no "
            "with_unlabelled() that gives them"
        )
    more: TrainingData = joined()
    return more


def _unfolded(net: nn.Module, data: TrainingData, seed: int) -> nn.Module:
    """The network with statistics in its batch norms, if they were folded: `batchnorm.unfold`."""
    if not folded(net):
        return net
    batches = data.train_batches(seed=seed, epoch=0)
    images = (images for images, _ in batches)
    net = copy.deepcopy(net)
    unfold(net, islice(images, min(UNFOLDING, len(batches))))
    return net


class _Loop:
    """One training from the first epoch, or the first unfinished one, to the last."""

    def __init__(
        self,
        net: nn.Module,
        data: TrainingData,
        settings: TrainStep,
        seed: int,
        teacher: nn.Module | None,
        folder: Path | None,
        label: str,
    ) -> None:
        self.data, self.settings, self.seed, self.label = data, settings, seed, label
        self.freeze: Callable[[nn.Module], None] | None = None
        self.penalty: Penalty | None = None
        self.accelerator = Accelerator()
        first = self._batches(0)
        self.steps = len(first)
        if not self.steps:
            raise TrainingError(
                f"{label}: the training split gives no batch; use a smaller batch_size"
            )
        batch = next(iter(first))
        self.batch_size = len(batch[0])
        self.store = self._store(folder, net, teacher)
        if teacher is not None and settings.distill is not None and settings.distill.embedding > 0:
            net, teacher = with_embeddings(net, teacher, first)
        self.stepper, self.choice = self._stepper(net, teacher, batch)
        self._prepare()
        decay = settings.ema
        self.fading = fades(net)
        self.unfreezing = self._unfreezing()
        self.average = averaged(self.stepper.net, decay) if decay is not None else None
        self.history: list[dict[str, Any]] = []
        self.answers: dict[tuple[int, int], Tensor | None] = {}

    def run(self) -> Trained:
        """Train the epochs that are missing."""
        if self.store is not None:
            progress = self.store.load(self.stepper.net, self.stepper.optimizer, self.average)
            self.history = progress["history"] if progress else []
        for epoch in range(len(self.history), self.settings.epochs):
            self.history.append(self._epoch(epoch))
            if self.store is not None and self.accelerator.is_main_process:
                progress = {"history": self.history, "step": (epoch + 1) * self.steps}
                self.store.save(self.stepper.net, self.stepper.optimizer, self.average, progress)
            self.accelerator.wait_for_everyone()
        if self.unfreezing is not None:
            self.unfreezing.hold(self.settings.unfreeze)
        net = copy.deepcopy(self._result()).to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.accelerator.free_memory()
        settle(net)
        without_embeddings(net)
        return Trained(net.eval(), self.history, self.choice.record())

    def _epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch and validate; returns its row of the history."""
        start = time.perf_counter()
        process = self.accelerator.process_index
        torch.manual_seed(seed_of(f"bevel finetune {self.seed} {epoch} {process}"))
        self.stepper.net.train()
        if self.unfreezing is not None:
            self.unfreezing.hold(epoch)
        total = torch.zeros((), dtype=torch.float64, device=self.stepper.device)
        taken = 0
        rate = 0.0
        batches = track(
            self._batches(epoch), f"{self.label} {epoch + 1}/{self.settings.epochs}", self.steps
        )
        for number, (images, labels) in enumerate(batches):
            rate = self._set_rate(epoch * self.steps + number)
            self._freeze(epoch * self.steps + number, first=number == 0)
            self._fade(epoch * self.steps + number)
            if len(images) < 2 <= self.batch_size:
                continue  # a batch norm has no variance from a left-over single image
            penalty = self._penalty(epoch * self.steps + number)
            answers = self._answers(epoch, number, images)
            total += self.stepper.step(images, labels, penalty, answers)
            taken += 1
            if self.average is not None:
                self.average.update_parameters(self.stepper.net)
            if self.stepper.device.type == "cpu" or number % CHECK_EVERY == 0:
                self._check(float(total), epoch, number, rate)
        self._check(float(total), epoch, self.steps - 1, rate)
        self._check_weights(epoch, rate)
        return {
            "epoch": epoch + 1,
            "loss": float(total) / max(1, taken),
            "lr": rate,
            "seconds": time.perf_counter() - start,
            "validation_top1": self._validate(),
        }

    def _validate(self) -> float:
        """Share of validation images that the network to be returned gets right.

        Every process evaluates, because torchmetrics gathers from all of them. Batch norms saw
        different images in each, so first all take the main process's buffers.
        """
        if self.accelerator.num_processes > 1:
            for net in (self.stepper.net, self._result()):
                for buffer in net.buffers():
                    buffer.copy_(broadcast(buffer.detach()))
        batches = self.data.batches("validation")
        return evaluate(self._result(), batches, label=f"{self.label} validation").top1

    def _result(self) -> nn.Module:
        """The network that is validated and returned."""
        return self.stepper.net if self.average is None else self.average.module

    def _set_rate(self, step: int) -> float:
        """Set the learning rate of a step counted over all epochs."""
        warmup = round(self.settings.warmup_epochs * self.steps)
        total = self.settings.epochs * self.steps
        rate = learning_rate(step, total, warmup, self.settings.lr)
        for group in self.stepper.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _freeze(self, step: int, *, first: bool) -> None:
        """Hold what should be held, once it is time and at the beginning of each epoch after."""
        begin = math.ceil(self.settings.epochs * self.steps * (1 - FROZEN_SHARE))
        if self.freeze is not None and (step == begin or (first and step > begin)):
            self.freeze(self.stepper.net)

    def _penalty(self, step: int) -> Callable[[nn.Module], None] | None:
        """What is added to the gradients of a step."""
        if self.penalty is None:
            return None
        return partial(self.penalty, over=step / (self.steps * self.settings.epochs))

    def _fade(self, step: int) -> None:
        """Bring activation functions that fade nearer to ReLU, evenly from step to step."""
        if self.fading:
            last = self.settings.fade * self.steps * self.settings.epochs
            for net in (self.stepper.net, self._result()):
                fade(net, min(1.0, (step + 1) / max(last, 1)))

    def _unfreezing(self) -> Unfreezing | None:
        """What lets stages join, if they do not all learn from the start."""
        if not self.settings.unfreeze:
            return None
        if self.accelerator.num_processes > 1:
            raise TrainingError(
                f"{self.label}: unfreeze works in one process; set unfreeze: 0, or leave out "
                "accelerate launch"
            )
        return Unfreezing(self.stepper.net, self.settings.unfreeze)

    def _view(self, epoch: int) -> int:
        """The epoch whose images are shown: the same again and again, where few views are kept."""
        distill = self.settings.distill
        return epoch if distill is None or distill.views is None else epoch % distill.views

    def _answers(self, epoch: int, number: int, images: Tensor) -> Tensor | None:
        """What the teacher gives for a batch that comes again, None where it is to be asked anew.

        A resumed training asks again for the same batches, and so gets the same answers.
        """
        distill = self.settings.distill
        if distill is None or distill.views is None:
            return None
        key = self._view(epoch), number
        if key not in self.answers:
            self.answers[key] = self.stepper.ask(images)
        return self.answers[key]

    def _batches(self, epoch: int) -> Batches:
        """This process's share of the epoch's training batches."""
        batches = self.data.train_batches(seed=self.seed, epoch=self._view(epoch))
        if self.accelerator.num_processes == 1:
            return batches
        return _Share(batches, self.accelerator.process_index, self.accelerator.num_processes)

    def _store(
        self, folder: Path | None, net: nn.Module, teacher: nn.Module | None
    ) -> EpochStore | None:
        """The resumable state, told apart by everything that decides the resulting weights."""
        if folder is None:
            return None
        identity = {
            "settings": self.settings.model_dump(mode="json"),
            "seed": self.seed,
            "network": digest(net),
            "teacher": digest(teacher) if self.settings.distill is not None else None,
            "batch_size": self.batch_size,
            "steps_per_epoch": self.steps,
            "processes": self.accelerator.num_processes,
        }
        return EpochStore(folder, identity)

    def _stepper(
        self, net: nn.Module, teacher: nn.Module | None, batch: tuple[Tensor, Tensor]
    ) -> tuple[Stepper, execution.Choice]:
        """The recorded way to step, or the best measured one, which is then recorded."""
        self._check_outputs(net, batch)
        device = self.accelerator.device
        main = self.accelerator.is_main_process
        record = [self.store.load_execution() if self.store is not None and main else None]
        if main and record[0] is None:
            stepper, choice = execution.choose(
                net,
                teacher,
                self.settings,
                batch,
                steps=self.steps * self.settings.epochs,
                device=device,
                may_compile=self.accelerator.num_processes == 1,
            )
            if self.store is not None:
                self.store.save_execution(choice.record())
            if self.accelerator.num_processes == 1:
                return stepper, choice
            record = [choice.record()]
        broadcast_object_list(record)
        choice = execution.Choice.from_record(record[0] or {})
        return execution.resume(
            net, teacher, self.settings, batch, choice=choice, device=device
        ), choice

    def _prepare(self) -> None:
        """Let Accelerate wrap what several processes or an accelerator need wrapped."""
        stepper = self.stepper
        stepper.forward, stepper.optimizer = self.accelerator.prepare(
            stepper.net, stepper.optimizer
        )
        stepper.backward = self.accelerator.backward

    def _check_outputs(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        """Refuse a network with fewer outputs than there are classes, before the first step."""
        probe = copy.deepcopy(net).eval()
        image = batch[0][:1].to(next(probe.parameters(), torch.empty(0)).device)
        try:
            with torch.no_grad():
                output = probe(image)
        except RuntimeError as error:
            raise ModelError(
                f"{self.label}: the network does not take images of shape "
                f"{tuple(image.shape[1:])}, which the data gives: {one_line(error, 120)}"
            ) from error
        classes = len(self.data.classes)
        if isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] < classes:
            raise ModelError(
                f"{self.label}: the network has {output.shape[1]} outputs and the data "
                f"{classes} classes; build the network for {classes} classes"
            )

    def _check(self, total: float, epoch: int, step: int, rate: float) -> None:
        """Stop when the sum of the losses is no longer a number."""
        if not math.isfinite(total):
            raise self._diverged("the loss", epoch, step, rate)

    def _check_weights(self, epoch: int, rate: float) -> None:
        """Stop when the last steps broke the weights, before they are saved."""
        if not all(bool(torch.isfinite(value).all()) for value in self.stepper.net.parameters()):
            raise self._diverged("a weight", epoch, self.steps - 1, rate)

    def _diverged(self, what: str, epoch: int, step: int, rate: float) -> TrainingError:
        mixed = self.choice.execution.dtype == "bfloat16"
        precision = ", or set precision: float32" if mixed else ""
        return TrainingError(
            f"{self.label}: {what} is no longer finite in epoch {epoch + 1}, step {step + 1} of "
            f"{self.steps}, at learning rate {rate:.3g}: lower lr (now {self.settings.lr:g}), "
            f"lengthen warmup_epochs (now {self.settings.warmup_epochs:g}){precision}"
        )


class _Share:
    """The images of each batch that one of several processes takes: equally many each."""

    def __init__(self, batches: Batches, index: int, processes: int) -> None:
        self._batches, self._index, self._processes = batches, index, processes

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._batches:
            share = len(images) // self._processes
            mine = slice(self._index * share, (self._index + 1) * share)
            yield images[mine], labels[mine]


def seed_of(text: str) -> int:
    """A seed that no other text has, but for a hash collision."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
