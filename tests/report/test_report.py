import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import pytest

from bevel.core.errors import RunFolderError
from bevel.core.records import RunRecord, StepRecord
from bevel.reporting import COLUMNS, html, markdown, measured, report, rows, table
from bevel.reporting.charts import charts
from bevel.reporting.summary import count, duration, milliseconds, percent, size


def test_rows_are_numbers_with_the_original_first(record: RunRecord) -> None:
    found = rows(record)
    assert [(row["label"], row["precision"]) for row in found] == [
        ("original", "float32"),
        ("compressed", "float32"),
        ("compressed", "int8"),
    ]
    int8 = found[2]
    assert int8["macs_ratio"] == 0.5
    assert int8["params_ratio"] == pytest.approx(12 / 27)
    assert int8["size_ratio"] == 0.26
    assert int8["speedup"] == pytest.approx(2.0)
    assert found[1]["speedup"] == pytest.approx(0.8)
    assert int8["latency_p90_ms"] == pytest.approx(0.54)
    json.dumps(found, allow_nan=False)


def test_the_table_says_which_way_round_a_ratio_is(record: RunRecord) -> None:
    original, slower, faster = table(record)
    assert len(original) == len(COLUMNS)
    assert "er" not in original[5]
    assert slower[5].endswith("1.25x slower")
    assert faster[5].endswith("2.00x faster")
    assert faster[0] == "compressed int8"
    assert faster[2] == "5.0 M (50%)"


def test_rows_name_their_place_where_there_are_several(record: RunRecord) -> None:
    other = record.measurements[0].model_copy(update={"threads": 2})
    cells = table(record.model_copy(update={"measurements": [*record.measurements, other]}))
    assert cells[0][0] == "original float32, onnxruntime@local, threads 1"
    two = next(row for row in cells if row[0].endswith("threads 2"))
    assert "faster" not in two[5], "no original was measured with two threads"


def test_what_was_not_measured_is_a_dash(record: RunRecord) -> None:
    bare = [
        m.model_copy(update={"latency": None, "accuracy": None, "parity": None})
        for m in record.measurements
    ]
    changed = record.model_copy(update={"measurements": bare, "original": None})
    assert [row[1] for row in table(changed)] == ["-"] * 3
    assert markdown(changed)
    assert html(changed)


def test_files_measured_side_by_side_are_compared_with_the_first(record: RunRecord) -> None:
    cells = measured(record.measurements)
    assert "er" not in cells[0][3]
    assert cells[1][3].endswith("2.50x slower")
    assert measured([]) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(999), "999"),
        (count(1_000), "1.0 k"),
        (count(125_485_706), "125 M"),
        (count(999_990), "1.0 M"),
        (size(0), "0 B"),
        (size(3_400_000), "3.4 MB"),
        (percent(0.97444, 2), "97.44 %"),
        (milliseconds(0.5), "0.500"),
        (milliseconds(12.345), "12.35"),
        (duration(4.24), "4.2 s"),
        (duration(185), "3 min 05 s"),
        (duration(7800), "2 h 10 min"),
        (duration(59.99), "1 min 00 s"),
    ],
)
def test_numbers_for_people(text: str, expected: str) -> None:
    assert text == expected


def test_markdown_has_every_part_and_survives_odd_names(record: RunRecord) -> None:
    text = markdown(record)
    for heading in (
        "## Warnings",
        "## Steps",
        "### Training, step 1: train",
        "### Channels, step 2: prune",
        "## Proof",
        "## Channels that stay",
        "## Latency",
        "## Parity",
        "## Files",
        "## How it was measured",
        "## Machine and versions",
        "## Recipe",
    ):
        assert heading in text
    assert "# bevel: a &lt;b>\\|run" in text
    assert "compressed int8, onnxruntime: the processor was busy" in text
    assert "accuracy over 360 images of the test split" in text
    for line in text.splitlines():
        if line.startswith("| compressed"):
            assert line.endswith(" |")


class Page(HTMLParser):
    """Collects what a browser would fetch and the ids of the page's elements."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href") and not (value or "").startswith("data:"):
                self.fetched.append(f"{tag} {value}")
            if name == "id":
                self.ids.add(value or "")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.text += data


def test_the_page_fetches_nothing_and_escapes_names(record: RunRecord) -> None:
    source = html(record)
    page = Page()
    page.feed(source)
    assert page.fetched == []
    assert {"latency", "training-0", "widths-0"} <= page.ids
    assert "a <b>|run" in page.text
    assert "2.00x faster" in page.text
    assert "the processor was busy" in page.text
    assert "@import" not in source.split("<script>")[0]


def test_a_name_cannot_end_the_script(record: RunRecord) -> None:
    groups = [{"name": "</script><script>alert(1)", "before": 2, "after": 1}]
    numbers = record.steps[1].numbers | {"groups": groups}
    step = record.steps[1].model_copy(update={"numbers": numbers})
    source = html(record.model_copy(update={"steps": [step]}))
    assert "<script>alert" not in source
    figures = re.search(r"^const figures = (.*);$", source, re.MULTILINE)
    assert figures is not None
    data = json.loads(figures[1])
    assert data["widths-0"]["data"][0]["x"] == ["</script><script>alert(1)"]


def test_plotly_accepts_every_chart(record: RunRecord) -> None:
    found = charts(record)
    assert set(found) == {"latency", "training-0", "widths-0"}
    for figure in found.values():
        go.Figure(figure)  # raises on unknown properties
    samples = found["latency"]["data"][0]["x"]
    assert len(samples) == 3


def test_rounds_are_a_table_and_a_chart(record: RunRecord) -> None:
    rounds = [
        {"number": 1, "accuracy": 0.931, "macs": 7_000_000, "params": 700_000, "accepted": True},
        {"number": 2, "accuracy": 0.871, "macs": 4_900_000, "params": 500_000, "accepted": False},
    ]
    step = StepRecord(
        name="02-iterate", verb="iterate", seconds=1, numbers={"rounds": rounds}, files={}
    )
    record = record.model_copy(update={"steps": [*record.steps, step]})
    text = markdown(record)
    assert "| 1 | 93.10 % | 7.0 M | 700 k | kept |" in text
    assert "| 2 | 87.10 % | 4.9 M | 500 k | taken back |" in text
    chart = charts(record)["rounds-0"]
    go.Figure(chart)
    drawn = chart["data"]
    points = [(line["x"], line["y"]) for line in drawn]
    assert points == [([7_000_000], [0.931]), ([4_900_000], [0.871])]
    assert "taken back" in html(record)


def test_a_run_without_numbers_has_a_page_without_charts(record: RunRecord) -> None:
    empty = record.model_copy(update={"steps": [], "measurements": [], "finished": None})
    source = html(empty)
    assert "<script>" not in source
    assert "has not finished" in source
    assert "has not finished" in markdown(empty)


def test_report_rewrites_both_files(record: RunRecord, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(record.model_dump_json(), encoding="utf-8")
    assert report(tmp_path) == record
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == markdown(record)
    assert (tmp_path / "report.html").stat().st_size > 1_000_000


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"steps": 3}'])
def test_what_is_no_record_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunFolderError, match="is not the record of a run") as caught:
        report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.md").exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        report(tmp_path)


def test_reporting_imports_no_torch() -> None:
    code = "import sys, bevel.reporting; assert not {'torch', 'numpy', 'plotly'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
