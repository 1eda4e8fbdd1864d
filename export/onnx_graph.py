"""The nodes of an ONNX file with the shapes and types they work on, read without the onnx package: a device has none.

An ONNX file is one protobuf message. Weights are stepped over, so a large file costs little more than its reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .errors import IntegrityError

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
# How a protobuf field is stored: as a varint, in 8 bytes, with its length before it, in 4 bytes.
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
# ONNX's numbers for element types, under the names that precisions have here.
ELEMENT_TYPES = {
    1: "fp32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "fp16",
    11: "fp64", 12: "uint32", 13: "uint64", 16: "bf16", 17: "fp8", 18: "fp8", 19: "fp8", 20: "fp8", 21: "uint4",
    22: "int4", 23: "fp4",
}  # fmt: skip
# Operators whose first output has the shape of their first input, whatever they do to its values.
SAME_SHAPE = ("Cast", "DequantizeLinear", "Identity", "QuantizeLinear")

Value = int | memoryview


@dataclass(frozen=True)
class OnnxNode:
    """One operation: its name and kind, the tensors it reads and writes, and the torch modules it came from."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    scopes: tuple[str, ...]
    """Outermost first, as torch names them; the last one is the operation itself. Empty where the file has none."""
    to: str = ""
    """The type that it writes, where the node itself says so: a Cast, a Constant, a quantisation without zero point."""


@dataclass(frozen=True)
class OnnxGraph:
    """The nodes in the order of the file, and shape and type of every tensor that has them; a free axis counts as 1."""

    nodes: list[OnnxNode] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)
    inputs: list[str] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)
    opset: int = 0
    """Of ONNX's own operators; 0 where the file does not say."""
    inner: list[OnnxNode] = field(default_factory=list)
    """The nodes of the file's own functions, and of the branches and loops that other nodes hold; no types are told."""


def read_graph(path: Path) -> OnnxGraph:
    """The graph of an ONNX file, without its weights' values.

    Raises: FileNotFoundError; IntegrityError when the file is no ONNX file, or a part of one.
    """
    try:
        fields = list(_fields(memoryview(path.read_bytes())))
        found = [value for number, value in fields if number == 7]
        if not found:
            raise ValueError("it holds no graph")
        opset = max([_opset(_message(value)) for number, value in fields if number == 8], default=0)
        graph = _graph(_message(found[0]), opset)
        for function in (value for number, value in fields if number == 25):
            graph.inner.extend(_with_inner(_parts(function, 7)))
        return graph
    except (ValueError, IndexError, KeyError) as err:
        raise IntegrityError(f"{path}: no ONNX file that can be read ({err}). Export the network again.") from err


def _graph(message: memoryview, opset: int) -> OnnxGraph:
    graph = OnnxGraph(opset=opset)
    for number, value in _fields(message):
        if number == 1:
            node, *inner = _with_inner([value])
            graph.nodes.append(node)
            graph.inner.extend(inner)
        elif number in (5, 15):
            name, shape, kind = _tensor(_message(value)) if number == 5 else _sparse_tensor(_message(value))
            graph.shapes[name] = shape
            graph.types[name] = kind
            graph.weights.add(name)
        elif number in (11, 12, 13):
            name, shape, kind = _value_info(_message(value))
            graph.shapes.setdefault(name, shape)
            graph.types.setdefault(name, kind)
            if number == 11:
                graph.inputs.append(name)
    for node in graph.nodes:
        _fill_in(graph, node)
    return graph


def _opset(message: memoryview) -> int:
    """The version of ONNX's own operators that an entry of the model's imports names; 0 for those of others."""
    domain, version = "", 0
    for number, value in _fields(message):
        if number == 1:
            domain = _text(value)
        elif number == 2 and isinstance(value, int):
            version = value
    return version if domain in ("", "ai.onnx") else 0


def _fill_in(graph: OnnxGraph, node: OnnxNode) -> None:
    """Shape and type of what a node writes, where the file leaves them out: tools that convert a file often do."""
    read = [graph.types[name] for name in node.inputs if graph.types.get(name)]
    kind = node.to or (read[0] if read else "")
    if node.operator == "Shape":
        kind = "int64"
    elif node.operator == "QuantizeLinear":
        kind = (graph.types.get(node.inputs[2]) if len(node.inputs) > 2 else "") or node.to or "uint8"
    elif node.operator == "DequantizeLinear":
        kind = graph.types.get(node.inputs[1], kind)
    for name in node.outputs:
        if not graph.types.get(name):
            graph.types[name] = kind
    if node.operator in SAME_SHAPE:
        for source, written in zip(node.inputs[:1], node.outputs[:1], strict=False):
            if graph.shapes.get(source):
                graph.shapes.setdefault(written, graph.shapes[source])


