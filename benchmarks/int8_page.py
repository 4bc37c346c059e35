"""docs/int8.md from the results of int8.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bevel.core.errors import one_line
from bevel.reporting.summary import NONE, count, milliseconds, percent, size
from bevel.reporting.text import bullets, markdown_table

Entry = dict[str, Any]

WANTED = 1.5
"""How many times faster than float32 int8 should be."""

ALLOWED = 1.05
"""How much longer than the native quantizer's file bevel's may take."""

WORSE = 0.02
"""How much less the native quantizer's file may agree with float and still be shipped."""

COLUMNS = (
    "network",
    "runtime",
    "float32, ms",
    "int8, ms",
    "faster",
    "native int8, ms",
    "int8 / native time",
    "size, float32 / int8 / native",
    "agreement, int8 / native",
    "accuracy, float32 / int8 / native",
    "MACs in int8",
    "ship",
)

KEPT_COLUMNS = (
    "network",
    "runtime",
    "agreement in int8",
    "with layers in float",
    "accuracy, float32 / with layers in float",
    "modules in float",
    "faster than float32",
)


@dataclass(frozen=True)
class Case:
    """One network, dense or pruned, on one runtime; files are None where the export failed."""

    entry: Entry
    variant: str
    runtime: str
    float32: Entry | None
    int8: Entry | None
    native: Entry | None
    kept: Entry | None

    @property
    def name(self) -> str:
        """The network, with what was done to it."""
        return f"{self.entry['name']}{', pruned' if self.variant == 'pruned' else ''}"

    @property
    def faster(self) -> float | None:
        """Times that int8 is faster than float32."""
        return _ratio(self.float32, self.int8)

    @property
    def against_native(self) -> float | None:
        """Time of bevel's int8 file divided by the native quantizer's."""
        return _ratio(self.int8, self.native)

    @property
    def ship(self) -> str:
        """The fastest of the files; the native one only where it answers as bevel's does."""
        timed = {"float32": self.float32, "int8": self.int8}
        if self.native and (not self.int8 or _agrees(self.native, self.int8)):
            timed["native int8"] = self.native
        found = {name: file["p50_ms"] for name, file in timed.items() if file}
        return min(found, key=lambda name: found[name]) if found else NONE


def _agrees(native: Entry, own: Entry) -> bool:
    return bool((native["agreement"] or 0) >= (own["agreement"] or 0) - WORSE)


def _ratio(above: Entry | None, below: Entry | None) -> float | None:
    return above["p50_ms"] / below["p50_ms"] if above and below else None


def cases(results: Entry) -> list[Case]:
    """All networks and runtimes, in order."""
    found = []
    for entry in results["networks"]:
        files = {(f["variant"], f["runtime"], f["kind"]): f for f in entry.get("files", ())}
        everything = [*entry.get("files", ()), *entry.get("failed", ())]
        for variant, runtime in dict.fromkeys((f["variant"], f["runtime"]) for f in everything):
            kinds = {
                k: files.get((variant, runtime, k)) for k in ("float32", "int8", "native", "kept")
            }
            found.append(Case(entry, variant, runtime, **kinds))
    return found


