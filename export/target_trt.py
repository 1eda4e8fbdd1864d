"""Targets `trt` and `trt-rtx`: NVIDIA's TensorRT, for the GPU at hand or ahead of time without one.

One code path serves TensorRT 10 and 11 and TensorRT-RTX: where they differ, the API is asked what it has. Precision
is read from the ONNX graph (a strongly typed network). An engine is executable content: it is opened only after its
digest has been compared with its sidecar.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import BuildFailed, MeasureFailed, TargetUnavailable
from .target import (
    CAPABILITIES,
    Build,
    Engine,
    NodeLaps,
    RoundTrip,
    Session,
    Target,
    TensorType,
    checked_feeds,
)

# Smallest, expected and largest batch of an engine whose ONNX file leaves the batch free.
DYNAMIC_BATCH = (1, 1, 32)
# What TensorRT-RTX documents for an engine that names no compute capability: 8.0, 8.6, 8.9, 12.0 and later.
PORTABLE = ("sm80", "sm86", "sm89")
PORTABLE_FROM = 120
# cuda-python's module of runtime calls: its name, and the one it had before 12.6.
CUDA_RUNTIME_NAMES = ("cuda.bindings.runtime", "cuda.cudart")
CU_COMPUTE_CAPABILITY_MAJOR = 75
CU_COMPUTE_CAPABILITY_MINOR = 76
# Kinds of layers that TensorRT adds to bring data into another layout; their names hold those of their neighbours.
REFORMATTING = ("Reformat", "NoOp")


class Gpu(NamedTuple):
    """The first CUDA device: its name and its compute capability, written `sm89`."""

    name: str
    sm: str


class TensorRTTarget(Target):
    """TensorRT (`trt`: builds on the GPU at hand) or TensorRT-RTX (`trt-rtx:sm86,...`: builds without any GPU)."""

    def unusable(self) -> str | None:
        """Why nothing can be built here; None when it can. Looks for files and a driver, and builds nothing."""
        if self._ahead_of_time:
            if not _installed(self._package):
                return "tensorrt-rtx is not installed. Install chip-deploy[trt-rtx] (x86-64, Linux or Windows)."
            return None
        missing = [] if _installed(self._package) else ["no tensorrt package"]
        gpu = find_gpu()
        if isinstance(gpu, str):
            missing.append(gpu)
        if not missing:
            return None
        return (
            f"{' and '.join(missing)}. Build ahead of time with --target trt-rtx:sm89, "
            "or run `chip-deploy build DIR --target trt` on the device."
        )

    def _build(self, onnx_path: Path, engine_path: Path) -> Build:
        trt = self._runtime()
        plan, flags = self._plan(trt, onnx_path)
        with engine_path.open("wb") as file:
            file.write(plan)
        return Build(
            built_for=self._built_for(),
            flags=flags,
            versions={self._package: trt.__version__},
        )

    def _cannot_run(self, engine: Engine) -> str | None:
        gpu = find_gpu()
        if isinstance(gpu, str):
            return gpu
        if not _installed(self._package):
            return f"{self._package} is not installed"
        if not any(map(_installed, CUDA_RUNTIME_NAMES)):
            return "cuda-python is not installed"
        if reason := self._other_gpu(engine, gpu):
            return reason
        built, here = engine.versions.get(self._package), self._runtime().__version__
        return None if built == here else f"it was built by {self._package} {built}, and this one is {here}"

    def _open(self, engine_path: Path) -> Session:
        return TrtSession(
            self._runtime(),
            load_cudart(),
            engine_path.read_bytes(),
            name=str(engine_path),
        )

    def _open_onnx(self, onnx_path: Path) -> Session:
        return self._onnx_opener(onnx_path)()

    def _onnx_opener(self, onnx_path: Path) -> Callable[[], Session]:
        """Sessions on one engine: two builds of one file may choose other kernels, and take their time."""
        gpu = find_gpu()
        if isinstance(gpu, str):
            raise TargetUnavailable(f"{onnx_path}: cannot run on target '{self.spec}': {gpu}. Run it on the device.")
        trt = self._runtime()
        plan, _ = self._plan(trt, onnx_path)
        return lambda: TrtSession(trt, load_cudart(), plan, name=str(onnx_path))

    @property
    def _ahead_of_time(self) -> bool:
        return bool(CAPABILITIES[self.spec.name])

    @property
    def _package(self) -> str:
        return "tensorrt_rtx" if self._ahead_of_time else "tensorrt"

    def _runtime(self) -> Any:
        """The module `tensorrt` or `tensorrt_rtx`. Raises: TargetUnavailable when its libraries do not load."""
        return _import(self._package)

    def _built_for(self) -> dict[str, str]:
        if self._ahead_of_time:
            return {"capabilities": ",".join(self.spec.capabilities) or f"{','.join(PORTABLE)},sm{PORTABLE_FROM}+"}
        gpu = find_gpu()
        assert isinstance(gpu, Gpu), "unusable() was asked before the build"
        return {"gpu": gpu.name, "capabilities": gpu.sm}

    def _other_gpu(self, engine: Engine, gpu: Gpu) -> str | None:
        """Why the engine does not fit this GPU: a standard one fits its own model, an RTX one what it names."""
        if not self._ahead_of_time:
            built = engine.built_for.get("gpu")
            return None if built == gpu.name else f"it was built for {built}, and this GPU is {gpu.name}"
        named = self.spec.capabilities
        fits = gpu.sm in named if named else gpu.sm in PORTABLE or int(gpu.sm[2:]) >= PORTABLE_FROM
        return None if fits else f"it was built for {engine.built_for.get('capabilities')}, and this GPU is {gpu.sm}"

    def _plan(self, trt: Any, onnx_path: Path) -> tuple[Any, dict[str, Any]]:
        """The serialised engine and the flags it was built with. Raises: BuildFailed with what TensorRT logged."""
        log = collecting_logger(trt)
        builder = _construct(
            trt.Builder,
            log,
            what=f"{onnx_path}: {self._package} {trt.__version__} makes no builder",
        )
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        _parse(trt, network, log, onnx_path)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        profile = _add_batch_profile(builder, network, config)
        self._set_capabilities(trt, config, onnx_path)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildFailed(f"{onnx_path}: {self._package} {trt.__version__} built no engine: {log.text()}.")
        flags = {
            "strongly_typed": True,
            "tf32": config.get_flag(trt.BuilderFlag.TF32),
            "profile": profile,
            "warnings": log.warnings(),
        }
        return plan, flags

    def _set_capabilities(self, trt: Any, config: Any, onnx_path: Path) -> None:
        """Tell the builder which GPUs the engine is for. Raises: BuildFailed when it does not know one."""
        if not self.spec.capabilities:
            return
        config.num_compute_capabilities = len(self.spec.capabilities)
        for index, name in enumerate(self.spec.capabilities):
            capability = getattr(trt.ComputeCapability, name.upper(), None)
            if capability is None or not config.set_compute_capability(capability, index):
                raise BuildFailed(f"{onnx_path}: {self._package} {trt.__version__} cannot build for {name}.")


class TrtSession:
    """A deserialised engine with its own stream; inputs and outputs stay in device memory from lap to lap."""

    def __init__(self, trt: Any, cudart: Any, plan: Any, *, name: str, opened: TrtSession | None = None) -> None:
        """A session on `plan`, or a second one on the engine that `opened` holds and must keep."""
        self._trt, self._cudart, self._name = trt, cudart, name
        self._log = collecting_logger(trt)
        self._buffers: dict[str, DeviceBuffer] = {}
        self._staging: dict[str, DeviceBuffer] = {}
        self._events: list[Any] = []
        self._bound = False
        self._runtime: Any = opened._runtime if opened else self._made_runtime()
        self._engine: Any = opened._engine if opened else self._made_engine(plan)
        self._context: Any = self._made(self._engine.create_execution_context(), what="make an execution context")
        modes = {tensor: self._engine.get_tensor_mode(tensor) for tensor in self._tensor_names()}
        self._expected = {
            tensor: self._tensor_type(tensor) for tensor in modes if modes[tensor] == trt.TensorIOMode.INPUT
        }
        self.input_names = list(self._expected)
        self.output_names = [tensor for tensor in modes if tensor not in self._expected]
        self.input_shapes = {tensor: kind.shape for tensor, kind in self._expected.items()}
        # Not the default stream: TensorRT synchronises that one more often.
        self._stream: Any = self._cuda("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The outputs for `feeds`, by name. Raises: ValueError for feeds that do not fit; MeasureFailed."""
        self.bind(feeds)
        self.lap()
        return self.outputs()

    def profiled(self) -> ProfiledTrtSession:
        """A session of its own on the same engine, whose laps are timed layer by layer. Raises: MeasureFailed."""
        if self._context is None:
            raise MeasureFailed(f"{self._name}: the session is closed. Open it again.")
        return ProfiledTrtSession(self)

    def bind(self, feeds: Mapping[str, Any]) -> None:
        """Copy `feeds` to the device and give every input and output its address there.

        Raises: ValueError for feeds that do not fit the network or the batches it was built for; MeasureFailed.
        """
        self._bound = False
        if self._context is None:
            raise MeasureFailed(f"{self._name}: the session is closed. Open it again.")
        self._free_staging()
        for name, array in checked_feeds(feeds, self._expected).items():
            if not self._context.set_input_shape(name, array.shape):
                raise ValueError(f"input '{name}': shape {array.shape} given, {self._profile_text(name)} expected.")
            self._place(name, array.nbytes)
            self._copy(
                self._buffers[name].address,
                array.ctypes.data,
                array.nbytes,
                "cudaMemcpyHostToDevice",
            )
            self._synchronise()
        if missing := self._context.infer_shapes():
            raise MeasureFailed(f"{self._name}: shapes of {missing} are unknown after binding the inputs.")
        for name in self.output_names:
            self._place(name, _bytes(self._output_type(name)))
        self._bound = True

    def lap(self) -> None:
        """One execution on the bound inputs, done when this returns. Raises: MeasureFailed."""
        self._execute()
        self._synchronise()

    def timed_lap_ms(self) -> float:
        """One execution on the bound inputs, done when this returns: its ms between two CUDA events.

        Raises: MeasureFailed.
        """
        begun, ended = self._first_events(2)
        self._record(begun)
        self._execute()
        self._record(ended)
        self._synchronise()
        return self._elapsed_ms(begun, ended)

    def round_trip(self) -> RoundTrip:
        """One execution with its inputs copied from pinned host memory before, and its outputs copied there after.

        Raises: MeasureFailed.
        """
        self._require_bound()
        arrived, executed, begun, ended = self._first_events(4)
        self._stage()
        host_ns = time.perf_counter_ns()
        self._record(begun)
        self._copy_all(self.input_names, "cudaMemcpyHostToDevice")
        self._record(arrived)
        self._execute()
        self._record(executed)
        self._copy_all(self.output_names, "cudaMemcpyDeviceToHost")
        self._record(ended)
        self._synchronise()
        host_ms = (time.perf_counter_ns() - host_ns) / 1e6
        return RoundTrip(self._elapsed_ms(arrived, executed), self._elapsed_ms(begun, ended), host_ms)

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the latest execution, by name, copied from the device."""
        outputs = {}
        for name in self.output_names:
            kind = self._output_type(name)
            outputs[name] = np.empty(kind.shape, kind.dtype)
            self._copy(
                outputs[name].ctypes.data,
                self._buffers[name].address,
                _bytes(kind),
                "cudaMemcpyDeviceToHost",
            )
        self._synchronise()
        return outputs

    def close(self) -> None:
        """Give back device memory, stream and engine, in the order TensorRT asks for."""
        self._bound = False
        for buffer in self._buffers.values():
            self._cuda("cudaFree", buffer.address)
        self._free_staging()
        for event in self._events:
            self._cuda("cudaEventDestroy", event)
        self._buffers, self._events = {}, []
        if self._stream is not None:
            self._cuda("cudaStreamDestroy", self._stream)
        self._stream = self._context = self._engine = self._runtime = None

    def _made_runtime(self) -> Any:
        return _construct(
            self._trt.Runtime,
            self._log,
            what=f"{self._name}: {self._trt.__name__} {self._trt.__version__} cannot run",
        )

    def _made_engine(self, plan: Any) -> Any:
        return self._made(self._runtime.deserialize_cuda_engine(plan), what="read the engine")

    def _tensor_names(self) -> list[str]:
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def _tensor_type(self, name: str) -> TensorType:
        shape = tuple(self._engine.get_tensor_shape(name))
        return TensorType(shape, np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name))))

    def _output_type(self, name: str) -> TensorType:
        shape = tuple(self._context.get_tensor_shape(name))
        if -1 in shape:
            raise MeasureFailed(
                f"{self._name}: the shape of output '{name}' depends on the data, which is not supported."
            )
        return self._tensor_type(name)._replace(shape=shape)

    def _profile_text(self, name: str) -> str:
        smallest, _, largest = self._engine.get_tensor_profile_shape(name, 0)
        return f"between {tuple(smallest)} and {tuple(largest)}"

    def _place(self, name: str, size: int) -> None:
        """Give tensor `name` at least `size` bytes of device memory, and tell the context where."""
        held = self._buffers.get(name)
        if held is None or held.size < size:
            if held is not None:
                self._cuda("cudaFree", self._buffers.pop(name).address)
            self._buffers[name] = DeviceBuffer(int(self._cuda("cudaMalloc", size)), size)
        self._context.set_tensor_address(name, self._buffers[name].address)

    def _stage(self) -> None:
        """Pinned host memory beside every tensor on the device; that of an input holds what is bound."""
        for name in () if self._staging else (*self.input_names, *self.output_names):
            device, size = self._buffers[name]
            self._staging[name] = DeviceBuffer(int(self._cuda("cudaMallocHost", size)), size)
            if name in self._expected:
                self._copy(self._staging[name].address, device, size, "cudaMemcpyDeviceToHost")
        self._synchronise()

    def _free_staging(self) -> None:
        for buffer in self._staging.values():
            self._cuda("cudaFreeHost", buffer.address)
        self._staging = {}

    def _copy_all(self, names: list[str], kind: str) -> None:
        """Tensors from pinned host memory to the device, or back, as many bytes as the bound batch has."""
        for name in names:
            host, device, size = self._staging[name].address, self._buffers[name].address, self._bound_bytes(name)
            to, origin = (device, host) if kind == "cudaMemcpyHostToDevice" else (host, device)
            self._copy(to, origin, size, kind)

    def _bound_bytes(self, name: str) -> int:
        return _bytes(self._tensor_type(name)._replace(shape=tuple(self._context.get_tensor_shape(name))))

    def _execute(self) -> None:
        """One execution is on its way on the session's stream. Raises: MeasureFailed."""
        self._require_bound()
        if not self._context.execute_async_v3(int(self._stream)):
            raise MeasureFailed(f"{self._name}: {self._trt.__name__} cannot run it: {self._log.text()}.")

    def _require_bound(self) -> None:
        if not self._bound:
            raise MeasureFailed(f"{self._name}: no inputs are bound. Call bind first.")

    def _first_events(self, count: int) -> list[Any]:
        """So many of the session's CUDA events, made where they are not there yet."""
        while len(self._events) < count:
            self._events.append(self._cuda("cudaEventCreate"))
        return self._events[:count]

    def _record(self, event: Any) -> None:
        self._cuda("cudaEventRecord", event, self._stream)

    def _elapsed_ms(self, begun: Any, ended: Any) -> float:
        return float(self._cuda("cudaEventElapsedTime", begun, ended))

    def _copy(self, to: int, origin: int, size: int, kind: str) -> None:
        self._cuda(
            "cudaMemcpyAsync",
            to,
            origin,
            size,
            getattr(self._cudart.cudaMemcpyKind, kind),
            self._stream,
        )

    def _synchronise(self) -> None:
        self._cuda("cudaStreamSynchronize", self._stream)

    def _cuda(self, function: str, *arguments: Any) -> Any:
        """What a CUDA runtime call returns beside its error code. Raises: MeasureFailed with the code's own text."""
        error, *results = getattr(self._cudart, function)(*arguments)
        if error != self._cudart.cudaError_t.cudaSuccess:
            text = self._cudart.cudaGetErrorString(error)[1].decode()
            raise MeasureFailed(f"{self._name}: {function} failed: {text}. Look at the driver and at free memory.")
        return results[0] if results else None

    def _made(self, thing: Any, *, what: str) -> Any:
        """`thing`, unless it is the None with which TensorRT says that it failed. Raises: BuildFailed."""
        if thing is None:
            package, version = self._trt.__name__, self._trt.__version__
            raise BuildFailed(f"{self._name}: {package} {version} cannot {what}: {self._log.text()}.")
        return thing


