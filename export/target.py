"""What a target is: a runtime that builds an engine from an ONNX file, and opens it to run."""

from __future__ import annotations

import contextlib
import difflib
import functools
import platform
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import __version__
from .bundle import sha256_file, write_json_atomic, writing_atomically
from .errors import IntegrityError, MachineMismatch, TargetUnavailable

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
# What may follow the colon of a target's name: compute capabilities, or the one way in which torch runs a network.
CAPABILITIES: dict[str, tuple[str, ...]] = {
    "ort-cpu": (),
    "ort-cuda": (),
    "torch": ("eager", "compiled", "cuda-graph"),
    "trt": (),
    "trt-rtx": ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
}
# The instruction sets that decide how a runtime lays out channels; the rest changes speed, never the graph.
LAYOUT_ISA = ("avx", "avx2", "avx512f", "neon", "sve")


class TargetSpec(BaseModel):
    """A target by name, with the compute capabilities it is built for where the name takes any."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    capabilities: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ":".join(filter(None, [self.name, ",".join(self.capabilities)]))

    @property
    def slug(self) -> str:
        """The target as a part of a file name: `trt-rtx-sm86-sm89`."""
        return "-".join([self.name, *self.capabilities])


class BuildOptions(BaseModel):
    """How TensorRT builds an engine; `ort-cuda` takes `tf32` and `cuda_graph`, the others have nothing to choose.

    shapes: one optimization profile an entry, in trtexec's syntax: `input:1x3x224x224`, or smallest, expected and
    largest shape as `input:1x3x32x32/8x3x32x32/32x3x32x32`; several inputs are parted by commas. `builds`: how often a
    target that times its kernels builds, to keep the best that agrees. Which of them a target takes, it tells itself.
    Unit: `workspace_mib` is MiB.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    shapes: tuple[str, ...] = Field(default=(), strict=False)
    workspace_mib: int | None = Field(default=None, ge=1, le=1 << 33)
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"] = "none"
    version_compatible: bool = False
    refit: bool = False
    strip: bool = False
    tf32: bool = True
    timing_cache: bool = True
    runtime_cache: bool = True
    cuda_graph: bool = True
    builds: int = Field(default=1, ge=1, le=64)

    def chosen(self) -> dict[str, Any]:
        """The options that are not the default ones, as JSON has them."""
        return self.model_dump(mode="json", exclude_defaults=True)


class LayerTypes(BaseModel):
    """In which number types the layers of an engine really run.

    source: `engine` where the built engine was asked, `graph` where no device can open it and the ONNX file tells.
    layers: number of layers by the type they compute in. multiplying: the same, of convolutions and matrix products
    alone; `unknown` where no type is told, as of several that the engine fuses into one. other_type: names of
    multiplying layers that run in another type than was asked for. unfused: Q/DQ layers that stand alone. reformats:
    layers that only bring data into another layout; None where the graph cannot tell.
    sentence: what a user should know, in one or two sentences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["engine", "graph"]
    layers: dict[str, int]
    multiplying: dict[str, int]
    other_type: list[str]
    unfused: list[str]
    reformats: int | None
    sentence: str


class Engine(BaseModel):
    """What was built: the JSON that lies beside an engine file, which itself holds the runtime's bytes only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    precision: str
    file: str
    """Relative to the bundle, with forward slashes."""
    sha256: str
    bytes: int
    built_for: dict[str, str]
    flags: dict[str, Any]
    versions: dict[str, str]
    build_seconds: float
    layer_types: LayerTypes | None = None

    @property
    def from_onnx(self) -> bool:
        """Whether it was built from the ONNX file of its precision; torch's comes from the network itself."""
        return self.target.partition(":")[0] != "torch"

    @property
    def arithmetic(self) -> str:
        """What the engine multiplies with, which decides how closely it can agree: `tf32`, or its precision."""
        return arithmetic_of(self.precision, self.flags)


