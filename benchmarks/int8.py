"""int8 against float32 on every installed runtime: time, size, agreement, accuracy.

    python benchmarks/int8.py --out benchmarks/results/int8.json --docs docs/int8.md
    python benchmarks/int8.py --out benchmarks/results/int8.json --resume    # goes on where it was
    python benchmarks/int8.py --out benchmarks/results/int8.json --again --runtimes openvino
    python benchmarks/int8.py --table benchmarks/results/int8.json > docs/int8.md

Each network, as it is and pruned to 50 % of its MACs (batch norms recalibrated, no fine-tuning),
is exported for every runtime as float32, as int8 by bevel and as int8 by the runtime's own
quantizer; some networks also with the layers in float that keep their answers. All files of a
network are timed in turn in one process: one thread, one image.
`--shared FOLDER` holds checkpoints and images (see int8_networks.py), `--data FOLDER` any images;
without them weights and images are random. `--only REGEX` picks networks, `--runtimes REGEX`
runtimes; with `--again` they are measured once more and the other files stay. Results are written
after each network and hold no path of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from int8_networks import NETWORKS, Images, Network, build, find, load
from int8_page import page

from bevel.core import plugins
from bevel.core.errors import BevelError, MissingDependencyError, PruningError, one_line
from bevel.core.files import write_json, write_text

if TYPE_CHECKING:  # the process that starts the others needs no torch
    from torch import nn

    from bevel.core.recipe import Quantization
    from bevel.core.records import Artifact, Diagnosis, Measurement
    from bevel.measurement.bench import Subject

BUDGET = 0.5
THREADS = 1
LIMIT_S = 3600
"""Seconds for one network."""

LEFT_OUT = ("eager", "tensorrt")
"""The reference, and a form of ONNX file that runs on a GPU only."""

PACKAGES = (
    "bevel", "torch", "torchvision", "torchao", "timm", "onnxruntime", "openvino", "nncf",
    "ai-edge-litert", "litert-torch", "ai-edge-quantizer", "executorch",
)  # fmt: skip

KINDS: dict[str, tuple[str, Literal["torch", "native"]]] = {
    "float32": ("float32", "torch"),
    "int8": ("int8", "torch"),
    "native": ("int8", "native"),
}
"""The files of each runtime: precision and quantizer."""

KEPT = "kept"
"""int8 by bevel with layers in float, of networks that name what they may lose."""

Entry = dict[str, Any]


# --- in the process of one network ---------------------------------------------------------------


def work(given: argparse.Namespace) -> None:
    """Everything about one network, into --out."""
    network = find(given.network)
    given.work.mkdir(parents=True, exist_ok=True)
    images = load(network, given.shared, given.data, given.work)
    dense, trained = build(network, given.shared, images)
    entry: Entry = {
        "name": network.name,
        "trained": trained,
        "labelled": images.labelled and trained,
        "images": images.said,
        "test_images": sum(len(batch) for batch, _ in images.test),
        "failed": [],
        "files": [],
    }
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        subjects: list[Subject] = []
        for variant, net in _variants(dense, images, entry):
            exporter = Exporter(
                variant, net, images, Path(folder), _runtimes(given.runtimes), entry
            )
            subjects += exporter.all_kinds()
            if variant == "dense" and network.drop is not None:
                subjects += exporter.kept(network.drop)
        _measure(subjects, images, entry)
    write_json(given.out, entry)


def _variants(dense: nn.Module, images: Images, entry: Entry) -> Iterator[tuple[str, nn.Module]]:
    """The network as it is, and pruned."""
    from bevel import plan_pruning, prune
    from bevel.models.batchnorm import recalibrate
    from bevel.runtimes import channel_step

    example = images.calibration[0][:2]
    step = channel_step((runtime, "int8") for runtime in _runtimes("."))
    plan = None
    while plan is None:  # narrow networks cannot be halved in steps of 16
        try:
            plan = plan_pruning(dense, example, budget={"macs": BUDGET}, align=step)
        except PruningError:
            if step == 1:
                raise
            step //= 2
    pruned = prune(dense, plan)
    recalibrate(pruned, images.calibration)
    entry["align"] = step
    entry["macs"] = {"dense": plan.before.macs, "pruned": plan.after.macs}
    entry["params"] = {"dense": plan.before.params, "pruned": plan.after.params}
    yield "dense", dense
    yield "pruned", pruned.eval()


def _runtimes(chosen: str) -> list[str]:
    """Installed runtimes that have float32 and int8 and run here."""
    found = []
    for name in plugins.discover("runtimes"):
        if name in LEFT_OUT or not re.search(chosen, name):
            continue
        try:
            runtime = plugins.load("runtimes", name)
        except MissingDependencyError:
            continue
        if {"float32", "int8"} <= set(runtime.PRECISIONS):
            found.append(name)
    return found


@dataclass(frozen=True)
class Exporter:
    """Exports one network for every runtime; what fails is written down in `entry`."""

    variant: str
    net: nn.Module
    images: Images
    folder: Path
    runtimes: list[str]
    entry: Entry

    def all_kinds(self) -> list[Subject]:
        """The files of `KINDS`."""
        from bevel.core.recipe import Quantization

        subjects = []
        for runtime in self.runtimes:
            for kind, (precision, quantizer) in KINDS.items():
                options = Quantization(quantizer=quantizer)
                subjects += self._file(runtime, kind, precision, options)
        return subjects

    def kept(self, drop: float) -> list[Subject]:
        """int8 files with as many layers in float as it takes to give float's answers."""
        import torch

        from bevel.core.recipe import Quantization
        from bevel.pipeline.int8 import fall_back

        calibration = self.images.calibration
        with torch.no_grad():
            answers = [(batch, self.net(batch).argmax(1)) for batch in calibration]
        subjects = []
        self.entry["kept"] = {}
        for runtime in self.runtimes:
            options, self.entry["kept"][runtime] = fall_back(
                self.net,
                calibration[0][:2],
                runtime,
                Quantization(accuracy_drop=drop),
                calibration=calibration,
                validation=answers,
            )
            subjects += self._file(runtime, KEPT, "int8", options)
        return subjects

    def _file(
        self, runtime: str, kind: str, precision: str, options: Quantization
    ) -> list[Subject]:
        from bevel import export
        from bevel.measurement.bench import Subject

        start = time.perf_counter()
        suffix = plugins.load("runtimes", runtime).SUFFIX
        try:
            artifact = export(
                self.net,
                self.images.calibration[0][:2],
                runtime=runtime,
                precision=precision,
                calibration=self.images.calibration,
                quantization=options,
                path=self.folder / f"{self.variant}-{kind}-{runtime}{suffix}",
            )
        except BevelError as error:
            reason = one_line(error, 300).replace(str(self.folder), "FOLDER")
            self.entry["failed"].append(
                {"variant": self.variant, "runtime": runtime, "kind": kind, "reason": reason}
            )
            return []
        _say(f"{self.variant} {runtime} {kind}: {time.perf_counter() - start:.0f} s")
        return [Subject(self.variant, artifact, self.net)]


