"""How far rounding alone moves a network's outputs, and whether a 16-bit file is wrong in anything else.

Networks differ: one and the same rounding costs a trained ResNet a thousandth of its outputs, and an efficientnet with
random weights a third of them. So a file is judged without its roundings, and an engine beside the file's own.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .agree import compare_outputs, require_agreement
from .layers import MULTIPLYING
from .low_precision import BFLOAT16, FLOAT, FLOAT16, SIXTEEN_BITS, checked, element_types, values_of
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
    agreement = compare_outputs(Reference(exact).outputs(images), outputs)
    require_agreement(agreement, what=f"{file.name} without its roundings")


def unrounded(low: onnx.ModelProto, exact: onnx.ModelProto) -> onnx.ModelProto:
    """A network in FP16 or BF16 as one in FP32 that rounds nothing: casts pass on what they read, and a weight that is
    the rounded one of `exact` has its bits back. Any other weight stays as it is."""
    import onnx

    model = copy.deepcopy(low)
    weights = {tensor.name: tensor for tensor in exact.graph.initializer if tensor.data_type == FLOAT}
    for tensor in model.graph.initializer:
        if tensor.data_type in SIXTEEN_BITS:
            values = _before_rounding(tensor, weights.get(tensor.name))
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for attribute in (each for node in model.graph.node if node.op_type == "Cast" for each in node.attribute):
        if attribute.name == "to" and attribute.i in SIXTEEN_BITS:
            attribute.i = FLOAT
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type in SIXTEEN_BITS:
            value.type.tensor_type.elem_type = FLOAT
    return checked(model)


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
    factor = onnx.numpy_helper.from_array(np.array(TF32_SPLIT, np.float32), "tf32_split")
    model.graph.initializer.append(factor)
    nodes, rounded = [], set()
    for node in model.graph.node:
        factors = node.input[:2] if node.op_type in MULTIPLYING else ()
        for place, name in enumerate(factors):
            if types.get(name) != FLOAT:
                continue
            scaled, rest, high = f"{name}_tf32_scaled", f"{name}_tf32_rest", f"{name}_tf32"
            if name not in rounded:
                rounded.add(name)
                nodes.append(helper.make_node("Mul", [name, factor.name], [scaled]))
                nodes.append(helper.make_node("Sub", [scaled, name], [rest]))
                nodes.append(helper.make_node("Sub", [scaled, rest], [high]))
            node.input[place] = high
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _before_rounding(tensor: onnx.TensorProto, exact: onnx.TensorProto | None) -> np.ndarray:
    """The values of `exact` where the 16-bit tensor is what rounding makes of them, else the tensor's own."""
    import onnx

    stored = values_of(tensor)
    if exact is None or tuple(exact.dims) != stored.shape:
        return stored
    values = onnx.numpy_helper.to_array(exact)
    step = HALF_STEP if tensor.data_type == FLOAT16 else 0.0
    return values if np.allclose(stored, values, rtol=HALF_UNIT[tensor.data_type], atol=step) else stored
