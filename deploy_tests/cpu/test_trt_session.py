"""A TensorRT session on a stand-in for the absent GPU: memory, streams, events, graphs and profiles, call by call."""

import contextlib
import ctypes
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from chip_deploy.export import trt_session
from chip_deploy.export.errors import BuildFailed, MeasureFailed
from chip_deploy.export.golden import run_in_batches
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.target import CUDA_GRAPH, CudaGraphs, DeviceTimer
from chip_deploy.export.target_trt import Gpu, find_gpu, load_cudart
from chip_deploy.export.trt_caches import CacheFile
from chip_deploy.export.trt_log import Log, layer_timer
from chip_deploy.export.trt_session import (
    ProfiledTrtSession,
    SessionOptions,
    TrtSession,
    engine_information,
)

NO_RTX = importlib.util.find_spec("tensorrt_rtx") is None
needs_rtx = pytest.mark.skipif(NO_RTX, reason="tensorrt-rtx is not installed (it has wheels for x86-64 only)")
needs_no_gpu = pytest.mark.skipif(
    isinstance(find_gpu(), Gpu), reason="this machine has a GPU; this is about having none"
)


class DeviceStandIn:
    """CUDA's runtime calls on host memory; copies and executions wait until their stream is synchronised."""

    STREAM = 7
    cudaStreamNonBlocking = 1
    cudaError_t = SimpleNamespace(cudaSuccess=0, cudaErrorStreamCaptureUnsupported=900)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    # What work takes on this device, in ms; a graph spares its launches.
    COPY_MS = 0.25
    EXECUTION_MS = 2.0
    GRAPH_MS = 1.5

    def __init__(self, *, memory: int = 1 << 20) -> None:
        self.free = memory
        self.now_ms = 0.0
        self.pinned: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.events: dict[int, float | None] = {}
        self.held: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.waiting: list[Callable[[], object]] = []
        self.recording: list[Callable[[], object]] | None = None
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self.made = 0
        self.streams: set[int] = set()
        self.lent_from = 0
        self.elsewhere_recorded = 0

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        texts = {
            2: b"out of memory",
            900: b"operation not permitted when stream is capturing",
            901: b"operation failed due to a previous error during capture",
        }
        return 0, texts[error]

    def cudaGetLastError(self) -> tuple[int]:
        return (0,)

    def cudaGetDevice(self) -> tuple[int, int]:
        return 0, 0

    def cudaDeviceSynchronize(self) -> tuple[int]:
        if self.elsewhere_recorded > 0:
            self.elsewhere_recorded -= 1
            return (900,)
        return self.cudaStreamSynchronize(self.STREAM)

    def cudaPointerGetAttributes(self, address: int) -> tuple[int, SimpleNamespace]:
        return 0, SimpleNamespace(device=self.lent_from)

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
        assert stream in self.streams
        if kind != self.cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            device = to if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice else origin
            assert size <= len(self.held[device]), "copy outside of device memory"
        self.enqueue(lambda: self._copy(to, origin, size))
        return (0,)

    def enqueue(self, work: Callable[[], object]) -> None:
        (self.waiting if self.recording is None else self.recording).append(work)

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
        assert self.recording is None, "a recording does not allow to wait"
        for work in self.waiting:
            work()
        self.waiting.clear()
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        assert (stream in self.streams, mode) == (True, 1)
        self.recording = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int | None]:
        recorded, self.recording = self.recording, None
        if not recorded:
            return 901, None
        self.made += 1
        self.graphs[self.made] = recorded
        return 0, self.made

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        assert flags == 0
        self.graphs[-graph] = self.graphs[graph]
        return 0, -graph

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        del self.graphs[graph]
        return (0,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[int]:
        del self.graphs[graph]
        return (0,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        assert stream in self.streams
        self.waiting += self.graphs[graph]
        self.waiting.append(lambda: setattr(self, "now_ms", self.now_ms - self.EXECUTION_MS + self.GRAPH_MS))
        return (0,)


class ContextStandIn:
    """An execution context whose network doubles its input, of 3 values an image and at most 4 images a profile."""

    def __init__(self, device: DeviceStandIn) -> None:
        self.device = device
        self.batch = -1
        self.addresses: dict[str, int] = {}
        self.executions = 0
        self.switched: list[int] = []
        self.broken = False
        self.recordable = True
        self.profiler: Any = None
        self.times = {"conv + relu": 0.25, "Reformatting CopyNode for Input Tensor 0 to head": 0.125, "head": 0.5}

    def set_optimization_profile_async(self, place: int, stream: int) -> bool:
        assert stream in self.device.streams
        self.switched.append(place)
        self.addresses = {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "input"
        assert self.device.recording is None
        self.batch = shape[0]
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.batch, 3)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream in self.device.streams, "the default stream synchronises more than it has to"
        if self.device.recording is not None and not self.recordable:
            return False
        addresses = dict(self.addresses)
        self.device.enqueue(lambda: self._double(addresses))
        for layer, ms in self.times.items() if self.profiler else ():
            self.profiler.report_layer_time(layer, ms * (self.executions + 1))
        return not self.broken

    def _double(self, addresses: dict[str, int]) -> None:
        self.executions += 1
        self.device.now_ms += self.device.EXECUTION_MS
        size = 3 * self.batch * 4
        read, written = ((ctypes.c_char * size).from_address(addresses[name]) for name in ("input", "output"))
        np.frombuffer(written, np.float32)[:] = 2 * np.frombuffer(read, np.float32)


class EngineStandIn:
    """A deserialised engine with one input and one output, both of a free batch."""

    num_io_tensors = 2
    num_layers = 3

    def __init__(self, context: ContextStandIn, profiles: list[tuple[int, int, int]]) -> None:
        self.context = context
        self.contexts = 0
        self.profiles = profiles
        self.num_optimization_profiles = len(profiles)
        self.layers = [
            {
                "Name": "conv + relu",
                "LayerType": "CaskConvolution",
                "Metadata": "[ONNX Layer: node_conv]\x1f[ONNX Layer: node_relu]",
            },
            {"Name": "Reformatting CopyNode for Input Tensor 0 to head", "LayerType": "Reformat", "Metadata": ""},
            {"Name": "head", "LayerType": "gemm", "Metadata": "[ONNX Layer: node_linear]"},
        ]

    def create_execution_context(self, *config: Any) -> ContextStandIn:
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
        return [(size, 3) for size in self.profiles[profile]]


class CompilingEngineStandIn(EngineStandIn):
    """An engine of TensorRT-RTX, which compiles its kernels when it runs and can keep them."""

    def create_runtime_config(self) -> SimpleNamespace:
        self.config = RuntimeConfigStandIn()
        return self.config

    def create_execution_context(self, *config: Any) -> ContextStandIn:
        assert config == (self.config,)
        return super().create_execution_context()


class RuntimeCacheStandIn:
    """Compiled kernels, of one machine: what another one wrote is refused."""

    def __init__(self) -> None:
        self.kernels = b""

    def deserialize(self, blob: bytes) -> bool:
        if blob.startswith(b"this machine"):
            self.kernels = blob
        return bool(self.kernels)

    def serialize(self) -> bytes:
        return self.kernels or b"this machine's kernels"


class RuntimeConfigStandIn(SimpleNamespace):
    """Settings of an execution context."""

    dynamic_shapes_kernel_specialization_strategy = "LAZY"

    def create_runtime_cache(self) -> RuntimeCacheStandIn:
        return RuntimeCacheStandIn()

    def set_runtime_cache(self, cache: RuntimeCacheStandIn) -> bool:
        self.cache = cache
        return True


class InspectorStandIn:
    """What tells about an engine's layers, in JSON that holds bare control characters."""

    execution_context: Any = None

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def get_layer_information(self, index: int, kind: str) -> str:
        assert kind == "JSON"
        return json.dumps(self.layers[index]).replace("\\u001f", "\x1f")

    def get_engine_information(self, kind: str) -> str:
        assert kind == "JSON"
        assert self.execution_context.batch == 1, "shapes are free until they are set"
        return json.dumps({"Layers": self.layers}).replace("\\u001f", "\x1f")


class ProfilerStandIn:
    """What a profiler inherits from."""


class LoggerStandIn:
    """What a logger inherits from."""

    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)


class RuntimeStandIn:
    """What opens plans: any that holds something."""

    def __init__(self, engine: EngineStandIn) -> None:
        self.engine = engine
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> EngineStandIn | None:
        return self.engine if plan else None


class RefitterStandIn:
    """What fills in weights: of any file but one that is named `other.onnx`."""

    def __init__(self, *_engine_and_log: Any) -> None:
        self.refitted = False

    def refit_from_file(self, path: str) -> bool:
        return not path.endswith("other.onnx")

    def refit_cuda_engine(self) -> bool:
        return True


def tensorrt(engine: EngineStandIn) -> SimpleNamespace:
    """A module `tensorrt` that has this engine alone."""
    runtimes: list[RuntimeStandIn] = []

    def make_runtime(log: Any) -> RuntimeStandIn:
        runtimes.append(RuntimeStandIn(engine))
        return runtimes[-1]

    return SimpleNamespace(
        __name__="tensorrt",
        __version__="10.3",
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="EAGER"),
        ILogger=LoggerStandIn,
        IProfiler=ProfilerStandIn,
        LayerInformationFormat=SimpleNamespace(JSON="JSON"),
        OnnxParserRefitter=RefitterStandIn,
        Refitter=RefitterStandIn,
        Runtime=make_runtime,
        runtimes=runtimes,
        TensorIOMode=SimpleNamespace(INPUT="INPUT"),
        nptype=lambda dtype: {"FLOAT": np.float32}[dtype],
    )


