"""TensorRT without a GPU: real ahead-of-time builds with every option, and which machine an engine belongs to."""

import contextlib
import hashlib
import importlib
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torchvision import models

from chip_deploy.export import target_trt
from chip_deploy.export.errors import BuildFailed, IntegrityError, ParityFailed, TargetUnavailable
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.shapes import DYNAMIC_BATCH
from chip_deploy.export.target import (
    CAPABILITIES,
    PRECISIONS,
    BuildOptions,
    Engine,
    built_with,
    engine_path,
    parse_target,
    sidecar_path,
)
from chip_deploy.export.target_trt import DEMOTED, Gpu, TensorRTTarget, find_gpu
from chip_deploy.export.trt_build import HOST_CODE, NEWEST_OPSET, build_plan
from chip_deploy.export.trt_caches import FOLDER_VARIABLE, CacheFile
from chip_deploy.export.trt_session import SessionOptions, TrtSession

NO_RTX = importlib.util.find_spec("tensorrt_rtx") is None
needs_rtx = pytest.mark.skipif(NO_RTX, reason="tensorrt-rtx is not installed (it has wheels for x86-64 only)")
needs_no_gpu = pytest.mark.skipif(
    isinstance(find_gpu(), Gpu), reason="this machine has a GPU; this is about having none"
)
BUILD_ELSEWHERE = """
import sys
from pathlib import Path
from chip_deploy.export.target import parse_target
from chip_deploy.export.targets import make_target
print(make_target(parse_target("trt-rtx:sm86,sm89")).build(Path(sys.argv[1]), Path(sys.argv[2])).sha256)
"""


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 40, 3), nn.ReLU()]
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10))
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(net, torch.zeros(1, 3, 32, 32), path)
    return path


@pytest.fixture(scope="module")
def free_onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    path = tmp_path_factory.mktemp("free") / "model.onnx"
    export_onnx(net, torch.zeros(2, 3, 32, 32), path, dynamic_batch=True)
    return path


def build(text: str, onnx_path: Path, bundle: Path, **options: Any) -> Engine:
    spec = parse_target(text)
    target = TensorRTTarget(spec, options=BuildOptions(**options))
    return target.build(onnx_path, engine_path(bundle, spec, "fp32"))


def engine_of(text: str, **changes: Any) -> Engine:
    """A sidecar as a build on another machine would have written it."""
    rtx = text.startswith("trt-rtx")
    package = "tensorrt_rtx" if rtx else "tensorrt"
    fields: dict[str, Any] = {
        "target": text,
        "precision": "fp32",
        "file": "engines/x.engine",
        "sha256": "0" * 64,
        "bytes": 1,
        "built_for": {"capabilities": "sm86"} if rtx else {"gpu": "Orin", "capabilities": "sm87"},
        "flags": {"tf32": True},
        "versions": {package: "1.0"},
        "build_seconds": 1.0,
    }
    return Engine(**{**fields, **changes})


@needs_rtx
def test_two_capabilities_go_into_one_engine_which_differs_from_that_of_one(onnx_path: Path, tmp_path: Path) -> None:
    both, one = build("trt-rtx:sm86,sm89", onnx_path, tmp_path), build("trt-rtx:sm86", onnx_path, tmp_path)
    assert (both.file, both.built_for) == ("engines/trt-rtx-sm86-sm89.fp32.engine", {"capabilities": "sm86,sm89"})
    assert both.sha256 != one.sha256


