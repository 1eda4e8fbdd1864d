"""Rounding told from faults: a file is judged without its roundings, and TF32 rounds what is multiplied."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from chip_deploy.export.agree import LIMITS, compare_outputs
from chip_deploy.export.errors import ParityFailed
from chip_deploy.export.low_precision import lowered
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.precision import Converter, Reference
from chip_deploy.export.rounding import in_tf32, require_no_overflow, require_same_network, tf32_outputs

SIZE = 8
# Numbers there are 8 apart in FP16, and 64 in BF16.
FAR = 12000.0


class Magnifying(nn.Module):
    """A network that carries its maps far from zero and back, so that 16 bits round nearly all of them away."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        maps = self.body((self.stem(image) + FAR - FAR).relu())
        return self.head(maps.relu().mean((2, 3)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "model.onnx"
    export_onnx(Magnifying(), torch.zeros(1, 3, SIZE, SIZE), path)
    return path


def draw(n: int = 8) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, 3, SIZE, SIZE)).astype(np.float32)


def change(model: onnx.ModelProto, dims: list[int], by) -> None:
    """The one weight of that shape is changed."""
    (tensor,) = [each for each in model.graph.initializer if list(each.dims) == dims]
    values = np.ascontiguousarray(by(numpy_helper.to_array(tensor)), np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def without_an_activation(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Identity"


FAULTS = {
    "kernel transposed": lambda model: change(model, [8, 8, 3, 3], lambda w: w.swapaxes(2, 3)),
    "channels swapped": lambda model: change(model, [8, 3, 3, 3], lambda w: w[:, ::-1]),
    "bias missing": lambda model: change(model, [8], np.zeros_like),
    "activation dropped": without_an_activation,
    "scale off by 10 %": lambda model: change(model, [8, 8, 3, 3], lambda w: 1.1 * w),
    "one weight off by 1 %": lambda model: change(
        model, [8, 3, 3, 3], lambda w: np.where(np.abs(w) == np.abs(w).max(), 1.01 * w, w)
    ),
}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_right_file_passes_however_much_its_network_magnifies_rounding(source, tmp_path, precision) -> None:
    converter = Converter(source, draw(), precision=precision)
    converter.write(tmp_path / "low.onnx")
    exact, low = Reference(source).outputs(draw()), Reference(tmp_path / "low.onnx").outputs(draw())
    assert not LIMITS[precision].keeps(compare_outputs(exact, low)), "the network was meant to be ill-conditioned"
    require_same_network(tmp_path / "low.onnx", converter.model, draw())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_wrong_file_of_the_same_network_is_found(source, tmp_path, precision, fault) -> None:
    converter = Converter(source, draw(), precision=precision)
    wrong = onnx.ModelProto()
    wrong.CopyFrom(converter.model)
    FAULTS[fault](wrong)
    onnx.save(lowered(wrong, precision)[0], tmp_path / "low.onnx")
    with pytest.raises(ParityFailed, match=r"^low\.onnx without its roundings: outputs differ from the reference"):
        require_same_network(tmp_path / "low.onnx", converter.model, draw())


class Folding(nn.Module):
    """A network that gives small numbers for large ones: of one that overflows on the way nothing remains."""

    def forward(self, image: Tensor) -> Tensor:
        maps = image.mean((2, 3))
        return maps / (maps * maps + 1)


def test_an_overflow_on_images_that_calibration_did_not_see_is_not_taken_for_rounding(tmp_path) -> None:
    export_onnx(Folding(), torch.zeros(1, 3, SIZE, SIZE), tmp_path / "model.onnx")
    converter = Converter(tmp_path / "model.onnx", draw(), precision="fp16")
    converter.write(tmp_path / "low.onnx")
    require_same_network(tmp_path / "low.onnx", converter.model, draw())
    require_no_overflow(tmp_path / "low.onnx", converter.model, lambda network: network.outputs(30 * draw()))
    with pytest.raises(
        ParityFailed, match=r"^low\.onnx: numbers overflow on the evaluation images .* quantize\.images"
    ):
        require_no_overflow(tmp_path / "low.onnx", converter.model, lambda network: network.outputs(1e4 * draw()))


class HalfInside(nn.Module):
    """A network with casts to FP16 of its own, which round in FP32, too."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(image.mean((2, 3))).half().float()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_network_with_casts_of_its_own_has_right_files(tmp_path, precision) -> None:
    torch.manual_seed(0)
    export_onnx(HalfInside(), torch.zeros(1, 3, SIZE, SIZE), tmp_path / "model.onnx")
    converter = Converter(tmp_path / "model.onnx", draw(), precision=precision)
    converter.write(tmp_path / "low.onnx")
    require_same_network(tmp_path / "low.onnx", converter.model, draw())


def test_the_steps_of_a_network_that_is_quantised_already_are_rounded_up_and_right(tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    export_onnx(net, torch.zeros(1, 3, SIZE, SIZE), tmp_path / "model.onnx")
    Converter(tmp_path / "model.onnx", draw(), precision="int8").write(tmp_path / "own.onnx")
    converter = Converter(tmp_path / "own.onnx", draw(), precision="fp16")
    converter.write(tmp_path / "low.onnx")
    require_same_network(tmp_path / "low.onnx", converter.model, draw())


def product(weights: np.ndarray) -> onnx.ModelProto:
    """A network that multiplies its input (1, K) by `weights`."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, len(weights)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, weights.shape[1]])],
        [numpy_helper.from_array(weights, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def eleven_bits(values: np.ndarray) -> np.ndarray:
    """float32 numbers to the nearest one with 11 bits: by their bits, of which the lowest 13 go."""
    bits = values.view(np.uint32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)


def test_tf32_rounds_what_is_multiplied_to_the_nearest_eleven_bits() -> None:
    x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    x[0, :4] = [1 + 2**-11, 1 + 3 * 2**-11, 1e-20, 1e20]
    by_input = Reference(in_tf32(product(np.eye(64, dtype=np.float32)))).run({"x": x})["y"]
    np.testing.assert_array_equal(by_input, eleven_bits(x))
    by_weight = Reference(in_tf32(product(np.diag(x[0])))).run({"x": np.ones_like(x)})["y"]
    np.testing.assert_array_equal(by_weight, eleven_bits(x))


def test_tf32_is_told_of_a_network_whatever_its_tensors_are_called() -> None:
    model = product(np.eye(4, dtype=np.float32))
    model.graph.node.add().CopyFrom(helper.make_node("Relu", ["y"], ["x_tf32"]))
    model.graph.node.add().CopyFrom(helper.make_node("Relu", ["x_tf32"], ["tf32_split"]))
    x = np.float32([[1, 2, 3, 4]])
    np.testing.assert_array_equal(Reference(in_tf32(model)).run({"x": x})["y"], x)


def test_tf32_costs_a_network_about_what_its_factors_of_eleven_bits_cost(source) -> None:
    agreement = compare_outputs(Reference(source).outputs(draw()), tf32_outputs(source, draw()))
    assert agreement.snr_db is not None
    # Half a step is 2^-12, 72 dB; sums, and so what lies far from zero, are FP32's.
    assert 50 < agreement.snr_db < 80
