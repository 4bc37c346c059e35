"""One training step of one network, run in one way: type, memory format, compiled or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bevel.core.errors import ModelError
from bevel.core.steps import TrainStep
from bevel.finetuning.distill import combined_loss
from bevel.finetuning.embedding import embedding_loss, width
from bevel.finetuning.features import feature_loss, feature_maps
from bevel.finetuning.optimizer import optimizer

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Execution:
    """How steps run. Weights stay float32; bfloat16 means autocast."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.dtype} {self.memory_format} {'compiled' if self.compiled else 'eager'}"


class Stepper:
    """Own copies of a network and its teacher, with an optimizer, ready to step.

    `forward`, `optimizer` and `backward` may be replaced by Accelerate's. Partial batches run
    uncompiled, because every new shape would cost another compilation. `sites` names the modules
    whose feature maps are compared with the teacher's: such a stepper is not to be compiled,
    because a compiled network may leave out the hooks that read them.
    """

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module | None,
        execution: Execution,
        settings: TrainStep,
        device: torch.device,
        sites: tuple[str, ...] = (),
    ) -> None:
        self.execution = execution
        self.settings = settings
        self.device = device
        self.sites = sites
        self._embedding = width(net)
        self._format = MEMORY_FORMATS[execution.memory_format]
        self.net = self._place(net).train()
        self.teacher = None if teacher is None or settings.distill is None else self._place(teacher)
        if self.teacher is not None:
            self.teacher.eval().requires_grad_(False)
        self.optimizer: Any = optimizer(self.net, settings)
        self.forward: Callable[[Tensor], Any] = self.net
        self.backward: Callable[[Tensor], None] = torch.Tensor.backward
        self._compiled: Callable[[Tensor], Any] | None = None
        self._compiled_teacher: Callable[[Tensor], Any] | None = None
        self._shape: torch.Size | None = None

    def _place(self, net: nn.Module) -> nn.Module:
        """A float32 copy on the device, in the memory format."""
        return copy.deepcopy(net).float().to(self.device, memory_format=self._format)  # type: ignore[call-overload, no-any-return]

    def compile(self, shape: torch.Size) -> None:
        """Compile for batches of this shape; the work is done in the first step."""
        self._shape = shape
        self._compiled = torch.compile(self.net, dynamic=False)
        if self.teacher is not None:
            self._compiled_teacher = torch.compile(self.teacher, dynamic=False)
        self.execution = Execution(self.execution.dtype, self.execution.memory_format, True)

    def uncompile(self) -> None:
        """Run as before `compile`."""
        self._shape = self._compiled = self._compiled_teacher = None
        self.execution = Execution(self.execution.dtype, self.execution.memory_format, False)

    def loss(self, images: Tensor, labels: Tensor, answers: Tensor | None = None) -> Tensor:
        """The training loss of a batch, a float32 scalar.

        Args:
            images: shape (N, C, H, W).
            labels: shape (N,).
            answers: what the teacher gives, if it is known, as `ask`; else it is asked.
        """
        images = self._sent(images)
        labels = labels.to(self.device, non_blocking=True)
        forward = self.forward
        if self._compiled is not None and images.shape == self._shape:
            forward = self._compiled
        with self._precision():
            taught: dict[str, Tensor] = {}
            if answers is None:
                answers, taught = self._ask(images)
            with feature_maps(self.net, self.sites) as maps:
                logits = _logits(forward(images), "the network")
        distill = self.settings.distill
        if answers is not None and answers.shape != logits.shape:
            raise ModelError(
                f"the teacher gives outputs of shape {tuple(answers.shape)} and the network "
                f"{tuple(logits.shape)}; distillation needs the same classes in both"
            )
        cut = self._embedding
        loss = combined_loss(
            logits[:, cut:],
            labels,
            None if answers is None else answers[:, cut:],
            weight=distill.weight if distill else 0.0,
            temperature=distill.temperature if distill else 1.0,
            label_smoothing=self.settings.label_smoothing,
        )
        if distill is not None and self.sites:
            loss = loss + distill.features * feature_loss(maps, taught)
        if distill is not None and answers is not None and cut:
            loss = loss + distill.embedding * embedding_loss(logits[:, :cut], answers[:, :cut])
        return loss

    def _ask(self, images: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The teacher's logits (N, classes) and its feature maps; None and none without one."""
        if self.teacher is None:
            return None, {}
        ask: Callable[[Tensor], Any] = self.teacher
        if self._compiled_teacher is not None and images.shape == self._shape:
            ask = self._compiled_teacher
        with torch.no_grad(), feature_maps(self.teacher, self.sites) as maps:
            return _logits(ask(images), "the teacher"), maps

    def ask(self, images: Tensor) -> Tensor | None:
        """The teacher's logits (N, classes), None without a teacher.

        With embeddings they come first: (N, features + classes).
        """
        images = self._sent(images)
        with self._precision():
            return self._ask(images)[0]

    def _sent(self, images: Tensor) -> Tensor:
        """Images on the device, in the memory format."""
        return images.to(self.device, memory_format=self._format, non_blocking=True)

    def _precision(self) -> torch.autocast:
        """The context of a forward pass."""
        mixed = self.execution.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=mixed)

    def step(
        self,
        images: Tensor,
        labels: Tensor,
        penalty: Callable[[nn.Module], None] | None = None,
        answers: Tensor | None = None,
    ) -> Tensor:
        """Change the weights by one batch; returns the detached loss.

        `penalty` adds what it wants to the gradients before the weights move; `answers` are the
        teacher's, if they are known.
        """
        loss = self.loss(images, labels, answers)
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(loss)
        if penalty is not None:
            penalty(self.net)
        self.optimizer.step()
        return loss.detach()

    def reset(self, net: nn.Module) -> None:
        """Take the weights of `net` again and forget what was learned, keeping what is compiled."""
        with torch.no_grad():
            for weight, start in zip(self.net.parameters(), net.parameters(), strict=True):
                weight.copy_(start)
            for buffer, value in zip(self.net.buffers(), net.buffers(), strict=True):
                buffer.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)


def _logits(output: Any, who: str) -> Tensor:
    """The output if it is a tensor of shape (N, classes)."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise ModelError(
        f"{who} returned {got} in training mode where training needs one tensor of shape "
        "(images, classes); wrap it in a module that returns only its logits"
    )
