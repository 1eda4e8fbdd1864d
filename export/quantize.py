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
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import ConversionFailed
from .layers import MULTIPLYING
from .low_precision import FLOAT, QUANTIZATION, checked, element_types, fresh, in_order, mark_layer, opset_of, raised

if TYPE_CHECKING:
    import onnx

# ONNX's number of the element type, and the first opset whose Q/DQ has it: FP16 scales and FP8 values came together.
FLOAT8 = 17
FLOAT8_OPSET = 19
# The first opset whose Q/DQ has an axis.
PER_CHANNEL_OPSET = 13
LARGEST_INT8, LARGEST_FP8 = 127.0, 448.0

ADDING = "Add"
QUANTIZING, DEQUANTIZING = QUANTIZATION


class QuantLayer(NamedTuple):
    """A node that can be quantised, and the torch layer that it computes.

    nth: which of several nodes with this layer and operator it is, from 1 on; 0 where it is the only one. All sums that
    one `forward` writes down have one layer, and so has a module that is called twice.
    """

    node: str
    layer: str
    operator: str
    nth: int = 0

    @property
    def name(self) -> str:
        """The layer, with its number where it is one of several."""
        return f"{self.layer}#{self.nth}" if self.nth else self.layer

    @property
    def key(self) -> tuple[str, str]:
        """What names the same layer in another export of the same network."""
        return self.name, self.operator


def quantizable(model: onnx.ModelProto, layers: Mapping[str, str]) -> list[QuantLayer]:
    """The layers that can be quantised, in the order of the graph: those with a weight, and additions of float tensors.

    `layers` names the torch layer of each node.
    Raises: ConversionFailed for a network that has 8-bit steps already, or an opset that has none for each channel.
    """
    own = next((node for node in model.graph.node if node.op_type in QUANTIZATION), None)
    if own is not None:
        raise ConversionFailed(
            f"node '{own.name}' ({own.op_type}) quantises already, and 8 bits are chosen for a network in FP32. Use "
            "--precision fp32, or give the network as it was before it was quantised."
        )
    if opset_of(model) < PER_CHANNEL_OPSET:
        raise ConversionFailed(
            f"the ONNX file is written in opset {opset_of(model)}, and 8-bit steps for each channel need "
            f"{PER_CHANNEL_OPSET} or later. Export it again."
        )
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == FLOAT}
    constants = {tensor.name for tensor in model.graph.initializer}
    types = element_types(model.graph)
    found = []
    for node in model.graph.node:
        floats = all(types.get(name) == FLOAT for name in node.input)
        multiplies = node.op_type in MULTIPLYING and node.input[1] in weights and _has_channels(node, weights)
        adds = node.op_type == ADDING and floats and not constants & {*node.input} and node.input[0] != node.input[1]
        if multiplies or adds:
            found.append(QuantLayer(node.name, layers.get(node.name, node.name), node.op_type))
    return _numbered(found)


def tensors_read(model: onnx.ModelProto, layers: Sequence[QuantLayer]) -> set[str]:
    """The tensors that these layers read, without weights: those whose reach has to be known."""
    constants = {tensor.name for tensor in model.graph.initializer}
    chosen = {layer.node for layer in layers}
    return {name for node in model.graph.node if node.name in chosen for name in node.input if name} - constants


def infinite(model: onnx.ModelProto, layers: Sequence[QuantLayer], finite: Collection[str]) -> dict[str, str]:
    """The nodes of `layers` that read what is not finite, with the reason: 8 bits would make finite numbers of it.

    `finite`: which of the tensors that `tensors_read` names held nothing else.
    """
    import onnx

    weights = (tensor for tensor in model.graph.initializer if tensor.data_type == FLOAT)
    held = {"", *finite, *(each.name for each in weights if np.isfinite(onnx.numpy_helper.to_array(each)).all())}
    chosen = {layer.node for layer in layers}
    reading = (node for node in model.graph.node if node.name in chosen and not held.issuperset(node.input))
    return {node.name: "it reads numbers that are not finite, and 8 bits hold none of those" for node in reading}


def excluded(layers: Sequence[QuantLayer], patterns: Sequence[str], *, first_last: bool) -> dict[str, str]:
    """Nodes that are not to be quantised, by name, with the reason: those of `patterns`, and the two ends.

    A pattern is a layer's name, or one with `*`; `add` is every sum of that name, `add#2` the second.
    `first_last`: also the first and the last layer with a weight.
    Raises: ValueError for a pattern that no layer has.
    """
    found = {}
    for pattern in patterns:
        meant = [each for each in layers if any(fnmatch.fnmatchcase(name, pattern) for name in (each.layer, each.name))]
        if not meant:
            names = ", ".join(dict.fromkeys(each.name for each in layers))
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
    _drop_unread(with_pairs.graph)
    if kind == "fp8":
        with_pairs = raised(with_pairs, FLOAT8_OPSET)
        _into_fp8(with_pairs)
    in_order(with_pairs.graph)
    _mark_pairs(with_pairs.graph, layers or {})
    return checked(with_pairs)


