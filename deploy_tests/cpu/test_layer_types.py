"""In which types layers run: ONNX graphs written by hand and exported ones, and what TensorRT's inspector tells."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torchvision import models

from chip_deploy.export.layer_types import engine_types, graph_types
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.precision import Converter

ONNX_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def write(path: Path, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto]) -> Path:
    """A network from `input` to `output`, with no word about what is between: converted files leave that out."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8, 8]) for name in ("input", "output")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def weight(name: str, kind: str = "fp32") -> onnx.TensorProto:
    values = np.zeros((4, 4, 1, 1), np.float32)
    if kind == "fp32":
        return numpy_helper.from_array(values, name)
    return helper.make_tensor(name, ONNX_TYPES[kind], values.shape, values.ravel().tolist())


def mixed(path: Path, kind: str) -> Path:
    """One convolution in `kind` between casts, and one that stayed in fp32."""
    return write(
        path,
        [
            helper.make_node("Cast", ["input"], ["low"], to=ONNX_TYPES[kind]),
            helper.make_node("Conv", ["low", "first.weight"], ["a"], name="first"),
            helper.make_node("Relu", ["a"], ["b"], name="relu"),
            helper.make_node("Cast", ["b"], ["high"], to=TensorProto.FLOAT),
            helper.make_node("Conv", ["high", "second.weight"], ["output"], name="second"),
        ],
        [weight("first.weight", kind), weight("second.weight")],
    )


def quantised(path: Path, *, number: int = TensorProto.INT8) -> Path:
    """Convolution, sum and head with Q/DQ before and on the weights; the head's input was left out."""
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1])
    zero = helper.make_tensor("zero", number, [], [0])
    weights = [scale, zero]
    nodes = []

    def q_dq(name: str) -> str:
        nodes.append(helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_dq"]))
        return f"{name}_dq"

    for name in ("conv.weight", "head.weight"):
        weights.append(weight(name))
    nodes.append(helper.make_node("Conv", [q_dq("input"), q_dq("conv.weight")], ["a"], name="conv"))
    nodes.append(helper.make_node("Add", [q_dq("a"), "input_dq"], ["b"], name="sum"))
    nodes.append(helper.make_node("Conv", ["b", q_dq("head.weight")], ["output"], name="head"))
    return write(path, nodes, weights)


# By the ONNX graph --------------------------------------------------------------------------------------------------


def test_a_network_as_torch_exports_it_is_in_fp32_throughout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export_onnx(models.resnet18(num_classes=10), torch.zeros(1, 3, 32, 32), tmp_path / "model.onnx")
    types = graph_types(tmp_path / "model.onnx", "fp32")
    assert (types.source, types.multiplying, types.other_type) == ("graph", {"fp32": 21}, [])
    assert (types.unfused, types.reformats) == ([], None)
    assert types.sentence == "All 21 multiplying layers run in fp32 (by the ONNX file)."
    assert set(types.layers) == {"fp32"}


def test_asked_for_fp16_and_got_fp32_throughout_is_said_plainly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export_onnx(models.resnet18(num_classes=10), torch.zeros(1, 3, 32, 32), tmp_path / "model.onnx")
    types = graph_types(tmp_path / "model.onnx", "fp16")
    assert types.sentence == "Asked for fp16, but all 21 multiplying layers run in fp32 (by the ONNX file)."
    assert types.other_type[:2] == ["conv1", "layer1.0.conv1"]


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_a_layer_that_stayed_in_fp32_is_named_though_the_file_tells_no_types_between(kind: str, tmp_path: Path) -> None:
    types = graph_types(mixed(tmp_path / "model.onnx", kind), kind)
    assert types.multiplying == {kind: 1, "fp32": 1}
    assert types.other_type == ["second"]
    assert types.layers == {kind: 2, "fp32": 1}
    assert types.sentence == (
        f"Asked for {kind}, but of 2 multiplying layers 1 runs in fp32 (by the ONNX file): second."
    )


def test_a_layer_whose_input_and_weight_are_dequantised_runs_in_int8(tmp_path: Path) -> None:
    types = graph_types(quantised(tmp_path / "model.onnx"), "int8")
    assert types.multiplying == {"int8": 1, "fp32": 1}
    assert types.other_type == ["head"]
    # The sum reads two dequantised tensors, and so is one of the int8 layers; Q/DQ are layers of their own nowhere.
    assert types.layers == {"int8": 2, "fp32": 1}


def test_quantisation_to_eight_bit_floats_is_told_from_integers(tmp_path: Path) -> None:
    types = graph_types(quantised(tmp_path / "model.onnx", number=TensorProto.FLOAT8E4M3FN), "fp8")
    assert types.multiplying == {"fp8": 1, "fp32": 1}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_a_network_as_it_is_converted_runs_in_the_type_it_was_converted_to(
    precision: str, rest: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.AdaptiveAvgPool2d(1)),
        *(torch.nn.Flatten(), torch.nn.Linear(8, 4)),
    )
    export_onnx(net, torch.zeros(1, 3, 16, 16), tmp_path / "model.onnx")
    images = np.random.default_rng(0).standard_normal((4, 3, 16, 16), dtype=np.float32)
    converter = Converter(tmp_path / "model.onnx", images, precision=precision, rest=rest)
    converter.write(tmp_path / "converted.onnx")
    types = graph_types(tmp_path / "converted.onnx", precision)
    assert types.multiplying == {precision: 3}
    assert types.sentence == f"All 3 multiplying layers run in {precision} (by the ONNX file)."
    if precision == "int8":
        # The head again, left out.
        converter.write(tmp_path / "converted.onnx", left_out={each.node: "asked" for each in converter.layers[-1:]})
        types = graph_types(tmp_path / "converted.onnx", precision)
        assert types.multiplying == {"int8": 2, rest: 1}
        assert types.sentence.endswith(f"1 runs in {rest} (by the ONNX file): 5.")


