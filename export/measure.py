"""Latency of two networks measured in turns: every lap, and what the laps allow to say.

A lap is one execution on inputs that lie where the runtime computes, on one stream, timed from the call until it is
done: by the device's own clock where it has one (CUDA events), else on the host. Dense and pruned take turns in blocks
of laps with a control, which is the dense network opened a second time. The order is A B C C B A, so that a drift of
the machine falls on all alike; blocks that are neighbours carry the same number and stay together in the statistics.

How far two sessions on one file differ was looked at with a ResNet-18 of 1 ms on onnxruntime's CPU provider: by up to
2.4 %, however long they run, and by less when they are opened anew and the medians put together; the session that
was opened last is faster than its twin by nearly 1 % on average. So all sessions are opened anew several times within
a measurement, in changing order, and the interval comes from a bootstrap over openings. What stays out of sight is
what is the same for every session of a process; a control cannot show it either.

The speed-up is taken block beside block, because on a machine that others share the laps of one network may be a third
slower for seconds, and the median of all laps then falls now into the one speed, now into the other.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from .errors import MeasureFailed
from .laps import (
    Control,
    Measurement,
    Quantiles,
    Speedup,
    bootstrap_speedup,
    compare_control,
    level_laps,
    session_spread,
    summarise,
)
from .laps_file import RecordedLaps as RecordedLaps
from .laps_file import find_laps as find_laps
from .laps_file import laps_path as laps_path
from .laps_file import read_laps as read_laps
from .laps_file import write_laps as write_laps
from .protocol import PAIRS as PAIRS
from .protocol import PROTOCOLS as PROTOCOLS
from .protocol import LatencyProtocol as LatencyProtocol
from .protocol import protocol_named as protocol_named
from .target import CUDA_GRAPH, CudaGraphs, DeviceTimer, RoundTrip, Session
from .watch import MachineWatch, Watch

# Fewest laps in a block, however slow the network: fewer have no median to speak of.
BLOCK_LAPS = 5
# After so many windows without two neighbours that agree, the warm-up is given up.
WARMUP_WINDOWS = 40
# An interval around 1 that is wider than this part of its estimate says nothing, not even `not faster`; and a machine
# that tells equal networks apart by more is not steady.
UNDECIDED_WIDTH = 0.10
# Something held the process up when the clock jumps by more than this, and by more than so many laps.
HELD_UP_MS = 250.0
HELD_UP_LAPS = 10
NAMES = ("dense", "pruned")

Clock = Callable[[], int]
Progress = Callable[[float], None]
Opener = Callable[[], Session]
Verdict = Literal["faster", "not faster", "unstable"]


class Comparison(BaseModel):
    """Dense beside pruned, and whether the pruned one is faster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dense: Quantiles
    pruned: Quantiles
    speedup: Speedup
    verdict: Verdict
    reason: str
    warmed: bool
    """Whether all sides settled before anything counted."""
    control: Control | None = None
    """The dense network against itself; None where it could not be opened a second time."""


class PathTimes(BaseModel):
    """Three numbers that are not one: what a network takes on the device, on the way there, and for the caller."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device_compute: Quantiles
    """Inputs and outputs stay on the device; CUDA events around the execution. A lap begins on an idle device, so the
    time in which the host submits the execution counts as far as the device waits for it."""
    with_transfers: Quantiles
    """Inputs copied to the device before, outputs copied back after; CUDA events around all of it."""
    host_end_to_end: Quantiles
    """The same on the clock of the host, until the outputs can be read there."""
    kernel_by_kernel: Quantiles | None = None
    """Device compute again, launched without the CUDA graph that the other numbers were launched by; None where there
    was no graph."""


class GpuTimes(BaseModel):
    """The three numbers of both networks on a GPU, each from an idle device on, which waits for the host to submit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dense: PathTimes
    pruned: PathTimes
    launch: str = ""
    """How the laps were launched: `cuda graph`, or `kernel by kernel: ` with the reason; empty in older records."""


