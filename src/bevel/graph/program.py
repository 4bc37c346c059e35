"""From a module to a `torch.export` program, with a batch of any size where that is possible."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bevel.core.errors import FORWARD_FAULTS, ExportError, one_line
from bevel.core.modes import evaluating
from bevel.core.progress import note
from bevel.core.quiet import quiet


def export_program(
    net: nn.Module, example_inputs: tuple[Tensor, ...], *, dynamic: bool = True
) -> ExportedProgram:
    """Trace a network; its modes are restored.

    Args:
        net: it is traced in eval mode.
        example_inputs: tensors with the batch first.
        dynamic: try to leave the batch size open; without that it takes one image.

    Raises:
        ExportError: torch.export refuses the network; the reason, shortened.
    """
    program = _traced(net, example_inputs, dynamic=dynamic)
    _drop_whole_slices(program)
    return program


def _traced(
    net: nn.Module, example_inputs: tuple[Tensor, ...], *, dynamic: bool
) -> ExportedProgram:
    # A traced network has its mode built in, and refuses to be asked for another.
    traced = isinstance(net, torch.fx.GraphModule)
    with nullcontext() if traced else evaluating(net), torch.no_grad():
        if dynamic:
            several = tuple(_at_least_two(tensor) for tensor in example_inputs)
            try:
                with quiet():
                    shapes = tuple({0: Dim.DYNAMIC} for _ in several)
                    program = torch.export.export(net, several, dynamic_shapes=shapes)
                if _keeps_batch(program):
                    return program
                note("the batch size is fixed at 1: an output does not have one row per image")
            except FORWARD_FAULTS as error:
                note(f"the batch size is fixed at 1: {one_line(error, 120)}")
        try:
            with quiet():
                return torch.export.export(net, tuple(tensor[:1] for tensor in example_inputs))
        except FORWARD_FAULTS as error:
            raise ExportError(
                f"torch.export refuses the network: {one_line(error, 200)}. Rewrite what depends "
                "on tensor values in its forward (if x.sum() > 0, .item(), int(tensor)) by tensor "
                "operations such as torch.where"
            ) from error


def _drop_whole_slices(program: ExportedProgram) -> None:
    """Remove slices that take everything.

    `x[:, :n]` of n channels leaves one along an open batch. Each would be rounded to int8 once more
    for nothing, and OpenVINO 2026.4 ends with a segmentation fault where one follows a cat.
    """
    graph = program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor):
        source = node.args[0]
        sizes = [str(tensor.meta["val"].shape) for tensor in (node, source)]
        if sizes[0] == sizes[1] and all(user.op != "output" for user in node.users):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    program.graph_module.recompile()


def fixed_batch(program: ExportedProgram) -> int | None:
    """The only batch size the program takes; None where it takes any."""
    size = _first_sizes(program, program.graph_signature.user_inputs)[0]
    return size if isinstance(size, int) else None


def _keeps_batch(program: ExportedProgram) -> bool:
    """Whether every output's first dimension is the batch: else images of a batch are mixed."""
    signature = program.graph_signature
    batch = _first_sizes(program, signature.user_inputs)[0]
    return all(str(size) == str(batch) for size in _first_sizes(program, signature.user_outputs))


def _first_sizes(program: ExportedProgram, names: Iterable[Any]) -> list[Any]:
    """The first dimension of these tensors of the program; None for what has none."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    found = [values.get(name) for name in names]
    return [v.shape[0] if isinstance(v, Tensor) and v.ndim else None for v in found]


def _at_least_two(tensor: Tensor) -> Tensor:
    """A batch of 1 would be taken for a fixed size."""
    return tensor if len(tensor) > 1 else torch.cat([tensor, tensor])
