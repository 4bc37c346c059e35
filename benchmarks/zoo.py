"""Prune every torchvision builder and one network of every timm file, and say what came of it.

    python benchmarks/zoo.py --out benchmarks/results/zoo.json --docs docs/zoo.md
    python benchmarks/zoo.py --out benchmarks/results/zoo.json --resume     # goes on where it was
    python benchmarks/zoo.py --table benchmarks/results/zoo.json > docs/zoo.md
    python benchmarks/zoo.py --out benchmarks/results/zoo.json --merge PART.json

Each network is pruned by bevel to 50 % of its MACs in a process of its own, and in another by
Torch-Pruning (`pip install torch-pruning==1.6.1`), which `--no-peer` leaves out. `--only REGEX`
picks networks by `library:name`; `--forward` only builds them and runs them once. `--merge` takes
the rows of other files, of networks that were measured again, in place of those of --out; those
made with `--no-peer` keep what the peer did before, where it did not prune the network. The
lists and the inputs are in zoo_networks.py. Results are written after each network and hold no
path of the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo_networks import CLASSES, Network, build, example_inputs, find, networks

from bevel.core.errors import one_line
from bevel.core.files import write_json, write_text
from bevel.reporting.text import bullets, markdown_table

if TYPE_CHECKING:  # the process that starts the others needs no torch
    from torch import Tensor, nn

LIMIT_S = 120
"""Seconds that one tool may take for one network, from the start of its process."""
BUDGET = 0.5
ALIGN = 8
ATTEMPTS = 4
"""Requests before a network counts as one that cannot be pruned: a refused one may freeze more."""
PEER = "torch-pruning"
PACKAGES = ("bevel", "torch", "torchvision", "timm", "ultralytics", PEER)

Entry = dict[str, Any]


# --- in the process of one network ---------------------------------------------------------------


@dataclass
class Report:
    """What is known of a network so far; on disk after every stage, so that a kill loses little."""

    path: Path
    numbers: Entry = field(default_factory=dict)

    def put(self, **numbers: Any) -> None:
        """Add numbers and write all of them."""
        self.numbers |= numbers
        write_json(self.path, _finite(self.numbers))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Name the stage that begins; if it ends, its seconds are `{stage}_s`."""
        self.put(stage=stage)
        start = time.perf_counter()
        yield
        self.put(**{f"{stage}_s": time.perf_counter() - start})


