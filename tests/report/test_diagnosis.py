"""The doctor's section of both reports, and which file to ship."""

import pytest

from bevel.core.records import Diagnosis, Finding, Operator, RunRecord, Shipment
from bevel.reporting import diagnosis as rows
from bevel.reporting import html, markdown


@pytest.fixture
def diagnosis(record: RunRecord) -> Diagnosis:
    int8 = next(m for m in record.measurements if m.artifact.precision == "int8")
    operators = [
        Operator(name="conv<1>", kind="QLinearConv", precision="int8", macs=900, latency_ms=0.3),
        Operator(name="swish", kind="HardSwish", precision="float32", latency_ms=0.1),
        Operator(name="fc", kind="QGemm", precision="int8", macs=100, delegated=False),
    ]
    return Diagnosis(
        label="compressed",
        artifact=int8.artifact,
        threads=1,
        verdict="25 % of the time is in <swish>",
        findings=[Finding(message="first | reason", share=0.25), Finding(message="second")],
        operators=operators,
        profiled_ms=0.4,
        int8_macs=1.0,
        channel_step=16,
        parity=int8.parity,
    )


def test_operators_by_kind_dearest_first(diagnosis: Diagnosis) -> None:
    assert rows.kinds(diagnosis) == [
        ["QLinearConv", "int8", "1", "900", "0.300", "75.0 %"],
        ["HardSwish", "float32", "1", "-", "0.100", "25.0 %"],
        ["QGemm", "int8", "1", "100", "-", "-"],
    ]
    assert [row[0] for row in rows.slowest(diagnosis)] == ["conv<1>", "swish", "fc"]
    assert rows.slowest(diagnosis.model_copy(update={"profiled_ms": None})) == []


def test_facts(diagnosis: Diagnosis) -> None:
    found = dict(rows.facts(diagnosis))
    assert found["MACs in int8"] == "100.0 %"
    assert found["left to the slow path"] == "1"
    assert found["profiled, 1 thread"] == "0.400 ms"
    assert found["agreement on 360 images"].startswith("99.72 % same top-1, largest difference 1e-")
    bare = diagnosis.model_copy(update={"operators": [], "parity": None, "profiled_ms": None})
    assert rows.facts(bare) == [["widths the runtime likes", "multiples of 16"]]


def test_both_reports_hold_it(record: RunRecord, diagnosis: Diagnosis) -> None:
    shipment = Shipment(
        target="onnxruntime@local, threads 1",
        path="artifacts/x.onnx",
        precision="int8",
        reason="2.50x faster than float32 & more",
    )
    full = record.model_copy(update={"diagnoses": [diagnosis], "shipments": [shipment]})
    text, page = markdown(full), html(full)
    assert text.index("## Ship") < text.index("## Steps") < text.index("## Doctor")
    assert "| artifacts/x.onnx | int8 | 2.50x faster than float32 & more |" in text
    assert "- first \\| reason\n- second" in text
    assert "25 % of the time is in &lt;swish>." in text
    assert "2.50x faster than float32 &amp; more" in page
    assert "<li>first | reason</li>" in page
    assert "&lt;swish&gt;" in page
    assert "<swish>" not in page
    for without in (markdown(record), html(record)):
        assert "Doctor" not in without
        assert "Ship<" not in without