def page(results: Entry) -> str:
    """The whole page."""
    found = cases(results)
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    blocks = [
        "# int8 on every runtime",
        "<!-- written by benchmarks/int8.py; do not edit -->",
        f"`{results['command']}`, {results['finished'][:10]}, {machine['processor']}, "
        f"{machine['cores']} cores, {results['threads']} thread, {machine['system']}. {versions}.",
        *_busy(results),
        "## Summary",
        bullets(_summary(found)),
        "## Every network and runtime",
        markdown_table(COLUMNS, [_row(case) for case in found]),
        f"## Where int8 is less than {WANTED:g} times as fast as float32",
        bullets(_slow(found)) or "Nowhere.",
        "## Where the native quantizer's file is more than 5 % faster",
        bullets(_behind(found)) or "Nowhere.",
        "## With layers in float for the sake of the answers",
        markdown_table(KEPT_COLUMNS, [_kept(case) for case in found if case.kept]),
        "## What could not be exported or run",
        bullets(_failed(results)) or "Nothing.",
        "## The networks",
        markdown_table(
            ("network", "weights", "images", "MACs", "MACs pruned", "widths"),
            [_network(entry) for entry in results["networks"] if "files" in entry],
        ),
        "## How it was measured",
        bullets([*_methods(results), *_again(results)]),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _busy(results: Entry) -> Iterator[str]:
    """A line where the machine had other work to do."""
    files = [file for entry in results["networks"] for file in entry.get("files", ())]
    warned = [file for file in files if file["warnings"]]
    if warned:
        kinds = sorted({warning.partition(":")[0] for f in warned for warning in f["warnings"]})
        yield (
            f"**Not final: {len(warned)} of {len(files)} files were timed on a busy machine** "
            f"({one_line('; '.join(kinds), 240)}). Ratios of files that were timed in turn are "
            "worth more than the times themselves."
        )


def _again(results: Entry) -> Iterator[str]:
    """Which rows are of another run than the others."""
    for entry in results["networks"]:
        for runtime, when in entry.get("again", {}).items():
            yield f"{entry['name']} on {runtime}: measured again on {when[:16]}."


def _summary(found: Sequence[Case]) -> Iterator[str]:
    compared = [case for case in found if case.faster is not None]
    fast = [case for case in compared if (case.faster or 0) >= WANTED]
    slower = [case for case in compared if (case.faster or 0) < 1]
    yield f"int8 at least {WANTED:g} times as fast as float32: {len(fast)} of {len(compared)}."
    yield f"int8 slower than float32, so that the float file is shipped: {len(slower)}."
    native = [case.against_native for case in found if case.against_native is not None]
    behind = [ratio for ratio in native if ratio > ALLOWED]
    yield (
        f"bevel's int8 file within 5 % of the native quantizer's, or faster: "
        f"{len(native) - len(behind)} of {len(native)}."
    )


def _row(case: Case) -> list[str]:
    three = (case.float32, case.int8, case.native)
    return [
        case.name,
        case.runtime,
        _ms(case.float32),
        _ms(case.int8),
        _times(case.faster),
        _ms(case.native),
        NONE if case.against_native is None else f"{case.against_native:.2f}",
        " / ".join(size(file["size_bytes"] if file else None) for file in three),
        " / ".join(percent(file["agreement"] if file else None) for file in three[1:]),
        " / ".join(percent(file["accuracy"] if file else None, 2) for file in three)
        if case.entry["labelled"]
        else NONE,
        percent(case.int8["int8_macs"] if case.int8 else None, 0),
        case.ship,
    ]


def _kept(case: Case) -> list[str]:
    file = case.kept
    assert file is not None  # noqa: S101 - only such cases are asked for
    three = (case.float32, file)
    return [
        case.name,
        case.runtime,
        percent(case.int8["agreement"] if case.int8 else None),
        percent(file["agreement"]),
        " / ".join(percent(f["accuracy"] if f else None, 2) for f in three),
        str(len(case.entry["kept"][case.runtime]["keep_float"])),
        _times(_ratio(case.float32, file)),
    ]


def _slow(found: Iterable[Case]) -> list[str]:
    """The doctor's reason, and what to ship instead."""
    return [
        f"{case.name} on {case.runtime}: {_times(case.faster)}, ship {case.ship}. "
        f"{case.int8['verdict']}."
        for case in found
        if case.faster is not None and case.faster < WANTED and case.int8 is not None
    ]


def _behind(found: Iterable[Case]) -> list[str]:
    lines = []
    for case in found:
        if case.against_native is None or case.against_native <= ALLOWED:
            continue
        line = (
            f"{case.name} on {case.runtime}: bevel's takes {case.against_native:.2f} times as long"
        )
        if case.native and case.int8 and not _agrees(case.native, case.int8):
            native, own = (percent(f["agreement"]) for f in (case.native, case.int8))
            line += (
                f"; the native one agrees with float on {native} of the images, bevel's on {own}"
            )
        lines.append(f"{line}.")
    return lines


def _failed(results: Entry) -> list[str]:
    lines = [f"{e['name']}: {e['crash']}" for e in results["networks"] if "crash" in e]
    lines += [
        f"{entry['name']}, {failed['variant']}, {failed['runtime']} {failed['kind']}: "
        f"{failed['reason']}"
        for entry in results["networks"]
        for failed in entry.get("failed", ())
    ]
    return lines


def _network(entry: Entry) -> list[str]:
    return [
        entry["name"],
        "trained" if entry["trained"] else "random",
        entry["images"],
        count(entry["macs"]["dense"]),
        f"{count(entry['macs']['pruned'])} "
        f"({entry['macs']['pruned'] / entry['macs']['dense']:.0%})",
        f"multiples of {entry['align']}",
    ]


def _methods(results: Entry) -> list[str]:
    runs = [file["runs"] for entry in results["networks"] for file in entry.get("files", ())]
    return [
        "Times are medians of single runs on one image, after warm-up. All files of a network, "
        "dense and pruned, of every runtime, are run in turn in one process "
        f"({min(runs, default=0)} to {max(runs, default=0)} runs each).",
        "Since 2026-11-22T01:20 they take another order each round. Before, float32, int8 and "
        "native always ran in this order, and who runs after the float file finds its caches "
        "filled by that.",
        "float32 is pinned: no runtime may use bfloat16 for it.",
        "Pruned: 50 % of the MACs, l2, global; batch norms recalibrated, no fine-tuning, so its "
        "accuracy says what int8 does to a pruned network and not what pruning can reach.",
        "With layers in float: `accuracy_drop` with the float network's answers on the calibration "
        "images as labels; the images of the table are others.",
        "Native: the runtime's own quantizer behind bevel's interface, same calibration images.",
        "Agreement: share of test images on which the file and the float torch network have the "
        "same highest output. With random weights or images it says little: outputs hardly differ.",
        "MACs in int8 and the reasons are those of bevel doctor, from the runtime's own profiler.",
        "Ship: the fastest of the three files, the native one only where it agrees with float as "
        "bevel's does, within 2 points. A run also asks for the accuracy.",
        f"Load average {results['load_at_start']} before the start; seconds per network: "
        + ", ".join(f"{e['name']} {e.get('seconds', 0)}" for e in results["networks"])
        + ".",
    ]


def _ms(file: Entry | None) -> str:
    return milliseconds(file["p50_ms"]) if file else NONE


def _times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}x"
