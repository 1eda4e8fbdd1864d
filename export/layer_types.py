"""In which number types the layers of an engine run: from the engine's own account, or from the ONNX graph.

A strongly typed builder takes the types from the graph, so the graph tells what was asked; only the built engine tells
what came of it: which Q/DQ layers were not fused, and how many layers merely reformat data.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .layers import MULTIPLYING, LayerMap
from .onnx_graph import OnnxGraph, OnnxNode, read_graph
from .target import LayerTypes

QUANTISING = ("QuantizeLinear", "DequantizeLinear")
# Nodes that convert or hold values, and compute nothing.
IDLE = (*QUANTISING, "Cast", "Constant", "Identity")
UNKNOWN = "unknown"
# How TensorRT spells number types: alone (10.9 and later), or within the description of a layout (before).
SPELLINGS = (
    ("bf16", r"bf16|bfloat16"),
    ("fp16", r"fp16|half|float16"),
    ("fp8", r"fp8|e4m3|float8"),
    ("fp4", r"fp4|e2m1"),
    ("fp32", r"fp32|float32|float"),
    ("int8", r"int8"),
    ("int4", r"int4"),
    ("int64", r"int64"),
    ("int32", r"int32"),
    ("bool", r"bool"),
)
# TensorRT's kinds of layers that multiply, over its versions: CaskConvolution, gemm, MatrixMultiply, correlation, ...
MULTIPLYING_KINDS = re.compile(r"conv|correlation|gemm|matrix ?mul|matmul|fullyconnected", re.IGNORECASE)
QUANTISING_KINDS = re.compile(r"^(de)?quantize", re.IGNORECASE)
# What the inspector also calls a layer, and takes no time of its own; in lower case.
NO_WORK = ("noop", "constant", "signal", "wait", "shape_call")
# The layers for every optimization profile but the first are the same ones again, and their names end so.
LATER_PROFILE = re.compile(r"\[profile \d+\]")
# So many names stand in a sentence; the others are counted.
NAMED = 3


class _Layer(NamedTuple):
    """What counts of one layer: its name, its type, whether it multiplies, and whether in TF32 by its kernel's name.

    fused: the engine's layer, and the type it reads, where that holds other products as well; the type is UNKNOWN then.
    """

    name: str
    kind: str
    multiplies: bool
    tf32: bool = False
    fused: tuple[str, str] | None = None


def graph_types(onnx_path: Path, precision: str, *, tf32: bool = False) -> LayerTypes:
    """The types that an ONNX file asks for, node by node; Q/DQ nodes count as part of what they feed.

    Of nodes in functions, branches and loops no types are told; they count as unknown.
    tf32: whether the runtime may multiply FP32 values in TF32.
    Raises: FileNotFoundError; IntegrityError when the file is no ONNX file.
    """
    graph = read_graph(onnx_path)
    maker = {output: node for node in graph.nodes for output in node.outputs}
    named = LayerMap(graph)
    layers = [
        _Layer(named.layer(node), _node_type(node, graph, maker), node.operator in MULTIPLYING)
        for node in graph.nodes
        if node.operator not in IDLE and not _only_weights(node, graph, maker)
    ]
    inner = [node for node in graph.inner if node.operator not in IDLE]
    layers += [_Layer(named.layer(node), UNKNOWN, node.operator in MULTIPLYING) for node in inner]
    types = _summed_up(layers, precision, source="graph", unfused=[], reformats=None, tf32=tf32)
    if not inner:
        return types
    lie = f"{len(inner)} nodes lie" if len(inner) > 1 else "1 node lies"
    told = f"{lie} in functions, branches or loops of the ONNX file, where types are not told."
    return types.model_copy(update={"sentence": f"{types.sentence} {told}"})


def engine_types(
    information: str, precision: str, *, onnx_path: Path | None = None, tf32: bool = False
) -> LayerTypes | None:
    """The types in which the layers of a built engine run, from TensorRT's engine inspector; None where it tells names
    only.

    information: the inspector's JSON, of TensorRT 10 (`Format/Datatype`) or 11 (the two apart). onnx_path: the file it
    was built from, by which layers that go by other names are known. tf32: whether the engine may multiply FP32 values
    in TF32.
    Raises: ValueError when the text is no such JSON; IntegrityError for an unreadable ONNX file.
    """
    described = _inspected(information)
    if not any("Inputs" in layer for layer in described):
        return None
    graph = read_graph(onnx_path) if onnx_path else OnnxGraph()
    operators = {node.name: node.operator for node in graph.nodes if node.name}
    layers = [layer for layer in described if _works(layer)]
    unfused = [layer for layer in layers if _stands_alone(layer, operators)]
    reformats = [layer for layer in layers if _reformats(layer, operators) and layer not in unfused]
    working = [layer for layer in layers if layer not in unfused + reformats]
    return _summed_up(
        _engine_layers(working, _products(graph)),
        precision,
        source="engine",
        unfused=[str(layer.get("Name", "")) for layer in unfused],
        reformats=len(reformats),
        tf32=tf32,
    )


def told_types(
    layers: Iterable[tuple[str, str, bool]],
    precision: str,
    *,
    unfused: Sequence[str] = (),
    reformats: int | None = None,
    tf32: bool = False,
) -> LayerTypes:
    """The types in which a runtime says that it runs its layers: name, type, and whether the layer multiplies."""
    listed = [_Layer(*layer) for layer in layers]
    return _summed_up(listed, precision, source="engine", unfused=list(unfused), reformats=reformats, tf32=tf32)


def _summed_up(
    layers: Sequence[_Layer],
    precision: str,
    *,
    source: Literal["engine", "graph"],
    unfused: list[str],
    reformats: int | None,
    tf32: bool,
) -> LayerTypes:
    multiplying = [layer for layer in layers if layer.multiplies]
    other = [layer for layer in multiplying if layer.kind not in (precision, UNKNOWN)]
    untold = [layer for layer in multiplying if layer.kind == UNKNOWN]
    sentences = [_types_sentence(multiplying, other, untold, precision, source), *_untold_sentences(untold)]
    if tf32:
        in_fp32 = [layer for layer in multiplying if "fp32" in (layer.kind, (layer.fused or ("", ""))[1])]
        sentences.append(_tf32_sentence(in_fp32))
    if source == "engine":
        sentences.append(_overhead_sentence(unfused, reformats or 0))
    return LayerTypes(
        source=source,
        layers=_counted(layer.kind for layer in layers),
        multiplying=_counted(layer.kind for layer in multiplying),
        other_type=[layer.name for layer in other],
        unfused=unfused,
        reformats=reformats,
        sentence=" ".join(filter(None, sentences)),
    )


def _types_sentence(
    multiplying: Sequence[_Layer], other: Sequence[_Layer], untold: Sequence[_Layer], precision: str, source: str
) -> str:
    """Which type the layers that multiply run in; anything but what was asked for is said plainly."""
    by = " (by the ONNX file)" if source == "graph" else ""
    total, kinds = len(multiplying), _counted(layer.kind for layer in other)
    if not total:
        return f"Asked for {precision}; no layer multiplies."
    if len(untold) == total:
        which = f"any of the {total} multiplying layers" if total > 1 else "the one multiplying layer"
        return f"Asked for {precision}; whether {which} runs in it is not told{by}."
    if not other and untold:
        known = total - len(untold)
        return f"{known} of {total} multiplying layers {'run' if known > 1 else 'runs'} in {precision}{by}."
    if not other:
        sentence = f"{_layers(total, 'multiplying')} in {precision}{by}."
        return sentence[0].upper() + sentence[1:]
    if len(other) == total:
        return f"Asked for {precision}, but {_layers(total, 'multiplying')} in {' or '.join(kinds)}{by}."
    told = " and ".join(f"{count} run in {kind}" if count > 1 else f"1 runs in {kind}" for kind, count in kinds.items())
    named = _named([layer.name for layer in other])
    return f"Asked for {precision}, but of {total} multiplying layers {told}{by}: {named}."


def _untold_sentences(untold: Sequence[_Layer]) -> list[str]:
    """Of which layers no type is known: what is fused with others has none of its own, and of some nothing is told."""
    alone = [layer.name for layer in untold if layer.fused is None]
    fused = list(dict.fromkeys(layer.fused for layer in untold if layer.fused))
    sentences = []
    if fused:
        reads = " or ".join(dict.fromkeys(kind for _, kind in fused))
        into = f"{len(fused)} layers that read" if len(fused) > 1 else "one layer that reads"
        sentences.append(f"{len(untold) - len(alone)} are fused into {into} {reads}; their own types are not told.")
    if alone:
        of = f"The types of {len(alone)} are" if len(alone) > 1 else "The type of 1 is"
        sentences.append(f"{of} not told: {_named(alone)}.")
    return sentences


def _tf32_sentence(layers: Sequence[_Layer]) -> str:
    """What TF32 being allowed means for layers in FP32; empty where there are none. Only some kernels' names tell."""
    certain = sum(layer.tf32 for layer in layers)
    if not layers:
        return ""
    if not certain:
        return "TF32 is allowed, so what is in fp32 may be multiplied in TF32."
    told = f"TF32 is allowed: by the names of their kernels, {certain} of {len(layers)} fp32 layers multiply in it"
    return f"{told}{'; the others may, too' if certain < len(layers) else ''}."


