"""TensorRT without a GPU: real ahead-of-time builds, and execution against a stand-in for the absent device."""

import ast
import ctypes
import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable
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
from chip_deploy.export.errors import BuildFailed, MeasureFailed, TargetUnavailable
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.target import Engine, engine_path, parse_target
from chip_deploy.export.target_trt import DYNAMIC_BATCH, Gpu, TensorRTTarget, TrtSession, find_gpu, load_cudart

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


def build(text: str, onnx_path: Path, bundle: Path) -> Engine:
    spec = parse_target(text)
    return TensorRTTarget(spec).build(onnx_path, engine_path(bundle, spec, "fp32"))


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
    assert engine.flags == {"strongly_typed": True, "tf32": True, "profile": {}, "warnings": []}
    assert (engine.precision, engine.arithmetic) == ("fp32", "tf32")


@needs_rtx
def test_a_free_batch_gets_a_profile_that_the_sidecar_names(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    export_onnx(net, torch.zeros(2, 3, 32, 32), tmp_path / "model.onnx", dynamic_batch=True)
    engine = build("trt-rtx:sm89", tmp_path / "model.onnx", tmp_path)
    assert engine.flags["profile"] == {"input": [[batch, 3, 32, 32] for batch in DYNAMIC_BATCH]}


@needs_rtx
def test_a_free_axis_that_is_no_batch_is_refused(tmp_path: Path) -> None:
    write_onnx(tmp_path / "model.onnx", [onnx.helper.make_node("Relu", ["input"], ["output"])], shape=[1, 3, "height"])
    with pytest.raises(BuildFailed, match=r"input 'input': shape \(1, 3, -1\); only the batch may be free"):
        build("trt-rtx:sm89", tmp_path / "model.onnx", tmp_path)


@needs_rtx
def test_every_node_that_the_parser_does_not_know_is_named(tmp_path: Path) -> None:
    nodes = [
        onnx.helper.make_node("Foo", ["input"], ["between"], name="strange"),
        onnx.helper.make_node("Bar", ["between"], ["output"], name="stranger"),
    ]
    write_onnx(tmp_path / "model.onnx", nodes)
    with pytest.raises(
        BuildFailed, match=r"tensorrt_rtx .* cannot read it: node 'strange' \(Foo\): .*'stranger' \(Bar"
    ):
        build("trt-rtx:sm89", tmp_path / "model.onnx", tmp_path)


@needs_rtx
def test_when_no_engine_comes_out_the_runtimes_own_words_are_kept(onnx_path: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=r"built no engine: .*FP32 GEMM is not supported.*\.$"):
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


@pytest.mark.parametrize(
    ("target", "gpu", "reason"),
    [
        ("trt-rtx:sm86", Gpu("GeForce RTX 3090", "sm86"), None),
        ("trt-rtx:sm86", Gpu("GeForce RTX 4090", "sm89"), "it was built for sm86, and this GPU is sm89"),
        ("trt-rtx", Gpu("GeForce RTX 4090", "sm89"), None),
        ("trt-rtx", Gpu("GeForce RTX 5090", "sm120"), None),
        ("trt-rtx", Gpu("H100", "sm90"), "it was built for sm86, and this GPU is sm90"),
        ("trt-rtx", Gpu("T4", "sm75"), "it was built for sm86, and this GPU is sm75"),
        ("trt", Gpu("Orin", "sm87"), None),
        ("trt", Gpu("H200", "sm90"), "it was built for Orin, and this GPU is H200"),
    ],
)
def test_an_engine_fits_the_gpus_it_was_built_for(target: str, gpu: Gpu, reason: str | None) -> None:
    assert TensorRTTarget(parse_target(target))._other_gpu(engine_of(target), gpu) == reason


@needs_rtx
def test_an_engine_of_another_version_is_refused_with_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_trt, "find_gpu", lambda: Gpu("GeForce RTX 3090", "sm86"))
    target = TensorRTTarget(parse_target("trt-rtx:sm86"))
    here = importlib.import_module("tensorrt_rtx").__version__
    assert target.cannot_run(engine_of("trt-rtx:sm86")) == f"it was built by tensorrt_rtx 1.0, and this one is {here}"
    assert target.cannot_run(engine_of("trt-rtx:sm86", versions={"tensorrt_rtx": here})) is None


