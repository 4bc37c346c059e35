"""What a training leaves after every epoch, so that a killed one continues bit for bit.

One safetensors file holds everything: weights, buffers, the optimizer's state, averaged weights
and random state as tensors, the epoch and its numbers as JSON in the file's metadata. It is
replaced atomically, so it always belongs to one finished epoch. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bevel.core.errors import RunFolderError, one_line
from bevel.core.files import atomic, write_json

EPOCH_FILE = "epoch.safetensors"
EXECUTION_FILE = "execution.json"


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, detached but not copied."""
    named = [*net.named_parameters(), *net.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def digest(net: nn.Module | None) -> str | None:
    """SHA-256 over names, shapes and values of parameters and buffers."""
    if net is None:
        return None
    total = hashlib.sha256()
    for name, tensor in sorted(tensors_of(net).items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class EpochStore:
    """The two files of a training in its folder; refuses those of another training."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))

    def save_execution(self, record: dict[str, Any]) -> None:
        """Record how steps run, before the first of them."""
        self._write(EXECUTION_FILE, {"identity": self._identity, "execution": record})

    def load_execution(self) -> dict[str, Any] | None:
        """The recorded choice, or None.

        Raises:
            RunFolderError: the file cannot be read or belongs to another training.
        """
        path = self.folder / EXECUTION_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            identity, record = content["identity"], content["execution"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(path, error) from error
        self._check(path, identity)
        return dict(record)

    def save(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: AveragedModel | None,
        progress: dict[str, Any],
    ) -> None:
        """Replace the state of the last epoch."""
        tensors = {f"net/{name}": tensor for name, tensor in tensors_of(net).items()}
        for name, parameter in net.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{key}/{name}"] = value
        if average is not None:
            tensors |= {f"average/{name}": value for name, value in tensors_of(average).items()}
        tensors |= {f"random/{name}": state for name, state in _random_state().items()}
        # Copies, because safetensors refuses tensors that share memory, as tied weights do.
        plain = {name: value.cpu().contiguous().clone() for name, value in tensors.items()}
        metadata = {"state": json.dumps({"identity": self._identity, "progress": progress})}
        path = self.folder / EPOCH_FILE
        try:
            with atomic(path) as temporary:
                save_file(plain, temporary, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise self._unwritable(path, error) from error

    def load(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: AveragedModel | None,
    ) -> dict[str, Any] | None:
        """Put the last finished epoch back in place; returns its progress, or None.

        Raises:
            RunFolderError: the file cannot be read or belongs to another training.
        """
        path = self.folder / EPOCH_FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
                identity, progress = state["identity"], dict(state["progress"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(path, error) from error
        self._check(path, identity)
        with torch.no_grad():
            for name, tensor in tensors_of(net).items():
                tensor.copy_(tensors[f"net/{name}"])
            for name, tensor in tensors_of(average).items() if average is not None else ():
                tensor.copy_(tensors[f"average/{name}"])
            parameters = dict(net.named_parameters())
            for name, tensor in tensors.items():
                kind, _, rest = name.partition("/")
                if kind == "optimizer":
                    key, _, owner = rest.partition("/")
                    parameter = parameters[owner]
                    if key != "step":  # a count, which stays on the processor
                        tensor = torch.empty_like(parameter).copy_(tensor)
                    optimizer.state[parameter][key] = tensor
        _restore_random_state(tensors)
        return progress

    def _check(self, path: Path, identity: Any) -> None:
        """Refuse files that another training left here."""
        if identity == self._identity:
            return
        theirs = identity if isinstance(identity, dict) else {}
        differing = [key for key, value in self._identity.items() if theirs.get(key) != value]
        raise RunFolderError(
            f"{path} belongs to another training (different {', '.join(differing) or 'content'}); "
            "give another folder, or remove this one to start anew"
        )

    def _write(self, name: str, value: dict[str, Any]) -> None:
        try:
            write_json(self.folder / name, value)
        except OSError as error:
            raise self._unwritable(self.folder / name, error) from error

    def _unreadable(self, path: Path, error: Exception) -> RunFolderError:
        return RunFolderError(
            f"cannot read {path}: {one_line(error, 120)}; remove it to start this step anew"
        )

    def _unwritable(self, path: Path, error: Exception) -> RunFolderError:
        return RunFolderError(
            f"cannot write {path}: {one_line(error, 120)}; "
            "free the disk or choose another output folder"
        )


def _random_state() -> dict[str, Tensor]:
    """The state of torch's generators: the processor's, and the current accelerator's if any."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
