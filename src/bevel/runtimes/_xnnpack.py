"""What LiteRT and ExecuTorch share: XNNPACK runs their files, so both want the same integers.

Activations and weights are int8, with a zero point for activations. Hard swish is written in float
between two conversions: XNNPACK merges the three into one lookup in a table, while it has no kernel
for an integer hard swish, which LiteRT then runs itself, slowly. Hard sigmoid becomes a ReLU6 where
that can be; elsewhere it is in float: its tensors are tiny where networks use it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    SharedQuantizationSpec,
)

from bevel.core.recipe import Quantization
from bevel.quantization.annotate import FusingQuantizer, IntegerTypes, split_gates
from bevel.quantization.keeping import ANNOTATION
from bevel.quantization.pt2e import inputs_of
from bevel.quantization.ranges import s8s8
from bevel.quantization.weights import clip_hard_sigmoids
from bevel.runtimes import Session

aten = torch.ops.aten

SIGMOID_SCALE = 1 / 256
"""Integer sigmoids have this scale and zero point -128, by the LiteRT specification."""

SPLIT = {aten.silu.default: aten.sigmoid.default, aten.silu_.default: aten.sigmoid.default}
"""Written as x * gate(x): both have integer kernels."""

REWRITES = (clip_hard_sigmoids,)
"""What is done to a network before its integers are chosen."""

FASTER = 1.05
"""A file that is this many times faster is taken when both agree equally with float."""

COMPARED_IMAGES = 64
WARMUP_RUNS = 5
TIMED_RUNS = 30


def a8w8(observer: str) -> IntegerTypes:
    """int8 activations, per tensor, with a zero point; int8 weights, per channel, symmetric."""
    types = s8s8(observer)
    return IntegerTypes(
        activations=replace(types.activations, qscheme=torch.per_tensor_affine),
        weights=types.weights,
    )


class XnnpackQuantizer(FusingQuantizer):
    """Annotates the operators that XNNPACK has integer kernels for, as a runtime reaches them.

    Args:
        observer: what the range of an activation is: minmax, percentile or mse.
        in_float: operators that the runtime does not run in integers.
        same_scale: operators whose output must have the scale of their input.
    """

    def __init__(
        self, observer: str, *, in_float: Sequence[Any] = (), same_scale: Sequence[Any] = ()
    ) -> None:
        super().__init__(a8w8(observer))
        self._in_float, self._same_scale = (aten.hardsigmoid.default, *in_float), same_scale

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Write SiLU as the product that it is."""
        split_gates(model, SPLIT)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate as for any fusing runtime, then what is particular here."""
        super().annotate(model)
        for node in model.graph.nodes:
            if ANNOTATION not in node.meta:
                continue
            if node.target in self._in_float:
                del node.meta[ANNOTATION]
            elif node.target in self._same_scale:
                self._share(node, node.args[0])
            elif node.target is aten.cat.default:
                self._join(node)
            elif node.target is aten.sigmoid.default:
                node.meta[ANNOTATION] = replace(
                    node.meta[ANNOTATION], output_qspec=_sigmoid_output()
                )
        return model

    def _join(self, node: Node) -> None:
        """One scale for all that is joined: then joining is a copy."""
        first, *others = dict.fromkeys(node.args[0])  # type: ignore[arg-type]
        shared = SharedQuantizationSpec((first, node))
        inputs = {first: self.types.activations, **dict.fromkeys(others, shared)}
        node.meta[ANNOTATION] = QuantizationAnnotation(
            input_qspec_map=inputs, output_qspec=shared, _annotated=True
        )


def _sigmoid_output() -> FixedQParamsQuantizationSpec:
    return FixedQParamsQuantizationSpec(
        dtype=torch.int8,
        scale=SIGMOID_SCALE,
        zero_point=-128,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
    )


def single_images(calibration: Iterable[Any], count: int) -> Iterable[tuple[np.ndarray, ...]]:
    """Calibration batches, one image at a time, as the arrays of the network's `count` inputs."""
    for batch in calibration:
        inputs = [tensor.numpy() for tensor in inputs_of(batch, count)]
        for index in range(len(inputs[0])):
            yield tuple(array[index : index + 1] for array in inputs)


@dataclass(frozen=True)
class _Trial:
    """How a file did on calibration images."""

    name: str
    agreement: float
    latency_ms: float


def choose(
    reference: Session,
    sessions: Mapping[str, Session],
    program: ExportedProgram,
    calibration: Iterable[Any],
) -> tuple[str, str]:
    """The name of the better of two int8 files, and why it is better.

    Better is the one whose highest output is the float file's on more calibration images; where
    that is equal, the faster one, if it is clearly faster; else the first.
    """
    count = len(program.graph_signature.user_inputs)
    images = list(islice(single_images(calibration, count), COMPARED_IMAGES))
    expected = [reference.run(image)[0].argmax() for image in images]
    times = _time_in_turn(list(sessions.values()), images[0])
    trials = [
        _Trial(
            name,
            sum(
                session.run(image)[0].argmax() == right
                for image, right in zip(images, expected, strict=True)
            )
            / len(images),
            latency,
        )
        for (name, session), latency in zip(sessions.items(), times, strict=True)
    ]
    best = max(trials, key=lambda trial: trial.agreement)
    other = next(trial for trial in trials if trial is not best)
    if best.agreement > other.agreement:
        return best.name, (
            f"chosen for its agreement with float on calibration images, "
            f"{100 * best.agreement:.1f} % against {100 * other.agreement:.1f} % ({other.name})"
        )
    fast, slow = sorted(trials, key=lambda trial: trial.latency_ms)
    same = f"both agree with float on {100 * fast.agreement:.1f} % of the calibration images"
    if slow.latency_ms > FASTER * fast.latency_ms:
        return fast.name, (
            f"chosen because {same} and it is faster, {fast.latency_ms:.3g} ms against "
            f"{slow.latency_ms:.3g} ms ({slow.name})"
        )
    return best.name, f"{same} and are equally fast"


def _time_in_turn(sessions: Sequence[Session], image: Sequence[np.ndarray]) -> list[float]:
    """Median milliseconds of each, run in turn so that all meet the same moods of the machine."""
    samples: list[list[float]] = [[] for _ in sessions]
    for run in range(WARMUP_RUNS + TIMED_RUNS):
        for session, times in zip(sessions, samples, strict=True):
            start = time.perf_counter()
            session.run(image)
            if run >= WARMUP_RUNS:
                times.append(1e3 * (time.perf_counter() - start))
    return [median(times) for times in samples]


def name_quantizer(quantizer: str, options: Quantization) -> str:
    """How an artifact names what made its integers."""
    return f"{quantizer}: int8 activations per tensor ({options.ranges}), int8 weights per channel"