def test_a_package_whose_libraries_do_not_load_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TargetUnavailable, match=r"'half_installed' does not load \(libnvinfer\.so\.10: cannot open"):
        target_trt._import("half_installed")


def write_onnx(path: Path, nodes: list[onnx.NodeProto], shape: list[int | str] | None = None) -> None:
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape or [1, 3])
        for name in ("input", "output")
    ]
    graph = onnx.helper.make_graph(nodes, "graph", values[:1], values[1:])
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)


# What the bindings have ---------------------------------------------------------------------------------------------


def names_used(source: str, kinds: dict[str, Any]) -> dict[str, set[str]]:
    """For each expression in `kinds`, the attributes that `source` asks of it."""
    used: dict[str, set[str]] = {expression: set() for expression in kinds}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in kinds:
            used[ast.unparse(node.value)].add(node.attr)
    return used


def names_missing(source: str, kinds: dict[str, Any]) -> list[str]:
    return [
        f"{expression}.{name}"
        for expression, names in names_used(source, kinds).items()
        for name in sorted(names)
        if not hasattr(kinds[expression], name)
    ]


def bindings(trt: Any) -> dict[str, Any]:
    return {
        "trt": trt,
        "trt.ILogger.Severity": trt.ILogger.Severity,
        "trt.TensorIOMode": trt.TensorIOMode,
        "trt.BuilderFlag": trt.BuilderFlag,
        "builder": trt.Builder,
        "network": trt.INetworkDefinition,
        "config": trt.IBuilderConfig,
        "profile": trt.IOptimizationProfile,
        "parser": trt.OnnxParser,
        "error": trt.ParserError,
        "tensor": trt.ITensor,
        "self._runtime": trt.Runtime,
        "self._engine": trt.ICudaEngine,
        "self._context": trt.IExecutionContext,
        "self._trt": trt,
        "self._trt.LayerInformationFormat": trt.LayerInformationFormat,
        "inspector": trt.EngineInspector,
    }


@needs_rtx
def test_every_name_that_is_used_exists_in_the_real_bindings() -> None:
    kinds = bindings(importlib.import_module("tensorrt_rtx"))
    source = inspect.getsource(target_trt)
    assert all(names_used(source, kinds).values()), "an expression of the table no longer occurs in the source"
    assert names_missing(source, kinds) == []


@needs_rtx
def test_a_name_that_does_not_exist_would_be_found() -> None:
    kinds = bindings(importlib.import_module("tensorrt_rtx"))
    assert names_missing("self._context.execute_async_v4(stream)", kinds) == ["self._context.execute_async_v4"]