@needs_rtx
def test_the_same_network_gives_the_same_bytes_in_another_process(onnx_path: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    command = [sys.executable, "-c", BUILD_ELSEWHERE, str(onnx_path), str(tmp_path / "there" / "engines" / "x.engine")]
    there = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert there == build("trt-rtx:sm86,sm89", onnx_path, tmp_path).sha256


@needs_rtx
def test_resnet18_builds_ahead_of_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = models.resnet18(num_classes=10)
    export_onnx(net, torch.zeros(1, 3, 32, 32), tmp_path / "model.onnx")
    engine = build("trt-rtx:sm86,sm89", tmp_path / "model.onnx", tmp_path)
    weights = sum(parameter.numel() for parameter in net.parameters()) * 4
    assert weights < engine.bytes < 1.1 * weights
    assert engine.flags["warnings"] == []


@needs_rtx
def test_a_strongly_typed_fp32_engine_says_that_it_multiplies_in_tf32(onnx_path: Path, tmp_path: Path) -> None:
    engine = build("trt-rtx:sm89", onnx_path, tmp_path)
    assert engine.flags == {"strongly_typed": True, "tf32": True, "profiles": [], "warnings": []}
    assert (engine.precision, engine.arithmetic) == ("fp32", "tf32")


@needs_rtx
def test_a_free_batch_gets_a_profile_that_the_sidecar_names(free_onnx_path: Path, tmp_path: Path) -> None:
    engine = build("trt-rtx:sm89", free_onnx_path, tmp_path)
    assert engine.flags["profiles"] == [{"input": [[batch, 3, 32, 32] for batch in DYNAMIC_BATCH]}]


@needs_rtx
def test_each_shape_that_was_asked_for_is_a_profile_of_its_own(free_onnx_path: Path, tmp_path: Path) -> None:
    shapes = ("input:1x3x32x32", "input:2x3x32x32/8x3x32x32/16x3x32x32")
    engine = build("trt-rtx:sm89", free_onnx_path, tmp_path, shapes=shapes)
    assert engine.flags["profiles"] == [
        {"input": [[1, 3, 32, 32]] * 3},
        {"input": [[2, 3, 32, 32], [8, 3, 32, 32], [16, 3, 32, 32]]},
    ]
    one = build("trt-rtx:sm89", free_onnx_path, tmp_path, shapes=shapes[:1])
    assert engine.bytes > 1.5 * one.bytes


@needs_rtx
def test_a_shape_that_the_network_does_not_take_is_refused_before_anything_is_built(
    onnx_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"axis 0 of \(1, 3, 32, 32\) is fixed\. Export it with --set export\.dyn"):
        build("trt-rtx:sm89", onnx_path, tmp_path, shapes=("input:4x3x32x32",))
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_a_free_axis_that_is_no_batch_needs_a_shape(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Relu", ["input"], ["output"])]
    write_onnx(tmp_path / "model.onnx", nodes, shape=[1, 3, "height"])
    with pytest.raises(
        ValueError, match=r"input 'input': shape \(1, 3, any\); only a free batch has shapes by default"
    ):
        build("trt-rtx:sm89", tmp_path / "model.onnx", tmp_path)
    engine = build("trt-rtx:sm89", tmp_path / "model.onnx", tmp_path, shapes=("input:1x3x4/1x3x8/1x3x16",))
    assert engine.flags["profiles"] == [{"input": [[1, 3, 4], [1, 3, 8], [1, 3, 16]]}]


def sandwiched(path: Path, neighbours: str, *, kernel: int) -> np.ndarray:
    """The weights of a convolution that stays in fp32 between two others, too large for fp16."""
    draws = np.random.default_rng(0)
    single, other = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16 if neighbours == "fp16" else onnx.TensorProto.FLOAT
    weights, nodes = [], []

    def convolution(read: str, written: str, size: int, kind: str, scale: float) -> None:
        values = (scale * draws.standard_normal((64, 64, size, size))).astype(kind)
        weights.append(onnx.numpy_helper.from_array(values, f"{written}.weight"))
        inputs, pads = [read, f"{written}.weight"], [size // 2] * 4
        nodes.append(onnx.helper.make_node("Conv", inputs, [written], name=written, pads=pads))

    def cast(read: str, written: str, kind: int) -> None:
        nodes.append(onnx.helper.make_node("Cast", [read], [written], to=kind))

    near = "f2" if neighbours == "fp16" else "f4"
    cast("input", "low", other)
    convolution("low", "first", 3, near, 0.05)
    cast("first", "high", single)
    convolution("high", "kept", kernel, "f4", 1e6)
    cast("kept", "lowered", other)
    convolution("lowered", "last", 3, near, 0.05)
    cast("last", "output", single)
    values = [onnx.helper.make_tensor_value_info(name, single, [1, 64, 16, 16]) for name in ("input", "output")]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    return onnx.numpy_helper.to_array(weights[1])


@needs_rtx
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("neighbours", "stored"), [("fp32", "f4"), ("fp16", "f2")])
def test_fp32_between_fp16_is_fp16_in_the_plan_of_tensorrt_rtx_and_the_sentence_warns_of_it(
    kernel: int, neighbours: str, stored: str, tmp_path: Path
) -> None:
    weights = sandwiched(tmp_path / "model.onnx", neighbours, kernel=kernel)
    target = TensorRTTarget(parse_target("trt-rtx:sm89"))
    path = engine_path(tmp_path, target.spec, "fp16")
    engine = target.build(tmp_path / "model.onnx", path, precision="fp16")
    rows, plan = weights.transpose(0, 2, 3, 1), path.read_bytes()  # the order in which its convolutions keep them
    with np.errstate(over="ignore"):
        found = [kind for kind in ("f4", "f2") if np.ascontiguousarray(rows).astype(kind).tobytes() in plan]
    assert found == [stored]
    assert engine.layer_types is not None
    assert engine.layer_types.sentence.endswith(DEMOTED) is (neighbours == "fp16")


@needs_rtx
def test_options_reach_the_builder_and_the_sidecar(onnx_path: Path, tmp_path: Path) -> None:
    engine = build("trt-rtx:sm89", onnx_path, tmp_path, tf32=False, workspace_mib=512)
    assert engine.flags == {
        "strongly_typed": True,
        "tf32": False,
        "profiles": [],
        "warnings": [],
        "options": {"tf32": False, "workspace_mib": 512},
    }
    assert built_with(engine) == BuildOptions(tf32=False, workspace_mib=512)
    assert engine.arithmetic == "fp32"


@needs_rtx
def test_a_workspace_that_is_too_small_is_told_with_the_option(onnx_path: Path, tmp_path: Path) -> None:
    sentence = r"built no engine \(with workspace_mib=1\): .*within workspace limit.*\. Leave these options out"
    with pytest.raises(BuildFailed, match=sentence):
        build("trt-rtx:sm89", onnx_path, tmp_path, workspace_mib=1)


def rtx_plan(onnx_path: Path, **options: Any) -> bytes:
    """What TensorRT-RTX itself builds with options that the target may refuse."""
    trt = importlib.import_module("tensorrt_rtx")
    return bytes(build_plan(trt, onnx_path, BuildOptions(**options), capabilities=("sm89",)).data)


@needs_rtx
def test_tensorrt_rtx_builds_no_engine_for_later_versions_which_is_why_the_target_refuses_to(onnx_path: Path) -> None:
    with pytest.raises(BuildFailed, match=r"\(with version_compatible=true\): .*libnvinfer_lean"):
        rtx_plan(onnx_path, version_compatible=True)


@needs_rtx
def test_tensorrt_rtx_builds_the_same_at_every_level_which_is_why_the_target_takes_none(onnx_path: Path) -> None:
    plans = {rtx_plan(onnx_path, optimization_level=level) for level in (None, 0, 5)}
    assert len(plans) == 1


@needs_rtx
@needs_no_gpu
@pytest.mark.parametrize("options", [{"refit": True}, {"strip": True}, {"refit": True, "strip": True}])
def test_tensorrt_rtx_builds_nothing_to_refit_without_a_gpu_which_is_why_the_target_cannot_be_used(
    onnx_path: Path, options: dict[str, bool]
) -> None:
    with pytest.raises(BuildFailed, match="CUDA_SUCCESS"):
        rtx_plan(onnx_path, **options)
    target = TensorRTTarget(parse_target("trt-rtx:sm89"), options=BuildOptions(**options))
    reason = target.unusable()
    assert reason is not None
    assert reason.startswith(f"TensorRT-RTX needs a GPU to build with build.{next(iter(options))}, and there is none (")
    assert f"Give --set build.{next(iter(options))}=false" in reason


@needs_rtx
def test_with_a_gpu_it_is_tensorrt_rtx_that_says_what_can_be_refitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_trt, "find_gpu", lambda: GPUS["3090"])
    assert TensorRTTarget(parse_target("trt-rtx:sm86"), options=BuildOptions(refit=True)).unusable() is None


@pytest.mark.parametrize(
    ("target", "options", "sentence"),
    [
        ("trt-rtx:sm89", {"hardware_compatibility": "ampere-plus"}, "is standard TensorRT's. Name the GPUs instead"),
        ("trt-rtx:sm89", {"builds": 3}, "has no effect: TensorRT-RTX times no kernels"),
        ("trt-rtx:sm89", {"version_compatible": True}, "is standard TensorRT's: TensorRT-RTX comes without"),
        ("trt-rtx:sm89", {"optimization_level": 0}, "has no effect on target 'trt-rtx:sm89'. It takes: shapes, "),
        ("trt-rtx:sm89", {"timing_cache": False}, "has no effect on target 'trt-rtx:sm89'. It takes: "),
        ("trt", {"runtime_cache": False}, "has no effect on target 'trt'. It takes: "),
    ],
)
def test_options_that_the_target_cannot_take_are_refused_before_any_work(
    target: str, options: dict[str, Any], sentence: str
) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=rf"build\.{name} {re.escape(sentence)}"):
        TensorRTTarget(parse_target(target), options=BuildOptions(**options))


