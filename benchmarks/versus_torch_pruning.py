"""bevel against Torch-Pruning: same base, same MACs, same fine-tuning, three seeds, in one run.

    python benchmarks/versus_torch_pruning.py --recipe recipes/resnet20_projection_cifar10.yaml \
        --data DIR --work DIR --out benchmarks/results/versus_resnet20.json

The base is what the recipe's first step trains, or with --padded a public ResNet of CIFAR-10 as it
is: its padded shortcuts, which Torch-Pruning does not take, are written as projections that give
the same. --work keeps the base and every finished training, so the same command goes on where it
was. Torch-Pruning (GroupMagnitudeImportance, p=2, global, the ratio found by bisection) comes
first, and bevel (by default as a prune step with criterion l2) gets what that has left as its
budget: of the MACs, or with --budget latency_ms of the time for one image, as int8 on ONNX Runtime.
Both round widths to the same number, but for a time bevel to the one that the runtime likes. Then
both are fine-tuned by bevel's loop. Test images are looked at once, at the end, through the
exported files.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch_pruning
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bevel
from bevel.core.files import write_json
from bevel.core.recipe import Recipe, Target, load
from bevel.core.steps import FinetuneStep
from bevel.data import Data
from bevel.data.metrics import evaluate
from bevel.finetuning.train import finetune
from bevel.measurement.bench import Subject, measure_all
from bevel.measurement.stopwatch import Stopwatch
from bevel.models.batchnorm import recalibrate, unfold
from bevel.pruning.plan import PruningPlan
from bevel.runtimes import channel_step

TOOLS = ("torch-pruning", "bevel")
PACKAGES = ("bevel", "torch", "torch-pruning", "onnxruntime")
TARGET = Target(runtime="onnxruntime", precision="int8")
"""Where time counts."""

HALVINGS = 12
"""Of the range in which Torch-Pruning's ratio is looked for."""


def macs(net: nn.Module, example: torch.Tensor) -> float:
    """Of one image, as torch counts them."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        net(example)
    return counter.get_total_flops() / 2


@torch.no_grad()
def as_projections(net: nn.Module, padded: nn.Module, images: torch.Tensor) -> nn.Module:
    """The network with projections computes what the one with padded shortcuts does.

    A padded shortcut puts its channels in the middle of more of them: a 1x1 convolution with a 1
    for each, and a batch norm that changes nothing, written as a folded one is. These images (N, C,
    H, W) give it statistics, as if it had been trained: without them it would change the shortcut
    as soon as training begins.
    """
    own = net.state_dict()
    for name in own:
        if not name.endswith("shortcut.0.weight"):
            continue
        outputs, inputs = own[name].shape[:2]
        places = torch.arange(inputs) + (outputs - inputs) // 2
        own[name].zero_()[places, torch.arange(inputs)] = 1
        for what in ("running_mean", "bias"):  # what the one takes away the other gives back
            own[name.replace("0.weight", f"1.{what}")].fill_(1)
    net.load_state_dict({**own, **padded.state_dict()})
    unfold(net.eval(), [images])
    changed = (net(images[:64]) - padded.eval()(images[:64])).abs().max()
    assert changed < 1e-3, f"the projections change the answers by {changed:.2g}"  # noqa: S101
    return net


def peer(net: nn.Module, example: torch.Tensor, share: float, align: int) -> nn.Module:
    """What Torch-Pruning leaves: the most channels with which no more than a share of MACs is."""
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]

    def pruned(ratio: float) -> nn.Module:
        result = copy.deepcopy(net)
        last = [dict(result.named_modules())[name] for name in _names(net, layers[-1:])]
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        torch_pruning.pruner.MagnitudePruner(
            result,
            example,
            importance=importance,
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=last,
            round_to=align,
        ).step()
        return result

    allowed, low, high = share * macs(net, example), 0.0, 1.0
    best = None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        found = pruned(ratio)
        if macs(found, example) <= allowed:
            best, high = found, ratio
        else:
            low = ratio
    if best is None:
        raise SystemExit(f"Torch-Pruning cannot reach {share:.0%} of the MACs")
    return best


def _names(net: nn.Module, modules: list[nn.Module]) -> list[str]:
    return [name for name, module in net.named_modules() if module in modules]


def planned(
    net: nn.Module,
    example: torch.Tensor,
    peers: nn.Module,
    data: Data,
    images: list[torch.Tensor],
    given: argparse.Namespace,
) -> PruningPlan:
    """What bevel removes, to have left what the other tool's network has."""
    request: dict[str, Any] = {
        "criterion": given.criterion,
        "allocate": given.allocate,
        "calibration": data.batches("validation", limit=512),
    }
    if given.budget == "macs":
        left = macs(peers, example) / macs(net, example)
        return bevel.plan_pruning(net, example, budget={"macs": left}, align=given.align, **request)
    with Stopwatch(net, example, TARGET, images) as watch:
        before, after = watch.compare(peers)
    plan, timing = bevel.plan_within(
        net, example, budget={"latency_ms": after / before}, target=TARGET, images=images,
        align=channel_step([(TARGET.runtime, TARGET.precision)]), **request,
    )  # fmt: skip
    print(timing, flush=True)
    return plan


