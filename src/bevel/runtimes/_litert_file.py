"""From a `torch.export` program to a .tflite file, in any of LiteRT's precisions."""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from ai_edge_litert.tools import flatbuffer_utils as tflite
from ai_edge_quantizer import qtyping
from ai_edge_quantizer.quantizer import AlgorithmName, Quantizer
from litert_torch import convert as litert_convert
from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
from litert_torch.quantize.quant_config import QuantConfig
from torch import Tensor
from torch.export import ExportedProgram

from bevel.core.errors import FORWARD_FAULTS, ExportError, one_line
from bevel.core.progress import track
from bevel.core.quiet import quiet
from bevel.core.recipe import Quantization
from bevel.quantization.pt2e import quantize
from bevel.runtimes._choice import choose, single_images
from bevel.runtimes._litert_layout import code_of, fold_pads
from bevel.runtimes._xnnpack import REWRITES, XnnpackQuantizer, name_quantizer
from bevel.runtimes.litert import open_session

aten = torch.ops.aten
Op = qtyping.TFLOperationName

TORCH = "torchao PT2E"
NATIVE = "ai-edge-quantizer"
SIGNATURE = "serving_default"
WEIGHTED = (Op.CONV_2D, Op.DEPTHWISE_CONV_2D, Op.CONV_2D_TRANSPOSE, Op.FULLY_CONNECTED)

SAME_SCALE = (aten.avg_pool2d.default,)
"""LiteRT's pooling kernels demand it; a mean over the whole image is another operator."""


def write(
    program: ExportedProgram,
    example_inputs: tuple[Tensor, ...],
    precision: str,
    calibration: Iterable[Any],
    options: Quantization,
    path: Path,
) -> str | None:
    """Write the file; returns which quantizer made it, if any.

    Raises:
        ExportError: an operator has no LiteRT form, or calibration is empty or does not fit.
    """
    images = tuple(tensor[:1] for tensor in example_inputs)
    if precision == "int8" and options.quantizer == "torch":
        path.write_bytes(_torch_int8(program, images, calibration, options))
        return name_quantizer(TORCH, options)
    whole = _converted(program.module(), images)
    if precision == "float32":
        path.write_bytes(finished(whole))
        return None
    if precision in ("float16", "int8-weights"):
        path.write_bytes(_packed(whole, precision, options))
        return None if precision == "float16" else f"{NATIVE}: int8 weights per channel"
    native = _native_int8(whole, program, calibration, options)
    if options.quantizer == "native":
        path.write_bytes(native)
        return _name_native()
    files = {TORCH: _torch_int8(program, images, calibration, options), NATIVE: native}
    with tempfile.TemporaryDirectory(prefix="bevel-") as folder:
        sessions = {}
        for name, content in {"float": whole, **files}.items():
            place = Path(folder) / f"{name}.tflite"
            place.write_bytes(content)
            sessions[name] = open_session(place, 1)
        reference = sessions.pop("float")
        count = len(program.graph_signature.user_inputs)
        chosen, why = choose(sessions, reference, calibration, count)
    path.write_bytes(files[chosen])
    return f"{name_quantizer(TORCH, options) if chosen == TORCH else _name_native()}; {why}"


def _name_native() -> str:
    return name_quantizer(NATIVE, Quantization())  # it knows no ranges but min-max


def _converted(
    net: torch.nn.Module, images: tuple[Tensor, ...], config: QuantConfig | None = None
) -> bytes:
    """The content of a .tflite file."""
    try:
        with quiet(), torch.no_grad():
            content: bytes = litert_convert(net, images, quant_config=config).model_content()
    except FORWARD_FAULTS as error:
        raise ExportError(
            f"the network has no LiteRT form: {one_line(error, 200).rstrip('.')}. Replace the "
            "operator it names, or export for another runtime"
        ) from error
    return content


def _torch_int8(
    program: ExportedProgram,
    images: tuple[Tensor, ...],
    calibration: Iterable[Any],
    options: Quantization,
) -> bytes:
    """Quantized by bevel on the torch side."""
    quantizer = XnnpackQuantizer(options.ranges, same_scale=SAME_SCALE)
    integers = quantize(
        program, quantizer, calibration, options, fold_weights=False, rewrites=REWRITES
    )
    # The converter only asks it whether ranges are static.
    static = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    return finished(_converted(integers, images, QuantConfig(pt2e_quantizer=static)))


def _native_int8(
    whole: bytes, program: ExportedProgram, calibration: Iterable[Any], options: Quantization
) -> bytes:
    """Quantized by LiteRT's own quantizer: every operator that it knows."""
    if options.quantizer == "native":
        for name in ("equalize", "correct_bias", "learn_rounding"):
            if getattr(options, name):
                raise ExportError(f"{NATIVE} has no {name}; use quantizer: torch")
    quantizer = Quantizer(whole)
    quantizer.add_static_config(".*", Op.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
    _keep_float(quantizer, options)
    count = len(program.graph_signature.user_inputs)
    ranges: Any = None
    try:
        for batch in track(calibration, "calibrate"):
            feeds = [
                {f"args_{index}": array for index, array in enumerate(image)}
                for image in single_images([batch], count)
            ]
            with quiet():
                ranges = quantizer.calibrate({SIGNATURE: feeds}, ranges, num_threads=1)
        if ranges is None:
            raise ExportError("int8 needs calibration images and got none")
        with quiet():
            result = quantizer.quantize(ranges, enable_progress_report=False)
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"{NATIVE} refuses the network: {one_line(error, 200)}") from error
    return finished(bytes(result.quantized_model))