def test_shapes_that_are_misspelt_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"shapes 'input': NAME:SHAPE or NAME:MIN/OPT/MAX expected"):
        TensorRTTarget(parse_target("trt"), options=BuildOptions(shapes=("input",)))


@needs_rtx
def test_without_a_gpu_the_onnx_file_tells_the_types_of_the_layers(onnx_path: Path, tmp_path: Path) -> None:
    types = build("trt-rtx:sm89", onnx_path, tmp_path).layer_types
    assert types is not None
    assert (types.source, types.multiplying, types.reformats) == ("graph", {"fp32": 3}, None)
    assert types.sentence == (
        "All 3 multiplying layers run in fp32 (by the ONNX file). "
        "TF32 is allowed, so what is in fp32 may be multiplied in TF32."
    )
    kept = build("trt-rtx:sm89", onnx_path, tmp_path, tf32=False).layer_types
    assert kept is not None
    assert kept.sentence == "All 3 multiplying layers run in fp32 (by the ONNX file)."


@needs_rtx
def test_every_node_that_the_parser_does_not_know_is_named(tmp_path: Path) -> None:
    nodes = [
        onnx.helper.make_node("Foo", ["input"], ["between"], name="strange"),
        onnx.helper.make_node("Bar", ["between"], ["output"], name="stranger"),
    ]
    write_onnx(tmp_path / "model.onnx", nodes)
    with pytest.raises(
        BuildFailed, match=r"tensorrt_rtx .* cannot read it: node 'strange' \(Foo\): .*; node 'stranger' \(Bar\): "
    ):
        build("trt-rtx:sm89", tmp_path / "model.onnx", tmp_path)


