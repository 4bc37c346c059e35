"""ONNX Runtime on the processor."""

from __future__ import annotations

from typing import Any

import numpy as np

PACKAGE = "onnxruntime"


class Session:
    """An ONNX file, loaded."""

    def __init__(self, path: str, threads: int, precision: str) -> None:  # noqa: ARG002
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self._name = self._session.get_inputs()[0].name
        self.version = "onnxruntime " + str(onnxruntime.__version__)

    def __call__(self, image: np.ndarray) -> Any:
        """The first output's values for one image, float32 (1, C, H, W)."""
        return self._session.run(None, {self._name: image})[0].ravel()
