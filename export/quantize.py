"""Q/DQ pairs in an ONNX graph: which layers can be quantised, and the graph with those that are chosen.

onnxruntime's quantizer writes the pairs, for TensorRT: symmetric, per channel of a weight, a pair of its own before
every reader, weights left in float before their pair, biases left alone. With the quantizer's defaults TensorRT-RTX
refuses the int32 biases; with shared pairs or without the weights' Q it builds nothing.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import io
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .low_precision import FLOAT, checked, element_types, in_order, mark_layer, raised

if TYPE_CHECKING:
    import onnx

# ONNX's number of the element type, and the first opset whose Q/DQ has it: FP16 scales and FP8 values came together.
FLOAT8 = 17
FLOAT8_OPSET = 19
LARGEST_INT8, LARGEST_FP8 = 127.0, 448.0

MULTIPLYING = ("Conv", "ConvTranspose", "Gemm", "MatMul")
ADDING = "Add"
QUANTIZING, DEQUANTIZING = "QuantizeLinear", "DequantizeLinear"


class QuantLayer(NamedTuple):
    """A node that can be quantised, and the torch layer that it computes."""

    node: str
    layer: str
    operator: str

    @property
    def key(self) -> tuple[str, str]:
        """What names the same layer in another export of the same network."""
        return self.layer, self.operator


def quantizable(model: onnx.ModelProto, layers: Mapping[str, str]) -> list[QuantLayer]:
    """The layers that can be quantised, in the order of the graph: those with a weight, and additions of float tensors.

    `layers` names the torch layer of each node.
    """
    weights = {tensor.name for tensor in model.graph.initializer if tensor.data_type == FLOAT}
    constants = {tensor.name for tensor in model.graph.initializer}
    types = element_types(model.graph)
    found = []
    for node in model.graph.node:
        floats = all(types.get(name) == FLOAT for name in node.input)
        multiplies = node.op_type in MULTIPLYING and node.input[1] in weights and not _grouped_transpose(node)
        adds = node.op_type == ADDING and floats and not constants & {*node.input} and node.input[0] != node.input[1]
        if multiplies or adds:
            found.append(QuantLayer(node.name, layers.get(node.name, node.name), node.op_type))
    return found


def tensors_read(model: onnx.ModelProto, layers: Sequence[QuantLayer]) -> set[str]:
    """The tensors that these layers read, without weights: those whose reach has to be known."""
    constants = {tensor.name for tensor in model.graph.initializer}
    chosen = {layer.node for layer in layers}
    return {name for node in model.graph.node if node.name in chosen for name in node.input if name} - constants


def excluded(layers: Sequence[QuantLayer], patterns: Sequence[str], *, first_last: bool) -> dict[str, str]:
    """Nodes that are not to be quantised, by name, with the reason: those of `patterns`, and the two ends.

    A pattern is a layer's name, or one with `*`. `first_last`: also the first and the last layer with a weight.
    Raises: ValueError for a pattern that no layer has.
    """
    found = {}
    for pattern in patterns:
        meant = [each for each in layers if fnmatch.fnmatchcase(each.layer, pattern)]
        if not meant:
            names = ", ".join(dict.fromkeys(each.layer for each in layers))
            raise ValueError(
                f"quantize.exclude: no layer that can be quantised is named '{pattern}'. There are: {names}."
            )
        found |= {each.node: "quantize.exclude names it" for each in meant}
    weighted = [each for each in layers if each.operator in MULTIPLYING]
    if first_last and weighted:
        found |= {weighted[0].node: "it is the first layer", weighted[-1].node: "it is the last layer"}
    return found


def quantized(
    model: onnx.ModelProto,
    reaches: Mapping[str, float],
    nodes: Collection[str],
    *,
    kind: str = "int8",
    layers: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """The network with Q/DQ pairs on all that `nodes` read: in int8, or in fp8 (E4M3) with the same reach.

    `reaches`: the largest magnitude that the 8 bits of each tensor stand for (`calibrate.reaches`).
    """
    if not nodes:
        return copy.deepcopy(model)
    with_pairs = _with_pairs(model, reaches, nodes)
    _spare_others(with_pairs.graph, nodes)
    if kind == "fp8":
        with_pairs = raised(with_pairs, FLOAT8_OPSET)
        _into_fp8(with_pairs)
    in_order(with_pairs.graph)
    _mark_pairs(with_pairs.graph, layers or {})
    return checked(with_pairs)


def _with_pairs(model: onnx.ModelProto, reaches: Mapping[str, float], nodes: Collection[str]) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData

    ranges: dict[str, TensorData | tuple[Any, ...]] = {
        name: TensorData(lowest=np.float32(-reach), highest=np.float32(reach)) for name, reach in reaches.items()
    }
    operators = [*MULTIPLYING, ADDING]
    with contextlib.redirect_stdout(io.StringIO()):
        quantizer = QDQQuantizer(
            copy.deepcopy(model),
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
            nodes_to_quantize=sorted(nodes),
            nodes_to_exclude=[],
            op_types_to_quantize=operators,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "AddQDQPairToWeight": True,
                "DedicatedQDQPair": True,
                "QuantizeBias": False,
                "QDQDisableWeightAdjustForInt32Bias": True,  # a weight's scale is its own where no bias is quantised
                "OpTypesToExcludeOutputQuantization": operators,  # what is read is quantised, by each of its readers
            },
        )
        quantizer.quantize_model()
    found = quantizer.model.model
    found.producer_name, found.producer_version = model.producer_name, model.producer_version
    del found.metadata_props[:]
    found.metadata_props.extend(model.metadata_props)
    return found


def _spare_others(graph: onnx.GraphProto, nodes: Collection[str]) -> None:
    """Every other node reads what it read before: the quantizer puts a lone reader's pair before all readers."""
    pairs = {node.output[0]: node for node in graph.node if node.op_type in (QUANTIZING, DEQUANTIZING)}
    for node in graph.node:
        if node.name in nodes or node.op_type in (QUANTIZING, DEQUANTIZING):
            continue
        for place, name in enumerate(node.input):
            if name in pairs:
                node.input[place] = pairs[pairs[name].input[0]].input[0]