class ProfiledTrtSession(TrtSession):
    """A second execution context of an engine, in which TensorRT tells the time of every layer after each lap."""

    def __init__(self, session: TrtSession) -> None:
        super().__init__(session._trt, session._cudart, None, name=session._name, opened=session)
        self.runtime = f"{self._trt.__name__} {self._trt.__version__}"
        self._timer = layer_timer(self._trt)
        self._context.profiler = self._timer

    def lap(self) -> None:
        """One execution on the bound inputs, done and noted down when this returns. Raises: MeasureFailed."""
        self._timer.laps.append({})
        super().lap()

    def node_laps(self, laps: int) -> list[NodeLaps]:
        """The layers in the order they ran, with their times in the latest so many laps.

        Raises: MeasureFailed when TensorRT has told nothing of so many.
        """
        told = self._timer.laps[-laps:]
        if len(told) < laps or not all(told):
            raise MeasureFailed(
                f"{self._name}: {self._trt.__name__} {self._trt.__version__} told the layers' times of "
                f"{sum(map(bool, told))} laps instead of {laps}. Use another version."
            )
        layers = self._layer_information()
        names = dict.fromkeys(name for lap in told for name in lap)
        return [_node_laps(name, layers.get(name, {}), [lap.get(name, 0.0) for lap in told]) for name in names]

    def _layer_information(self) -> dict[str, dict[str, Any]]:
        """What TensorRT knows of each layer, by its name; empty for an engine that keeps names only."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        layers = {}
        for index in range(self._engine.num_layers):
            text = inspector.get_layer_information(index, self._trt.LayerInformationFormat.JSON)
            # TensorRT parts the names of fused nodes by control characters, which strict JSON does not have.
            with contextlib.suppress(json.JSONDecodeError):
                information = json.loads(text, strict=False)
                if isinstance(information, dict):
                    layers[information.get("Name", "")] = information
        return layers


class DeviceBuffer(NamedTuple):
    """A piece of device memory."""

    address: int
    size: int


@functools.cache
def find_gpu() -> Gpu | str:
    """The first CUDA device, asked from the driver alone; or, where there is none, the reason as a phrase."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "no CUDA driver"
    if code := driver.cuInit(0):
        return f"no CUDA device that the driver can use (cuInit gives error {code})"
    device, major, minor, name = (
        ctypes.c_int(),
        ctypes.c_int(),
        ctypes.c_int(),
        ctypes.create_string_buffer(256),
    )
    codes = [
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), CU_COMPUTE_CAPABILITY_MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), CU_COMPUTE_CAPABILITY_MINOR, device),
    ]
    if any(codes):
        return f"no CUDA device that the driver can describe (errors {codes})"
    return Gpu(name.value.decode(), f"sm{major.value}{minor.value}")


