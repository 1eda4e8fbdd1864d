"""Target `torch`: the network as PyTorch runs it, eagerly, compiled or as a CUDA graph; what its users start from.

The engine is a torch program (`torch.export`): the network's own operator calls, weights beside them, and neither
classes nor pickles. It comes from the network, not from the ONNX file, so a run writes it where this target is asked
for. An eager lap makes those calls one by one, as the network's own `forward` does.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import os
import platform
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .bundle import write_atomic
from .errors import BuildFailed, ExportFailed, MeasureFailed
from .layer_types import told_types
from .program_file import plain_copy, require_plain_program
from .target import (
    Build,
    Engine,
    LayerTypes,
    NodeLaps,
    RoundTrip,
    Session,
    Target,
    TargetSpec,
    TensorType,
    checked_feeds,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

INPUT = "input"
OUTPUT = "output"
# The types that a network of floating-point layers can be cast to as a whole.
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
PROGRAM_PRECISIONS = tuple(DTYPES)
# What torch's operators that multiply and accumulate have in their names: conv2d, linear, addmm, bmm, matmul.
MULTIPLYING = ("conv", "linear", "mm", "matmul")
# What a captured graph runs before it is captured, so that libraries have chosen their algorithms and made their plans.
RUNS_BEFORE_CAPTURE = 3
# What torch raises for a program that it cannot read; a name that is a keyword makes no Python code.
UNREADABLE = (
    *(AssertionError, AttributeError, LookupError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
)
# All that is kept of where a node came from; the rest repeats the graph or holds paths of the machine that exported.
MODULE_STACK = "nn_module_stack"


class TorchTarget(Target):
    """PyTorch on the first GPU that it sees, else on this CPU with a fixed number of threads."""

    def __init__(self, spec: TargetSpec, *, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"threads: {threads} given, at least 1 expected. Use measure.threads = 1.")
        super().__init__(spec)
        self.threads = threads

    @property
    def way(self) -> str:
        """How torch runs the network: `eager`, `compiled` or `cuda-graph`."""
        return self.spec.capabilities[0] if self.spec.capabilities else "eager"

    @property
    def compiles(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether processes of torch's own compile a network when inputs are first bound to it."""
        return self.way == "compiled"

    @property
    def on_gpu(self) -> bool:
        """Whether the laps run on a GPU."""
        return self.unusable() is None and _device_type() == "cuda"

    def unusable(self) -> str | None:
        """Why torch cannot run a network this way here; None when it can."""
        try:
            import torch
        except ModuleNotFoundError:
            return "torch is not installed. Install chip-deploy[prune]."
        except (ImportError, OSError) as err:
            return f"torch does not load ({_first_line(err)}). Install chip-deploy[prune] again."
        if self.way == "cuda-graph" and not torch.cuda.is_available():
            return "torch sees no CUDA device, and a CUDA graph needs one. Use --target torch:eager or torch:compiled."
        return _no_compiler(_device_type()) if self.way == "compiled" else None

    def refuses(self, precision: str) -> str | None:
        """Why there is no torch program in `precision`: quantised layers are in the ONNX files alone."""
        if precision in DTYPES:
            return None
        return "its programs are floating-point throughout. Use --target trt, trt-rtx or ort-cpu for it."

    def _build(self, onnx_path: Path, engine_path: Path) -> Build:
        program = _existing_program(onnx_path)
        with contextlib.closing(self._session(program)) as session:
            session.run({INPUT: _probe(session.input_shapes[INPUT])})
        shutil.copyfile(program, engine_path)
        # Convolutions on a GPU multiply in TF32 by torch's own default; matrix products do not.
        flags = {"way": self.way, "threads": self.threads, "tf32": _device_type() == "cuda"}
        return Build(built_for=_this_device(), flags=flags, versions={"torch": _version()})

    def _layer_types(self, onnx_path: Path, engine_path: Path, build: Build, precision: str) -> LayerTypes:
        """By the program: every call computes in the type that it writes."""
        del onnx_path
        network, modules = _read_program(engine_path)
        calls = [node for node in network.graph.nodes if node.op == "call_function"]
        names = [(modules.get(node.name) or (node.name,))[0] for node in calls]
        return told_types(
            [
                (name, _element_type(node), any(kind in _operator(node) for kind in MULTIPLYING))
                for node, name in zip(calls, names, strict=True)
            ],
            precision,
            tf32=bool(build.flags.get("tf32")),
        )

    def _cannot_run(self, engine: Engine) -> str | None:
        if reason := self.unusable():
            return reason.rstrip(".")
        here = _this_device()
        for key, built in engine.built_for.items():
            if built != here.get(key):
                return f"it was checked on {key} '{built}', and this machine has '{here.get(key)}'"
        built = engine.versions.get("torch")
        return None if built == _version() else f"it was checked with torch {built}, and this one is {_version()}"

    def _open(self, engine_path: Path, *, weights: Path | None = None) -> Session:
        del weights  # the program holds them
        return self._session(engine_path)

    def _open_onnx(self, onnx_path: Path) -> Session:
        return self._session(_existing_program(onnx_path))

    def _session(self, path: Path) -> TorchSession:
        network, stacks = _read_program(path)
        kind = CudaTorchSession if _device_type() == "cuda" else TorchSession
        return kind(network, name=str(path), way=self.way, threads=self.threads, modules=stacks)