def _measure(subjects: Sequence[Subject], images: Images, entry: Entry) -> None:
    """Time all files in turn, run them over the images, and ask the doctor."""
    from bevel.measurement.bench import measure_all
    from bevel.measurement.doctor import diagnose_all

    measurements = measure_all(subjects, threads=THREADS, batches=images.test)
    _say("measured")
    diagnoses = diagnose_all(measurements, images.test[0][0][:1])
    entry["device"] = measurements[0].device.model_dump(mode="json", exclude={"runtime_version"})
    for measurement, diagnosis in zip(measurements, diagnoses, strict=True):
        entry["files"].append(_numbers(measurement, diagnosis, labelled=entry["labelled"]))


def _numbers(measurement: Measurement, diagnosis: Diagnosis, *, labelled: bool) -> Entry:
    """What is kept of one file."""
    latency, parity, accuracy = measurement.latency, measurement.parity, measurement.accuracy
    assert latency is not None  # noqa: S101 - this machine times what it runs
    return {
        "variant": measurement.label,
        "runtime": measurement.artifact.runtime,
        "kind": _kind(measurement.artifact),
        "quantizer": measurement.artifact.quantizer,
        "p50_ms": latency.p50_ms,
        "p90_ms": latency.p90_ms,
        "runs": len(latency.samples_ms),
        "size_bytes": measurement.artifact.size_bytes,
        "peak_memory_bytes": measurement.peak_memory_bytes,
        "agreement": parity.top1_agreement if parity else None,
        "mean_difference": parity.mean_difference if parity else None,
        "accuracy": accuracy.top1 if labelled and accuracy else None,
        "int8_macs": diagnosis.int8_macs,
        "verdict": diagnosis.verdict,
        "findings": [finding.model_dump() for finding in diagnosis.findings[:5]],
        "warnings": [w for w in measurement.warnings if not w.startswith("int8 is slower")],
    }


def _kind(artifact: Artifact) -> str:
    """float32, int8, native or kept, from the file's name."""
    return Path(artifact.path).name.split("-")[1]


def _say(text: str) -> None:
    print(f"  {text}", flush=True)  # to stdout: of stderr the last line is kept as the reason


# --- in the process that starts the others -------------------------------------------------------


