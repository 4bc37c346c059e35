from typing import Any

import pytest

from bevel.core.records import (
    Accuracy,
    Artifact,
    Cost,
    DeviceFacts,
    Latency,
    Measurement,
    Parity,
    RunRecord,
    StepRecord,
    TensorSignature,
)


def measurement(label: str, precision: str, p50: float, **changes: Any) -> Measurement:
    path = f"artifacts/{label}-onnxruntime-{precision}.onnx"
    fields: dict[str, Any] = {
        "label": label,
        "artifact": Artifact(
            path=path,
            runtime="onnxruntime",
            precision=precision,
            inputs=[TensorSignature(name="x", shape=["batch", 1, 8, 8], dtype="float32")],
            outputs=[TensorSignature(name="y", shape=["batch", 10], dtype="float32")],
            size_bytes=1_000_000 if precision == "float32" else 260_000,
            sha256="ab" * 32,
            quantizer="uint8 activations" if precision == "int8" else None,
        ),
        "threads": 1,
        "device": DeviceFacts(
            device="local",
            system="Linux",
            architecture="x86_64",
            processor="Example 3000",
            cores=2,
            memory_bytes=8_000_000_000,
            governor=None,
            frequency_mhz=None,
            temperature_c=None,
            runtime_version="1.0",
        ),
        "latency": Latency(samples_ms=[p50 * f for f in (0.9, 1.0, 1.1)], warmup_runs=10),
        "peak_memory_bytes": 60_000_000,
        "accuracy": Accuracy(top1=0.975, images=360, split="test"),
        "parity": Parity(
            max_difference=1e-5, mean_difference=1e-6, top1_agreement=0.9972, images=360
        ),
    }
    return Measurement(**(fields | changes))


@pytest.fixture
def record() -> RunRecord:
    history = [
        {"epoch": e, "loss": 1 / e, "lr": 0.1, "seconds": 2.0, "validation_top1": 0.9 + e / 100}
        for e in (1, 2, 3)
    ]
    proof = {"max_relative_difference": 3e-7, "outputs": 1, "passed": True}
    groups = [{"name": "layer1.0.conv1", "before": 16, "after": 8}]
    return RunRecord(
        recipe={"name": "a <b>|run", "seed": 3},
        started="2026-11-20T10:00:00+00:00",
        finished="2026-11-20T10:01:00+00:00",
        versions={"bevel": "0.1.0", "torch": "2.14.1"},
        machine={"system": "Linux", "memory_bytes": 8_000_000_000, "governor": None},
        steps=[
            StepRecord(
                name="01-train",
                verb="train",
                seconds=20,
                numbers={"history": history, "validation_top1": 0.93},
                files={},
            ),
            StepRecord(
                name="02-prune",
                verb="prune",
                seconds=3700,
                numbers={
                    "macs": 5_000_000,
                    "params": 120_000,
                    "macs_before": 10_000_000,
                    "params_before": 270_000,
                    "groups": groups,
                    "proof": proof,
                    "notes": ["linear (10): network output"],
                    "validation_top1": 0.5,
                },
                files={},
            ),
        ],
        original=Cost(macs=10_000_000, params=270_000),
        compressed=Cost(macs=5_000_000, params=120_000),
        measurements=[
            measurement("compressed", "int8", 0.5, warnings=["the processor was busy"]),
            measurement("compressed", "float32", 1.25),
            measurement("original", "float32", 1.0),
        ],
    )
