"""From a module to a `torch.export` program, with a batch of any size where that is possible."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bevel.core.errors import ExportError, one_line
from bevel.core.progress import note
from bevel.core.quiet import quiet

REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError)
"""What torch.export and the network's own code raise when tracing does not work."""


def export_program(
    net: nn.Module, example_inputs: tuple[Tensor, ...], *, dynamic: bool = True
) -> tuple[ExportedProgram, tuple[Tensor, ...], bool]:
    """Trace a network.

    Args:
        net: it is traced in eval mode; its mode is restored.
        example_inputs: tensors with the batch first.
        dynamic: try to leave the batch size open.

    Returns:
        The program, the inputs it was traced with, and whether its batch size is open. Without an
        open batch size it takes one image.

    Raises:
        ExportError: torch.export refuses the network; the reason, shortened.
    """
    modes = [(module, module.training) for module in net.modules()]
    if not isinstance(net, torch.fx.GraphModule):  # a traced one has its mode built in
        net.eval()
    try:
        if dynamic:
            several = tuple(_at_least_two(tensor) for tensor in example_inputs)
            shapes = tuple({0: Dim.DYNAMIC} for _ in several)
            try:
                with quiet(), torch.no_grad():
                    program = torch.export.export(net, several, dynamic_shapes=shapes)
                if _keeps_batch(program):
                    return program, several, True
                note("the batch size is fixed at 1: an output does not have one row per image")
            except REFUSALS as error:
                note(f"the batch size is fixed at 1: {one_line(error, 120)}")
        one = tuple(tensor[:1] for tensor in example_inputs)
        try:
            with quiet(), torch.no_grad():
                return torch.export.export(net, one), one, False
        except REFUSALS as error:
            raise ExportError(
                f"torch.export refuses the network: {one_line(error, 200)}. Rewrite what depends "
                "on tensor values in its forward (if x.sum() > 0, .item(), int(tensor)) by tensor "
                "operations such as torch.where"
            ) from error
    finally:
        for module, training in modes:
            module.training = training


def _keeps_batch(program: ExportedProgram) -> bool:
    """Whether every output's first dimension is the batch: else images of a batch are mixed."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    signature = program.graph_signature
    batch = values[signature.user_inputs[0]].shape[0]
    outputs = [values.get(name) for name in signature.user_outputs]
    return all(
        isinstance(value, Tensor) and value.ndim > 0 and str(value.shape[0]) == str(batch)
        for value in outputs
    )


def _at_least_two(tensor: Tensor) -> Tensor:
    """A batch of 1 would be taken for a fixed size."""
    return tensor if len(tensor) > 1 else torch.cat([tensor, tensor])
