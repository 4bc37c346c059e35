"""int8 for OpenVINO: bevel's annotation for PT2E, NNCF's quantizer, or the better of both."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import openvino
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from bevel.core.errors import ExportError, one_line
from bevel.core.quiet import quiet
from bevel.core.recipe import Quantization
from bevel.graph.program import export_program, fixed_batch
from bevel.quantization.annotate import ARITHMETIC, MOVEMENT, WEIGHTED, IntegerTypes
from bevel.quantization.pt2e import inputs_of, quantize
from bevel.quantization.ranges import u8s8
from bevel.runtimes._choice import choose
from bevel.runtimes._onnx_file import convert
from bevel.runtimes._onnx_forms import nodes_of
from bevel.runtimes._openvino_file import from_onnx
from bevel.runtimes.openvino import OpenVinoSession

aten = torch.ops.aten

SUMS = ARITHMETIC[:2]
POOLS = (aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.mean.dim)

IN_CACHE = 2**16
"""Numbers of one image up to which a sum of floats costs less than one more rounding.

Measured on x86 (1 thread, float against integer summand): ResNet-56, at most 2^14 numbers, 1.14
times as fast; ResNet-50, at least 2^17 but in its last stage, 0.86 times.
"""

TORCH = "torchao PT2E: uint8 activations per tensor ({observer}), int8 weights per channel"
NATIVE = "nncf.quantize: int8 or uint8 activations per tensor, int8 weights per channel"


class ReadingQuantizer(Quantizer):  # type: ignore[misc]  # torchao is untyped
    """Quantizes what convolutions, sums and pooling read; what they write stays as it is.

    OpenVINO's kernels do what follows a convolution (a sum, any activation) on their float
    accumulators and round once, when the next one reads. To quantize each result, as runtimes with
    an integer kernel for each operator need it, would round more often and be slower here.

    Args:
        types: what activations and weights become.
    """

    def __init__(self, types: IntegerTypes) -> None:
        super().__init__()
        self.types = types

    def annotate(self, model: GraphModule) -> GraphModule:
        """Attach an annotation to each node that reads or makes integers."""
        nodes = [node for node in model.graph.nodes if node.op == "call_function"]
        wanted: dict[Node, None] = {}
        reads: dict[Node, list[Node]] = {}
        for node in reversed(nodes):
            reads[node] = _read_in_integers(node, node in wanted)
            wanted |= dict.fromkeys(reads[node])
        for node in nodes:
            self._annotate(node, reads[node], node in wanted)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: every annotation stands by itself."""

    def _annotate(self, node: Node, reads: Sequence[Node], wanted: bool) -> None:
        inputs: dict[Node, Any] = dict.fromkeys(reads, self.types.activations)
        output: QuantizationSpec | SharedQuantizationSpec | None = None
        if wanted:
            output = self.types.activations
            if reads and (node.target in MOVEMENT or node.target is aten.cat.default):
                output = SharedQuantizationSpec((reads[0], node))
                inputs |= dict.fromkeys(reads[1:], output)
        if node.target in WEIGHTED and isinstance(node.args[1], Node):
            inputs[node.args[1]] = self.types.weights
        if inputs or output is not None:
            node.meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map=inputs, output_qspec=output, _annotated=True
            )


def _read_in_integers(node: Node, wanted: bool) -> list[Node]:
    """What the node should get as integers; `wanted`: somebody reads its own result so."""
    first = [source for source in node.args[:1] if isinstance(source, Node)]
    if node.target in WEIGHTED or node.target in POOLS:
        return first
    if node.target in SUMS:
        summands = [item for item in node.args[:2] if isinstance(item, Node) and _computed(item)]
        return summands if len(summands) < 2 else _beside_accumulator(node, summands)
    if wanted and node.target in MOVEMENT:
        return first
    if wanted and node.target is aten.cat.default:
        return [source for source in node.all_input_nodes if _computed(source)]
    return []


def _beside_accumulator(node: Node, summands: Sequence[Node]) -> list[Node]:
    """The summands but one that a convolution can add to before it rounds: the last such.

    OpenVINO merges a sum with its convolution only where both summands are integers. A float
    summand goes through memory, which is cheap while it stays in the core's cache.
    """
    inside = [item for item in summands if item.target in WEIGHTED and set(item.users) == {node}]
    if not inside or math.prod(node.meta["val"].shape[1:]) > IN_CACHE:
        return list(summands)
    order = {item: number for number, item in enumerate(node.graph.nodes)}
    last = max(inside, key=order.__getitem__)
    return [item for item in summands if item is not last]


