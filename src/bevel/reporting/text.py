"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import yaml

import bevel.reporting.diagnosis as doctor
import bevel.reporting.sections as sections
from bevel.core.records import RunRecord
from bevel.reporting.summary import COLUMNS, table


def markdown(record: RunRecord) -> str:
    """The whole report as GitHub-flavoured Markdown."""
    blocks = [
        f"# bevel: {_escape(str(record.recipe.get('name', 'run')))}",
        sections.headline(record),
        markdown_table(COLUMNS, table(record)),
    ]
    if record.shipments:
        blocks += ["## Ship", markdown_table(doctor.SHIPMENTS, doctor.shipments(record))]
    warnings = sections.warnings(record)
    if warnings:
        blocks += ["## Warnings", bullets(warnings)]
    blocks += [
        "## Steps",
        markdown_table(("step", "validation", "MACs", "params", "time"), sections.steps(record)),
    ]
    for title, history in sections.histories(record):
        columns = list(dict.fromkeys(key for epoch in history for key in epoch))
        blocks += [
            f"### Training, {title}",
            markdown_table(columns, [[_number(e.get(key)) for key in columns] for e in history]),
        ]
    for title, widths in sections.groups(record):
        blocks += [
            f"### Channels, {title}",
            markdown_table(
                ("channel group", "before", "after"),
                [[str(g.get(key, "")) for key in ("name", "before", "after")] for g in widths],
            ),
        ]
    for title, found in sections.rounds(record):
        blocks += [
            f"### Rounds, {title}",
            markdown_table(sections.ROUND_COLUMNS, sections.round_rows(found)),
        ]
    proofs = sections.proofs(record)
    if proofs:
        blocks += ["## Proof", bullets(proofs)]
    timings = sections.timings(record)
    if timings:
        blocks += ["## Latency budgets", bullets(timings)]
    surgeries = sections.surgeries(record)
    if surgeries:
        blocks += ["## Surgery and fitted layers", bullets(surgeries)]
    notes = sections.notes(record)
    if notes:
        blocks += ["## Channels that stay", bullets(notes)]
    fallbacks = sections.fallbacks(record)
    if fallbacks:
        blocks += ["## Layers that stay in float", bullets(fallbacks)]
    blocks += _measured(record)
    blocks += _diagnosed(record)
    blocks += ["## Machine and versions", markdown_table(("", ""), sections.facts(record))]
    recipe = yaml.safe_dump(record.recipe, sort_keys=False, allow_unicode=True)
    blocks += ["## Recipe", f"```yaml\n{recipe}```"]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _measured(record: RunRecord) -> list[str]:
    """Latency, parity, files, and how the numbers were obtained."""
    latency = ("file", "samples", "p50 ms", "p90 ms", "p99 ms", "min ms", "max ms")
    parity = ("file", "images", "same top-1", "max difference", "mean difference")
    return [
        "## Latency",
        markdown_table(latency, sections.latencies(record)),
        "## Parity of outputs with torch",
        markdown_table(parity, sections.parities(record)),
        "## Files",
        markdown_table(("path", "size", "quantizer", "sha256"), sections.files(record)),
        "## How it was measured",
        bullets(sections.methods(record)),
    ]


def _diagnosed(record: RunRecord) -> list[str]:
    """Per diagnosed file: the answer, the reasons and the operators."""
    blocks = ["## Doctor"] if record.diagnoses else []
    for diagnosis in record.diagnoses:
        blocks += [
            f"### {_escape(doctor.title(diagnosis))}",
            _escape(f"{diagnosis.verdict}."),
            bullets(doctor.findings(diagnosis)),
            markdown_table(("", ""), doctor.facts(diagnosis)),
            markdown_table(doctor.KINDS, doctor.kinds(diagnosis)),
        ]
    return blocks


def markdown_table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the words "none" where there are no rows."""
    if not body:
        return "none"
    lines = [columns, ["---"] * len(columns), *body]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {_escape(line)}" for line in lines)


def _escape(text: str) -> str:
    """Text that stays in its table cell and is not taken for HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
