"""A network in every precision: what is written, that it is looked at first, and that TensorRT-RTX builds it."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from chip_deploy.export.agree import compare_outputs, require_agreement
from chip_deploy.export.errors import ConversionFailed, IntegrityError, ParityFailed
from chip_deploy.export.layers import LayerMap
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.onnx_graph import read_graph
from chip_deploy.export.precision import Converter, QuantizeSettings, Reference, require_finite, require_quantisable
from chip_deploy.export.target import parse_target
from chip_deploy.export.targets import make_target

SIZE = 12
# Precision, and the type of what is not quantised.
KINDS = [("fp16", "fp32"), ("bf16", "fp32"), ("int8", "fp32"), ("int8", "fp16"), ("fp8", "fp32"), ("fp8", "fp16")]
WRITE_ELSEWHERE = """
import sys, numpy as np
from pathlib import Path
from chip_deploy.export.precision import Converter
images = np.random.default_rng(0).standard_normal((12, 3, 12, 12)).astype(np.float32)
Converter(Path(sys.argv[1]), images, precision=sys.argv[2], rest=sys.argv[3]).write(Path(sys.argv[4]))
"""


class Net(nn.Module):
    """Two convolutions around a residual sum, and a classifier; `gain` multiplies what the stem gives."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.body = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 10)
        self.gain = gain

    def forward(self, image: Tensor) -> Tensor:
        maps = (self.gain * self.norm(self.stem(image))).relu()
        maps = (maps + self.body(maps / self.gain)).relu() / self.gain
        return self.head(maps.mean((2, 3)))


class Masked(nn.Module):
    """A classifier that pools over the places whose score is at least half of the largest: the others are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.head = nn.Linear(12, 10)

    def forward(self, image: Tensor) -> Tensor:
        scores = self.stem(image).relu().flatten(2)
        mask = torch.where(scores < scores.amax(2, keepdim=True) / 2, -torch.inf, 0.0)
        return self.head(((scores + mask).softmax(2) * scores).sum(2))


def network(path: Path, *, gain: float = 1.0, dynamic_batch: bool = False) -> Path:
    torch.manual_seed(0)
    net = Net(gain)
    with torch.no_grad():
        net.stem.weight *= 3
    export_onnx(net, torch.zeros(1, 3, SIZE, SIZE), path, dynamic_batch=dynamic_batch)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return network(tmp_path_factory.mktemp("net") / "net.onnx")


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with activations beyond what FP16 holds."""
    return network(tmp_path_factory.mktemp("net") / "loud.onnx", gain=1e5)


def draw(n: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 3, SIZE, SIZE)).astype(np.float32)


def layers_of(converter: Converter) -> dict[str, str]:
    return {f"{layer.layer} {layer.operator}": layer.node for layer in converter.layers}


@pytest.mark.parametrize(("precision", "rest"), KINDS)
def test_a_network_keeps_its_outputs_as_far_as_its_precision_allows(source, tmp_path, precision, rest) -> None:
    Converter(source, draw(12), precision=precision, rest=rest).write(tmp_path / "low.onnx")
    unseen = draw(20, seed=1)
    exact, low = Reference(source).outputs(unseen), Reference(tmp_path / "low.onnx").outputs(unseen)
    agreement = compare_outputs(exact, low)
    require_agreement(agreement, what="the file", precision=precision)
    # A network of three layers: half a step of 2^-11, 2^-8, 1/127 of the reach, and 2^-4, a few times over.
    assert agreement.snr_db is not None
    assert agreement.snr_db > {"fp16": 60, "bf16": 40, "int8": 25, "fp8": 18}[precision]
    assert agreement.snr_db < {"fp16": 90, "bf16": 65, "int8": 55, "fp8": 45}[precision], "it rounds at all"


