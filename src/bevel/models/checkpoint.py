"""Checkpoints: tensors only. Nothing is ever unpickled that could run code."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from bevel.core.errors import CheckpointError, one_line
from bevel.core.progress import note

WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "ema",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
)
"""Keys under which training scripts put the weights; averaged (EMA) weights are preferred."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What DataParallel, torch.compile and training frameworks put before every key."""

SHOWN = 3
"""How many keys of each kind a message lists."""


def load_checkpoint(net: nn.Module, path: str | Path, *, new_head: bool = False) -> None:
    """Load weights into `net` in place: all of them, or none.

    With `new_head`, layers that differ in nothing but the number of classes (the last one, and
    those of auxiliary classifiers) keep what they have, for transfer learning.

    Reads `.safetensors`, and `.pt`, `.pth`, `.th` with `weights_only=True`. Accepts wrapping
    dictionaries (see `WRAPPERS`) and key prefixes (see `PREFIXES`). Counters of batch norms
    (`num_batches_tracked`) may be absent, as older checkpoints have none.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, holds pickled objects, or
            does not fit; the message lists the first differing keys and shapes.
    """
    path = Path(path).expanduser()
    own = dict(net.state_dict())
    state = _strip(_tensors(_read(path), path), own)
    if new_head:
        state |= {name: own[name] for name in _head(net, own, state)}
    _compare(net, own, state, path)
    net.load_state_dict({**own, **state})


def _read(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint file, tensors on the CPU."""
    suffix = path.suffix.lower()
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: check model.checkpoint")
    if not path.is_file() or suffix not in {".safetensors", ".pt", ".pth", ".th"}:
        kind = "a folder" if path.is_dir() else f"a file with the suffix '{suffix}'"
        raise CheckpointError(
            f"checkpoint {path} is {kind}; expected a .safetensors, .pt, .pth or .th file"
        )
    if path.stat().st_size == 0:
        raise CheckpointError(f"checkpoint {path} is empty: copy or download it again")
    try:
        content = _read_safetensors(path) if suffix == ".safetensors" else _read_torch(path)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {one_line(error)}") from error
    if isinstance(content, nn.Module) or not isinstance(content, Mapping):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(content).__name__}, expected a dictionary of "
            "tensors: save net.state_dict()"
        )
    return content


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged or no safetensors file ({one_line(error)}): "
            "copy or download it again"
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says that some pickle protocols are less tested
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "operand" in text or "truncated" in text:
            raise _damaged(path, "it does not start like one") from error
        named = re.search(r"GLOBAL ([\w.]+)", text) or re.search(
            r"Unsupported class ([\w.]+)", text
        )
        held = f" ({named.group(1)})" if named else ""
        raise CheckpointError(
            f"checkpoint {path} holds pickled Python objects{held}, and unpickling them can run "
            "any code, so bevel reads tensors only: where you trust the file, load it yourself and "
            "save net.state_dict() with safetensors.torch.save_file"
        ) from error
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"checkpoint {path} is a TorchScript program, expected a dictionary of tensors: "
                "save its state_dict() instead"
            ) from error
        raise _damaged(path, str(error)) from error
    except (EOFError, LookupError, ValueError, AttributeError, TypeError, struct.error) as error:
        raise _damaged(path, type(error).__name__) from error


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} is truncated, damaged or no torch checkpoint "
        f"({one_line(reason, 120)}): copy or download it again"
    )


def _tensors(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights inside wrapping dictionaries, as name -> tensor."""
    inner: Mapping[str, Any] = content
    for _ in range(3):
        key = next((k for k in WRAPPERS if isinstance(inner.get(k), Mapping) and inner[k]), None)
        if key is None:
            break
        if "ema" in key.split("_"):
            note(f"{path.name}: using the averaged weights under '{key}'")
        inner = inner[key]
    found = {str(k): v for k, v in inner.items() if isinstance(v, Tensor)}
    found.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel's counter
    if not found:
        keys = ", ".join(map(str, list(inner)[:5])) or "none"
        raise CheckpointError(
            f"checkpoint {path} holds no tensors under the keys it has ({keys}); expected a "
            f"state dict, bare or under one of {', '.join(WRAPPERS[5:])}"
        )
    return found


def _strip(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove prefixes that every key has and the network's keys do not."""
    while True:
        for prefix in PREFIXES:
            if all(k.startswith(prefix) for k in state) and not all(
                k.startswith(prefix) for k in own
            ):
                state = {k.removeprefix(prefix): v for k, v in state.items()}
                break
        else:
            return state


def _compare(
    net: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path
) -> None:
    """Raise CheckpointError unless the names and shapes agree and every value is finite."""
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    differing = [k for k in own if k in state and own[k].shape != state[k].shape]
    if differing and not missing and not unexpected:
        _explain_classes(net, own, state, differing, path)
    if missing or unexpected or differing:
        shapes = [
            f"{k} got {tuple(state[k].shape)} expected {tuple(own[k].shape)}" for k in differing
        ]
        parts = [
            f"{len(keys)} {kind} ({', '.join(keys[:SHOWN])}{', …' if len(keys) > SHOWN else ''})"
            for kind, keys in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", shapes),
            )
            if keys
        ]
        raise CheckpointError(
            f"checkpoint {path} does not fit the network ({len(own)} tensors expected, "
            f"{len(state)} found): {'; '.join(parts)}. Check model.name and model.arguments"
        )
    broken = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"checkpoint {path} holds values that are not finite in {len(broken)} tensors, "
            f"first in {broken[0]}: the training that made it diverged"
        )


def _explain_classes(
    net: nn.Module,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    differing: list[str],
    path: Path,
) -> None:
    """If only the number of outputs of the last layer differs, say so in these words."""
    if not _head(net, own, state):
        return
    key = differing[0]
    layer = key.rpartition(".")[0]
    raise CheckpointError(
        f"checkpoint {path} is for {state[key].shape[0]} classes and the network has "
        f"{own[key].shape[0]} (layer '{layer}'): set model.arguments.num_classes to "
        f"{state[key].shape[0]}, set model.head to new for transfer learning, or leave the "
        "checkpoint out to train from scratch"
    )


def _head(net: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Tensors of the layers that differ in the number of classes, if nothing else differs."""
    differing = [k for k in own if k in state and own[k].shape != state[k].shape]
    widths = {(state[k].shape[:1], own[k].shape[:1]) for k in differing}
    same_inside = all(state[k].shape[1:] == own[k].shape[1:] for k in differing)
    modules = [net.get_submodule(k.rpartition(".")[0]) for k in differing]
    layers = all(isinstance(module, nn.Linear | nn.Conv2d) for module in modules)
    return differing if len(widths) == 1 and same_inside and layers else []