def arithmetic_of(precision: str, flags: Mapping[str, Any]) -> str:
    """What an engine with these flags multiplies with: `tf32`, or its precision."""
    return "tf32" if precision == "fp32" and flags.get("tf32") else precision


class TensorType(NamedTuple):
    """Shape (a free axis is -1) and dtype of one input or output."""

    shape: tuple[int, ...]
    dtype: np.dtype


class NodeLaps(NamedTuple):
    """One node that a runtime executed, and its time in each lap.

    `origin` is text in which the names of the ONNX nodes it stands for occur; empty for one that the runtime added.
    `modules` are torch modules where the runtime knows them itself: the node's own, then those it follows.
    """

    name: str
    operator: str
    origin: str
    laps_ms: list[float]
    modules: tuple[str, ...] = ()


class Session(Protocol):
    """An engine, or an ONNX file under the same settings, ready to run.

    `bind` makes inputs resident where the runtime computes; each `lap` is then one execution on them, done when it
    returns. A free axis is -1 in `input_shapes`.
    """

    input_names: list[str]
    output_names: list[str]
    input_shapes: dict[str, tuple[int, ...]]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The outputs for `feeds`, by name."""
        ...

    def bind(self, feeds: Mapping[str, Any]) -> None:
        """Copy `feeds` to where the runtime computes; the next laps read them there."""
        ...

    def lap(self) -> None:
        """One execution on the bound inputs; returns when it is done."""
        ...

    def profiled(self) -> ProfiledSession:
        """A session of its own on the same engine, whose laps are timed node by node; this one is left as it is."""
        ...

    def close(self) -> None:
        """Give back what the runtime holds; the session cannot be used afterwards."""
        ...


class ProfiledSession(Session, Protocol):
    """A session in which the runtime notes the time of every node, which makes its laps a little longer."""

    runtime: str
    """What timed it, as a report names it: `onnxruntime 1.31.1, 1 thread`."""

    def node_laps(self, laps: int) -> list[NodeLaps]:
        """The nodes in the order they ran, with their times in the latest so many laps; no lap may follow."""
        ...


class RoundTrip(NamedTuple):
    """One execution with its transfers, in ms: twice on the device's clock, once on the host's."""

    compute_ms: float
    with_transfers_ms: float
    """From before the inputs are copied until the outputs are back."""
    host_ms: float
    """The same, as the caller sees it."""


# How a session's laps are launched, in its own words, when they are launches of one recorded graph.
CUDA_GRAPH = "cuda graph"


@runtime_checkable
class CudaGraphs(Protocol):
    """What a session offers besides, when its laps may be launches of one recorded CUDA graph."""

    launch: str
    """How laps are launched: `cuda graph`, or `kernel by kernel: ` with the reason."""

    def plain_lap_ms(self) -> float:
        """One execution on the bound inputs that is launched kernel by kernel, timed by the device."""
        ...


@runtime_checkable
class DeviceTimer(Protocol):
    """What a session offers besides, when its device has a clock of its own: CUDA events."""

    def timed_lap_ms(self) -> float:
        """One execution on the bound inputs, timed by the device; done when this returns."""
        ...

    def round_trip(self) -> RoundTrip:
        """One execution with the inputs copied to the device before and the outputs copied back after it."""
        ...


class Build(NamedTuple):
    """What a runtime tells about an engine it has just written."""

    built_for: dict[str, str]
    flags: dict[str, Any]
    versions: dict[str, str]
    layer_types: LayerTypes | None = None


class Target(ABC):
    """A runtime on a kind of device. The public methods check, the ones with an underscore do the work."""

    builds_differ = False
    """Whether two builds of one file may run at different speeds, so that it is worth while to choose."""
    compiles = False
    """Whether processes of the runtime's own compile a network when inputs are first bound to it."""
    takes: tuple[str, ...] = ()
    """The build options that have an effect on this target; it ignores the others."""

    def __init__(self, spec: TargetSpec, *, options: BuildOptions | None = None) -> None:
        self.spec = spec
        self.options = options or BuildOptions()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.spec)!r})"

    @property
    def on_gpu(self) -> bool:
        """Whether laps run on a GPU, whose clocks are worth watching then."""
        return self.spec.name != "ort-cpu"

    def ignored(self, options: BuildOptions) -> list[str]:
        """Which of `options`, of those that are not the default ones, have no effect on this target."""
        return [name for name in options.chosen() if name not in self.takes]

    def taken(self, options: BuildOptions) -> BuildOptions:
        """`options` without those that have no effect on this target."""
        return options.model_copy(update={name: getattr(BuildOptions(), name) for name in self.ignored(options)})

    def why_ignored(self, option: str) -> str:
        """That a build option has no effect on this target and what to do instead, in one sentence or a few."""
        takes = f"It takes: {', '.join(self.takes)}." if self.takes else "It takes none."
        return f"build.{option} has no effect on target '{self.spec}'. {takes} Leave it out."

    @abstractmethod
    def unusable(self) -> str | None:
        """Why nothing can be built for this target here, as a sentence; None when it can. Answers at once."""

    def refuses(self, precision: str) -> str | None:
        """Why this target builds no engine in `precision`, as a sentence; None when it may. Answers at once."""
        del precision
        return None

    def build(self, onnx_path: Path, engine_path: Path, *, precision: str = "fp32") -> Engine:
        """The engine built from `onnx_path`, with its sidecar beside it; a failed build leaves neither.

        The folder of `engine_path` may be new; the bundle around it is there already.
        Raises: ValueError for an unknown precision or a name that does not end in `.engine`; FileNotFoundError
        without the ONNX file or the bundle; TargetUnavailable; BuildFailed with the runtime's own words.
        """
        _require_precision(precision)
        _require_file(onnx_path, what="ONNX file")
        sidecar = sidecar_path(engine_path)
        _require_folder(engine_path.parent.parent)
        require_usable(self)
        require_precision(self, precision)
        started = time.perf_counter()
        with _folder_for(engine_path), writing_atomically(engine_path) as unfinished:
            build = self._build(onnx_path, unfinished)
            engine = Engine(
                target=str(self.spec),
                precision=precision,
                file=f"{engine_path.parent.name}/{engine_path.name}",
                sha256=sha256_file(unfinished),
                bytes=unfinished.stat().st_size,
                built_for=build.built_for,
                flags=build.flags | ({"options": chosen} if (chosen := self.taken(self.options).chosen()) else {}),
                versions={"chip_deploy": __version__, **build.versions},
                build_seconds=round(time.perf_counter() - started, 3),
                layer_types=build.layer_types or self._layer_types(onnx_path, unfinished, build, precision),
            )
            sidecar.unlink(missing_ok=True)
        try:
            write_json_atomic(sidecar, engine)
        except OSError:
            engine_path.unlink(missing_ok=True)  # an engine without its sidecar is none
            raise
        return engine

    def cannot_run(self, engine: Engine) -> str | None:
        """Why `engine` cannot run on this machine, as a phrase without a full stop; None when it can."""
        if engine.target != str(self.spec):
            return f"{engine.file} was built for target '{engine.target}', not for '{self.spec}'"
        return self._cannot_run(engine)

    def open(self, engine_path: Path, *, weights: Path | None = None) -> Session:
        """A session on an engine file whose digest is the one in its sidecar: an engine is executable content.

        weights: the ONNX file that it was built from, for an engine that holds no weights; else the bundle's is taken.
        Raises: FileNotFoundError; IntegrityError; MachineMismatch with the reason of `cannot_run`; BuildFailed when
        the runtime rejects the file, or the weights are not those it was built with.
        """
        engine = read_engine(engine_path)
        reason = self.cannot_run(engine)
        if reason:
            raise MachineMismatch(
                f"{engine_path}: cannot run here: {reason}. Run it where it belongs, or build one for this machine."
            )
        return self._open(engine_path, weights=weights)

    def open_onnx(self, onnx_path: Path) -> Session:
        """A session on an ONNX file under the settings of the engines: the dense control of a measurement.

        Raises: FileNotFoundError; TargetUnavailable; BuildFailed.
        """
        _require_file(onnx_path, what="ONNX file")
        require_usable(self)
        return self._open_onnx(onnx_path)

    def onnx_opener(self, onnx_path: Path) -> Callable[[], Session]:
        """What opens a session on an ONNX file as `open_onnx` does, as often as it is called.

        A runtime that compiles the file does so once, here, so that every session runs the same engine.
        Raises: FileNotFoundError; TargetUnavailable; BuildFailed.
        """
        _require_file(onnx_path, what="ONNX file")
        require_usable(self)
        return self._onnx_opener(onnx_path)

    def engine_layer_types(self, engine_path: Path, onnx_path: Path) -> LayerTypes | None:
        """In which types the layers of a finished engine run, asked from the engine itself, which has to run here.

        None where the runtime does not tell. `onnx_path` is the file that it was built from.
        Raises: IntegrityError; BuildFailed when the engine cannot be opened.
        """
        del engine_path, onnx_path
        return None

    def cannot_run_own(self) -> str | None:
        """Why what is built here cannot run here although there is a GPU, as sentences; None when it can.

        Loads the runtime where that is cheap. Raises: TargetUnavailable when it does not load: nothing is built then.
        """
        return None

    def _onnx_opener(self, onnx_path: Path) -> Callable[[], Session]:
        return lambda: self._open_onnx(onnx_path)

    def _layer_types(self, onnx_path: Path, engine_path: Path, build: Build, precision: str) -> LayerTypes | None:
        """In which types the layers run, by the ONNX file; a target that can ask its engine does so instead."""
        from .layer_types import graph_types  # which reads the types of this module

        del engine_path
        return graph_types(onnx_path, precision, tf32=bool(build.flags.get("tf32")))

    @abstractmethod
    def _build(self, onnx_path: Path, engine_path: Path) -> Build: ...

    @abstractmethod
    def _cannot_run(self, engine: Engine) -> str | None: ...

    @abstractmethod
    def _open(self, engine_path: Path, *, weights: Path | None = None) -> Session: ...

    @abstractmethod
    def _open_onnx(self, onnx_path: Path) -> Session: ...


