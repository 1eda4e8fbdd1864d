"""A network in 16 bits: the tensors of an ONNX graph in FP16 or BF16, except where that would lose too much.

onnxruntime ships a converter of its own (onnxruntime.transformers.float16). It is not used: where two nodes that stay
in FP32 read one tensor it writes the same name twice, it leaves its casts out of order, and it knows no BF16.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from .errors import ConversionFailed
from .onnx_graph import NAME_SCOPES

if TYPE_CHECKING:
    import onnx

# ONNX's numbers of element types.
FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16
ELEMENT_TYPES = {"fp16": FLOAT16, "bf16": BFLOAT16}
SIXTEEN_BITS = {number: name for name, number in ELEMENT_TYPES.items()}
TYPE_NAMES = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}
# The first opset in which convolutions and poolings may be BF16.
BF16_OPSET = 22

# The largest FP16 number, and how much of it a value seen on some images may take: others may go further.
LARGEST_FP16 = 65504.0
HEADROOM = 2.0
# The smallest FP16 number with all of its 11 bits; a tensor whose largest value lies below loses bits, and then all.
SMALLEST_FP16 = 2.0**-14
# FP16 numbers below are 2^-24 apart: a step of 8 bits that is smaller than this becomes more than an eighth too wide.
SMALLEST_STEP = 2.0**-21
# Weights that lose more than so much of their norm lie below what FP16 holds; rounding alone costs at most 2^-11.
MOST_LOST = 2.0**-8
# A running sum of equal numbers in 11 bits stops growing at 2048 of them, and is off by an eighth of a step at 256.
MOST_TERMS = 256

EXPONENTIAL = "it spans more powers of two than 16 bits hold exactly"
NORMALISING = "it squares and sums what it reads"
RESAMPLING = "it computes positions, which 16 bits round"
# Not a batch norm, which multiplies and adds constants of each channel once the network is trained.
FRAGILE = {
    **dict.fromkeys(("Exp", "Log", "LogSoftmax", "Pow", "Reciprocal", "Softmax", "Softplus"), EXPONENTIAL),
    **dict.fromkeys(
        (
            *("GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization", "LRN"),
            *("MeanVarianceNormalization", "RMSNormalization"),
            *("ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "ReduceSumSquare"),
        ),
        NORMALISING,
    ),
    **dict.fromkeys(("CumSum", "GridSample", "Resize", "RoiAlign", "Upsample"), RESAMPLING),
}
SUMMING = ("AveragePool", "GlobalAveragePool", "ReduceL1", "ReduceMean", "ReduceSum")
# Operators that read a constant as a bound: infinity instead of a huge number bounds the same.
BOUNDED = ("Clip", "Max", "Min", "Pad", "Where")
# Operators that keep what they read from zero by a tiny constant, one number for all.
LIFTING = ("Add", "Clip", "Max", "Where")
# Operators that pass on what they read, or its root: what was kept from zero is still near it behind them.
CARRYING = ("Expand", "Flatten", "Identity", "Reshape", "Sqrt", "Squeeze", "Tile", "Transpose", "Unsqueeze")
# FP16 rounds what is smaller to zero.
FLUSHED = 2.0**-25
# What TensorRT (RTX 1.7.1) does not build though ONNX has it.
UNREAD = {"bf16": ("ConvTranspose", "HardSwish", "Mish")}
# Operators whose third input is added to what they multiply.
BIASED = ("Conv", "ConvTranspose", "Gemm")
QUANTIZATION = ("QuantizeLinear", "DequantizeLinear")


class Kept(BaseModel):
    """A node that computes in FP32 in a file of another precision, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: str
    operator: str
    reason: str


