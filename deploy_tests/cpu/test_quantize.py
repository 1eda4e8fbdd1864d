"""Q/DQ pairs: where they stand, what their scales are, and that the network computes what a loop of 8 bits does."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from chip_deploy.export.errors import ConversionFailed
from chip_deploy.export.low_precision import element_types, opset_of, prepared
from chip_deploy.export.quantize import (
    QuantLayer,
    excluded,
    quantizable,
    quantized,
    tensors_read,
)

WIDTH = 6


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def residual(*, bias: float = 1.0) -> onnx.ModelProto:
    """conv -> relu -> conv, added to the relu; its mean, and a matrix; with an addition of a constant besides."""
    nodes = [
        helper.make_node("Conv", ["x", "stem.weight", "stem.bias"], ["a"], name="conv_a", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "body.weight"], ["b"], name="conv_b", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["b", "r"], ["s"], name="sum"),
        helper.make_node("Add", ["s", "shift"], ["t"], name="shifted"),
        helper.make_node("GlobalAveragePool", ["t"], ["m"], name="mean"),
        helper.make_node("Flatten", ["m"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "head.weight", "head.bias"], ["y"], name="head", transB=1),
    ]
    weights = {
        "stem.weight": draw(WIDTH, 3, 3, 3),
        "stem.bias": bias * draw(WIDTH, seed=1),
        "body.weight": draw(WIDTH, WIDTH, 3, 3, seed=2) / 5,
        "shift": np.float32([0.5]),
        "head.weight": draw(4, WIDTH, seed=3),
        "head.bias": draw(4, seed=4),
    }
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 5, 5))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4))],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    return prepared(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


LAYERS = [
    QuantLayer("conv_a", "stem", "Conv"),
    QuantLayer("conv_b", "body", "Conv"),
    QuantLayer("sum", "block", "Add"),
    QuantLayer("head", "head", "Gemm"),
]
LAYER_OF = {layer.node: layer.layer for layer in LAYERS}
REACHES = {"x": 3.0, "r": 4.0, "b": 5.0, "f": 6.0}
ALL = [layer.node for layer in LAYERS]


def tensors(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def maker(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.output)


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(each for each in model.graph.node if each.name == name)


def pair(model: onnx.ModelProto, name: str) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """The Q and the DQ through which a node reads the tensor `name`."""
    dequantize = maker(model, name)
    quantize = maker(model, dequantize.input[0])
    assert (quantize.op_type, dequantize.op_type) == ("QuantizeLinear", "DequantizeLinear")
    return quantize, dequantize


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


def test_layers_with_a_weight_and_sums_of_two_branches_can_be_quantised() -> None:
    assert quantizable(residual(), LAYER_OF) == LAYERS


def test_a_sum_of_whole_numbers_is_no_layer() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], name="shape"),
        helper.make_node("Abs", ["n"], ["m"], name="abs"),
        helper.make_node("Add", ["n", "m"], ["both"], name="whole"),
        helper.make_node("Cast", ["both"], ["f"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Relu", ["f"], ["g"], name="relu"),
        helper.make_node("Add", ["f", "g"], ["y"], name="floats"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", (1, 3)), ("y", (2,)))
    ]
    graph = helper.make_graph(nodes, "sums", ends[:1], ends[1:])
    model = prepared(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    assert [layer.node for layer in quantizable(model, {})] == ["floats"]


def one_layer(nodes, weights, *, x, y) -> onnx.ModelProto:
    """A network from `x` to `y` of these shapes."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", x), ("y", y))]
    held = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], held)
    return prepared(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def test_a_stack_of_matrices_has_no_axis_of_channels_and_is_no_layer() -> None:
    product = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    stacked = one_layer(product, {"w": draw(3, 4, 2)}, x=(3, 1, 4), y=(3, 1, 2))
    single = one_layer(product, {"w": draw(4, 2)}, x=(3, 1, 4), y=(3, 1, 2))
    assert [len(quantizable(model, {})) for model in (stacked, single)] == [0, 1]


def test_a_network_that_is_quantised_already_is_refused_with_the_way_out() -> None:
    model = quantized(residual(), REACHES, ["conv_b"])
    with pytest.raises(ConversionFailed, match=r"\(QuantizeLinear\) quantises already.* Use --precision fp32"):
        quantizable(model, LAYER_OF)


def test_sums_of_one_name_are_told_apart_by_their_number() -> None:
    model = one_layer(
        [
            helper.make_node("Add", ["x", "a"], ["s"], name="node_add"),
            helper.make_node("Relu", ["x"], ["a"], name="relu"),
            helper.make_node("Add", ["s", "a"], ["y"], name="node_add_1"),
        ],
        {},
        x=(1, 3),
        y=(1, 3),
    )
    found = quantizable(model, {"node_add": "add", "node_add_1": "add"})
    assert [each.key for each in found] == [("add#1", "Add"), ("add#2", "Add")]
    assert excluded(found, ["add#2"], first_last=False).keys() == {"node_add_1"}
    assert excluded(found, ["add"], first_last=False).keys() == {"node_add", "node_add_1"}


def test_a_tensor_of_the_network_that_is_called_like_a_scale_is_not_taken_for_one() -> None:
    names = {"body.weight": "r_scale", "shift": "r_QuantizeLinear_Output_1", "head.bias": "f_zero_point"}
    renamed = residual()
    for tensor in renamed.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for each in renamed.graph.node:
        for place, name in enumerate(each.input):
            each.input[place] = names.get(name, name)
    x = draw(1, 3, 5, 5, seed=9)
    found = quantized(renamed, REACHES, ALL)
    np.testing.assert_array_equal(run(found, x), run(quantized(residual(), REACHES, ALL), x))
    assert {*names.values()} <= tensors(found).keys()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("more", [0, 10])
def test_a_layer_that_is_called_twice_keeps_its_bias(more: int, kind: str) -> None:
    """more: constants besides, so that the network has tensors with numbers like that of the bias and one behind it."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["a"], name="first"),
        helper.make_node("Conv", ["a", "w", "b"], ["s0"], name="second"),
        *(helper.make_node("Add", [f"s{n}", f"c{n}"], [f"s{n + 1}"]) for n in range(more)),
        helper.make_node("Relu", [f"s{more}"], ["y"]),
    ]
    constants = {f"c{n}": np.float32([n]) for n in range(more)}
    weights = {"b": np.float32([1, 2, 3]), "w": draw(3, 3, 1, 1), **constants}
    model = one_layer(nodes, weights, x=(1, 3, 4, 4), y=(1, 3, 4, 4))
    x = draw(1, 3, 4, 4, seed=1)
    found = quantized(model, {"x": 3.0, "a": 8.0}, ["first", "second"], kind=kind)
    # A few steps of 8/127, and of a sixteenth of each number.
    np.testing.assert_allclose(run(found, x), run(model, x), atol=0.2 if kind == "int8" else 1.0)


def test_a_weight_that_two_kinds_of_layers_read_has_a_scale_for_each_channel_of_either() -> None:
    model = one_layer(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], name="down"),
            helper.make_node("ConvTranspose", ["a", "w"], ["y"], name="up"),
        ],
        {"w": draw(4, 3, 1, 1) * np.float32([1, 10, 100])[:, None, None]},
        x=(1, 3, 5, 5),
        y=(1, 3, 5, 5),
    )
    found = quantized(model, {"x": 3.0, "a": 4.0}, ["down", "up"])
    held = tensors(found)
    for name, axis in (("down", 0), ("up", 1)):
        quantize, dequantize = pair(found, node(found, name).input[1])
        others = tuple({0, 1, 2, 3} - {axis})
        np.testing.assert_allclose(
            held[quantize.input[1]], np.abs(held[quantize.input[0]]).max(others) / 127, rtol=1e-6
        )
        assert [each.i for pair in (quantize, dequantize) for each in pair.attribute if each.name == "axis"] == [
            axis
        ] * 2


def test_a_pair_that_nobody_reads_does_not_stay() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="relu"),
        helper.make_node("Gemm", ["a", "w", "a"], ["y"], name="product"),  # what it adds is what it multiplies
    ]
    model = one_layer(nodes, {"w": draw(4, 4)}, x=(2, 4), y=(2, 4))
    found = quantized(model, {"a": 3.0}, ["product"])
    read = {name for each in found.graph.node for name in each.input}
    assert all(each.output[0] in read for each in found.graph.node if each.op_type == "DequantizeLinear")


def test_a_file_in_an_opset_without_steps_for_each_channel_is_refused_with_the_way_out() -> None:
    model = residual()
    model.opset_import[0].version = 12
    with pytest.raises(ConversionFailed, match=r"opset 12, and .* need 13 or later\. Export it again\."):
        quantizable(model, LAYER_OF)


def test_what_they_read_without_weights_has_to_be_known() -> None:
    assert tensors_read(residual(), LAYERS) == REACHES.keys()


def test_every_reader_has_a_pair_of_its_own_and_so_has_each_side_of_a_sum() -> None:
    model = quantized(residual(), REACHES, ALL)
    assert Counter(each.op_type for each in model.graph.node)["QuantizeLinear"] == 3 + 5  # weights, and what is read
    sources = {side: pair(model, name)[0].input[0] for side, name in enumerate(node(model, "sum").input)}
    assert sources == {0: "b", 1: "r"}
    assert pair(model, node(model, "conv_b").input[0])[0].input[0] == "r"
    assert node(model, "conv_b").input[0] != node(model, "sum").input[1]
    assert node(model, "shifted").input[0] == "s"


def test_results_are_not_quantised_and_biases_stay_in_float() -> None:
    model = quantized(residual(), REACHES, ALL)
    assert [list(node(model, name).output) for name in ALL] == [["a"], ["b"], ["s"], ["y"]]
    assert node(model, "conv_a").input[2] == "stem.bias"
    assert TensorProto.INT32 not in element_types(model.graph).values()


def test_pairs_are_symmetric_with_a_scale_for_each_channel_of_a_weight() -> None:
    model = quantized(residual(), REACHES, ALL)
    held = tensors(model)
    for name, axes in (("conv_a", (1, 2, 3)), ("conv_b", (1, 2, 3)), ("head", (1,))):
        quantize, dequantize = pair(model, node(model, name).input[1])
        weight = held[quantize.input[0]]
        np.testing.assert_allclose(held[quantize.input[1]], np.abs(weight).max(axes) / 127, rtol=1e-6)
        assert next(each.i for each in quantize.attribute if each.name == "axis") == 0
        assert quantize.input[1:] == dequantize.input[1:]
    quantize, _ = pair(model, node(model, "conv_b").input[0])
    assert held[quantize.input[1]] == pytest.approx(4.0 / 127)
    zeros = [held[each.input[2]] for each in model.graph.node if each.op_type == "QuantizeLinear"]
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)


def test_a_tiny_bias_changes_no_scale_of_a_weight() -> None:
    scales = [
        {
            name: values
            for name, values in tensors(quantized(residual(bias=bias), REACHES, ALL)).items()
            if "scale" in name
        }
        for bias in (1.0, 1e12)
    ]
    for name, values in scales[0].items():
        np.testing.assert_array_equal(values, scales[1][name], err_msg=name)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_network_computes_what_a_loop_of_8_bits_does(kind) -> None:
    x = draw(1, 3, 5, 5, seed=9)
    held = tensors(residual())

    def eight_bits(values: np.ndarray, reach: np.ndarray | float) -> np.ndarray:
        scale = np.float32(reach) / np.float32({"int8": 127, "fp8": 448}[kind])
        return steps(values / scale, kind) * scale

    def weight(name: str) -> np.ndarray:
        values = held[name]
        return eight_bits(values, np.abs(values).max(tuple(range(1, values.ndim)), keepdims=True))

    relu = np.maximum(convolved(eight_bits(x, 3.0), weight("stem.weight")) + held["stem.bias"][:, None, None], 0)
    body = convolved(eight_bits(relu, 4.0), weight("body.weight"))
    total = eight_bits(body, 5.0) + eight_bits(relu, 4.0) + np.float32(0.5)
    expected = eight_bits(total.mean((2, 3)), 6.0) @ weight("head.weight").T + held["head.bias"]
    # Sums of 54 numbers in another order; no value lies so near the middle of two steps that it goes to the other.
    np.testing.assert_allclose(run(quantized(residual(), REACHES, ALL, kind=kind), x), expected, rtol=1e-4)


def test_only_the_layers_that_are_named_are_quantised() -> None:
    model = quantized(residual(), REACHES, ["conv_b"])
    assert Counter(each.op_type for each in model.graph.node)["QuantizeLinear"] == 2
    assert node(model, "conv_a").input[0] == "x"
    assert node(model, "head").input[1] == "head.weight"


def test_a_layer_that_is_left_out_reads_what_it_read_before_though_others_read_it_in_8_bits() -> None:
    model = quantized(residual(), REACHES, ["sum"])
    assert node(model, "conv_b").input[0] == "r"
    assert pair(model, node(model, "sum").input[1])[0].input[0] == "r"
    assert Counter(each.op_type for each in model.graph.node)["QuantizeLinear"] == 2


def test_no_layer_at_all_leaves_the_network_as_it_is() -> None:
    model = quantized(residual(), REACHES, [])
    assert model.SerializeToString(deterministic=True) == residual().SerializeToString(deterministic=True)


def test_fp8_pairs_have_the_same_reach_in_steps_of_448() -> None:
    model = quantized(residual(), REACHES, ALL, kind="fp8")
    assert opset_of(model) == 19
    held = tensors(model)
    quantize, _ = pair(model, node(model, "conv_b").input[0])
    assert held[quantize.input[1]] == pytest.approx(4.0 / 448)
    zeros = {each.input[2] for each in model.graph.node if each.op_type == "QuantizeLinear"}
    types = element_types(model.graph)
    assert {types[name] for name in zeros} == {TensorProto.FLOAT8E4M3FN}
    assert all(not held[name].astype(np.float32).any() for name in zeros)


def test_the_same_network_gives_the_same_bytes() -> None:
    first, second = (quantized(residual(), REACHES, ALL).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_a_channel_that_is_dead_is_quantised_without_harm() -> None:
    model = residual()
    tensor = next(each for each in model.graph.initializer if each.name == "body.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[2] = 0.0
    tensor.CopyFrom(numpy_helper.from_array(values, "body.weight"))
    found = run(quantized(model, REACHES, ALL), draw(1, 3, 5, 5))
    assert np.isfinite(found).all()


def test_layers_are_excluded_by_name_by_pattern_and_at_both_ends() -> None:
    assert excluded(LAYERS, ["b*"], first_last=False) == {
        "conv_b": "quantize.exclude names it",
        "sum": "quantize.exclude names it",
    }
    assert excluded(LAYERS, [], first_last=True) == {"conv_a": "it is the first layer", "head": "it is the last layer"}
    assert excluded(LAYERS, [], first_last=False) == {}


def test_a_layer_that_there_is_not_cannot_be_excluded() -> None:
    with pytest.raises(
        ValueError, match=r"quantize.exclude: no layer .* 'boddy'\. There are: stem, body, block, head\."
    ):
        excluded(LAYERS, ["boddy"], first_last=False)


def steps(values: np.ndarray, kind: str) -> np.ndarray:
    """The nearest of the numbers that 8 bits stand for; beyond the last one, the last one."""
    if kind == "int8":
        return np.clip(np.round(values), -128, 127).astype(np.float32)
    inside = torch.tensor(values, dtype=torch.float32).clamp(-448, 448)
    return inside.to(torch.float8_e4m3fn).float().numpy()


def convolved(maps: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A 3x3 convolution with a border of zeros, as a loop."""
    padded = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = maps.shape[2:]
    out = np.zeros((1, len(weight), height, width), np.float64)
    for row in range(height):
        for column in range(width):
            patch = padded[0, :, row : row + 3, column : column + 3]
            out[0, :, row, column] = (weight * patch).sum((1, 2, 3), dtype=np.float64)
    return out.astype(np.float32)