def work(worker: str, key: str, path: Path) -> None:
    """Do one worker's job for one network; whatever is raised becomes the outcome `crash`."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    report = Report(path)
    try:
        WORKERS[worker](find(key), report)
    except Exception as error:  # noqa: BLE001 - a crash is one of the results
        where = "not built" if report.numbers.get("stage") in ("build", "forward") else "crash"
        report.put(outcome=where, reason=_crash(error))


def forward_only(network: Network, report: Report) -> None:
    """Build the network and run it."""
    _prepare(network, report)
    report.put(outcome="runs")


def with_bevel(network: Network, report: Report) -> None:
    """Plan, slice in place as the peer does; then, on the same network built again, the rest.

    The rest is one more analysis for its time, counting, and the proof.
    """
    # All that will be timed is named here, so that nothing is imported while it is.
    from bevel import analyze, plan_pruning, prune, verify_pruning

    net, inputs = _prepare(network, report)
    memory = _peak_bytes()
    asked = {"criterion": "l2", "allocate": "global", "align": ALIGN}
    with report.timed("plan"):
        request = partial(plan_pruning, net, inputs, analysis=analyze(net, inputs), **asked)
        plan, refusal = _plan(request, report)
    if plan is None:
        seconds = report.numbers["plan_s"]
        report.put(
            outcome="limited", reason=refusal, total_s=seconds, macs_left=1.0, params_left=1.0
        )
        return
    with report.timed("slice"):
        pruned = prune(net, plan, inplace=True)
    numbers = report.numbers
    more = _peak_bytes() - memory
    report.put(
        total_s=numbers["plan_s"] + numbers["slice_s"],
        memory_bytes=more,
        memory_ratio=more / numbers["bytes"],
        macs_before=plan.before.macs,
        macs_after=plan.after.macs,
        macs_left=plan.after.macs / max(1, plan.before.macs),
        params_before=plan.before.params,
        params_after=plan.after.params,
        params_left=plan.after.params / plan.before.params,
        notes=[_without_paths(note) for note in plan.notes[:5]],
        kept_whole=len(plan.notes),
    )
    net = build(network)  # as it was: drawn with the same seed
    with report.timed("analysis"):
        analysis = analyze(net, inputs)
    report.put(frozen_share=_frozen_share(analysis, plan))
    before, after = _flops(net.eval(), inputs), _flops(pruned.eval(), inputs)
    if before and after is not None:
        report.put(torch_macs_before=before // 2, torch_macs_left=after / before)
    with report.timed("verify"):
        proof = verify_pruning(net, pruned, plan, inputs)
    unproven = [str(name) for name in getattr(proof, "unproven", ())]
    proven = "partly proven" if unproven or not proof.passed else "proven"
    report.put(
        worst=proof.worst,
        unproven=unproven,
        proof=proven,
        outcome="limited" if refusal else f"pruned, {proven}",
        reason=refusal,
    )


def _plan(request: Callable[..., Any], report: Report) -> tuple[Any, str | None]:
    """A plan for the budget, or for what is reachable; and why the budget could not be met.

    No plan where nothing can be removed at all.

    Raises:
        PruningError: the request failed for another reason than its size.
    """
    from bevel.core.errors import PruningError

    budget, refusal = BUDGET, None
    for _ in range(ATTEMPTS):
        try:
            return request(budget={"macs": budget}), refusal
        except PruningError as error:
            message, reachable = _without_paths(one_line(error, 400)), _reachable(error)
            if reachable is None and "no group of this network can be pruned" not in message:
                raise
        refusal = message
        report.put(reachable=reachable, reason=refusal)
        if reachable is None or reachable > 0.99:
            break
        budget = reachable + 0.005
    return None, refusal


def _reachable(error: Exception) -> float | None:
    """The smallest fraction of the MACs that a refused request could have had."""
    stated = getattr(error, "reachable", None)
    if stated:
        return float(stated["macs"])
    match = re.search(r"only .*?macs ([\d.]+) ?%", str(error))
    return float(match[1]) / 100 if match else None


def _frozen_share(analysis: Any, plan: Any) -> float | None:
    """The share of the MACs in calls of which at least one width must stay as it is."""
    prunable = {group.name for group in plan.groups}
    frozen = {i for i, group in enumerate(analysis.groups) if group.name not in prunable}
    shares = analysis.shares(analysis.full())
    total = touched = 0.0
    for term in analysis.macs:
        value = term.at(shares)
        total += value
        if term.touched() & frozen:
            touched += value
    return touched / total if total else None


def with_peer(network: Network, report: Report) -> None:
    """Torch-Pruning's own recipe: global magnitude pruning of half of the channels."""
    import torch
    import torch_pruning

    net, inputs = _prepare(network, report)
    flops = _flops(net, inputs)
    with torch.no_grad():
        shapes = _shapes(net(*inputs))
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    heads = _attention_heads(net)
    ignored = _output_layers(network, net)
    memory = _peak_bytes()
    with report.timed("graph"):
        pruner = torch_pruning.pruner.MagnitudePruner(
            net,
            inputs,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=0.5,
            ignored_layers=ignored,
            num_heads=heads,
            round_to=_peer_alignment(net),
        )
    with report.timed("step"):
        pruner.step()
        _follow_widths(net, pruner.num_heads)
    more = _peak_bytes() - memory
    numbers = report.numbers
    report.put(
        total_s=numbers["graph_s"] + numbers["step_s"],
        memory_bytes=more,
        memory_ratio=more / numbers["bytes"],
    )
    _judge_peer(network, report, net, inputs, (flops, shapes))


