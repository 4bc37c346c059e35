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
    blocks += [
        *_listed("Warnings", sections.warnings(record)),
        "## Steps",
        markdown_table(("step", "validation", "MACs", "params", "time"), sections.steps(record)),
        *_tables_of_steps(record),
        *_listed("Proof", sections.proofs(record)),
        *_listed("Latency budgets", sections.timings(record)),
        *_listed("Surgery and fitted layers", sections.surgeries(record)),
        *_listed("Channels that stay", sections.notes(record)),
        *_listed("Layers that stay in float", sections.fallbacks(record)),
        *_measured(record),
        *_diagnosed(record),
        "## Machine and versions",
        markdown_table(("", ""), sections.facts(record)),
    ]
    recipe = yaml.safe_dump(record.recipe, sort_keys=False, allow_unicode=True)
    blocks += ["## Recipe", f"```yaml\n{recipe}```"]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    """A section of bullets, if there is something to say."""
    return [f"## {title}", bullets(lines)] if lines else []


def _tables_of_steps(record: RunRecord) -> list[str]:
    """What happened within the steps: epochs, widths and rounds."""
    blocks = []
    for title, history in sections.histories(record):
        columns = list(dict.fromkeys(key for epoch in history for key in epoch))
        blocks += [
            f"### Training, {title}",
            markdown_table(columns, [[_number(e.get(key)) for key in columns] for e in history]),
        ]
    for title, widths in sections.groups(record):
        keys = ("name", "before", "after")
        blocks += [
            f"### Channels, {title}",
            markdown_table(
                ("channel group", "before", "after"),
                [[str(group.get(key, "")) for key in keys] for group in widths],
            ),
        ]
    for title, found in sections.rounds(record):
        blocks += [
            f"### Rounds, {title}",
            markdown_table(sections.ROUND_COLUMNS, sections.round_rows(found)),
        ]
    return blocks


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