def ours(
    net: nn.Module, example: torch.Tensor, plan: PruningPlan, images: list[torch.Tensor]
) -> nn.Module:
    """What bevel leaves: removed, proven, the rest of each layer fitted again."""
    pruned = bevel.prune(net, plan)
    bevel.verify_pruning(net, pruned, plan, example)
    bevel.reconstruct(pruned, net, torch.cat(images), kept=plan.outputs())
    return pruned


def trained(
    name: str, net: nn.Module, data: Data, settings: FinetuneStep, seed: int, folder: Path
) -> nn.Module:
    """Fine-tuned, or as it was when that had finished before."""
    return finetune(
        net, data, settings, seed=seed, folder=folder / f"{name}-{seed}", label=name
    ).net


def measured(
    nets: dict[str, nn.Module], base: nn.Module, example: torch.Tensor, data: Data
) -> dict[str, Any]:
    """Every network as ONNX Runtime runs it, float32 and int8, all timed in turn, and on what."""
    images = [batch for batch, _ in data.batches("train", limit=512)]
    subjects = []
    with tempfile.TemporaryDirectory() as folder:
        for label, net in {"base": base, **nets}.items():
            for precision in ("float32", "int8"):
                artifact = bevel.export(
                    net, example, runtime="onnxruntime", precision=precision,
                    calibration=images, path=Path(folder) / f"{label}-{precision}.onnx",
                )  # fmt: skip
                subjects.append(Subject(label, artifact, net))
        found = measure_all(subjects, batches=data.batches("test"))
    device = found[0].device
    rows = [
        {
            "network": m.label,
            "precision": m.artifact.precision,
            "top1": m.accuracy.top1 if m.accuracy else None,
            "p50_ms": m.latency.p50_ms if m.latency else None,
            "warnings": m.warnings,
        }
        for m in found
    ]
    return {"machine": device.model_dump(mode="json"), "files": rows}