def test_nodes_in_functions_and_branches_are_said_to_be_of_unknown_type(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 4, 8, 8])
    inner = helper.make_node("Conv", ["input", "conv.weight"], ["output"], name="inner")
    idle = helper.make_node("Identity", ["input"], ["output"])
    branches = {
        "then_branch": helper.make_graph([inner], "then", [], [value]),
        "else_branch": helper.make_graph([idle], "else", [], [value]),
    }
    body = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Conv", ["b", "w"], ["c"])]
    call = helper.make_node("Block", ["input", "conv.weight"], ["called"], domain="local")
    condition = numpy_helper.from_array(np.array(True), "condition")
    path = write(
        tmp_path / "model.onnx",
        [call, helper.make_node("If", ["condition"], ["output"], name="if", **branches)],
        [weight("conv.weight"), condition],
    )
    model = onnx.load(path)
    model.functions.append(helper.make_function("local", "Block", ["a", "w"], ["c"], body, model.opset_import))
    onnx.save(model, path)
    types = graph_types(path, "fp16")
    assert types.multiplying == {"unknown": 2}
    assert types.layers["unknown"] == 3
    assert types.sentence == (
        "Asked for fp16; whether any of the 2 multiplying layers runs in it is not told (by the ONNX file). "
        "The types of 2 are not told: conv, c. "
        "3 nodes lie in functions, branches or loops of the ONNX file, where types are not told."
    )


