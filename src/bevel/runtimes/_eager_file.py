"""From a torch network to a zip of operators and weights, which `eager` runs."""

from __future__ import annotations

import copy
import io
import json
import operator
import zipfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer

from bevel.core.errors import ExportError
from bevel.core.recipe import Quantization
from bevel.core.signature import TensorSignature
from bevel.graph.program import export_program, fixed_batch
from bevel.quantization.annotate import WEIGHTED, FusingQuantizer, IntegerTypes
from bevel.quantization.pt2e import quantize
from bevel.quantization.ranges import u8s8
from bevel.runtimes.eager import NAMESPACES, NUMBERS, OBJECTS

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every member, so that the same network gives the same bytes."""

ALIGNMENT = 64
"""Bytes; a tensor begins at a multiple."""

INT8 = "torchao PT2E: uint8 activations per tensor ({observer}), int8 weights per channel; in float"


class WeightsQuantizer(Quantizer):  # type: ignore[misc]  # torchao is untyped
    """Quantizes the weights of convolutions and linear layers, nothing else."""

    def __init__(self, types: IntegerTypes) -> None:
        super().__init__()
        self.types = types

    def annotate(self, model: GraphModule) -> GraphModule:
        """Attach an annotation to each node with weights."""
        for node in model.graph.nodes:
            if node.target in WEIGHTED and isinstance(node.args[1], Node):
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map={node.args[1]: self.types.weights}, _annotated=True
                )
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: every annotation stands by itself."""


def in_bfloat16(net: nn.Module) -> nn.Module:
    """A copy of a network that computes in bfloat16, from float32 and to float32."""
    copied = copy.deepcopy(net).to(torch.bfloat16)
    # Hooks, not a module around it: the forward keeps its signature, which names the inputs.
    copied.register_forward_pre_hook(lambda _, tensors: _cast(tensors, torch.bfloat16))
    copied.register_forward_hook(lambda _module, _inputs, found: _cast(found, torch.float32))
    return copied


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """The same structure, its float tensors in another type."""
    return tree_map(
        lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values
    )


def export(
    net: nn.Module,
    example_inputs: tuple[Tensor, ...],
    precision: str,
    calibration: Iterable[Any] | None,
    quantization: Quantization,
    path: Path,
) -> str | None:
    """Write the file; returns which quantizer made it, if any.

    Raises:
        ExportError: torch.export refuses the network, it holds what a file cannot, or calibration
            is empty; or a quantizer other than bevel's is asked for.
    """
    if precision == "bfloat16":
        net = in_bfloat16(net)
    program = export_program(net, example_inputs)
    if not precision.startswith("int8"):
        _write(program, path)
        return None
    if quantization.quantizer == "native":
        raise ExportError("torch has no quantizer of its own here; use quantizer: torch")
    if precision == "int8-weights":
        calibration = [example_inputs]  # it decides nothing
    types = u8s8(quantization.ranges)
    whole = precision == "int8"
    quantizer: Quantizer = FusingQuantizer(types) if whole else WeightsQuantizer(types)
    converted = quantize(program, quantizer, calibration or (), quantization)
    dynamic = fixed_batch(program) is None
    _write(export_program(converted, example_inputs, dynamic=dynamic), path)
    if precision == "int8":
        return INT8.format(observer=quantization.ranges)
    return "int8 weights per channel, symmetric; arithmetic in float32"


def _write(program: ExportedProgram, path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    inputs: list[TensorSignature] = []
    nodes = {node.name: node for node in program.graph.nodes}
    for spec in program.graph_signature.input_specs:
        name = getattr(spec.arg, "name", "")
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(_signature(nodes[name], name))
        elif spec.target in program.state_dict:
            tensors[name] = program.state_dict[spec.target]
        else:
            tensors[name] = _constant(program, spec.target)
    results = [_result(item) for item in program.graph.output_node().args[0]]
    names = ["output", *(f"output_{index}" for index in range(1, len(results)))]
    weights = io.BytesIO()
    graph = {
        "inputs": [asdict(signature) for signature in inputs],
        "outputs": [asdict(_signature(n, name)) for n, name in zip(results, names, strict=True)],
        "results": [node.name for node in results],
        "tensors": {name: _stored(tensor, weights) for name, tensor in tensors.items()},
        "calls": [_call(node) for node in program.graph.nodes if node.op == "call_function"],
    }
    members = {"graph.json": json.dumps(graph).encode(), "weights.bin": weights.getvalue()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            deflated = zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name, EPOCH), content, deflated)


def _constant(program: ExportedProgram, name: str | None) -> Tensor:
    value = program.constants.get(name or "")
    if not isinstance(value, Tensor):
        raise ExportError(f"the network holds '{name}', which is no tensor: no file can carry it")
    return value


def _stored(tensor: Tensor, weights: io.BytesIO) -> dict[str, Any]:
    """Append a tensor's bytes, and say where they are."""
    plain = tensor.detach().cpu().contiguous()
    weights.write(b"\0" * (-weights.tell() % ALIGNMENT))
    offset = weights.tell()
    weights.write(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"dtype": _name(plain.dtype), "shape": list(plain.shape), "offset": offset}


def _call(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "target": _target(node),
        "args": [_encoded(item) for item in node.args],
        "kwargs": {key: _encoded(item) for key, item in node.kwargs.items()},
    }


def _target(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace in NAMESPACES:
        return str(target)
    name = getattr(target, "__name__", str(target))
    if getattr(operator, name, None) is target and name in NUMBERS:
        return f"operator.{name}"
    raise ExportError(f"the network uses '{name}', which bevel's file of operators does not hold")


def _encoded(item: Any) -> Any:
    """An argument as JSON: see `eager`."""
    if item is None or isinstance(item, bool | int | float | str):
        return item
    if isinstance(item, list | tuple):
        return [_encoded(part) for part in item]
    if isinstance(item, Node):
        return {"value": item.name}
    if isinstance(item, torch.device):
        return {"device": "cpu"}
    for kind, type_ in OBJECTS.items():
        if isinstance(item, type_):
            return {kind: _name(item)}
    raise ExportError(f"an operator of the network takes a {type(item).__name__} as argument")


def _result(item: Any) -> Node:
    if not isinstance(item, Node) or not isinstance(item.meta.get("val"), Tensor):
        raise ExportError(f"an output of the network is {item!r}; a file gives tensors only")
    return item


def _signature(node: Node, name: str) -> TensorSignature:
    """An open first size is the batch."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise ExportError(f"the network's input '{name}' is no tensor")
    shape: list[int | str] = [
        size if isinstance(size, int) else "batch" if axis == 0 else f"size_{axis}"
        for axis, size in enumerate(value.shape)
    ]
    return TensorSignature(name=name, shape=shape, dtype=_name(value.dtype))


def _name(item: object) -> str:
    """`float32` for `torch.float32`."""
    return str(item).removeprefix("torch.")