def table(record: dict[str, Any]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = ["| tool | MACs | params | before training | float32 | int8 | float32, ms | int8, ms |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for tool in ("base", *TOOLS):
        cells = [tool]
        known = record["pruned"].get(tool)
        cells += (
            [f"{known['macs']:.1%}", f"{known['params']:.1%}", f"{known['validation']:.1%}"]
            if known
            else ["100 %", "100 %", "-"]
        )
        for key, scale in (("top1", 100), ("p50_ms", 1)):
            for precision in ("float32", "int8"):
                own = [
                    scale * row[key]
                    for row in record["files"]
                    if row["network"].partition("-seed")[0] == tool
                    and row["precision"] == precision
                ]
                spread = f" ± {stdev(own):.2f}" if len(own) > 1 and key == "top1" else ""
                cells.append(f"{mean(own):.2f}{spread}" if own else "not run")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train the base, prune with both, fine-tune both, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, required=True, help="data, network, base training")
    parser.add_argument("--data", type=Path, required=True, help="train/CLASS/*, test/CLASS/*")
    parser.add_argument("--checkpoint", type=Path, help="what the base starts from")
    parser.add_argument("--padded", type=Path, help="a public ResNet-20 with padded shortcuts")
    parser.add_argument("--work", type=Path, required=True, help="finished trainings")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--share", type=float, default=0.5, help="of the MACs that may be left")
    parser.add_argument("--align", type=int, default=4)
    parser.add_argument("--criterion", default="l2", help="bevel's")
    parser.add_argument("--allocate", default="global", help="bevel's")
    parser.add_argument("--budget", choices=("macs", "latency_ms"), default="macs", help="bevel's")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--precision", default="auto", help="of the trainings: one for both tools")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    recipe: Recipe = load(given.recipe)
    section = recipe.data.model_copy(update={"root": given.data})
    data = bevel.load_data(section, seed=recipe.seed)
    example = torch.zeros(1, *data.input_shape)
    torch.manual_seed(recipe.seed)
    net = bevel.build_model(
        recipe.model.name,
        recipe.model.arguments,
        given.checkpoint,
        new_head=recipe.model.head == "new",
    )
    if given.padded is not None:
        known = torch.cat([batch for batch, _ in data.batches("train", limit=2048)])
        base = as_projections(net, bevel.build_model(recipe.model.name, {}, given.padded), known)
    else:
        first = recipe.steps[0].settings
        base = finetune(
            net, data, first, seed=recipe.seed, folder=given.work / "base", label="base"
        ).net
    whole = macs(base, example), sum(p.numel() for p in base.parameters())
    pruned = {"torch-pruning": peer(base, example, given.share, given.align)}
    images = [batch for batch, _ in data.batches("train", limit=512)]
    asked = (given.criterion, given.allocate, given.budget, given.share, given.align)
    kept = given.work / f"plan-{'-'.join(map(str, asked))}.json"
    if not kept.exists():  # a time is not measured twice to be the same
        planned(base, example, pruned["torch-pruning"], data, images, given).save(kept)
    plan = PruningPlan.load(kept)
    pruned["bevel"] = ours(base, example, plan, images)
    record: dict[str, Any] = {
        "recipe": given.recipe.name,
        "base": given.padded.name if given.padded is not None else "trained by the recipe",
        "align": given.align,
        "criterion": given.criterion,
        "allocate": given.allocate,
        "budget": plan.request["budget"],
        "epochs": given.epochs,
        "lr": given.lr,
        "precision": given.precision,
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "pruned": {},
    }
    for tool, result in pruned.items():
        judged = copy.deepcopy(result)
        if tool == "torch-pruning":  # it leaves the old statistics; training makes new ones
            recalibrate(judged, images)
        record["pruned"][tool] = {
            "macs": macs(result, example) / whole[0],
            "params": sum(p.numel() for p in result.parameters()) / whole[1],
            "validation": evaluate(judged, data.batches("validation")).top1,
        }
        print(tool, record["pruned"][tool], flush=True)
    settings = FinetuneStep(epochs=given.epochs, lr=given.lr, precision=given.precision)
    nets = {
        f"{tool}-seed{seed}": trained(tool, pruned[tool], data, settings, seed, given.work)
        for seed in range(given.seeds)
        for tool in TOOLS
    }
    record |= measured(nets, base, example, data)
    record["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(given.out, record)
    print(json.dumps(record["pruned"], indent=1))
    print(table(record))


if __name__ == "__main__":
    main()
