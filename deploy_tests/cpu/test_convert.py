"""The bound on what 8 bits may lose: layers are left out until it holds, in both networks, or nothing ships."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from chip_deploy.export.errors import ConversionFailed, ParityFailed
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.precision import Converter, QuantizeSettings, Reference
from chip_deploy.pipeline.convert import Evidence, convert_networks

IMAGES, CLASSES = 40, 10
LABELS = np.arange(IMAGES) % CLASSES
RIGHT = np.eye(CLASSES, dtype=np.float32)[LABELS]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks of five layers that can be quantised, the dense one wider."""
    folder = tmp_path_factory.mktemp("onnx")
    for name, width in (("model", 4), ("dense", 8)):
        torch.manual_seed(width)
        body = [layer for _ in range(3) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
        net = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), *body, *pool)
        export_onnx(net, torch.zeros(1, 3, 8, 8), folder / f"{name}.onnx")
    return folder


def evidence(judge: Callable[[Reference], np.ndarray], *, labels: np.ndarray | None = LABELS) -> Evidence:
    images = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
    return Evidence(images, "calibration images", RIGHT, labels, judge)


def convert(sources: Path, folder: Path, judged: Evidence, *, most: float | None, precision: str = "int8"):
    settings = QuantizeSettings(max_drop=most, sensitivity_images=2, calibration="min-max")
    return convert_networks(
        sources,
        folder,
        precision=precision,
        settings=settings,
        rest="fp32",
        evidence=judged,
        progress=lambda _fraction, _text: None,
    )


def wrong_on(count: int) -> np.ndarray:
    """Outputs that are right but for so many images."""
    outputs = RIGHT.copy()
    outputs[:count] = np.roll(outputs[:count], 1, axis=1)
    return outputs