def test_a_node_without_a_name_goes_by_what_it_writes(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", [helper.make_node("Conv", ["input", "w"], ["output"])], [weight("w")])
    assert graph_types(path, "fp16").other_type == ["output"]


# By the engine's own account ----------------------------------------------------------------------------------------


def tensor10(kind: str) -> dict[str, Any]:
    return {"Name": "t", "Dimensions": [1, 8, 4, 4], "Format/Datatype": kind}


def tensor11(kind: str) -> dict[str, Any]:
    return {"Name": "t", "Dimensions": [1, 8, 4, 4], "Format": "Linear", "Datatype": kind}


def layer(name: str, kind: str, read: dict[str, Any], written: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"Name": name, "LayerType": kind, "Inputs": [read], "Outputs": [written], **more}


def information(*layers: Any, io: str = "Bindings") -> str:
    """The inspector's JSON, with the bare control characters that it holds."""
    return json.dumps({"Layers": list(layers), io: ["input", "output"]}).replace("\\u001e", "\x1e")


def found(text: str, precision: str, onnx_path: Path | None = None) -> Any:
    types = engine_types(text, precision, onnx_path=onnx_path)
    assert types is not None
    return types


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        (tensor10("Row major linear FP32"), "fp32"),
        (tensor10("Channel major FP16 format where channel % 8 == 0"), "fp16"),
        (tensor10("Thirty-two wide channel vectorized row major Int8 format"), "int8"),
        (tensor10("Half"), "fp16"),
        (tensor10("Float"), "fp32"),
        (tensor10("BFloat16"), "bf16"),
        (tensor10("FP8"), "fp8"),
        (tensor11("Half"), "fp16"),
        (tensor11("Int8"), "int8"),
        ({"Name": "t", "Format": "N/A due to dynamic shapes"}, "unknown"),
    ],
)
def test_types_are_read_as_tensorrt_10_and_11_spell_them(told: dict[str, Any], kind: str) -> None:
    text = information(layer("conv", "CaskConvolution", told, told), io="I/O Tensors")
    assert found(text, kind).multiplying == {kind: 1}


def test_where_free_shapes_hide_the_type_that_of_the_weights_counts() -> None:
    hidden = tensor10("N/A due to dynamic shapes")
    text = information(layer("conv", "CaskConvolution", hidden, hidden, Weights={"Type": "Int8", "Count": 9}))
    assert found(text, "int8").multiplying == {"int8": 1}


def test_reformats_and_quantisations_that_stand_alone_are_counted_and_not_taken_for_layers() -> None:
    text = information(
        layer("input_q", "Reformat", tensor10("Float"), tensor10("Int8"), Origin="QDQ"),
        layer("conv", "CaskConvolution", tensor10("Int8"), tensor10("Int8")),
        layer("Reformatting CopyNode for Input Tensor 0 to fc", "Reformat", tensor10("Int8"), tensor10("Half")),
        layer("fc", "gemm", tensor10("Half"), tensor10("Half")),
        layer("shuffle", "NoOp", tensor10("Half"), tensor10("Half")),
        layer("out_dq", "Dequantize", tensor10("Half"), tensor10("Float")),
    )
    types = found(text, "int8")
    assert (types.source, types.unfused, types.reformats) == ("engine", ["input_q", "out_dq"], 1)
    assert types.multiplying == types.layers == {"int8": 1, "fp16": 1}
    assert types.other_type == ["fc"]
    assert types.sentence == (
        "Asked for int8, but of 2 multiplying layers 1 runs in fp16: fc. "
        "Q/DQ layers that were not fused: 2 (input_q, out_dq). Layers that only reformat data: 1."
    )


def test_fp32_where_fp16_was_asked_for_is_the_first_that_is_said() -> None:
    types = found(information(layer("conv", "CaskConvolution", tensor10("Float"), tensor10("Float"))), "fp16")
    assert types.sentence == "Asked for fp16, but the one multiplying layer runs in fp32."


@pytest.mark.parametrize(
    ("tactics", "sentence"),
    [
        (["", ""], "TF32 is allowed, so what is in fp32 may be multiplied in TF32."),
        (
            ["sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32_nhwckrsc_nhwc", "sm80_xmma_gemm_f32f32_f32"],
            "TF32 is allowed: by the names of their kernels, 1 of 2 fp32 layers multiply in it; the others may, too.",
        ),
        (
            ["cutlass_tensorop_s1688tf32gemm", "sm80_xmma_gemm_f32f32_TF32f32_f32"],
            "TF32 is allowed: by the names of their kernels, 2 of 2 fp32 layers multiply in it.",
        ),
    ],
)
def test_layers_in_fp32_may_multiply_in_tf32_and_some_kernels_say_so(tactics: list[str], sentence: str) -> None:
    single = tensor10("Float")
    text = information(
        *(layer(f"conv{n}", "CaskConvolution", single, single, TacticName=t) for n, t in enumerate(tactics))
    )
    allowed = engine_types(text, "fp32", tf32=True)
    assert allowed is not None
    assert allowed.multiplying == {"fp32": 2}
    assert allowed.sentence == f"All 2 multiplying layers run in fp32. {sentence}"
    assert found(text, "fp32").sentence == "All 2 multiplying layers run in fp32."


