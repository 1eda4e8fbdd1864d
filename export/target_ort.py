"""Targets `ort-cpu` and `ort-cuda`: onnxruntime on this CPU, or through its CUDA provider on the GPU at hand.

On a CPU the engine is the graph as onnxruntime optimised it there. On a GPU it is the ONNX file itself, once it has
run there: the graph that onnxruntime makes of it for CUDA holds nothing that is slow to make again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import BuildFailed, MeasureFailed, TargetUnavailable
from .layer_types import QUANTISING, told_types
from .layers import MULTIPLYING, LayerMap
from .nvidia import driver_cuda
from .onnx_graph import OnnxGraph, OnnxNode, read_graph
from .ort_session import (
    BLOCKED,
    CPU,
    CUDA,
    OrtCudaSession,
    OrtSession,
    ProfiledOrtCudaSession,
    ProfiledOrtSession,
    nodes_of_provider,
    open_session,
    profiling,
    session_options,
    version,
)
from .target import Build, Engine, LayerTypes, NodeLaps, Session, Target, TargetSpec, cpu_isa

if TYPE_CHECKING:
    import onnxruntime

# Nodes that onnxruntime adds to bring channels into its blocked layout, and back.
REFORMATTING = ("ReorderInput", "ReorderOutput")
# How it names what it computes in float32 because it has no kernel for 16 bits.
FLOATED = "InsertedPrecisionFreeCast_"
# The libraries that the CUDA provider loads by itself, by the CUDA generation it was built for.
CUDA_LIBRARIES = ("libcudart.so.{}", "libcublasLt.so.{}", "libcublas.so.{}", "libcurand.so.10", "libcudnn.so.9")


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
        return _no_provider(CPU)

    def refuses(self, precision: str) -> str | None:
        """Why this target builds no engine in `precision`: what the CPU provider has no convolution for."""
        if precision in ("fp32", "fp16", "int8"):
            return None
        return f"onnxruntime has no {precision} convolution for a CPU. Use a GPU target for it."

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
            versions={"onnxruntime": version()},
        )

    def _layer_types(self, onnx_path: Path, engine_path: Path, build: Build, precision: str) -> LayerTypes:
        """By the optimised graph, which tells what becomes of a precision: this CPU has kernels for few of them."""
        del build
        return optimised_types(read_graph(engine_path), LayerMap(read_graph(onnx_path)), precision)

    def _cannot_run(self, engine: Engine) -> str | None:
        if reason := self.unusable():
            return reason.rstrip(".")
        here = _this_cpu()
        for key, built in engine.built_for.items():
            if built != here.get(key):
                return f"it was optimised for {key} '{built}', and this machine has '{here.get(key)}'"
        built = engine.versions.get("onnxruntime")
        if built != version():
            return f"it was optimised by onnxruntime {built}, and this one is {version()}"
        return None

    def _open(self, engine_path: Path, *, weights: Path | None = None) -> Session:
        del weights  # the file holds them
        return self._session(engine_path, optimise=False)

    def _open_onnx(self, onnx_path: Path) -> Session:
        return self._session(onnx_path, optimise=True)

    def _session(self, path: Path, *, optimise: bool, save_to: Path | None = None) -> OrtSession:
        options = session_options(threads=self.threads, optimise=optimise)
        if save_to is not None:
            options.optimized_model_filepath = str(save_to)
        profiled = functools.partial(self._profiled, path, optimise=optimise)
        return OrtSession(open_session(path, options), name=str(path), profiled=profiled)

    def _profiled(self, path: Path, *, optimise: bool) -> ProfiledOrtSession:
        with profiling(session_options(threads=self.threads, optimise=optimise)) as (options, folder):
            return ProfiledOrtSession(
                open_session(path, options), name=str(path), folder=folder, runtime=_runtime(self.threads)
            )


class OrtCudaTarget(Target):
    """onnxruntime's CUDA provider on the first GPU, with inputs and outputs that stay there.

    A session that onnxruntime gave to the CPU instead, as it does in silence, is refused. Options: `tf32`, and
    `cuda_graph`, which captures the whole network where none of its nodes needs the CPU.
    """

    takes = ("tf32", "cuda_graph")

    def unusable(self) -> str | None:
        """Why the CUDA provider cannot be used here; None when it can. Loads the libraries that it needs."""
        from .target_trt import find_gpu

        if reason := _no_provider(CUDA):
            return reason
        gpu = find_gpu()
        reason = gpu if isinstance(gpu, str) else _cuda_mismatch()
        if not reason:
            return None
        return f"{reason}. Use --target ort-cpu here, or run `chip-deploy build DIR --target ort-cuda` on the device."

    def refuses(self, precision: str) -> str | None:
        """Why this target builds no engine in `precision`: what the CUDA provider has no convolution for."""
        if precision in ("fp32", "fp16"):
            return None
        if precision == "bf16":
            return "the CUDA provider convolves in bfloat16 from opset 22 on, and pools in none. Use --target trt."
        return f"the CUDA provider has no {precision} convolution and would multiply in float. Use --target trt."

    def _build(self, onnx_path: Path, engine_path: Path) -> Build:
        with contextlib.closing(self._session(onnx_path)) as session:
            session.run(session.random_feeds())
            graph = session.uses_graph
            _require_lap(session, onnx_path)
        on_cpu = self._nodes_on_cpu(onnx_path)
        products = [name for name, operator in on_cpu.items() if any(kind in operator for kind in MULTIPLYING)]
        if products:
            raise BuildFailed(
                f"{onnx_path}: onnxruntime {version()} computes {', '.join(products)} on the CPU, because its CUDA "
                "provider cannot. Use --target trt."
            )
        shutil.copyfile(onnx_path, engine_path)
        flags = {"tf32": self.options.tf32, "cuda_graph": graph, "nodes_on_cpu": sorted(on_cpu)}
        return Build(built_for=_this_gpu(), flags=flags, versions={"onnxruntime": version()})

    def _cannot_run(self, engine: Engine) -> str | None:
        if reason := self.unusable():
            return reason.partition(". Use --target")[0].rstrip(".")
        here = _this_gpu()
        for key, built in engine.built_for.items():
            if built != here.get(key):
                return f"it was checked on {key} '{built}', and this machine has '{here.get(key)}'"
        built = engine.versions.get("onnxruntime")
        return None if built == version() else f"it was checked by onnxruntime {built}, and this one is {version()}"

    def _open(self, engine_path: Path, *, weights: Path | None = None) -> Session:
        del weights  # the file holds them
        return self._session(engine_path)

    def _open_onnx(self, onnx_path: Path) -> Session:
        return self._session(onnx_path)

    def _session(self, path: Path) -> OrtCudaSession:
        """With a CUDA graph where the options ask for one and onnxruntime can capture this network, else without."""
        profiled = functools.partial(self._profiled, path)
        if self.options.cuda_graph:
            with contextlib.suppress(BuildFailed):  # a file that cannot be opened at all is told below
                session = self._inference(path, session_options(threads=1, optimise=True), cuda_graph=True)
                return OrtCudaSession(session, name=str(path), profiled=profiled, uses_graph=True)
        session = self._inference(path, session_options(threads=1, optimise=True), cuda_graph=False)
        return OrtCudaSession(session, name=str(path), profiled=profiled, uses_graph=False)

    def _profiled(self, path: Path) -> ProfiledOrtCudaSession:
        with profiling(session_options(threads=1, optimise=True)) as (options, folder):
            session = self._inference(path, options, cuda_graph=False)
            runtime = f"{_runtime()}, {_this_gpu()['gpu']}"
            return ProfiledOrtCudaSession(session, name=str(path), folder=folder, runtime=runtime)

    def _nodes_on_cpu(self, path: Path) -> dict[str, str]:
        """The nodes that the session gives to the CPU, with their operators, from a profile of one run."""
        with contextlib.closing(self._profiled(path)) as session:
            session.run(session.random_feeds())
            return nodes_of_provider(session.trace(), CPU)

    def _inference(
        self, path: Path, options: onnxruntime.SessionOptions, *, cuda_graph: bool
    ) -> onnxruntime.InferenceSession:
        """Raises: BuildFailed; TargetUnavailable when the CUDA provider does not load."""
        settings = {
            "device_id": "0",
            "use_tf32": str(int(self.options.tf32)),
            "enable_cuda_graph": str(int(cuda_graph)),
        }
        session = open_session(path, options, provider=(CUDA, settings))
        if session.get_providers()[:1] != [CUDA]:
            raise TargetUnavailable(
                f"{path}: onnxruntime {version()} fell back to the CPU: its CUDA provider does not load, which needs "
                f"CUDA {_cuda_built_for() or 'of its generation'} and cuDNN 9. Install them, or use --target ort-cpu."
            )
        return session


def optimised_types(optimised: OnnxGraph, layers: LayerMap, precision: str) -> LayerTypes:
    """The types in which the nodes of a graph run that onnxruntime has optimised for a CPU; `layers` are the file's.

    A Q/DQ node that is left there runs by itself, that of a weight as well; one for its blocked layout reformats.
    """
    nodes = [node for node in optimised.nodes if node.operator not in QUANTISING]
    reformats = [node for node in nodes if node.operator in REFORMATTING]
    working = [node for node in nodes if node not in reformats and node.operator not in ("Cast", "Constant")]
    names = layers.layers([NodeLaps(node.name, node.operator, _origin(node), []) for node in working])
    return told_types(
        [
            (" + ".join(name) or node.name or node.operator, _ran_type(node, optimised), _multiplies(node))
            for node, name in zip(working, names, strict=True)
        ],
        precision,
        unfused=[node.name for node in optimised.nodes if node.operator in QUANTISING],
        reformats=len(reformats),
    )


def _multiplies(node: OnnxNode) -> bool:
    return any(kind in node.operator for kind in ("Conv", "Gemm", "MatMul"))


def _ran_type(node: OnnxNode, graph: OnnxGraph) -> str:
    """The type in which a node computes: int8 for onnxruntime's own quantised operators, else that of what it reads."""
    if re.match(r"Q[A-Z]|.*Integer", node.operator):
        return "int8"
    return next((graph.types[name] for name in node.inputs if graph.types.get(name)), "unknown")