@needs_rtx
def test_every_cuda_call_exists_in_cuda_python() -> None:
    cudart = load_cudart()
    calls = [
        node.args[0].value
        for node in ast.walk(ast.parse(inspect.getsource(TrtSession).strip()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "self._cuda"
        and isinstance(node.args[0], ast.Constant)
    ]
    assert len(calls) >= 6
    assert [name for name in calls if not hasattr(cudart, str(name))] == []
    assert hasattr(cudart.cudaMemcpyKind, "cudaMemcpyHostToDevice")
    assert hasattr(cudart.cudaMemcpyKind, "cudaMemcpyDeviceToHost")
    assert hasattr(cudart, "cudaStreamNonBlocking")


@needs_rtx
@needs_no_gpu
def test_an_error_of_the_real_cuda_runtime_is_one_sentence() -> None:
    session = session_on_a_stand_in()
    session._cudart = load_cudart()
    with pytest.raises(MeasureFailed, match=r"x\.engine: cudaMalloc failed: .+\. Look at the driver") as caught:
        session._cuda("cudaMalloc", 16)
    assert "\n" not in str(caught.value)


# Execution, on a stand-in for the device ----------------------------------------------------------------------------


class DeviceStandIn:
    """CUDA's runtime calls on host memory; copies and executions wait until their stream is synchronised."""

    STREAM = 7
    cudaStreamNonBlocking = 1
    cudaError_t = SimpleNamespace(cudaSuccess=0)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    # What work takes on this device, in ms.
    COPY_MS = 0.25
    EXECUTION_MS = 2.0

    def __init__(self, *, memory: int = 1 << 20) -> None:
        self.free = memory
        self.now_ms = 0.0
        self.pinned: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.events: dict[int, float | None] = {}
        self.held: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.waiting: list[Callable[[], object]] = []
        self.streams: set[int] = set()

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, {2: b"out of memory"}[error]

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        if size > self.free:
            return 2, None
        self.free -= size
        block = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[int]:
        self.free += len(self.held.pop(address))
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        assert flags == self.cudaStreamNonBlocking
        self.streams.add(self.STREAM + len(self.streams))
        return 0, max(self.streams)

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.streams.remove(stream)
        return (0,)

    def cudaMemcpyAsync(self, to: int, origin: int, size: int, kind: int, stream: int) -> tuple[int]:
        device = to if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice else origin
        assert size <= len(self.held[device]), "copy outside of device memory"
        assert stream in self.streams
        self.waiting.append(lambda: self._copy(to, origin, size))
        return (0,)

    def _copy(self, to: int, origin: int, size: int) -> None:
        ctypes.memmove(to, origin, size)
        self.now_ms += self.COPY_MS

    def cudaMallocHost(self, size: int) -> tuple[int, int]:
        block = ctypes.create_string_buffer(size)
        self.pinned[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaFreeHost(self, address: int) -> tuple[int]:
        del self.pinned[address]
        return (0,)

    def cudaEventCreate(self) -> tuple[int, int]:
        self.events[len(self.events)] = None
        return 0, len(self.events) - 1

    def cudaEventDestroy(self, event: int) -> tuple[int]:
        del self.events[event]
        return (0,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[int]:
        assert stream in self.streams
        self.waiting.append(lambda: self.events.__setitem__(event, self.now_ms))
        return (0,)

    def cudaEventElapsedTime(self, begun: int, ended: int) -> tuple[int, float]:
        times = self.events[begun], self.events[ended]
        assert times[0] is not None, "the stream was not synchronised"
        assert times[1] is not None, "the stream was not synchronised"
        return 0, times[1] - times[0]

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        assert stream in self.streams
        for work in self.waiting:
            work()
        self.waiting.clear()
        return (0,)


class ContextStandIn:
    """An execution context whose network doubles its input, of 3 values an image and at most 4 images."""

    def __init__(self, device: DeviceStandIn) -> None:
        self.device = device
        self.batch = -1
        self.addresses: dict[str, int] = {}
        self.executions = 0
        self.broken = False
        self.profiler: Any = None
        self.times = {"conv + relu": 0.25, "Reformatting CopyNode for Input Tensor 0 to head": 0.125, "head": 0.5}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "input"
        self.batch = shape[0] if shape[0] <= 4 else self.batch
        return shape[0] <= 4

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.batch, 3)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream in self.device.streams, "the default stream synchronises more than it has to"
        self.device.waiting.append(self._double)
        for layer, ms in self.times.items() if self.profiler else ():
            self.profiler.report_layer_time(layer, ms * (self.executions + 1))
        return not self.broken

    def _double(self) -> None:
        self.executions += 1
        self.device.now_ms += self.device.EXECUTION_MS
        values = [
            np.frombuffer(memoryview(self.device.held[self.addresses[name]]), np.float32)
            for name in ("input", "output")
        ]
        count = 3 * self.batch
        values[1][:count] = 2 * values[0][:count]


class EngineStandIn:
    """A deserialised engine with one input and one output, both of a free batch."""

    num_io_tensors = 2
    num_layers = 3

    def __init__(self, context: ContextStandIn) -> None:
        self.context = context
        self.contexts = 0
        self.layers = [
            {
                "Name": "conv + relu",
                "LayerType": "CaskConvolution",
                "Metadata": "[ONNX Layer: node_conv]\x1f[ONNX Layer: node_relu]",
            },
            {"Name": "Reformatting CopyNode for Input Tensor 0 to head", "LayerType": "Reformat", "Metadata": ""},
            {"Name": "head", "LayerType": "gemm", "Metadata": "[ONNX Layer: node_linear]"},
        ]

    def create_execution_context(self) -> ContextStandIn:
        self.contexts += 1
        return self.context if self.contexts == 1 else ContextStandIn(self.context.device)

    def create_engine_inspector(self) -> "InspectorStandIn":
        return InspectorStandIn(self.layers)

    def get_tensor_name(self, index: int) -> str:
        return ("input", "output")[index]

    def get_tensor_mode(self, name: str) -> str:
        return name.upper()

    def get_tensor_dtype(self, name: str) -> str:
        return "FLOAT"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 3), (1, 3), (4, 3)]


class InspectorStandIn:
    """What tells about an engine's layers, in JSON that holds bare control characters."""

    execution_context: Any = None

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def get_layer_information(self, index: int, kind: str) -> str:
        assert kind == "JSON"
        return json.dumps(self.layers[index]).replace("\\u001f", "\x1f")


class ProfilerStandIn:
    """What a profiler inherits from."""


class LoggerStandIn:
    """What a logger inherits from."""

    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)