def parse_target(text: str) -> TargetSpec:
    """The target that `text` names; capabilities come out sorted, so one set has one spelling.

    >>> str(parse_target("trt-rtx:sm89,sm86"))
    'trt-rtx:sm86,sm89'

    Raises: ValueError naming the nearest target or capability.
    """
    name, colon, rest = text.strip().partition(":")
    if name not in CAPABILITIES:
        raise ValueError(
            f"unknown target {name!r}.{_nearest(name, CAPABILITIES)} Available: {', '.join(CAPABILITIES)}."
        )
    if not colon:
        return TargetSpec(name=name)
    known = CAPABILITIES[name]
    if not known:
        raise ValueError(f"target {text!r}: {name} takes nothing after a colon. Write --target {name}.")
    asked = [part.strip() for part in rest.split(",")]
    what = "way to run" if name == "torch" else "compute capability"
    for capability in asked:
        if capability not in known:
            raise ValueError(
                f"target {text!r}: unknown {what} {capability!r}.{_nearest(capability, known)} "
                f"Available: {', '.join(known)}."
            )
    if name == "torch" and len(set(asked)) > 1:
        raise ValueError(f"target {text!r}: one way to run at a time. Give --target torch:{asked[0]} and another.")
    return TargetSpec(name=name, capabilities=tuple(sorted(set(asked), key=known.index)))