def _node(message: memoryview) -> OnnxNode:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    scopes: tuple[str, ...] = ()
    to = ""
    for number, value in _fields(message):
        if number in texts:
            texts[number].append(_text(value))
        elif number == 5:
            to = _written_type(_message(value)) or to
        elif number == 9:
            entry = dict(_fields(_message(value)))
            if _text(entry[1]) == NAME_SCOPES:
                scopes = tuple(re.findall(r"'([^']*)'", _text(entry[2])))
    name, operator = "".join(texts[3]), "".join(texts[4])
    return OnnxNode(name, operator, tuple(texts[1]), tuple(texts[2]), scopes, to)


def _with_inner(values: Iterable[Value]) -> list[OnnxNode]:
    """Nodes, each before those of the branches and loops that it holds, to any depth."""
    found = []
    for message in map(_message, values):
        attributes = _parts(message, 5)
        bodies = [body for attribute in attributes for number in (6, 11) for body in _parts(attribute, number)]
        found += [_node(message), *(node for body in bodies for node in _with_inner(_parts(body, 1)))]
    return found


def _written_type(message: memoryview) -> str:
    """The type that a node's attribute makes it write; empty for an attribute about something else."""
    name, kind = "", ""
    for number, value in _fields(message):
        if number == 1:
            name = _text(value)
        elif number == 3 and isinstance(value, int):
            kind = ELEMENT_TYPES.get(value, "")
        elif number == 5:
            kind = _tensor(_message(value))[2]
    return kind if name in ("to", "output_dtype", "value") else ""


def _tensor(message: memoryview) -> tuple[str, tuple[int, ...], str]:
    """Name, shape and type of a weight."""
    name, shape, kind = "", [], ""
    for number, value in _fields(message):
        if number == 1:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == 2 and isinstance(value, int):
            kind = ELEMENT_TYPES.get(value, "")
        elif number == 8:
            name = _text(value)
    return name, tuple(shape), kind


def _sparse_tensor(message: memoryview) -> tuple[str, tuple[int, ...], str]:
    """The same of a weight that is stored sparsely: its values have the name, the whole has the shape."""
    name, shape, kind = "", [], ""
    for number, value in _fields(message):
        if number == 1:
            name, _, kind = _tensor(_message(value))
        elif number == 3:
            shape += [value] if isinstance(value, int) else _packed(value)
    return name, tuple(shape), kind


def _value_info(message: memoryview) -> tuple[str, tuple[int, ...], str]:
    """Name, shape and type of an input, an output or a tensor between nodes; what is no tensor has no axes."""
    name, kind = "", ""
    shape: tuple[int, ...] = ()
    for number, value in _fields(message):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for tensor in _parts(value, 1):
                found = [part for part in _parts(tensor, 1) if isinstance(part, int)]
                kind = ELEMENT_TYPES.get(found[0], "") if found else ""
                shape = tuple(_axis(_message(axis)) for axes in _parts(tensor, 2) for axis in _parts(axes, 1))
    return name, shape, kind


def _axis(message: memoryview) -> int:
    return next((value for number, value in _fields(message) if number == 1 and isinstance(value, int)), 1)


def _parts(value: Value, wanted: int) -> list[Value]:
    return [part for number, part in _fields(_message(value)) if number == wanted]


def _fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Number and content of every field. Raises: ValueError or IndexError where the bytes are no message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
        elif kind in (FIXED64, FIXED32, LENGTH):
            size = 8 if kind == FIXED64 else 4
            if kind == LENGTH:
                size, at = _varint(message, at)
            if at + size > len(message):
                raise ValueError("it ends in the middle")
            value, at = message[at : at + size], at + size
        else:
            raise ValueError(f"a field of kind {kind}")
        yield key >> 3, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where the next one starts."""
    number = shift = 0
    while True:
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7


def _packed(message: memoryview) -> list[int]:
    numbers, at = [], 0
    while at < len(message):
        number, at = _varint(message, at)
        numbers.append(number)
    return numbers


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return value


def _text(value: Value) -> str:
    return str(_message(value), "utf-8")
