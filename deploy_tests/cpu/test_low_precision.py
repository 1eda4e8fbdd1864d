"""Networks in 16 bits: what is rounded and how, what stays in FP32 and why, and that nothing overflows in silence."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from chip_deploy.export import low_precision
from chip_deploy.export.errors import BuildFailed, ConversionFailed
from chip_deploy.export.low_precision import (
    MOST_TERMS,
    element_types,
    emulated,
    holds_16_bits,
    in_order,
    lowered,
    opset_of,
    overflowing,
    prepared,
    raised,
)
from chip_deploy.export.target import parse_target
from chip_deploy.export.targets import make_target

FLOATS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def network(nodes, weights=(), *, shape=(1, 4), out=None, opset=18, inputs=("x",)) -> onnx.ModelProto:
    """A network from `x` to `y`."""
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in inputs]
    result = [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)]
    graph = helper.make_graph(nodes, "net", given, result, [numpy_helper.from_array(w, name) for name, w in weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def dense_net(weight: np.ndarray, bias: np.ndarray | None = None) -> onnx.ModelProto:
    bias = np.zeros(weight.shape[0], np.float32) if bias is None else bias
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="gemm", transB=1),
        helper.make_node("Relu", ["h"], ["y"], name="relu"),
    ]
    return network(nodes, [("w", weight), ("b", bias)], shape=(2, weight.shape[1]))


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_inputs_and_outputs_stay_in_fp32_and_all_between_them_is_in_16_bits(kind) -> None:
    model, kept = lowered(prepared(dense_net(draw(3, 4))), kind)
    types = element_types(model.graph)
    assert {types.pop("x"), types.pop("y")} == {TensorProto.FLOAT}
    assert set(types.values()) == {FLOATS[kind]}
    assert kept == {}
    assert [node.op_type for node in model.graph.node] == ["Cast", "Gemm", "Relu", "Cast"]


def test_fp16_weights_are_those_of_numpy() -> None:
    weight = draw(5, 4)
    model, _ = lowered(prepared(dense_net(weight)), "fp16")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(stored["w"], weight.astype(np.float16))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=4, max_size=4))
@settings(deadline=None, max_examples=60)
def test_bf16_weights_are_those_of_torch(values) -> None:
    weight = np.float32([values])
    model, _ = lowered(prepared(dense_net(weight)), "bf16")
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    expected = torch.tensor(weight).to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(np.frombuffer(stored.raw_data, np.int16).reshape(1, 4), expected)


def test_bf16_is_written_where_onnx_has_it_and_notes_survive_the_change() -> None:
    model = prepared(dense_net(draw(3, 4)))
    entry = model.graph.node[0].metadata_props.add()
    entry.key, entry.value = "namespace", "head"
    low, _ = lowered(model, "bf16")
    assert opset_of(low) == 22
    assert [prop.value for node in low.graph.node if node.name == "gemm" for prop in node.metadata_props] == ["head"]


@pytest.mark.parametrize(("kind", "half"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_16_bit_network_emulated_in_fp32_rounds_where_torch_does(kind, half) -> None:
    first, second = draw(6, 4), draw(3, 6, seed=1)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="a"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "b"], ["y"], name="b"),
    ]
    model = network(nodes, [("a", first.T.copy()), ("b", second.T.copy())], shape=(2, 4))
    low, _ = lowered(prepared(model), kind)
    x = draw(2, 4, seed=2)

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return values.to(half).float()

    hidden = rounded(rounded(torch.tensor(x)) @ rounded(torch.tensor(first)).T).relu()
    expected = rounded(hidden @ rounded(torch.tensor(second)).T)
    np.testing.assert_array_equal(run(emulated(low), x), expected.numpy())


def loud_between_two_convolutions() -> onnx.ModelProto:
    """fp16: x -> times 100 -> relu -> times 0.01; what lies between ends at 65504."""
    weights = [("up", np.full((1, 1, 1, 1), 100, np.float16)), ("down", np.full((1, 1, 1, 1), 0.01, np.float16))]
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], name="in", to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["low", "up"], ["loud"], name="first"),
        helper.make_node("Relu", ["loud"], ["kept"], name="relu"),
        helper.make_node("Conv", ["kept", "down"], ["quiet"], name="second"),
        helper.make_node("Cast", ["quiet"], ["y"], name="out", to=TensorProto.FLOAT),
    ]
    return network(nodes, weights, shape=(1, 1, 1, 1))


def test_emulated_fp16_overflows_between_two_convolutions() -> None:
    loud = loud_between_two_convolutions()
    assert holds_16_bits(loud)
    assert not holds_16_bits(prepared(dense_net(draw(3, 4))))
    x = np.full((1, 1, 1, 1), 1000.3, np.float32)  # 1000.5 in fp16; a hundred times that is infinite
    assert np.isinf(run(emulated(loud), x)).all()
    np.testing.assert_allclose(run(emulated(loud), x / 2), x / 2, rtol=2e-3)


def test_onnxruntime_itself_still_holds_fp16_in_fp32_between_two_convolutions() -> None:
    """When this fails, its CPU may have FP16 convolutions, and fp16 need not be emulated any more (seen in 1.31.1)."""
    x = np.full((1, 1, 1, 1), 1000.3, np.float32)
    assert np.isfinite(run(loud_between_two_convolutions(), x)).all()


def test_a_tensor_that_two_nodes_read_in_fp32_is_cast_once() -> None:
    model, kept = lowered(prepared(two_fragile_readers()), "fp16")
    assert sorted(kept) == ["exp", "softmax"]
    assert operators(model)["Cast"] == 5  # x and r; both results; y
    x = draw(1, 4)
    np.testing.assert_allclose(run(model, x), run(two_fragile_readers(), x), rtol=2e-3)


def test_onnxruntimes_own_converter_still_writes_one_name_twice() -> None:
    """When this fails, onnxruntime.transformers.float16 may take the place of our own pass (seen in 1.31.1)."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    found = convert_float_to_float16(two_fragile_readers(), keep_io_types=True, op_block_list=["Exp", "Softmax"])
    written = [name for node in found.graph.node for name in node.output]
    assert len(written) > len(set(written))


