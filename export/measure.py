"""Latency of two networks measured in turns: the protocol, every lap, and what the laps allow to say.

A lap is one execution on inputs that lie where the runtime computes, on one stream, timed on the host from the call
until it returns. Dense and pruned take turns in blocks of laps, in the order A B B A, so that a drift of the machine
falls on both alike; a block of one and its neighbour of the other carry the same number and stay together in the
statistics.
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .bundle import write_atomic
from .errors import MeasureFailed
from .laps import LapMs, Measurement, Quantiles, Speedup, bootstrap_speedup, summarise
from .machine import Machine
from .target import Session

# Fewest laps in a block, however slow the network: fewer have no median to speak of.
BLOCK_LAPS = 5
# Fewest pairs of blocks, however fast the network: a percentile bootstrap over fewer is too narrow.
PAIRS = 20
# After so many windows without two neighbours that agree, the warm-up is given up.
WARMUP_WINDOWS = 40
# An interval around 1 that is wider than this part of its estimate says nothing, not even `not faster`.
UNDECIDED_WIDTH = 0.10
NAMES = ("dense", "pruned")

Clock = Callable[[], int]
Progress = Callable[[float], None]


class LatencyProtocol(BaseModel):
    """How a latency was measured; a number without it means nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: Literal["chip-deploy.latency/1"] = "chip-deploy.latency/1"
    warmup_ms: float = Field(default=200.0, ge=0)
    """Each side runs at least so long before anything counts, and until two windows agree."""
    window_tolerance: float = Field(default=0.03, gt=0)
    """Medians of two consecutive windows of the warm-up agree when they differ by at most this part."""
    seconds: float = Field(default=3.0, gt=0)
    """Timed laps of each side add up to at least this."""
    laps: int = Field(default=200, ge=1)
    """Fewest laps of each side."""
    block_ms: float = Field(default=50.0, gt=0)
    """About how long one side runs before it is the other's turn, and how long a window of the warm-up is."""
    batch: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    resamples: int = Field(default=2000, ge=100)
    """Of the bootstrap."""
    seed: int = Field(default=0, ge=0)

    @property
    def turn_ms(self) -> float:
        """`block_ms`, or less where `seconds` would not make enough blocks."""
        return min(self.block_ms, 1e3 * self.seconds / PAIRS)


class Comparison(BaseModel):
    """Dense beside pruned, and whether the pruned one is faster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dense: Quantiles
    pruned: Quantiles
    speedup: Speedup
    verdict: Literal["faster", "not faster", "unstable"]
    reason: str
    warmed: bool
    """Whether both sides settled before anything counted."""


class RecordedLaps(BaseModel):
    """A file `engines/NAME.latency.json`: every lap of both sides, how and where they were run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: LatencyProtocol
    machine: Machine
    dense_laps_ms: list[LapMs]
    dense_blocks: list[int]
    pruned_laps_ms: list[LapMs]
    pruned_blocks: list[int]

    @property
    def dense(self) -> Measurement:
        """The laps of the dense network."""
        return Measurement(protocol=self.protocol.id, laps_ms=self.dense_laps_ms, blocks=self.dense_blocks)

    @property
    def pruned(self) -> Measurement:
        """The laps of the pruned network."""
        return Measurement(protocol=self.protocol.id, laps_ms=self.pruned_laps_ms, blocks=self.pruned_blocks)


def compare_latency(
    dense: Session,
    pruned: Session,
    protocol: LatencyProtocol,
    *,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter_ns,
) -> tuple[Comparison, Measurement, Measurement]:
    """Dense against pruned, and the laps of each; both sessions have their inputs bound.

    Each side is warmed up; then blocks run A B B A until both sides have the seconds and the laps of the protocol.
    A block starts with one lap that is not timed, because the other network has just used the caches. Garbage
    collection is off meanwhile. `progress` is called between blocks with the fraction done; `clock` counts ns.
    Raises: MeasureFailed when laps are too short for the clock, or when a session cannot run.
    """
    with _no_garbage_collection():
        sides = [_Side(session, protocol, clock) for session in (dense, pruned)]
        _take_turns(sides[0], sides[1], protocol, progress)
    dense_laps, pruned_laps = (side.measurement() for side in sides)
    doubts = [f"{name} {side.unsettled}" for name, side in zip(NAMES, sides, strict=True) if side.unsettled]
    return compare_laps(dense_laps, pruned_laps, protocol, unsettled=" and ".join(doubts)), dense_laps, pruned_laps


