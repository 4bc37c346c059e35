"""What the operators of an exported file tell about its speed, in lines for people."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from bevel.core.records import Artifact, Finding, Operator

SMALL = 0.01
"""A finding below this share of the time is not worth a line."""

OTHER = "other"
"""The kind of what the profiler saw and the file does not name."""

QUANTIZE = re.compile(r"(?<![a-z])(?:fake|dynamic)?_?quantize(?!d)|(?<![a-z])convert(?![a-z])")
DEQUANTIZE = re.compile(r"(?<![a-z])dequantize(?!d)")
TRANSPOSE = re.compile(r"transpose|permute|reorder")
CONVOLUTION = re.compile(r"conv")
FUSION = re.compile(r"^(?:QLinear|Fused|Q(?=[A-Z][a-z]))")
"""What runtimes put before the name of an operator when they fuse it or run it in integers."""

ADVICE = (
    (
        re.compile(r"swish|silu|sigmoid|mish|gelu|^erf$|tanh|^elu$|logistic"),
        "ReLU in its place runs in integers: change it in the network and fine-tune",
    ),
    (
        re.compile(r"norm"),
        "a batch norm right behind a convolution is folded into it; others stay in float",
    ),
    (re.compile(r"softmax"), "it is exact in float only; leave it out of the file if you can"),
)
"""Operators that quantizers often leave in float, and what helps."""

Part = Sequence[Operator]


def explain(
    artifact: Artifact, operators: Sequence[Operator], beside: Sequence[Operator], step: int
) -> list[Finding]:
    """Why the file is not faster, dearest first.

    Args:
        artifact: the file.
        operators: its operators, with times if it was profiled.
        beside: those of the float file of the same runtime, with times; may be empty.
        step: the number whose multiples are the widths that the runtime runs fast.
    """
    bill = Bill(operators)
    lines: list[tuple[Part, str]] = []
    if artifact.precision == "int8":
        lines += _in_float(operators)
        lines += _conversions(artifact, operators)
    lines += _undelegated(operators) + _transposes(operators) + _narrow(operators, step)
    found = [(bill.cost(part), bill.finding(part, text)) for part, text in lines]
    found += [(f.share or 0.0, f) for f in _slower(operators, beside)]
    if bill.timed:
        found = [(cost, finding) for cost, finding in found if cost >= SMALL]
    found.sort(key=lambda pair: -pair[0])
    return [finding for _, finding in found]


class Bill:
    """What parts of a file cost: shares of the profiled time, else of the MACs.

    Times that the profiler gives under names of its own cannot be laid to operators; where they
    are the greater part, the MACs count.
    """

    def __init__(self, operators: Sequence[Operator]) -> None:
        self._macs = sum(operator.macs for operator in operators)
        self._time = sum(operator.latency_ms or 0.0 for operator in operators)
        unknown = sum(o.latency_ms or 0.0 for o in operators if o.kind == OTHER)
        if unknown > self._time / 2:
            self._time = 0.0

    @property
    def timed(self) -> bool:
        """Whether costs are shares of the time."""
        return self._time > 0

    def cost(self, part: Part) -> float:
        """Share of the time, else of the MACs, else 0."""
        if self._time:
            return sum(operator.latency_ms or 0.0 for operator in part) / self._time
        return sum(operator.macs for operator in part) / self._macs if self._macs else 0.0

    def finding(self, part: Part, text: str) -> Finding:
        """The text with what it costs before it."""
        cost = self.cost(part)
        if self._time:
            return Finding(message=f"{_percent(cost)} of the time is in {text}", share=cost)
        return Finding(
            message=f"{_percent(cost)} of the MACs are in {text}" if cost else f"it has {text}"
        )


def int8_share(operators: Iterable[Operator]) -> float | None:
    """Share of the MACs that run in integers; None if no MACs are known."""
    counted = [operator for operator in operators if operator.macs]
    total = sum(operator.macs for operator in counted)
    return sum(o.macs for o in counted if not is_float(o)) / total if total else None


def verdict(
    artifact: Artifact,
    operators: Sequence[Operator],
    findings: Sequence[Finding],
    speedup: float | None,
) -> str:
    """The answer to "why is it not faster?" in a line."""
    if not operators:
        head = f"{artifact.runtime} does not say which operators its files hold"
    elif artifact.precision != "int8":
        head = f"{len(operators)} operators, {artifact.precision} by design"
    else:
        share = int8_share(operators)
        head = f"{_percent(share)} of the MACs run in int8" if share is not None else "int8"
    if speedup is not None:
        speed = f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"
        head = f"{speed} than the float file; {head}"
    if artifact.precision == "int8-weights":
        head += "; int8-weights makes the file smaller, its arithmetic stays in float"
    if findings:
        return f"{head}; {findings[0].message}"
    if operators and speedup is not None and speedup < 1:
        return (
            f"{head}; no operator stands out: at these sizes integers do not pay, ship the "
            "float file"
        )
    return head


def is_float(operator: Operator) -> bool:
    """Whether its arithmetic is in float."""
    return operator.precision.startswith(("float", "bfloat"))


def is_quantize(operator: Operator) -> bool:
    """Whether it only turns float into integers, or integers of one scale into another."""
    return bool(QUANTIZE.search(operator.kind.lower()))


def is_dequantize(operator: Operator) -> bool:
    """Whether it only turns integers into float."""
    return bool(DEQUANTIZE.search(operator.kind.lower()))


def is_conversion(operator: Operator) -> bool:
    """Either of them."""
    return is_quantize(operator) or is_dequantize(operator)


def is_transpose(operator: Operator) -> bool:
    """Whether it only changes the order of the axes; a transposed convolution does not."""
    kind = operator.kind.lower()
    return bool(TRANSPOSE.search(kind)) and not CONVOLUTION.search(kind)


def count_conversions(operators: Iterable[Operator]) -> int:
    """How many operators only convert between float and integers."""
    return sum(is_conversion(operator) for operator in operators)


def count_transposes(operators: Iterable[Operator]) -> int:
    """How many operators only change the order of the axes."""
    return sum(is_transpose(operator) for operator in operators)


def count_stray_pairs(operators: Sequence[Operator]) -> int:
    """Pairs that undo each other: what was dequantized is quantized again, unused in float.

    Data movement between the two does not count as use. Where the file does not say what an
    operator's inputs are, the one before it in the file counts as its input.
    """
    by_name = {operator.name: operator for operator in operators}
    before = dict(zip((o.name for o in operators[1:]), operators, strict=False))

    def source(operator: Operator) -> Operator | None:
        if operator.inputs:
            return by_name.get(operator.inputs[0])
        return before.get(operator.name)

    pairs = 0
    for operator in operators:
        if not is_quantize(operator) or is_dequantize(operator):
            continue
        found = source(operator)
        for _ in operators:  # a damaged file may lead in a circle
            if found is None or is_conversion(found) or found.precision != "none":
                break
            found = source(found)
        pairs += found is not None and is_dequantize(found)
    return pairs


def _in_float(operators: Iterable[Operator]) -> list[tuple[Part, str]]:
    """What an int8 file leaves in float, by kind and reason."""
    left = [o for o in operators if is_float(o) and not is_conversion(o)]
    found: list[tuple[Part, str]] = []
    for (kind, reason), part in _grouped(left, lambda o: (o.kind, o.reason)).items():
        advice = next((text for kinds, text in ADVICE if kinds.search(kind.lower())), None)
        said = [text for text in (reason, advice) if text]
        runs = "runs" if len(part) == 1 else "run"
        text = f"{_operators(part, kind)} that {runs} in float"
        found.append((part, f"{text}: {'; '.join(said)}" if said else text))
    return found


def _conversions(artifact: Artifact, operators: Sequence[Operator]) -> list[tuple[Part, str]]:
    """Conversions beyond those at the file's own inputs and outputs."""
    part = [operator for operator in operators if is_conversion(operator)]
    if len(part) <= len(artifact.inputs) + len(artifact.outputs):
        return []
    stray = count_stray_pairs(operators)
    undo = f", {stray} pair{'s' * (stray != 1)} of which undo each other" if stray else ""
    text = f"{_operators(part, '')} that convert between float and integers{undo}"
    return [(part, f"{text}: they go when what lies between them runs in integers")]