def two_fragile_readers() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("Softmax", ["r"], ["s"], name="softmax"),
        helper.make_node("Exp", ["r"], ["e"], name="exp"),
        helper.make_node("Add", ["s", "e"], ["y"], name="add"),
    ]
    return network(nodes)


def test_a_weight_that_both_types_read_is_kept_in_fp32_and_cast() -> None:
    nodes = [
        helper.make_node("Add", ["x", "w"], ["h"], name="add"),
        helper.make_node("Pow", ["h", "w"], ["p"], name="pow"),
        helper.make_node("Abs", ["p"], ["y"], name="abs"),
    ]
    model, _ = lowered(prepared(network(nodes, [("w", np.float32([1, 2, 1, 2]))])), "fp16")
    assert element_types(model.graph)["w"] == TensorProto.FLOAT
    x = np.abs(draw(1, 4))
    by = np.float32([1, 2, 1, 2])
    np.testing.assert_allclose(run(model, x), (x + by) ** by, rtol=3e-3)


@pytest.mark.parametrize(("side", "stays"), [(16, False), (17, True)])
def test_a_mean_over_many_numbers_stays_in_fp32(side, stays) -> None:
    assert MOST_TERMS == 16 * 16
    node = helper.make_node("GlobalAveragePool", ["x"], ["y"], name="pool")
    _, kept = lowered(prepared(network([node], shape=(1, 2, side, side))), "fp16")
    assert kept == ({"pool": f"it adds up {side * side} numbers"} if stays else {})


def test_an_operator_for_which_onnx_has_no_such_type_stays_in_fp32() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["h"], name="relu"),
        helper.make_node("Shrink", ["h"], ["y"], name="shrink"),
    ]
    model, kept = lowered(prepared(network(nodes, shape=(1, 3, 3))), "bf16")
    assert kept == {"shrink": "ONNX has no bf16 for it"}
    assert element_types(model.graph)["y"] == TensorProto.FLOAT


def test_what_only_fp32_may_say_is_left_in_fp32() -> None:
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], name="resize")
    net = network([node], [("scales", np.float32([1, 1, 2, 2]))], shape=(1, 1, 2, 2))
    model, kept = lowered(prepared(net), "fp16")
    assert list(kept) == ["resize"]
    assert element_types(model.graph)["scales"] == TensorProto.FLOAT