def run_network(network: Network, given: argparse.Namespace, work_folder: Path) -> Entry:
    """One network in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "entry.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--network", network.name]
        command += ["--out", str(out), "--work", str(work_folder), "--runtimes", given.runtimes]
        for option, value in (("--shared", given.shared), ("--data", given.data)):
            command += [option, str(value)] if value is not None else []
        try:
            done = subprocess.run(
                command, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S, check=False
            )
            reason = one_line(done.stderr.strip().rpartition("\n")[2], 300)
        except subprocess.TimeoutExpired:
            reason = f"not done after {LIMIT_S} s"
        if not out.exists():
            return {"name": network.name, "crash": reason or "the process ended"}
        entry: Entry = json.loads(out.read_text(encoding="utf-8"))
        return entry


def run_all(given: argparse.Namespace, work_folder: Path) -> Entry:
    """Every chosen network; the file is written after each."""
    results = _opened(given)
    for network in NETWORKS:
        done = {entry["name"]: entry for entry in results["networks"]}
        before = done.get(network.name, {})
        if not re.search(given.only, network.name) or ("files" in before and not given.again):
            continue
        start = time.perf_counter()
        entry = run_network(network, given, work_folder)
        entry["seconds"] = round(time.perf_counter() - start)
        done[network.name] = _merged(before, entry) if "files" in before else entry
        results["networks"] = [done[n.name] for n in NETWORKS if n.name in done]
        results["finished"] = _now()
        write_json(given.out, results)
        entry = done[network.name]
        said = entry.get("crash") or f"{len(entry['files'])} files, {len(entry['failed'])} failed"
        print(f"{network.name}: {said}, {entry['seconds']} s", file=sys.stderr, flush=True)
    return results


def _merged(before: Entry, again: Entry) -> Entry:
    """What was measured before, with what was measured again in the place of the same files."""
    if "files" not in again:
        raise SystemExit(f"{again['name']}: {again['crash']}; the results stay as they were")
    anew = sorted({file["runtime"] for file in again["files"] + again["failed"]})
    merged = dict(before)
    for part in ("files", "failed"):
        merged[part] = [f for f in before[part] if f["runtime"] not in anew] + again[part]
    if "kept" in before:
        merged["kept"] = before["kept"] | again.get("kept", {})
    merged["again"] = before.get("again", {}) | dict.fromkeys(anew, _now())
    return merged


def _opened(given: argparse.Namespace) -> Entry:
    """The results to go on with, or fresh ones that say where and how they are made."""
    if (given.resume or given.again) and given.out.exists():
        results: Entry = json.loads(given.out.read_text(encoding="utf-8"))
        if results["versions"] != _versions():
            raise SystemExit(
                f"the results were begun with {results['versions']}: "
                "numbers of one table must be made in the same way"
            )
        return results
    flags = "".join(
        f" --{name} {value}"
        for name, value in (
            ("only", f"'{given.only}'" if given.only != "." else None),
            ("runtimes", f"'{given.runtimes}'" if given.runtimes != "." else None),
            ("shared", "FOLDER" if given.shared else None),
            ("data", "FOLDER" if given.data else None),
        )
        if value
    )
    return {
        "command": f"python benchmarks/int8.py{flags}",
        "started": _now(),
        "finished": _now(),
        "machine": _machine(),
        "versions": _versions(),
        "threads": THREADS,
        "budget": BUDGET,
        "load_at_start": round(os.getloadavg()[0], 2),
        "networks": [],
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> Entry:
    """Processor, cores and system; no name of the machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--docs", type=Path, help="write the page there as well")
    parser.add_argument("--table", type=Path, help="only print the page of these results")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds and go on")
    parser.add_argument(
        "--again", action="store_true", help="measure once more and keep what --out holds besides"
    )
    parser.add_argument("--only", default=".", help="regular expression for networks")
    parser.add_argument("--runtimes", default=".", help="regular expression for runtimes")
    parser.add_argument("--shared", type=Path, help="folder with checkpoints and images")
    parser.add_argument("--data", type=Path, help="folder of images, with or without labels")
    parser.add_argument("--work", type=Path, help="where images are unpacked; default: temporary")
    parser.add_argument("--network", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.table is None and given.out is None:
        parser.error("give --out, or --table")
    return given


def main() -> None:
    """Run what the command line asks for."""
    given = parse()
    if given.table is not None:
        print(page(json.loads(given.table.read_text(encoding="utf-8"))), end="")
        return
    if given.network is not None:
        work(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = run_all(given, given.work or Path(folder))
    if given.docs is not None:
        write_text(given.docs, page(results))


if __name__ == "__main__":
    main()
