"""Target `ort-cpu`: onnxruntime on this CPU; the engine is the graph as onnxruntime optimised it for this CPU."""

from __future__ import annotations

import functools
import importlib
import json
import platform
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import BuildFailed, MeasureFailed
from .target import (
    Build,
    Engine,
    NodeLaps,
    Session,
    Target,
    TargetSpec,
    TensorType,
    checked_feeds,
    cpu_isa,
)

if TYPE_CHECKING:
    import onnxruntime

# onnxruntime's severities: 3 is "error". Below it lies the warning that a saved graph fits one kind of CPU only,
# which the sidecar records and `cannot_run` checks.
LOG_ERRORS_ONLY = 3
# How onnxruntime ends the names of a profile's entries, and those of nodes that it moved to its blocked layout.
KERNEL = "_kernel_time"
BLOCKED = "_nchwc"
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


class OrtCpuTarget(Target):
    """onnxruntime's CPU provider with a fixed number of threads.

    The engine file is an ordinary ONNX file, but its convolutions are laid out for the vector width of this CPU:
    another instruction set, or another onnxruntime, needs another build.
    """

    def __init__(self, spec: TargetSpec, *, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"threads: {threads} given, at least 1 expected. Use measure.threads = 1.")
        super().__init__(spec)
        self.threads = threads

    def unusable(self) -> str | None:
        """Why onnxruntime cannot be used here; None when it can."""
        try:
            import onnxruntime
        except ModuleNotFoundError:
            return "onnxruntime is not installed. Install chip-deploy[ort]."
        except ImportError as err:
            return f"onnxruntime does not load ({err}). Install chip-deploy[ort] again."
        if "CPUExecutionProvider" not in onnxruntime.get_available_providers():
            return "this onnxruntime has no CPU provider. Install chip-deploy[ort]."
        return None

    def _build(self, onnx_path: Path, engine_path: Path) -> Build:
        optimised = self._session(onnx_path, optimise=True, save_to=engine_path)
        reopened = self._session(engine_path, optimise=False)
        _require_same_outputs(optimised, reopened, onnx_path)
        return Build(
            built_for=_this_cpu(),
            flags={
                "threads": self.threads,
                "graph_optimization": "all",
                "inter_op_threads": 1,
            },
            versions={"onnxruntime": _version()},
        )

    def _cannot_run(self, engine: Engine) -> str | None:
        if reason := self.unusable():
            return reason.rstrip(".")
        here = _this_cpu()
        for key, built in engine.built_for.items():
            if built != here.get(key):
                return f"it was optimised for {key} '{built}', and this machine has '{here.get(key)}'"
        built = engine.versions.get("onnxruntime")
        if built != _version():
            return f"it was optimised by onnxruntime {built}, and this one is {_version()}"
        return None

    def _open(self, engine_path: Path) -> Session:
        return self._session(engine_path, optimise=False)

    def _open_onnx(self, onnx_path: Path) -> Session:
        return self._session(onnx_path, optimise=True)

    def _session(self, path: Path, *, optimise: bool, save_to: Path | None = None) -> OrtSession:
        options = self._options(optimise=optimise)
        if save_to is not None:
            options.optimized_model_filepath = str(save_to)
        profiled = functools.partial(self._profiled, path, optimise=optimise)
        return OrtSession(_inference(path, options), name=str(path), profiled=profiled)

    def _profiled(self, path: Path, *, optimise: bool) -> ProfiledOrtSession:
        try:
            folder = tempfile.TemporaryDirectory(prefix="chip-deploy-profile-")
        except OSError as err:
            raise MeasureFailed(f"there is no folder for a profile ({err}). Set TMPDIR to one.") from err
        options = self._options(optimise=optimise)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder.name) / "profile")
        try:
            session = _inference(path, options)
        except BuildFailed:
            folder.cleanup()
            raise
        return ProfiledOrtSession(session, name=str(path), folder=folder, threads=self.threads)

    def _options(self, *, optimise: bool) -> onnxruntime.SessionOptions:
        import onnxruntime

        levels = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
        options.log_severity_level = LOG_ERRORS_ONLY
        return options


