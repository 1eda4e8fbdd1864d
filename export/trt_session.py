"""A TensorRT engine, running: memory and stream of its own, named inputs and outputs, CUDA graph, events, layer times.

CUDA is reached through cuda-python, so nothing here needs torch; what lies on the device already is read where it lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .device_arrays import DeviceArray, device_array
from .errors import BuildFailed, MeasureFailed
from .golden import FREE_BATCH
from .shapes import Profile, ShapeRange, profile_holding
from .target import CUDA_GRAPH, NodeLaps, RoundTrip, TensorType, checked_feeds, require_fit, require_names
from .trt_caches import CacheFile
from .trt_log import Log, construct, layer_timer, release

# Kinds of layers that TensorRT adds to bring data into another layout; their names hold those of their neighbours. The
# network's own concatenations and quantisations are of these kinds too; TensorRT notes their nodes.
REFORMATTING = ("Reformat", "NoOp")
# TensorRT reads an input from any address that is a multiple of this; what lies elsewhere is copied.
ALIGNMENT = 256
NOT_RECORDED = "kernel by kernel"
# A graph is recorded in far less; meanwhile CUDA refuses to wait for the whole device.
RECORDING_WAITS, RECORDING_WAIT_SECONDS = 20, 0.05


class SessionOptions(NamedTuple):
    """How an engine is opened.

    cuda_graph: whether laps are launches of one recorded graph. host_code: whether the engine may run code on the host,
    as a version compatible one does; only for an engine whose digest was checked. weights: the ONNX file from which an
    engine without weights takes them. cache: where compiled kernels are kept.
    """

    cuda_graph: bool = True
    host_code: bool = False
    weights: Path | None = None
    cache: CacheFile | None = None


class DeviceBuffer(NamedTuple):
    """A piece of device memory."""

    address: int
    size: int


class TrtSession:
    """A deserialised engine with its own stream; inputs and outputs stay in device memory from lap to lap."""

    def __init__(
        self,
        trt: Any,
        cudart: Any,
        plan: Any,
        *,
        name: str,
        options: SessionOptions | None = None,
        opened: TrtSession | None = None,
    ) -> None:
        """A session on `plan`, or a second one on the engine that `opened` holds and must keep."""
        self._trt, self._cudart, self._name = trt, cudart, name
        self._options = options or SessionOptions()
        self._log = Log(trt)
        self._stream: Any = None
        self._context: Any = None
        self._cache: Any = None
        self._cached: bytes | None = None
        self._buffers: dict[str, DeviceBuffer] = {}
        self._staging: dict[str, DeviceBuffer] = {}
        self._lent: dict[str, DeviceArray] = {}
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._events: list[Any] = []
        self._graph: Any = None
        self._bound = self._ran = False
        self._runtime: Any = opened._runtime if opened else made_runtime(trt, self._log, self._options, name=name)
        self._engine: Any = opened._engine if opened else made_engine(trt, self._runtime, self._log, plan, name=name)
        try:
            # Not the default stream: TensorRT synchronises that one more often.
            self._stream = self._cuda("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking)
            if self._options.weights is not None and opened is None:
                self._refit(self._options.weights)
            self._context = self._made_context()
            modes = {tensor: self._engine.get_tensor_mode(tensor) for tensor in self._tensor_names()}
            self._expected = {
                tensor: self._tensor_type(tensor) for tensor in modes if modes[tensor] == trt.TensorIOMode.INPUT
            }
            self.input_names = list(self._expected)
            self.output_names = [tensor for tensor in modes if tensor not in self._expected]
            self.input_shapes = {tensor: kind.shape for tensor, kind in self._expected.items()}
            self._profiles = self._all_profiles()
        except BaseException:
            self.close()
            raise
        self._profile = 0
        self.launch = CUDA_GRAPH if self._options.cuda_graph else f"{NOT_RECORDED}: the CUDA graph is switched off"

    @property
    def fed_batch(self) -> int:
        """Images at once for whoever has many: the fixed batch, or the largest that an engine takes below a bound."""
        name = self.input_names[0]
        if self.input_shapes[name][0] > 0:
            return self.input_shapes[name][0]
        ranges = [(profile[name].smallest[0], profile[name].largest[0]) for profile in self._profiles]
        fitting = [min(high, FREE_BATCH) for low, high in ranges if low <= FREE_BATCH]
        return max(fitting, default=min(low for low, _ in ranges))

    @property
    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs that the engine was made to be fastest at."""
        return (
            {name: reach.expected for name, reach in self._profiles[0].items()} if self._profiles else self.input_shapes
        )

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The outputs for `feeds`, by name. Raises: ValueError for feeds that do not fit; MeasureFailed."""
        self.bind(feeds)
        self.lap()
        return self.outputs()

    def profiled(self) -> ProfiledTrtSession:
        """A session of its own on the same engine, whose laps are timed layer by layer. Raises: MeasureFailed."""
        self._require_open()
        return ProfiledTrtSession(self)

    def bind(self, feeds: Mapping[str, Any]) -> None:
        """Bring `feeds` to the device and give every input and output its address there.

        An array that lies on this device already is not copied: laps read it where it lies, until the next bind.
        Raises: ValueError for feeds that do not fit the network or the shapes it was built for; MeasureFailed.
        """
        self._bound = False
        self._require_open()
        self._free_staging()
        arrays = self._checked(feeds)
        self._take_shapes({name: tuple(array.shape) for name, array in arrays.items()})
        self._lent = {name: array for name, array in arrays.items() if isinstance(array, DeviceArray)}
        for name, array in arrays.items():
            self._feed(name, array)
        self._synchronise()
        self._infer_shapes()
        for name in self.output_names:
            self._place(name, _bytes(self._output_type(name)))
        self._bound = True

    def lap(self) -> None:
        """One execution on the bound inputs, done when this returns. Raises: MeasureFailed."""
        self._make_ready()
        self._execute()
        self._synchronise()

    def timed_lap_ms(self) -> float:
        """One execution on the bound inputs, done when this returns: its ms between two CUDA events.

        The stream is idle before, so what the device waits for the host to submit the execution counts as well.
        Raises: MeasureFailed.
        """
        self._make_ready()
        begun, ended = self._first_events(2)
        self._record(begun)
        self._execute()
        self._record(ended)
        self._synchronise()
        return self._elapsed_ms(begun, ended)

    def plain_lap_ms(self) -> float:
        """One execution that is launched kernel by kernel, whatever laps are: its ms between two CUDA events.

        What the device waits for the host to submit the kernels counts as well.
        Raises: MeasureFailed.
        """
        self._require_bound()
        begun, ended = self._first_events(2)
        self._record(begun)
        self._enqueue()
        self._record(ended)
        self._synchronise()
        return self._elapsed_ms(begun, ended)

    def round_trip(self) -> RoundTrip:
        """One execution with its inputs copied from pinned host memory before, and its outputs copied there after.

        Raises: MeasureFailed.
        """
        self._make_ready()
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
        """Give back device memory, stream and engine, in the order TensorRT asks for; keep what was compiled.

        A release that fails raises nothing and stops no other: the device fails all of them after a lap that broke it,
        and the lap's error is the one to see.
        """
        self._bound = False
        try:
            self._keep_compiled()
        finally:
            self._release()

    def _release(self) -> None:
        held = [
            ("cudaGraphExecDestroy", self._graph),
            *(("cudaFree", buffer.address) for buffer in self._buffers.values()),
            *(("cudaFreeHost", buffer.address) for buffer in self._staging.values()),
            *(("cudaEventDestroy", event) for event in self._events),
            ("cudaStreamDestroy", self._stream),
        ]
        for function, handle in held:
            if handle is not None:
                self._tried(function, handle)
        self._lent, self._buffers, self._staging, self._events = {}, {}, {}, []
        self._graph = self._stream = self._context = self._cache = self._engine = self._runtime = None

    def _refit(self, weights: Path) -> None:
        """The engine has the weights of that ONNX file. Raises: BuildFailed with what TensorRT logged."""
        refitter = self._made(self._trt.Refitter(self._engine, self._log.logger), what="take weights")
        parser = self._trt.OnnxParserRefitter(refitter, self._log.logger)
        if not (parser.refit_from_file(str(weights)) and refitter.refit_cuda_engine()):
            raise BuildFailed(
                f"{self._name}: {release(self._trt)} cannot fill in the weights of {weights}: {self._log.text()}."
            )

    def _made_context(self) -> Any:
        """An execution context; with TensorRT-RTX one that keeps what it compiles, for the shapes that are bound."""
        config = self._runtime_config()
        made = self._engine.create_execution_context(*([] if config is None else [config]))
        return self._made(made, what="make an execution context")

    def _runtime_config(self) -> Any:
        """TensorRT-RTX's settings of a context; None for a TensorRT that compiles nothing when it runs."""
        config = self._engine.create_runtime_config() if hasattr(self._engine, "create_runtime_config") else None
        if config is None or not hasattr(config, "create_runtime_cache"):
            return None
        # At once: what is compiled in the background would make the first laps slower than the later ones.
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._options.cache is not None:
            self._cache = config.create_runtime_cache()
            kept = self._options.cache.read()
            # What is of another driver or device is refused here, and written anew when the session is closed.
            self._cached = kept if kept and self._cache.deserialize(kept) else None
            config.set_runtime_cache(self._cache)
        return config

    def _keep_compiled(self) -> None:
        """The runtime cache holds what this session compiled; a cache that cannot be written is no error."""
        if self._cache is None or self._options.cache is None or not self._ran:
            return
        compiled = self._cache.serialize()
        if compiled is not None and (blob := bytes(compiled)) != self._cached:
            self._options.cache.write(blob)

    def _tensor_names(self) -> list[str]:
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def _tensor_type(self, name: str) -> TensorType:
        kind = self._engine.get_tensor_dtype(name)
        try:
            dtype = np.dtype(self._trt.nptype(kind))
        except TypeError as err:
            raise BuildFailed(f"{self._name}: tensor '{name}' has type {kind}, which numpy does not have.") from err
        return TensorType(tuple(self._engine.get_tensor_shape(name)), dtype)

    def _output_type(self, name: str) -> TensorType:
        shape = tuple(self._context.get_tensor_shape(name))
        if -1 in shape:
            raise MeasureFailed(
                f"{self._name}: the shape of output '{name}' depends on the data, which is not supported."
            )
        return self._tensor_type(name)._replace(shape=shape)

    def _all_profiles(self) -> list[Profile]:
        """The shapes that the engine was built for; none where all of them are fixed."""
        if not any(-1 in shape for shape in self.input_shapes.values()):
            return []
        return [
            {
                name: ShapeRange(*(tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, place)))
                for name in self.input_names
            }
            for place in range(self._engine.num_optimization_profiles)
        ]

    def _checked(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray | DeviceArray]:
        """`feeds` as arrays of the host or the device that fit the network. Raises: ValueError."""
        require_names(feeds, self._expected)
        lent = {name: array for name, value in feeds.items() if (array := device_array(name, value)) is not None}
        for name, array in lent.items():
            require_fit(name, array.shape, array.dtype, self._expected[name])
        here = checked_feeds(
            {name: value for name, value in feeds.items() if name not in lent},
            {name: kind for name, kind in self._expected.items() if name not in lent},
        )
        if lent:
            # Whoever wrote the array may have done so on another stream, and may still be at it.
            self._synchronise_device()
        return {name: lent[name] if name in lent else here[name] for name in self._expected}

    def _take_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """The context runs these shapes from now on, by the profile that holds them. Raises: ValueError."""
        if shapes == self._shapes:
            return
        self._forget_graph()
        self._ran, self._shapes = False, {}
        if self._profiles:
            self._switch_profile(shapes)
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise ValueError(self._outside(shapes))
        self._shapes = shapes

    def _infer_shapes(self) -> None:
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as err:
            raise MeasureFailed(
                f"{self._name}: {release(self._trt)} cannot infer its shapes: {self._log.text()}."
            ) from err
        if missing:
            raise MeasureFailed(f"{self._name}: shapes of {missing} are unknown after binding the inputs.")

    def _switch_profile(self, shapes: dict[str, tuple[int, ...]]) -> None:
        place = profile_holding(self._profiles, shapes)
        if place is None:
            raise ValueError(self._outside(shapes))
        if place != self._profile:
            if not self._context.set_optimization_profile_async(place, int(self._stream)):
                raise MeasureFailed(f"{self._name}: {release(self._trt)} cannot switch profiles: {self._log.text()}.")
            self._synchronise()
            self._profile, self._addresses = place, {}

    def _outside(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """That these shapes are none that the engine was built for, and which are."""
        for name, shape in shapes.items():
            ranges = [profile[name] for profile in self._profiles]
            if not any(reach.holds(shape) for reach in ranges):
                built = " or ".join(f"between {reach.smallest} and {reach.largest}" for reach in ranges)
                return f"input '{name}': shape {shape} given, {built or self.input_shapes[name]} expected."
        return f"shapes {dict(shapes)}: no profile of the engine holds all of them. Build one with --shapes."

    def _feed(self, name: str, array: np.ndarray | DeviceArray) -> None:
        """Input `name` reads these values: where they lie on the device, or a copy of them there."""
        if isinstance(array, DeviceArray):
            self._require_on_this_device(name, array)
            if array.address % ALIGNMENT == 0:
                self._point(name, array.address)
                return
            self._place(name, array.nbytes)
            self._copy(self._buffers[name].address, array.address, array.nbytes, "cudaMemcpyDeviceToDevice")
            return
        self._place(name, array.nbytes)
        self._copy(self._buffers[name].address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")
        # The array may be gone when the copy begins.
        self._synchronise()

    def _require_on_this_device(self, name: str, array: DeviceArray) -> None:
        attributes, here = self._cuda("cudaPointerGetAttributes", array.address), self._cuda("cudaGetDevice")
        if attributes.device != here:
            raise ValueError(
                f"input '{name}': lies on CUDA device {attributes.device}, and the engine runs on device {here}. "
                "Move it there."
            )

    def _place(self, name: str, size: int) -> None:
        """Give tensor `name` at least `size` bytes of device memory, and tell the context where."""
        held = self._buffers.get(name)
        if held is None or held.size < size:
            if held is not None:
                self._cuda("cudaFree", self._buffers.pop(name).address)
            self._buffers[name] = DeviceBuffer(int(self._cuda("cudaMalloc", size)), size)
        self._point(name, self._buffers[name].address)

    def _point(self, name: str, address: int) -> None:
        """The context finds tensor `name` at that address; a graph recorded with another one is worth nothing."""
        if self._addresses.get(name) == address:
            return
        self._forget_graph()
        self._ran = False
        if not self._context.set_tensor_address(name, address):
            raise MeasureFailed(
                f"{self._name}: {release(self._trt)} takes no address for '{name}': {self._log.text()}."
            )
        self._addresses[name] = address

    def _stage(self) -> None:
        """Pinned host memory beside every tensor on the device; that of an input holds what is bound."""
        if self._lent:
            raise MeasureFailed(f"{self._name}: {sorted(self._lent)} lie on the device; bind arrays of the host.")
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

    def _make_ready(self) -> None:
        """What a lap launches is there: the graph, once the engine has run on what is bound. Raises: MeasureFailed."""
        self._require_bound()
        if self._ran and self._graph is None and self.launch == CUDA_GRAPH:
            self._record_graph()

    def _execute(self) -> None:
        """One execution is on its way on the session's stream. Raises: MeasureFailed."""
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda("cudaGraphLaunch", self._graph, self._stream)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise MeasureFailed(f"{self._name}: {self._trt.__name__} cannot run it: {self._log.text()}.")
        self._ran = True

    def _record_graph(self) -> None:
        """One execution as a CUDA graph; where that cannot be recorded, `launch` says why, and laps go on without.

        TensorRT wants to have run once before: what it makes on its first run cannot be recorded.
        """
        capturable = getattr(self._context, "is_stream_capturable", None)
        if capturable is not None and not capturable(int(self._stream)):
            self.launch = f"{NOT_RECORDED}: {release(self._trt)} says that it cannot be recorded"
            return
        relaxed = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _, refused = self._tried("cudaStreamBeginCapture", self._stream, relaxed)
        if refused:
            self._cudart.cudaGetLastError()
            self.launch = f"{NOT_RECORDED}: {refused}"
            return
        enqueued = self._context.execute_async_v3(int(self._stream))
        graph, refused = self._tried("cudaStreamEndCapture", self._stream)
        if enqueued and not refused:
            self._graph, refused = self._tried("cudaGraphInstantiate", graph, 0)
        if graph is not None:
            self._tried("cudaGraphDestroy", graph)
        if not enqueued or refused:
            self._cudart.cudaGetLastError()
            self.launch = f"{NOT_RECORDED}: {refused or self._log.text()}"

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self._cuda("cudaGraphExecDestroy", self._graph)
            self._graph = None

    def _require_open(self) -> None:
        if self._context is None:
            raise MeasureFailed(f"{self._name}: the session is closed. Open it again.")

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

    def _synchronise_device(self) -> None:
        """All streams have done their work; one that another thread records is waited for a while, as CUDA asks."""
        recording = self._cudart.cudaError_t.cudaErrorStreamCaptureUnsupported
        for _ in range(RECORDING_WAITS):
            if self._cudart.cudaDeviceSynchronize()[0] != recording:
                break
            time.sleep(RECORDING_WAIT_SECONDS)
        self._cuda("cudaDeviceSynchronize")

    def _cuda(self, function: str, *arguments: Any) -> Any:
        """What a CUDA runtime call returns beside its error code. Raises: MeasureFailed with the code's own text."""
        result, reason = self._tried(function, *arguments)
        if reason:
            raise MeasureFailed(f"{self._name}: {reason}. Look at the driver and at free memory.")
        return result

    def _tried(self, function: str, *arguments: Any) -> tuple[Any, str]:
        """What a CUDA runtime call returns, and why it failed, as a phrase: empty when it did not."""
        error, *results = getattr(self._cudart, function)(*arguments)
        if error == self._cudart.cudaError_t.cudaSuccess:
            return (results[0] if results else None), ""
        return None, f"{function} failed: {self._cudart.cudaGetErrorString(error)[1].decode()}"

    def _made(self, thing: Any, *, what: str) -> Any:
        """`thing`, unless it is the None with which TensorRT says that it failed. Raises: BuildFailed."""
        if thing is None:
            raise BuildFailed(f"{self._name}: {release(self._trt)} cannot {what}: {self._log.text()}.")
        return thing


class ProfiledTrtSession(TrtSession):
    """A second execution context of an engine, in which TensorRT tells the time of every layer after each lap."""

    def __init__(self, session: TrtSession) -> None:
        options = session._options._replace(cuda_graph=False)
        super().__init__(session._trt, session._cudart, None, name=session._name, options=options, opened=session)
        self.runtime = release(self._trt)
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
                f"{self._name}: {release(self._trt)} told the layers' times of {sum(map(bool, told))} laps instead of "
                f"{laps}. Use another version."
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


def made_runtime(trt: Any, log: Log, options: SessionOptions, *, name: str) -> Any:
    """What deserialises engines, and lets them run host code only where `options` say so. Raises: BuildFailed."""
    runtime = construct(lambda: trt.Runtime(log.logger), log, what=f"{name}: {release(trt)} cannot run")
    if options.host_code:
        runtime.engine_host_code_allowed = True
    return runtime


def made_engine(trt: Any, runtime: Any, log: Log, plan: Any, *, name: str) -> Any:
    """The engine of a plan. Raises: BuildFailed with the log where TensorRT gives None, as it does when it fails."""
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildFailed(f"{name}: {release(trt)} cannot read the engine: {log.text()}.")
    return engine


def engine_information(trt: Any, plan: Any, *, name: str, options: SessionOptions | None = None) -> str:
    """What TensorRT's inspector tells of every layer of a plan, as JSON; free shapes stand at those expected first.

    Cost: the engine is opened once, with its memory.
    Raises: BuildFailed when it cannot be opened: then it must not ship.
    """
    log = Log(trt)
    runtime = made_runtime(trt, log, options or SessionOptions(), name=name)
    engine = made_engine(trt, runtime, log, plan, name=name)
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context()
    if context is not None:
        for index in range(engine.num_io_tensors):
            tensor = engine.get_tensor_name(index)
            if engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT and -1 in tuple(
                engine.get_tensor_shape(tensor)
            ):
                context.set_input_shape(tensor, tuple(engine.get_tensor_profile_shape(tensor, 0)[1]))
        inspector.execution_context = context
    return inspector.get_engine_information(trt.LayerInformationFormat.JSON)


def plan_sha256(plan: Any) -> str:
    """The digest of a plan, from the buffer it lies in."""
    return hashlib.sha256(plan).hexdigest()


def _node_laps(name: str, information: dict[str, Any], laps_ms: list[float]) -> NodeLaps:
    """A layer with the ONNX nodes that TensorRT notes as its origin; without such notes its name has to tell."""
    kind = str(information.get("LayerType", ""))
    noted = re.findall(r"\[ONNX Layer: ([^\]]+)\]", str(information.get("Metadata", "")))
    if name.startswith("Reformatting CopyNode") or (kind in REFORMATTING and not noted):
        return NodeLaps(name, "reformat", "", laps_ms)
    return NodeLaps(name, kind or "layer", " + ".join(noted) or name, laps_ms)


def _bytes(kind: TensorType) -> int:
    return math.prod(kind.shape) * kind.dtype.itemsize