def lowered(
    model: onnx.ModelProto, kind: str, *, keep: Mapping[str, str] | None = None, layers: Mapping[str, str] | None = None
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The network with its float tensors in `kind` (fp16 or bf16), and the nodes that stay in FP32 with the reason.

    Inputs and outputs stay FP32: casts stand behind and before them. `keep`: nodes that stay besides, by name. `layers`
    names the torch layer of each node, for the casts. Nodes must have names (`prepared`).
    Raises: ConversionFailed for a graph with branches or loops.
    """
    model = raised(model, BF16_OPSET) if kind == "bf16" else copy.deepcopy(model)
    types = element_types(model.graph)
    kept = _kept_nodes(model, kind, keep or {}, types)
    low = {node.name for node in model.graph.node if _computes_floats(node, types)} - kept.keys()
    _Rewiring(model.graph, kind, low, types, opset_of(model), layers or {}).apply()
    return checked(model), {name: reason for name, reason in kept.items() if reason}


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every node has a name, every tensor a type, constants are initializers, and weights no inputs.

    Raises: ConversionFailed for a graph with branches, loops, functions or sparse weights.
    """
    import onnx

    model = copy.deepcopy(model)
    _require_flat(model)
    taken = {node.name for node in model.graph.node}
    for number, node in enumerate(model.graph.node):
        if not node.name:
            node.name = fresh(f"{node.op_type}_{number}", taken)
    constants = [node for node in model.graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"]
    for node in constants:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
        model.graph.node.remove(node)
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in [value for value in model.graph.input if value.name in weights]:
        model.graph.input.remove(value)
    # Before version 4 every weight had to be an input as well.
    model.ir_version = max(model.ir_version, 4)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def overflowing(
    model: onnx.ModelProto, largest: Mapping[str, float], *, images: int, what: str = "calibration images"
) -> dict[str, str]:
    """The nodes whose numbers FP16 cannot hold, by name, with the reason.

    `largest` holds the largest magnitude of each tensor as it was seen on so many images.
    """
    found = {}
    seen = dict(largest)
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == FLOAT}
    pairs = {node.output[0]: node for node in model.graph.node if node.op_type in QUANTIZATION}
    for node in model.graph.node:
        if node.op_type in QUANTIZATION:
            seen[node.output[0]] = seen.get(node.input[0], 0.0)
        values = [value for name in (*node.input, *node.output) if (value := seen.get(name))]
        if values and max(values) > LARGEST_FP16 / HEADROOM:
            found[node.name] = f"values up to {max(values):.3g} on {images} {what}; FP16 ends at {LARGEST_FP16:.0f}"
        elif values and min(values) < SMALLEST_FP16:
            found[node.name] = f"values of at most {min(values):.1e} on {images} {what}; FP16 rounds those to few bits"
        elif node.op_type not in (*BOUNDED, *QUANTIZATION):
            reasons = [_unfit(weights[name]) for name in _factors(node) if name in weights]
            reasons += [_unfit_steps(pairs[name], pairs, weights) for name in node.input if name in pairs]
            if reason := next(filter(None, reasons), None):
                found[node.name] = reason
    found = _held_from_zero(model.graph.node, weights) | found
    for node in model.graph.node:
        if node.name in found:
            found |= dict.fromkeys(_pairs_read(node, pairs), found[node.name])
    return found


def _held_from_zero(nodes: Iterable[onnx.NodeProto], weights: Mapping[str, onnx.TensorProto]) -> dict[str, str]:
    """The nodes that keep their numbers from zero by a bound that FP16 holds as zero, and those that rely on it.

    Images that were seen need not tell: an image of one colour may be the first whose norm is zero.
    """
    found: dict[str, str] = {}
    kept_from_zero: dict[str, float] = {}
    for node in nodes:
        bounds = [kept_from_zero[name] for name in node.input if name in kept_from_zero]
        if node.op_type in LIFTING:
            constants = [weights[name] for name in node.input if name in weights]
            bounds += [bound for each in constants if math.prod(each.dims) == 1 for bound in _flushed(each)]
        if not bounds:
            continue
        found[node.name] = f"values are kept from 0 by {min(bounds):.1e}, which FP16 holds as 0"
        if node.op_type in (*LIFTING, *CARRYING):
            kept_from_zero |= dict.fromkeys(node.output, min(bounds))
    return found


def _flushed(tensor: onnx.TensorProto) -> list[float]:
    """The smallest of the numbers above zero that FP16 holds as zero; nothing where there is none."""
    import onnx

    values = onnx.numpy_helper.to_array(tensor).astype(np.float64).ravel()
    return sorted(values[(values > 0) & (values < FLUSHED)].tolist())[:1]


def holds_16_bits(model: onnx.ModelProto) -> bool:
    """Whether any tensor of a network with FP32 inputs is in FP16 or BF16."""
    casts = (each for node in model.graph.node if node.op_type == "Cast" for each in node.attribute)
    cast_to = (each.i for each in casts if each.name == "to")
    return not SIXTEEN_BITS.keys().isdisjoint((*cast_to, *(tensor.data_type for tensor in model.graph.initializer)))


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """A network in FP16 or BF16 as one in FP32 in which every tensor is rounded, or overflows, as in the other one.

    For runtimes without such kernels. onnxruntime's CPU has no FP16 convolution: it casts around each, and drops the
    casts between two of them, so that what lies between is never FP16. Sums within one node stay FP32's.
    """
    import onnx
    from onnx import helper

    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = model.graph
    types = element_types(graph)
    for tensor in graph.initializer:
        if tensor.data_type in SIXTEEN_BITS:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values_of(tensor), tensor.name))
    taken = {*types, *(name for node in graph.node for name in node.output)}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        for place, name in enumerate(node.output):
            if types.get(name) not in SIXTEEN_BITS:
                continue
            low = fresh(f"{name}_{SIXTEEN_BITS[types[name]]}", taken)
            node.output[place] = low if node.op_type == "Cast" else fresh(f"{name}_exact", taken)
            if node.op_type != "Cast":
                nodes.append(helper.make_node("Cast", [node.output[place]], [low], to=types[name]))
            nodes.append(helper.make_node("Cast", [low], [name], to=FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    for value in graph.value_info:
        if value.type.tensor_type.elem_type in SIXTEEN_BITS:
            value.type.tensor_type.elem_type = FLOAT
    return checked(model)


def element_types(graph: onnx.GraphProto) -> dict[str, int]:
    """ONNX's number of the element type of every tensor that has one."""
    values = (*graph.value_info, *graph.input, *graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return {**found, **{tensor.name: tensor.data_type for tensor in graph.initializer}}


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that the file asks for."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def raised(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The network at that opset, or the higher one it has; notes and types, which onnx's converter drops, come back."""
    import onnx

    if opset_of(model) >= opset:
        return copy.deepcopy(model)
    higher = onnx.version_converter.convert_version(model, opset)
    notes = {node.name: node.metadata_props for node in model.graph.node}
    for node in higher.graph.node:
        if node.name in notes:
            del node.metadata_props[:]
            node.metadata_props.extend(notes[node.name])
    return prepared(higher)


def mark_layer(node: onnx.NodeProto, layer: str) -> None:
    """Note down on `node` which torch layer it belongs to, as the exporter does for the layer's own nodes."""
    if layer:
        entry = node.metadata_props.add()
        entry.key, entry.value = NAME_SCOPES, str(["", layer, node.op_type])


def noted_layer(node: onnx.NodeProto) -> str:
    """The torch layer that `mark_layer` noted down on `node`; empty where there is no note."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    scopes = re.findall(r"'([^']*)'", notes.get(NAME_SCOPES, ""))
    return scopes[-2] if len(scopes) > 1 else ""


def in_order(graph: onnx.GraphProto) -> None:
    """Put the nodes of `graph` in an order in which each comes after those it reads, else in the order they have."""
    waiting = list(graph.node)
    known = {"", *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    makers = {name: node for node in waiting for name in node.output}
    placed: set[int] = set()
    ordered: list[onnx.NodeProto] = []
    stack = waiting[::-1]
    while stack:
        node = stack[-1]
        missing = [makers[name] for name in node.input if name not in known and name in makers]
        if id(node) in placed or not missing:
            stack.pop()
            if id(node) not in placed:
                placed.add(id(node))
                ordered.append(node)
                known.update(node.output)
        else:
            stack.extend(missing[::-1])
    copies = [copy.deepcopy(node) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)


def checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with the types and shapes of every tensor, once ONNX's checker has found nothing wrong.

    Raises: ConversionFailed with the checker's first sentence.
    """
    import onnx

    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        first = str(err).strip().splitlines()[0].rstrip(".")
        raise ConversionFailed(f"the converted network is no valid ONNX: {first}. Leave this precision out.") from err
    return model


class _Rewiring:
    """Casts put where a node reads a float tensor in another type than it is in."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        kind: str,
        low: set[str],
        types: Mapping[str, int],
        opset: int,
        layers: Mapping[str, str],
    ) -> None:
        self._graph, self._kind, self._low, self._types, self._opset, self._layers = (
            graph, kind, low, types, opset, layers,
        )  # fmt: skip
        self._renamed: dict[str, str] = {}
        self._casts: dict[str, str] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._taken = {*types, *(node.name for node in graph.node)}
        self._low_tensors = self._all_low_tensors()

    def apply(self) -> None:
        """The graph with its weights, nodes and notes of types as they are to be."""
        element = ELEMENT_TYPES[self._kind]
        outputs = [value.name for value in self._graph.output if value.name in self._low_tensors]
        self._renamed = {name: fresh(f"{name}_{self._kind}", self._taken) for name in outputs}
        scales = {node.input[1] for node in self._graph.node if node.op_type in QUANTIZATION}
        for tensor in self._graph.initializer:
            if tensor.name in self._low_tensors:
                _store(tensor, self._kind, upwards=tensor.name in scales)
        for node in self._graph.node:
            self._place(node)
        for name in outputs:
            maker = next(node for node in self._nodes if self._renamed[name] in node.output)
            self._nodes.append(self._cast(self._renamed[name], name, FLOAT, self._layer(maker)))
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        for value in self._graph.value_info:
            if value.name in self._low_tensors:
                value.type.tensor_type.elem_type = element

    def _place(self, node: onnx.NodeProto) -> None:
        for place, name in enumerate(node.input):
            if self._types.get(name) == FLOAT:
                node.input[place] = self._in_type(name, self._wants_low(node, place), node)
        for place, name in enumerate(node.output):
            node.output[place] = self._renamed.get(name, name)
        self._nodes.append(node)

    def _in_type(self, name: str, wants_low: bool, reader: onnx.NodeProto) -> str:  # noqa: FBT001 (a type, no mode)
        """The tensor of that name in the type that `reader` wants; cast once, however many read it."""
        now = self._renamed.get(name, name)
        if (name in self._low_tensors) == wants_low:
            return now
        if name not in self._casts:
            to = ELEMENT_TYPES[self._kind] if wants_low else FLOAT
            self._casts[name] = fresh(f"{name}_{self._kind if wants_low else 'fp32'}", self._taken)
            self._nodes.append(self._cast(now, self._casts[name], to, self._layer(reader)))
        return self._casts[name]

    def _wants_low(self, node: onnx.NodeProto, place: int) -> bool:
        return node.name in self._low and _may_be(node, place, self._kind, self._opset)

    def _all_low_tensors(self) -> set[str]:
        """What nodes in 16 bits make, and the weights that nobody reads in FP32."""
        made = {
            name
            for node in self._graph.node
            if node.name in self._low
            for name in node.output
            if self._types.get(name) == FLOAT
        }
        readers: dict[str, list[bool]] = {}
        for node in self._graph.node:
            for place, name in enumerate(node.input):
                readers.setdefault(name, []).append(self._wants_low(node, place))
        outputs = {value.name for value in self._graph.output}
        weights = {tensor.name for tensor in self._graph.initializer if tensor.data_type == FLOAT} - outputs
        return made | {name for name in weights if name in readers and all(readers[name])}

    def _layer(self, node: onnx.NodeProto) -> str:
        return self._layers.get(node.name) or noted_layer(node)

    def _cast(self, origin: str, result: str, to: int, layer: str) -> onnx.NodeProto:
        from onnx import helper

        node = helper.make_node("Cast", [origin], [result], name=fresh(f"cast_{result}", self._taken), to=to)
        mark_layer(node, layer)
        return node


def _kept_nodes(model: onnx.ModelProto, kind: str, keep: Mapping[str, str], types: Mapping[str, int]) -> dict[str, str]:
    """Nodes that stay in FP32, with the reason; an empty one for a cast, which has the type it is asked for."""
    shapes = _shapes(model.graph)
    opset = opset_of(model)
    kept = {}
    for node in model.graph.node:
        if not _computes_floats(node, types):
            continue
        reason = keep.get(node.name)
        if reason is None:
            reason = _reason_to_keep(node, kind, opset, types, shapes)
        if reason is not None:
            kept[node.name] = reason
    return kept


def _reason_to_keep(
    node: onnx.NodeProto, kind: str, opset: int, types: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    if node.op_type == "Cast" or not any(types.get(name) == FLOAT for name in node.input):
        return ""
    if node.op_type in FRAGILE:
        return FRAGILE[node.op_type]
    terms = _terms(node, shapes)
    if terms is None or terms > MOST_TERMS:
        return f"it adds up {terms or 'an unknown number of'} numbers"
    if node.op_type in UNREAD.get(kind, ()):
        return f"TensorRT reads no {kind} for it"
    if node.domain not in ("", "ai.onnx") or not _has_kernel(node, kind, opset, types):
        return f"ONNX has no {kind} for it"
    return None


def _terms(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many numbers one output is the sum of, for an operator that only adds up; 1 for any other."""
    if node.op_type not in SUMMING:
        return 1
    kernel = next((list(each.ints) for each in node.attribute if each.name == "kernel_shape"), None)
    if kernel is not None:
        return math.prod(kernel)
    read, written = shapes.get(node.input[0]), shapes.get(node.output[0])
    if not read or written is None:
        return None
    return math.prod(read) // max(1, math.prod(written))


def _has_kernel(node: onnx.NodeProto, kind: str, opset: int, types: Mapping[str, int]) -> bool:
    """Whether ONNX lets the node write, or read where it writes no floats, numbers of that kind."""
    import onnx

    schema = onnx.defs.get_schema(node.op_type, opset)
    floats = [place for place, name in enumerate(node.output) if types.get(name) == FLOAT]
    if floats:
        return all(TYPE_NAMES[kind] in _allowed(schema, schema.outputs, place) for place in floats)
    return any(_may_be(node, place, kind, opset) for place, name in enumerate(node.input) if types.get(name) == FLOAT)


def _may_be(node: onnx.NodeProto, place: int, kind: str, opset: int) -> bool:
    import onnx

    schema = onnx.defs.get_schema(node.op_type, opset)
    return TYPE_NAMES[kind] in _allowed(schema, schema.inputs, place)


def _allowed(schema: onnx.defs.OpSchema, formal: Iterable[onnx.defs.OpSchema.FormalParameter], place: int) -> set[str]:
    """The types that a place takes; a list of any length goes on as its last place."""
    parameters = list(formal)
    name = parameters[min(place, len(parameters) - 1)].type_str
    constraint = next((each for each in schema.type_constraints if each.type_param_str == name), None)
    return set(constraint.allowed_type_strs) if constraint else {name}


def _computes_floats(node: onnx.NodeProto, types: Mapping[str, int]) -> bool:
    return any(types.get(name) == FLOAT for name in (*node.input, *node.output))


def _factors(node: onnx.NodeProto) -> list[str]:
    """What a node reads, without its bias: one that is too small for 16 bits is too small to matter."""
    return list(node.input[:2]) if node.op_type in BIASED else list(node.input)


def _unfit(tensor: onnx.TensorProto) -> str | None:
    """Why FP16 cannot hold a weight; None when it can. FP16 has infinity, of which masks are made, and NaN."""
    import onnx

    values = onnx.numpy_helper.to_array(tensor).astype(np.float64).ravel()
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    largest = float(np.abs(values).max())
    if not largest <= LARGEST_FP16:
        return f"weights up to {largest:.3g}; FP16 ends at {LARGEST_FP16:.0f}"
    lost = float(np.linalg.norm(values - values.astype(np.float16)))
    if lost > MOST_LOST * float(np.linalg.norm(values)):
        return f"weights of at most {largest:.1e}, below what FP16 holds to 8 bits"
    return None


def _unfit_steps(
    dequantize: onnx.NodeProto, pairs: Mapping[str, onnx.NodeProto], weights: Mapping[str, onnx.TensorProto]
) -> str | None:
    """Why FP16 cannot hold a weight in 8 bits: the weight itself, or the width of its steps; None when it can."""
    import onnx

    quantize = pairs.get(dequantize.input[0])
    if quantize is None or quantize.input[0] not in weights:
        return None
    largest, widest = (
        float(np.abs(onnx.numpy_helper.to_array(weights[name])).max(initial=0.0)) for name in quantize.input[:2]
    )
    if largest > LARGEST_FP16:
        return f"weights up to {largest:.3g}; FP16 ends at {LARGEST_FP16:.0f}"
    if 0 < widest < SMALLEST_STEP:
        return f"weights of at most {largest:.1e}, in steps below what FP16 holds"
    return None


def _pairs_read(node: onnx.NodeProto, pairs: Mapping[str, onnx.NodeProto]) -> list[str]:
    """The names of the Q/DQ nodes through which a node reads: they have its type, or no runtime fuses them with it."""
    found = []
    for name in node.input:
        while name in pairs:
            found.append(pairs[name].name)
            name = pairs[name].input[0]
    return found


def _store(tensor: onnx.TensorProto, kind: str, *, upwards: bool) -> None:
    """The tensor in 16 bits, each value rounded to the nearest; what lies beyond the largest one is infinite.

    upwards: to the next larger one in FP16, so that the scale of a channel that is almost dead does not become zero.
    """
    import onnx

    values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    if kind == "fp16":
        with np.errstate(over="ignore"):
            stored = values.astype(np.float16)
        if upwards:
            stored = np.where(stored < values, np.nextafter(stored, np.float16(np.inf)), stored)
    else:
        stored = _bf16_bits(values)
    name, shape = tensor.name, list(tensor.dims)
    tensor.Clear()
    tensor.name, tensor.data_type, tensor.raw_data = name, ELEMENT_TYPES[kind], stored.tobytes()
    tensor.dims.extend(shape)


def values_of(tensor: onnx.TensorProto) -> np.ndarray:
    """The values of a tensor in 16 bits as float32, which holds each of them."""
    import onnx

    if tensor.data_type != BFLOAT16:
        return onnx.numpy_helper.to_array(tensor).astype(np.float32)
    bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(tensor.dims)


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers, rounded to the nearest, ties to even; not-a-number stays what it is."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _require_flat(model: onnx.ModelProto) -> None:
    """Raises: ConversionFailed for a graph inside a graph, for functions, and for sparse weights."""
    for node in model.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ConversionFailed(
                f"node '{node.name}' ({node.op_type}) holds a graph of its own, which is only built in fp32. Use "
                "--precision fp32, or take the branch or loop out of the network."
            )
    if model.functions:
        raise ConversionFailed("the ONNX file has functions of its own, which are only built in fp32. Export it again.")
    if model.graph.sparse_initializer:
        raise ConversionFailed("the ONNX file has sparse weights, which are only built in fp32. Store them densely.")


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of which it is known; a free axis counts as 1."""
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            found[value.name] = tuple(axis.dim_value or 1 for axis in kind.shape.dim)
    return found


def fresh(name: str, taken: set[str]) -> str:
    """`name`, with a number behind it where it is taken."""
    free = name
    number = 2
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    taken.add(free)
    return free