def _judge_peer(
    network: Network,
    report: Report,
    net: nn.Module,
    inputs: tuple[Any, ...],
    original: tuple[int | None, list[tuple[int, ...]]],
) -> None:
    """Whether the pruned network runs, gives outputs of the right shapes, and what it costs."""
    import torch

    flops, shapes = original
    params = sum(parameter.numel() for parameter in net.parameters())
    report.put(params_left=params / report.numbers["params"])
    try:
        with torch.no_grad():
            got = _shapes(net.eval()(*inputs))
    except Exception as error:  # noqa: BLE001 - that it does not run is the result
        report.put(outcome="does not run", reason=_crash(error))
        return
    after = _flops(net, inputs)
    left = after / flops if after is not None and flops else None
    report.put(macs_left=left)
    if network.task != "detection" and got != shapes:
        report.put(outcome="output changed", reason=f"output shapes {got[:3]}, were {shapes[:3]}")
    elif report.numbers["params_left"] > 0.999:
        report.put(outcome="unchanged", reason="nothing was removed")
    else:
        report.put(outcome="pruned")


def _attention_heads(net: nn.Module) -> dict[nn.Module, int]:
    """What Torch-Pruning's examples pass as num_heads."""
    return {
        layer: module.num_heads
        for module in net.modules()
        if isinstance(getattr(module, "num_heads", None), int)
        for layer, _ in _projections(module)
    }