def test_where_no_layer_is_in_fp32_nothing_is_said_of_tf32() -> None:
    types = engine_types(information(layer("conv", "gemm", tensor10("Half"), tensor10("Half"))), "fp16", tf32=True)
    assert types is not None
    assert types.sentence == "The one multiplying layer runs in fp16."


def test_the_onnx_file_tells_which_layer_of_a_fused_name_multiplies(tmp_path: Path) -> None:
    path = mixed(tmp_path / "model.onnx", "fp16")
    fused = layer("__myl_Fused", "kgen", tensor10("Half"), tensor10("Half"))
    fused["Metadata"] = "[ONNX Layer: first]\x1e[ONNX Layer: relu]"
    other = layer("__myl_Rest", "kgen", tensor10("Half"), tensor10("Half"), Metadata="[ONNX Layer: relu]")
    second = layer("second", "CaskConvolution", tensor10("Half"), tensor10("Half"), Metadata="[ONNX Layer: second]")
    types = found(information(fused, other, second), "fp16", path)
    assert (types.multiplying, types.layers) == ({"fp16": 2}, {"fp16": 3})
    assert types.sentence == "All 2 multiplying layers run in fp16."


def noted(name: str, kind: str, *nodes: str, read: str = "Half", **more: Any) -> dict[str, Any]:
    """A layer with the ONNX nodes that TensorRT notes as its origin."""
    metadata = "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes)
    return layer(name, kind, tensor10(read), tensor10(read), Metadata=metadata, **more)


def test_a_convolution_within_tensorrts_compiler_goes_by_the_name_of_correlation() -> None:
    assert found(information(noted("conv_myl0_2", "correlation")), "fp16").multiplying == {"fp16": 1}


def test_of_products_that_are_fused_with_others_no_type_is_claimed(tmp_path: Path) -> None:
    path = mixed(tmp_path / "model.onnx", "fp16")
    region = noted("{ForeignNode[first...second]}", "Myelin", "first", "relu", "second")
    types = found(information(region), "fp16", path)
    assert types.multiplying == {"unknown": 2}
    assert types.other_type == []
    assert types.sentence == (
        "Asked for fp16; whether any of the 2 multiplying layers runs in it is not told. "
        "2 are fused into one layer that reads fp16; their own types are not told."
    )


def test_tf32_is_told_of_products_that_are_fused_with_others(tmp_path: Path) -> None:
    path = mixed(tmp_path / "model.onnx", "fp16")
    region = noted("{ForeignNode[first...second]}", "Myelin", "first", "second", read="Float")
    types = engine_types(information(region), "fp32", onnx_path=path, tf32=True)
    assert types is not None
    assert types.sentence.endswith("TF32 is allowed, so what is in fp32 may be multiplied in TF32.")


def test_a_product_fused_with_one_that_was_told_before_has_no_type_either(tmp_path: Path) -> None:
    path = mixed(tmp_path / "model.onnx", "fp16")
    both, again = (noted(name, "kgen", "first", "second") for name in ("__myl_One", "__myl_Two"))
    alone = noted("__myl_Only", "kgen", "first")
    assert found(information(both, again), "fp16", path).multiplying == {"unknown": 2}
    assert found(information(alone, again), "fp16", path).multiplying == {"fp16": 1, "unknown": 1}


def test_products_of_one_input_that_one_kernel_computes_are_counted_one_by_one(tmp_path: Path) -> None:
    path = mixed(tmp_path / "model.onnx", "fp16")
    types = found(information(noted("first || second", "CaskGemmConvolution", "first", "second")), "fp16", path)
    assert types.sentence == "All 2 multiplying layers run in fp16."