def _overhead_sentence(unfused: Sequence[str], reformats: int) -> str:
    """What runs besides the network's own layers; empty when nothing does."""
    parts = []
    if unfused:
        parts.append(f"Q/DQ layers that were not fused: {len(unfused)} ({_named(unfused)}).")
    if reformats:
        parts.append(f"Layers that only reformat data: {reformats}.")
    return " ".join(parts)


def _layers(count: int, kind: str) -> str:
    """So many layers as the subject of a sentence: `all 21 multiplying layers run`."""
    return f"all {count} {kind} layers run" if count > 1 else f"the one {kind} layer runs"


def _named(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _counted(kinds: Iterable[str]) -> dict[str, int]:
    """How often each type occurs, the most frequent first."""
    return dict(Counter(kinds).most_common())


def _node_type(node: OnnxNode, graph: OnnxGraph, maker: dict[str, OnnxNode]) -> str:
    """The type a node computes in: the quantised one where all it reads of the data comes out of a DequantizeLinear."""
    data = [name for name in node.inputs if name and not _is_weight(name, graph, maker)]
    factors = node.inputs[:2] if node.operator in MULTIPLYING else data
    quantised = [_quantised_type(name, graph, maker) for name in factors]
    if quantised and all(quantised):
        return quantised[0]
    known = [graph.types[name] for name in (*data, *node.inputs, *node.outputs) if graph.types.get(name)]
    return known[0] if known else UNKNOWN


def _quantised_type(name: str, graph: OnnxGraph, maker: dict[str, OnnxNode]) -> str:
    """The type before the DequantizeLinear that made a tensor; empty where none did."""
    node = maker.get(name)
    if node is None or node.operator != "DequantizeLinear":
        return ""
    return graph.types.get(node.inputs[0], "")


def _is_weight(name: str, graph: OnnxGraph, maker: dict[str, OnnxNode]) -> bool:
    """Whether a tensor is a weight, or made of weights by nodes that compute nothing."""
    node = maker.get(name)
    if node is None:
        return name in graph.weights
    return node.operator in IDLE and all(_is_weight(read, graph, maker) for read in node.inputs if read)


def _only_weights(node: OnnxNode, graph: OnnxGraph, maker: dict[str, OnnxNode]) -> bool:
    """Whether a node reads weights alone, so that it is gone before anything runs."""
    return bool(node.inputs) and all(_is_weight(name, graph, maker) for name in node.inputs if name)


def _inspected(information: str) -> list[dict[str, Any]]:
    """The layers that the inspector describes; a layer that it only names gets that name alone."""
    try:
        # TensorRT parts the names of fused nodes by control characters, which strict JSON does not have.
        found = json.loads(information, strict=False)
        layers = found["Layers"]
    except (json.JSONDecodeError, KeyError, TypeError) as err:
        raise ValueError(f"the engine inspector gave no layers as JSON ({err}). Use another version.") from err
    return [layer if isinstance(layer, dict) else {"Name": str(layer)} for layer in layers]


def _engine_layers(layers: Sequence[dict[str, Any]], products: dict[str, str]) -> list[_Layer]:
    """The layers of an engine; one that multiplies stands once for every ONNX node whose product it holds.

    products: the torch layer of every node that multiplies. One that the engine mentions nowhere is of unknown type.
    """
    noted = [[node for node in dict.fromkeys(_onnx_nodes(layer)) if node in products] for layer in layers]
    kernels = [bool(MULTIPLYING_KINDS.search(_kinds(layer))) for layer in layers]
    # What only brings data into place for a product notes the product's node as well.
    multiplied = {node for nodes, kernel in zip(noted, kernels, strict=True) if kernel for node in nodes}
    found: list[_Layer] = []
    told: set[str] = set()
    for layer, nodes, kernel in zip(layers, noted, kernels, strict=True):
        held = [node for node in nodes if kernel or node not in multiplied]
        own = [node for node in held if node not in told]
        if own:
            found += _held(layer, own, products, mixed=not kernel and len(held) > 1)
        else:
            found.append(_Layer(str(layer.get("Name", "")), _engine_type(layer), kernel and not nodes, _in_tf32(layer)))
        told.update(own)
    if told and all(nodes for nodes, kernel in zip(noted, kernels, strict=True) if kernel):
        found += [_Layer(name, UNKNOWN, multiplies=True) for node, name in products.items() if node not in told]
    return found


def _held(layer: dict[str, Any], nodes: Sequence[str], products: dict[str, str], *, mixed: bool) -> list[_Layer]:
    """One layer of an engine as the products that it holds.

    mixed: whether it is no kernel that multiplies only and holds several products. Of those no type is told; else what
    the layer reads is what each of them reads.
    """
    name, kind = str(layer.get("Name", "")), _engine_type(layer)
    if mixed:
        return [_Layer(products[node], UNKNOWN, multiplies=True, fused=(name, kind)) for node in nodes]
    return [_Layer(products[node], kind, multiplies=True, tf32=_in_tf32(layer)) for node in nodes]


def _in_tf32(layer: dict[str, Any]) -> bool:
    """Whether the name of a layer's kernel says that it multiplies in TF32."""
    return "tf32" in str(layer.get("TacticName", "")).lower()


def _kinds(layer: dict[str, Any]) -> str:
    return f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}"


