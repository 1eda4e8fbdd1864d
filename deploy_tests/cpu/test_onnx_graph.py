"""ONNX files read without the onnx package, with that package as the judge."""

import ast
import contextlib
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import models

from chip_deploy.export.errors import IntegrityError
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.onnx_graph import NAME_SCOPES, OnnxGraph, read_graph


@pytest.fixture(scope="module", params=["resnet18", "mobilenet_v2", "free batch"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    free = request.param == "free batch"
    net = models.resnet18() if free else models.get_model(request.param)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(net, torch.zeros(1, 3, 64, 64), path, dynamic_batch=free)
    return path


def test_the_nodes_are_those_that_the_onnx_package_reads(path: Path) -> None:
    expected = [(node.name, node.op_type, tuple(node.input), tuple(node.output)) for node in onnx.load(path).graph.node]
    assert [(node.name, node.operator, node.inputs, node.outputs) for node in read_graph(path).nodes] == expected


def test_the_scopes_are_those_that_the_onnx_package_reads(path: Path) -> None:
    for node, expected in zip(read_graph(path).nodes, onnx.load(path).graph.node, strict=True):
        props = {prop.key: prop.value for prop in expected.metadata_props}
        assert node.scopes == tuple(ast.literal_eval(props[NAME_SCOPES]))


def test_the_shapes_are_those_that_the_onnx_package_reads(path: Path) -> None:
    graph = onnx.load(path).graph
    expected = {
        value.name: tuple(axis.dim_value or 1 for axis in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    expected |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    read = read_graph(path)
    assert read.shapes == expected
    assert read.weights == {tensor.name for tensor in graph.initializer}
    assert read.inputs == [value.name for value in graph.input]


def test_shapes_of_many_numbers_are_read_packed_and_unpacked(tmp_path: Path) -> None:
    tensor = onnx.TensorProto(name="w", dims=[300, 1, 70000], data_type=onnx.TensorProto.FLOAT)
    graph = onnx.GraphProto(name="g", initializer=[tensor])
    data = onnx.ModelProto(graph=graph).SerializeToString()
    packed, unpacked = b"\x0a\x06\xac\x02\x01\xf0\xa2\x04", b"\x08\xac\x02\x08\x01\x08\xf0\xa2\x04"
    assert unpacked in data
    (tmp_path / "model.onnx").write_bytes(data)
    assert read_graph(tmp_path / "model.onnx").shapes == {"w": (300, 1, 70000)}
    # One byte less in the tensor, the graph and the model, whose lengths stand before them.
    inner = packed + data[data.index(unpacked) + len(unpacked) :]
    body = b"\x12\x01g\x2a" + bytes([len(inner)]) + inner
    (tmp_path / "model.onnx").write_bytes(b"\x3a" + bytes([len(body)]) + body)
    assert onnx.load(tmp_path / "model.onnx").graph.initializer[0].dims == [300, 1, 70000]
    assert read_graph(tmp_path / "model.onnx").shapes == {"w": (300, 1, 70000)}


@pytest.mark.parametrize("data", [b"", b"no ONNX file", b"\x3a\x7f", b"\xff" * 20, b"\x38\x05"])
def test_another_file_is_refused_with_what_to_do(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.onnx: no ONNX file that can be read \(.+\)\. Export"):
        read_graph(tmp_path / "model.onnx")


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_graph(tmp_path / "model.onnx")


@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    node = onnx.helper.make_node("Relu", ["input"], ["output"], name="relu")
    values = [onnx.helper.make_tensor_value_info(name, 1, [1, 3]) for name in ("input", "output")]
    whole = onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:])).SerializeToString()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        if place < len(damaged):
            damaged[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "model.onnx"
    path.write_bytes(bytes(damaged))
    with contextlib.suppress(IntegrityError):
        assert isinstance(read_graph(path), OnnxGraph)


def test_types_are_those_that_the_onnx_package_reads(path: Path) -> None:
    graph = onnx.load(path).graph
    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.INT64: "int64"}
    expected = {
        value.name: names[value.type.tensor_type.elem_type]
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    expected |= {tensor.name: names[tensor.data_type] for tensor in graph.initializer}
    found = read_graph(path).types
    assert {name: found[name] for name in expected} == expected


def test_the_opset_is_that_of_onnx_itself_whatever_else_is_imported(tmp_path: Path) -> None:
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in (("com.microsoft", 99), ("", 18))]
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports), tmp_path / "model.onnx")
    assert read_graph(tmp_path / "model.onnx").opset == 18


def test_shapes_and_types_behind_conversions_are_filled_in(tmp_path: Path) -> None:
    nodes = [
        onnx.helper.make_node("Cast", ["input"], ["low"], to=onnx.TensorProto.FLOAT16),
        onnx.helper.make_node("QuantizeLinear", ["low", "scale", "zero"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        onnx.helper.make_node("Relu", ["dq"], ["output"]),
        onnx.helper.make_node("Shape", ["output"], ["size"]),
        onnx.helper.make_node("QuantizeLinear", ["input", "wide"], ["unsigned"]),
    ]
    weights = [
        onnx.helper.make_tensor("scale", onnx.TensorProto.FLOAT16, [], [0.5]),
        onnx.helper.make_tensor("wide", onnx.TensorProto.FLOAT, [], [0.5]),
        onnx.helper.make_tensor("zero", onnx.TensorProto.INT8, [], [0]),
    ]
    values = [onnx.helper.make_tensor_value_info("input", 1, [2, 3])]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", values, [], weights)), tmp_path / "model.onnx")
    graph = read_graph(tmp_path / "model.onnx")
    expected = {"low": "fp16", "q": "int8", "dq": "fp16", "output": "fp16", "size": "int64", "unsigned": "uint8"}
    assert {name: graph.types[name] for name in expected} == expected
    assert all(graph.shapes[name] == (2, 3) for name in ("low", "q", "dq", "unsigned"))


def test_nodes_of_functions_and_of_branches_in_branches_are_read_apart(tmp_path: Path) -> None:
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info("y", 1, [1])
    leaf = onnx.helper.make_graph([make("Conv", ["x", "w"], ["y"], name="leaf")], "leaf", [], [value])
    branches = {"then_branch": leaf, "else_branch": leaf}
    twig = onnx.helper.make_graph([make("If", ["c"], ["y"], name="twig", **branches)], "twig", [], [value])
    nodes = [make("Loop", ["n", "c"], ["y"], name="loop", body=twig), make("Relu", ["y"], ["z"], name="last")]
    body = [make("Gemm", ["a", "b"], ["c"], name="called")]
    opsets = [onnx.helper.make_opsetid("", 21)]
    function = onnx.helper.make_function("local", "Block", ["a", "b"], ["c"], body, opsets)
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []), functions=[function])
    onnx.save(model, tmp_path / "model.onnx")
    read = read_graph(tmp_path / "model.onnx")
    assert [node.name for node in read.nodes] == ["loop", "last"]
    assert [node.name for node in read.inner] == ["twig", "leaf", "leaf", "called"]


def test_a_sparse_weight_has_the_shape_of_the_whole(tmp_path: Path) -> None:
    values = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
    places = onnx.helper.make_tensor("places", onnx.TensorProto.INT64, [2], [0, 5])
    graph = onnx.GraphProto(sparse_initializer=[onnx.helper.make_sparse_tensor(values, places, [4, 300])])
    onnx.save(onnx.ModelProto(graph=graph), tmp_path / "model.onnx")
    read = read_graph(tmp_path / "model.onnx")
    assert (read.weights, read.shapes, read.types) == ({"w"}, {"w": (4, 300)}, {"w": "fp32"})