def session_on_a_stand_in(
    device: DeviceStandIn | None = None,
    *,
    options: SessionOptions | None = None,
    profiles: list[tuple[int, int, int]] | None = None,
    kind: type[EngineStandIn] = EngineStandIn,
) -> TrtSession:
    device = device or DeviceStandIn()
    engine = kind(ContextStandIn(device), profiles or [(1, 1, 4)])
    return TrtSession(tensorrt(engine), device, b"plan", name="x.engine", options=options)


class OnDevice:
    """An array that says that it lies on a CUDA device, as torch's and CuPy's do."""

    def __init__(self, values: np.ndarray, *, offset: int = 0) -> None:
        self.memory = ctypes.create_string_buffer(values.nbytes + 512)
        start = -(-ctypes.addressof(self.memory) // 256) * 256 + offset
        self.values = np.frombuffer((ctypes.c_char * values.nbytes).from_address(start), values.dtype)
        self.values = self.values.reshape(values.shape)
        self.values[:] = values
        self.__cuda_array_interface__ = {
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (start, False),
            "strides": None,
            "version": 2,
        }


# The bindings and the stand-ins -------------------------------------------------------------------------------------


@needs_rtx
def test_the_stand_ins_have_no_name_that_the_real_bindings_lack() -> None:
    trt = importlib.import_module("tensorrt_rtx")
    pairs = [
        (EngineStandIn, trt.ICudaEngine),
        (CompilingEngineStandIn, trt.ICudaEngine),
        (ContextStandIn, trt.IExecutionContext),
        (InspectorStandIn, trt.EngineInspector),
        (RuntimeStandIn, trt.Runtime),
        (RuntimeCacheStandIn, trt.IRuntimeCache),
        (RuntimeConfigStandIn, trt.IRuntimeConfig),
        (DeviceStandIn, load_cudart()),
    ]
    for stand_in, real in pairs:
        names = [name for name in vars(stand_in) if not name.startswith("_") and not name.isupper()]
        assert [name for name in names if name != "enqueue" and not hasattr(real, name)] == []


@needs_rtx
@needs_no_gpu
def test_an_error_of_the_real_cuda_runtime_is_one_sentence() -> None:
    session = session_on_a_stand_in()
    session._cudart = load_cudart()
    with pytest.raises(MeasureFailed, match=r"x\.engine: cudaMalloc failed: .+\. Look at the driver") as caught:
        session._cuda("cudaMalloc", 16)
    assert "\n" not in str(caught.value)


def test_a_session_offers_a_clock_of_its_device_and_laps_without_its_graph() -> None:
    session = session_on_a_stand_in()
    assert isinstance(session, DeviceTimer)
    assert isinstance(session, CudaGraphs)


# Memory and executions ----------------------------------------------------------------------------------------------


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
    for batch in (1, 4, 2, 2, 2, 1):
        images = np.full((batch, 3), batch, np.float32)
        assert np.array_equal(session.run({"input": images})["output"], 2 * images)


def test_each_lap_is_one_execution_that_is_done_when_it_returns() -> None:
    session = session_on_a_stand_in()
    session.bind({"input": np.ones((1, 3), np.float32)})
    for lap in range(1, 5):
        session.lap()
        assert session._context.executions == lap


def test_a_timed_lap_takes_what_the_device_says_between_two_events() -> None:
    session = session_on_a_stand_in()
    session.bind({"input": np.ones((1, 3), np.float32)})
    assert session.timed_lap_ms() == DeviceStandIn.EXECUTION_MS
    assert session._context.executions == 1


def test_a_round_trip_tells_the_execution_from_the_copies_around_it() -> None:
    session = session_on_a_stand_in(options=SessionOptions(cuda_graph=False))
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


def test_closing_gives_back_events_graphs_and_pinned_memory_too() -> None:
    device = DeviceStandIn()
    session = session_on_a_stand_in(device)
    session.bind({"input": np.ones((1, 3), np.float32)})
    session.round_trip()
    session.lap()
    assert device.events
    assert device.pinned
    assert device.graphs
    session.close()
    assert (device.events, device.pinned, device.held, device.graphs) == ({}, {}, {}, {})


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


def test_a_release_that_fails_stops_no_other_and_leaves_the_laps_error_to_be_seen() -> None:
    device = DeviceStandIn()
    session = session_on_a_stand_in(device)
    session.bind({"input": np.ones((1, 3), np.float32)})
    for _ in range(2):
        session.round_trip()
    device.cudaFree = lambda address: (2,)  # pyright: ignore[reportAttributeAccessIssue]
    device.cudaGraphExecDestroy = lambda graph: (2,)  # pyright: ignore[reportAttributeAccessIssue]
    session._context.broken = True
    with pytest.raises(MeasureFailed, match="cannot run it"), contextlib.closing(session):
        session.plain_lap_ms()
    assert (device.events, device.pinned, device.streams) == ({}, {}, set())
    assert session._engine is None


def test_a_tensor_of_a_type_that_numpy_does_not_have_leaves_no_stream_behind() -> None:
    device = DeviceStandIn()
    trt = tensorrt(EngineStandIn(ContextStandIn(device), [(1, 1, 4)]))

    def no_such_type(dtype: str) -> Any:
        raise TypeError(f"Could not resolve TensorRT datatype {dtype}")

    trt.nptype = no_such_type
    with pytest.raises(BuildFailed, match=r"x\.engine: tensor 'input' has type FLOAT, which numpy does not have"):
        TrtSession(trt, device, b"plan", name="x.engine")
    assert device.streams == set()


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


def test_an_execution_that_the_runtime_refuses_is_told_with_its_log() -> None:
    session = session_on_a_stand_in()
    session.bind({"input": np.ones((1, 3), np.float32)})
    session._context.broken = True
    session._log.logger.log(LoggerStandIn.Severity.ERROR, "Error Code 3:\n  API usage.")
    with pytest.raises(MeasureFailed, match=r"tensorrt cannot run it: Error Code 3: API usage\.$"):
        session.lap()


def test_two_sessions_run_on_streams_of_their_own() -> None:
    device = DeviceStandIn()
    first, second = session_on_a_stand_in(device), session_on_a_stand_in(device)
    assert first._stream != second._stream
    first.bind({"input": np.full((1, 3), 1, np.float32)})
    second.bind({"input": np.full((2, 3), 5, np.float32)})
    for _ in range(3):
        first.lap()
        second.lap()
    assert np.array_equal(first.outputs()["output"], np.full((1, 3), 2))
    assert np.array_equal(second.outputs()["output"], np.full((2, 3), 10))


def test_a_session_that_cannot_be_opened_leaves_no_stream_behind() -> None:
    device = DeviceStandIn()
    engine = EngineStandIn(ContextStandIn(device), [(1, 1, 4)])
    engine.create_execution_context = lambda *_config: None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(BuildFailed, match=r"x\.engine: tensorrt 10\.3 cannot make an execution context"):
        TrtSession(tensorrt(engine), device, b"plan", name="x.engine")
    assert device.streams == set()


# Optimization profiles ----------------------------------------------------------------------------------------------


def test_a_batch_outside_the_profile_is_refused_with_the_profile() -> None:
    with pytest.raises(ValueError, match=r"shape \(5, 3\) given, between \(1, 3\) and \(4, 3\) expected"):
        session_on_a_stand_in().run({"input": np.ones((5, 3), np.float32)})


def test_a_batch_outside_all_profiles_is_refused_with_all_of_them() -> None:
    session = session_on_a_stand_in(profiles=[(1, 1, 2), (8, 8, 8)])
    with pytest.raises(ValueError, match=r"between \(1, 3\) and \(2, 3\) or between \(8, 3\) and \(8, 3\) expected"):
        session.run({"input": np.ones((5, 3), np.float32)})


def test_each_batch_runs_by_the_profile_that_expects_it_and_stays_there() -> None:
    session = session_on_a_stand_in(profiles=[(1, 1, 8), (1, 4, 8)])
    for batch in (1, 4, 4, 1):
        images = np.full((batch, 3), batch, np.float32)
        assert np.array_equal(session.run({"input": images})["output"], 2 * images)
    assert session._context.switched == [1, 0]


@pytest.mark.parametrize(
    ("profiles", "batch"), [([(1, 1, 4)], 4), ([(1, 1, 64)], 32), ([(1, 1, 1), (8, 8, 8)], 8), ([(64, 64, 64)], 64)]
)
def test_many_images_are_run_in_batches_that_the_engine_takes(profiles: list[tuple[int, int, int]], batch: int) -> None:
    session = session_on_a_stand_in(profiles=profiles)
    assert session.fed_batch == batch
    images = np.arange(13 * 3, dtype=np.float32).reshape(13, 3)
    assert np.array_equal(run_in_batches(session, images), 2 * images)


# CUDA graphs --------------------------------------------------------------------------------------------------------


def test_the_first_lap_runs_as_it_is_and_later_ones_are_one_launch_of_a_graph() -> None:
    session = session_on_a_stand_in()
    session.bind({"input": np.ones((1, 3), np.float32)})
    laps_ms = [session.timed_lap_ms() for _ in range(4)]
    assert laps_ms == [DeviceStandIn.EXECUTION_MS, *[DeviceStandIn.GRAPH_MS] * 3]
    assert session.launch == CUDA_GRAPH
    assert np.array_equal(session.outputs()["output"], [[2, 2, 2]])


def test_a_lap_without_the_graph_can_be_timed_beside_it() -> None:
    session = session_on_a_stand_in()
    session.bind({"input": np.ones((1, 3), np.float32)})
    session.lap()
    assert session.timed_lap_ms() == DeviceStandIn.GRAPH_MS
    assert session.plain_lap_ms() == DeviceStandIn.EXECUTION_MS
    assert session.timed_lap_ms() == DeviceStandIn.GRAPH_MS


def test_a_graph_is_kept_for_new_values_and_recorded_anew_for_another_shape() -> None:
    device = DeviceStandIn()
    session = session_on_a_stand_in(device)
    for value in (1.0, 2.0, 3.0, 4.0):
        images = np.full((2, 3), value, np.float32)
        assert np.array_equal(session.run({"input": images})["output"], 2 * images)
    assert device.made == 1
    for value in (1.0, 2.0, 3.0):
        images = np.full((4, 3), value, np.float32)
        assert np.array_equal(session.run({"input": images})["output"], 2 * images)
    assert device.made == 2
    assert list(device.graphs) == [-2]


def test_a_graph_that_is_switched_off_is_never_recorded() -> None:
    device = DeviceStandIn()
    session = session_on_a_stand_in(device, options=SessionOptions(cuda_graph=False))
    session.bind({"input": np.ones((1, 3), np.float32)})
    assert [session.timed_lap_ms() for _ in range(3)] == [DeviceStandIn.EXECUTION_MS] * 3
    assert (device.made, session.launch) == (0, "kernel by kernel: the CUDA graph is switched off")


def test_a_network_that_cannot_be_recorded_runs_without_and_says_why() -> None:
    device = DeviceStandIn()
    session = session_on_a_stand_in(device)
    session._context.recordable = False
    session.bind({"input": np.ones((1, 3), np.float32)})
    for _ in range(3):
        session.lap()
    assert session._context.executions == 3
    assert session.launch.startswith("kernel by kernel: cudaStreamEndCapture failed: operation failed due to")
    assert (device.graphs, device.recording) == ({}, None)


def test_a_stream_of_which_no_recording_can_begin_runs_without_and_says_why() -> None:
    device = DeviceStandIn()
    session = session_on_a_stand_in(device)
    device.cudaStreamBeginCapture = lambda stream, mode: (900,)  # pyright: ignore[reportAttributeAccessIssue]
    session.bind({"input": np.ones((1, 3), np.float32)})
    for _ in range(3):
        session.lap()
    assert session._context.executions == 3
    assert session.launch == (
        "kernel by kernel: cudaStreamBeginCapture failed: operation not permitted when stream is capturing"
    )


def test_an_engine_that_says_itself_that_it_cannot_be_recorded_is_believed() -> None:
    session = session_on_a_stand_in()
    session._context.is_stream_capturable = lambda stream: False
    session.bind({"input": np.ones((1, 3), np.float32)})
    for _ in range(2):
        session.lap()
    assert session.launch == "kernel by kernel: tensorrt 10.3 says that it cannot be recorded"


# Arrays on the device -----------------------------------------------------------------------------------------------


def test_an_array_on_the_device_is_read_where_it_lies() -> None:
    device = DeviceStandIn()
    session = session_on_a_stand_in(device)
    array = OnDevice(np.ones((1, 3), np.float32))
    session.bind({"input": array})
    array.values[:] = 7
    session.lap()
    assert np.array_equal(session.outputs()["output"], [[14, 14, 14]])
    assert len(device.held) == 1, "only the output has memory of the session's own"


def test_a_graph_is_recorded_anew_for_an_array_of_the_same_shape_elsewhere() -> None:
    device = DeviceStandIn()
    session = session_on_a_stand_in(device)
    first, second = (OnDevice(np.full((1, 3), value, np.float32)) for value in (1, 5))
    session.bind({"input": first})
    for _ in range(3):
        session.lap()
    assert np.array_equal(session.outputs()["output"], [[2, 2, 2]])
    session.bind({"input": second})
    for _ in range(2):
        session.lap()
    assert np.array_equal(session.outputs()["output"], [[10, 10, 10]])
    assert (session.launch, device.made) == (CUDA_GRAPH, 2)


def test_an_array_on_the_device_is_taken_once_another_thread_has_recorded_its_graph() -> None:
    device = DeviceStandIn()
    session = session_on_a_stand_in(device)
    device.elsewhere_recorded = 2
    outputs = session.run({"input": OnDevice(np.ones((1, 3), np.float32))})
    assert np.array_equal(outputs["output"], [[2, 2, 2]])


def test_a_recording_that_never_ends_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_session, "RECORDING_WAIT_SECONDS", 0.0)
    device = DeviceStandIn()
    session = session_on_a_stand_in(device)
    device.elsewhere_recorded = 10_000
    with pytest.raises(MeasureFailed, match="cudaDeviceSynchronize failed: operation not permitted when stream is cap"):
        session.bind({"input": OnDevice(np.ones((1, 3), np.float32))})


