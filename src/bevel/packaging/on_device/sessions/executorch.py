"""ExecuTorch on the processor."""

from __future__ import annotations

from typing import Any

import numpy as np

PACKAGE = "executorch"


class Session:
    """A .pte file, loaded."""

    def __init__(self, path: str, threads: int, precision: str) -> None:  # noqa: ARG002
        from importlib.metadata import version

        import torch
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        if portable_lib._threadpool_get_thread_count() != threads:
            portable_lib._unsafe_reset_threadpool(threads)
        self._tensor = torch.from_numpy
        self._program = Runtime.get().load_program(path)
        self._method = self._program.load_method("forward")
        self.version = "executorch " + version("executorch")

    def __call__(self, image: np.ndarray) -> Any:
        """The first output's values for one image, float32 (1, C, H, W)."""
        return self._method.execute([self._tensor(image)])[0].numpy().ravel()