class TorchSession:
    """A torch program on its device; the inputs keep their memory from lap to lap."""

    def __init__(
        self,
        network: torch.fx.GraphModule,
        *,
        name: str,
        way: str = "eager",
        threads: int = 1,
        modules: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        import torch

        self._torch, self._name, self._way, self._threads = torch, name, way, threads
        self._modules = modules or {}
        self._device = _device_type()
        self._network: torch.fx.GraphModule | None = network.to(self._device)
        self._expected = {INPUT: _input_type(network)}
        self.input_names = [INPUT]
        self.output_names = [OUTPUT]
        self.input_shapes = {INPUT: self._expected[INPUT].shape}
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._runs: Callable[[Tensor], Tensor] | None = None
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The outputs for `feeds`, by name. Raises: ValueError for feeds that do not fit; MeasureFailed."""
        self.bind(feeds)
        return self.outputs()

    def bind(self, feeds: Mapping[str, Any]) -> None:
        """Copy `feeds` to the device and run once, which compiles or captures the network where that is the way.

        Raises: ValueError for feeds that do not fit; MeasureFailed when torch cannot run them.
        """
        self._open_network()
        array = checked_feeds({name: self._on_host(value) for name, value in feeds.items()}, self._expected)[INPUT]
        image = self._torch.from_numpy(array.copy())
        with self._running():
            if self._input is not None and self._runs is not None and self._input.shape == image.shape:
                self._input.copy_(image)
            else:
                self._input = bound = image.to(self._device)
                self._runs = self._prepared(bound)
            self._execute()
            self._synchronise()

    def lap(self) -> None:
        """One execution on the bound inputs, done when this returns. Raises: MeasureFailed."""
        with self._running():
            self._execute()
            self._synchronise()

    def profiled(self) -> ProfiledTorchSession:
        """A session of its own on the same program, whose laps are timed call by call.

        Raises: MeasureFailed for a compiled network or a CUDA graph, whose kernels are no longer those calls.
        """
        network = self._open_network()
        if self._way != "eager":
            raise MeasureFailed(
                f"torch runs it as {self._way}, and its kernels cannot be told apart by layers. "
                "Measure --target torch:eager for that."
            )
        kind = CudaProfiledTorchSession if self._device == "cuda" else ProfiledTorchSession
        return kind(network, name=self._name, threads=self._threads, modules=self._modules)

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the latest execution, by name, as copies."""
        if self._output is None:
            raise MeasureFailed(f"{self._name}: no inputs are bound. Call bind first.")
        return {OUTPUT: self._output.cpu().numpy().copy()}

    def close(self) -> None:
        """Give back the network and its buffers, and the number of threads that torch had before."""
        if self._network is not None:
            self._torch.set_num_threads(self._threads_before)
        self._network = self._input = self._output = self._runs = None

    def _prepared(self, image: Tensor) -> Callable[[Tensor], Tensor]:
        """The network as the way says, for images of that shape."""
        network = self._open_network()
        if self._way == "compiled":
            return _compiled(network, image)
        if self._way == "cuda-graph":
            return _captured(network, image)
        return network

    def _execute(self) -> None:
        if self._input is None or self._runs is None:
            raise MeasureFailed(f"{self._name}: no inputs are bound. Call bind first.")
        self._output = self._runs(self._input)

    def _synchronise(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Without autograd inside the block. Raises: MeasureFailed with torch's own words."""
        try:
            with self._torch.inference_mode():
                yield
        except (RuntimeError, ImportError, OSError) as err:
            raise MeasureFailed(f"{self._name}: torch {_version()} cannot run it: {_first_line(err)}.") from err

    def _on_host(self, value: Any) -> Any:
        """A tensor that lies on the GPU, in host memory: its values are copied to the input's own place anyway."""
        return value.cpu() if isinstance(value, self._torch.Tensor) and value.is_cuda else value

    def _open_network(self) -> torch.fx.GraphModule:
        if self._network is None:
            raise MeasureFailed(f"{self._name}: the session is closed. Open it again.")
        return self._network


class CudaTorchSession(TorchSession):
    """A torch program on a GPU, which times its laps itself by CUDA events."""

    def timed_lap_ms(self) -> float:
        """One execution on the bound inputs, done when this returns: its ms between two CUDA events.

        The stream is idle before, so what the device waits for the host to submit the calls counts as well.
        """
        begun, ended = self._events(2)
        with self._running():
            begun.record()
            self._execute()
            ended.record()
            self._synchronise()
        return float(begun.elapsed_time(ended))

    def round_trip(self) -> RoundTrip:
        """One execution with its input copied from pinned host memory before, and its output copied there after."""
        arrived, executed, begun, ended = self._events(4)
        if self._input is None or self._output is None:
            raise MeasureFailed(f"{self._name}: no inputs are bound. Call bind first.")
        with self._running():
            given, taken = (tensor.cpu().pin_memory() for tensor in (self._input, self._output))
            self._synchronise()
            host_ns = time.perf_counter_ns()
            begun.record()
            self._input.copy_(given, non_blocking=True)
            arrived.record()
            self._execute()
            executed.record()
            taken.copy_(self._output, non_blocking=True)
            ended.record()
            self._synchronise()
            host_ms = (time.perf_counter_ns() - host_ns) / 1e6
        return RoundTrip(float(arrived.elapsed_time(executed)), float(begun.elapsed_time(ended)), host_ms)

    def _events(self, count: int) -> list[Any]:
        return [self._torch.cuda.Event(enable_timing=True) for _ in range(count)]


class ProfiledTorchSession(TorchSession):
    """A torch program of which every call is timed, by the clock of the CPU that computes it."""

    def __init__(
        self,
        network: torch.fx.GraphModule,
        *,
        name: str,
        threads: int,
        modules: Mapping[str, tuple[str, ...]],
    ) -> None:
        super().__init__(network, name=name, threads=threads, modules=modules)
        self.runtime = f"torch {_version()}, eager, {self._where()}"
        self._laps: list[dict[str, Any]] = []

    def lap(self) -> None:
        """One execution on the bound inputs, done and noted down when this returns. Raises: MeasureFailed."""
        with self._running():
            self._execute()
            self._synchronise()
            self._laps.append(self._times())

    def profiled(self) -> ProfiledTorchSession:
        """Nothing: a profiled session is not profiled again. Raises: MeasureFailed."""
        raise MeasureFailed(f"{self._name}: this session is profiled already. Close it and open another.")

    def node_laps(self, laps: int) -> list[NodeLaps]:
        """The calls in the order they are made, with their times in the latest so many laps.

        Raises: MeasureFailed when there were fewer.
        """
        if len(self._laps) < laps:
            raise MeasureFailed(f"{self._name}: {len(self._laps)} laps were run, and the times of {laps} asked for.")
        told = self._laps[-laps:]
        return [
            NodeLaps(node.name, _operator(node), "", [lap[node.name] for lap in told], self._modules.get(node.name, ()))
            for node in self._open_network().graph.nodes
            if node.op == "call_function"
        ]

    def _prepared(self, image: Tensor) -> Callable[[Tensor], Tensor]:
        del image
        self._timer = _call_timer(self._open_network(), self._clock)
        return self._timer.run

    def _times(self) -> dict[str, float]:
        """The ms of every call in the lap that has just ended."""
        return {name: (ended - begun) / 1e6 for name, (begun, ended) in self._timer.calls.items()}

    def _clock(self) -> Any:
        return time.perf_counter_ns()

    def _where(self) -> str:
        return f"{self._threads} thread{'s' if self._threads > 1 else ''}"


class CudaProfiledTorchSession(ProfiledTorchSession):
    """A torch program of which every call is timed by CUDA events; a wait for the host's next call counts as well."""

    def _times(self) -> dict[str, float]:
        return {name: float(begun.elapsed_time(ended)) for name, (begun, ended) in self._timer.calls.items()}

    def _clock(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _where(self) -> str:
        return self._torch.cuda.get_device_name()


def program_path(onnx_path: Path) -> Path:
    """Where the torch program of a network lies: beside its ONNX file, `model.fp16.pt2` beside `model.fp16.onnx`."""
    return onnx_path.with_suffix(".pt2")


def write_program(
    model: nn.Module, example: Tensor, path: Path, *, dynamic_batch: bool = False, precision: str = "fp32"
) -> None:
    """`path` holds `model` in evaluation mode as a torch program; the model itself is left as it was.

    In fp16 and bf16 every layer is cast, as by `model.half()`; input and output stay float32. The same network gives
    the same bytes, and nothing in them names a file of this machine. The batch is that of `example`, or free.
    Raises: ValueError for a precision that has no torch program; ExportFailed with one sentence, and no file.
    """
    import torch

    from .onnx_export import evaluation_mode

    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r} has no torch program. Available: {', '.join(DTYPES)}.")
    if precision != "fp32":
        model = _in_precision(copy.deepcopy(model), getattr(torch, DTYPES[precision]))
    with evaluation_mode(model), torch.no_grad():
        program = _exported(model, example, dynamic_batch=dynamic_batch)
    _keep_module_paths_only(program, below="network" if precision != "fp32" else "")
    program.example_inputs = None  # they would be pickled
    file = io.BytesIO()
    torch.export.save(program, file)
    try:
        require_plain_program(file)
    except ValueError as err:
        raise ExportFailed(
            f"the torch program of the network would not be plain data: {err}. Leave --target torch out."
        ) from err
    write_atomic(path, file.getvalue())


def _exported(model: nn.Module, example: Tensor, *, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """Raises: ExportFailed with the first line of what torch says."""
    import torch

    shapes = None
    if dynamic_batch:
        # A batch of one would be taken for a constant.
        example = example.expand(2, *example.shape[1:]) if len(example) == 1 else example
        shapes = ({0: torch.export.Dim("batch")},)
    try:
        return torch.export.export(model, (example,), dynamic_shapes=shapes)
    except (RuntimeError, ValueError, TypeError, AssertionError) as err:
        raise ExportFailed(
            f"the network cannot be exported as a torch program: {_first_line(err)}. "
            "Replace the layer or the Python code it comes from."
        ) from err


def _in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model` in that type, between casts that leave its input and output float32."""
    import torch

    class InPrecision(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model.to(dtype)

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that the program gives its input
            return self.network(input.to(dtype)).to(torch.float32)

    return InPrecision()


def _keep_module_paths_only(program: torch.export.ExportedProgram, *, below: str) -> None:
    """Each node keeps the paths of the modules it came from, in place; those of a wrapper's child lose its name."""
    for node in program.graph.nodes:
        stack = {
            key: (path.removeprefix(below).removeprefix("."), "")
            for key, (path, _) in node.meta.get(MODULE_STACK, {}).items()
            if path.startswith(below)
        }
        kept = {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
        node.meta.clear()
        node.meta.update(kept, **({MODULE_STACK: stack} if stack else {}))


def _existing_program(onnx_path: Path) -> Path:
    path = program_path(onnx_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such torch program; a run writes one for the target torch. Prune again with --target torch."
        )
    return path


def _read_program(path: Path) -> tuple[torch.fx.GraphModule, dict[str, tuple[str, ...]]]:
    """The program's calls as a module, and for each call the torch modules it may belong to, the nearest first.

    Raises: BuildFailed for what is no program, what could run code, or what this torch cannot read.
    """
    import torch
    from torch.fx.graph import CodeGen

    try:
        file = plain_copy(path)
        with _without_warnings("torch.export"):  # it logs the traceback of what it raises
            program = torch.export.load(file)
        stacks = {node.name: node.meta.get(MODULE_STACK, {}) for node in program.graph.nodes}
        network = program.module(check_guards=False)
    except UNREADABLE as err:
        raise BuildFailed(f"{path}: torch {_version()} cannot open it: {_first_line(err)}.") from err
    # Called with one tensor and returning one: what wraps and unwraps arguments takes as long as a small layer.
    network.graph.set_codegen(CodeGen())
    _return_one_tensor(network.graph)
    return torch.fx.GraphModule(network, network.graph), _module_paths(network.graph, stacks)


def _return_one_tensor(graph: torch.fx.Graph) -> None:
    """Raises: BuildFailed for a program with several outputs."""
    returned = graph.output_node().args[0]
    outputs = list(returned) if isinstance(returned, list | tuple) else [returned]
    if len(outputs) != 1:
        raise BuildFailed(f"a torch program with {len(outputs)} outputs, one expected. Export the logits only.")
    graph.output_node().args = (outputs[0],)


def _module_paths(graph: torch.fx.Graph, stacks: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """For each call its own module, then those of the calls before it: a batch norm follows its convolution."""
    found: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        own = [path for path, _ in stacks.get(node.name, {}).values()][-1:]
        before = next((found[each.name] for each in node.all_input_nodes if each.name in found), ())
        found[node.name] = tuple(dict.fromkeys([*own, *before]))
    return found


def _input_type(network: torch.fx.GraphModule) -> TensorType:
    """Shape and dtype of the one input; an axis that is a symbol is free."""
    import torch

    value = next(node for node in network.graph.nodes if node.op == "placeholder").meta["val"]
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in value.shape)
    return TensorType(shape, torch.empty(0, dtype=value.dtype).numpy().dtype)


def _compiled(network: torch.fx.GraphModule, image: Tensor) -> Callable[[Tensor], Tensor]:
    """The network as `torch.compile` makes it for images of that shape: as one graph, or not at all."""
    import torch

    compiled = torch.compile(network, fullgraph=True, dynamic=False)
    with warnings.catch_warnings(), _without_warnings("torch.utils.cpp_extension"):  # of a CUDA toolkit beside no GPU
        # What torch 2.11 to 2.14 say of matrix products in FP32, which are so by intent.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
        compiled(image)
    return compiled


def _captured(network: torch.fx.GraphModule, image: Tensor) -> Callable[[Tensor], Tensor]:
    """The network as a CUDA graph on that very image: each call replays it, and gives the same output tensor."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(RUNS_BEFORE_CAPTURE):
            network(image)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = network(image)

    def replay(bound: Tensor) -> Tensor:
        assert bound is image, "a CUDA graph reads the tensor that it was captured with"
        graph.replay()
        return output

    return replay


def _call_timer(network: torch.fx.GraphModule, clock: Callable[[], Any]) -> Any:
    """What runs the network call by call: `calls` holds what `clock` said before and after each in the latest run."""
    import torch

    class CallTimer(torch.fx.Interpreter):
        def __init__(self) -> None:
            super().__init__(network)
            self.calls: dict[str, tuple[Any, Any]] = {}
            self._current = ""

        def run_node(self, n: torch.fx.Node) -> Any:
            self._current = n.name
            return super().run_node(n)

        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            begun = clock()
            result = super().call_function(target, args, kwargs)
            self.calls[self._current] = (begun, clock())
            return result

    return CallTimer()


@contextlib.contextmanager
def _without_warnings(logger: str) -> Iterator[None]:
    """What that logger of torch would warn of in the block is not told."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _operator(node: torch.fx.Node) -> str:
    """`aten.conv2d.default` -> `conv2d`."""
    return str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)


def _element_type(node: torch.fx.Node) -> str:
    """The type that a call writes, under the name of the precision where it is one."""
    name = str(getattr(node.meta.get("val"), "dtype", "unknown")).removeprefix("torch.")
    return next((precision for precision, dtype in DTYPES.items() if dtype == name), name)


def _probe(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros([1 if axis == -1 else axis for axis in shape], np.float32)


def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _this_device() -> dict[str, str]:
    """Where the laps run, as far as it decides about them."""
    if _device_type() == "cpu":
        return {"device": "cpu", "system": platform.system(), "architecture": platform.machine()}
    import torch

    major, minor = torch.cuda.get_device_capability()
    return {"device": "cuda", "gpu": torch.cuda.get_device_name(), "capabilities": f"sm{major}{minor}"}


@functools.cache
def _no_compiler(device: str) -> str | None:
    """Why `torch.compile` cannot make kernels here, as a sentence: it writes C++ for a CPU, Triton for a GPU."""
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX") or default
    if device == "cuda":
        import importlib.util

        if importlib.util.find_spec("triton") is None:
            return "torch.compile needs triton on a GPU, and it is not installed. Use --target torch:eager."
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and there is no {compiler}. Install one, or use torch:eager."
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "torch.compile needs Python's C headers, and there is no Python.h. Install them, or use torch:eager."
    return None


def _version() -> str:
    import torch

    return torch.__version__


def _first_line(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return " ".join(lines[0].split()).rstrip(".") if lines else type(err).__name__