def _engine_type(layer: dict[str, Any]) -> str:
    """The type a layer reads; where free shapes hide it, that of its weights or of what it writes."""
    weights = layer.get("Weights")
    texts = [
        *(_tensor_text(tensor) for tensor in layer.get("Inputs", [])[:1]),
        str(weights.get("Type", "")) if isinstance(weights, dict) else "",
        *(_tensor_text(tensor) for tensor in layer.get("Outputs", [])[:1]),
    ]
    return next((kind for kind in map(_type_in, texts) if kind), UNKNOWN)


def _tensor_text(tensor: Any) -> str:
    """What the inspector says of a tensor's type: TensorRT 10 with the layout, TensorRT 11 apart from it."""
    if not isinstance(tensor, dict):
        return ""
    keys = ("Datatype", "DataType", "Data Type", "Type", "Format/Datatype", "Format")
    return next((str(tensor[key]) for key in keys if _type_in(str(tensor.get(key, "")))), "")


def _type_in(text: str) -> str:
    return next((kind for kind, spelling in SPELLINGS if re.search(rf"(?i)(?<![a-z]){spelling}", text)), "")


def _onnx_nodes(layer: dict[str, Any]) -> list[str]:
    """The ONNX nodes that TensorRT notes as a layer's origin."""
    return re.findall(r"\[ONNX Layer: ([^\]]+)\]", str(layer.get("Metadata", "")))