def _origin(node: OnnxNode) -> str:
    """Text with the names of the ONNX node that became this one: its own, and that of the tensor it writes."""
    return f"{node.name.removesuffix(BLOCKED)} {' '.join(node.outputs)}".replace(FLOATED, "")


def _require_lap(session: OrtCudaSession, onnx_path: Path) -> None:
    """Raises: BuildFailed when a lap fails that had run without a CUDA graph, or for any other reason."""
    try:
        session.lap()
    except MeasureFailed as err:
        advice = " Build without a CUDA graph: --set build.cuda_graph=false." if session.uses_graph else ""
        raise BuildFailed(f"{onnx_path}: {str(err).rstrip('.')}.{advice}") from err


def _require_same_outputs(optimised: OrtSession, reopened: OrtSession, onnx_path: Path) -> None:
    """Raises: BuildFailed unless both sessions give the same bits for a seeded random input."""
    feeds = optimised.random_feeds()
    expected, given = optimised.run(feeds), reopened.run(feeds)
    for name, output in expected.items():
        if not np.array_equal(output, given[name], equal_nan=output.dtype.kind == "f"):
            raise BuildFailed(
                f"{onnx_path}: output '{name}' changes when the graph that onnxruntime {version()} optimised is "
                "saved and opened again. Use another onnxruntime version."
            )


