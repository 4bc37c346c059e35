"""The same files on several devices: do they give the same answers everywhere?

    python benchmarks/devices.py --shared FOLDER --out benchmarks/results/devices.json \
        --device local --device qemu-aarch64 --device ssh:USER@HOST/PATH/TO/PYTHON

One network (see int8_networks.py for names, weights and images) is exported once per runtime and
precision; each file runs over all test images on each device. Prints a table and writes JSON, which
holds no address.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from int8_networks import build, find, load

from bevel import export
from bevel.core.files import write_json
from bevel.measurement.bench import Subject, measure_all
from bevel.reporting.summary import NONE, milliseconds, percent
from bevel.reporting.text import markdown_table
from bevel.runtimes import load_runtime

PRECISIONS = ("float32", "int8")
PACKAGES = ("bevel", "torch", "onnxruntime", "ai-edge-litert")
COLUMNS = ("device", "runtime", "precision", "top-1", "same answer as in torch", "p50, ms")


def main() -> None:
    """Export, run everywhere, say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="MobileNetV3-Small")
    parser.add_argument("--shared", type=Path, required=True, help="checkpoints and images")
    parser.add_argument("--device", action="append", required=True, help="may be repeated")
    parser.add_argument("--runtime", action="append", help="default: onnxruntime and litert")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, network = Path(name), find(given.network)
        images = load(network, given.shared, None, folder)
        net, trained = build(network, given.shared, images)
        subjects = []
        for runtime in given.runtime or ("onnxruntime", "litert"):
            for precision in PRECISIONS:
                path = folder / f"{precision}-{runtime}{load_runtime(runtime).SUFFIX}"
                artifact = export(
                    net,
                    images.calibration[0][:2],
                    runtime=runtime,
                    precision=precision,
                    calibration=images.calibration,
                    path=path,
                )
                subjects.append(Subject(precision, artifact, net))
        for device in given.device:
            start = time.perf_counter()
            for found in measure_all(subjects, device=device, batches=images.test):
                rows.append(_row(device.partition(":")[0], found))
            print(f"{rows[-1]['device']}: {time.perf_counter() - start:.0f} s", flush=True)
    write_json(
        given.out,
        {
            "network": network.name,
            "trained": trained,
            "images": images.said,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {package: metadata.version(package) for package in PACKAGES},
            "files": rows,
        },
    )
    print(markdown_table(COLUMNS, [_cells(row) for row in rows]))


def _row(device: str, found: Any) -> dict[str, Any]:
    """What is kept of one file on one device."""
    return {
        "device": device,
        "processor": found.device.processor,
        "emulated": found.device.emulated,
        "runtime": found.artifact.runtime,
        "runtime_version": found.device.runtime_version,
        "precision": found.label,
        "top1": found.accuracy.top1,
        "images": found.accuracy.images,
        "agreement": found.parity.top1_agreement,
        "max_difference": found.parity.max_difference,
        "p50_ms": found.latency.p50_ms if found.latency else None,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    time_ms = milliseconds(row["p50_ms"]) if row["p50_ms"] else NONE
    return [
        row["device"],
        row["runtime"],
        row["precision"],
        percent(row["top1"], 2),
        percent(row["agreement"]),
        time_ms,
    ]


if __name__ == "__main__":
    main()