def session_on_a_stand_in(device: DeviceStandIn | None = None) -> TrtSession:
    device = device or DeviceStandIn()
    engine = EngineStandIn(ContextStandIn(device))
    trt = SimpleNamespace(
        __name__="tensorrt",
        __version__="10.3",
        ILogger=LoggerStandIn,
        IProfiler=ProfilerStandIn,
        LayerInformationFormat=SimpleNamespace(JSON="JSON"),
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if plan else None),
        TensorIOMode=SimpleNamespace(INPUT="INPUT"),
        nptype=lambda dtype: {"FLOAT": np.float32}[dtype],
    )
    return TrtSession(trt, device, b"plan", name="x.engine")


@needs_rtx
def test_the_stand_ins_have_no_name_that_the_real_bindings_lack() -> None:
    trt = importlib.import_module("tensorrt_rtx")
    pairs = [
        (EngineStandIn, trt.ICudaEngine),
        (ContextStandIn, trt.IExecutionContext),
        (InspectorStandIn, trt.EngineInspector),
        (DeviceStandIn, load_cudart()),
    ]
    for stand_in, real in pairs:
        names = [name for name in vars(stand_in) if not name.startswith("_") and not name.isupper()]
        assert [name for name in names if not hasattr(real, name)] == []


def test_a_session_knows_its_tensors_and_their_free_batch() -> None:
    session = session_on_a_stand_in()
    assert (session.input_names, session.output_names) == (["input"], ["output"])
    assert session.input_shapes == {"input": (-1, 3)}


def test_run_brings_inputs_to_the_device_and_outputs_back() -> None:
    images = np.arange(6, dtype=np.float32).reshape(2, 3)
    outputs = session_on_a_stand_in().run({"input": images})
    assert np.array_equal(outputs["output"], 2 * images)


def test_batches_of_any_size_in_the_profile_follow_one_another() -> None:
    session = session_on_a_stand_in()
    for batch in (1, 4, 2):
        images = np.full((batch, 3), batch, np.float32)
        assert np.array_equal(session.run({"input": images})["output"], 2 * images)


def test_each_lap_is_one_execution_that_is_done_when_it_returns() -> None:
    session = session_on_a_stand_in()
    session.bind({"input": np.ones((1, 3), np.float32)})
    for lap in range(1, 4):
        session.lap()
        assert session._context.executions == lap