def compare_laps(
    dense: Measurement, pruned: Measurement, protocol: LatencyProtocol, *, unsettled: str = ""
) -> Comparison:
    """What the laps of both sides say; `unsettled` is what the warm-up had against them, as a phrase.

    Raises: ValueError for sides whose blocks are not paired.
    """
    dense_q, pruned_q = summarise(dense.laps_ms), summarise(pruned.laps_ms)
    speedup = bootstrap_speedup(dense, pruned, resamples=protocol.resamples, seed=protocol.seed)
    doubt = unsettled or _undecided(dense, pruned, speedup)
    faster = f"{speedup.estimate:.3f} ({100 * speedup.level:g} % interval {speedup.low:.3f} to {speedup.high:.3f})"
    medians = f"p50 {_ms(pruned_q.p50)} against {_ms(dense_q.p50)} of dense"
    if doubt:
        verdict, reason = "unstable", f"no verdict, because {doubt}; speed-up {faster}, {medians}"
    elif speedup.low > 1:
        verdict, reason = "faster", f"speed-up {faster}, {medians}"
    elif speedup.high < 1:
        verdict, reason = "not faster", f"slower than dense: speed-up {faster}, {medians}"
    else:
        verdict, reason = "not faster", f"no difference to be seen: speed-up {faster}, {medians}"
    return Comparison(
        dense=dense_q, pruned=pruned_q, speedup=speedup, verdict=verdict, reason=f"{reason}.", warmed=not unsettled
    )


def laps_path(engine_path: Path) -> Path:
    """Where the laps of an engine lie: `engines/NAME.latency.json` beside `engines/NAME.engine`."""
    return engine_path.with_suffix(".latency.json")