def _into_fp8(model: onnx.ModelProto) -> None:
    """Every int8 pair becomes an fp8 one: the same reach, whose end is now 448 steps away instead of 127."""
    import onnx
    from onnx import helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in (QUANTIZING, DEQUANTIZING)]
    for name in dict.fromkeys(node.input[1] for node in pairs):
        scale = onnx.numpy_helper.to_array(tensors[name]) * np.float32(LARGEST_INT8 / LARGEST_FP8)
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(scale, name))
    for name in dict.fromkeys(node.input[2] for node in pairs):
        shape = list(tensors[name].dims)
        size = int(np.prod(shape, dtype=np.int64))
        tensors[name].CopyFrom(helper.make_tensor(name, FLOAT8, shape, bytes(size), raw=True))
    quantised = {node.output[0] for node in pairs if node.op_type == QUANTIZING}
    for value in model.graph.value_info:
        if value.name in quantised:
            value.type.tensor_type.elem_type = FLOAT8


def _mark_pairs(graph: onnx.GraphProto, layers: Mapping[str, str]) -> None:
    """Each pair belongs to the layer that reads it."""
    reader = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type in (QUANTIZING, DEQUANTIZING) and not node.metadata_props:
            end = reader[node.output[0]]
            if node.op_type == QUANTIZING:
                end = reader[end.output[0]]
            mark_layer(node, layers.get(end.name, ""))


def _grouped_transpose(node: onnx.NodeProto) -> bool:
    """A transposed convolution in groups: its weight has no axis that holds all of its output channels."""
    groups = next((each.i for each in node.attribute if each.name == "group"), 1)
    return node.op_type == "ConvTranspose" and groups > 1
