"""What both reports say below the summary: steps, widths, proof, methods, warnings, versions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bevel.core.records import Measurement, RunRecord, StepRecord
from bevel.reporting.summary import NONE, count, duration, ordered, percent, size


def steps(record: RunRecord) -> list[list[str]]:
    """Per step: number and verb, validation accuracy, MACs, parameters, time."""
    return [
        [
            f"{position} {_what(step)}",
            percent(step.numbers.get("validation_top1"), 2),
            count(step.numbers.get("macs")),
            count(step.numbers.get("params")),
            duration(step.seconds),
        ]
        for position, step in enumerate(record.steps, start=1)
    ]


def _what(step: StepRecord) -> str:
    """Its verb; of an export also which file: compressed int8 (onnxruntime)."""
    artifact = step.numbers.get("artifact")
    if not artifact:
        return step.verb
    label = str(artifact["path"]).rpartition("/")[2].partition("-")[0]
    return f"{step.verb} {label} {artifact['precision']} ({artifact['runtime']})"


def fallbacks(record: RunRecord) -> list[str]:
    """Per int8 export with an accuracy limit: which layers stay in float and why."""
    return [
        f"{_what(step)}: {step.numbers['fallback']['summary']}"
        for step in record.steps
        if step.numbers.get("fallback")
    ]


@dataclass(frozen=True)
class RuleSummary:
    """What a surgery rule did to a network.

    Attributes:
        rule: its name.
        places: that it matched.
        done: of these, rewritten.
        naive: mean error of the naive swap, and
        fitted: of what was put there; None where nothing was fitted.
        difference: of the outputs, of an exact rule.
        reasons: why places were left alone, each once.
    """

    rule: str
    places: int
    done: int
    naive: float | None
    fitted: float | None
    difference: float | None
    reasons: list[str]


def by_rule(
    sites: Sequence[Mapping[str, Any]], proven: Mapping[str, float]
) -> Iterator[RuleSummary]:
    """The sites of a surgery, rule by rule, in the order in which the rules ran."""
    for rule in dict.fromkeys(site["rule"] for site in sites):
        own = [site for site in sites if site["rule"] == rule]
        errors = [site["error"] for site in own if site["error"] is not None]
        naive, fitted = (
            sum(error[key] for error in errors) / len(errors) if errors else None
            for key in ("naive", "fitted")
        )
        reasons = list(dict.fromkeys(site["reason"] for site in own if site["reason"]))
        done = sum(site["reason"] is None for site in own)
        yield RuleSummary(rule, len(own), done, naive, fitted, proven.get(rule), reasons)


def refitted(refits: Sequence[Mapping[str, Any]]) -> str | None:
    """One line about the layers that surgery fitted again; None where it did not."""
    if not refits:
        return None
    before, after = (sum(r[key] for r in refits) / len(refits) for key in ("before", "after"))
    return (
        f"{len(refits)} layers fitted again one after the other: mean error of their outputs "
        f"{before:.3f} -> {after:.3f}"
    )


def surgeries(record: RunRecord) -> list[str]:
    """Per surgery step and rule: places, what they lose, and why others were left alone."""
    lines = []
    for position, step in enumerate(record.steps, start=1):
        for found in by_rule(step.numbers.get("sites", ()), step.numbers.get("proven", {})):
            said = f"step {position}, {found.rule}: {found.done} of {found.places} places"
            if found.fitted is not None:
                said += (
                    f"; mean error there {found.fitted:.3f}, of the naive swap {found.naive:.3f}"
                )
            elif found.difference is not None:
                said += f"; exact, outputs differ by {found.difference:.1e}"
            lines.append("; ".join([said, *found.reasons]))
        again = refitted(step.numbers.get("refits", ()))
        if again is not None:
            lines.append(f"step {position}, {again}")
    return lines


def groups(record: RunRecord) -> list[tuple[str, list[dict[str, Any]]]]:
    """Per pruning step: its title, and {name, before, after} of every channel group."""
    return [
        (_title(position, step), list(step.numbers.get("groups", ())))
        for position, step in enumerate(record.steps, start=1)
        if step.verb == "prune"
    ]


def sensitivities(record: RunRecord) -> list[tuple[str, list[dict[str, Any]]]]:
    """Per pruning step that measured them: its title, and the points of the sensitivity map."""
    return [
        (_title(position, step), list(step.numbers["sensitivity"]["points"]))
        for position, step in enumerate(record.steps, start=1)
        if step.numbers.get("sensitivity")
    ]


def timings(record: RunRecord) -> list[str]:
    """Per pruning step with a latency budget: what was asked, measured and estimated."""
    return [
        f"{_title(position, step)}: {step.numbers['latency']['summary']}"
        for position, step in enumerate(record.steps, start=1)
        if step.numbers.get("latency")
    ]


def histories(record: RunRecord) -> list[tuple[str, list[dict[str, Any]]]]:
    """Per training step: its title, and the numbers of every epoch."""
    return [
        (_title(position, step), list(step.numbers["history"]))
        for position, step in enumerate(record.steps, start=1)
        if step.numbers.get("history")
    ]


def rounds(record: RunRecord) -> list[tuple[str, list[dict[str, Any]]]]:
    """Per iterate step: its title, and {number, accuracy, macs, params, accepted} of each round."""
    return [
        (_title(position, step), list(step.numbers["rounds"]))
        for position, step in enumerate(record.steps, start=1)
        if step.numbers.get("rounds")
    ]


ROUND_COLUMNS = ("round", "validation", "MACs", "params", "")


def round_rows(found: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Rounds as rows of a table: number, accuracy, MACs, parameters, whether it was kept."""
    return [
        [
            str(each["number"]),
            percent(each["accuracy"], 2),
            count(each["macs"]),
            count(each["params"]),
            "kept" if each["accepted"] else "taken back",
        ]
        for each in found
    ]


