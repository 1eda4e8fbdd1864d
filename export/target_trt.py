"""Targets `trt` and `trt-rtx`: NVIDIA's TensorRT, for the GPU at hand or ahead of time without one.

One code path serves TensorRT 10 and 11 and TensorRT-RTX: where they differ, the API is asked what it has. Precision
is read from the ONNX graph (a strongly typed network). An engine is executable content: it is opened only after its
digest has been compared with its sidecar.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bundle import sha256_file
from .candidates import build_arithmetic, fastest
from .errors import BuildFailed, IntegrityError, ParityFailed, TargetUnavailable
from .layer_types import engine_types
from .nvidia import Gpu as Gpu
from .nvidia import driver_cuda
from .nvidia import find_gpu as find_gpu
from .shapes import parse_shapes
from .target import (
    CAPABILITIES,
    Build,
    BuildOptions,
    Engine,
    LayerTypes,
    Session,
    Target,
    TargetSpec,
    built_with,
    read_sidecar,
    require_effect,
)
from .trt_build import Plan, build_plan
from .trt_caches import CacheFile, runtime_cache_file, timing_cache_file
from .trt_session import SessionOptions, TrtSession, engine_information, plan_sha256

# What TensorRT-RTX documents for an engine that names no compute capability: 8.0, 8.6, 8.9, 12.0 and later.
PORTABLE = ("sm80", "sm86", "sm89")
PORTABLE_FROM = 120
# cuda-python's module of runtime calls: its name, and the one it had before 12.6.
CUDA_RUNTIME_NAMES = ("cuda.bindings.runtime", "cuda.cudart")
PRODUCTS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
# The first compute capability that an engine built with `ampere-plus` runs on.
AMPERE = 80
# What the ONNX file cannot tell of TensorRT-RTX (seen with 1.7.1; a test fails when it no longer holds).
DEMOTED = (
    "TensorRT-RTX may take FP16 weights, overflow and all, for a layer that is FP32 in the file but stands between "
    "FP16 values: check its outputs on the device."
)
# The first compute capability with arithmetic of that type; TensorRT-RTX refuses to build for an earlier one.
FIRST_WITH = {"bf16": 80, "fp8": 89}
# Build options that only one of the two has. TensorRT-RTX's API has more of them than have an effect, or work: that
# version_compatible fails for want of a library that no TensorRT-RTX comes with, and that the optimization level
# changes nothing, was seen with 1.7.1; tests fail when either no longer holds.
ONLY_STANDARD = ("hardware_compatibility", "timing_cache", "builds", "version_compatible", "optimization_level")
ONLY_RTX = ("runtime_cache",)
# Why, and what to do instead, for those that a user of TensorRT-RTX may well have a reason to ask for.
INSTEAD = {
    "hardware_compatibility": "is standard TensorRT's. Name the GPUs instead: --target trt-rtx:sm86,sm89.",
    "builds": (
        "has no effect: TensorRT-RTX times no kernels, so two builds differ in the names of internal tensors at most, "
        "and there is nothing to choose from. Leave it at 1."
    ),
    "version_compatible": (
        "is standard TensorRT's: TensorRT-RTX comes without the lean runtime that it takes. Leave it out, and run "
        "`chip-deploy build` again where TensorRT-RTX is another version."
    ),
}
# With these TensorRT-RTX 1.7.1 calls CUDA while it builds, and fails without a GPU; a test fails when it does not.
BUILT_ON_A_GPU = ("refit", "strip")


class TensorRTTarget(Target):
    """TensorRT (`trt`: builds on the GPU at hand) or TensorRT-RTX (`trt-rtx:sm86,...`: builds without any GPU)."""

    def __init__(self, spec: TargetSpec, *, options: BuildOptions | None = None) -> None:
        """Raises: ValueError for an option that this target cannot take, or shapes that are misspelt."""
        super().__init__(spec, options=options)
        for text in self.options.shapes:
            parse_shapes(text)
        require_effect([self], self.options)

    def unusable(self) -> str | None:
        """Why nothing can be built here; None when it can. Looks for files and a driver, and builds nothing."""
        if self._ahead_of_time:
            if not _installed(self._package):
                return "tensorrt-rtx is not installed. Install chip-deploy[trt-rtx] (x86-64, Linux or Windows)."
            return self._needs_a_gpu()
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

    def refuses(self, precision: str) -> str | None:
        """Why no engine is built in `precision`: a GPU that it is for has no arithmetic of that type."""
        if not self._ahead_of_time and isinstance(find_gpu(), str):
            return None  # `unusable` tells that
        first = FIRST_WITH.get(precision, 0)
        without = [name for name in self._built_for()["capabilities"].split(",") if _number(name) < first]
        if not without:
            return None
        return (
            f"{precision} needs compute capability {_dotted(f'sm{first}')} or later, and the target is for "
            f"{', '.join(map(_dotted, without))} too. Name others, or leave {precision} out."
        )

    @property
    def takes(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """TensorRT-RTX times no kernels, and names its GPUs; standard TensorRT compiles none when it runs."""
        other = ONLY_STANDARD if self._ahead_of_time else ONLY_RTX
        return tuple(name for name in BuildOptions.model_fields if name not in other)

    def why_ignored(self, option: str) -> str:
        """The same, with what TensorRT-RTX has instead."""
        if self._ahead_of_time and option in INSTEAD:
            return f"target '{self.spec}': build.{option} {INSTEAD[option]}"
        return super().why_ignored(option)

    def engine_layer_types(self, engine_path: Path, onnx_path: Path) -> LayerTypes | None:
        """By TensorRT's inspector, of an engine that was built where no GPU could open it."""
        engine = read_sidecar(engine_path)
        return self._told_types(
            engine_path,
            onnx_path,
            engine.precision,
            tf32=bool(engine.flags.get("tf32")),
            host_code=built_with(engine).version_compatible,
        )

    def cannot_run_own(self) -> str | None:
        """Why an engine that is built here cannot run here: no cuda-python, or a GPU that the target does not name."""
        self._runtime()
        gpu = find_gpu()
        if isinstance(gpu, str):
            return None  # nothing runs here, whatever is installed
        if reason := no_cudart():
            return reason
        if self._fits(self._built_for(), gpu):
            return None
        known = ", ".join(map(_dotted, self._built_for()["capabilities"].split(",")))
        return (
            f"its engines are for SM {known}, and this GPU has SM {_dotted(gpu.sm)} ({gpu.name}). "
            f"Use --target {self._target_for(gpu)}."
        )

    def _needs_a_gpu(self) -> str | None:
        """Why TensorRT-RTX cannot build with these options where there is no GPU; None when it can."""
        gpu = find_gpu()
        option = next((name for name in BUILT_ON_A_GPU if getattr(self.options, name)), None)
        if option is None or not isinstance(gpu, str):
            return None
        return (
            f"TensorRT-RTX needs a GPU to build with build.{option}, and there is none ({gpu}). "
            f"Give --set build.{option}=false, or run `chip-deploy build` on the device."
        )

    def _build(self, onnx_path: Path, engine_path: Path) -> Build:
        trt = self._runtime()
        plan = self._plan(trt, onnx_path)
        with engine_path.open("wb") as file:
            file.write(plan.data)
        return Build(
            built_for=self._built_for(),
            flags=plan.flags,
            versions={self._package: trt.__version__},
        )

    def _layer_types(self, onnx_path: Path, engine_path: Path, build: Build, precision: str) -> LayerTypes | None:
        """By the engine itself where a GPU here can open it, else by the ONNX file."""
        gpu = find_gpu()
        if isinstance(gpu, Gpu) and self._fits(build.built_for, gpu):
            tf32, host_code = bool(build.flags.get("tf32")), self.options.version_compatible
            if found := self._told_types(engine_path, onnx_path, precision, tf32=tf32, host_code=host_code):
                return found
        types = super()._layer_types(onnx_path, engine_path, build, precision)
        if types is None or not self._ahead_of_time or not {"fp16", "fp32"} <= types.multiplying.keys():
            return types
        return types.model_copy(update={"sentence": f"{types.sentence} {DEMOTED}"})

    def _told_types(
        self, engine_path: Path, onnx_path: Path, precision: str, *, tf32: bool, host_code: bool
    ) -> LayerTypes | None:
        """What the engine's own inspector tells; None where it tells nothing readable."""
        options = SessionOptions(host_code=host_code)
        told = engine_information(self._runtime(), engine_path.read_bytes(), name=str(onnx_path), options=options)
        with contextlib.suppress(ValueError):
            return engine_types(told, precision, onnx_path=onnx_path, tf32=tf32)
        return None

    def _cannot_run(self, engine: Engine) -> str | None:
        gpu = find_gpu()
        if isinstance(gpu, str):
            return gpu
        if not _installed(self._package):
            return f"{self._package} is not installed"
        if reason := no_cudart():
            return reason.rstrip(".")
        return self._other_machine(engine, gpu, self._runtime().__version__)

    def _open(self, engine_path: Path, *, weights: Path | None = None) -> Session:
        engine, plan = read_sidecar(engine_path), engine_path.read_bytes()
        if plan_sha256(plan) != engine.sha256:
            raise IntegrityError(f"{engine_path}: changed while it was opened. Build the engine again.")
        built = built_with(engine)
        options = self._session_options(engine.sha256, host_code=built.version_compatible)
        if built.strip:
            options = options._replace(weights=_weights(engine_path, engine, weights))
        return TrtSession(self._runtime(), load_cudart(), plan, name=str(engine_path), options=options)

    def _open_onnx(self, onnx_path: Path) -> Session:
        return self._onnx_opener(onnx_path)()

    def _onnx_opener(self, onnx_path: Path) -> Callable[[], Session]:
        """Sessions on one engine: two builds of one file may choose other kernels, and take their time.

        Where engines are the fastest of several builds that agree, this one is, too.
        """
        gpu = find_gpu()
        if isinstance(gpu, str):
            raise TargetUnavailable(f"{onnx_path}: cannot run on target '{self.spec}': {gpu}. Run it on the device.")
        if self.options.builds == 1:
            return self._plan_opener(onnx_path)
        openers = [self._plan_opener(onnx_path) for _ in range(self.options.builds)]
        try:
            return openers[fastest(openers, arithmetic=build_arithmetic(onnx_path, tf32=self.options.tf32))]
        except ParityFailed as err:
            raise ParityFailed(f"{onnx_path}: {err}") from err

    def _plan_opener(self, onnx_path: Path) -> Callable[[], Session]:
        trt = self._runtime()
        plan = self._plan(trt, onnx_path).data
        options = self._session_options(plan_sha256(plan), host_code=self.options.version_compatible)
        if self.options.strip:
            options = options._replace(weights=onnx_path)
        return lambda: TrtSession(trt, load_cudart(), plan, name=str(onnx_path), options=options)

    @property
    def builds_differ(self) -> bool:
        """Standard TensorRT times its kernels while it builds; TensorRT-RTX times none.

        Where the batch is free, two of its builds may name internal tensors otherwise; else they are the same bytes.
        """
        return not self._ahead_of_time

    @property
    def _ahead_of_time(self) -> bool:
        return bool(CAPABILITIES[self.spec.name])

    @property
    def _package(self) -> str:
        return "tensorrt_rtx" if self._ahead_of_time else "tensorrt"

    def _runtime(self) -> Any:
        """The module `tensorrt` or `tensorrt_rtx`. Raises: TargetUnavailable when its libraries do not load."""
        return _import(self._package)

    def _plan(self, trt: Any, onnx_path: Path) -> Plan:
        return build_plan(
            trt,
            onnx_path,
            self.options,
            capabilities=self.spec.capabilities,
            timing_cache=self._timing_cache(trt),
        )

    def _timing_cache(self, trt: Any) -> CacheFile | None:
        """Where this GPU's kernel timings are kept; TensorRT-RTX times nothing, and several builds each time anew."""
        gpu = find_gpu()
        wanted = self.options.timing_cache and self.options.builds == 1
        if self._ahead_of_time or not wanted or isinstance(gpu, str):
            return None
        return timing_cache_file(package=self._package, version=trt.__version__, gpu=gpu.name, sm=gpu.sm)

    def _session_options(self, engine_sha256: str, *, host_code: bool) -> SessionOptions:
        gpu = find_gpu()
        cache = None
        if self._ahead_of_time and self.options.runtime_cache and isinstance(gpu, Gpu):
            version = self._runtime().__version__
            cache = runtime_cache_file(
                package=self._package, version=version, gpu=gpu.name, sm=gpu.sm, engine_sha256=engine_sha256
            )
        return SessionOptions(cuda_graph=self.options.cuda_graph, host_code=host_code, cache=cache)

    def _built_for(self) -> dict[str, str]:
        if self._ahead_of_time:
            return {"capabilities": ",".join(self.spec.capabilities) or f"{','.join(PORTABLE)},sm{PORTABLE_FROM}+"}
        gpu = find_gpu()
        assert isinstance(gpu, Gpu), "unusable() was asked before"
        match self.options.hardware_compatibility:
            case "ampere-plus":
                return {"capabilities": f"sm{AMPERE}+"}
            case "same-compute-capability":
                return {"capabilities": gpu.sm}
        return {"gpu": gpu.name, "capabilities": gpu.sm}

    def _fits(self, built_for: dict[str, str], gpu: Gpu) -> bool:
        """Whether an engine runs on that GPU: on its own model where it names one, else by compute capability."""
        if "gpu" in built_for:
            return built_for["gpu"] == gpu.name
        return any(_covers(capability, gpu.sm) for capability in built_for.get("capabilities", "").split(","))

    def _other_machine(self, engine: Engine, gpu: Gpu, version: str) -> str | None:
        """What this machine has instead of what the engine was built for, and what to do; None when they fit."""
        product, built = PRODUCTS[self._package], engine.versions.get(self._package, "unknown")
        here = []
        if not self._fits(engine.built_for, gpu):
            here.append(f"SM {_dotted(gpu.sm)} ({gpu.name})")
        if not _version_fits(built, version, compatible=built_with(engine).version_compatible):
            here.append(f"{product} {version}")
        if not here:
            return None
        capabilities = engine.built_for.get("capabilities", "unknown")
        where = "SM " + ", ".join(_dotted(each) for each in capabilities.split(","))
        model = f" ({engine.built_for['gpu']})" if "gpu" in engine.built_for else ""
        return (
            f"built for {where}{model} with {product} {built}; this machine has {' and '.join(here)}: "
            f"rebuild with `chip-deploy build DIR --target {self._target_for(gpu)}`"
        )

    def _target_for(self, gpu: Gpu) -> str:
        """The target that builds for that GPU: TensorRT-RTX knows some capabilities, the standard one all."""
        if not self._ahead_of_time:
            return self.spec.name
        return f"{self.spec.name}:{gpu.sm}" if gpu.sm in CAPABILITIES[self.spec.name] else "trt"


