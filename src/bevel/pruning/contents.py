"""What networks and images are, as a hash: two with one hash give the same scores.

Of a network every parameter and buffer counts, what its modules are, their settings, and the source
of those that are not torch's.
"""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, str, tuple, type(None))
"""Attributes of these types are a module's settings."""


class ContentHash:
    """A hash of texts and tensors."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._row = ""

    def text(self, text: str) -> None:
        """Add a text."""
        self._hash.update(f"{len(text)}:{text}".encode())

    def each(self, given: Any) -> None:
        """Add a tensor's rows, or tensors one by one: the same rows in two parts count alike."""
        if isinstance(given, list | tuple):
            for item in given:
                self.each(item)
        elif isinstance(given, Tensor):
            rows = given.detach().cpu().contiguous()
            row = f"{tuple(rows.shape[1:])} {rows.dtype}"
            if row != self._row:
                self.text(row)
                self._row = row
            self._hash.update(rows.reshape(-1).view(torch.uint8).numpy().tobytes())

    def array(self, given: np.ndarray) -> None:
        """Add an array."""
        self._hash.update(np.ascontiguousarray(given).tobytes())

    def network(self, net: nn.Module) -> None:
        """Add a network."""
        sources = set()
        for name, module in net.named_modules():
            kind = type(module)
            settings = {k: v for k, v in vars(module).items() if isinstance(v, PLAIN)}
            settings.pop("training", None)
            self.text(f"{name} {kind.__module__}.{kind.__qualname__} {sorted(settings.items())}")
            if not kind.__module__.startswith("torch."):
                sources.add(kind)
        for kind in sorted(sources, key=lambda kind: (kind.__module__, kind.__qualname__)):
            try:
                self.text(inspect.getsource(kind))
            except (OSError, TypeError):  # typed into a shell
                self.text(kind.__qualname__)
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            self.text(f"{name} {tuple(tensor.shape)}")
            self.each(tensor)

    def hexdigest(self) -> str:
        """Of all that was added, 64 digits."""
        return self._hash.hexdigest()