def test_a_timed_lap_takes_what_the_device_says_between_two_events() -> None:
    session = session_on_a_stand_in()
    session.bind({"input": np.ones((1, 3), np.float32)})
    assert session.timed_lap_ms() == DeviceStandIn.EXECUTION_MS
    assert session._context.executions == 1


def test_a_round_trip_tells_the_execution_from_the_copies_around_it() -> None:
    session = session_on_a_stand_in()
    session.bind({"input": np.ones((2, 3), np.float32)})
    for _ in range(2):
        trip = session.round_trip()
        # One input and one output.
        assert (trip.compute_ms, trip.with_transfers_ms) == (2.0, 2.0 + 2 * DeviceStandIn.COPY_MS)
        assert trip.host_ms > 0


def test_a_round_trip_brings_what_is_bound_now_and_its_outputs_back() -> None:
    device = DeviceStandIn()
    session = session_on_a_stand_in(device)
    for value in (1.0, 3.0):
        session.bind({"input": np.full((1, 3), value, np.float32)})
        session.round_trip()
        outputs = [np.frombuffer(memoryview(block), np.float32) for block in device.pinned.values()]
        assert np.array_equal(np.sort(np.concatenate(outputs)), [value] * 3 + [2 * value] * 3)
        assert np.array_equal(session.outputs()["output"], [[2 * value] * 3])


def test_a_round_trip_before_binding_is_refused() -> None:
    with pytest.raises(MeasureFailed, match=r"no inputs are bound\. Call bind first"):
        session_on_a_stand_in().round_trip()


def test_closing_gives_back_events_and_pinned_memory_too() -> None:
    device = DeviceStandIn()
    session = session_on_a_stand_in(device)
    session.bind({"input": np.ones((1, 3), np.float32)})
    session.round_trip()
    assert device.events
    assert device.pinned
    session.close()
    assert (device.events, device.pinned, device.held) == ({}, {}, {})


def test_bound_inputs_stay_on_the_device_whatever_happens_to_the_array() -> None:
    session = session_on_a_stand_in()
    array = np.ones((1, 3), np.float32)
    session.bind({"input": array})
    array[:] = 5
    session.lap()
    assert np.array_equal(session.outputs()["output"], [[2, 2, 2]])


def test_binding_again_keeps_the_device_memory_that_suffices() -> None:
    device = DeviceStandIn()
    session = session_on_a_stand_in(device)
    session.bind({"input": np.ones((2, 3), np.float32)})
    held = dict(device.held)
    session.bind({"input": np.ones((1, 3), np.float32)})
    assert device.held == held
    session.bind({"input": np.ones((4, 3), np.float32)})
    assert sorted(len(block) for block in device.held.values()) == [48, 48]


def test_closing_gives_everything_back_and_may_be_repeated() -> None:
    device = DeviceStandIn(memory=1000)
    session = session_on_a_stand_in(device)
    session.run({"input": np.ones((1, 3), np.float32)})
    session.close()
    session.close()
    assert (device.free, device.held, device.streams) == (1000, {}, set())


def test_a_batch_outside_the_profile_is_refused_with_the_profile() -> None:
    with pytest.raises(ValueError, match=r"shape \(5, 3\) given, between \(1, 3\) and \(4, 3\) expected"):
        session_on_a_stand_in().run({"input": np.ones((5, 3), np.float32)})


def test_device_memory_that_runs_out_is_one_sentence() -> None:
    with pytest.raises(MeasureFailed, match=r"x\.engine: cudaMalloc failed: out of memory\. Look at"):
        session_on_a_stand_in(DeviceStandIn(memory=8)).run({"input": np.ones((1, 3), np.float32)})


def test_a_closed_session_is_refused() -> None:
    session = session_on_a_stand_in()
    session.close()
    with pytest.raises(MeasureFailed, match="the session is closed"):
        session.run({"input": np.ones((1, 3), np.float32)})