def test_an_array_on_the_device_at_an_odd_address_is_copied_there() -> None:
    session = session_on_a_stand_in()
    array = OnDevice(np.ones((1, 3), np.float32), offset=4)
    session.bind({"input": array})
    array.values[:] = 7
    session.lap()
    assert np.array_equal(session.outputs()["output"], [[2, 2, 2]])


def test_an_array_of_the_host_after_one_of_the_device_leaves_that_one_alone() -> None:
    session = session_on_a_stand_in()
    array = OnDevice(np.ones((1, 3), np.float32))
    for _ in range(3):
        assert np.array_equal(session.run({"input": array})["output"], [[2, 2, 2]])
        assert np.array_equal(session.run({"input": np.full((1, 3), 4, np.float32)})["output"], [[8, 8, 8]])
    assert np.array_equal(array.values, [[1, 1, 1]])


def test_an_array_of_another_device_is_refused() -> None:
    device = DeviceStandIn()
    device.lent_from = 1
    with pytest.raises(ValueError, match=r"input 'input': lies on CUDA device 1, and the engine runs on device 0\."):
        session_on_a_stand_in(device).bind({"input": OnDevice(np.ones((1, 3), np.float32))})


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("input", np.ones((1, 3)), "dtype float64 given, float32 expected"),
        ("input", np.ones((1, 4), np.float32), r"shape \(1, 4\) given, \(any, 3\) expected"),
        ("image", np.ones((1, 3), np.float32), r"inputs \['image'\] given, \['input'\] expected"),
    ],
)
def test_an_array_on_the_device_that_does_not_fit_is_refused(name: str, values: np.ndarray, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        session_on_a_stand_in().bind({name: OnDevice(values)})


def test_a_round_trip_of_what_lies_on_the_device_is_refused() -> None:
    session = session_on_a_stand_in()
    session.bind({"input": OnDevice(np.ones((1, 3), np.float32))})
    with pytest.raises(MeasureFailed, match=r"\['input'\] lie on the device; bind arrays of the host"):
        session.round_trip()


def test_shapes_that_tensorrt_cannot_infer_are_one_sentence() -> None:
    session = session_on_a_stand_in()

    def fail() -> list[str]:
        session._log.logger.log(LoggerStandIn.Severity.ERROR, "Error Code 4: no such reshape")
        raise RuntimeError("Failed to infer shapes")

    session._context.infer_shapes = fail
    with pytest.raises(
        MeasureFailed, match=r"tensorrt 10\.3 cannot infer its shapes: Error Code 4: no such reshape\.$"
    ):
        session.bind({"input": np.ones((1, 3), np.float32)})


# Opening engines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [True, False])
def test_host_code_runs_only_where_it_was_asked_for(allowed: bool) -> None:
    session = session_on_a_stand_in(options=SessionOptions(host_code=allowed))
    assert session._runtime.engine_host_code_allowed is allowed


def test_a_plan_that_tensorrt_does_not_read_is_told_with_its_log() -> None:
    device = DeviceStandIn()
    trt = tensorrt(EngineStandIn(ContextStandIn(device), [(1, 1, 4)]))
    with pytest.raises(BuildFailed, match=r"x\.engine: tensorrt 10\.3 cannot read the engine: it logged no error"):
        TrtSession(trt, device, b"", name="x.engine")


def test_an_engine_without_weights_takes_them_from_its_onnx_file() -> None:
    session = session_on_a_stand_in(options=SessionOptions(weights=Path("model.onnx")))
    assert np.array_equal(session.run({"input": np.ones((1, 3), np.float32)})["output"], [[2, 2, 2]])
    with pytest.raises(BuildFailed, match=r"tensorrt 10\.3 cannot fill in the weights of other\.onnx"):
        session_on_a_stand_in(options=SessionOptions(weights=Path("other.onnx")))


def test_what_was_compiled_is_kept_when_the_session_ends_and_read_by_the_next(tmp_path: Path) -> None:
    options = SessionOptions(cache=CacheFile(tmp_path / "x.runtime", {"sm": "sm89"}))
    for known in (None, b"this machine's kernels"):
        session = session_on_a_stand_in(options=options, kind=CompilingEngineStandIn)
        assert session._cached == known
        assert session._engine.config.cache is session._cache
        session.run({"input": np.ones((1, 3), np.float32)})
        session.close()
        assert (tmp_path / "x.runtime").read_bytes() == b"this machine's kernels"


def test_kernels_that_another_driver_compiled_are_refused_and_written_anew(tmp_path: Path) -> None:
    cache = CacheFile(tmp_path / "x.runtime", {"sm": "sm89"})
    assert cache.write(b"another driver's kernels") is None
    session = session_on_a_stand_in(options=SessionOptions(cache=cache), kind=CompilingEngineStandIn)
    assert session._cached is None
    session.run({"input": np.ones((1, 3), np.float32)})
    session.close()
    assert cache.read() == b"this machine's kernels"


def test_a_cache_that_cannot_be_serialised_is_not_kept_and_the_session_is_closed_all_the_same(tmp_path: Path) -> None:
    device = DeviceStandIn()
    options = SessionOptions(cache=CacheFile(tmp_path / "x.runtime", {"sm": "sm89"}))
    session = session_on_a_stand_in(device, options=options, kind=CompilingEngineStandIn)
    session.run({"input": np.ones((1, 3), np.float32)})
    session._cache.serialize = lambda: None
    session.close()
    assert (list(tmp_path.iterdir()), device.held, device.streams) == ([], {}, set())


def test_a_session_that_never_ran_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    options = SessionOptions(cache=CacheFile(tmp_path / "x.runtime", {"sm": "sm89"}))
    session_on_a_stand_in(options=options, kind=CompilingEngineStandIn).close()
    assert list(tmp_path.iterdir()) == []


def test_shapes_are_compiled_at_once_and_not_while_laps_are_timed() -> None:
    session = session_on_a_stand_in(kind=CompilingEngineStandIn)
    assert session._engine.config.dynamic_shapes_kernel_specialization_strategy == "EAGER"


def test_the_inspector_is_asked_with_the_shapes_that_were_expected() -> None:
    engine = EngineStandIn(ContextStandIn(DeviceStandIn()), [(1, 1, 4)])
    told = json.loads(engine_information(tensorrt(engine), b"plan", name="x.engine"), strict=False)
    assert [layer["Name"] for layer in told["Layers"]][::2] == ["conv + relu", "head"]


# Layer times --------------------------------------------------------------------------------------------------------


def profiled_on_a_stand_in() -> ProfiledTrtSession:
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


def test_a_profiled_session_records_no_graph_because_a_graph_tells_no_layer_times() -> None:
    profiled = profiled_on_a_stand_in()
    assert profiled._cudart.made == 0
    assert profiled.launch.startswith("kernel by kernel")


def test_a_layer_knows_the_onnx_nodes_it_was_made_of_and_a_reformat_has_none() -> None:
    layers = profiled_on_a_stand_in().node_laps(1)
    assert [(layer.operator, layer.origin) for layer in layers] == [
        ("CaskConvolution", "node_conv + node_relu"),
        ("reformat", ""),
        ("gemm", "node_linear"),
    ]


def test_a_concatenation_that_tensorrt_makes_by_a_copy_belongs_to_the_network() -> None:
    profiled = profiled_on_a_stand_in()
    profiled._engine.layers[2] |= {"LayerType": "Reformat", "Origin": "CONCAT", "Metadata": "[ONNX Layer: node_cat]"}
    told = [(layer.operator, layer.origin) for layer in profiled.node_laps(1)]
    assert told[1:] == [("reformat", ""), ("Reformat", "node_cat")]


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


def test_what_tensorrt_tells_its_first_logger_is_read_by_every_session_from_its_own_beginning() -> None:
    # It writes to the logger of the session that came first, whichever lap fails.
    session = session_on_a_stand_in()
    session._log.logger.log(LoggerStandIn.Severity.ERROR, "of the past")
    profiled = session.profiled()
    profiled.bind({"input": np.ones((1, 3), np.float32)})
    profiled._context.broken = True
    session._log.logger.log(LoggerStandIn.Severity.ERROR, "of now")
    with pytest.raises(MeasureFailed, match=r"tensorrt cannot run it: of now\.$"):
        profiled.lap()
    assert session._log.text() == "of the past; of now"


OWN_LOGGER = """
import gc, sys
import tensorrt_rtx as trt
from pathlib import Path
from chip_deploy.export.target import BuildOptions
from chip_deploy.export.trt_build import build_plan
from chip_deploy.export.trt_log import Log
{before}
print(build_plan(trt, Path(sys.argv[1]), BuildOptions(), capabilities=("sm89",)).flags["warnings"])
{after}
"""


@needs_rtx
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "first = Log(trt); runtime = trt.Runtime(first.logger); del first, runtime; gc.collect()",
            "trt.get_plugin_registry().load_library('/no/such/library.so')",  # which it tells the logger
        ),
        ("runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))", ""),
    ],
    ids=["whoever came first is gone", "the program has a logger of its own"],
)
def test_the_logger_that_tensorrt_keeps_is_there_for_good_and_no_engine_is_warned_of_it(
    before: str, after: str, tmp_path: Path
) -> None:
    export_onnx(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8), tmp_path / "model.onnx")
    code = OWN_LOGGER.format(before=before, after=after)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.onnx")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["[]"]), done.stderr


def test_a_profiler_that_was_told_nothing_is_one_sentence() -> None:
    profiled = profiled_on_a_stand_in()
    profiled._context.times = {}
    profiled.lap()
    with pytest.raises(MeasureFailed, match=r"tensorrt 10\.3 told the layers' times of 1 laps instead of 2\. Use"):
        profiled.node_laps(2)


@needs_rtx
def test_the_real_bindings_take_our_profiler() -> None:
    trt = importlib.import_module("tensorrt_rtx")
    timer = layer_timer(trt)
    assert isinstance(timer, trt.IProfiler)
    timer.laps.append({})
    timer.report_layer_time("layer", 0.5)
    timer.report_layer_time("layer", 0.25)
    assert timer.laps == [{"layer": 0.75}]


def test_the_logger_keeps_errors_and_warnings_apart_and_each_once() -> None:
    log = Log(SimpleNamespace(ILogger=LoggerStandIn))
    assert log.text() == "it logged no error"
    for severity, message in [(1, "bad."), (2, "odd"), (3, "fine"), (1, "bad."), (0, "worse"), (2, "odd")]:
        log.logger.log(severity, message)
    assert log.text() == "bad; worse"
    assert log.warnings() == ["odd"]