def _title(position: int, step: StepRecord) -> str:
    return f"step {position}: {step.verb}"


def proofs(record: RunRecord) -> list[str]:
    """Per pruning step: how far the pruned network is from its masked original."""
    found = []
    for position, step in enumerate(record.steps, start=1):
        proof = step.numbers.get("proof")
        if not proof:
            continue
        differences = proof.get("max_relative_difference")
        if isinstance(differences, list):  # one per output of the network
            differences = max(differences, default=None)
        found.append(
            f"Step {position}: what was removed was also set to zero in the unpruned network; the "
            f"outputs of the two differ by at most {_number(differences)} of the largest output. "
            + ("Passed." if proof.get("passed", True) else "Not passed.")
        )
    return found


def notes(record: RunRecord) -> list[str]:
    """What pruning could not touch and why, each once."""
    return list(
        dict.fromkeys(str(note) for step in record.steps for note in step.numbers.get("notes", ()))
    )


def _number(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, int | float) else NONE


def methods(record: RunRecord) -> list[str]:
    """How each number in the report was obtained."""
    said = [
        "MACs and parameters are those of one image through the torch network; batch norm and "
        "other elementwise work is not counted as MACs. File is the size of the exported file.",
        "Validation accuracy is of the torch network after the step, on images held out of "
        "training. Accuracy is of the exported file, run by its runtime.",
    ]
    # A set keeps the wording once where several files were measured alike.
    said += list(dict.fromkeys(_method(measurement) for measurement in record.measurements))
    if any(m.parity for m in record.measurements):
        said.append(
            "Agreement is the share of images on which the exported file and the float32 torch "
            "network it came from have the same highest output."
        )
    if any(m.peak_memory_bytes is not None for m in record.measurements):
        said.append("Memory is the peak of a process that loads and runs that one file only.")
    return said


def _method(measurement: Measurement) -> str:
    """How one file was measured."""
    parts = [f"{measurement.artifact.runtime} on {measurement.device.device}:"]
    if measurement.accuracy:
        parts.append(
            f"accuracy over {measurement.accuracy.images} images of the "
            f"{measurement.accuracy.split} split;"
        )
    if measurement.latency:
        parts.append(
            f"latency of one image, {measurement.threads} "
            f"thread{'s' if measurement.threads > 1 else ''}, wall time after "
            f"{measurement.latency.warmup_runs} warm-up runs, original and compressed files "
            f"interleaved in one process (sample counts in the latency table)"
        )
    else:
        parts.append("latency not measured")
    return " ".join(parts) + "."


