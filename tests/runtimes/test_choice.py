"""Which of several int8 files is kept: agreement with float, then time, then error."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bevel.runtimes._choice import IMAGES, TURN_RUNS, WARMUP_TURNS, choose

GENERATOR = torch.Generator().manual_seed(0)


class Linear:
    """A session whose outputs are those of one matrix, some rows of it changed, some time later."""

    def __init__(self, noise: float = 0.0, milliseconds: float = 0.0, flip: bool = False) -> None:
        weights = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
        if flip:
            weights = -weights
        self.weights = (weights + noise).numpy()
        self.milliseconds = milliseconds
        self.seen: list[int] = []

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.seen.append(len(inputs[0]))
        time.sleep(self.milliseconds / 1e3)
        return [inputs[0].reshape(len(inputs[0]), -1) @ self.weights.T]


def batches(count: int, size: int = 8) -> Iterator[Tensor]:
    for _ in range(count):
        yield torch.randn(size, 3, 2, 2, generator=GENERATOR)


def test_agreement_comes_before_time() -> None:
    files = {"right": Linear(milliseconds=1), "wrong": Linear(flip=True)}
    name, why = choose(files, Linear(), batches(2), 1)
    assert name == "right"
    assert "right 100.0 % agreement with float, mean error 0," in why
    assert "against wrong " in why


def test_time_comes_before_error() -> None:
    files = {"exact": Linear(milliseconds=2), "fast": Linear(noise=1e-3, milliseconds=0.2)}
    assert choose(files, Linear(), batches(1), 1)[0] == "fast"


def test_of_equally_fast_files_the_one_with_less_error_is_kept() -> None:
    files = {"rough": Linear(1e-2, 1), "fine": Linear(1e-3, 1), "rougher": Linear(2e-2, 1)}
    name, why = choose(files, Linear(), batches(1), 1)
    assert name == "fine"
    assert why.count("agreement with float") == 3


def test_images_are_shown_one_at_a_time_and_no_more_are_read_than_are_compared() -> None:
    read = 0

    def counted() -> Iterator[Tensor]:
        nonlocal read
        for batch in batches(IMAGES):
            read += len(batch)
            yield batch

    file, reference = Linear(), Linear()
    choose({"only": file}, reference, counted(), 1)
    assert read == IMAGES
    assert set(file.seen) == {1}
    assert len(reference.seen) == IMAGES
    timed = len(file.seen) - IMAGES
    assert timed % (TURN_RUNS + 1) == 0
    assert timed > WARMUP_TURNS * (TURN_RUNS + 1)


def test_outputs_that_name_no_class_agree_always() -> None:
    class Sum(Linear):
        def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
            return [super().run(inputs)[0].sum(axis=1, keepdims=True)]

    name, why = choose({"noisy": Sum(1.0, 1), "close": Sum(0.1, 1)}, Sum(), batches(1), 1)
    assert name == "close"
    assert why.count("100.0 %") == 2