@needs_rtx
def test_an_operator_of_onnx_that_tensorrt_does_not_have_is_called_unsupported_with_the_ways_out(
    tmp_path: Path,
) -> None:
    write_onnx(tmp_path / "model.onnx", [onnx.helper.make_node("Det", ["input"], ["output"], name="squares")])
    sentence = r"cannot read it: node 'squares' \(Det\): unsupported node\. Replace .* another precision or target\.$"
    with pytest.raises(BuildFailed, match=sentence):
        build("trt-rtx:sm89", tmp_path / "model.onnx", tmp_path)


@needs_rtx
def test_a_node_that_the_parser_refuses_goes_by_its_torch_layer_too(onnx_path: Path, tmp_path: Path) -> None:
    model = onnx.load(onnx_path)
    (first, *_) = [node for node in model.graph.node if node.op_type == "Conv"]
    first.op_type = "Convolve"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BuildFailed, match=rf"node '{first.name}' \(Convolve, layer 1\): "):
        build("trt-rtx:sm89", tmp_path / "model.onnx", tmp_path)


@needs_rtx
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: b"this is no network", r"it is no whole ONNX file \(.+\)\. Export it again\."),
        (lambda data: b"", r"it is no whole ONNX file \(it holds no graph\)"),
        (lambda data: data[: len(data) // 2], r"it is no whole ONNX file \(it ends in the middle\)"),
        (lambda data: data[:-3], r"it is no whole ONNX file \(it ends in the middle\)"),
    ],
    ids=["text", "nothing", "half", "three bytes short"],
)
def test_a_file_that_is_no_whole_onnx_file_is_one_sentence(
    onnx_path: Path, tmp_path: Path, damage: Any, sentence: str
) -> None:
    (tmp_path / "model.onnx").write_bytes(damage(onnx_path.read_bytes()))
    with pytest.raises(BuildFailed, match=rf"model\.onnx: tensorrt_rtx \S+ cannot read it: {sentence}"):
        build("trt-rtx:sm89", tmp_path / "model.onnx", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@needs_rtx
def test_a_folder_with_brackets_in_its_name_takes_no_part_in_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "nets (old)"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"")
    with pytest.raises(BuildFailed, match=r"no whole ONNX file \(it holds no graph\)\. Export it again\.$"):
        build("trt-rtx:sm89", folder / "model.onnx", tmp_path)