class BatchRow(BaseModel):
    """Dense beside pruned at one batch size; throughput is in the quantiles."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: int
    dense: Quantiles
    pruned: Quantiles
    speedup: Speedup
    verdict: Verdict
    reason: str


class Laps(NamedTuple):
    """Every lap of a measurement."""

    dense: Measurement
    pruned: Measurement
    control: Measurement | None
    round_trips_ms: dict[str, list[float]]


class Measured(NamedTuple):
    """What was found, and the laps that it was found from."""

    comparison: Comparison
    laps: Laps
    times: GpuTimes | None
    watch: MachineWatch | None


def compare_latency(
    dense: Session | Opener,
    pruned: Session | Opener,
    protocol: LatencyProtocol,
    *,
    watch: Watch | None = None,
    progress: Progress | None = None,
    keep: Callable[[Laps], None] | None = None,
    clock: Clock = time.perf_counter_ns,
) -> Measured:
    """Dense against pruned, and the laps of each, once both sides have the seconds and the laps of the protocol.

    A side is a callable that opens a session with its inputs bound, which is then opened as often as the protocol
    says and closed again, the dense one twice, for the control; or a session that is open already, which is
    measured as it is, with one opening and no control. Every session is warmed up before its laps count, and every
    block starts with one lap that is not timed, because another network has just used the caches. Garbage collection
    is off meanwhile. `watch` is ended after the last lap, and what it saw can make the verdict `unstable`.
    `progress` is called between blocks with the fraction done; `clock` counts ns and never goes back. When anything
    ends the measurement early, `keep` gets the laps so far, if both sides have any.
    Raises: MeasureFailed when laps are too short for the clock, or when a session cannot run.
    """
    turns = _Turns(dense, pruned, protocol, clock)
    try:
        with _no_garbage_collection():
            turns.take_all(progress, look=watch.look if watch else None)
            seen = watch.stop(threads=protocol.threads) if watch else None
    except BaseException:
        if keep is not None and turns.dense.laps_ns and turns.pruned.laps_ns:
            keep(turns.laps())
        raise
    laps = turns.laps()
    doubt = " and ".join(filter(None, [*turns.doubts(), seen.doubt if seen else ""]))
    comparison = compare_laps(laps.dense, laps.pruned, protocol, control=laps.control, unsettled=doubt)
    comparison = comparison.model_copy(update={"warmed": turns.warmed})
    return Measured(comparison, laps, _gpu_times(turns), seen)


def compare_laps(
    dense: Measurement,
    pruned: Measurement,
    protocol: LatencyProtocol,
    *,
    control: Measurement | None = None,
    unsettled: str = "",
) -> Comparison:
    """What the laps of both sides say; `unsettled` is what is known against them, as a phrase.

    The interval of the speed-up is widened by the larger of what sessions are known to differ by and what the
    control was off by; `faster` needs the whole of it above 1.
    Raises: ValueError for sides whose blocks are not paired.
    """
    dense_q, pruned_q = protocol.summarise(dense.laps_ms), protocol.summarise(pruned.laps_ms)
    resampling = {"resamples": protocol.resamples, "seed": protocol.seed}
    checked = compare_control(dense, control, **resampling) if control else None
    unseen = max(session_spread(dense), abs(math.log(checked.speedup.estimate)) if checked else 0.0)
    speedup = bootstrap_speedup(dense, pruned, unseen=unseen, **resampling)
    doubt = unsettled or _undecided(dense, pruned, speedup, checked)
    verdict, reason = _verdict(speedup, doubt, f"p50 {_ms(pruned_q.p50)} against {_ms(dense_q.p50)} of dense")
    return Comparison(
        dense=dense_q,
        pruned=pruned_q,
        speedup=speedup,
        verdict=verdict,
        reason=reason,
        warmed=not unsettled,
        control=checked,
    )


def _verdict(speedup: Speedup, doubt: str, medians: str) -> tuple[Verdict, str]:
    faster = f"{speedup.estimate:.3f} ({100 * speedup.level:g} % interval {speedup.low:.3f} to {speedup.high:.3f})"
    if doubt:
        return "unstable", f"no verdict, because {doubt}; speed-up {faster}, {medians}."
    if speedup.low > 1:
        return "faster", f"speed-up {faster}, {medians}."
    if speedup.high < 1:
        return "not faster", f"slower than dense: speed-up {faster}, {medians}."
    return "not faster", f"no difference to be seen: speed-up {faster}, {medians}."


class _Side:
    """One of those that take turns: its session, how many laps a block has, and the laps so far."""

    def __init__(self, name: str, source: Session | Opener, protocol: LatencyProtocol, clock: Clock) -> None:
        self.name, self.source, self.protocol, self.clock = name, source, protocol, clock
        self.session: Session | None = None
        self.unsettled = ""
        self.block_laps = BLOCK_LAPS
        self.held_up_ns = 0.0
        self.laps_ns: list[int] = []
        self.blocks: list[int] = []
        self.round_trips: list[RoundTrip] = []
        self.plain_ms: list[float] = []
        self.launches: list[str] = []
        self.counted_ns = 0.0

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Its session is open and warm inside the block."""
        if not callable(self.source):
            self.session = self.source
            self._warm_up(self.session)
            yield
            return
        with contextlib.closing(self.source()) as session:
            self.session = session
            self._warm_up(session)
            yield

    def take_turn(self, block: int) -> None:
        """One block of laps; the first lap finds the other network in the caches, and is not timed."""
        assert self.session is not None, "a turn is taken inside `opened`"
        lap = _stopwatch(self.session, self.protocol, self.clock)
        lap()
        for _ in range(self.block_laps):
            lap_ns = lap()
            if lap_ns <= 0:
                raise MeasureFailed("a lap takes less time than the clock can tell. Measure a larger batch.")
            self.laps_ns.append(lap_ns)
            self.blocks.append(block)
            # A lap that was held up must not stand for many.
            self.counted_ns += min(lap_ns, self.held_up_ns)

    def note_launch(self) -> None:
        """How the laps of this opening were launched, in the session's own words, where it has any."""
        if launch := getattr(self.session, "launch", ""):
            self.launches.append(launch)

    @property
    def launch(self) -> str:
        """How its laps were launched; in each way that there was, where openings differ."""
        return ", then ".join(dict.fromkeys(self.launches))

    def go_round(self, count: int) -> None:
        """So many executions with their transfers, and without their CUDA graph, where the device times them.

        The first of either kind is not kept.
        """
        if isinstance(self.session, DeviceTimer):
            self.session.round_trip()
            self.round_trips += [self.session.round_trip() for _ in range(count)]
        if isinstance(self.session, CudaGraphs) and self.session.launch == CUDA_GRAPH:
            self.session.plain_lap_ms()
            self.plain_ms += [self.session.plain_lap_ms() for _ in range(count)]

    def done(self) -> float:
        """The fraction of its laps and seconds that it has; 1 or more when it has both."""
        return min(len(self.laps_ns) / self.protocol.laps, self.counted_ns / (self.protocol.seconds * 1e9))

    def measurement(self, opened: list[int]) -> Measurement:
        """Its laps in ms, each with its block."""
        whole = min(len(self.laps_ns), len(self.blocks))  # an interruption may have come between the two
        laps_ms = [lap / 1e6 for lap in self.laps_ns[:whole]]
        return Measurement(protocol=self.protocol.id, laps_ms=laps_ms, blocks=self.blocks[:whole], opened=opened)

    def _warm_up(self, session: Session) -> None:
        lap_ms, unsettled = _warm_up(session, self.protocol, self.clock)
        self.unsettled = self.unsettled or unsettled
        self.block_laps = max(BLOCK_LAPS, round(self.protocol.turn_ms / lap_ms)) if lap_ms else BLOCK_LAPS
        self.held_up_ns = 1e6 * max(HELD_UP_MS, HELD_UP_LAPS * lap_ms)


