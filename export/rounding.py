"""How far rounding alone moves a network's outputs, and whether a 16-bit file is wrong in anything else.

Networks differ: one and the same rounding costs a trained ResNet a thousandth of its outputs, and an efficientnet with
random weights a third of them. So a file is judged without its roundings, and an engine beside the file's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .agree import compare_outputs, require_agreement
from .errors import ParityFailed
from .layers import MULTIPLYING
from .low_precision import (
    BFLOAT16,
    FLOAT,
    FLOAT16,
    QUANTIZATION,
    SIXTEEN_BITS,
    element_types,
    emulated,
    fresh,
    values_of,
)
from .precision import Reference

if TYPE_CHECKING:
    import onnx

# Rounding to the nearest moves a number by so much of itself at most, and below FP16's normal numbers by half a step.
HALF_UNIT = {FLOAT16: 2.0**-11, BFLOAT16: 2.0**-8}
HALF_STEP = 2.0**-25
# Multiplied by this and split (Veltkamp), a float32 keeps 11 of its 24 bits: what tensor cores read of it in TF32.
TF32_SPLIT = 2.0**13 + 1


def require_same_network(file: Path, exact: onnx.ModelProto, images: np.ndarray) -> None:
    """Nothing, if `file`, in 16 bits, gives the outputs of the FP32 network `exact` once its roundings are taken out.

    The limits are those of FP32, whatever rounding costs this network.
    Cost: both networks once on the images (N, C, H, W).
    Raises: ParityFailed.
    """
    import onnx

    outputs = Reference(unrounded(onnx.load(file), exact)).outputs(images)
    expected = Reference(unrounded(exact, exact)).outputs(images)
    require_agreement(compare_outputs(expected, outputs), what=f"{file.name} without its roundings")


def require_no_overflow(file: Path, exact: onnx.ModelProto, judge: Callable[[Reference], np.ndarray]) -> None:
    """Nothing, if a file in 16 bits whose outputs are far from those of `exact` on more images owes that to rounding.

    `judge` gives a network's outputs for those images, (N, K).
    Raises: ParityFailed where numbers overflow on them that did not on those that the file was made by.
    """
    import onnx

    outputs, expected = (judge(Reference(unrounded(model, exact))) for model in (onnx.load(file), exact))
    try:
        require_agreement(compare_outputs(expected, outputs), what=file.name)
    except ParityFailed as err:
        raise ParityFailed(
            f"{file.name}: numbers overflow on the evaluation images that did not on those it was calibrated on, and "
            "its outputs are wrong by it. Raise quantize.images, or leave this precision out."
        ) from err


def unrounded(low: onnx.ModelProto, exact: onnx.ModelProto) -> onnx.ModelProto:
    """A network in FP16 or BF16 as one in FP32 that rounds nothing, and overflows where the other does.

    A weight that is the rounded one of `exact` has its bits back; any other stays as it is.
    """
    import onnx
    from onnx import helper

    weights = {tensor.name: tensor for tensor in exact.graph.initializer if tensor.data_type == FLOAT}
    scales = {node.input[1] for node in low.graph.node if node.op_type in QUANTIZATION}
    stored = {tensor.name: tensor for tensor in low.graph.initializer if tensor.data_type in SIXTEEN_BITS}
    model = emulated(copy.deepcopy(low))
    for tensor in model.graph.initializer:
        if (name := tensor.name) in stored:
            values = _before_rounding(stored[name], weights.get(name), scale=name in scales)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    taken = {name for node in model.graph.node for name in node.output}
    rounded = {node.output[0]: node.input[0] for node in model.graph.node if _cast_to(node) in SIXTEEN_BITS}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type == "Cast" and node.input[0] in rounded:  # back to FP32
            name, exactly = node.output[0], rounded[node.input[0]]
            node.output[0], infinite = fresh(f"{name}_rounded", taken), fresh(f"{name}_infinite", taken)
            nodes.append(helper.make_node("IsInf", [node.output[0]], [infinite]))
            nodes.append(helper.make_node("Where", [infinite, node.output[0], exactly], [name]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def tf32_outputs(file: Path, images: np.ndarray) -> np.ndarray:
    """What an FP32 network gives where it multiplies in TF32, as a GPU may.

    Shapes: (N, C, H, W) -> (N, K).
    """
    import onnx

    return Reference(in_tf32(onnx.load(file))).outputs(images)


def in_tf32(model: onnx.ModelProto) -> onnx.ModelProto:
    """A network in FP32 that rounds what it multiplies to the 11 bits of TF32, and adds up in FP32."""
    import onnx
    from onnx import helper

    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    types = element_types(model.graph)
    taken = set(types)
    factor = onnx.numpy_helper.from_array(np.array(TF32_SPLIT, np.float32), fresh("tf32_split", taken))
    model.graph.initializer.append(factor)
    nodes: list[onnx.NodeProto] = []
    rounded: dict[str, str] = {}
    for node in model.graph.node:
        factors = node.input[:2] if node.op_type in MULTIPLYING else ()
        for place, name in enumerate(factors):
            if types.get(name) != FLOAT:
                continue
            if name not in rounded:
                scaled, rest, high = (fresh(f"{name}_tf32{part}", taken) for part in ("_scaled", "_rest", ""))
                rounded[name] = high
                nodes.append(helper.make_node("Mul", [name, factor.name], [scaled]))
                nodes.append(helper.make_node("Sub", [scaled, name], [rest]))
                nodes.append(helper.make_node("Sub", [scaled, rest], [high]))
            node.input[place] = rounded[name]
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _cast_to(node: onnx.NodeProto) -> int | None:
    """The type that a node casts to; None for a node that does something else."""
    return next((each.i for each in node.attribute if each.name == "to"), None) if node.op_type == "Cast" else None


def _before_rounding(tensor: onnx.TensorProto, exact: onnx.TensorProto | None, *, scale: bool) -> np.ndarray:
    """The values of `exact` where the 16-bit tensor is what rounding makes of them, else the tensor's own.

    scale: whether it is the width of 8-bit steps, which is rounded up.
    """
    import onnx

    stored = values_of(tensor)
    if exact is None or tuple(exact.dims) != stored.shape:
        return stored
    values = onnx.numpy_helper.to_array(exact)
    whole = 2 if scale else 1
    step = HALF_STEP if tensor.data_type == FLOAT16 else 0.0
    close = np.allclose(stored, values, rtol=whole * HALF_UNIT[tensor.data_type], atol=whole * step, equal_nan=True)
    return values if close else stored