def test_of_several_builds_of_the_dense_network_one_that_disagrees_is_dropped_by_the_path_of_its_file(
    onnx_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disagree(*_openers: Any, arithmetic: str) -> int:
        raise ParityFailed(f"2 builds of one file disagree by more than {arithmetic} explains.")

    monkeypatch.setattr(target_trt, "find_gpu", lambda: GPUS["3090"])
    monkeypatch.setattr(target_trt, "fastest", disagree)
    target = TensorRTTarget(parse_target("trt"), options=BuildOptions(builds=2))
    monkeypatch.setattr(target, "_plan_opener", lambda path: lambda: None)
    with pytest.raises(ParityFailed, match=r"model\.onnx: 2 builds of one file disagree by more than tf32 explains"):
        target._onnx_opener(onnx_path)


@needs_rtx
def test_an_opset_that_there_is_not_yet_is_refused_though_the_parser_takes_it(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Relu", ["input"], ["output"])]
    write_onnx(tmp_path / "model.onnx", nodes, opset=NEWEST_OPSET + 1)
    with pytest.raises(BuildFailed, match=rf"written in opset {NEWEST_OPSET + 1}, and {NEWEST_OPSET} is the newest"):
        build("trt-rtx:sm89", tmp_path / "model.onnx", tmp_path)
    assert onnx.defs.onnx_opset_version() >= NEWEST_OPSET


@needs_rtx
def test_when_no_engine_comes_out_the_runtimes_own_words_are_kept_with_the_ways_out(
    onnx_path: Path, tmp_path: Path
) -> None:
    sentence = r"built no engine: .*FP32 GEMM is not supported.*\. Take another precision or target\.$"
    with pytest.raises(BuildFailed, match=sentence):
        build("trt-rtx:sm75", onnx_path, tmp_path)


@needs_rtx
def test_builds_are_silent(onnx_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build("trt-rtx:sm89", onnx_path, tmp_path)
    assert capfd.readouterr() == ("", "")


@needs_rtx
@needs_no_gpu
def test_without_a_gpu_an_engine_is_built_but_not_run(onnx_path: Path, tmp_path: Path) -> None:
    engine = build("trt-rtx:sm89", onnx_path, tmp_path)
    reason = TensorRTTarget(parse_target("trt-rtx:sm89")).cannot_run(engine)
    assert reason is not None
    assert reason.startswith("no CUDA d")


@needs_rtx
@needs_no_gpu
def test_without_a_gpu_a_session_gives_the_runtimes_own_words(onnx_path: Path, tmp_path: Path) -> None:
    build("trt-rtx:sm89", onnx_path, tmp_path)
    plan = engine_path(tmp_path, parse_target("trt-rtx:sm89"), "fp32").read_bytes()
    runtime = importlib.import_module("tensorrt_rtx")
    with pytest.raises(BuildFailed, match=r"x\.engine: tensorrt_rtx .* cannot read the engine: .*[Cc]uda"):
        TrtSession(runtime, SimpleNamespace(), plan, name="x.engine")


@needs_no_gpu
def test_standard_tensorrt_without_a_gpu_answers_at_once_with_the_two_ways_out() -> None:
    find_gpu.cache_clear()
    started = time.perf_counter()
    reason = TensorRTTarget(parse_target("trt")).unusable()
    assert time.perf_counter() - started < 0.2
    assert reason is not None
    assert "no CUDA d" in reason
    assert "--target trt-rtx:sm89" in reason
    assert "`chip-deploy build DIR --target trt` on the device." in reason
    assert "tensorrt" not in sys.modules


GPUS = {
    "3090": Gpu("GeForce RTX 3090", "sm86"),
    "4090": Gpu("GeForce RTX 4090", "sm89"),
    "5090": Gpu("GeForce RTX 5090", "sm120"),
    "H200": Gpu("H200", "sm90"),
    "Orin": Gpu("Orin", "sm87"),
    "T4": Gpu("T4", "sm75"),
}
TRT_ORIN = "built for SM 8.7 (Orin) with TensorRT 1.0; this machine has"
RTX_SM86 = "built for SM 8.6 with TensorRT-RTX 1.0; this machine has SM"


@pytest.mark.parametrize(
    ("target", "gpu", "reason"),
    [
        ("trt-rtx:sm86", "3090", None),
        (
            "trt-rtx:sm86",
            "4090",
            f"{RTX_SM86} 8.9 (GeForce RTX 4090): rebuild with `chip-deploy build DIR --target trt-rtx:sm89`",
        ),
        ("trt-rtx:sm86", "H200", f"{RTX_SM86} 9.0 (H200): rebuild with `chip-deploy build DIR --target trt`"),
        ("trt", "Orin", None),
        (
            "trt",
            "H200",
            f"{TRT_ORIN} SM 9.0 (H200): rebuild with `chip-deploy build DIR --target trt`",
        ),
    ],
)
def test_an_engine_of_another_gpu_is_refused_with_what_to_do(target: str, gpu: str, reason: str | None) -> None:
    assert TensorRTTarget(parse_target(target))._other_machine(engine_of(target), GPUS[gpu], "1.0") == reason


@pytest.mark.parametrize(("gpu", "fits"), [("4090", True), ("5090", True), ("H200", False), ("T4", False)])
def test_an_engine_for_no_gpu_in_particular_fits_those_that_nvidia_names(gpu: str, fits: bool) -> None:
    target = TensorRTTarget(parse_target("trt-rtx"))
    assert target._fits(target._built_for(), GPUS[gpu]) is fits


@pytest.mark.parametrize(
    ("level", "fits"),
    [
        ("none", ["3090"]),
        ("same-compute-capability", ["3090"]),
        ("ampere-plus", ["3090", "4090", "5090", "H200", "Orin"]),
    ],
)
def test_an_engine_is_for_the_gpus_that_its_compatibility_names(
    level: Any, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_trt, "find_gpu", lambda: GPUS["3090"])
    target = TensorRTTarget(parse_target("trt"), options=BuildOptions(hardware_compatibility=level))
    built_for = target._built_for()
    assert [name for name, gpu in GPUS.items() if target._fits(built_for, gpu)] == fits
    another_card = Gpu("RTX A6000", "sm86")
    assert target._fits(built_for, another_card) is (level != "none")


@pytest.mark.parametrize(
    ("target", "precision", "reason"),
    [
        ("trt-rtx:sm75", "fp16", None),
        ("trt-rtx:sm75", "int8", None),
        ("trt-rtx:sm80", "bf16", None),
        ("trt-rtx:sm75,sm86", "bf16", "bf16 needs compute capability 8.0 or later, and the target is for 7.5 too. "),
        ("trt-rtx:sm89,sm120", "fp8", None),
        ("trt-rtx", "fp8", "fp8 needs compute capability 8.9 or later, and the target is for 8.0, 8.6 too. "),
    ],
)
def test_a_precision_that_a_gpu_has_no_arithmetic_for_is_refused_before_any_work(
    target: str, precision: str, reason: str | None
) -> None:
    found = TensorRTTarget(parse_target(target)).refuses(precision)
    assert found == (reason and f"{reason}Name others, or leave {precision} out.")


def test_the_gpu_at_hand_decides_what_standard_tensorrt_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    target = TensorRTTarget(parse_target("trt"))
    for gpu, refused in (("T4", {"bf16", "fp8"}), ("Orin", {"fp8"}), ("H200", set())):
        monkeypatch.setattr(target_trt, "find_gpu", lambda gpu=gpu: GPUS[gpu])
        assert {name for name in PRECISIONS if target.refuses(name)} == refused


@needs_rtx
@pytest.mark.parametrize("capability", [name for name in CAPABILITIES["trt-rtx"] if name != "sm75"])
def test_tensorrt_rtx_builds_for_every_capability_that_can_be_named(
    capability: str, onnx_path: Path, tmp_path: Path
) -> None:
    assert build(f"trt-rtx:{capability}", onnx_path, tmp_path).built_for == {"capabilities": capability}


@pytest.mark.parametrize(
    ("built", "here", "compatible", "fits"),
    [
        ("11.4.0.106", "11.4.0.106", False, True),
        ("11.4.0.106", "11.4.0.107", False, False),
        ("10.16.1.11", "11.4.0.106", True, True),
        ("10.9.0.34", "10.16.1.11", True, True),
        ("11.4.0.106", "10.16.1.11", True, False),
    ],
)
def test_an_engine_fits_its_own_version_and_later_ones_only_where_that_was_asked(
    built: str, here: str, compatible: bool, fits: bool
) -> None:
    options = {"version_compatible": True} if compatible else {}
    engine = engine_of("trt", versions={"tensorrt": built}, flags={"options": options})
    reason = TensorRTTarget(parse_target("trt"))._other_machine(engine, GPUS["Orin"], here)
    assert (reason is None) is fits
    if reason:
        assert reason.startswith(f"built for SM 8.7 (Orin) with TensorRT {built}; this machine has TensorRT {here}: ")


@needs_rtx
def test_an_engine_of_another_version_is_refused_with_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_trt, "find_gpu", lambda: Gpu("GeForce RTX 3090", "sm86"))
    monkeypatch.setattr(target_trt, "no_cudart", lambda: None)
    target = TensorRTTarget(parse_target("trt-rtx:sm86"))
    here = importlib.import_module("tensorrt_rtx").__version__
    assert target.cannot_run(engine_of("trt-rtx:sm86")) == (
        f"built for SM 8.6 with TensorRT-RTX 1.0; this machine has TensorRT-RTX {here}: "
        "rebuild with `chip-deploy build DIR --target trt-rtx:sm86`"
    )
    assert target.cannot_run(engine_of("trt-rtx:sm86", versions={"tensorrt_rtx": here})) is None


class Cudart:
    """cuda-python's module of runtime calls, for a driver that may be too old for it."""

    cudaError_t = SimpleNamespace(cudaSuccess=0, cudaErrorInsufficientDriver=35)

    def __init__(self, error: int) -> None:
        self.error = error

    def cudaGetDeviceCount(self) -> tuple[int, int | None]:
        return self.error, None if self.error else 1


@pytest.mark.parametrize("driver", [(12, 6), (12, 9)])
def test_a_cuda_python_for_a_later_driver_is_told_before_a_session_is_opened(
    driver: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_trt, "find_gpu", lambda: GPUS["Orin"])
    monkeypatch.setattr(target_trt, "driver_cuda", lambda: driver)
    monkeypatch.setattr(target_trt, "_installed", lambda name: True)
    monkeypatch.setattr(target_trt, "_import", lambda name: Cudart(35))
    told = f"cuda-python is for a later CUDA than 12.{driver[1]}, the newest that the driver serves. "
    remedy = f"Install it with `pip install 'cuda-python<12.{driver[1] + 1}'`"
    assert TensorRTTarget(parse_target("trt")).cannot_run(engine_of("trt")) == told + remedy
    with pytest.raises(TargetUnavailable, match=re.escape(told)):
        target_trt.load_cudart()
    monkeypatch.setattr(target_trt, "_import", lambda name: Cudart(0))
    assert target_trt.no_cudart() is None


def test_where_cuda_python_alone_is_missing_it_alone_is_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_trt, "find_gpu", lambda: GPUS["Orin"])
    monkeypatch.setattr(target_trt, "driver_cuda", lambda: (12, 6))
    monkeypatch.setattr(target_trt, "_installed", lambda name: name == "tensorrt")
    assert TensorRTTarget(parse_target("trt")).cannot_run(engine_of("trt")) == (
        "cuda-python is not installed, and TensorRT engines run through it. "
        "Install it with `pip install 'cuda-python<12.7'`"
    )


@pytest.mark.parametrize("compatible", [False, True])
def test_the_types_of_a_finished_engine_are_asked_as_it_was_built(
    compatible: bool, onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "engines" / "trt-rtx-sm86.fp32.engine"
    path.parent.mkdir()
    path.write_bytes(b"plan")
    flags = {"options": {"version_compatible": True} if compatible else {}}
    sidecar_path(path).write_text(engine_of("trt-rtx:sm86", flags=flags).model_dump_json())
    asked = []

    def inspected(_trt: object, plan: bytes, *, name: str, options: SessionOptions) -> str:
        asked.append((plan, name, options.host_code))
        return "no JSON"

    monkeypatch.setattr(target_trt, "_import", lambda _: None)
    monkeypatch.setattr(target_trt, "engine_information", inspected)
    monkeypatch.setattr(target_trt, "engine_types", lambda told, *_, **options: (told, options["tf32"]))
    target = TensorRTTarget(parse_target("trt-rtx:sm86"))
    assert target.engine_layer_types(path, onnx_path) == ("no JSON", False)
    assert asked == [(b"plan", str(onnx_path), compatible)]


@needs_rtx
@needs_no_gpu
def test_a_plan_that_changes_between_its_check_and_its_reading_is_not_opened(
    onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("trt-rtx:sm86", onnx_path, tmp_path)
    target = TensorRTTarget(parse_target("trt-rtx:sm86"))
    path = engine_path(tmp_path, target.spec, "fp32")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match=r"x?\.engine: changed while it was opened"):
        target._open(path)


def test_an_engine_without_weights_wants_the_very_file_that_has_them(tmp_path: Path) -> None:
    path = tmp_path / "engines" / "trt.fp32.engine"
    path.parent.mkdir()
    path.write_bytes(b"plan")
    weights = {"file": "model.onnx", "sha256": hashlib.sha256(b"weights").hexdigest()}
    digest = hashlib.sha256(b"plan").hexdigest()
    engine = engine_of("trt", sha256=digest, flags={"options": {"strip": True}, "weights": weights})
    sidecar_path(path).write_text(engine.model_dump_json())
    target = TensorRTTarget(parse_target("trt"))
    for content in (None, b"other weights"):
        if content:
            (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(BuildFailed, match=r"holds no weights, and .*model\.onnx is not the file that has them"):
            target._open(path)
    (tmp_path / "model.onnx").write_bytes(b"weights")
    assert target_trt._weights(path, engine) == tmp_path / "model.onnx"
    elsewhere = tmp_path / "elsewhere.onnx"
    for content, fits in ((b"other weights", False), (b"weights", True)):
        elsewhere.write_bytes(content)
        with contextlib.nullcontext() if fits else pytest.raises(BuildFailed, match=r"and .*elsewhere\.onnx is not"):
            assert target_trt._weights(path, engine, elsewhere) == elsewhere


def test_a_package_whose_libraries_do_not_load_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TargetUnavailable, match=r"'half_installed' does not load \(libnvinfer\.so\.10: cannot open"):
        target_trt._import("half_installed")


def write_onnx(
    path: Path, nodes: list[onnx.NodeProto], *, shape: list[int | str] | None = None, opset: int = 18
) -> None:
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape or [1, 3])
        for name in ("input", "output")
    ]
    graph = onnx.helper.make_graph(nodes, "graph", values[:1], values[1:])
    imports = [onnx.helper.make_opsetid("", opset)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10), path)