def load_cudart() -> Any:
    """The module with CUDA's runtime calls, under its new name or its old one.

    Raises: TargetUnavailable where there is none, or none that this driver serves.
    """
    offered = driver_cuda()
    name = next(filter(_installed, CUDA_RUNTIME_NAMES), None)
    if name is None:
        raise TargetUnavailable(
            f"cuda-python is not installed, and TensorRT engines run through it. {_install_cuda_python(offered)}"
        )
    cudart = _import(name)
    # Any call that needs the driver would do; without one, `find_gpu` says so.
    error, *_ = cudart.cudaGetDeviceCount()
    if offered and error == cudart.cudaError_t.cudaErrorInsufficientDriver:
        raise TargetUnavailable(
            f"cuda-python is for a later CUDA than {offered[0]}.{offered[1]}, the newest that the driver serves. "
            f"{_install_cuda_python(offered)}"
        )
    return cudart


def no_cudart() -> str | None:
    """Why no engine can run through CUDA's runtime calls here, as a sentence with the remedy; None when it can."""
    try:
        load_cudart()
    except TargetUnavailable as err:
        return str(err)
    return None


def _install_cuda_python(offered: tuple[int, int] | None) -> str:
    """By itself, not with the extra `trt`: a Jetson has a TensorRT of its own. The newest that the driver serves."""
    below = f"<{offered[0]}.{offered[1] + 1}" if offered else ""
    return f"Install it with `pip install 'cuda-python{below}'`."