def test_a_lap_before_binding_is_refused() -> None:
    with pytest.raises(MeasureFailed, match=r"no inputs are bound\. Call bind first"):
        session_on_a_stand_in().lap()


def profiled_on_a_stand_in() -> target_trt.ProfiledTrtSession:
    profiled = session_on_a_stand_in().profiled()
    profiled.bind({"input": np.ones((1, 3), np.float32)})
    for _ in range(3):
        profiled.lap()
    return profiled


def test_a_profiled_session_tells_each_layer_with_its_times_in_the_latest_laps() -> None:
    layers = profiled_on_a_stand_in().node_laps(2)
    assert [(layer.name, layer.laps_ms) for layer in layers] == [
        ("conv + relu", [0.5, 0.75]),
        ("Reformatting CopyNode for Input Tensor 0 to head", [0.25, 0.375]),
        ("head", [1.0, 1.5]),
    ]


def test_a_layer_knows_the_onnx_nodes_it_was_made_of_and_a_reformat_has_none() -> None:
    layers = profiled_on_a_stand_in().node_laps(1)
    assert [(layer.operator, layer.origin) for layer in layers] == [
        ("CaskConvolution", "node_conv + node_relu"),
        ("reformat", ""),
        ("gemm", "node_linear"),
    ]


@pytest.mark.parametrize("layers", [["conv + relu", "x", "head"], [{}, {}, {}]], ids=["names only", "nothing"])
def test_without_notes_on_its_origin_a_layer_goes_by_its_name(layers: list[Any]) -> None:
    profiled = profiled_on_a_stand_in()
    profiled._engine.layers = layers
    told = [(layer.operator, layer.origin) for layer in profiled.node_laps(1)]
    assert told == [("layer", "conv + relu"), ("reformat", ""), ("layer", "head")]


def test_a_profiled_session_leaves_the_measured_one_as_it_is() -> None:
    session = session_on_a_stand_in()
    session.bind({"input": np.ones((1, 3), np.float32)})
    profiled = session.profiled()
    assert profiled._context is not session._context
    assert session._context.profiler is None
    profiled.close()
    session.lap()
    assert np.array_equal(session.outputs()["output"], [[2, 2, 2]])


def test_a_profiler_that_was_told_nothing_is_one_sentence() -> None:
    profiled = profiled_on_a_stand_in()
    profiled._context.times = {}
    profiled.lap()
    with pytest.raises(MeasureFailed, match=r"tensorrt 10\.3 told the layers' times of 1 laps instead of 2\. Use"):
        profiled.node_laps(2)


@needs_rtx
def test_the_real_bindings_take_our_profiler() -> None:
    trt = importlib.import_module("tensorrt_rtx")
    timer = target_trt.layer_timer(trt)
    assert isinstance(timer, trt.IProfiler)
    timer.laps.append({})
    timer.report_layer_time("layer", 0.5)
    timer.report_layer_time("layer", 0.25)
    assert timer.laps == [{"layer": 0.75}]


def test_an_execution_that_the_runtime_refuses_is_told_with_its_log() -> None:
    session = session_on_a_stand_in()
    session.bind({"input": np.ones((1, 3), np.float32)})
    session._context.broken = True
    session._log.log(LoggerStandIn.Severity.ERROR, "Error Code 3:\n  API usage.")
    with pytest.raises(MeasureFailed, match=r"tensorrt cannot run it: Error Code 3: API usage\.$"):
        session.lap()


def test_the_logger_keeps_errors_and_warnings_apart_and_each_once() -> None:
    log = target_trt.collecting_logger(SimpleNamespace(ILogger=LoggerStandIn))
    assert log.text() == "it logged no error"
    for severity, message in [(1, "bad."), (2, "odd"), (3, "fine"), (1, "bad."), (0, "worse"), (2, "odd")]:
        log.log(severity, message)
    assert log.text() == "bad; worse"
    assert log.warnings() == ["odd"]
