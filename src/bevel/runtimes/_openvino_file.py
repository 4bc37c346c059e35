"""An OpenVINO model as one zip file: the same model gives the same bytes."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import onnx
import openvino

from bevel.core.errors import ExportError, one_line
from bevel.core.quiet import quiet

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every member."""


def from_onnx(model: onnx.ModelProto) -> openvino.Model:
    """The model in OpenVINO's form.

    Raises:
        ExportError: OpenVINO does not have an operator.
    """
    try:
        with quiet():
            found: openvino.Model = openvino.Core().read_model(model.SerializeToString())
    except RuntimeError as error:
        raise ExportError(
            f"OpenVINO does not take the network: {one_line(error, 200)}; export for another "
            "runtime"
        ) from error
    return found


def write(model: openvino.Model, path: Path, arithmetic: str, *, half: bool = False) -> None:
    """Write the file.

    Args:
        model: what to write.
        path: where.
        arithmetic: OpenVINO's inference precision: f32, bf16 or f16.
        half: store float weights in 16 bits.
    """
    outside = {name for port in (*model.inputs, *model.outputs) for name in port.names}
    with tempfile.TemporaryDirectory(prefix="bevel-") as name:
        xml = Path(name) / "model.xml"
        with quiet():
            if half:
                openvino.save_model(model, xml, compress_to_fp16=True)
            else:
                openvino.serialize(model, xml)
        members = {
            "model.xml": (_clean(xml.read_bytes(), arithmetic, outside), zipfile.ZIP_DEFLATED),
            "model.bin": (xml.with_suffix(".bin").read_bytes(), zipfile.ZIP_STORED),
        }
        with zipfile.ZipFile(path, "w") as archive:
            for member, (content, compression) in members.items():
                archive.writestr(zipfile.ZipInfo(member, EPOCH), content, compression)


def _clean(xml: bytes, arithmetic: str, outside: set[str]) -> bytes:
    """Drop what differs from process to process, and say in which precision to compute.

    Args:
        xml: the description that OpenVINO wrote.
        arithmetic: OpenVINO's inference precision.
        outside: names of inputs and outputs; tensors within lose theirs.
    """
    root = ElementTree.fromstring(xml)  # noqa: S314 - OpenVINO has just written it
    for parent in list(root.iter()):
        for child in parent.findall("rt_info"):
            parent.remove(child)
    root.set("name", "network")
    for layer in root.iter("layer"):
        name, kind = layer.get("name", ""), layer.get("type", "")
        if kind not in ("Parameter", "Result") and not name.startswith("node_"):
            layer.set("name", f"{kind}_{layer.get('id')}")
    for port in root.iter("port"):
        if port.get("names") not in outside:
            port.attrib.pop("names", None)
    information = ElementTree.SubElement(ElementTree.SubElement(root, "rt_info"), "bevel")
    ElementTree.SubElement(information, "inference_precision", value=arithmetic)
    cleaned: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return cleaned
