"""The run folder: every finished step is recorded atomically, so a killed run goes on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml
from pydantic import ValidationError

import bevel
from bevel.core.errors import RunFolderError, one_line
from bevel.core.files import locked, sha256, write_json, write_text
from bevel.core.progress import note
from bevel.core.recipe import Recipe, completed
from bevel.core.records import RunRecord, StepRecord

PACKAGES = ("torch", "torchvision", "torchao", "onnx", "onnxruntime", "accelerate", "timm", "numpy")


class RunFolder:
    """A run's folder, held by one process at a time.

    Raises:
        RunFolderError: it cannot be written, is in use, is damaged, or holds a run of another
            recipe.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe
        self.resolved = recipe.model_dump(mode="json")

    def __enter__(self) -> RunFolder:
        with ExitStack() as stack:
            stack.enter_context(held(self.path))
            self.record = self._opened()
            self._lock = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.close()

    def _opened(self) -> RunRecord:
        file = self.path / "run.json"
        if not file.exists():
            strangers = [entry.name for entry in self.path.iterdir() if entry.name != ".lock"]
            unfinished = {"recipe.yaml"}  # a run killed before its first record
            if set(strangers) - unfinished:
                raise RunFolderError(
                    f"{self.path} holds other files ({sorted(strangers)[0]}) and no run; "
                    "choose another folder with --out"
                )
            write_text(self.path / "recipe.yaml", yaml.safe_dump(self.resolved, sort_keys=False))
            record = RunRecord(
                recipe=self.resolved, started=now(), versions=versions(), machine=machine()
            )
            write_json(file, record.model_dump(mode="json"))
            return record
        try:
            record = RunRecord.model_validate_json(file.read_text(encoding="utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError) as error:
            raise RunFolderError(
                f"{file} is damaged: {one_line(error, 120)}; use another --out"
            ) from error
        difference = first_difference(completed(record.recipe), self.resolved)
        if difference is not None:
            raise RunFolderError(
                f"{self.path} holds a run of another recipe ({difference}); "
                f"choose another folder with --out (--from {self.path} takes over the first steps "
                "that are the same), or delete it"
            )
        return self._intact(record)

    def _intact(self, record: RunRecord) -> RunRecord:
        """The record without the steps whose files are gone or changed, and those after them."""
        for position, step in enumerate(record.steps):
            for name, digest in step.files.items():
                file = self.path / name
                if not file.is_file() or sha256(file) != digest:
                    note(f"{file} is missing or changed: going on from the step '{step.name}'")
                    steps = record.steps[:position]
                    return record.model_copy(
                        update={"steps": steps, "finished": None, "measurements": []}
                    )
        return record

    def update(self, **changes: Any) -> None:
        """Change the record and write it."""
        self.record = self.record.model_copy(update=changes)
        write_json(self.path / "run.json", self.record.model_dump(mode="json"))

    def finished(self, name: str) -> StepRecord | None:
        """The record of a step that is done."""
        return next((step for step in self.record.steps if step.name == name), None)

    def finish(
        self, name: str, verb: str, seconds: float, numbers: Mapping[str, Any], files: list[Path]
    ) -> StepRecord:
        """Record a step as done; its files are already in place."""
        step = StepRecord(
            name=name,
            verb=verb,
            seconds=round(seconds, 3),
            numbers=dict(numbers),
            files={str(file.relative_to(self.path)): sha256(file) for file in files},
        )
        self.update(steps=[*self.record.steps, step])
        return step

    def step_folder(self, name: str) -> Path:
        """Where a step keeps its files."""
        return self.path / "steps" / name


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a folder of runs, made if there is none, for this process alone.

    Raises:
        RunFolderError: it cannot be written, or another process holds it.
    """
    with ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path))
        except BlockingIOError as error:
            raise RunFolderError(f"another process is running in {path}") from error
        except OSError as error:
            raise RunFolderError(
                f"cannot write the run folder {path}: {error.strerror or error}; "
                "choose another with --out"
            ) from error
        yield


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of bevel, Python and the packages that results depend on."""
    found = {"bevel": bevel.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # an extra that is not installed
            continue
    return found


def machine() -> dict[str, Any]:
    """The machine that trains, and the thread count that its results depend on."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "byte_order": sys.byteorder,
    }


def first_difference(old: Any, new: Any, where: str = "") -> str | None:
    """`key: old != new` for the first place where two recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            found = first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
            if found is not None:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return next(
            (d for i, (a, b) in pairs if (d := first_difference(a, b, f"{where}.{i}")) is not None),
            None,
        )
    return None if old == new else f"{where}: {one_line(old, 40)} there, {one_line(new, 40)} here"