@pytest.mark.parametrize(("precision", "rest"), [("fp16", "fp32"), ("int8", "fp32"), ("int8", "fp16")])
def test_another_process_writes_the_same_bytes(source, tmp_path, precision, rest) -> None:
    Converter(source, draw(12), precision=precision, rest=rest).write(tmp_path / "here.onnx")
    arguments = [str(source), precision, rest, str(tmp_path / "there.onnx")]
    environment = os.environ | {"PYTHONHASHSEED": "42"}
    done = subprocess.run(
        [sys.executable, "-c", WRITE_ELSEWHERE, *arguments],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("here.onnx", "there.onnx")}
    assert len(digests) == 1


@pytest.mark.parametrize(("precision", "rest"), KINDS)
def test_tensorrt_rtx_builds_it(source, tmp_path, precision, rest) -> None:
    target = make_target(parse_target("trt-rtx:sm89"))
    if reason := target.unusable():
        pytest.skip(reason)
    (tmp_path / "bundle").mkdir()
    Converter(source, draw(12), precision=precision, rest=rest).write(tmp_path / "low.onnx")
    engine = target.build(tmp_path / "low.onnx", tmp_path / "bundle" / "engines" / "e.engine", precision=precision)
    assert engine.bytes > 1000


def test_a_record_says_what_was_done(source, tmp_path) -> None:
    settings = QuantizeSettings(calibration="percentile", percentile=99.9, exclude=("head",))
    converter = Converter(source, draw(12), precision="int8", settings=settings)
    done = converter.write(tmp_path / "low.onnx")
    assert (done.precision, done.opset, done.rest, done.images) == ("int8", 18, "fp32", 12)
    assert done.calibration == "percentile 99.9"
    assert (done.layers, done.quantised, done.kept) == (4, 3, [])
    assert [(each.layer, each.reason) for each in done.left_out] == [("head", "quantize.exclude names it")]
    assert done.bytes == (tmp_path / "low.onnx").stat().st_size
    low = Converter(source, draw(12), precision="bf16").write(tmp_path / "bf16.onnx")
    assert (low.opset, low.images, low.layers, low.calibration) == (22, 0, 0, "")


def test_convolutions_the_sum_and_the_classifier_are_quantised(source) -> None:
    assert sorted(layers_of(Converter(source, draw(4), precision="int8"))) == [
        "add Add",
        "body Conv",
        "head Gemm",
        "stem Conv",
    ]


def test_layers_left_out_are_not_quantised_and_the_record_says_why(source, tmp_path) -> None:
    converter = Converter(source, draw(12), precision="int8")
    node = layers_of(converter)["body Conv"]
    done = converter.write(tmp_path / "low.onnx", left_out={node: "too dear"})
    assert [(each.layer, each.operator, each.reason) for each in done.left_out] == [("body", "Conv", "too dear")]
    model = onnx.load(tmp_path / "low.onnx")
    written = {each.name: each for each in model.graph.node}
    makers = {name: each.op_type for each in model.graph.node for name in each.output}
    assert makers.get(written[node].input[0]) != "DequantizeLinear"
    assert makers[written[layers_of(converter)["stem Conv"]].input[0]] == "DequantizeLinear"


def test_a_converted_file_has_the_layers_and_the_work_of_its_source(source, tmp_path) -> None:
    exact = LayerMap(read_graph(source)).work
    for precision, rest in KINDS:
        Converter(source, draw(4), precision=precision, rest=rest).write(tmp_path / "low.onnx")
        work = LayerMap(read_graph(tmp_path / "low.onnx")).work
        assert {name: done.macs for name, done in work.items()} == {name: done.macs for name, done in exact.items()}


def test_activations_beyond_fp16_are_found_on_the_images_and_stay_in_fp32(loud, tmp_path) -> None:
    done = Converter(loud, draw(12), precision="fp16", what="digits").write(tmp_path / "low.onnx")
    reasons = [each.reason for each in done.kept]
    assert any("on 12 digits; FP16 ends at 65504" in reason for reason in reasons)
    assert "head" not in {each.layer for each in done.kept}
    unseen = draw(20, seed=1)
    exact, low = Reference(loud).outputs(unseen), Reference(tmp_path / "low.onnx").outputs(unseen)
    require_agreement(compare_outputs(exact, low), what="the file", precision="fp16")


