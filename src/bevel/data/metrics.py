"""How well a network does on labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevel.core.errors import DataError
from bevel.core.modes import evaluating
from bevel.core.progress import track


@dataclass(frozen=True)
class Metrics:
    """Share of images whose highest output is the label, mean cross-entropy, number of images."""

    top1: float
    loss: float
    images: int


def evaluate(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], label: str = "evaluate"
) -> Metrics:
    """Run the network over all batches, on the device its parameters are on, without gradients.

    Args:
        net: (B, C, H, W) -> (B, K).
        batches: pairs of images and int64 labels (B,).
        label: what the progress bar says.

    Returns:
        The loss is the mean over the images, in nats; not finite if an output is not.

    Raises:
        DataError: there are no batches, or a label has no output.
    """
    # Imported here: it takes a second, which a command that evaluates nothing need not wait for.
    from torchmetrics.classification import MulticlassAccuracy

    parameter = next(net.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    total = len(batches) if isinstance(batches, Sized) else None
    accuracy: MulticlassAccuracy | None = None
    # Summed here: torchmetrics' MeanMetric drops NaN, or with nan_strategy="disable" the weights
    # (1.9.0), and a diverged network or a smaller last batch must show.
    loss = torch.zeros((), dtype=torch.float64, device=device)
    images = 0
    with evaluating(net), torch.no_grad():
        for inputs, given in track(batches, label, total):
            outputs = net(inputs.to(device)).float()
            labels = given.to(device)
            if accuracy is None:
                accuracy = MulticlassAccuracy(
                    outputs.shape[1], average="micro", validate_args=False
                ).to(device)
            if int(labels.max()) >= outputs.shape[1]:
                raise DataError(
                    f"label {int(labels.max())} has no output: the network has {outputs.shape[1]}"
                )
            accuracy.update(outputs, labels)
            loss += F.cross_entropy(outputs, labels, reduction="sum")
            images += len(labels)
    if accuracy is None:
        raise DataError(f"there are no images to {label}")
    return Metrics(float(accuracy.compute()), float(loss) / images, images)