def latencies(record: RunRecord) -> list[list[str]]:
    """Per measured file: name, samples, p50, p90, p99, least and greatest, in ms."""
    found = []
    for measurement in ordered(record.measurements):
        latency = measurement.latency
        if latency is None:
            continue
        numbers = [
            latency.p50_ms,
            latency.p90_ms,
            latency.p99_ms,
            min(latency.samples_ms),
            max(latency.samples_ms),
        ]
        found.append(
            [
                name(measurement),
                str(len(latency.samples_ms)),
                *(f"{value:.3f}" for value in numbers),
            ]
        )
    return found


def parities(record: RunRecord) -> list[list[str]]:
    """Per measured file: name, images, top-1 agreement, greatest and mean output difference."""
    return [
        [
            name(measurement),
            str(parity.images),
            percent(parity.top1_agreement, 2),
            _number(parity.max_difference),
            _number(parity.mean_difference),
        ]
        for measurement in ordered(record.measurements)
        if (parity := measurement.parity)
    ]


def files(record: RunRecord) -> list[list[str]]:
    """Per exported file: path, size, quantizer, sha256."""
    return [
        [
            measurement.artifact.path,
            size(measurement.artifact.size_bytes),
            measurement.artifact.quantizer or NONE,
            measurement.artifact.sha256,
        ]
        for measurement in ordered(record.measurements)
    ]


def name(measurement: Measurement) -> str:
    """A measured file, for a table or a chart."""
    artifact = measurement.artifact
    return f"{measurement.label} {artifact.precision}, {artifact.runtime}"


def warnings(record: RunRecord) -> list[str]:
    """What the measurements warn about, each once."""
    return list(
        dict.fromkeys(
            f"{name(measurement)}: {warning}"
            for measurement in ordered(record.measurements)
            for warning in measurement.warnings
        )
    )


def facts(record: RunRecord) -> list[list[str]]:
    """Machine, versions, seed and times as key and value."""
    found = [
        ["started", record.started],
        ["finished", record.finished or "not yet"],
        ["time in steps", duration(sum(step.seconds for step in record.steps))],
        ["seed", str(record.recipe.get("seed", 0))],
    ]
    found += [[key, _value(value)] for key, value in record.machine.items() if value is not None]
    for device in dict.fromkeys(m.device.model_dump_json() for m in record.measurements):
        measured_on = next(
            m.device for m in record.measurements if m.device.model_dump_json() == device
        )
        shown = {k: v for k, v in measured_on.model_dump().items() if v is not None}
        found.append(
            [f"measured on {shown.pop('device')}", ", ".join(f"{k} {v}" for k, v in shown.items())]
        )
    found += [[package, version] for package, version in record.versions.items()]
    return found


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def headline(record: RunRecord) -> str:
    """The result in one sentence, of the compressed file with the smallest latency."""
    if record.finished is None:
        return "This run has not finished; what follows is as far as it got."
    best = min(
        (m for m in record.measurements if m.label != "original"),
        key=lambda m: m.latency.p50_ms if m.latency else float("inf"),
        default=None,
    )
    if best is None or record.original is None or record.compressed is None:
        return "The run has finished."
    text = (
        f"{record.compressed.macs / record.original.macs:.0%} of the MACs and "
        f"{record.compressed.params / record.original.params:.0%} of the parameters remain"
    )
    before = next(
        (m for m in ordered(record.measurements) if m.label == "original" and m.accuracy), None
    )
    if before and before.accuracy and best.accuracy:
        text += (
            f"; accuracy {percent(before.accuracy.top1, 2)} before, "
            f"{percent(best.accuracy.top1, 2)} after ({best.artifact.precision}, "
            f"{best.artifact.runtime})"
        )
    return text + "."