def width_step(spec: TargetSpec, precision: str) -> int:
    """The multiple to which channel counts are rounded, because the target pays for channels in blocks of it.

    onnxruntime's CPU kernels, and torch's, block channels by the vector width (measured: 16 floats with AVX-512; 8
    otherwise), which suits a GPU as well; TensorRT stores channels in multiples of 8 in 16 bits, of 32 in int8
    (NVIDIA's advice) and of 16 in fp8.
    Raises: ValueError for an unknown precision.
    """
    _require_precision(precision)
    if spec.name in ("ort-cpu", "torch"):
        return 16 if "avx512f" in cpu_isa() else 8
    return {"int8": 32, "fp8": 16}.get(precision, 8)


def require_precision(target: Target, precision: str) -> None:
    """Nothing, if `target` takes that precision. Raises: ValueError for an unknown one; TargetUnavailable."""
    _require_precision(precision)
    reason = target.refuses(precision)
    if reason:
        raise TargetUnavailable(f"target '{target.spec}' takes no {precision}: {reason}")


def require_usable(target: Target) -> None:
    """Nothing, if engines can be built for `target` here. Raises: TargetUnavailable with the reason."""
    reason = target.unusable()
    if reason:
        raise TargetUnavailable(f"target '{target.spec}' cannot be used here: {reason}")