def _stands_alone(layer: dict[str, Any], operators: dict[str, str]) -> bool:
    """Whether a layer only quantises or dequantises data."""
    if layer.get("Origin") == "QDQ" or QUANTISING_KINDS.match(str(layer.get("LayerType", ""))):
        return True
    found = [operators.get(node, "") for node in _onnx_nodes(layer)]
    return any(kind in QUANTISING for kind in found) and all(kind in IDLE for kind in found)


def _works(layer: dict[str, Any]) -> bool:
    """Whether a layer has work to do, and is no copy for another optimization profile than the first."""
    kind = str(layer.get("LayerType", "")).lower()
    return kind not in NO_WORK and not LATER_PROFILE.search(str(layer.get("Name", "")))


def _reformats(layer: dict[str, Any], operators: dict[str, str]) -> bool:
    """Whether a layer was added to reformat data; the network's own concatenations and slices are of that kind too."""
    if str(layer.get("Name", "")).startswith("Reformatting CopyNode"):
        return True
    return layer.get("LayerType") == "Reformat" and all(
        operators.get(node) in (None, *IDLE) for node in _onnx_nodes(layer)
    )


def _products(graph: OnnxGraph) -> dict[str, str]:
    """The torch layer of every node that multiplies data, by the node's name."""
    layers, maker = LayerMap(graph), {output: node for node in graph.nodes for output in node.outputs}
    return {
        node.name: layers.layer(node)
        for node in graph.nodes
        if node.name and node.operator in MULTIPLYING and not _only_weights(node, graph, maker)
    }
