"""The same training five times, each in a process of its own, killed at chosen points.

Prints a line per process. The processes are forks of one that only imported, because importing
takes longer than all of these trainings.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from tiny_training import TinyData, tiny_net

from bevel.core.steps import TrainStep
from bevel.finetuning import finetune, state

SETTINGS = TrainStep(
    epochs=4,
    lr=0.05,
    label_smoothing=0.1,
    distill={"weight": 0.5, "temperature": 2.0},
    ema=0.9,
    warmup_epochs=1,
)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingData(TinyData):
    """Kills the process in the middle of one epoch."""

    def __init__(self, last_epoch: int | None) -> None:
        super().__init__(images=72)  # the last batch of an epoch is smaller
        self.last_epoch = last_epoch

    def train_batches(self, *, seed, epoch):
        batches = super().train_batches(seed=seed, epoch=epoch)

        class Dying(list):
            def __iter__(self) -> Iterator:
                yield from batches[:2]
                die()

        return Dying(batches) if epoch == self.last_epoch else batches


def die_while_saving(count: int) -> None:
    """Let the count-th save write its content, and die before the file takes its name."""
    save, saves = state.save_file, []

    def dying(tensors, path, metadata) -> None:
        save(tensors, path, metadata=metadata)
        saves.append(path)
        if len(saves) == count:
            die()

    state.save_file = dying


def train(folder: Path | None, last_epoch: int | None, last_save: int | None) -> None:
    if last_save is not None:
        die_while_saving(last_save)
    trained = finetune(
        tiny_net(seed=1),
        DyingData(last_epoch),
        SETTINGS,
        seed=7,
        teacher=tiny_net(seed=2, width=6),
        folder=folder,
    )
    epochs = [row["epoch"] for row in trained.history]
    losses = [(row["loss"], row["validation_top1"]) for row in trained.history]
    say(f"finished {state.digest(trained.net)} {epochs} {losses}")


def finished_epochs(folder: Path) -> int:
    path = folder / state.EPOCH_FILE
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        return file.metadata()["state"].count('"epoch":')


def main(folder: Path) -> None:
    plans = [(None, None), (None, 1), (0, None), (2, None), (None, 1), (None, None)]
    for number, (last_epoch, last_save) in enumerate(plans):
        child = os.fork()
        if child == 0:
            train(folder if number else None, last_epoch, last_save)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            say(f"killed {os.WTERMSIG(status)}, finished epochs: {finished_epochs(folder)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