def _covers(capability: str, sm: str) -> bool:
    """Whether `sm86`, or `sm80+` for it and all later ones, holds a GPU of compute capability `sm`."""
    return _number(capability) <= _number(sm) if capability.endswith("+") else capability == sm


def _number(capability: str) -> int:
    return int(re.sub(r"\D", "", capability) or 0)


def _dotted(sm: str) -> str:
    """A compute capability as NVIDIA writes it: 8.6 for `sm86`, 12.0+ for `sm120+`."""
    return re.sub(r"^sm(\d+)(\d)", r"\1.\2", sm)


def _version_fits(built: str, here: str, *, compatible: bool) -> bool:
    """Whether the TensorRT here reads an engine of that version: the same one, or a later one where that was asked."""
    if not compatible:
        return built == here
    return _numbers(built) <= _numbers(here)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _weights(engine_path: Path, engine: Engine, given: Path | None = None) -> Path:
    """The ONNX file that has the weights of an engine without: the one given, or that of the bundle it lies in.

    Raises: BuildFailed when it is gone or another.
    """
    told = engine.flags.get("weights", {})
    path = given or engine_path.parent.parent / str(told.get("file", ""))
    if not path.is_file() or sha256_file(path) != told.get("sha256"):
        raise BuildFailed(
            f"{engine_path}: holds no weights, and {path} is not the file that has them. Put it there, or build anew."
        )
    return path


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