def test_a_node_named_by_the_caller_stays_with_the_callers_reason() -> None:
    model, kept = lowered(prepared(dense_net(draw(3, 4))), "fp16", keep={"gemm": "because"})
    assert kept == {"gemm": "because"}
    assert element_types(model.graph)["w"] == TensorProto.FLOAT


def test_numbers_that_fp16_cannot_hold_keep_who_makes_and_who_reads_them_in_fp32() -> None:
    model = prepared(dense_net(np.full((1, 4), 300.0, np.float32)))
    found = overflowing(model, {"x": 200.0, "h": 240_000.0, "y": 240_000.0}, images=7)
    assert found == dict.fromkeys(("gemm", "relu"), "values up to 2.4e+05 on 7 calibration images; FP16 ends at 65504")
    x = np.full((2, 4), 200.0, np.float32)
    kept, _ = lowered(model, "fp16", keep=found)
    np.testing.assert_array_equal(run(kept, x), np.full((2, 1), 240_000.0))
    careless, _ = lowered(model, "fp16")
    assert np.isinf(run(careless, x)).all()


def test_half_of_the_range_is_left_to_images_that_were_not_seen() -> None:
    model = prepared(dense_net(draw(1, 4)))
    assert overflowing(model, {"h": 32_000.0}, images=1) == {}
    assert list(overflowing(model, {"h": 33_000.0}, images=1)) == ["gemm", "relu"]


def test_a_tensor_that_vanishes_in_fp16_keeps_who_makes_and_who_reads_it_in_fp32() -> None:
    model = prepared(dense_net(np.full((1, 4), 0.01, np.float32)))
    assert overflowing(model, {"x": 1.0, "h": 7e-5}, images=3) == {}
    x = np.full((2, 4), 1e-7, np.float32)
    found = overflowing(model, {"x": 1e-7, "h": 4e-9, "y": 4e-9}, images=3)
    assert found == dict.fromkeys(
        ("gemm", "relu"), "values of at most 4.0e-09 on 3 calibration images; FP16 rounds those to few bits"
    )
    kept, _ = lowered(model, "fp16", keep=found)
    np.testing.assert_allclose(run(emulated(kept), x), 4e-9, rtol=1e-5)
    careless, _ = lowered(model, "fp16")
    assert not run(emulated(careless), x).any()


@pytest.mark.parametrize("way", ["Clip", "Max", "Add"])
def test_what_a_tiny_constant_keeps_from_zero_is_divided_by_in_fp32(way) -> None:
    nodes = [
        helper.make_node("ReduceL2", ["x", "axes"], ["norm"], name="norm", keepdims=1),
        helper.make_node(way, ["norm", "tiny"], ["held"], name="hold"),
        helper.make_node("Expand", ["held", "shape"], ["wide"], name="expand"),
        helper.make_node("Div", ["x", "wide"], ["h"], name="div"),
        helper.make_node("Relu", ["h"], ["y"], name="relu"),
    ]
    constants = [("axes", np.array([1])), ("tiny", np.float32(1e-12)), ("shape", np.array([2, 4]))]
    model = prepared(network(nodes, constants, shape=(2, 4)))
    found = overflowing(model, {"x": 1.0, "norm": 2.0, "held": 2.0, "wide": 2.0, "h": 1.0, "y": 1.0}, images=9)
    reason = "values are kept from 0 by 1.0e-12, which FP16 holds as 0"
    assert list(found) == ["hold", "expand", "div"]
    assert found["expand"] == found["div"] == reason
    x = np.float32([[0, 0, 0, 0], [3, 0, 4, 0]])
    kept, _ = lowered(model, "fp16", keep=found)
    np.testing.assert_allclose(run(emulated(kept), x), [[0, 0, 0, 0], [0.6, 0, 0.8, 0]], rtol=1e-3)
    careless, _ = lowered(model, "fp16")
    assert np.isnan(run(emulated(careless), x)).any()


def test_a_tensor_of_zeros_is_one_that_fp16_holds() -> None:
    assert overflowing(prepared(dense_net(draw(1, 4))), {"x": 1.0, "h": 0.0, "y": 0.0}, images=1) == {}


