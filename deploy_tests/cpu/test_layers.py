"""MACs of the layers of an ONNX file, by hand and against a count on the torch network; and who claims which node."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from chip_deploy.chip.cost import CostModel
from chip_deploy.export.errors import IntegrityError
from chip_deploy.export.layers import LayerMap, LayerWork
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.onnx_graph import OnnxGraph, OnnxNode, read_graph
from chip_deploy.export.target import NodeLaps
from chip_deploy.pipeline.models import build_model


class Net(nn.Module):
    """One layer of every kind that is counted differently, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, (3, 1), groups=4, padding=(1, 0))
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2)
        self.twice = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 5)
        self.bare = nn.Linear(5, 4, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        maps = torch.relu(self.norm(self.depthwise(self.grouped(self.plain(image)))))
        maps = self.twice(torch.relu(self.twice(self.up(maps))))
        return self.bare(torch.relu(self.head(maps.mean((2, 3)))))


def layer_map(net: nn.Module, path: Path, *, size: int, batch: int = 1, free: bool = False) -> LayerMap:
    export_onnx(net, torch.zeros(batch, 3, size, size), path, dynamic_batch=free)
    return LayerMap(read_graph(path))


def executed(*nodes: tuple[str, str]) -> list[NodeLaps]:
    return [NodeLaps(origin, operator, origin, [1.0]) for origin, operator in nodes]


def test_every_kind_of_layer_is_counted_as_by_hand(tmp_path: Path) -> None:
    work = layer_map(Net(), tmp_path / "model.onnx", size=16).work
    macs = {layer: own.macs for layer, own in work.items() if own.macs}
    assert macs == {
        "plain": 8 * 8 * 8 * (3 * 9),  # output channels, height, width; then inputs and taps of each
        "grouped": 12 * 8 * 8 * (2 * 3),  # each output reads 8 / 4 inputs through 3 taps
        "depthwise": 12 * 8 * 8 * 9,
        "up": 12 * 8 * 8 * (3 * 4),  # each INPUT is spread over 6 / 2 outputs through 4 taps
        "twice": 2 * 6 * 16 * 16 * 6,
        "head": 6 * 5,
        "bare": 5 * 4,
    }


def test_the_values_that_a_layer_moves_are_counted_as_by_hand(tmp_path: Path) -> None:
    work = layer_map(Net(), tmp_path / "model.onnx", size=16).work
    assert work["grouped"] == LayerWork(4608, 8 * 64 + 12 * 64, 12 * 2 * 3, 8, 12, depthwise=False)
    assert work["depthwise"] == LayerWork(6912, 12 * 64 + 12 * 64, 12 * 9, 12, 12, depthwise=True)
    assert work["head"] == LayerWork(30, 6 + 5, 30, 6, 5, depthwise=False)
    assert work["head"].moved(batch=4) == 4 * 11 + 30


@pytest.mark.parametrize("free", [False, True], ids=["fixed", "free"])
def test_macs_are_those_of_one_image_whatever_the_batch(tmp_path: Path, free: bool) -> None:
    one = layer_map(Net(), tmp_path / "one.onnx", size=16).work
    many = layer_map(Net(), tmp_path / "many.onnx", size=16, batch=3, free=free).work
    assert {name: work.macs for name, work in many.items()} == {name: work.macs for name, work in one.items()}
    assert many["grouped"] == one["grouped"]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x1_0"])
def test_macs_by_layer_are_those_counted_on_the_torch_network(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = models.get_model(name).eval()
    work = layer_map(net, tmp_path / "model.onnx", size=64).work
    counted = CostModel(net, torch.zeros(1, 3, 64, 64)).layer_macs({})
    assert {layer: own.macs for layer, own in work.items() if own.macs} == counted


def test_a_layer_is_named_by_its_weight_and_not_by_the_batch_norm_that_was_folded_into_it(tmp_path: Path) -> None:
    mapped = layer_map(build_model("resnet20", num_classes=10, seed=0).module, tmp_path / "model.onnx", size=32)
    names = [layer for layer, work in mapped.work.items() if work.macs]
    assert names[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert not any("bn" in name for name in names)


def graph(*nodes: tuple[str, str, str, str]) -> OnnxGraph:
    """A chain or a net of nodes `name, operator, inputs, output` on tensors of shape (1, 4, 2, 2)."""
    made = [
        OnnxNode(name, operator, tuple(inputs.split()), (output,), ("", name.removeprefix("node_"), "op"))
        for name, operator, inputs, output in nodes
    ]
    weights = {name for node in made for name in node.inputs if name.endswith("weight")}
    shapes = {name: (1, 4, 2, 2) for node in made for name in (*node.inputs, *node.outputs)}
    shapes |= dict.fromkeys(weights, (4, 4, 1, 1))
    return OnnxGraph(made, shapes, weights, ["input"])


RESIDUAL = graph(
    ("node_Conv_1", "Conv", "input a.weight", "first"),
    ("node_relu", "Relu", "first", "relu"),
    ("node_Conv_11", "Conv", "relu b.weight", "second"),
    ("node_add", "Add", "second input", "sum"),
    ("node_relu_1", "Relu", "sum", "relu_1"),
)


def test_a_node_is_claimed_by_its_own_name_before_a_longer_or_shorter_one() -> None:
    assert LayerMap(RESIDUAL).layers(executed(("node_Conv_11", "Conv"), ("node_Conv_1", "Conv"))) == [("b",), ("a",)]


def test_a_convolution_under_the_name_of_its_activation_is_claimed_by_the_convolution() -> None:
    nodes = executed(("relu", "Conv"), ("relu_1", "FusedConv"))
    assert LayerMap(RESIDUAL).layers(nodes) == [("a",), ("b",)]


def test_an_activation_that_runs_by_itself_is_claimed_by_its_own_layer() -> None:
    nodes = executed(("first", "Conv"), ("node_relu", "Relu"), ("second", "Conv"), ("node_add", "Add"))
    assert LayerMap(RESIDUAL).layers(nodes) == [("a",), ("relu",), ("b",), ("add",)]


def test_a_node_that_the_runtime_added_is_claimed_by_nobody() -> None:
    assert LayerMap(RESIDUAL).layers(executed(("ReorderOutput_token_3", "ReorderOutput"), ("", "reformat"))) == [(), ()]


def test_a_node_that_stands_for_two_convolutions_is_claimed_by_both_and_not_by_the_activation_between() -> None:
    nodes = executed(("node_Conv_1 + node_relu + node_Conv_11", "fusion"))
    assert LayerMap(RESIDUAL).layers(nodes) == [("a", "b")]


def test_a_name_inside_another_word_is_no_claim() -> None:
    assert LayerMap(RESIDUAL).layers(executed(("my_first.second_try", "Copy"))) == [()]


def test_names_with_slashes_are_told_apart() -> None:
    slashed = graph(("/a/Conv", "Conv", "input a.weight", "/a/out"), ("/a/b/Conv", "Conv", "/a/out b.weight", "output"))
    assert LayerMap(slashed).layers(executed(("/a/b/Conv", "Conv"), ("/a/Conv", "Conv"))) == [("b",), ("a",)]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("b.weight + node_q + node_Conv_11 + node_add + node_relu_1", ("b",)),
        ("node_Conv_1 || node_Conv_11", ("a", "b")),
        ("node_Conv_11 + PWN(PWN(node_add), node_relu_1)", ("b",)),
        ("PWN(node_relu_1)", ("relu_1",)),
        ("node_Conv_1 [profile 1]", ("a",)),
        ("node_Conv_1_myl0_2", ()),
        ("__myl_ReluAdd_myl0_3", ()),
        ("(Unnamed Layer* 11) [ElementWise]", ()),
        ("other/node_Conv_1/Conv", ()),
    ],
)
def test_tensorrts_names_of_layers_hold_the_nodes_that_they_stand_for(name: str, layers: tuple[str, ...]) -> None:
    assert LayerMap(RESIDUAL).layers(executed((name, "layer"))) == [layers]


@pytest.mark.parametrize(("inputs", "outputs"), [(("input",), ("output",)), (("input", "w"), ())])
def test_a_multiplication_that_lacks_a_factor_or_a_result_is_one_sentence(
    inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> None:
    broken = LayerMap(OnnxGraph([OnnxNode("node_Conv", "Conv", inputs, outputs, ())]))
    with pytest.raises(IntegrityError, match=r"has a Conv that multiplies nothing \('node_Conv'\)\. Export it again"):
        _ = broken.work


def test_what_onnxruntime_fuses_goes_by_the_layer_of_its_first_node(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    export_onnx(net, torch.zeros(1, 3, 8), tmp_path / "net.onnx")  # a product and a sum for each linear layer
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), options, providers=["CPUExecutionProvider"])
    fused = [(node.name, node.op_type) for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    products = [(name, operator) for name, operator in fused if name.endswith("Fusion")]
    layers = LayerMap(read_graph(tmp_path / "net.onnx")).layers(executed(*products))
    assert layers == [("0",), ("2",)], fused


def test_an_output_that_is_left_out_is_found_in_no_name() -> None:
    dropped = OnnxNode("node_drop", "Dropout", ("input",), ("kept", ""), ())
    assert LayerMap(OnnxGraph([dropped])).layers(executed(("a + b", "kgen"))) == [()]


def test_in_a_graph_without_nodes_nothing_is_found() -> None:
    assert LayerMap(OnnxGraph()).layers(executed(("a + b", "kgen"))) == [()]


def test_a_weight_is_recognised_behind_what_only_converts_it() -> None:
    quantised = graph(("dq", "DequantizeLinear", "a.weight scale", "w"), ("node_Conv", "Conv", "input w", "output"))
    mapped = LayerMap(quantised)
    assert mapped.layers(executed(("node_Conv", "Conv"))) == [("a",)]
    assert mapped.work["a"].weights == 16


def test_a_file_without_shapes_is_refused(tmp_path: Path) -> None:
    layer_map(Net(), tmp_path / "model.onnx", size=16)
    proto = onnx.load(tmp_path / "model.onnx")
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(IntegrityError, match=r"gives no shape for '.+'\. Export it"):
        _ = LayerMap(read_graph(tmp_path / "model.onnx")).work