def require_effect(targets: Sequence[Target], options: BuildOptions) -> None:
    """Raises: ValueError naming the first build option, of those that are not the default, that no target takes."""
    taken = {name for target in targets for name in target.takes}
    option = next((name for name in options.chosen() if name not in taken), None)
    if option is None:
        return
    if len(targets) == 1:
        raise ValueError(targets[0].why_ignored(option))
    specs = ", ".join(f"'{target.spec}'" for target in targets)
    takes = f"They take: {', '.join(sorted(taken))}." if taken else "They take none."
    raise ValueError(f"build.{option} has no effect on targets {specs}. {takes} Leave it out.")


def left_out_options(target: Target, options: BuildOptions) -> list[str]:
    """The sentence that tells which of `options` are left out for a target, as a list; empty where all are taken."""
    ignored = [f"build.{name}" for name in target.ignored(options)]
    return [f"without effect on target '{target.spec}', and left out there: {', '.join(ignored)}"] if ignored else []


def engine_path(bundle: Path, spec: TargetSpec, precision: str) -> Path:
    """Where the engine for a target and precision lies in a bundle: `engines/ort-cpu.fp32.engine`."""
    return bundle / "engines" / f"{spec.slug}.{precision}.engine"


def sidecar_path(engine_path: Path) -> Path:
    """Where the JSON of an engine file lies. Raises: ValueError when the name does not end in `.engine`."""
    if engine_path.suffix != ".engine":
        raise ValueError(f"{engine_path}: an engine file is named *.engine. Change the name.")
    return engine_path.with_suffix(".json")


def built_with(engine: Engine) -> BuildOptions:
    """The options that an engine was built with, as its sidecar tells: those of its dense control have to be the same.

    Raises: IntegrityError when the sidecar tells of options that there are not.
    """
    try:
        return BuildOptions.model_validate(engine.flags.get("options", {}))
    except ValidationError as err:
        raise IntegrityError(f"{engine.file}: its sidecar tells of unknown options. Build the engine again.") from err


def read_engine(engine_path: Path) -> Engine:
    """The sidecar of an engine file, once the file has been found to be the one it describes.

    Raises: FileNotFoundError; IntegrityError when the sidecar is missing or unreadable, or the digest is another.
    """
    engine = read_sidecar(engine_path)
    digest = sha256_file(engine_path)
    if digest != engine.sha256:
        raise IntegrityError(
            f"{engine_path}: sha256 {digest[:12]}..., but its sidecar says {engine.sha256[:12]}.... "
            "Build the engine again; metadata belongs into the sidecar, never into the engine file."
        )
    return engine