def _undelegated(operators: Iterable[Operator]) -> list[tuple[Part, str]]:
    """What the fast kernel library does not take."""
    part = [operator for operator in operators if not operator.delegated]
    if not part:
        return []
    kinds = ", ".join(sorted({operator.kind for operator in part}))
    reasons = sorted({operator.reason for operator in part if operator.reason})
    why = f": {'; '.join(reasons)}" if reasons else ""
    return [(part, f"{_operators(part, '')} that the delegate does not take ({kinds}){why}")]


def _transposes(operators: Iterable[Operator]) -> list[tuple[Part, str]]:
    """Operators that only change the order of the axes."""
    part = [operator for operator in operators if is_transpose(operator)]
    runs = "changes" if len(part) == 1 else "change"
    text = f"{_operators(part, '')} that only {runs} the order of the axes"
    return [(part, text)] if part else []


def _narrow(operators: Sequence[Operator], step: int) -> list[tuple[Part, str]]:
    """Widths between the runtime's steps; the last layer's are the task's and stay."""
    computing = [operator for operator in operators if operator.macs and operator.channels]
    part = [operator for operator in computing[:-1] if (operator.channels or 0) % step]
    if not part:
        return []
    widths = sorted({operator.channels or 0 for operator in part})
    shown = ", ".join(map(str, widths[:6])) + (", ..." if len(widths) > 6 else "")
    text = f"{_operators(part, '')} whose width is no multiple of {step} ({shown})"
    return [(part, f"{text}: prune with align: {step}")]


def _slower(operators: Sequence[Operator], beside: Sequence[Operator]) -> list[Finding]:
    """Kinds of operator that take longer than in the float file."""
    own, other = _times(operators), _times(beside)
    total = sum(own.values())
    return [
        Finding(
            message=f"{kind} takes {own[kind]:.3g} ms here and {other[kind]:.3g} ms in the float "
            "file: these layers are too narrow or too small for integers to pay",
            share=(own[kind] - other[kind]) / total,
        )
        for kind in own
        if kind in other and own[kind] > other[kind]
    ]


def _times(operators: Iterable[Operator]) -> dict[str, float]:
    """Time by kind, under the name that an operator has in float and alone."""
    times: dict[str, float] = defaultdict(float)
    for operator in operators:
        if operator.latency_ms is not None and operator.kind != OTHER:
            kind = FUSION.sub("", operator.kind.partition(" (")[0])
            times[kind] += operator.latency_ms
    return times


def _grouped(
    operators: Iterable[Operator], key: Callable[[Operator], tuple[str, str | None]]
) -> dict[tuple[str, str | None], list[Operator]]:
    groups: dict[tuple[str, str | None], list[Operator]] = defaultdict(list)
    for operator in operators:
        groups[key(operator)].append(operator)
    return groups


def _operators(part: Part, kind: str) -> str:
    """`12 HardSwish operators`."""
    return " ".join(filter(None, (str(len(part)), kind, f"operator{'s' * (len(part) != 1)}")))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