def two_scales(path: Path) -> Path:
    """An image times 100, and times 0.01 again."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Conv2d(1, 1, 1, bias=False), nn.Flatten())
    with torch.no_grad():
        net[0].weight.fill_(100.0)
        net[2].weight.fill_(0.01)
    export_onnx(net, torch.zeros(1, 1, 1, 1), path)
    return path


@pytest.mark.parametrize(("precision", "rest"), [("fp16", "fp32"), ("int8", "fp16")])
def test_an_overflow_between_two_layers_that_calibration_did_not_show_is_found_by_running(
    tmp_path, precision, rest
) -> None:
    source = two_scales(tmp_path / "net.onnx")
    settings = QuantizeSettings(exclude=("0",) if precision == "int8" else ())
    seen = np.full((2, 1, 1, 1), 3.0, np.float32)
    done = Converter(source, seen, precision=precision, rest=rest, settings=settings).write(tmp_path / "low.onnx")
    assert (done.kept, done.emulates) == ([], "fp16")
    low = Reference(tmp_path / "low.onnx")
    require_finite(low.outputs(seen), what="low.onnx")
    louder = np.full((1, 1, 1, 1), 1000.3, np.float32)
    assert np.isfinite(Reference(source).outputs(louder)).all()
    if precision == "fp16":
        with pytest.raises(ParityFailed, match=r"1 of 1 outputs are not finite"):
            require_finite(low.outputs(louder), what="low.onnx")
    else:  # infinity before the pair is the end of the pair's reach
        assert low.outputs(louder) == pytest.approx(3.0, rel=0.02)


def test_int8_in_fp16_surroundings_keeps_what_overflows_in_fp32(loud, tmp_path) -> None:
    done = Converter(loud, draw(12), precision="int8", rest="fp16").write(tmp_path / "low.onnx")
    assert done.kept
    unseen = draw(20, seed=1)
    exact, low = Reference(loud).outputs(unseen), Reference(tmp_path / "low.onnx").outputs(unseen)
    found = compare_outputs(exact, low)
    assert found.snr_db is not None
    assert found.snr_db > 25


class Faint(nn.Module):
    """A convolution with tiny weights, whose sums are then multiplied by `gain`."""

    def __init__(self, *, weights: float, gain: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.head = nn.Linear(8, 10, bias=False)
        self.gain = gain
        with torch.no_grad():
            self.conv.weight *= weights

    def forward(self, image: Tensor) -> Tensor:
        return self.head((self.gain * self.conv(image).relu()).mean((2, 3)))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(("weights", "loudness", "gain"), [(1e-6, 3e3, 1.0), (1e-9, 1.0, 1e9)])
def test_8_bit_weights_whose_steps_fp16_cannot_hold_keep_their_layer_and_its_pairs_in_fp32(
    tmp_path, precision, weights, loudness, gain
) -> None:
    torch.manual_seed(0)
    export_onnx(Faint(weights=weights, gain=gain), torch.zeros(1, 3, SIZE, SIZE), tmp_path / "net.onnx")
    images = np.float32(loudness) * draw(12)
    exact, snr_db = Reference(tmp_path / "net.onnx").outputs(images), {}
    for rest in ("fp32", "fp16"):
        Converter(tmp_path / "net.onnx", images, precision=precision, rest=rest).write(tmp_path / f"{rest}.onnx")
        snr_db[rest] = compare_outputs(exact, Reference(tmp_path / f"{rest}.onnx").outputs(images)).snr_db
    assert snr_db["fp16"] == pytest.approx(snr_db["fp32"], abs=1.0)


def test_a_network_that_is_not_finite_in_fp32_cannot_be_converted(tmp_path) -> None:
    path = network(tmp_path / "net.onnx", gain=3e38)
    with pytest.raises(ConversionFailed, match=r"output 'output' is not finite in FP32 already, on image 1 of 4\."):
        Converter(path, draw(4), precision="fp16")


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_the_image_that_overflows_is_named_and_the_tensor_where_it_begins(tmp_path, dynamic_batch) -> None:
    path = network(tmp_path / "net.onnx", dynamic_batch=dynamic_batch)
    images = draw(12)
    images[9] *= 1e38  # infinite once the stem's weights are summed up
    (stem, *_) = onnx.load(path).graph.node
    sentence = rf"output 'output'.* on image 10 of 12\. The first tensor that is not is '{stem.output[0]}'"
    for precision in ("fp16", "int8"):
        with pytest.raises(ConversionFailed, match=sentence):
            Converter(path, images, precision=precision)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("masked") / "net.onnx"
    export_onnx(Masked(), torch.zeros(1, 3, SIZE, SIZE), path)
    return path


@pytest.mark.parametrize(("precision", "rest"), KINDS)
def test_a_network_that_masks_by_infinity_is_as_good_as_any_other(masked, tmp_path, precision, rest) -> None:
    Converter(masked, draw(12), precision=precision, rest=rest).write(tmp_path / "low.onnx")
    unseen = draw(20, seed=1)
    exact, low = Reference(masked).outputs(unseen), Reference(tmp_path / "low.onnx").outputs(unseen)
    require_agreement(compare_outputs(exact, low), what="the file", precision=precision)


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_a_sum_that_reads_infinity_is_left_out_of_8_bits_and_the_record_says_why(masked, tmp_path, rest) -> None:
    done = Converter(masked, draw(12), precision="int8", rest=rest).write(tmp_path / "low.onnx")
    assert [(each.operator, each.reason) for each in done.left_out] == [
        ("Add", "it reads numbers that are not finite, and 8 bits hold none of those")
    ]
    assert done.quantised == 2
    assert not any("inf" in each.reason for each in done.kept)


def test_where_every_layer_reads_infinity_nothing_is_quantised(masked) -> None:
    settings = QuantizeSettings(exclude=("stem", "head"))
    with pytest.raises(ConversionFailed, match=r"no layer is left.*stem: quantize.exclude.*add: it reads.*Leave int8"):
        Converter(masked, draw(4), precision="int8", settings=settings)


def test_a_free_batch_stays_free(tmp_path) -> None:
    path = network(tmp_path / "net.onnx", dynamic_batch=True)
    for precision, rest in KINDS:
        Converter(path, draw(11), precision=precision, rest=rest).write(tmp_path / "low.onnx")
        low = Reference(tmp_path / "low.onnx")
        assert low.input_shapes["input"] == (-1, 3, SIZE, SIZE)
        assert low.run({"input": draw(5)})["output"].shape == (5, 10)


def test_a_layer_becomes_more_sensitive_when_one_weight_takes_the_range_of_all_others(tmp_path) -> None:
    snr_db = []
    for outlier in (0.0, 30.0):
        torch.manual_seed(0)
        net = Net()
        with torch.no_grad():
            net.body.weight[:, 0, 0, 0] += outlier  # what is left for the others is a few steps
            net.body.bias -= outlier * 0.05
        path = tmp_path / f"{outlier}.onnx"
        export_onnx(net, torch.zeros(1, 3, SIZE, SIZE), path)
        ranking = Converter(path, draw(12), precision="int8").ranking(draw(8))
        assert sorted(each.layer for _, each in ranking) == ["add", "body", "head", "stem"]
        found = [each.snr_db for _, each in ranking]
        assert found == sorted(found)
        snr_db.append(next(each.snr_db for _, each in ranking if each.layer == "body"))
    assert snr_db[1] < snr_db[0] - 6


def test_the_ranking_tells_how_far_it_is(source) -> None:
    told: list[str] = []
    Converter(source, draw(4), precision="int8").ranking(draw(1), progress=lambda _, text: told.append(text))
    assert told == [f"sensitivity of {layer}" for layer in ("stem", "body", "add", "head")]


@pytest.mark.parametrize("settings", [QuantizeSettings(first_last=True), QuantizeSettings(exclude=("stem", "head"))])
def test_excluded_layers_are_neither_quantised_nor_ranked(source, tmp_path, settings) -> None:
    converter = Converter(source, draw(12), precision="int8", settings=settings)
    assert {each.layer for each in converter.write(tmp_path / "low.onnx").left_out} == {"stem", "head"}
    assert {each.layer for _, each in converter.ranking(draw(2))} == {"add", "body"}


def test_ranges_depend_on_the_rule(source, tmp_path) -> None:
    images = draw(12)
    images[0, 0, 0, 0] = 60.0  # one pixel far from all others
    scales = {}
    for rule in ("min-max", "percentile", "entropy"):
        settings = QuantizeSettings(calibration=rule, percentile=99.0)
        Converter(source, images, precision="int8", settings=settings).write(tmp_path / "low.onnx")
        held = {tensor.name: tensor for tensor in onnx.load(tmp_path / "low.onnx").graph.initializer}
        scales[rule] = float(numpy_helper.to_array(held["input_scale"]))
    assert scales["min-max"] == pytest.approx(60 / 127)
    assert scales["percentile"] < 4 / 127
    assert scales["entropy"] < scales["min-max"]


@pytest.mark.parametrize(
    "images",
    [draw(4)[:, :2], draw(4)[..., :8], draw(4).astype(np.float64), draw(4)[0], draw(4)[:0]],
    ids=["channels", "size", "type", "no batch", "none"],
)
def test_images_of_another_kind_than_the_network_reads_are_refused(source, images) -> None:
    with pytest.raises(ValueError, match=r"calibration images of shape .* but net.onnx takes \(N, 3, 12, 12\) float32"):
        Converter(source, images, precision="int8")


@pytest.mark.parametrize("precision", ["fp32", "int7"])
def test_what_is_no_conversion_is_refused(source, precision) -> None:
    with pytest.raises(ValueError, match=f"not converted to '{precision}'. Available: fp16, bf16, int8, fp8"):
        Converter(source, draw(1), precision=precision)


def test_excluding_every_layer_is_refused(source) -> None:
    with pytest.raises(ValueError, match="int8 was asked for, and no layer is left to quantise"):
        Converter(source, draw(1), precision="int8", settings=QuantizeSettings(exclude=("*",)))


def test_what_is_left_out_is_checked_without_an_image(source) -> None:
    require_quantisable(source, QuantizeSettings(exclude=("head", "add"), first_last=True))
    with pytest.raises(ValueError, match=r"no layer that can be quantised is named 'norm'. There are: stem, body, add"):
        require_quantisable(source, QuantizeSettings(exclude=("norm",)))
    with pytest.raises(ValueError, match="no layer is left to quantise: it has 4 that can be"):
        require_quantisable(source, QuantizeSettings(exclude=("*",)))


def test_what_is_no_onnx_file_is_refused(tmp_path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"no graph")
    with pytest.raises(IntegrityError, match="no ONNX file"):
        Converter(tmp_path / "net.onnx", draw(1), precision="fp16")


def test_nothing_is_left_behind_where_a_file_cannot_be_written(source, tmp_path, monkeypatch) -> None:
    converter = Converter(source, draw(4), precision="int8")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        converter.write(tmp_path / "low.onnx")
    assert list(tmp_path.iterdir()) == []


def full_disk(_path: Path, _data: bytes) -> int:
    raise OSError(28, "No space left on device")


def test_outputs_that_are_not_finite_are_named_with_the_way_out() -> None:
    with pytest.raises(ParityFailed, match=r"model.fp16.onnx: 1 of 4 outputs are not finite.*raise quantize.images"):
        require_finite(np.float32([[1, 2], [np.inf, 3]]), what="model.fp16.onnx")


def test_the_reference_runs_a_file_as_it_is_written_where_an_optimised_session_does_not(tmp_path) -> None:
    """When this fails, onnxruntime's optimised sessions may judge converted files (seen to differ in 1.31.1)."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 10)
    )
    with torch.no_grad():
        net[0].weight[0] *= 1e-7  # a channel that is almost dead, but for its bias
        net[0].bias[0] = 3.0
    export_onnx(net, torch.zeros(1, 3, SIZE, SIZE), tmp_path / "net.onnx")
    Converter(tmp_path / "net.onnx", draw(12), precision="int8", rest="fp16").write(tmp_path / "low.onnx")
    unseen = draw(6, seed=1)
    exact = Reference(tmp_path / "net.onnx").outputs(unseen)
    as_written = Reference(tmp_path / "low.onnx").outputs(unseen)
    require_agreement(compare_outputs(exact, as_written), what="the file", precision="int8")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(tmp_path / "low.onnx"), options)
    optimised = np.concatenate([session.run(None, {"input": image[None]})[0] for image in unseen])
    with pytest.raises(ParityFailed):
        require_agreement(compare_outputs(as_written, optimised), what="the session", precision="int8 file")