def write_laps(
    path: Path, *, protocol: LatencyProtocol, machine: Machine, dense: Measurement, pruned: Measurement
) -> None:
    """`path` holds every lap of both sides with protocol and machine, one line a list."""
    laps = RecordedLaps(
        protocol=protocol,
        machine=machine,
        dense_laps_ms=dense.laps_ms,
        dense_blocks=dense.blocks,
        pruned_laps_ms=pruned.laps_ms,
        pruned_blocks=pruned.blocks,
    )
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in laps.model_dump(mode="json").items())
    write_atomic(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read_laps(path: Path) -> RecordedLaps:
    """The laps in a file of `write_laps`. Raises: FileNotFoundError; ValueError when it is no such file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no laps here. Run `chip-deploy measure` on the bundle.")
    try:
        return RecordedLaps.model_validate_json(path.read_bytes())
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise ValueError(f"{path}: no laps of this version ({where}: {first['msg']}). Measure again.") from err


class _Side:
    """One of the two, warm and ready to take its turns: how many laps a block has, and the laps so far."""

    def __init__(self, session: Session, protocol: LatencyProtocol, clock: Clock) -> None:
        self.session = session
        self.clock = clock
        lap_ms, self.unsettled = _warm_up(session, protocol, clock)
        self.block_laps = max(BLOCK_LAPS, round(protocol.turn_ms / lap_ms)) if lap_ms else BLOCK_LAPS
        self.laps_ns: list[int] = []
        self.blocks: list[int] = []
        self.total_ns = 0

    def take_turn(self, block: int) -> None:
        """One block of laps; the first lap finds the other network in the caches, and is not timed."""
        self.session.lap()
        laps_ns = _timed_laps(self.session, self.clock, self.block_laps)
        if min(laps_ns) <= 0:
            raise MeasureFailed("a lap takes less time than the clock can tell. Measure a larger batch.")
        self.laps_ns += laps_ns
        self.blocks += [block] * len(laps_ns)
        self.total_ns += sum(laps_ns)

    def done(self, protocol: LatencyProtocol) -> float:
        """The fraction of its laps and seconds that it has; 1 or more when it has both."""
        return min(len(self.laps_ns) / protocol.laps, self.total_ns / (protocol.seconds * 1e9))

    def measurement(self) -> Measurement:
        """Its laps in ms, each with its block."""
        return Measurement(laps_ms=[lap / 1e6 for lap in self.laps_ns], blocks=self.blocks)


def _warm_up(session: Session, protocol: LatencyProtocol, clock: Clock) -> tuple[float, str]:
    """The median lap in ms once warm, and why it never settled, as a phrase: empty when it did.

    Windows of laps run for the protocol's time, and then until the medians of two neighbours agree.
    """
    begun, medians_ms = clock(), []
    while (clock() - begun) / 1e6 < protocol.warmup_ms:
        medians_ms.append(_window_median_ms(session, protocol, clock))
    for _ in range(WARMUP_WINDOWS):
        medians_ms.append(_window_median_ms(session, protocol, clock))
        if len(medians_ms) > 1 and max(medians_ms[-2:]) <= min(medians_ms[-2:]) * (1 + protocol.window_tolerance):
            return medians_ms[-1], ""
    return float(np.median(medians_ms)), (
        f"did not settle in {len(medians_ms)} windows of its warm-up (the last two medians: {_ms(medians_ms[-2])} and "
        f"{_ms(medians_ms[-1])}, {protocol.window_tolerance:.0%} allowed)"
    )


def _window_median_ms(session: Session, protocol: LatencyProtocol, clock: Clock) -> float:
    begun, laps_ns = clock(), []
    while len(laps_ns) < BLOCK_LAPS or (clock() - begun) / 1e6 < protocol.turn_ms:
        laps_ns += _timed_laps(session, clock, 1)
    return float(np.median(laps_ns)) / 1e6


def _timed_laps(session: Session, clock: Clock, count: int) -> list[int]:
    lap, laps_ns = session.lap, []
    for _ in range(count):
        begun = clock()
        lap()
        laps_ns.append(clock() - begun)
    return laps_ns


def _take_turns(dense: _Side, pruned: _Side, protocol: LatencyProtocol, progress: Progress | None) -> None:
    """Blocks in the order A B B A until both sides have their laps and seconds, and there are enough pairs."""
    pairs, done = 0, 0.0
    while done < 1:
        for first, second in ((dense, pruned), (pruned, dense)):
            first.take_turn(pairs)
            second.take_turn(pairs)
            pairs += 1
        done = min(dense.done(protocol), pruned.done(protocol), pairs / PAIRS)
        if progress is not None:
            progress(min(done, 1.0))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect now and not again inside the block; as it was before afterwards."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _undecided(dense: Measurement, pruned: Measurement, speedup: Speedup) -> str:
    """Why these laps allow no verdict, as a phrase; empty when they do."""
    width = (speedup.high - speedup.low) / speedup.estimate
    if speedup.low <= 1 <= speedup.high and width > UNDECIDED_WIDTH:
        return f"the interval holds 1 and is {width:.0%} of the estimate wide, where {UNDECIDED_WIDTH:.0%} would decide"
    return _between_two_speeds(dense, pruned)


def _between_two_speeds(dense: Measurement, pruned: Measurement) -> str:
    """Whether a median lies in a gap between two speeds of the machine, and the verdict hangs on it; as a phrase.

    The laps of a steady machine crowd around their median. When the middle fifth of them (p40 to p60) is as wide as
    the bound, the machine ran at two speeds for about half the time each, and the median may be anywhere in
    between: there is a verdict only if it is the same wherever in p40 to p60 both medians lie.
    """
    middles = [np.quantile(side.laps_ms, [0.4, 0.5, 0.6]) for side in (dense, pruned)]
    widths = [float((high - low) / middle) for low, middle, high in middles]
    (dense_low, _, dense_high), (pruned_low, _, pruned_high) = middles
    if max(widths) <= UNDECIDED_WIDTH or dense_low > pruned_high or dense_high < pruned_low:
        return ""
    name = NAMES[widths[1] > widths[0]]
    return (
        f"the machine ran at two speeds (the middle fifth of the {name} laps spans {max(widths):.0%} of their median)"
    )


def _ms(value_ms: float) -> str:
    return f"{value_ms:.4g} ms"
