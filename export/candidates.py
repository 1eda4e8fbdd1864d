"""Several builds of one ONNX file, of which the fastest that agrees is kept.

Standard TensorRT times its kernels while it builds, so two builds of a file choose other kernels, are of other sizes
and run at other speeds. The dense control of a measurement has to be chosen just so: the better of several against the
first of one would be no comparison.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from .agree import compare_outputs, require_agreement
from .bundle import WORK, write_json_atomic
from .errors import ParityFailed
from .layer_types import graph_types
from .target import PRECISIONS, DeviceTimer, Engine, Session, Target, sidecar_path

WARMUP_SECONDS, SECONDS_A_TURN = 0.2, 0.25
FEWEST_LAPS = 20

Opener = Callable[[], Session]
Check = Callable[[Session, Engine], Any]


class Candidate(BaseModel):
    """One of several builds: what it cost and how fast it is; `refused` says why one that disagrees was not timed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    build_seconds: float
    bytes: int
    p50_ms: float | None = None
    refused: str = ""


def build_best(target: Target, onnx_path: Path, engine_path: Path, *, precision: str = "fp32", check: Check) -> Engine:
    """The engine built from `onnx_path`: the fastest of `options.builds` that passes `check`, with all in its sidecar.

    `check` is given each candidate, open, and raises ParityFailed for one whose outputs are wrong. One build alone is
    made as `Target.build` makes it, unchecked.
    Cost: so many builds, and about half a second of laps each.
    Raises: as `Target.build`; ParityFailed when no candidate agrees; ValueError where builds cannot differ.
    """
    count = target.options.builds
    if count == 1:
        return target.build(onnx_path, engine_path, precision=precision)
    if not target.builds_differ:
        raise ValueError(
            f"target '{target.spec}': two builds of one file are the same, so there is nothing to choose from. "
            "Leave build.builds at 1."
        )
    with _work_folder(engine_path.parent.parent) as folder:
        paths = [folder / f"{number}.engine" for number in range(count)]
        engines = [target.build(onnx_path, path, precision=precision) for path in paths]
        openers = [_opener(target, path, onnx_path) for path in paths]
        refused = [_refusal(opener, engine, check) for opener, engine in zip(openers, engines, strict=True)]
        agreeing = [place for place in range(count) if not refused[place]]
        if not agreeing:
            raise ParityFailed(f"{onnx_path}: none of {count} builds agrees; the first: {refused[0]}")
        times_ms = dict(zip(agreeing, median_laps_ms([openers[place] for place in agreeing]), strict=True))
        best = min(times_ms, key=times_ms.__getitem__)
        candidates = [
            Candidate(
                build_seconds=engine.build_seconds,
                bytes=engine.bytes,
                p50_ms=times_ms.get(place),
                refused=refused[place],
            )
            for place, engine in enumerate(engines)
        ]
        return _placed(engines[best], paths[best], engine_path, {"kept": best, **_spread(candidates)})


def fastest(openers: Sequence[Opener], *, arithmetic: str) -> int:
    """The place of the one whose sessions run fastest, among those whose outputs are the same as those of most.

    arithmetic: by whose limits outputs are the same, as `agree.LIMITS` has them.
    Raises: ParityFailed when no more than half of them agree.
    """
    outputs = [_example_outputs(opener) for opener in openers]
    alike = [sum(_same(one, other, arithmetic) for other in outputs) for one in outputs]
    agreeing = [place for place, count in enumerate(alike) if 2 * count > len(openers)]
    if not agreeing:
        raise ParityFailed(
            f"{len(openers)} builds of one file disagree by more than {arithmetic} explains, and nothing tells which "
            "of them is right. Build more of them, or one."
        )
    times_ms = median_laps_ms([openers[place] for place in agreeing])
    return agreeing[times_ms.index(min(times_ms))]


def build_arithmetic(onnx_path: Path, *, tf32: bool) -> str:
    """Whose limits two builds of a file have to keep: those of the coarsest type in which it multiplies."""
    limits = {
        "fp32": "tf32" if tf32 else "fp32",
        "fp16": "fp16",
        "bf16": "bf16",
        "int8": "int8 file",
        "fp8": "fp8 file",
    }
    found = graph_types(onnx_path, "fp32").multiplying
    return next((limits[kind] for kind in reversed(PRECISIONS) if kind in found), limits["fp32"])


