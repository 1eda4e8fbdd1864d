"""An ONNX file that onnxruntime has loaded, on the CPU or on the GPU: bound, run, and timed node by node."""

from __future__ import annotations

import contextlib
import importlib
import json
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import BuildFailed, MeasureFailed
from .target import CUDA_GRAPH, NodeLaps, TensorType, checked_feeds

if TYPE_CHECKING:
    import onnxruntime

# onnxruntime's severities: 3 is "error". Below it lies the warning that a saved graph fits one kind of CPU only,
# which the sidecar records and `cannot_run` checks.
LOG_ERRORS_ONLY = 3
# How onnxruntime ends the names of a profile's entries, and those of nodes that it moved to its blocked layout.
KERNEL = "_kernel_time"
BLOCKED = "_nchwc"
# How it marks what a CUDA kernel took, in a build that asks for that.
KERNELS = "Kernel"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# The run setting that names a captured CUDA graph; -1 runs without one.
GRAPH_ID = "gpu_graph_id"
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


class OrtSession:
    """A graph that onnxruntime has loaded. Inputs and outputs keep their buffers from lap to lap."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        name: str,
        profiled: Callable[[], ProfiledOrtSession | ProfiledOrtCudaSession] | None = None,
    ) -> None:
        self._session: onnxruntime.InferenceSession | None = session
        self._name = name
        self._profiled = profiled
        self._binding: onnxruntime.IOBinding | None = None
        self._expected = {node.name: _tensor_type(node) for node in session.get_inputs()}
        self.input_names = list(self._expected)
        self.output_names = [node.name for node in session.get_outputs()]
        self.input_shapes = {name: kind.shape for name, kind in self._expected.items()}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The outputs for `feeds`, by name. Raises: ValueError for feeds that do not fit; MeasureFailed."""
        self.bind(feeds)
        return self.outputs()

    def bind(self, feeds: Mapping[str, Any]) -> None:
        """Copy `feeds` into buffers of their own and run once, so that the outputs have theirs.

        Raises: ValueError for feeds that do not fit; MeasureFailed when onnxruntime cannot run them.
        """
        import onnxruntime

        session = self._open_session()
        binding = session.io_binding()
        for name, array in checked_feeds(feeds, self._expected).items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array.copy()))
        for name in self.output_names:
            binding.bind_output(name)
        self._execute(binding)
        for name, value in zip(self.output_names, binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(name, value)
        self._binding = binding

    def lap(self) -> None:
        """One execution on the bound inputs. Raises: MeasureFailed when nothing is bound."""
        self._execute(self._bound())

    def profiled(self) -> ProfiledOrtSession | ProfiledOrtCudaSession:
        """A session of its own on the same file, whose laps are timed node by node. Raises: BuildFailed."""
        if self._profiled is None:
            raise MeasureFailed(f"{self._name}: this session is profiled already. Close it and open another.")
        return self._profiled()

    def random_feeds(self) -> dict[str, np.ndarray]:
        """Seeded noise of the size that the session takes, one image where the batch is free."""
        random = np.random.default_rng(0)
        return {
            name: random.standard_normal([1 if axis == -1 else axis for axis in shape]).astype(dtype)
            for name, (shape, dtype) in self._expected.items()
        }

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the latest execution, by name, as copies."""
        values = self._bound().get_outputs()
        return {name: value.numpy().copy() for name, value in zip(self.output_names, values, strict=True)}

    def close(self) -> None:
        """Give back the graph and its buffers."""
        self._binding = None
        self._session = None

    def _execute(self, binding: onnxruntime.IOBinding) -> None:
        """One execution, done when this returns. Raises: MeasureFailed."""
        try:
            self._open_session().run_with_iobinding(binding)
        except foreign_errors() as err:
            raise self._cannot_run(err) from err

    def _cannot_run(self, err: Exception) -> MeasureFailed:
        return MeasureFailed(f"{self._name}: onnxruntime cannot run it: {first_line(err)}")

    def _open_session(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise MeasureFailed(f"{self._name}: the session is closed. Open it again.")
        return self._session

    def _bound(self) -> onnxruntime.IOBinding:
        if self._binding is None:
            raise MeasureFailed(f"{self._name}: no inputs are bound. Call bind first.")
        return self._binding


class OrtCudaSession(OrtSession):
    """A graph on the GPU, with its inputs and outputs there; they keep their memory while the shapes stay the same.

    uses_graph: whether laps replay the network as one captured CUDA graph.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        name: str,
        profiled: Callable[[], ProfiledOrtCudaSession] | None = None,
        uses_graph: bool = False,
    ) -> None:
        super().__init__(session, name=name, profiled=profiled)
        self.uses_graph = uses_graph
        self.launch = CUDA_GRAPH if uses_graph else "kernel by kernel"
        self._inputs: dict[str, onnxruntime.OrtValue] = {}
        self._bindings = 0

    def bind(self, feeds: Mapping[str, Any]) -> None:
        """Copy `feeds` to the GPU and run once there, without a CUDA graph; the first lap captures one.

        Raises: ValueError for feeds that do not fit; MeasureFailed when onnxruntime cannot run them.
        """
        self._open_session()
        arrays = checked_feeds(feeds, self._expected)
        shapes = {name: tuple(value.shape()) for name, value in self._inputs.items()}
        if self._binding is None or shapes != {name: array.shape for name, array in arrays.items()}:
            self._bind_anew(arrays)
            return
        # A captured graph reads the memory that it was captured with.
        for name, array in arrays.items():
            self._inputs[name].update_inplace(array)
        self._execute(self._binding)

    def lap(self) -> None:
        """One execution on the bound inputs, done on the GPU when this returns. Raises: MeasureFailed."""
        self._execute(self._bound(), graph=self._bindings if self.uses_graph else -1)

    def close(self) -> None:
        """Give back the graph and its buffers."""
        self._inputs = {}
        super().close()

    def _bind_anew(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._binding = None
        self._inputs = {name: self._on_device(array) for name, array in arrays.items()}
        self._bindings += 1
        binding = self._open_session().io_binding()
        for name, value in self._inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.output_names:
            binding.bind_output(name, *self._place)
        self._execute(binding)
        for name, value in zip(self.output_names, binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(name, value)
        self._binding = binding

    @property
    def _place(self) -> tuple[str, int]:
        """The device as onnxruntime names it, and its number."""
        return "cuda", 0

    def _on_device(self, array: np.ndarray) -> onnxruntime.OrtValue:
        import onnxruntime

        try:
            return onnxruntime.OrtValue.ortvalue_from_numpy(array, *self._place)
        except foreign_errors() as err:
            raise MeasureFailed(f"{self._name}: no place on the GPU for the inputs: {first_line(err)}") from err

    def _execute(self, binding: onnxruntime.IOBinding, *, graph: int = -1) -> None:
        """One execution, done on the GPU when this returns; by the CUDA graph of that number unless it is -1."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry(GRAPH_ID, str(graph))
        try:
            self._open_session().run_with_iobinding(binding, options)
            binding.synchronize_outputs()
        except foreign_errors() as err:
            raise self._cannot_run(err) from err


class _Profile:
    """What a session writes down about its nodes, into a folder of its own that goes with it."""

    def __init__(self, folder: tempfile.TemporaryDirectory[str], *, name: str) -> None:
        self._folder, self._name = folder, name
        self._events: list[dict[str, Any]] = []

    def read(self, session: onnxruntime.InferenceSession) -> list[dict[str, Any]]:
        """The events of all laps; no lap may follow. Raises: MeasureFailed when there are none to read."""
        if not self._events:  # a profile can be ended once
            path = Path(session.end_profiling())
            try:
                self._events = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as err:
                raise self.unreadable(err) from err
        return self._events

    def unreadable(self, err: Exception) -> MeasureFailed:
        """What to say of a profile that is none, as on a full disk."""
        return MeasureFailed(
            f"{self._name}: onnxruntime {version()} wrote no profile that can be read ({err}). "
            f"Look for free space in {Path(self._folder.name).parent}."
        )

    def discard(self, session: onnxruntime.InferenceSession | None) -> None:
        """End what the session has not ended, and remove the folder."""
        if session is not None:
            session.end_profiling()
        self._folder.cleanup()


class ProfiledOrtSession(OrtSession):
    """A graph whose nodes onnxruntime times, to the microsecond; it writes them to a file when it is asked."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        name: str,
        folder: tempfile.TemporaryDirectory[str],
        runtime: str,
    ) -> None:
        super().__init__(session, name=name)
        self._profile = _Profile(folder, name=name)
        self.runtime = runtime

    def node_laps(self, laps: int) -> list[NodeLaps]:
        """The nodes in the order they ran, with their times in the latest so many laps; no lap may follow.

        Raises: MeasureFailed when onnxruntime's file cannot be read, as on a full disk, or holds fewer laps.
        """
        events = self._profile.read(self._open_session())
        try:
            nodes = read_trace(events, laps=laps)
        except (ValueError, KeyError, TypeError) as err:
            raise self._profile.unreadable(err) from err
        self.close()
        return nodes

    def close(self) -> None:
        """Give back the graph, its buffers and the file of times."""
        self._profile.discard(self._session)
        super().close()


class ProfiledOrtCudaSession(OrtCudaSession):
    """A graph on the GPU, of whose nodes onnxruntime notes the kernels if it was built to."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        name: str,
        folder: tempfile.TemporaryDirectory[str],
        runtime: str,
    ) -> None:
        super().__init__(session, name=name)
        self._profile = _Profile(folder, name=name)
        self.runtime = runtime

    def trace(self) -> list[dict[str, Any]]:
        """The events of all laps so far; no lap may follow. Raises: MeasureFailed."""
        return self._profile.read(self._open_session())

    def node_laps(self, laps: int) -> list[NodeLaps]:
        """The nodes in the order they ran, with the times of their kernels in the latest so many laps.

        Raises: MeasureFailed when the file cannot be read, holds fewer laps, or tells of no kernels.
        """
        events = self.trace()
        if not any(event.get("cat") == KERNELS for event in events):
            raise MeasureFailed(
                f"{self._name}: onnxruntime {version()} was built without CUDA profiling, and tells how long its nodes "
                "take to start, not to run. Profile --target trt, or build onnxruntime with --enable_cuda_profiling."
            )
        try:
            nodes = read_kernels(events, laps=laps)
        except (ValueError, KeyError, TypeError) as err:
            raise self._profile.unreadable(err) from err
        self.close()
        return nodes

    def close(self) -> None:
        """Give back the graph, its buffers and the file of times."""
        self._profile.discard(self._session)
        super().close()


def read_trace(events: list[dict[str, Any]], *, laps: int) -> list[NodeLaps]:
    """The nodes of onnxruntime's JSON trace in the order they ran, with their times in its latest `laps` laps.

    A node that runs several times in a lap counts as one; one that a lap leaves out counts 0 there.
    Raises: ValueError when the trace holds fewer laps.
    """
    starts = _starts(events, laps)
    nodes: dict[str, NodeLaps] = {}
    for event in sorted(events, key=lambda event: event["ts"]):
        lap = bisect_right(starts, event["ts"]) - 1
        if _is_node(event) and lap >= 0:
            _noted(nodes, event, laps).laps_ms[lap] += event["dur"] / 1e3
    return list(nodes.values())


def read_kernels(events: list[dict[str, Any]], *, laps: int) -> list[NodeLaps]:
    """The nodes of a trace with CUDA kernels, each with the times of the kernels that it started.

    onnxruntime writes the kernels of a node right behind it; they run later, maybe while the next lap has begun.
    Raises: ValueError when the trace holds fewer laps.
    """
    starts = _starts(events, laps)
    nodes: dict[str, NodeLaps] = {}
    started_by: tuple[NodeLaps, int] | None = None
    for event in events:
        if _is_node(event):
            lap = bisect_right(starts, event["ts"]) - 1
            started_by = (_noted(nodes, event, laps), lap) if lap >= 0 else None
        elif event["cat"] == KERNELS and started_by is not None:
            node, lap = started_by
            node.laps_ms[lap] += event["dur"] / 1e3
    return list(nodes.values())


def nodes_of_provider(events: list[dict[str, Any]], provider: str) -> dict[str, str]:
    """The nodes of a trace that a provider ran, with their operators."""
    ran = [event for event in events if _is_node(event) and event["args"].get("provider") == provider]
    return {event["name"].removesuffix(KERNEL): event["args"].get("op_name", "") for event in ran}


def open_session(
    path: Path, options: onnxruntime.SessionOptions, *, provider: str | tuple[str, dict[str, str]] = CPU
) -> onnxruntime.InferenceSession:
    """Raises: BuildFailed with onnxruntime's own words when it cannot open the file."""
    import onnxruntime

    try:
        # Its own fallback would print, and run on the CPU.
        return onnxruntime.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
    except foreign_errors() as err:
        raise BuildFailed(f"{path}: onnxruntime {version()} cannot open it: {first_line(err)}") from err


def session_options(*, threads: int, optimise: bool) -> onnxruntime.SessionOptions:
    """Settings of a session: so many threads, one node after another, every optimisation or none, errors logged."""
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    options.log_severity_level = LOG_ERRORS_ONLY
    return options


@contextlib.contextmanager
def profiling(
    options: onnxruntime.SessionOptions,
) -> Iterator[tuple[onnxruntime.SessionOptions, tempfile.TemporaryDirectory[str]]]:
    """`options` with a profile, and the folder it goes to, which goes itself when the block fails.

    Raises: MeasureFailed when there is no place for a folder.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="chip-deploy-profile-")
    except OSError as err:
        raise MeasureFailed(f"there is no folder for a profile ({err}). Set TMPDIR to one.") from err
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(folder.name) / "profile")
    try:
        yield options, folder
    except BaseException:
        folder.cleanup()
        raise


def foreign_errors() -> tuple[type[Exception], ...]:
    """Every exception that onnxruntime's own code raises; they share no base class but Exception."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError)


def version() -> str:
    """The onnxruntime that is installed: `1.31.1`."""
    import onnxruntime

    return onnxruntime.__version__


def first_line(err: Exception) -> str:
    """The first line of what onnxruntime says; the rest names its own source files."""
    return " ".join(str(err).split("\n")[0].split())


def _starts(events: list[dict[str, Any]], laps: int) -> list[int]:
    """When the latest laps began, in onnxruntime's µs. Raises: ValueError when there were fewer."""
    runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
    if len(runs) < laps:
        raise ValueError(f"{len(runs)} laps instead of {laps}")
    return runs[len(runs) - laps :]


def _is_node(event: dict[str, Any]) -> bool:
    return event["cat"] == "Node" and event["name"].endswith(KERNEL)


def _noted(nodes: dict[str, NodeLaps], event: dict[str, Any], laps: int) -> NodeLaps:
    name = event["name"].removesuffix(KERNEL)
    return nodes.setdefault(name, _node_laps(name, event["args"].get("op_name", ""), laps))


def _node_laps(name: str, operator: str, laps: int) -> NodeLaps:
    """A node without times yet; its name is that of the ONNX node, or of the last tensor of those fused into it."""
    origin = name.removesuffix(BLOCKED)
    return NodeLaps(name, operator if origin == name else f"{operator} (blocked)", origin, [0.0] * laps)


def _tensor_type(node: onnxruntime.NodeArg) -> TensorType:
    """Shape and dtype of an input; axes that onnxruntime names, or knows nothing of, are free."""
    if node.type not in DTYPES:
        raise BuildFailed(f"input '{node.name}': type {node.type} is not supported. Available: {', '.join(DTYPES)}.")
    return TensorType(
        shape=tuple(axis if isinstance(axis, int) else -1 for axis in node.shape),
        dtype=np.dtype(DTYPES[node.type]),
    )