class _Turns:
    """Dense, control and pruned, and the order in which they run."""

    def __init__(
        self, dense: Session | Opener, pruned: Session | Opener, protocol: LatencyProtocol, clock: Clock
    ) -> None:
        self.protocol, self.clock = protocol, clock
        self.dense, self.pruned = (
            _Side(name, source, protocol, clock) for name, source in zip(NAMES, (dense, pruned), strict=True)
        )
        self.control = _Side("control", dense, protocol, clock) if callable(dense) else None
        self.openings = protocol.openings if callable(dense) and callable(pruned) else 1
        self.opened: list[int] = []
        self.pairs = 0
        self.held_up: list[float] = []

    @property
    def sides(self) -> list[_Side]:
        """In the order of their turns: the two that are compared are the ends, which are alike."""
        return [side for side in (self.dense, self.control, self.pruned) if side]

    @property
    def warmed(self) -> bool:
        return not any(side.unsettled for side in self.sides)

    @property
    def launched_unlike(self) -> bool:
        """Whether some laps were launches of a CUDA graph and others were not: what that saves is no speed-up."""
        return len({launch == CUDA_GRAPH for side in self.sides for launch in side.launches}) > 1

    def take_all(self, progress: Progress | None, *, look: Callable[[], None] | None = None) -> None:
        """All turns of all openings, with a look after each; which session is opened first changes: it matters."""
        orders = itertools.cycle(itertools.permutations(self.sides))
        for opening, order in zip(range(self.openings), orders, strict=False):
            with contextlib.ExitStack() as open_sessions:
                for side in order:
                    open_sessions.enter_context(side.opened())
                self.opened.append(self.pairs)
                self._take_turns((opening + 1) / self.openings, progress)
                if look is not None:
                    look()
                for side in self.sides:
                    side.note_launch()
                self._go_round()

    def laps(self) -> Laps:
        """Every lap so far."""
        opened = self.opened or [0]
        control = self.control.measurement(opened) if self.control and self.control.laps_ns else None
        trips = {
            f"{side.name} {kind}": [getattr(trip, f"{field}_ms") for trip in side.round_trips]
            for side in (self.dense, self.pruned)
            for kind, field in (("with transfers", "with_transfers"), ("host end to end", "host"))
            if side.round_trips
        }
        return Laps(self.dense.measurement(opened), self.pruned.measurement(opened), control, trips)

    def doubts(self) -> list[str]:
        """What the measurement itself has against its laps, as phrases."""
        found = [f"{side.name} {side.unsettled}" for side in self.sides if side.unsettled]
        if self.launched_unlike:
            launches = "; ".join(f"{side.name}: {side.launch}" for side in self.sides)
            found.append(f"not all laps were launched in the same way ({launches})")
        if self.held_up:
            times = f", {len(self.held_up)} times in all" if len(self.held_up) > 1 else ""
            found.append(f"the process was held up for {max(self.held_up):.2g} s{times}, as when it is suspended")
        return found

    def _take_turns(self, until: float, progress: Progress | None) -> None:
        """Blocks in the order A B C C B A until every side has that part of its laps, seconds and pairs."""
        last_ns, done = self.clock(), 0.0
        while done < until:
            for order in (self.sides, self.sides[::-1]):
                for side in order:
                    side.take_turn(self.pairs)
                    last_ns = self._notice_hold_up(side, last_ns)
                self.pairs += 1
            done = min([side.done() for side in self.sides] + [self.pairs / PAIRS])
            if progress is not None:
                progress(min(done, 1.0))

    def _notice_hold_up(self, side: _Side, last_ns: int) -> int:
        """The time now; a turn that took much longer than its laps should have is remembered."""
        now_ns = self.clock()
        laps_ns = side.laps_ns[-side.block_laps :]
        # What no lap accounts for: the lap that is not timed, and everything between the turns.
        rest_ns = now_ns - last_ns - sum(laps_ns)
        self.held_up += [gap_ns / 1e9 for gap_ns in (*laps_ns, rest_ns) if gap_ns > side.held_up_ns]
        return now_ns

    def _go_round(self) -> None:
        """Executions with transfers, in turns, where the device has its own clock: enough laps over all openings."""
        count = math.ceil(self.protocol.laps / self.openings / 2)
        for side in (self.dense, self.pruned, self.pruned, self.dense):
            side.go_round(count)