def median_laps_ms(openers: Sequence[Opener]) -> list[float]:
    """The median lap of each, in two rounds of turns so that a drift falls on all alike; one session is open at a time.

    Unit: ms, on the device's clock where it has one.
    """
    laps_ms: list[list[float]] = [[] for _ in openers]
    order = list(range(len(openers)))
    for turn in (order, order[::-1]):
        for place in turn:
            with contextlib.closing(openers[place]()) as session:
                session.bind(example_feeds(session))
                laps_ms[place] += _turn(session)
    return [float(np.median(laps)) for laps in laps_ms]


def example_feeds(session: Session) -> dict[str, np.ndarray]:
    """Random inputs, the same every time, of the shapes that a session is made for; a free axis that it tells nothing
    of counts as 1."""
    draws = np.random.default_rng(0)
    shapes = getattr(session, "expected_shapes", session.input_shapes)
    return {
        name: draws.standard_normal([max(axis, 1) for axis in shape], dtype=np.float32)
        for name, shape in shapes.items()
    }


def _turn(session: Session) -> list[float]:
    """The laps of a turn in ms, once the session has run for a while."""
    started = time.perf_counter()
    while time.perf_counter() - started < WARMUP_SECONDS:
        session.lap()
    laps_ms: list[float] = []
    started = time.perf_counter()
    while len(laps_ms) < FEWEST_LAPS or time.perf_counter() - started < SECONDS_A_TURN:
        laps_ms.append(_lap_ms(session))
    return laps_ms


def _lap_ms(session: Session) -> float:
    if isinstance(session, DeviceTimer):
        return session.timed_lap_ms()
    started = time.perf_counter_ns()
    session.lap()
    return (time.perf_counter_ns() - started) / 1e6


def _opener(target: Target, path: Path, onnx_path: Path) -> Opener:
    return lambda: target.open(path, weights=onnx_path)


def _example_outputs(opener: Opener) -> np.ndarray:
    with contextlib.closing(opener()) as session:
        return session.run(example_feeds(session))[session.output_names[0]]


def _same(one: np.ndarray, other: np.ndarray, arithmetic: str) -> bool:
    """Whether two outputs differ by no more than rounding; what is not finite is not even the same as itself."""
    try:
        require_agreement(compare_outputs(one, other), what="a build", precision=arithmetic)
    except ParityFailed:
        return False
    return True


def _refusal(opener: Opener, engine: Engine, check: Check) -> str:
    """Why a candidate is not to be kept, in the words of the check; empty when it agrees."""
    with contextlib.closing(opener()) as session:
        try:
            check(session, engine)
        except ParityFailed as err:
            return str(err)
    return ""


def _spread(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """All candidates, and how far the slowest that agrees is behind the fastest: 0.02 for 2 %."""
    times_ms = [each.p50_ms for each in candidates if each.p50_ms is not None]
    return {
        "spread": round(max(times_ms) / min(times_ms) - 1, 4),
        "candidates": [each.model_dump(exclude_defaults=True) for each in candidates],
    }


def _placed(engine: Engine, path: Path, engine_path: Path, builds: dict[str, Any]) -> Engine:
    """The engine under its own name, with its sidecar, which tells of the other builds."""
    placed = engine.model_copy(
        update={
            "file": f"{engine_path.parent.name}/{engine_path.name}",
            "flags": {**engine.flags, "builds": builds},
        }
    )
    engine_path.parent.mkdir(exist_ok=True)
    sidecar_path(engine_path).unlink(missing_ok=True)
    path.replace(engine_path)
    write_json_atomic(sidecar_path(engine_path), placed)
    return placed


@contextlib.contextmanager
def _work_folder(bundle: Path) -> Iterator[Path]:
    """An empty folder that is no part of what ships; it goes when the block ends."""
    work = bundle / WORK
    had = work.is_dir()
    folder = work / "builds"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder if had else work, ignore_errors=True)