class OrtSession:
    """A graph that onnxruntime has loaded. Inputs and outputs keep their buffers from lap to lap."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        name: str,
        profiled: Callable[[], ProfiledOrtSession] | None = None,
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

    def profiled(self) -> ProfiledOrtSession:
        """A session of its own on the same file, whose laps are timed node by node. Raises: BuildFailed."""
        if self._profiled is None:
            raise MeasureFailed(f"{self._name}: this session is profiled already. Close it and open another.")
        return self._profiled()

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the latest execution, by name, as copies."""
        values = self._bound().get_outputs()
        return {name: value.numpy().copy() for name, value in zip(self.output_names, values, strict=True)}

    def close(self) -> None:
        """Give back the graph and its buffers."""
        self._binding = None
        self._session = None

    def _execute(self, binding: onnxruntime.IOBinding) -> None:
        try:
            self._open_session().run_with_iobinding(binding)
        except foreign_errors() as err:
            raise MeasureFailed(f"{self._name}: onnxruntime cannot run it: {_first_line(err)}") from err

    def _open_session(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise MeasureFailed(f"{self._name}: the session is closed. Open it again.")
        return self._session

    def _bound(self) -> onnxruntime.IOBinding:
        if self._binding is None:
            raise MeasureFailed(f"{self._name}: no inputs are bound. Call bind first.")
        return self._binding


class ProfiledOrtSession(OrtSession):
    """A graph whose nodes onnxruntime times, to the microsecond; it writes them to a file when it is asked."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        name: str,
        folder: tempfile.TemporaryDirectory[str],
        threads: int,
    ) -> None:
        super().__init__(session, name=name)
        self._folder = folder
        self.runtime = f"onnxruntime {_version()}, {threads} thread{'s' if threads > 1 else ''}"

    def node_laps(self, laps: int) -> list[NodeLaps]:
        """The nodes in the order they ran, with their times in the latest so many laps; no lap may follow.

        Raises: MeasureFailed when onnxruntime's file cannot be read, as on a full disk, or holds fewer laps.
        """
        path = Path(self._open_session().end_profiling())
        try:
            nodes = read_trace(json.loads(path.read_text(encoding="utf-8")), laps=laps)
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise MeasureFailed(
                f"{self._name}: onnxruntime {_version()} wrote no profile that can be read ({err}). "
                f"Look for free space in {path.parent.parent}."
            ) from err
        self.close()
        return nodes

    def close(self) -> None:
        """Give back the graph, its buffers and the file of times."""
        if self._session is not None:
            self._session.end_profiling()
        super().close()
        self._folder.cleanup()


def read_trace(events: list[dict[str, Any]], *, laps: int) -> list[NodeLaps]:
    """The nodes of onnxruntime's JSON trace in the order they ran, with their times in its latest `laps` laps.

    A node that runs several times in a lap counts as one; one that a lap leaves out counts 0 there.
    Raises: ValueError when the trace holds fewer laps.
    """
    runs = sorted((event["ts"], event["dur"]) for event in events if event["name"] == "model_run")
    if len(runs) < laps:
        raise ValueError(f"{len(runs)} laps instead of {laps}")
    runs = runs[len(runs) - laps :]
    starts = [start for start, _ in runs]
    nodes: dict[str, NodeLaps] = {}
    for event in sorted(events, key=lambda event: event["ts"]):
        lap = bisect_right(starts, event["ts"]) - 1
        if event["cat"] != "Node" or not event["name"].endswith(KERNEL) or lap < 0:
            continue
        name = event["name"].removesuffix(KERNEL)
        node = nodes.setdefault(name, _node_laps(name, event["args"].get("op_name", ""), laps))
        node.laps_ms[lap] += event["dur"] / 1e3
    return list(nodes.values())


def foreign_errors() -> tuple[type[Exception], ...]:
    """Every exception that onnxruntime's own code raises; they share no base class but Exception."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError)


def _inference(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Raises: BuildFailed with onnxruntime's own words when it cannot open the file."""
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except foreign_errors() as err:
        raise BuildFailed(f"{path}: onnxruntime {_version()} cannot open it: {_first_line(err)}") from err


def _node_laps(name: str, operator: str, laps: int) -> NodeLaps:
    """A node without times yet; its name is that of the ONNX node, or of the last tensor of those fused into it."""
    origin = name.removesuffix(BLOCKED)
    return NodeLaps(name, operator if origin == name else f"{operator} (blocked)", origin, [0.0] * laps)


def _require_same_outputs(optimised: OrtSession, reopened: OrtSession, onnx_path: Path) -> None:
    """Raises: BuildFailed unless both sessions give the same bits for a seeded random input."""
    random = np.random.default_rng(0)
    feeds = {}
    for name, (shape, dtype) in optimised._expected.items():
        feeds[name] = random.standard_normal([1 if axis == -1 else axis for axis in shape]).astype(dtype)
    expected, given = optimised.run(feeds), reopened.run(feeds)
    for name, output in expected.items():
        if not np.array_equal(output, given[name], equal_nan=output.dtype.kind == "f"):
            raise BuildFailed(
                f"{onnx_path}: output '{name}' changes when the graph that onnxruntime {_version()} optimised is "
                "saved and opened again. Use another onnxruntime version."
            )


def _tensor_type(node: onnxruntime.NodeArg) -> TensorType:
    """Shape and dtype of an input; axes that onnxruntime names, or knows nothing of, are free."""
    if node.type not in DTYPES:
        raise BuildFailed(f"input '{node.name}': type {node.type} is not supported. Available: {', '.join(DTYPES)}.")
    return TensorType(
        shape=tuple(axis if isinstance(axis, int) else -1 for axis in node.shape),
        dtype=np.dtype(DTYPES[node.type]),
    )


def _this_cpu() -> dict[str, str]:
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "isa": " ".join(cpu_isa()),
    }


def _version() -> str:
    import onnxruntime

    return onnxruntime.__version__


def _first_line(err: Exception) -> str:
    return " ".join(str(err).split("\n")[0].split())