def _with_pairs(model: onnx.ModelProto, reaches: Mapping[str, float], nodes: Collection[str]) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData

    names = _Names(model)
    numbered = names.numbered(model)
    _part_weights(numbered.graph, nodes)
    ranges: dict[str, TensorData | tuple[Any, ...]] = {
        names.number[name]: TensorData(lowest=np.float32(-reach), highest=np.float32(reach))
        for name, reach in reaches.items()
    }
    operators = [*MULTIPLYING, ADDING]
    with contextlib.redirect_stdout(io.StringIO()):
        quantizer = QDQQuantizer(
            numbered,
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
    names.restore(found.graph)
    return found


class _Names:
    """Numbers for the tensors of a network while onnxruntime's quantizer has it, and its names afterwards.

    The quantizer calls what it makes of a tensor `x` `x_scale`, `x_zero_point` and so on, and takes a tensor of the
    network that happens to be called so for its own. The copy of a bias `x` that two layers read becomes `x0`, so that
    no name may be the beginning of another.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        held = [value.name for value in (*graph.input, *graph.initializer, *graph.output, *graph.value_info)]
        written = [name for node in graph.node for name in (*node.input, *node.output) if name]
        self._named = list(dict.fromkeys([*held, *written]))
        self._nodes = {node.name for node in graph.node}
        self.number = {name: f"t{number}." for number, name in enumerate(self._named)}

    def numbered(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of the network whose tensors go by their numbers."""
        model = copy.deepcopy(model)
        _rename(model.graph, self.number)
        return model

    def restore(self, graph: onnx.GraphProto) -> None:
        """Give each tensor its name, and each that was made of it one that is free."""
        taken = set(self._named)
        names = {number: name for name, number in self.number.items()}
        for node in graph.node:
            if node.op_type in QUANTIZATION and node.name not in self._nodes:
                node.name = fresh(self._behind(node.name), self._nodes)
            for tensor in (*node.input, *node.output):
                if tensor and tensor not in names:
                    names[tensor] = fresh(self._behind(tensor), taken)
        _rename(graph, names)

    def _behind(self, numbered: str) -> str:
        """The name of a tensor by its number, with what the quantizer has put behind that."""
        number = re.match(r"t(\d+)\.", numbered)
        assert number is not None, "the quantizer names what it makes after a tensor"
        return self._named[int(number[1])] + numbered[number.end() :]


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Call every tensor of the graph by its new name; one that has none keeps the old one."""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for tensors in (node.input, node.output):
            for place, name in enumerate(tensors):
                tensors[place] = names.get(name, name)


def _part_weights(graph: onnx.GraphProto, nodes: Collection[str]) -> None:
    """Give nodes that read one weight with their channels on other axes a weight each: a pair has one axis."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    own: dict[tuple[str, int], str] = {}
    for node in graph.node:
        if node.name not in nodes or node.op_type not in MULTIPLYING:
            continue
        weight, axis = node.input[1], _channel_axis(node)
        if (weight, 1 - axis) in own and (weight, axis) not in own:
            copied = graph.initializer.add()
            copied.CopyFrom(weights[weight])
            copied.name = f"{weight}_axis{axis}"
            own[weight, axis] = copied.name
        node.input[1] = own.setdefault((weight, axis), weight)


def _spare_others(graph: onnx.GraphProto, nodes: Collection[str]) -> None:
    """Every other node reads what it read before: the quantizer puts a lone reader's pair before all readers."""
    pairs = {node.output[0]: node for node in graph.node if node.op_type in QUANTIZATION}
    for node in graph.node:
        if node.name in nodes or node.op_type in QUANTIZATION:
            continue
        for place, name in enumerate(node.input):
            if name in pairs:
                node.input[place] = pairs[pairs[name].input[0]].input[0]


def _drop_unread(graph: onnx.GraphProto) -> None:
    """No pair stays that nobody reads: the quantizer makes one for each place of a node that reads a tensor twice."""
    while True:
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        unread = [node for node in graph.node if node.op_type in QUANTIZATION and node.output[0] not in read]
        if not unread:
            return
        for node in unread:
            graph.node.remove(node)


def _into_fp8(model: onnx.ModelProto) -> None:
    """Every int8 pair becomes an fp8 one: the same reach, whose end is now 448 steps away instead of 127."""
    import onnx
    from onnx import helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in QUANTIZATION]
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
        if node.op_type in QUANTIZATION and not node.metadata_props:
            end = reader[node.output[0]]
            if node.op_type == QUANTIZING:
                end = reader[end.output[0]]
            mark_layer(node, layers.get(end.name, ""))


def _numbered(layers: Sequence[QuantLayer]) -> list[QuantLayer]:
    """The layers with their numbers, where several have one name and operator."""
    total = Counter(each.key for each in layers)
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for each in layers:
        seen[each.key] += 1
        found.append(each._replace(nth=seen[each.key]) if total[each.key] > 1 else each)
    return found


def _has_channels(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether one axis of the node's weight holds all of its output channels.

    That of a transposed convolution in groups has none, nor has a stack of matrices, one for each entry of a batch.
    """
    if node.op_type == "ConvTranspose":
        return _integer(node, "group", default=1) == 1
    return node.op_type != "MatMul" or len(weights[node.input[1]].dims) == 2


def _channel_axis(node: onnx.NodeProto) -> int:
    """The axis of a multiplying node's weight that holds its output channels."""
    transposed = node.op_type == "Gemm" and _integer(node, "transB", default=0)
    return 0 if node.op_type == "Conv" or transposed else 1


def _integer(node: onnx.NodeProto, name: str, *, default: int) -> int:
    return next((each.i for each in node.attribute if each.name == name), default)