@pytest.mark.parametrize(
    ("weight", "reason"),
    [(1e5, "weights up to 1e+05; FP16 ends at 65504"), (1e-6, "weights of at most 1.0e-06, below what FP16 holds")],
)
def test_weights_that_fp16_cannot_hold_keep_their_node_in_fp32(weight, reason) -> None:
    model = prepared(dense_net(np.float32([[weight, 0.4 * weight, 0.3 * weight, 0.7 * weight]])))
    found = overflowing(model, {}, images=1)
    assert list(found) == ["gemm"]
    assert found["gemm"].startswith(reason)


def test_a_bias_that_is_almost_zero_keeps_nothing_in_fp32() -> None:
    model = prepared(dense_net(draw(3, 4), np.float32([1e-9, 0, 1e-8])))
    assert overflowing(model, {}, images=1) == {}
    assert list(overflowing(prepared(dense_net(draw(3, 4), np.float32([1e5, 0, 0]))), {"h": 1e5}, images=1))


def test_a_batch_norm_multiplies_and_adds_constants_and_is_not_fragile() -> None:
    node = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], name="norm")
    constants = [(name, np.abs(draw(3, seed=n)) + 0.1) for n, name in enumerate("sbmv")]
    model = network([node], constants, shape=(2, 3, 4, 4))
    low, kept = lowered(prepared(model), "fp16")
    assert kept == {}
    x = draw(2, 3, 4, 4)
    np.testing.assert_allclose(run(low, x), run(model, x), rtol=0.01, atol=0.01)


def test_what_tensorrt_does_not_read_in_bf16_stays_in_fp32() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["h"], name="relu"),
        helper.make_node("HardSwish", ["h"], ["y"], name="swish"),
    ]
    model = prepared(network(nodes))
    assert lowered(model, "bf16")[1] == {"swish": "TensorRT reads no bf16 for it"}
    assert lowered(model, "fp16")[1] == {}


def test_tensorrt_rtx_still_reads_no_hard_swish_in_bf16(tmp_path: Path, monkeypatch) -> None:
    """When this fails, `UNREAD` may lose the operator (seen in tensorrt_rtx 1.7.1)."""
    target = make_target(parse_target("trt-rtx:sm89"))
    if reason := target.unusable():
        pytest.skip(reason)
    monkeypatch.setattr(low_precision, "UNREAD", {})
    nodes = [
        helper.make_node("Relu", ["x"], ["h"], name="relu"),
        helper.make_node("HardSwish", ["h"], ["y"], name="swish"),
    ]
    onnx.save(lowered(prepared(network(nodes)), "bf16")[0], tmp_path / "net.onnx")
    (tmp_path / "bundle").mkdir()
    with pytest.raises(BuildFailed, match="HardSwish"):
        target.build(tmp_path / "net.onnx", tmp_path / "bundle" / "engines" / "e.engine", precision="bf16")


def test_a_bound_beyond_fp16_is_a_bound_all_the_same() -> None:
    nodes = [helper.make_node("Clip", ["x", "low", "high"], ["y"], name="clip")]
    model = prepared(network(nodes, [("low", np.float32(0)), ("high", np.float32(3e38))]))
    assert overflowing(model, {"x": 4.0}, images=1) == {}
    low, kept = lowered(model, "fp16")
    assert kept == {}
    np.testing.assert_array_equal(run(low, np.float32([[-1, 0, 2, 4]])), [[0, 0, 2, 4]])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_no_reason_to_keep_a_node_in_fp32(bad) -> None:
    nodes = [helper.make_node("Add", ["x", "mask"], ["y"], name="add")]
    model = prepared(network(nodes, [("mask", np.float32([0.0, 1.0, bad, 0.0]))]))
    assert overflowing(model, {"x": 1.0, "y": 2.0}, images=1) == {}
    low, kept = lowered(model, "fp16")
    x = draw(1, 4).astype(np.float16).astype(np.float32)
    assert kept == {}
    assert run(emulated(low), x) == pytest.approx(run(model, x), rel=2**-10, nan_ok=True)


def test_a_weight_that_is_an_output_as_well_stays_in_fp32() -> None:
    model = dense_net(draw(3, 4))
    model.graph.output.add().CopyFrom(helper.make_tensor_value_info("w", TensorProto.FLOAT, (3, 4)))
    low, _ = lowered(prepared(model), "fp16")
    assert element_types(low.graph)["w"] == TensorProto.FLOAT