def _projections(module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The linear layers of an attention that make queries, keys, values; how many of these each."""
    from torch import nn

    parts = {"qkv": 3, "qkv_proj": 3} | dict.fromkeys(
        ("query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj"), 1
    )
    for name, part in parts.items():
        layer = getattr(module, name, None)
        if isinstance(layer, nn.Linear):
            yield layer, part


def _peer_alignment(net: nn.Module) -> int:
    """8, and a multiple of the heads of every torch.nn.MultiheadAttention, which must divide it."""
    from torch import nn

    heads = [m.num_heads for m in net.modules() if isinstance(m, nn.MultiheadAttention)]
    return math.lcm(ALIGN, *heads)


def _follow_widths(net: nn.Module, heads: dict[nn.Module, int]) -> None:
    """Sizes that its examples set by hand after pruning."""
    from torchvision.models import VisionTransformer

    if isinstance(net, VisionTransformer):
        net.hidden_dim = net.conv_proj.out_channels
    for module in net.modules():
        for layer, part in _projections(module):
            if layer not in heads or not hasattr(module, "num_heads"):
                continue
            module.num_heads = heads[layer]
            width = layer.out_features // part
            if hasattr(module, "head_dim"):
                module.head_dim = width // heads[layer]
            if hasattr(module, "attn_dim"):
                module.attn_dim = width


HEADS = {
    "ssd": ("head",),
    "raft": ("corr_block", "update_block", "mask_predictor"),
    "fasterrcnn": (
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "backbone.fpn",
        "roi_heads",
    ),
    "fcos": (
        "head.classification_head.cls_logits",
        "head.regression_head.bbox_reg",
        "head.regression_head.bbox_ctrness",
    ),
    "keypointrcnn": (
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "backbone.fpn.layer_blocks",
        "roi_heads.box_head",
        "roi_heads.box_predictor",
        "roi_heads.keypoint_predictor",
    ),
    "maskrcnn": (
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.box_predictor",
        "roi_heads.mask_predictor",
    ),
    "retinanet": ("head.classification_head.cls_logits", "head.regression_head.bbox_reg"),
}
"""Start of a torchvision name -> what Torch-Pruning's examples leave alone in it."""


def _output_layers(network: Network, net: nn.Module) -> list[nn.Module]:
    """The layers whose outputs are the network's outputs, as Torch-Pruning's examples name them."""
    from torch import nn

    if network.library == "torchvision":
        for start, names in HEADS.items():
            if network.name.startswith(start):
                found = [net.get_submodule(n) for n in names if _has(net, n)]
                return [module for module in found if isinstance(module, nn.Module)]
    classes = getattr(net, "num_classes", None) or CLASSES.get(network.task)
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    sized = [
        module
        for module in net.modules()
        if isinstance(module, layers)
        and classes in (getattr(module, "out_features", 0), getattr(module, "out_channels", 0))
    ]
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    return sized or linear[-1:]


def _has(net: nn.Module, name: str) -> bool:
    from torch import nn

    value: Any = net
    for part in name.split("."):
        value = getattr(value, part, None)
    return isinstance(value, nn.Module)


WORKERS: dict[str, Callable[[Network, Report], None]] = {
    "forward": forward_only,
    "bevel": with_bevel,
    "peer": with_peer,
}


def _prepare(network: Network, report: Report) -> tuple[nn.Module, tuple[Any, ...]]:
    """Build and run the network; its size and the median of three passes go to the report."""
    import torch

    with report.timed("build"):
        net = build(network)
    inputs = example_inputs(network, net)
    tensors = [*net.parameters(), *net.buffers()]
    report.put(
        stage="forward",
        params=sum(parameter.numel() for parameter in net.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        input=_shapes(inputs),
    )
    seconds = []
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            output = net(*inputs)
            seconds.append(time.perf_counter() - start)
    leaves = _leaves(output)
    report.put(
        forward_s=statistics.median(seconds[1:]),
        outputs=[list(shape) for shape in _shapes(output)][:8],
        finite=all(bool(leaf.isfinite().all()) for leaf in leaves if leaf.is_floating_point()),
    )
    return net, inputs


def _leaves(value: Any) -> list[Tensor]:
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in _leaves(value)]


def _flops(net: nn.Module, inputs: tuple[Any, ...]) -> int | None:
    """Torch's own count, attention in its plain form so that it is counted; None if it fails."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            net(*inputs)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError):
        return None
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _finite(value: Any) -> Any:
    """JSON has no infinity: such numbers become None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _crash(error: BaseException) -> str:
    """The error in one line, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {_without_paths(one_line(error, 240))}{where}"


def _without_paths(text: str) -> str:
    """The text with absolute paths cut down to their last part."""
    return re.sub(r"(?<![\w.)])/(?:[\w.\-]+/)+", "", text)


# --- in the process that starts the others -------------------------------------------------------


def run_worker(worker: str, network: Network, threads: int) -> Entry:
    """What one worker reports of one network; at the time limit its process group is killed."""
    environment = {**os.environ, "TIMM_FUSED_ATTN": "0" if worker == "peer" else "1"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--out", str(path)]
        process = subprocess.Popen(
            [*command, "--worker", worker, "--network", network.key],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        entry = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    stage = entry.pop("stage", "start")
    if code is None:
        entry |= {"outcome": "timeout", "reason": f"{LIMIT_S} s were over in stage '{stage}'"}
    elif "outcome" not in entry:
        entry |= {"outcome": "crash", "reason": f"process ended with {code} in stage '{stage}'"}
    return entry


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a worker and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_network(network: Network, workers: Sequence[str], threads: int) -> Entry:
    """One network with every worker, one after the other."""
    entry: Entry = {"name": network.name, "library": network.library, "family": network.family}
    entry |= {"task": network.task, "measured": _now()[:10]}
    for worker in workers:
        entry[worker] = run_worker(worker, network, threads)
    return entry


def run_all(given: argparse.Namespace, workers: Sequence[str]) -> Entry:
    """Every chosen network; the file is written after each."""
    results = _opened(given, workers)
    done = {_key(entry): entry for entry in results["networks"]}
    open_networks = [
        network
        for network in networks()
        if re.search(given.only, network.key)
        and not all(worker in done.get(network.key, {}) for worker in workers)
    ]
    threads = _threads(given.jobs)
    order = {network.key: place for place, network in enumerate(networks())}
    for count, entry in enumerate(_entries(open_networks, workers, threads, given.jobs), 1):
        done[_key(entry)] = {**done.get(_key(entry), {}), **entry}
        results["networks"] = sorted(done.values(), key=lambda e: order.get(_key(e), len(order)))
        results["finished"] = _now()
        write_json(given.out, results)
        said = ", ".join(f"{worker}: {_said(entry[worker])}" for worker in workers)
        print(f"[{count}/{len(open_networks)}] {_key(entry)}: {said}", file=sys.stderr, flush=True)
    return results


def merge(into: Path, parts: Sequence[Path]) -> Entry:
    """Put rows that were measured in the same way in place of those of a file, and write it."""
    results: Entry = json.loads(into.read_text(encoding="utf-8"))
    for entry in results["networks"]:
        entry.setdefault("measured", results["started"][:10])
    rows = {_key(entry): entry for entry in results["networks"]}
    for part in parts:
        other = json.loads(part.read_text(encoding="utf-8"))
        for name in ("versions", "machine", "jobs", "threads", "limit_s", "request"):
            if other[name] != results[name]:
                raise SystemExit(f"{part} has other {name} than {into}: {other[name]}")
        rows |= {_key(entry): _with_peer(entry, rows) for entry in other["networks"]}
        for name in ("finished", "load_at_start"):  # of the last, and of the busiest
            results[name] = max(results[name], other[name])
    results["networks"] = list(rows.values())
    write_json(into, results)
    return results


def _with_peer(entry: Entry, rows: dict[str, Entry]) -> Entry:
    """An entry measured with `--no-peer`, with what the peer did before if that took no time."""
    peer = rows.get(_key(entry), {}).get("peer")
    if "peer" in entry or peer is None:
        return entry
    if peer["outcome"] == "pruned":
        raise SystemExit(f"{_key(entry)}: the peer pruned it; measure both tools again")
    before = rows[_key(entry)]
    return {
        **entry,
        "peer": peer,
        "peer_measured": before.get("peer_measured", before["measured"]),
    }


def _entries(
    chosen: Sequence[Network], workers: Sequence[str], threads: int, jobs: int
) -> Iterator[Entry]:
    """The networks' entries as they are finished."""
    if jobs == 1:
        for network in chosen:
            yield run_network(network, workers, threads)
        return
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_network, network, workers, threads) for network in chosen]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _threads(jobs: int) -> int:
    """Threads of each process; `taskset` may leave fewer processors than the machine has."""
    return 2 if jobs == 1 and len(os.sched_getaffinity(0)) > 1 else 1