def _no_provider(provider: str) -> str | None:
    """Why this onnxruntime cannot be used with that provider, as a sentence with the remedy; None when it can."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return "onnxruntime is not installed. Install chip-deploy[ort]."
    except ImportError as err:
        return f"onnxruntime does not load ({err}). Install chip-deploy[ort] again."
    if provider in onnxruntime.get_available_providers():
        return None
    if provider == CPU:
        return "this onnxruntime has no CPU provider. Install chip-deploy[ort]."
    return "this onnxruntime has no CUDA provider. Install onnxruntime-gpu in place of onnxruntime."


def _cuda_mismatch() -> str | None:
    """Why the CUDA provider would not load beside this driver and these libraries, as a phrase; None when it would."""
    built_for, offered = _cuda_built_for(), driver_cuda()
    if built_for and offered and offered[0] < int(built_for):
        return (
            f"onnxruntime {version()} needs CUDA {built_for}, and the driver is for CUDA {offered[0]}.{offered[1]} at "
            "most: update the driver"
        )
    missing = _missing_library(built_for) if built_for and sys.platform == "linux" else None
    if missing is None:
        return None
    return (
        f"onnxruntime {version()} finds no {missing}: install onnxruntime-gpu[cuda,cudnn], or CUDA {built_for} itself"
    )


@functools.cache
def _missing_library(generation: str) -> str | None:
    """The first library of the CUDA provider that does not load, once those of installed packages have been loaded."""
    import onnxruntime

    # Before 1.21 nothing loads them but the system itself.
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            preload()
    for library in CUDA_LIBRARIES:
        name = library.format(generation)
        try:
            ctypes.CDLL(name)
        except OSError:
            return name
    return None


def _cuda_built_for() -> str:
    """The CUDA generation that this onnxruntime was built for, `13`; empty where it does not say."""
    import onnxruntime

    return str(getattr(onnxruntime, "cuda_version", "") or "").partition(".")[0]


def _this_cpu() -> dict[str, str]:
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "isa": " ".join(cpu_isa()),
    }


def _this_gpu() -> dict[str, str]:
    from .target_trt import find_gpu

    gpu = find_gpu()
    if isinstance(gpu, str):
        raise TargetUnavailable(f"target 'ort-cuda' cannot be used here: {gpu}. Run it on the device.")
    return {"gpu": gpu.name, "capabilities": gpu.sm}


def _runtime(threads: int | None = None) -> str:
    """The runtime as a report names it: `onnxruntime 1.31.1, 1 thread`."""
    if threads is None:
        return f"onnxruntime {version()}"
    return f"onnxruntime {version()}, {threads} thread{'s' if threads > 1 else ''}"
