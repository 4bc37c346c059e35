"""A training shared by two processes (gloo), each a fork of this one: FOLDER PORT.

It learns from a teacher's outputs and feature maps too.
"""

import os
import sys
from pathlib import Path

from tiny_training import TinyData, tiny_net

from bevel.core.steps import TrainStep
from bevel.finetuning import finetune
from bevel.finetuning.state import digest


class Interrupted(TinyData):
    def train_batches(self, *, seed, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return super().train_batches(seed=seed, epoch=epoch)


def train(data: TinyData, folder: Path) -> str:
    distill = {"weight": 0.1, "features": 0.1}
    settings = TrainStep(epochs=4, lr=0.05, ema=0.8, distill=distill)
    trained = finetune(tiny_net(), data, settings, folder=folder, teacher=tiny_net(seed=2))
    return f"{digest(trained.net)} {[row['validation_top1'] for row in trained.history]}"


def rank(number: int, folder: Path) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    whole = train(TinyData(), folder / "whole")
    try:
        train(Interrupted(), folder / "parts")
    except KeyboardInterrupt:
        resumed = train(TinyData(), folder / "parts")
    (folder / f"rank{number}").write_text(f"{whole}\n{resumed}\n")


def main(folder: Path, port: str) -> None:
    os.environ |= {
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            rank(number, folder)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