# The builder of standard TensorRT, which needs a GPU: its configuration against a stand-in ---------------------------


class ConfigStandIn:
    """A builder configuration that remembers what it was told, and takes timings of version 1 alone."""

    def __init__(self) -> None:
        self.flags = {"TF32"}
        self.pools: dict[str, int] = {}
        self.given: bytes | None = None

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def get_flag(self, flag: str) -> bool:
        return flag in self.flags

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.pools[pool] = size

    def create_timing_cache(self, data: bytes) -> SimpleNamespace | None:
        return None if data == b"damaged" else SimpleNamespace(serialize=lambda: data + b"+timed", data=data)

    def set_timing_cache(self, cache: SimpleNamespace, *, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch, "timings of another GPU mislead"
        if cache.data not in (b"", b"version 1"):
            return False
        self.cache, self.given = cache, cache.data
        return True

    def get_timing_cache(self) -> SimpleNamespace:
        return self.cache


class LoggerStandIn:
    """What a logger inherits from."""

    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)


class Members:
    """An enumeration whose members are their names."""

    def __init__(self, *names: str) -> None:
        for number, name in enumerate(names):
            setattr(self, name, name if name != "STRONGLY_TYPED" else number)


def standard_tensorrt(config: ConfigStandIn, *, levels: tuple[str, ...] = ("NONE", "AMPERE_PLUS")) -> SimpleNamespace:
    """A module `tensorrt` of release 10.3 whose builder makes a plan of anything."""
    tensor = SimpleNamespace(name="input", shape=(1, 3, 32, 32))
    network = SimpleNamespace(num_inputs=1, get_input=lambda index: tensor)
    builder = SimpleNamespace(
        create_network=lambda flags: network,
        create_builder_config=lambda: config,
        build_serialized_network=lambda network, config: b"plan",
    )
    return SimpleNamespace(
        __name__="tensorrt",
        __version__="10.3.0",
        Builder=lambda log: builder,
        BuilderFlag=Members("TF32", "REFIT", "REFIT_IDENTICAL", "STRIP_PLAN", "VERSION_COMPATIBLE"),
        HardwareCompatibilityLevel=Members(*levels),
        ILogger=LoggerStandIn,
        IProgressMonitor=object,
        MemoryPoolType=Members("WORKSPACE"),
        NetworkDefinitionCreationFlag=Members("STRONGLY_TYPED"),
        OnnxParser=lambda network, log: SimpleNamespace(parse=lambda data, path: True),
        ProfilingVerbosity=Members("DETAILED"),
    )