def _opened(given: argparse.Namespace, workers: Sequence[str]) -> Entry:
    """The results to go on with, or fresh ones that say where and how they are made."""
    if given.resume and given.out.exists():
        results: Entry = json.loads(given.out.read_text(encoding="utf-8"))
        if results["jobs"] != given.jobs or results["versions"] != _versions():
            raise SystemExit(
                f"the results were begun with --jobs {results['jobs']} and {results['versions']}: "
                "numbers of one table must be made in the same way"
            )
        return results
    flags = "" if given.only == "." else f" --only '{given.only}'"
    flags += f" --jobs {given.jobs}" + ("" if "peer" in workers else " --no-peer")
    return {
        "command": f"python benchmarks/zoo.py{flags}",
        "started": _now(),
        "finished": _now(),
        "machine": _machine(),
        "versions": _versions(),
        "jobs": given.jobs,
        "threads": _threads(given.jobs),
        "limit_s": LIMIT_S,
        "request": {"macs": BUDGET, "align": ALIGN, "criterion": "l2", "allocate": "global"},
        "load_at_start": round(os.getloadavg()[0], 2),
        "networks": [],
    }


def _key(entry: Entry) -> str:
    return f"{entry['library']}:{entry['name']}"


def _said(result: Entry) -> str:
    left, seconds = result.get("macs_left"), result.get("total_s")
    numbers = f" {_percent(left)} {seconds:.1f} s" if left is not None and seconds else ""
    reason = f" [{result['reason'][:120]}]" if result.get("reason") else ""
    return f"{result['outcome']}{numbers}{reason}"


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


# --- the page ------------------------------------------------------------------------------------

COLUMNS = (
    "network",
    "family",
    "outcome",
    "MACs",
    "MACs left",
    "params left",
    "in frozen calls",
    "proof",
    "forward, s",
    "analysis, s",
    "total, s",
    "verify, s",
    "memory",
    "peer",
    "peer MACs left",
    "peer, s",
)


def page(results: Entry) -> str:
    """docs/zoo.md."""
    entries = [entry for entry in results["networks"] if "bevel" in entry]
    blocks = [
        "# The zoo",
        "<!-- written by benchmarks/zoo.py; do not edit -->",
        _head(results),
        "## Summary",
        bullets(_summary(entries)),
        "## How it was measured",
        bullets(_methods(results)),
        "## Every network",
        markdown_table(COLUMNS, [_row(entry) for entry in entries]),
        "## Where less than 30 % of the MACs went",
        _reasons(entries),
    ]
    if any("peer" in entry for entry in entries):
        blocks += ["## Where the peer did not prune", _peer_reasons(entries)]
    return "\n\n".join(blocks) + "\n"


