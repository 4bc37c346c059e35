"""Handwritten digits that ship with scikit-learn: 1797 grayscale images of 8x8, 10 classes.

From the UCI test set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998). The
values 0..16 are spread over 0..255. A fifth of each class is the test split, always the same.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from bevel.core.recipe import DataSection
from bevel.data.splits import Arrays, Indices, Splits, stratified_cut

TEST_FRACTION = 0.2
SPLIT_SEED = 0


def load(section: DataSection) -> Splits:  # noqa: ARG001  every plugin has this signature
    """Train 1437 and test 360 images; no validation split of its own."""
    values, targets = load_digits(return_X_y=True)
    scaled = np.rint(values * (255 / 16)).astype(np.uint8)
    pixels = torch.from_numpy(scaled.reshape(-1, 1, 8, 8))
    labels = targets.astype(np.int64)

    def take(indices: Indices) -> Arrays:
        return Arrays(pixels[torch.from_numpy(indices)], labels[indices])

    train, test = stratified_cut(labels, TEST_FRACTION, SPLIT_SEED)
    return Splits(take(train), None, take(test), tuple(str(digit) for digit in range(10)))
