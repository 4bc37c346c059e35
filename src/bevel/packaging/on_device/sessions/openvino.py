"""OpenVINO on the processor."""

from __future__ import annotations

from typing import Any

import numpy as np

PACKAGE = "openvino"


class Session:
    """An OpenVINO model in a zip file, compiled for one image at a time."""

    def __init__(self, path: str, threads: int, precision: str) -> None:
        import tempfile
        import zipfile

        import openvino

        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(path) as archive:
                for member in ("model.xml", "model.bin"):
                    archive.extract(member, folder)
            core = openvino.Core()
            # Read into memory, because the folder goes away.
            core.set_property({"ENABLE_MMAP": False})
            model = core.read_model(folder + "/model.xml")
        port = model.inputs[0]
        model.reshape({port: [1, *list(port.get_partial_shape())[1:]]})
        # Left alone it computes in 16 bits where the processor can; the report's file did not.
        hint = {"bfloat16": "bf16", "float16": "f16"}.get(precision, "f32")
        settings = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        settings.update({"INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": "1"})
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        self.version = "openvino " + openvino.__version__.split("-")[0]

    def __call__(self, image: np.ndarray) -> Any:
        """The first output's values for one image, float32 (1, C, H, W)."""
        return np.array(self._request.infer([image])[0]).ravel()