def test_a_layer_that_brings_data_into_place_for_a_product_is_not_a_second_one(tmp_path: Path) -> None:
    path = mixed(tmp_path / "model.onnx", "fp16")
    placing = noted("__myl_Move_myl0_1", "kgen", "second", read="Float")
    kernels = noted("first", "gemm", "first"), noted("second_myl0_2", "gemm", "second", "relu")
    types = found(information(placing, *kernels), "fp16", path)
    assert (types.multiplying, types.layers) == ({"fp16": 2}, {"fp32": 1, "fp16": 2})


def test_a_product_that_the_engine_does_not_mention_is_said_to_be_of_unknown_type(tmp_path: Path) -> None:
    path = mixed(tmp_path / "model.onnx", "fp16")
    rest = layer("{ForeignNode[relu...second]}", "Myelin", tensor10("Half"), tensor10("Float"), Metadata="")
    types = found(information(noted("first", "CaskConvolution", "first"), rest), "fp16", path)
    assert types.multiplying == {"fp16": 1, "unknown": 1}
    assert types.sentence == "1 of 2 multiplying layers runs in fp16. The type of 1 is not told: second."


def test_what_does_no_work_is_neither_a_layer_nor_a_reformat() -> None:
    copy = "Reformatting CopyNode for Input Tensor 0 to conv"
    text = information(
        layer("dummy_shape_call", "shape_call", {}, {}),
        layer(copy, "NoOp", tensor10("Half"), tensor10("Half")),
        layer("conv", "CaskConvolution", tensor10("Half"), tensor10("Half")),
        *(layer(f"sync {kind}", kind, {}, {}) for kind in ("signal", "wait")),
    )
    types = found(text, "fp16")
    assert (types.layers, types.reformats) == ({"fp16": 1}, 0)


def test_the_layers_of_a_second_profile_are_the_same_ones_again() -> None:
    first = layer("conv", "CaskConvolution", tensor10("Half"), tensor10("Half"))
    assert found(information(first, {**first, "Name": "conv [profile 1]"}), "fp16").multiplying == {"fp16": 1}


def test_a_concatenation_by_copies_is_the_networks_own_and_a_cast_is_a_reformat(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["input"], ["low"], name="cast", to=TensorProto.FLOAT16),
        helper.make_node("Concat", ["low", "low"], ["output"], name="cat", axis=1),
    ]
    text = information(
        noted("cast", "Reformat", "cast", Origin="CAST"),
        noted("low copy", "Reformat", "cat", Origin="CONCAT"),
        noted("Reformatting CopyNode for Input Tensor 0 to cat", "Reformat", Origin="REFORMAT"),
    )
    types = found(text, "fp16", write(tmp_path / "model.onnx", nodes, []))
    assert (types.layers, types.reformats) == ({"fp16": 1}, 2)


def test_a_fused_layer_of_quantisations_alone_stands_alone(tmp_path: Path) -> None:
    model = onnx.load(quantised(tmp_path / "model.onnx"))
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"q{number}"
    onnx.save(model, tmp_path / "model.onnx")
    alone = layer("__myl_Quant", "kgen", tensor10("Float"), tensor10("Int8"), Metadata="[ONNX Layer: q0]")
    conv = layer("conv", "CaskConvolution", tensor10("Int8"), tensor10("Int8"), Metadata="[ONNX Layer: conv]")
    head = layer("head", "gemm", tensor10("Int8"), tensor10("Float"), Metadata="[ONNX Layer: head]\x1f[ONNX Layer: q0]")
    types = found(information(alone, conv, head), "int8", tmp_path / "model.onnx")
    assert (types.unfused, types.multiplying) == (["__myl_Quant"], {"int8": 2})


def test_an_engine_that_keeps_names_only_tells_nothing() -> None:
    assert engine_types(json.dumps({"Layers": ["conv + relu", "fc"]}), "fp16") is None


@pytest.mark.parametrize("text", ["", "no JSON", "{}", "[]"])
def test_an_inspector_that_gives_something_else_is_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"the engine inspector gave no layers as JSON \(.*\)\. Use another version"):
        engine_types(text, "fp16")
