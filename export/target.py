"""What a target is: a runtime that builds an engine from an ONNX file, and opens it to run."""

from __future__ import annotations

import contextlib
import difflib
import functools
import platform
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from .. import __version__
from .bundle import sha256_file, write_json_atomic, writing_atomically
from .errors import IntegrityError, MachineMismatch, TargetUnavailable

PRECISIONS = ("fp32",)
# What may follow the colon of a target's name.
CAPABILITIES: dict[str, tuple[str, ...]] = {
    "ort-cpu": (),
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

    @property
    def arithmetic(self) -> str:
        """What the engine multiplies with, which decides how closely it can agree: `tf32`, or its precision."""
        return "tf32" if self.precision == "fp32" and self.flags.get("tf32") else self.precision


class TensorType(NamedTuple):
    """Shape (a free axis is -1) and dtype of one input or output."""

    shape: tuple[int, ...]
    dtype: np.dtype


class NodeLaps(NamedTuple):
    """One node that a runtime executed, and its time in each lap.

    `origin` is text in which the names of the ONNX nodes it stands for occur; empty for one that the runtime added.
    """

    name: str
    operator: str
    origin: str
    laps_ms: list[float]


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


class Target(ABC):
    """A runtime on a kind of device. The public methods check, the ones with an underscore do the work."""

    def __init__(self, spec: TargetSpec) -> None:
        self.spec = spec

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.spec)!r})"

    @abstractmethod
    def unusable(self) -> str | None:
        """Why nothing can be built for this target here, as a sentence; None when it can. Answers at once."""

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
                flags=build.flags,
                versions={"chip_deploy": __version__, **build.versions},
                build_seconds=round(time.perf_counter() - started, 3),
            )
            sidecar.unlink(missing_ok=True)
        write_json_atomic(sidecar, engine)
        return engine

    def cannot_run(self, engine: Engine) -> str | None:
        """Why `engine` cannot run on this machine, as a phrase without a full stop; None when it can."""
        if engine.target != str(self.spec):
            return f"{engine.file} was built for target '{engine.target}', not for '{self.spec}'"
        return self._cannot_run(engine)

    def open(self, engine_path: Path) -> Session:
        """A session on an engine file whose digest is the one in its sidecar: an engine is executable content.

        Raises: FileNotFoundError; IntegrityError; MachineMismatch with the reason of `cannot_run`; BuildFailed when
        the runtime rejects the file.
        """
        engine = read_engine(engine_path)
        reason = self.cannot_run(engine)
        if reason:
            raise MachineMismatch(
                f"{engine_path}: cannot run here: {reason}. Run it where it belongs, or build one for this machine."
            )
        return self._open(engine_path)

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

    def _onnx_opener(self, onnx_path: Path) -> Callable[[], Session]:
        return lambda: self._open_onnx(onnx_path)

    @abstractmethod
    def _build(self, onnx_path: Path, engine_path: Path) -> Build: ...

    @abstractmethod
    def _cannot_run(self, engine: Engine) -> str | None: ...

    @abstractmethod
    def _open(self, engine_path: Path) -> Session: ...

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
        takers = ", ".join(other for other, capabilities in CAPABILITIES.items() if capabilities)
        raise ValueError(f"target {text!r}: only {takers} takes compute capabilities. Write --target {name}.")
    asked = [part.strip() for part in rest.split(",")]
    for capability in asked:
        if capability not in known:
            raise ValueError(
                f"target {text!r}: unknown compute capability {capability!r}.{_nearest(capability, known)} "
                f"Available: {', '.join(known)}."
            )
    return TargetSpec(name=name, capabilities=tuple(sorted(set(asked), key=known.index)))


def width_step(spec: TargetSpec, precision: str) -> int:
    """The multiple to which channel counts are rounded, because the target pays for channels in blocks of it.

    onnxruntime's CPU kernels block channels by the vector width (measured: 16 floats with AVX-512; 8 otherwise);
    TensorRT stores channels in multiples of 8 for fp16 and 32 for int8 (NVIDIA's advice).
    Raises: ValueError for a precision that is none of fp32, fp16, int8.
    """
    if precision not in ("fp32", "fp16", "int8"):
        raise ValueError(f"unknown precision {precision!r}. Available: fp32, fp16, int8.")
    if spec.name == "ort-cpu":
        return 16 if "avx512f" in cpu_isa() else 8
    return 32 if precision == "int8" else 8


def require_usable(target: Target) -> None:
    """Nothing, if engines can be built for `target` here. Raises: TargetUnavailable with the reason."""
    reason = target.unusable()
    if reason:
        raise TargetUnavailable(f"target '{target.spec}' cannot be used here: {reason}")


def engine_path(bundle: Path, spec: TargetSpec, precision: str) -> Path:
    """Where the engine for a target and precision lies in a bundle: `engines/ort-cpu.fp32.engine`."""
    return bundle / "engines" / f"{spec.slug}.{precision}.engine"


def sidecar_path(engine_path: Path) -> Path:
    """Where the JSON of an engine file lies. Raises: ValueError when the name does not end in `.engine`."""
    if engine_path.suffix != ".engine":
        raise ValueError(f"{engine_path}: an engine file is named *.engine. Change the name.")
    return engine_path.with_suffix(".json")


def read_engine(engine_path: Path) -> Engine:
    """The sidecar of an engine file, once the file has been found to be the one it describes.

    Raises: FileNotFoundError; IntegrityError when the sidecar is missing or unreadable, or the digest is another.
    """
    _require_file(engine_path, what="engine")
    path = sidecar_path(engine_path)
    try:
        engine = Engine.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise IntegrityError(f"{engine_path}: its sidecar {path.name} is missing. Build the engine again.") from err
    except (ValidationError, UnicodeDecodeError) as err:
        raise IntegrityError(f"{path}: not the sidecar of an engine. Build the engine again.") from err
    digest = sha256_file(engine_path)
    if digest != engine.sha256:
        raise IntegrityError(
            f"{engine_path}: sha256 {digest[:12]}..., but its sidecar says {engine.sha256[:12]}.... "
            "Build the engine again; metadata belongs into the sidecar, never into the engine file."
        )
    return engine


def checked_feeds(feeds: Mapping[str, Any], expected: Mapping[str, TensorType]) -> dict[str, np.ndarray]:
    """`feeds` as contiguous numpy arrays that fit `expected`; anything with `__dlpack__` on the CPU is taken.

    Raises: ValueError naming the first input that is missing, unknown, or has another dtype or shape.
    """
    if feeds.keys() != expected.keys():
        raise ValueError(f"inputs {sorted(feeds)} given, {sorted(expected)} expected. Name the inputs as the network.")
    arrays = {name: _as_array(name, feeds[name]) for name in expected}
    for name, array in arrays.items():
        shape, dtype = expected[name]
        if array.dtype != dtype:
            raise ValueError(f"input '{name}': dtype {array.dtype} given, {dtype} expected. Convert it first.")
        fits = array.ndim == len(shape) and all(want in (-1, got) for got, want in zip(array.shape, shape, strict=True))
        if not fits or not array.size:
            raise ValueError(
                f"input '{name}': shape {array.shape} given, {_shape_text(shape)} expected. "
                "Give one batch of the network's own size."
            )
    return arrays


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