def _computed(node: Node) -> bool:
    return node.op in ("call_function", "placeholder")


def quantized_model(
    program: ExportedProgram,
    example_inputs: tuple[Tensor, ...],
    calibration: Iterable[Any],
    options: Quantization,
) -> tuple[openvino.Model, str]:
    """The int8 model, and which quantizer made it.

    Raises:
        ExportError: calibration is empty, a quantizer refuses, or an operator has no ONNX form.
    """
    torch_name = TORCH.format(observer=options.ranges)
    if options.quantizer == "torch":
        return _by_torch(program, example_inputs, calibration, options), torch_name
    count = len(program.graph_signature.user_inputs)
    pieces = list(_pieces(calibration, count, fixed_batch(program)))
    if options.quantizer == "native":
        return _by_nncf(program, pieces, options), NATIVE
    models = {
        "torch": _by_torch(program, example_inputs, calibration, options),
        "native": _by_nncf(program, pieces, options),
    }
    sessions = {name: OpenVinoSession(model, 1) for name, model in models.items()}
    reference = OpenVinoSession(from_onnx(convert(program)), 1)
    name, why = choose(sessions, reference, calibration, count)
    return models[name], f"{torch_name if name == 'torch' else NATIVE}; {why}"


def _by_torch(
    program: ExportedProgram,
    example_inputs: tuple[Tensor, ...],
    calibration: Iterable[Any],
    options: Quantization,
) -> openvino.Model:
    quantizer = ReadingQuantizer(u8s8(options.ranges))
    converted = quantize(program, quantizer, calibration, options)
    whole = export_program(converted, example_inputs, dynamic=fixed_batch(program) is None)
    return from_onnx(convert(whole))


def _by_nncf(
    program: ExportedProgram, pieces: Sequence[tuple[Tensor, ...]], options: Quantization
) -> openvino.Model:
    """NNCF's post-training quantization with its defaults: min-max, fast bias correction."""
    if not pieces:
        raise ExportError("int8 needs calibration images and got none")
    asked = {
        f"observer: {options.observer}": options.native_ranges != "minmax",
        "equalize": options.equalize,
        "learn_rounding": options.learn_rounding,
    }
    for name, wanted in asked.items():
        if wanted:
            raise ExportError(f"bevel does not ask NNCF for {name}; use quantizer: torch")
    onnx_model = convert(program)
    kept = nodes_of(onnx_model, options.keep_float)
    model = from_onnx(onnx_model)
    names = {op.get_friendly_name() for op in model.get_ops()}
    try:
        with _nncf() as nncf:
            # A node of ONNX may have become several; their names begin with its own.
            scope = [n for n in names if any(n == k or n.startswith(f"{k}/") for k in kept)]
            feeds = [[tensor.numpy() for tensor in piece] for piece in pieces]
            found: openvino.Model = nncf.quantize(
                model,
                nncf.Dataset(feeds),
                subset_size=len(feeds),
                ignored_scope=nncf.IgnoredScope(names=sorted(scope)) if scope else None,
            )
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise ExportError(
            f"nncf.quantize refuses the network: {one_line(error, 200)}; use quantizer: torch"
        ) from error
    return found


@contextmanager
def _nncf() -> Iterator[Any]:
    """NNCF, silent, and not reporting to its makers."""
    with quiet():
        # This variable is how NNCF is told, while it is imported, to send no telemetry.
        before = os.environ.get("NNCF_CI")
        os.environ["NNCF_CI"] = "1"
        try:
            import nncf
        finally:
            if before is None:
                del os.environ["NNCF_CI"]
            else:
                os.environ["NNCF_CI"] = before
        yield nncf


def _pieces(
    calibration: Iterable[Any], count: int, static_batch: int | None
) -> Iterator[tuple[Tensor, ...]]:
    """The network's inputs in each batch, cut to the batch size where that is fixed."""
    for batch in calibration:
        inputs = inputs_of(batch, count)
        step = static_batch or len(inputs[0])
        for start in range(0, len(inputs[0]) - step + 1, step):
            yield tuple(tensor[start : start + step] for tensor in inputs)
