"""Whether a network and data fit each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bevel.core.errors import FORWARD_FAULTS, DataError, ModelError, one_line
from bevel.core.modes import evaluating
from bevel.data.collection import Data


def check_classes(net: nn.Module, data: Data) -> None:
    """Run one blank image through the network: it must take it, and give one output per class.

    Raises:
        ModelError: the network does not take images of this shape, or gives no (N, K) tensor.
        DataError: it has another number of outputs than the data has classes.
    """
    shape = "x".join(map(str, data.input_shape))
    blank = torch.zeros(2, *data.input_shape)
    parameter = next(net.parameters(), None)
    if parameter is not None:
        blank = blank.to(parameter.device)
    try:
        with evaluating(net), torch.no_grad():
            output = net(blank)
    except FORWARD_FAULTS as error:
        raise ModelError(
            f"the network does not take images of {shape} (channels x height x width): "
            f"{one_line(error, 160)}. Check in_channels of the model, and data.size"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[0] != 2:
        got = (
            f"shape {tuple(output.shape)}"
            if isinstance(output, Tensor)
            else f"a {type(output).__name__}"
        )
        raise ModelError(f"the network gave {got} for 2 images; expected (2, number of classes)")
    if output.shape[1] != len(data.classes):
        names = ", ".join(data.classes[:4]) + (", …" if len(data.classes) > 4 else "")
        raise DataError(
            f"the network has {output.shape[1]} outputs and the data has {len(data.classes)} "
            f"classes ({names}): set model.arguments.num_classes to {len(data.classes)}, "
            "or use data with the classes of the network"
        )
