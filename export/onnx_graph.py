"""The nodes of an ONNX file with the shapes they work on, read without the onnx package: a device has none.

An ONNX file is one protobuf message. Weights are stepped over, so a large file costs little more than its reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .errors import IntegrityError

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
# How a protobuf field is stored: as a varint, in 8 bytes, with its length before it, in 4 bytes.
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5

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


@dataclass(frozen=True)
class OnnxGraph:
    """The nodes in the order of the file, and the shape of every tensor that has one; a free axis counts as 1."""

    nodes: list[OnnxNode] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)
    inputs: list[str] = field(default_factory=list)


def read_graph(path: Path) -> OnnxGraph:
    """The graph of an ONNX file, without its weights' values.

    Raises: FileNotFoundError; IntegrityError when the file is no ONNX file, or a part of one.
    """
    try:
        found = [value for number, value in _fields(memoryview(path.read_bytes())) if number == 7]
        if not found:
            raise ValueError("it holds no graph")
        return _graph(_message(found[0]))
    except (ValueError, IndexError, KeyError) as err:
        raise IntegrityError(f"{path}: no ONNX file that can be read ({err}). Export the network again.") from err


def _graph(message: memoryview) -> OnnxGraph:
    graph = OnnxGraph()
    for number, value in _fields(message):
        if number == 1:
            graph.nodes.append(_node(_message(value)))
        elif number == 5:
            name, shape = _tensor(_message(value))
            graph.shapes[name] = shape
            graph.weights.add(name)
        elif number in (11, 12, 13):
            name, shape = _value_info(_message(value))
            graph.shapes.setdefault(name, shape)
            if number == 11:
                graph.inputs.append(name)
    return graph


def _node(message: memoryview) -> OnnxNode:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    scopes: tuple[str, ...] = ()
    for number, value in _fields(message):
        if number in texts:
            texts[number].append(_text(value))
        elif number == 9:
            entry = dict(_fields(_message(value)))
            if _text(entry[1]) == NAME_SCOPES:
                scopes = tuple(re.findall(r"'([^']*)'", _text(entry[2])))
    name, operator = "".join(texts[3]), "".join(texts[4])
    return OnnxNode(name, operator, tuple(texts[1]), tuple(texts[2]), scopes)


def _tensor(message: memoryview) -> tuple[str, tuple[int, ...]]:
    name, shape = "", []
    for number, value in _fields(message):
        if number == 1:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == 8:
            name = _text(value)
    return name, tuple(shape)


def _value_info(message: memoryview) -> tuple[str, tuple[int, ...]]:
    """Name and shape of an input, an output or a tensor between nodes; what is no tensor has no axes."""
    name, shape = "", ()
    for number, value in _fields(message):
        if number == 1:
            name = _text(value)
        elif number == 2:
            shape = tuple(
                _axis(_message(axis))
                for tensor in _parts(value, 1)
                for axes in _parts(tensor, 2)
                for axis in _parts(axes, 1)
            )
    return name, shape


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