def test_a_file_that_onnxruntime_cannot_open_is_named(tmp_path) -> None:
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], name="odd")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 2)) for name in "xy"]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:])
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "odd.onnx")
    with pytest.raises(ConversionFailed, match=r"odd.onnx: onnxruntime .* cannot open it: .*NoSuchOperator"):
        Reference(tmp_path / "odd.onnx")


def handmade(path: Path, inputs: list[str], *, nodes: Sequence[onnx.NodeProto] = (), ir_version: int = 10) -> Path:
    """A convolution by `w` of the input `x`, among other inputs and nodes."""
    values = dict.fromkeys(inputs, (1, 3, SIZE, SIZE)) | {"w": (4, 3, 1, 1), "y": (1, 4, SIZE, SIZE)}
    told = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()}
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((4, 3, 1, 1)).astype(np.float32), "w")
    conv = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
    graph = helper.make_graph([conv, *nodes], "g", [told[name] for name in inputs], [told["y"]], [weight])
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=ir_version), path)
    return path


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_a_weight_that_an_old_file_lists_among_its_inputs_is_none(precision, tmp_path) -> None:
    old = handmade(tmp_path / "old.onnx", ["w", "x"], ir_version=3)
    new = handmade(tmp_path / "new.onnx", ["x"])
    outputs = []
    for source in (old, new):
        Converter(source, draw(2), precision=precision).write(tmp_path / "low.onnx")
        outputs.append(Reference(tmp_path / "low.onnx").outputs(draw(2)))
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize(("inputs", "named"), [(["x", "z"], "x, z"), ([], "none")])
def test_a_network_that_does_not_take_one_input_is_refused_with_what_it_takes(inputs, named, tmp_path) -> None:
    source = handmade(tmp_path / "odd.onnx", inputs)
    with pytest.raises(ValueError, match=f"odd.onnx: a network with one input, .* it takes {named}"):
        Converter(source, draw(1), precision="bf16")