def _stopwatch(session: Session, protocol: LatencyProtocol, clock: Clock) -> Callable[[], int]:
    """What runs one lap and returns its ns: on the device's own clock where it has one."""
    if isinstance(session, DeviceTimer):
        if protocol.with_transfers:
            return lambda: round(session.round_trip().with_transfers_ms * 1e6)
        return lambda: round(session.timed_lap_ms() * 1e6)
    lap = session.lap

    def timed() -> int:
        begun = clock()
        lap()
        return clock() - begun

    return timed


def _warm_up(session: Session, protocol: LatencyProtocol, clock: Clock) -> tuple[float, str]:
    """The median lap in ms once warm, and why it never settled, as a phrase: empty when it did.

    Windows of laps run for the protocol's time, and then until the medians of two neighbours agree.
    """
    begun, medians_ms = clock(), []
    while (clock() - begun) / 1e6 < protocol.warmup_ms:
        medians_ms.append(_window_median_ms(session, protocol, clock))
    for _ in range(WARMUP_WINDOWS):
        medians_ms.append(_window_median_ms(session, protocol, clock))
        if not protocol.settles:
            return medians_ms[-1], ""
        if len(medians_ms) > 1 and max(medians_ms[-2:]) <= min(medians_ms[-2:]) * (1 + protocol.window_tolerance):
            return medians_ms[-1], ""
    return float(np.median(medians_ms)), (
        f"did not settle in {len(medians_ms)} windows of its warm-up (the last two medians: {_ms(medians_ms[-2])} and "
        f"{_ms(medians_ms[-1])}, {protocol.window_tolerance:.0%} allowed)"
    )


