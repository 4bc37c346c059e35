"""A tiny in-memory stand-in for data, and networks with everything that has state."""

import torch
from torch import nn

CLASSES = ("a", "b", "c")


class TinyData:
    """Three classes that differ in which third of the image is bright."""

    classes = CLASSES
    input_shape = (1, 6, 6)

    def __init__(self, images: int = 64, batch_size: int = 16) -> None:
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(5)
        self.labels = torch.randint(0, 3, (images,), generator=generator)
        self.images = torch.randn(images, 1, 6, 6, generator=generator) * 0.3
        for image, label in zip(self.images, self.labels.tolist(), strict=True):
            image[:, 2 * label : 2 * label + 2] += 1.0
        self.sizes = {"train": images, "validation": images, "test": images}

    def _split(
        self, order: torch.Tensor, batch_size: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(self.images[i], self.labels[i]) for i in order.split(batch_size)]

    def train_batches(self, *, seed, epoch):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        return self._split(order, self.batch_size)

    def batches(self, split, batch_size=None, limit=None):
        assert split in self.sizes
        return self._split(torch.arange(len(self.labels))[:limit], batch_size or self.batch_size)


class Interrupted(TinyData):
    """Somebody stops the training as the epoch begins, counted from 0."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def train_batches(self, *, seed, epoch):
        if epoch == self.epoch:
            raise KeyboardInterrupt
        return super().train_batches(seed=seed, epoch=epoch)


class TinyNet(nn.Module):
    """Convolution, batch norm, dropout and a classifier."""

    def __init__(self, classes: int = 3, width: int = 4, dropout: float = 0.2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(dropout)
        self.linear = nn.Linear(width * 36, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.conv(images)).relu()
        return self.linear(self.drop(features.flatten(1)))


def tiny_net(seed: int = 0, **arguments) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet(**arguments).eval()


class Digits(nn.Sequential):
    """A small convolutional network for ten classes of small images."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        channels, height, width = shape
        super().__init__(
            nn.Conv2d(channels, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * height * width, 10),
        )