CHOICES = {
    "torchvision": "torchvision (every builder)",
    "timm": "timm (the smallest of each model file)",
    "ultralytics": "Ultralytics (of each generation and task the smallest, and unlike ones)",
}
"""Library -> which of its networks are in the lists."""


def _head(results: Entry) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    counts = Counter(entry["library"] for entry in results["networks"])
    listed = " and ".join(f"{n} networks of {CHOICES[library]}" for library, n in counts.items())
    return (
        f"{listed}, random weights, each asked for 50 % of its MACs.\n\n"
        f"`{results['command']}`, {results['started'][:10]}, {machine['processor']}, "
        f"{machine['cores']} cores, {results['threads']} threads, {machine['system']}. {versions}."
    )


def _summary(entries: Sequence[Entry]) -> Iterator[str]:
    bevel = [entry["bevel"] for entry in entries]
    yield f"Networks: {len(bevel)}. {_counted(bevel)}."
    lost = [r for r in bevel if r.get("proof") and _lost(r) >= 0.3]
    whole = sum(r["proof"] == "proven" for r in lost)
    yield (
        f"At least 30 % of the MACs removed, with a proof: {len(lost)} of {len(bevel)} "
        f"({_percent(len(lost) / max(1, len(bevel)))}), {whole} of them without an unproven group."
    )
    worst = [r["worst"] for r in bevel if r.get("worst") is not None]
    if worst:
        yield f"Worst proof, relative to the output's largest magnitude: {max(worst):.1e}."
    counted = [r for r in bevel if "torch_macs_left" in r]
    if counted:
        far = max(counted, key=_disagreement)
        name = next(entry["name"] for entry in entries if entry["bevel"] is far)
        yield (
            f"bevel's count of the MACs that are left and torch's differ by at most "
            f"{100 * _disagreement(far):.1f} points ({name}), by more than 2 points on "
            f"{sum(_disagreement(r) > 0.02 for r in counted)} of {len(counted)}. "
            "What is said here of 30 % holds by both."
        )
    ratios = [r["memory_ratio"] for r in bevel if r.get("memory_ratio") is not None]
    if ratios:
        yield (
            f"Memory beyond the earlier peak, as a multiple of the model's size: median "
            f"{statistics.median(ratios):.2g}, largest {max(ratios):.2g}."
        )
    if any("peer" in entry for entry in entries):
        yield from _comparison(entries)


def _comparison(entries: Sequence[Entry]) -> Iterator[str]:
    peer = [entry["peer"] for entry in entries if "peer" in entry]
    yield f"Peer (Torch-Pruning): {len(peer)} networks. {_counted(peer)}."
    both = [entry for entry in entries if _pruned(entry["bevel"]) and _pruned(entry.get("peer"))]
    if not both:
        return
    ours = sum(entry["bevel"]["total_s"] for entry in both)
    theirs = sum(entry["peer"]["total_s"] for entry in both)
    yield (
        f"Time over the {len(both)} networks that both pruned: bevel {ours:.0f} s, peer "
        f"{theirs:.0f} s, so bevel takes {ours / theirs:.2f} times as long. Verification is not in "
        f"it: {sum(entry['bevel'].get('verify_s', 0.0) for entry in both):.0f} s."
    )
    faster = [e for e in both if e["peer"]["total_s"] < e["bevel"]["total_s"]]
    yield f"The peer is faster on {len(faster)} of them: {_names(faster)}."
    only = [e for e in entries if _pruned(e.get("peer")) and not _pruned(e["bevel"])]
    yield f"Pruned by the peer and not by bevel: {len(only)}: {_names(only)}."
    alone = [e for e in entries if "peer" in e and _pruned(e["bevel"]) and not _pruned(e["peer"])]
    yield f"Pruned by bevel and not by the peer: {len(alone)}."