def test_a_pair_whose_tensor_overflows_stays_in_fp32_with_it() -> None:
    pair = quantised_relu(scale=1000.0)
    found = overflowing(pair, {"x": 127_000.0, "h": 127_000.0}, images=1)
    assert sorted(found) == ["dq", "last", "q", "relu"]


@pytest.mark.parametrize("scale", [1e-9, 3e-8, 1e-5, 0.0123, 1.0])
def test_a_scale_becomes_the_next_larger_fp16_number_and_never_zero(scale) -> None:
    model, _ = lowered(raised(quantised_relu(scale), 19), "fp16")
    stored = next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == "s")
    assert stored.dtype == np.float16
    assert np.float32(stored) >= np.float32(scale)
    assert np.float32(np.nextafter(stored, np.float16(0))) < np.float32(scale)


def quantised_relu(scale: float) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Relu", ["x"], ["h"], name="relu"),
        helper.make_node("QuantizeLinear", ["h", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dq"),
        helper.make_node("Abs", ["d"], ["y"], name="last"),
    ]
    return prepared(network(nodes, [("s", np.float32(scale)), ("z", np.int8(0))]))


def test_the_same_network_gives_the_same_bytes() -> None:
    model = prepared(dense_net(draw(8, 4)))
    first, second = (lowered(model, "fp16")[0].SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_the_network_that_is_given_is_left_as_it_was() -> None:
    model = prepared(dense_net(draw(8, 4)))
    before = model.SerializeToString(deterministic=True)
    lowered(model, "fp16")
    lowered(model, "bf16")
    assert model.SerializeToString(deterministic=True) == before


def test_constants_become_weights_and_nodes_get_names() -> None:
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float32([2.0]), "c"))
    model = prepared(network([constant, helper.make_node("Mul", ["x", "c"], ["y"])]))
    assert [(node.op_type, bool(node.name)) for node in model.graph.node] == [("Mul", True)]
    low, _ = lowered(model, "fp16")
    np.testing.assert_array_equal(run(low, np.float32([[1, 2, 3, 4]])), [[2, 4, 6, 8]])


def test_a_network_with_a_branch_is_refused_with_the_way_out() -> None:
    then = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["t"])],
        "t",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, (1, 4))],
    )
    node = helper.make_node("If", ["flag"], ["y"], name="choose", then_branch=then, else_branch=then)
    model = network([node], [("flag", np.bool_(True))])
    with pytest.raises(ConversionFailed, match=r"'choose' \(If\) holds a graph of its own.*--precision fp32"):
        prepared(model)


def test_nodes_are_put_in_order_and_keep_the_order_they_have() -> None:
    model = network(
        [helper.make_node("Abs", [f"h{n}"], [f"h{n + 1}" if n < 3 else "y"], name=str(n)) for n in (2, 0, 3, 1)]
    )
    model.graph.node[1].input[0] = "x"
    in_order(model.graph)
    assert [node.name for node in model.graph.node] == ["0", "1", "2", "3"]


def test_casts_count_as_work_of_the_layer_that_they_serve(tmp_path: Path) -> None:
    from chip_deploy.export.layers import LayerMap
    from chip_deploy.export.onnx_export import export_onnx
    from chip_deploy.export.onnx_graph import read_graph

    net = torch.nn.Sequential()
    net.add_module("first", torch.nn.Conv2d(3, 4, 3))
    net.add_module("act", torch.nn.ReLU())
    net.add_module("second", torch.nn.Conv2d(4, 2, 3))
    export_onnx(net, torch.zeros(1, 3, 8, 8), tmp_path / "net.onnx")
    exact = LayerMap(read_graph(tmp_path / "net.onnx"))
    names = {node.name: exact.layer(node) for node in read_graph(tmp_path / "net.onnx").nodes}
    low, _ = lowered(prepared(onnx.load(tmp_path / "net.onnx")), "fp16", layers=names)
    onnx.save(low, tmp_path / "low.onnx")
    assert LayerMap(read_graph(tmp_path / "low.onnx")).work.keys() == exact.work.keys()