def weights_quantised(path: Path) -> set[str]:
    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    return {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"} & weights


class OneImagePerLayer:
    """A stand-in for the evaluation: every quantised layer costs one image, which is 2.5 points."""

    def __init__(self, file: Path) -> None:
        self.file, self.calls = file, 0

    def __call__(self, _network: Reference) -> np.ndarray:
        self.calls += 1
        return wrong_on(len(weights_quantised(self.file)))


@pytest.mark.parametrize(("most", "quantised"), [(None, 5), (100.0, 5), (12.5, 5), (12.4, 4), (7.5, 3), (2.5, 1)])
def test_as_few_layers_are_left_out_as_the_bound_needs(sources, tmp_path, most, quantised) -> None:
    judge = OneImagePerLayer(tmp_path / "model.int8.onnx")
    row = convert(sources, tmp_path, evidence(judge), most=most)
    assert (row.conversion.layers, row.conversion.quantised) == (5, quantised)
    assert row.accuracy == 1 - quantised / IMAGES
    assert len(weights_quantised(tmp_path / "model.int8.onnx")) == quantised
    assert judge.calls <= 5


def test_the_most_sensitive_layers_are_left_out_first_and_the_reason_names_the_bound(sources, tmp_path) -> None:
    row = convert(sources, tmp_path, evidence(OneImagePerLayer(tmp_path / "model.int8.onnx")), most=7.5)
    first = {(each.layer, each.operator) for each in row.sensitivities[:2]}
    assert {(each.layer, each.operator) for each in row.conversion.left_out} == first
    assert {each.reason for each in row.conversion.left_out} == {
        "left out with the others, so that the file loses at most 7.5 points of top-1 on the evaluation images"
    }
    assert row.left_out_by_bound == 2


def test_the_dense_network_leaves_out_the_same_layers(sources, tmp_path) -> None:
    convert(sources, tmp_path, evidence(OneImagePerLayer(tmp_path / "model.int8.onnx")), most=7.5)
    assert weights_quantised(tmp_path / "dense.int8.onnx") == weights_quantised(tmp_path / "model.int8.onnx")


class Sums(nn.Module):
    """Three sums that one `forward` writes down, and no other layer that can be quantised but the last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widen = nn.Parameter(torch.randn(1, width, 1, 1))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = image.mean(1, keepdim=True) * self.widen
        for _ in range(3):
            maps = maps + maps.tanh().relu()
        return self.head(maps.mean((2, 3)))


def test_the_dense_network_leaves_out_the_same_one_of_several_sums_of_one_name(tmp_path) -> None:
    for name, width in (("model", 4), ("dense", 8)):
        torch.manual_seed(width)
        export_onnx(Sums(width), torch.zeros(1, 3, 8, 8), tmp_path / f"{name}.onnx")
    (tmp_path / "out").mkdir()

    def judge(_network: Reference) -> np.ndarray:
        return wrong_on(sum(sums_quantised(tmp_path / "out" / "model.int8.onnx")))

    convert(tmp_path, tmp_path / "out", evidence(judge), most=5.0)  # two images of 40: one sum has to go
    found = [sums_quantised(tmp_path / "out" / f"{name}.int8.onnx") for name in ("model", "dense")]
    assert sorted(found[0]) == [False, True, True]
    assert found[0] == found[1]


def sums_quantised(path: Path) -> list[bool]:
    """Of each addition in the order of the file, whether it reads 8 bits."""
    graph = onnx.load(path).graph
    dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    sums = [node for node in graph.node if node.op_type == "Add"]
    return [{*node.input} <= dequantised for node in sums]


def test_a_bound_that_cannot_be_kept_is_a_failure_with_the_ways_out(sources, tmp_path) -> None:
    with pytest.raises(
        ConversionFailed, match=r"int8 loses 25.00 points .* at most 2 may be lost.*Raise --max-drop, or"
    ):
        convert(sources, tmp_path, evidence(lambda _: wrong_on(10)), most=2.0)


def test_without_labels_nothing_is_left_out_and_no_accuracy_is_claimed(sources, tmp_path) -> None:
    row = convert(sources, tmp_path, evidence(lambda _: RIGHT + 0.1, labels=None), most=None)
    assert (row.accuracy, row.conversion.left_out) == (None, [])


def test_16_bits_have_neither_ranking_nor_bound(sources, tmp_path) -> None:
    row = convert(sources, tmp_path, evidence(lambda _: RIGHT), most=0.0, precision="fp16")
    assert (row.sensitivities, row.conversion.layers, row.left_out_by_bound) == ([], 0, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"model.fp16.onnx", "dense.fp16.onnx"}


@pytest.mark.parametrize(("precision", "emulated"), [("fp16", True), ("bf16", True), ("int8", False)])
def test_what_onnxruntime_cannot_compute_is_judged_in_fp32_and_says_so(sources, tmp_path, precision, emulated) -> None:
    row = convert(sources, tmp_path, evidence(lambda _: RIGHT), most=None, precision=precision)
    assert row.emulated == emulated


def test_a_dense_control_that_is_another_network_does_not_ship(sources, tmp_path, monkeypatch) -> None:
    real = Converter.write

    def broken(self, out, **more):
        done = real(self, out, **more)
        if out.name.startswith("dense"):
            model = onnx.load(out)
            last = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [CLASSES, 8])
            weights = numpy_helper.to_array(last)
            last.CopyFrom(numpy_helper.from_array(-weights, last.name))
            onnx.save(model, out)
        return done

    monkeypatch.setattr(Converter, "write", broken)
    with pytest.raises(ParityFailed, match=r"dense.fp16.onnx without its roundings: outputs differ from the reference"):
        convert(sources, tmp_path, evidence(lambda _: RIGHT), most=None, precision="fp16")


@pytest.mark.parametrize(("judged", "sentence"), [(np.nan, "not finite"), (-3.0, "further|differ")])
def test_outputs_that_no_rounding_explains_do_not_ship(sources, tmp_path, judged, sentence) -> None:
    with pytest.raises(ParityFailed, match=sentence):
        convert(sources, tmp_path, evidence(lambda _: RIGHT * np.float32(judged)), most=None)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_right_file_ships_however_far_16_bits_move_the_outputs_and_the_row_says_how_far(
    sources, tmp_path, precision
) -> None:
    row = convert(sources, tmp_path, evidence(lambda _: wrong_on(IMAGES)), most=None, precision=precision)
    assert row.agreement.snr_db == pytest.approx(-3.01, abs=0.01)  # ones in other places: twice the power
    assert (tmp_path / f"model.{precision}.onnx").is_file()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_wrong_file_does_not_ship_however_near_its_outputs_are_on_the_evaluation(
    sources, tmp_path, monkeypatch, precision
) -> None:
    real = Converter.converted

    def broken(self, nodes=()):
        model, kept = real(self, nodes)
        next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Identity"
        return model, kept

    monkeypatch.setattr(Converter, "converted", broken)
    with pytest.raises(ParityFailed, match=f"model.{precision}.onnx without its roundings"):
        convert(sources, tmp_path, evidence(lambda _: RIGHT), most=None, precision=precision)