def _methods(results: Entry) -> Iterator[str]:
    yield (
        f"Each tool has {results['limit_s']} s for one network, in a process of its own, imports, "
        "building and verification included. What runs out is a timeout, whatever it had by then."
    )
    yield (
        f"{results['jobs']} at a time, load average {results['load_at_start']} before the start; "
        "above 1 another process shared the machine, for both tools alike. Seconds were measured "
        "once, so differences of a few per cent mean nothing."
    )
    days = Counter(e.get("measured", results["started"][:10]) for e in results["networks"])
    yield (
        "Rows by the day they were measured: "
        + ", ".join(f"{day}: {count}" for day, count in sorted(days.items()))
        + "."
    )
    earlier = sum("peer_measured" in entry for entry in results["networks"])
    if earlier:
        yield (
            f"In {earlier} rows, all of networks that the peer does not prune, what it did is from "
            "an earlier day."
        )
    yield (
        "Weights are random (seed 0), constant parameters such as norms' scales included; the "
        "statistics of batch norms are near to those of the example's own activations. So this "
        "page says what can be pruned and how fast, not what accuracy is left."
    )
    yield (
        "`limited`: 50 % cannot be reached; the network was then asked for what bevel said can be, "
        "plus half a point, and the row shows that. The refused attempt is in its time; both share "
        "one analysis."
    )
    yield (
        "`in frozen calls`: share of the MACs in operators with at least one width that must stay. "
        "The first and the last layer are always among them."
    )
    yield (
        "`proof`: largest difference between the pruned network and its masked original in float64 "
        "on three inputs, relative to the output's magnitude; `+n` names the number of groups that "
        "were only checked for shapes and finite values."
    )
    yield (
        "`analysis` is timed on its own after the plan. `total` is planning, which contains one "
        "analysis and bevel's own trial of the plan, plus slicing. `forward` is the median of "
        "three passes. Networks are sliced in place, as the peer does it; rows of before "
        "2026-11-26 were sliced into a copy."
    )
    yield (
        "`memory` is the growth of the process's peak over planning and slicing, as a multiple of "
        "the model's size; the peak before it includes building and running the network."
    )
    if any("peer" in entry for entry in results["networks"]):
        yield from _peer_methods()
    for library in Counter(entry["library"] for entry in results["networks"]):
        yield INPUTS[library]


INPUTS = {
    "torchvision": (
        "torchvision's detectors get one 320x320 image, resize to 320 and take 200 proposals and "
        "20 detections where they would enlarge to 800 and take 1000 and 100; their score "
        "threshold is 0, as a random detector finds nothing. GoogLeNet and Inception v3 are built "
        "without auxiliary heads, as the peer's examples do."
    ),
    "timm": (
        "timm's deepseek_vit, gemma4_vit and qwen3_vit get 126, 240 and 256 pixels instead of 546 "
        "to 768. Its own `test_*` miniatures do not count as the smallest of their file."
    ),
    "ultralytics": (
        "Ultralytics' networks are built from their model files and get one 320x320 image. "
        "`python benchmarks/zoo.py` leaves them out: the package is under the AGPL, and bevel does "
        "not need it."
    ),
}
"""Library -> how its networks are built and run."""


def _peer_methods() -> Iterator[str]:
    yield (
        "Peer: MagnitudePruner, GroupMagnitudeImportance(p=2), global, pruning_ratio 0.5 as in its "
        "README, round_to 8 (with torch's MultiheadAttention a common multiple with the heads); "
        "ignored layers, num_heads and sizes set after pruning follow its examples. Its "
        "seconds are those of its constructor, which builds the dependency graph, and of step()."
    )
    yield (
        "Half of the channels is not half of the MACs: the peer takes no MACs budget, so its MACs "
        "left say what its usual setting does and are not to be compared with bevel's 50 %. They "
        "are counted by torch's FlopCounterMode. That its result is right is not checked beyond "
        "one forward pass with outputs of the right shapes."
    )