def read_sidecar(engine_path: Path) -> Engine:
    """The sidecar of an engine file, which is not looked at.

    Raises: FileNotFoundError without the engine; IntegrityError when the sidecar is missing or unreadable.
    """
    _require_file(engine_path, what="engine")
    path = sidecar_path(engine_path)
    try:
        return Engine.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise IntegrityError(f"{engine_path}: its sidecar {path.name} is missing. Build the engine again.") from err
    except (ValidationError, UnicodeDecodeError) as err:
        raise IntegrityError(f"{path}: not the sidecar of an engine. Build the engine again.") from err


def checked_feeds(feeds: Mapping[str, Any], expected: Mapping[str, TensorType]) -> dict[str, np.ndarray]:
    """`feeds` as contiguous numpy arrays that fit `expected`; anything with `__dlpack__` on the CPU is taken.

    Raises: ValueError naming the first input that is missing, unknown, or has another dtype or shape.
    """
    require_names(feeds, expected)
    arrays = {name: _as_array(name, feeds[name]) for name in expected}
    for name, array in arrays.items():
        require_fit(name, array.shape, array.dtype, expected[name])
    return arrays


def require_names(feeds: Mapping[str, Any], expected: Mapping[str, TensorType]) -> None:
    """Nothing, if every input is there and no other. Raises: ValueError."""
    if feeds.keys() != expected.keys():
        raise ValueError(f"inputs {sorted(feeds)} given, {sorted(expected)} expected. Name the inputs as the network.")


def require_fit(name: str, shape: tuple[int, ...], dtype: np.dtype, expected: TensorType) -> None:
    """Nothing, if an array of that shape and type is one for input `name`. Raises: ValueError."""
    if dtype != expected.dtype:
        raise ValueError(f"input '{name}': dtype {dtype} given, {expected.dtype} expected. Convert it first.")
    same_rank = len(shape) == len(expected.shape)
    if not (same_rank and all(want in (-1, got) and got for got, want in zip(shape, expected.shape, strict=True))):
        raise ValueError(
            f"input '{name}': shape {shape} given, {_shape_text(expected.shape)} expected. "
            "Give one batch of the network's own size."
        )


@functools.cache
def cpu_isa() -> tuple[str, ...]:
    """The instruction sets of this CPU that decide how onnxruntime lays out channels, in the order of LAYOUT_ISA.

    Linux tells in /proc/cpuinfo. Elsewhere only what every CPU of the architecture has is claimed.
    """
    words: set[str] = set()
    with contextlib.suppress(OSError):
        words = set(
            re.findall(
                r"\w+",
                Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"),
            )
        )
    if "asimd" in words or platform.machine().lower() in ("arm64", "aarch64"):
        words.add("neon")
    return tuple(name for name in LAYOUT_ISA if name in words)


@contextlib.contextmanager
def _folder_for(path: Path) -> Iterator[None]:
    """The folder of `path` exists inside the block; one made for it goes again when the block fails."""
    made = not path.parent.exists()
    path.parent.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if made:
            path.parent.rmdir()
        raise


def _as_array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value)
    if not hasattr(value, "__dlpack__"):
        raise ValueError(f"input '{name}': a {type(value).__name__} given, a numpy array or __dlpack__ expected.")
    try:
        return np.ascontiguousarray(np.from_dlpack(value))
    except (BufferError, RuntimeError, TypeError) as err:
        raise ValueError(f"input '{name}': not readable on the CPU ({err}). Detach it and move it there.") from err


def _shape_text(shape: tuple[int, ...]) -> str:
    return f"({', '.join('any' if axis == -1 else str(axis) for axis in shape)})"


def _nearest(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    beginnings = [candidate for candidate in known if name and candidate.startswith(name.lower())]
    matches = beginnings or difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.4)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def _require_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} cannot be built. Available: {', '.join(PRECISIONS)}.")


def _require_file(path: Path, *, what: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {what}. Check the path, or build it first.")


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder. Give the folder of a bundle.")
