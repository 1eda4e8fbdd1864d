"""What each torch layer of an ONNX file has to do, and which layers a node that a runtime executed stands for."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from .errors import IntegrityError
from .onnx_graph import OnnxGraph, OnnxNode
from .target import NodeLaps

# Operators that multiply and accumulate; all others only move values, as far as MACs can tell.
MULTIPLYING = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators through which a weight is still the same weight.
CONVERTING = ("Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Transpose")
# What may not stand behind a name: it would be that of another node. onnxruntime names what it fuses after the first
# node, as in `node_MatMul_6/MatMulAddFusion`.
END_OF_NAME = r"(?![\w.:]|/(?!\w*Fusion\b))"


class LayerWork(NamedTuple):
    """What one torch layer does to one image.

    macs: multiply-accumulates; activations: values read and written; weights: values read once a run, however many
    images there are. Widths are channels (features of a linear).
    """

    macs: int
    activations: int
    weights: int
    width_in: int
    width_out: int
    depthwise: bool

    def moved(self, batch: int) -> int:
        """Values that a run of so many images has to read or write at least."""
        return self.activations * batch + self.weights


class LayerMap:
    """The torch layers of an ONNX graph: their work, and the way from a runtime's node names to them."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph
        # An output that is left out has an empty name, which would be found in every text.
        self._maker = {output: node for node in graph.nodes for output in node.outputs if output}
        self._named = {node.name: node for node in graph.nodes if node.name}
        # A runtime names a fused node after the last tensor it writes; a node's own name goes first.
        self._named = {**self._maker, **self._named}
        names = sorted(self._named, key=len, reverse=True)
        self._any_name = re.compile(rf"(?<![\w./:])(?:{'|'.join(map(re.escape, names)) or '(?!)'}){END_OF_NAME}")

    @functools.cached_property
    def work(self) -> dict[str, LayerWork]:
        """The work of every layer in the order of the graph; a layer that runs twice works twice.

        Raises: IntegrityError where the file gives no shape for a tensor that is multiplied.
        """
        nodes: dict[str, list[OnnxNode]] = {}
        for node in self._graph.nodes:
            nodes.setdefault(self.layer(node), []).append(node)
        return {layer: self._work(own) for layer, own in nodes.items()}

    def layers(self, executed: Sequence[NodeLaps]) -> list[tuple[str, ...]]:
        """For each executed node, the torch layers it stands for, by the ONNX names that its origin holds.

        Those that multiply, where there are any: an activation or a sum that was fused into a convolution has no
        time of its own. A convolution that goes by the name of what was fused behind it belongs to the nearest
        multiplying layer before that name which no other node claims. A runtime that knows torch's modules is believed,
        up to the first of which the file has a layer: a batch norm was folded into the one before it there. Empty for a
        node that the runtime added.
        """
        found = [[self._named[name] for name in self._any_name.findall(node.origin)] for node in executed]
        claimed = {node.outputs for nodes in found for node in nodes}
        layers = []
        for ran, nodes in zip(executed, found, strict=True):
            if ran.modules:
                layers.append(tuple([module for module in ran.modules if module in self.work][:1]))
                continue
            multiplying = [node for node in nodes if node.operator in MULTIPLYING]
            if nodes and not multiplying and any(kind in ran.operator for kind in MULTIPLYING):
                before = self._unclaimed_before(nodes[0], claimed)
                multiplying = [before] if before else []
                claimed.update(node.outputs for node in multiplying)
            layers.append(tuple(dict.fromkeys(self.layer(node) for node in multiplying or nodes[:1])))
        return layers

    def layer(self, node: OnnxNode) -> str:
        """The torch module that `node` came from, by its path; an operation of the network itself goes by its name.

        A convolution goes by its weight: after a batch norm has been folded into it, its scope is the batch norm's.
        """
        weight = self._weight(node)
        if weight.endswith(".weight"):
            return weight.removesuffix(".weight")
        if len(node.scopes) < 2:
            return node.name or next(filter(None, node.outputs), node.operator)
        return node.scopes[-2] or re.sub(r"_\d+$", "", node.scopes[-1])

    def _unclaimed_before(self, node: OnnxNode, claimed: set[tuple[str, ...]]) -> OnnxNode | None:
        """The multiplying node that `node` was fused with: back through nodes that have no time of their own."""
        waiting, seen = [node], set()
        while waiting:
            for name in waiting.pop(0).inputs:
                before = self._maker.get(name)
                if before is None or before.outputs in claimed or before.outputs in seen:
                    continue
                if before.operator in MULTIPLYING:
                    return before
                seen.add(before.outputs)
                waiting.append(before)
        return None

    def _weight(self, node: OnnxNode) -> str:
        """The name of the weight that a multiplying node reads, seen through nodes that only convert it; else ''."""
        name = node.inputs[1] if node.operator in MULTIPLYING and len(node.inputs) > 1 else ""
        while name in self._maker and self._maker[name].operator in CONVERTING:
            name = self._maker[name].inputs[0]
        return name if name in self._graph.weights else ""

    def _work(self, nodes: list[OnnxNode]) -> LayerWork:
        multiplying = [node for node in nodes if node.operator in MULTIPLYING]
        works = [self._multiplying(node) for node in multiplying] or [self._moving(node) for node in nodes]
        sums = [sum(column) for column in zip(*((work[0], work[1]) for work in works), strict=True)]
        return works[0]._replace(macs=sums[0], activations=sums[1])

    def _multiplying(self, node: OnnxNode) -> LayerWork:
        if len(node.inputs) < 2 or not node.outputs:
            what = f"a {node.operator} that multiplies nothing ('{self.layer(node)}')"
            raise IntegrityError(f"the ONNX file has {what}. Export it again.")
        source, factor, result = (self._shape(name) for name in (*node.inputs[:2], node.outputs[0]))
        convolves = node.operator in ("Conv", "ConvTranspose")
        axis = 1 if convolves else -1
        macs = {
            "Conv": math.prod(result) * math.prod(factor[1:]),
            "ConvTranspose": math.prod(source) * math.prod(factor[1:]),
            "Gemm": math.prod(result) * (math.prod(factor) // result[-1]),
            "MatMul": math.prod(result) * source[-1],
        }[node.operator]
        constant = self._maker.get(node.inputs[1]) is None or bool(self._weight(node))
        activations = math.prod(source) + math.prod(result) + (0 if constant else math.prod(factor))
        return LayerWork(
            macs // self._batch,
            activations // self._batch,
            math.prod(factor) if constant else 0,
            source[axis],
            result[axis],
            convolves and factor[1] == 1 and source[1] == result[1] > 1,
        )

    def _moving(self, node: OnnxNode) -> LayerWork:
        read = [self._graph.shapes.get(name, ()) for name in node.inputs if name not in self._graph.weights]
        written = [self._graph.shapes.get(name, ()) for name in node.outputs]
        values = sum(math.prod(shape) for shape in (*read, *written) if shape)
        widths = [shapes[0][1] if shapes and len(shapes[0]) > 1 else 0 for shapes in (read, written)]
        return LayerWork(0, values // self._batch, 0, *widths, depthwise=False)

    @property
    def _batch(self) -> int:
        shapes = [self._graph.shapes[name] for name in self._graph.inputs if name not in self._graph.weights]
        return shapes[0][0] or 1 if shapes and shapes[0] else 1

    def _shape(self, name: str) -> tuple[int, ...]:
        """Raises: IntegrityError for a tensor of which the file gives no shape."""
        shape = self._graph.shapes.get(name)
        if not shape:
            raise IntegrityError(f"the ONNX file gives no shape for '{name}'. Export it with this chip-deploy again.")
        return shape