def _row(entry: Entry) -> list[str]:
    ours, peer = entry["bevel"], entry.get("peer", {})
    return [
        entry["name"],
        entry["family"],
        ours["outcome"],
        _count(ours.get("macs_before")),
        _percent(ours.get("macs_left")),
        _percent(ours.get("params_left")),
        _percent(ours.get("frozen_share")),
        _proof(ours),
        _seconds(ours.get("forward_s")),
        _seconds(ours.get("analysis_s")),
        _seconds(ours.get("total_s")),
        _seconds(ours.get("verify_s")),
        f"{ours['memory_ratio']:.1f}x" if ours.get("memory_ratio") is not None else "-",
        peer.get("outcome", "-"),
        _percent(peer.get("macs_left")),
        _seconds(peer.get("total_s")),
    ]


def _reasons(entries: Sequence[Entry]) -> str:
    """Why, for each network that lost less than 30 % of its MACs or has no proof."""
    blocks = []
    for entry in entries:
        ours = entry["bevel"]
        if ours.get("proof") and _lost(ours) >= 0.3:
            continue
        reasons = [ours["reason"]] if ours.get("reason") else []
        reasons += ours.get("notes", [])[:5]
        title = f"**{entry['name']}** ({ours['outcome']}, {_percent(ours.get('macs_left'))} left)"
        blocks.append(f"{title}\n\n{bullets(one_line(reason, 300) for reason in reasons)}")
    return "\n\n".join(blocks) or "There is none."


def _peer_reasons(entries: Sequence[Entry]) -> str:
    lines = [
        f"{entry['name']}: {entry['peer']['outcome']}: {entry['peer'].get('reason', '')}"
        for entry in entries
        if "peer" in entry and not _pruned(entry["peer"])
    ]
    return bullets(one_line(line, 240) for line in lines) or "There is none."


def _pruned(result: Entry | None) -> bool:
    """Whether a tool gave a smaller network that runs."""
    return (
        bool(result)
        and (result["outcome"].startswith("pruned") or result["outcome"] == "limited")
        and (result.get("macs_left") or 1.0) < 1
        and result.get("total_s") is not None
    )


def _disagreement(result: Entry) -> float:
    return float(abs(result["torch_macs_left"] - result["macs_left"]))


def _lost(result: Entry) -> float:
    """The share of the MACs that went; by bevel's or by torch's count, whichever is less."""
    lefts = [left for name in ("macs_left", "torch_macs_left") if (left := result.get(name))]
    return 1 - max(lefts, default=1.0)


def _counted(results: Iterable[Entry]) -> str:
    counts = Counter(result["outcome"] for result in results)
    return ", ".join(f"{outcome}: {count}" for outcome, count in counts.most_common())


def _names(entries: Sequence[Entry]) -> str:
    return ", ".join(entry["name"] for entry in entries) or "none"


def _proof(result: Entry) -> str:
    if result.get("worst") is None:
        return "-"
    unproven = result.get("unproven") or []
    return f"{result['worst']:.0e}" + (f" +{len(unproven)}" if unproven else "")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"


def _count(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.0f} M"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--docs", type=Path, help="write the page there as well")
    parser.add_argument("--table", type=Path, help="only print the page of these results")
    parser.add_argument(
        "--only",
        default="^(torchvision|timm):",
        help="regular expression on library:name; default: all of torchvision and timm",
    )
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bevel", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--forward", action="store_true", help="build and run, nothing else")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="1: of 2 threads, where 2 processors are free; more: of 1",
    )
    parser.add_argument("--resume", action="store_true", help="skip what the file holds")
    parser.add_argument("--merge", type=Path, nargs="+", help="files whose rows --out takes over")
    parser.add_argument("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--network", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.table is None and given.out is None:
        parser.error("--out FILE or --table FILE is needed")
    return given


def main() -> None:
    """Parse, then run, or print the page of an earlier run."""
    given = parse()
    if given.worker:
        work(given.worker, given.network, given.out)
        return
    if given.table:
        print(page(json.loads(given.table.read_text(encoding="utf-8"))), end="")
        return
    if given.merge:
        results = merge(given.out, given.merge)
        if given.docs:
            write_text(given.docs, page(results))
        return
    chosen = {"bevel": given.bevel, "peer": given.peer}
    workers = ["forward"] if given.forward else [name for name, wanted in chosen.items() if wanted]
    results = run_all(given, workers)
    if given.docs:
        write_text(given.docs, page(results))


if __name__ == "__main__":
    main()