def _packed(whole: bytes, precision: str, options: Quantization) -> bytes:
    """The same network with its weights stored in fewer bits."""
    quantizer = Quantizer(whole)
    half = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(
            num_bits=16, dtype=qtyping.TensorDataType.FLOAT
        ),
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    for kind in WEIGHTED:
        if precision == "float16":
            quantizer.update_quantization_recipe(".*", kind, half, AlgorithmName.FLOAT_CASTING)
        else:
            quantizer.add_weight_only_config(".*", kind, num_bits=8)
    _keep_float(quantizer, options)
    with quiet():
        result = quantizer.quantize(enable_progress_report=False)
    return finished(bytes(result.quantized_model))


def _keep_float(quantizer: Quantizer, options: Quantization) -> None:
    """Leave modules out: the converter puts their names into those of the tensors."""
    for pattern in options.keep_float:
        name = fnmatch.translate(pattern).removeprefix("(?s:").removesuffix(r")\Z")
        quantizer.update_quantization_recipe(
            rf".*_{name}[/;].*", Op.ALL_SUPPORTED, algorithm_key=AlgorithmName.NO_QUANTIZE
        )


def finished(content: bytes) -> bytes:
    """A file without loose paddings, float where it is entered and left, and in its hard swishes.

    The converter makes hard swish an operator on integers wherever it can. XNNPACK does not take
    that one and LiteRT's own kernel is far slower, so it is written in float again.
    """
    model = tflite.read_model_from_bytearray(bytearray(content))
    fold_pads(model)
    graph = model.subgraphs[0]
    codes, types = tflite.schema_fb.BuiltinOperator, tflite.schema_fb.TensorType
    operators = []
    for operator in graph.operators:
        (source, *_), (result, *_) = operator.inputs, operator.outputs
        if code_of(model, operator) != codes.HARD_SWISH or graph.tensors[source].type != types.INT8:
            operators.append(operator)
            continue
        operator.inputs = [_float_twin(graph, source, "_float")]
        operator.outputs = [_float_twin(graph, result, "_float")]
        operators += [
            _conversion(model, codes.DEQUANTIZE, source, operator.inputs[0]),
            operator,
            _conversion(model, codes.QUANTIZE, operator.outputs[0], result),
        ]
    for position, index in enumerate(graph.inputs):
        if graph.tensors[index].type == types.INT8:
            new = _float_twin(graph, index)
            operators.insert(0, _conversion(model, codes.QUANTIZE, new, index))
            _redirect(model, graph.inputs, position, index, new, "inputs")
    for position, index in enumerate(graph.outputs):
        if graph.tensors[index].type == types.INT8:
            new = _float_twin(graph, index)
            operators.append(_conversion(model, codes.DEQUANTIZE, index, new))
            _redirect(model, graph.outputs, position, index, new, "outputs")
    graph.operators = operators
    return bytes(tflite.convert_object_to_bytearray(model))


def _float_twin(graph: Any, index: int, suffix: str = "") -> int:
    """Add a float32 tensor like another one; without a suffix it takes the other's name."""
    old = graph.tensors[index]
    new = tflite.schema_fb.TensorT()
    new.shape, new.shapeSignature = old.shape, old.shapeSignature
    new.type = tflite.schema_fb.TensorType.FLOAT32
    name = old.name.decode() if isinstance(old.name, bytes) else old.name
    new.name = f"{name}{suffix}".encode()
    if not suffix:
        old.name = f"{name}_int8".encode()
    graph.tensors.append(new)
    return len(graph.tensors) - 1


def _conversion(model: Any, code: int, source: int, result: int) -> Any:
    """An operator that quantizes or dequantizes one tensor."""
    codes = model.operatorCodes
    number = next((i for i, known in enumerate(codes) if known.builtinCode == code), None)
    if number is None:
        made = tflite.schema_fb.OperatorCodeT()
        made.builtinCode = made.deprecatedBuiltinCode = code
        made.version = 1
        codes.append(made)
        number = len(codes) - 1
    operator = tflite.schema_fb.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = number, [source], [result]
    return operator


def _redirect(model: Any, ends: Any, position: int, old: int, new: int, kind: str) -> None:
    """Make the new tensor the file's input or output, in its signatures too."""
    ends[position] = new
    for signature in model.signatureDefs or ():
        for entry in getattr(signature, kind):
            if entry.tensorIndex == old:
                entry.tensorIndex = new