def load_cudart() -> Any:
    """The module with CUDA's runtime calls, under its new name or its old one. Raises: TargetUnavailable."""
    for name in CUDA_RUNTIME_NAMES:
        if _installed(name):
            return _import(name)
    raise TargetUnavailable(
        "cuda-python is not installed, and TensorRT engines run through it. Install chip-deploy[trt]."
    )


def collecting_logger(trt: Any) -> Any:
    """A logger for `trt` that keeps what it is told: `text()` gives the errors, `warnings()` the warnings."""
    errors = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class CollectingLogger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (*errors, trt.ILogger.Severity.WARNING):
                self.lines.append((severity, " ".join(message.split())))

        def text(self) -> str:
            found = dict.fromkeys(line.rstrip(".") for kind, line in self.lines if kind in errors)
            return "; ".join(found) or "it logged no error"

        def warnings(self) -> list[str]:
            return list(dict.fromkeys(line for kind, line in self.lines if kind not in errors))

    return CollectingLogger()


def layer_timer(trt: Any) -> Any:
    """A profiler for `trt` that keeps what it is told: `laps` holds the ms of every layer in every lap."""

    class LayerTimer(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.laps: list[dict[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.laps[-1][layer_name] = self.laps[-1].get(layer_name, 0.0) + ms

    return LayerTimer()


def _node_laps(name: str, information: dict[str, Any], laps_ms: list[float]) -> NodeLaps:
    """A layer with the ONNX nodes that TensorRT notes as its origin; without such notes its name has to tell."""
    kind = str(information.get("LayerType", ""))
    if kind in REFORMATTING or name.startswith("Reformatting CopyNode"):
        return NodeLaps(name, "reformat", "", laps_ms)
    noted = re.findall(r"\[ONNX Layer: ([^\]]+)\]", str(information.get("Metadata", "")))
    return NodeLaps(name, kind or "layer", " + ".join(noted) or name, laps_ms)


def _parse(trt: Any, network: Any, log: Any, onnx_path: Path) -> None:
    """Fill `network` from an ONNX file. Raises: BuildFailed with every error of the parser and the node it names."""
    parser = trt.OnnxParser(network, log)
    if parser.parse(onnx_path.read_bytes()):
        return
    found = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
    raise BuildFailed(
        f"{onnx_path}: {trt.__name__} {trt.__version__} cannot read it: {'; '.join(found) or log.text()}."
    )


def _parser_error(error: Any) -> str:
    node = f"node '{error.node_name()}' ({error.node_operator()}): " if error.node_name() else ""
    return node + error.desc().strip().rstrip(".")


def _add_batch_profile(builder: Any, network: Any, config: Any) -> dict[str, list[list[int]]]:
    """The smallest, expected and largest shape of each input whose batch is free, after telling `config`.

    Raises: BuildFailed for any other free axis.
    """
    shapes = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        batch, *rest = tensor.shape
        if -1 in rest:
            raise BuildFailed(f"input '{tensor.name}': shape {tuple(tensor.shape)}; only the batch may be free.")
        if batch == -1:
            shapes[tensor.name] = [[size, *rest] for size in DYNAMIC_BATCH]
    if shapes:
        profile = builder.create_optimization_profile()
        for name, (smallest, expected, largest) in shapes.items():
            profile.set_shape(name, smallest, expected, largest)
        config.add_optimization_profile(profile)
    return shapes


def _construct(kind: Any, log: Any, *, what: str) -> Any:
    """`kind(log)`. Raises: BuildFailed with the log where the bindings get a null pointer: a TypeError to them."""
    try:
        return kind(log)
    except TypeError as err:
        raise BuildFailed(f"{what}: {log.text()}.") from err


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as err:
        raise TargetUnavailable(f"the Python package '{name}' does not load ({err}). Install it again.") from err


def _bytes(kind: TensorType) -> int:
    return int(np.prod(kind.shape, dtype=np.int64)) * kind.dtype.itemsize