def _window_median_ms(session: Session, protocol: LatencyProtocol, clock: Clock) -> float:
    lap = _stopwatch(session, protocol, clock)
    begun, laps_ns = clock(), []
    while len(laps_ns) < BLOCK_LAPS or (clock() - begun) / 1e6 < protocol.turn_ms:
        laps_ns.append(lap())
    return float(np.median(laps_ns)) / 1e6


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


def _gpu_times(turns: _Turns) -> GpuTimes | None:
    """The three numbers of both sides; None where the device has no clock of its own."""
    if not (turns.dense.round_trips and turns.pruned.round_trips):
        return None
    dense, pruned = turns.dense, turns.pruned
    launch = f"dense {dense.launch}, pruned {pruned.launch}" if turns.launched_unlike else pruned.launch
    return GpuTimes(dense=_path_times(dense), pruned=_path_times(pruned), launch=launch)


def _path_times(side: _Side) -> PathTimes:
    batch, trips = side.protocol.batch, side.round_trips
    # The laps themselves, unless the protocol's laps hold the transfers.
    compute_ms = (
        [trip.compute_ms for trip in trips]
        if side.protocol.with_transfers
        else [lap_ns / 1e6 for lap_ns in side.laps_ns]
    )
    return PathTimes(
        device_compute=summarise(compute_ms, batch=batch),
        with_transfers=summarise([trip.with_transfers_ms for trip in trips], batch=batch),
        host_end_to_end=summarise([trip.host_ms for trip in trips], batch=batch),
        kernel_by_kernel=summarise(side.plain_ms, batch=batch) if side.plain_ms else None,
    )


def _undecided(dense: Measurement, pruned: Measurement, speedup: Speedup, control: Control | None) -> str:
    """Why these laps allow no verdict, as a phrase; empty when they do."""
    if control is not None and control.noise > UNDECIDED_WIDTH:
        return f"the dense network and itself differ by up to {control.noise:.0%} here"
    width = (speedup.high - speedup.low) / speedup.estimate
    if speedup.low <= 1 <= speedup.high and width > UNDECIDED_WIDTH:
        return f"the interval holds 1 and is {width:.0%} of the estimate wide, where {UNDECIDED_WIDTH:.0%} would decide"
    return _between_two_speeds(dense, pruned)


def _between_two_speeds(dense: Measurement, pruned: Measurement) -> str:
    """Whether a median lies in a gap between two speeds of the machine, and the verdict hangs on it; as a phrase.

    The laps of a steady machine crowd around the median of their block. When the middle fifth of them (p40 to p60) is
    as wide as the bound, the machine ran at two speeds for about half the laps each, and the median may be anywhere
    in between: there is a verdict only if it is the same wherever in p40 to p60 both medians lie.
    """
    middles = [np.quantile(laps_L, [0.4, 0.5, 0.6]) for laps_L in level_laps(dense, pruned)]
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