@pytest.mark.parametrize(
    ("kept", "given", "word"),
    [(b"version 1", b"version 1", "used"), (None, b"", "new"), (b"version 2", b"", "new"), (b"damaged", b"", "new")],
    ids=["its own", "none", "of another version", "damaged"],
)
def test_timings_are_used_where_they_fit_and_written_anew_where_they_do_not(
    onnx_path: Path, tmp_path: Path, kept: bytes | None, given: bytes, word: str
) -> None:
    file = CacheFile(tmp_path / "x.timing", {"gpu": "Orin"})
    if kept is not None:
        assert file.write(kept) is None
    config = ConfigStandIn()
    plan = build_plan(standard_tensorrt(config), onnx_path, BuildOptions(), timing_cache=file)
    assert (config.given, plan.flags["timing_cache"]) == (given, word)
    assert file.read() == given + b"+timed"


def test_timings_that_cannot_be_kept_are_no_failure(onnx_path: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder belongs")
    file = CacheFile(tmp_path / "taken" / "x.timing", {"gpu": "Orin"})
    plan = build_plan(standard_tensorrt(ConfigStandIn()), onnx_path, BuildOptions(), timing_cache=file)
    assert re.fullmatch(r"new, not kept \(.*taken: .+\)", plan.flags["timing_cache"])


def test_an_engine_that_later_versions_may_load_warns_of_the_code_in_it(onnx_path: Path) -> None:
    config = ConfigStandIn()
    plan = build_plan(standard_tensorrt(config), onnx_path, BuildOptions(version_compatible=True))
    assert "VERSION_COMPATIBLE" in config.flags
    assert plan.flags["warnings"] == [HOST_CODE]


def test_an_engine_without_weights_names_the_file_that_has_them(onnx_path: Path) -> None:
    config = ConfigStandIn()
    plan = build_plan(standard_tensorrt(config), onnx_path, BuildOptions(strip=True, refit=True))
    assert config.flags == {"TF32", "STRIP_PLAN", "REFIT"}
    digest = hashlib.sha256(onnx_path.read_bytes()).hexdigest()
    assert plan.flags["weights"] == {"file": "model.onnx", "sha256": digest}


def test_an_engine_without_weights_is_filled_with_the_same_ones_where_no_others_were_asked_for(onnx_path: Path) -> None:
    config = ConfigStandIn()
    build_plan(standard_tensorrt(config), onnx_path, BuildOptions(strip=True))
    assert config.flags == {"TF32", "STRIP_PLAN", "REFIT_IDENTICAL"}


def test_timings_that_the_builder_does_not_give_are_no_failure(onnx_path: Path, tmp_path: Path) -> None:
    config = ConfigStandIn()
    config.get_timing_cache = lambda: SimpleNamespace(serialize=lambda: None)
    file = CacheFile(tmp_path / "x.timing", {"gpu": "Orin"})
    plan = build_plan(standard_tensorrt(config), onnx_path, BuildOptions(), timing_cache=file)
    assert plan.flags["timing_cache"] == "new, not kept (the builder gave none back)"


def test_a_level_that_this_release_does_not_have_is_refused_by_name(onnx_path: Path) -> None:
    options = BuildOptions(hardware_compatibility="same-compute-capability")
    with pytest.raises(BuildFailed, match=r"tensorrt 10\.3\.0 has no HardwareCompatibilityLevel\.SAME_COMPUTE_CAP"):
        build_plan(standard_tensorrt(ConfigStandIn()), onnx_path, options)
    config = ConfigStandIn()
    trt = standard_tensorrt(config, levels=("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"))
    build_plan(trt, onnx_path, options)
    assert vars(config)["hardware_compatibility_level"] == "SAME_COMPUTE_CAPABILITY"


def test_timings_are_kept_apart_by_version_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    files = set()
    for gpu in (GPUS["3090"], GPUS["Orin"]):
        monkeypatch.setattr(target_trt, "find_gpu", lambda gpu=gpu: gpu)
        target = TensorRTTarget(parse_target("trt"))
        for version in ("10.3.0", "11.4.0.106"):
            file = target._timing_cache(SimpleNamespace(__version__=version))
            assert file is not None
            files.add(file.path)
    assert len(files) == 4
    assert all(path.is_relative_to(tmp_path) for path in files)


@pytest.mark.parametrize(
    ("target", "options"), [("trt", {"timing_cache": False}), ("trt", {"builds": 3}), ("trt-rtx:sm86", {})]
)
def test_no_timings_are_kept_where_none_are_wanted_or_made(
    target: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_trt, "find_gpu", lambda: GPUS["3090"])
    made = TensorRTTarget(parse_target(target), options=BuildOptions(**options))
    assert made._timing_cache(SimpleNamespace(__version__="11.4.0.106")) is None