def test_the_reference_runs_networks_with_one_input(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"two.onnx: a network with one input, .* it takes x, z"):
        Reference(handmade(tmp_path / "two.onnx", ["x", "z"]))


def test_weights_that_are_missing_beside_the_file_are_named(tmp_path) -> None:
    model = onnx.load(handmade(tmp_path / "net.onnx", ["x"]))
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    (tmp_path / "net.data").unlink()
    for opened in (Reference, lambda path: require_quantisable(path, QuantizeSettings())):
        with pytest.raises(IntegrityError, match=r"net.onnx: onnx cannot read it: .*net.data.* Export it again"):
            opened(tmp_path / "net.onnx")


def test_a_node_that_onnx_does_not_allow_is_one_sentence(tmp_path) -> None:
    source = handmade(tmp_path / "dead.onnx", ["x"], nodes=[helper.make_node("Relu", ["x"], [], name="dead")])
    with pytest.raises(IntegrityError, match=r"dead.onnx: onnx cannot read it: .*node name: dead"):
        Converter(source, draw(1), precision="fp16")


def test_sparse_weights_are_refused(tmp_path) -> None:
    model = onnx.load(handmade(tmp_path / "sparse.onnx", ["x"]))
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    places = helper.make_tensor("places", TensorProto.INT64, [1], [0])
    del model.graph.initializer[:]
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4, 3, 1, 1]))
    onnx.save(model, tmp_path / "sparse.onnx")
    with pytest.raises(ConversionFailed, match="the ONNX file has sparse weights, which are only built in fp32"):
        Converter(tmp_path / "sparse.onnx", draw(1), precision="bf16")
