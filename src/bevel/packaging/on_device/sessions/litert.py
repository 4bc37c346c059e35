"""LiteRT on the processor."""

from __future__ import annotations

from typing import Any

import numpy as np

PACKAGE = "ai-edge-litert"


class Session:
    """A .tflite file, loaded. Its input and output may be integers; here they are float."""

    def __init__(self, path: str, threads: int, precision: str) -> None:  # noqa: ARG002
        from importlib.metadata import version

        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_path=path, num_threads=threads)
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]
        self._output = self._interpreter.get_output_details()[0]
        self.version = "ai-edge-litert " + version("ai-edge-litert")

    def __call__(self, image: np.ndarray) -> Any:
        """The first output's values for one image, float32 (1, C, H, W)."""
        wanted = self._input["dtype"]
        if np.issubdtype(wanted, np.integer):
            scale, zero = self._input["quantization"]
            limits = np.iinfo(wanted)
            image = np.clip(np.rint(image / scale) + zero, limits.min, limits.max)
        self._interpreter.set_tensor(self._input["index"], image.astype(wanted))
        self._interpreter.invoke()
        values = self._interpreter.get_tensor(self._output["index"]).ravel()
        if np.issubdtype(values.dtype, np.integer):
            scale, zero = self._output["quantization"]
            values = (values.astype(np.float32) - zero) * np.float32(scale)
        return values
