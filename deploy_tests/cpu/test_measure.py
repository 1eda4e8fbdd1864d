"""The protocol of a measurement on a clock that tests can wind, and the verdicts on laps made by hand."""

import functools
import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from chip_deploy.export.errors import MeasureFailed
from chip_deploy.export.laps import Measurement
from chip_deploy.export.measure import (
    BLOCK_LAPS,
    PAIRS,
    PROTOCOLS,
    WARMUP_WINDOWS,
    Comparison,
    GpuTimes,
    Laps,
    LatencyProtocol,
    Measured,
    Opener,
    compare_laps,
    compare_latency,
    protocol_named,
)
from chip_deploy.export.target import RoundTrip, Session
from chip_deploy.export.watch import Watch

MS = 1_000_000
# Milliseconds of a lap, told from the time in ms and from the number of laps this session ran before.
Pace = Callable[[float, int], float]


class WoundClock:
    """A clock that stands still unless a session runs."""

    def __init__(self, tick_ns: int = 1) -> None:
        self.now_ns = 0
        self.tick_ns = tick_ns
        self.log: list[str] = []

    def __call__(self) -> int:
        return self.now_ns // self.tick_ns * self.tick_ns


class PacedSession:
    """A session whose laps take as long as its pace says, on a wound clock."""

    input_names = ("input",)
    output_names = ("output",)

    def __init__(self, clock: WoundClock, pace: Pace, name: str = "") -> None:
        self.clock, self.pace, self.name = clock, pace, name
        self.input_shapes = {"input": (1,)}
        self.laps = 0

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {}

    def bind(self, feeds: Mapping[str, Any]) -> None:
        return None

    def lap(self) -> None:
        self.clock.now_ns += round(self.pace(self.clock.now_ns / MS, self.laps) * MS)
        self.clock.log.append(self.name)
        self.laps += 1

    def close(self) -> None:
        return None


def always(lap_ms: float) -> Pace:
    return lambda now_ms, laps: lap_ms


def measure(
    dense: Pace, pruned: Pace, protocol: LatencyProtocol | None = None, **options: Any
) -> tuple[Comparison, Measurement, Measurement, WoundClock]:
    clock = WoundClock()
    sessions = PacedSession(clock, dense, "A"), PacedSession(clock, pruned, "B")
    protocol = protocol or LatencyProtocol(resamples=200)
    found = compare_latency(*sessions, protocol, clock=clock, **options)
    return found.comparison, found.laps.dense, found.laps.pruned, clock


def laps_of(block: list[float], *, blocks: int = 20) -> Measurement:
    return Measurement(laps_ms=block * blocks, blocks=[k for k in range(blocks) for _ in block])


def judged(dense: Measurement, pruned: Measurement, unsettled: str = "") -> Comparison:
    return compare_laps(dense, pruned, LatencyProtocol(resamples=400), unsettled=unsettled)


def test_blocks_run_a_b_b_a_and_each_starts_with_a_lap_that_is_not_timed() -> None:
    _, dense, pruned, clock = measure(always(2.0), always(1.0))
    turns = [(name, len(list(laps))) for name, laps in itertools.groupby(clock.log)]
    # Two warm-ups; then 50 ms are 25 laps of 2 ms or 50 of 1 ms, and one more that is not timed. Where a side has two
    # turns on end, they make one run in the log.
    assert turns[2:6] == [("A", 26), ("B", 51 + 51), ("A", 26 + 26), ("B", 51 + 51)]
    assert turns[-1] == ("A", 26)
    assert dense.blocks == sorted(dense.blocks) == [k for k in range(dense.blocks[-1] + 1) for _ in range(25)]
    assert pruned.blocks == [k for k in range(dense.blocks[-1] + 1) for _ in range(50)]


@pytest.mark.parametrize(
    ("lap_ms", "seconds", "laps"), [(1.0, 3.0, 200), (0.01, 0.1, 1), (40.0, 0.5, 30), (0.5, 0.001, 3000)]
)
def test_a_side_gets_its_seconds_and_its_laps_and_enough_blocks(lap_ms: float, seconds: float, laps: int) -> None:
    protocol = LatencyProtocol(seconds=seconds, laps=laps, resamples=100)
    _, dense, pruned, _ = measure(always(lap_ms), always(lap_ms / 2), protocol)
    for side in (dense, pruned):
        counts = np.bincount(side.blocks)
        assert round(sum(side.laps_ms), 6) >= 1e3 * seconds
        assert len(side.laps_ms) >= laps
        assert len(counts) >= PAIRS
        assert counts.min() >= BLOCK_LAPS


def test_no_more_is_measured_than_asked_for() -> None:
    _, dense, pruned, clock = measure(always(1.0), always(1.0))
    # 3 s are 60 blocks of 50 ms; the warm-ups take 200 ms, then one window more, each.
    assert (len(dense.laps_ms), len(pruned.laps_ms)) == (3000, 3000)
    assert clock.now_ns == (2 * 3060 + 2 * 250) * MS


def test_the_laps_are_what_the_clock_said() -> None:
    _, dense, pruned, _ = measure(lambda now, laps: 1.0 + 0.001 * (laps % 7), always(0.25))
    assert sorted(set(dense.laps_ms)) == [1.0, 1.001, 1.002, 1.003, 1.004, 1.005, 1.006]
    assert set(pruned.laps_ms) == {0.25}


def test_a_machine_that_slows_down_all_the_while_changes_no_speedup() -> None:
    def heating(lap_ms: float) -> Pace:
        return lambda now_ms, laps: lap_ms * (1 + now_ms / 10_000)

    comparison, dense, _, _ = measure(heating(1.3), heating(1.0))
    assert max(dense.laps_ms) > 1.5 * min(dense.laps_ms)
    assert comparison.speedup.estimate == pytest.approx(1.3, rel=0.01)
    assert comparison.verdict == "faster"


def test_laps_from_before_the_session_is_warm_do_not_count() -> None:
    # The first 300 ms run at half speed: longer than the 200 ms that a warm-up lasts at least.
    comparison, dense, _, _ = measure(lambda now, laps: 2.0 if now < 300 else 1.0, always(1.0))
    assert comparison.warmed
    assert set(dense.laps_ms) == {1.0}


def test_a_warm_up_lasts_its_time_and_until_two_windows_agree() -> None:
    settles_late = [1.5, 1.0]
    _, _, _, clock = measure(lambda now, laps: settles_late[int(now // 50) % 2] if now < 1000 else 1.0, always(1.0))
    first_of_pruned = clock.log.index("B")
    # Twenty windows of 50 ms that alternate, 34 laps or 50 each, and then two that agree.
    assert first_of_pruned > 10 * (34 + 50)


def test_a_side_that_never_settles_makes_the_measurement_unstable() -> None:
    # Windows of 50 ms hold exactly 50 laps of 1 ms or 40 of 1.25 ms.
    comparison, _, _, clock = measure(lambda now, laps: (1.0, 1.25)[int(now // 50) % 2], always(0.1))
    assert (comparison.warmed, comparison.verdict) == (False, "unstable")
    assert "dense did not settle in 44 windows" in comparison.reason
    assert "pruned did not" not in comparison.reason
    # It was given up after the 200 ms and the windows allowed after them.
    assert clock.log.index("B") == (4 + WARMUP_WINDOWS) // 2 * (50 + 40)


def test_garbage_is_not_collected_while_laps_run_and_is_again_afterwards() -> None:
    seen = set()

    def watched(now_ms: float, laps: int) -> float:
        seen.add(gc.isenabled())
        return 1.0

    assert gc.isenabled()
    measure(watched, watched)
    assert seen == {False}
    assert gc.isenabled()


def test_garbage_is_collected_again_after_a_lap_that_failed() -> None:
    def failing(now_ms: float, laps: int) -> float:
        raise MeasureFailed("out of memory")

    with pytest.raises(MeasureFailed, match="out of memory"):
        measure(failing, always(1.0))
    assert gc.isenabled()


def test_progress_goes_up_to_one() -> None:
    heard: list[float] = []
    measure(always(1.0), always(1.0), progress=heard.append)
    assert heard == sorted(set(heard))
    assert heard[-1] == 1.0
    assert len(heard) == 30


def test_laps_shorter_than_the_clock_can_tell_are_refused() -> None:
    clock = WoundClock(tick_ns=10 * MS)
    sessions = PacedSession(clock, always(0.1)), PacedSession(clock, always(0.1))
    with pytest.raises(MeasureFailed, match="less time than the clock can tell"):
        compare_latency(*sessions, LatencyProtocol(), clock=clock)


def test_a_network_is_faster_when_the_whole_interval_is_above_one() -> None:
    comparison = judged(laps_of([1.49, 1.5, 1.51]), laps_of([0.99, 1.0, 1.01]))
    assert comparison.verdict == "faster"
    assert comparison.reason == "speed-up 1.500 (95 % interval 1.470 to 1.530), p50 1 ms against 1.5 ms of dense."


@pytest.mark.parametrize(
    ("dense_ms", "words"), [(0.8, "slower than dense: speed-up 0.800"), (1.001, "no difference to be seen")]
)
def test_a_network_that_is_not_faster_is_told_so(dense_ms: float, words: str) -> None:
    comparison = judged(laps_of([dense_ms] * 5), laps_of([1.0] * 5))
    assert comparison.verdict == "not faster"
    assert comparison.reason.startswith(words)


def test_an_interval_too_wide_to_decide_is_unstable() -> None:
    # Block medians of either side scatter by a factor of 1.5, each for itself.
    random = np.random.default_rng(0)
    sides = [
        Measurement(laps_ms=np.repeat(random.uniform(1.0, 1.5, 12), 5).tolist(), blocks=[k // 5 for k in range(60)])
        for _ in range(2)
    ]
    comparison = judged(*sides)
    assert comparison.speedup.low < 1 < comparison.speedup.high
    assert (comparison.verdict, comparison.warmed) == ("unstable", True)
    assert "the interval holds 1 and is" in comparison.reason


def test_a_wide_interval_that_lies_above_one_is_still_faster() -> None:
    random = np.random.default_rng(0)
    dense, pruned = (
        Measurement(
            laps_ms=np.repeat(random.uniform(low, 1.5 * low, 12), 5).tolist(), blocks=[k // 5 for k in range(60)]
        )
        for low in (3.0, 1.0)
    )
    comparison = judged(dense, pruned)
    assert (comparison.speedup.high - comparison.speedup.low) / comparison.speedup.estimate > 0.1
    assert comparison.verdict == "faster"


def two_speeds(share_slow: float, *, fast_ms: float = 1.0) -> Measurement:
    """Blocks of 20 laps, so many of them half as fast again, in every block alike."""
    slow = round(20 * share_slow)
    return laps_of([fast_ms] * (20 - slow) + [1.5 * fast_ms] * slow)


def test_medians_between_two_speeds_of_the_machine_decide_nothing() -> None:
    # Blocks are all alike, so the bootstrap is sure of 1.5; with two laps in twenty the other way it would be 0.67.
    comparison = judged(two_speeds(0.55), two_speeds(0.45))
    assert comparison.speedup.low > 1
    assert comparison.verdict == "unstable"
    assert "two speeds (the middle fifth of the pruned laps spans 50% of their median)" in comparison.reason


def test_two_speeds_do_not_matter_where_one_of_them_is_rare() -> None:
    assert judged(two_speeds(0.2, fast_ms=1.2), two_speeds(0.2)).verdict == "faster"


def test_two_speeds_do_not_matter_where_even_the_slow_one_is_faster() -> None:
    assert judged(two_speeds(0.5, fast_ms=2.0), two_speeds(0.5)).verdict == "faster"


def test_a_warm_up_that_did_not_settle_comes_before_any_verdict() -> None:
    comparison = judged(laps_of([2.0]), laps_of([1.0]), unsettled="dense did not settle")
    assert (comparison.verdict, comparison.warmed) == ("unstable", False)
    assert comparison.reason.startswith("no verdict, because dense did not settle; speed-up 2.000")


def test_a_short_measurement_has_shorter_blocks_so_that_there_are_enough() -> None:
    assert LatencyProtocol(seconds=0.2).turn_ms == 1e3 * 0.2 / PAIRS
    assert LatencyProtocol().turn_ms == 50


@pytest.mark.parametrize(
    "wrong", [{"seconds": 0}, {"laps": 0}, {"seconds": float("nan")}, {"resamples": 1}, {"lap": 1}]
)
def test_a_protocol_that_cannot_be_run_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LatencyProtocol.model_validate(wrong)


class Works:
    """What opens sessions of paces on one clock, and knows which are open."""

    def __init__(self) -> None:
        self.clock = WoundClock()
        self.opened: list[str] = []
        self.closed = 0

    def opener(self, name: str, *paces: Pace) -> Opener:
        """The n-th session opened has the n-th pace, over and over."""
        turns = itertools.cycle(paces)

        def opened() -> Session:
            self.opened.append(name)
            session = PacedSession(self.clock, next(turns), name)
            session.close = self._close
            return session

        return opened

    def _close(self) -> None:
        self.closed += 1

    def measure(self, dense: Opener, pruned: Opener, **settings: Any) -> Measured:
        protocol = LatencyProtocol(**{"resamples": 200, "seconds": 1.2, **settings})
        return compare_latency(dense, pruned, protocol, clock=self.clock)


def test_a_dense_network_that_can_be_opened_twice_is_its_own_control() -> None:
    works = Works()
    found = works.measure(works.opener("A", always(2.0)), works.opener("B", always(1.0)), openings=1)
    assert found.laps.control is not None
    assert (set(found.laps.control.laps_ms), found.laps.control.blocks) == ({2.0}, found.laps.dense.blocks)
    assert found.comparison.control is not None
    assert (found.comparison.control.speedup.estimate, found.comparison.control.noise) == (1.0, 0.0)
    assert (works.opened, works.closed) == (["A", "A", "B"], 3)


def test_turns_with_a_control_run_a_b_c_c_b_a() -> None:
    works = Works()
    # Three lengths of lap, by which the turns are told apart: blocks of 50 ms.
    works.measure(works.opener("A", always(5.0), always(2.5)), works.opener("B", always(1.0)), openings=1, seconds=1.0)
    turns = [len(list(laps)) for _, laps in itertools.groupby(works.clock.log)]
    # The warm-ups of A and its control in one run, that of B; then 10 + 1 laps of A and 20 + 1 of its control, 51 of
    # B twice, and backwards.
    assert turns[2:5] == [11 + 21, 51 + 51, 21 + 11 + 11 + 21]


def test_sessions_are_opened_anew_and_each_comes_first_and_last_equally_often() -> None:
    works = Works()
    names = iter("AC" * 6)
    turns = {name: works.opener(name, always(1.0)) for name in "ACB"}
    found = works.measure(lambda: turns[next(names)](), turns["B"], openings=6)
    assert len(found.laps.dense.opened) == 6
    assert (len(works.opened), works.closed) == (18, 18)
    places = [works.opened[first : first + 3].index("B") for first in range(0, 18, 3)]
    assert sorted(places) == [0, 0, 1, 1, 2, 2]


def test_no_more_sessions_are_open_at_once_than_there_are_sides() -> None:
    works = Works()
    open_at_once = []

    def watched(now_ms: float, laps: int) -> float:
        open_at_once.append(len(works.opened) - works.closed)
        return 1.0

    works.measure(works.opener("A", watched), works.opener("B", watched), openings=4)
    assert max(open_at_once) == 3
    assert works.closed == len(works.opened) == 12


def test_sessions_are_closed_when_a_lap_fails() -> None:
    def failing(now_ms: float, laps: int) -> float:
        if now_ms > 1000:
            raise MeasureFailed("out of memory")
        return 1.0

    works = Works()
    with pytest.raises(MeasureFailed, match="out of memory"):
        works.measure(works.opener("A", failing), works.opener("B", always(1.0)))
    assert works.closed == len(works.opened) > 0


def test_equal_networks_whose_sessions_differ_are_not_found_faster() -> None:
    # One session in three of either side is 3 % slower, and the sides' turns fall unluckily.
    works = Works()
    dense = works.opener("A", *map(always, (1.03, 1.0, 1.03, 1.0, 1.0, 1.0)))
    pruned = works.opener("B", *map(always, (1.0, 1.0, 1.0, 1.03, 1.0, 1.0)))
    comparison = works.measure(dense, pruned).comparison
    assert comparison.verdict != "faster"
    assert comparison.control is not None
    assert comparison.control.noise > 0.01


def test_the_interval_is_widened_by_what_the_control_is_off() -> None:
    sides = laps_of([1.05]), laps_of([1.0])
    for control_ms, low in ((1.05, 1.05 * np.exp(-0.02)), (1.05 / 1.04, 1.05 / 1.04)):
        comparison = compare_laps(*sides, LatencyProtocol(resamples=200), control=laps_of([control_ms]))
        # The larger of SESSION_SPREAD and the control's noise, on laps that never differ.
        assert comparison.speedup.low == pytest.approx(low, rel=1e-9)
        assert comparison.verdict == "faster"
    doubtful = compare_laps(*sides, LatencyProtocol(resamples=200), control=laps_of([1.05 / 1.06]))
    assert doubtful.speedup.low < 1
    assert doubtful.verdict == "unstable"


def test_a_machine_that_tells_equal_networks_apart_is_unstable_however_large_the_speedup() -> None:
    comparison = compare_laps(laps_of([3.0]), laps_of([1.0]), LatencyProtocol(), control=laps_of([2.6]))
    assert comparison.verdict == "unstable"
    assert "the dense network and itself differ by up to 15% here" in comparison.reason


def test_a_lap_that_was_held_up_makes_the_result_unstable_and_stands_for_no_others() -> None:
    stop = iter([5000.0])

    def suspended(now_ms: float, laps: int) -> float:
        return next(stop, 2.0) if now_ms > 1500 else 2.0

    comparison, dense, pruned, _ = measure(suspended, always(1.0))
    assert max(dense.laps_ms) == 5000.0
    # 3 s were asked for; the 5 s of one lap count as 250 ms.
    assert sum(dense.laps_ms) - 5000.0 >= 2750.0 - 1e-6
    assert comparison.verdict == "unstable"
    assert "the process was held up for 5 s, as when it is suspended" in comparison.reason
    assert comparison.warmed
    assert len(pruned.laps_ms) >= 3000


def test_a_hold_up_between_two_laps_is_noticed_too() -> None:
    clock = WoundClock()
    sessions = PacedSession(clock, always(2.0)), PacedSession(clock, always(1.0))
    heard = []

    def suspended(fraction: float) -> None:
        heard.append(fraction)
        clock.now_ns += 400 * MS if len(heard) == 3 else 0

    found = compare_latency(*sessions, LatencyProtocol(resamples=200), clock=clock, progress=suspended)
    assert found.comparison.verdict == "unstable"
    assert "held up for 0.4 s" in found.comparison.reason


def test_long_laps_are_no_hold_up() -> None:
    comparison, *_ = measure(always(900.0), always(600.0), LatencyProtocol(seconds=0.1, laps=1, resamples=100))
    assert comparison.verdict == "faster"


def test_laps_so_far_are_handed_over_when_the_measurement_is_interrupted() -> None:
    def interrupting(now_ms: float, laps: int) -> float:
        if now_ms > 2000:
            raise KeyboardInterrupt
        return 1.0

    works, kept = Works(), []
    with pytest.raises(KeyboardInterrupt):
        compare_latency(
            works.opener("A", interrupting),
            works.opener("B", always(1.0)),
            LatencyProtocol(),
            clock=works.clock,
            keep=kept.append,
        )
    (laps,) = kept
    assert isinstance(laps, Laps)
    # The warm-ups took 750 ms; the last, interrupted block is there as far as it went.
    assert 300 < len(laps.dense.laps_ms) + len(laps.pruned.laps_ms) + len(laps.control.laps_ms) < 1250
    assert works.closed == len(works.opened)


def test_nothing_is_handed_over_when_there_are_no_laps_yet() -> None:
    def interrupting(now_ms: float, laps: int) -> float:
        raise KeyboardInterrupt

    kept = []
    with pytest.raises(KeyboardInterrupt):
        measure(always(1.0), interrupting, keep=kept.append)
    assert kept == []


class TimedSession(PacedSession):
    """A session with a clock of its own: the host's lap is longer than the device's."""

    def timed_lap_ms(self) -> float:
        self.lap()
        return self.pace(self.clock.now_ns / MS, self.laps) * 0.5

    def round_trip(self) -> RoundTrip:
        self.lap()
        lap_ms = self.pace(self.clock.now_ns / MS, self.laps)
        return RoundTrip(compute_ms=0.5 * lap_ms, with_transfers_ms=0.75 * lap_ms, host_ms=lap_ms)


def timed(kind: str) -> Measured:
    clock = WoundClock()
    protocol = PROTOCOLS[kind].model_copy(update={"seconds": 0.2, "resamples": 100, "laps": 200, "batch": 4})
    return compare_latency(
        lambda: TimedSession(clock, always(4.0)), lambda: TimedSession(clock, always(2.0)), protocol, clock=clock
    )


def test_where_a_device_has_a_clock_three_numbers_are_told_and_its_own_is_the_latency() -> None:
    found = timed("chip-deploy")
    assert (found.comparison.dense.p50, found.comparison.pruned.p50) == (2.0, 1.0)
    assert found.times is not None
    for side, lap_ms in ((found.times.dense, 4.0), (found.times.pruned, 2.0)):
        assert side.device_compute.p50 == 0.5 * lap_ms
        assert side.with_transfers.p50 == 0.75 * lap_ms
        assert side.host_end_to_end.p50 == lap_ms
        assert side.host_end_to_end.p99 == lap_ms
        assert side.host_end_to_end.throughput == pytest.approx(4e3 / lap_ms)
    assert set(found.laps.round_trips_ms) == {
        *("dense with transfers", "dense host end to end", "pruned with transfers", "pruned host end to end")
    }


class GraphSession(TimedSession):
    """A session whose laps are one launch of a graph, which takes half of what its kernels take one by one."""

    launch = "cuda graph"

    def plain_lap_ms(self) -> float:
        return 2 * self.timed_lap_ms()


def with_graph(kind: type[TimedSession], *, launch: str) -> GpuTimes:
    clock = WoundClock()
    protocol = PROTOCOLS["chip-deploy"].model_copy(update={"seconds": 0.2, "resamples": 100, "openings": 2})

    def opened(lap_ms: float) -> Session:
        session = kind(clock, always(lap_ms))
        session.launch = launch  # pyright: ignore[reportAttributeAccessIssue]
        return session

    times = compare_latency(lambda: opened(4.0), lambda: opened(2.0), protocol, clock=clock).times
    assert times is not None
    return times


def test_where_laps_are_launches_of_a_graph_those_without_it_are_told_beside_them() -> None:
    times = with_graph(GraphSession, launch="cuda graph")
    assert times.launch == "cuda graph"
    for side, lap_ms in ((times.dense, 4.0), (times.pruned, 2.0)):
        assert side.device_compute.p50 == 0.5 * lap_ms
        assert side.kernel_by_kernel is not None
        assert side.kernel_by_kernel.p50 == lap_ms
        assert side.kernel_by_kernel.n >= PROTOCOLS["chip-deploy"].laps


def test_where_no_graph_was_recorded_the_reason_stands_in_its_place() -> None:
    times = with_graph(GraphSession, launch="kernel by kernel: the CUDA graph is switched off")
    assert times.launch == "kernel by kernel: the CUDA graph is switched off"
    assert times.pruned.kernel_by_kernel is None


@pytest.mark.parametrize("graphs", [(True, False), (False, True)])
def test_where_only_one_network_was_recorded_as_a_graph_there_is_no_verdict(graphs: tuple[bool, bool]) -> None:
    clock = WoundClock()
    protocol = PROTOCOLS["chip-deploy"].model_copy(update={"seconds": 0.2, "resamples": 100, "openings": 2})

    def opened(lap_ms: float, graph: bool) -> Session:
        session = GraphSession(clock, always(lap_ms))
        session.launch = "cuda graph" if graph else "kernel by kernel: not capturable"
        return session

    dense, pruned = (functools.partial(opened, *each) for each in zip((4.0, 2.0), graphs, strict=True))
    found = compare_latency(dense, pruned, protocol, clock=clock)
    assert found.comparison.verdict == "unstable"
    told = [
        f"{name}: {'cuda graph' if graph else 'kernel by kernel: not capturable'}"
        for name, graph in zip(("dense", "control", "pruned"), (graphs[0], *graphs), strict=True)
    ]
    assert f"not all laps were launched in the same way ({'; '.join(told)})" in found.comparison.reason
    assert found.times is not None
    assert found.times.launch.startswith("dense cuda graph, pruned k" if graphs[0] else "dense kernel by kernel")


def test_two_networks_that_cannot_be_recorded_for_different_reasons_are_launched_alike() -> None:
    clock = WoundClock()
    protocol = PROTOCOLS["chip-deploy"].model_copy(update={"seconds": 0.2, "resamples": 100, "openings": 2})
    reasons = itertools.count()

    def opened(lap_ms: float) -> Session:
        session = GraphSession(clock, always(lap_ms))
        session.launch = f"kernel by kernel: reason {next(reasons)}"
        return session

    found = compare_latency(lambda: opened(4.0), lambda: opened(2.0), protocol, clock=clock)
    assert found.comparison.verdict == "faster"


def test_a_device_without_graphs_tells_nothing_of_them() -> None:
    found = timed("chip-deploy").times
    assert found is not None
    assert (found.launch, found.pruned.kernel_by_kernel) == ("", None)


def test_trtexecs_latency_holds_the_transfers() -> None:
    found = timed("trtexec")
    assert (found.comparison.dense.p50, found.comparison.pruned.p50) == (3.0, 1.5)
    assert found.times is not None
    assert found.times.pruned.device_compute.p50 == 1.0


def test_where_only_the_host_has_a_clock_there_is_one_number() -> None:
    works = Works()
    assert works.measure(works.opener("A", always(2.0)), works.opener("B", always(1.0))).times is None


def test_protocols_are_found_by_name_and_carry_the_version_of_their_definition() -> None:
    assert {name: protocol_named(name).id for name in PROTOCOLS} == {
        "chip-deploy": "chip-deploy.latency/1",
        "mlperf-like": "mlperf-like/1",
        "trtexec": "trtexec-10/1",
    }
    assert protocol_named("mlperf-like").seconds == 600
    assert (protocol_named("trtexec", batch=8).warmup_ms, protocol_named("trtexec").laps) == (200, 10)
    assert protocol_named("chip-deploy", seconds=1.0) == LatencyProtocol(seconds=1.0)


def test_a_protocol_of_others_cannot_be_shortened() -> None:
    with pytest.raises(ValueError, match="'mlperf-like' fixes seconds, laps"):
        protocol_named("mlperf-like", seconds=1.0, laps=5, batch=2)
    with pytest.raises(ValueError, match=r"unknown protocol 'mlperf'\. Available: chip-deploy, mlperf-like, trtexec"):
        protocol_named("mlperf")


def test_an_id_that_belongs_to_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="has the id 'trtexec-10/1'"):
        LatencyProtocol(kind="trtexec", id="chip-deploy.latency/1")


def test_a_record_from_before_sessions_were_opened_again_says_one_opening() -> None:
    old = LatencyProtocol().model_dump_json(exclude={"openings", "kind"})
    assert LatencyProtocol.model_validate_json(old) == LatencyProtocol(openings=1)
    assert LatencyProtocol.model_validate_json(LatencyProtocol().model_dump_json()) == LatencyProtocol()


def test_mlperf_estimates_p90_and_trtexec_names_a_lap() -> None:
    laps = [float(lap) for lap in range(1, 1001)]
    assert LatencyProtocol().summarise(laps).early_stopping_p90 is None
    mlperf = protocol_named("mlperf-like").summarise(laps)
    assert mlperf.early_stopping_p90 is not None
    assert mlperf.early_stopping_p90 > mlperf.p90
    # Of 1000 laps in ascending order those with 100 and 10 above them.
    trtexec = protocol_named("trtexec").summarise(laps)
    assert (trtexec.p50, trtexec.p90, trtexec.p99) == (500.5, 900.0, 990.0)


# A real measurement in a process of its own. Each lap multiplies real matrices.
WORK = """
import os, sys, time
import numpy as np
from chip_deploy.export.measure import LatencyProtocol, compare_latency
from chip_deploy.export.watch import Watch

class Multiplying:
    input_names, output_names, input_shapes = ["input"], ["output"], {"input": (1,)}
    def __init__(self, size):
        self.left = np.ones((size, size), np.float32)
    def lap(self):
        for _ in range(20):
            self.left @ self.left
    def close(self): pass

if len(sys.argv) > 2 and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(sys.argv[2])})
protocol = LatencyProtocol(seconds=float(sys.argv[1]), laps=1, openings=1, resamples=200)
told = []
def progress(fraction):
    if not told:
        print("measuring", flush=True)
    told.append(fraction)
found = compare_latency(lambda: Multiplying(96), lambda: Multiplying(96), protocol, watch=Watch(), progress=progress)
print(found.comparison.verdict, found.comparison.reason, flush=True)
"""


def start_measuring(*arguments: str) -> subprocess.Popen[str]:
    """A process that has said that it is measuring, of which the verdict is still to come."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "measuring\n"
    return process


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot suspend a process")
def test_a_process_that_is_suspended_meanwhile_says_so() -> None:
    with start_measuring("2") as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.0)
        process.send_signal(signal.SIGCONT)
        verdict, _ = process.communicate(timeout=120)
    assert verdict.startswith("unstable no verdict, because ")
    assert "the process was held up for" in verdict


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to a core")
def test_a_real_competitor_for_part_of_the_run_gives_unstable() -> None:
    core = min(os.sched_getaffinity(0))
    pinned = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    # 2 s of laps a side, so at least 4 s with the control: the competitor shares their one core from the first blocks.
    with start_measuring("2", str(core)) as process:
        competitor = subprocess.Popen([sys.executable, "-c", pinned])
        try:
            time.sleep(3.0)
        finally:
            competitor.kill()
            competitor.wait()
        verdict, _ = process.communicate(timeout=120)
    assert verdict.startswith("unstable no verdict, because ")
    assert "other processes" in verdict


def test_the_wall_clock_may_step_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    # An hour to and fro at every look; whoever measured by it would see laps of an hour, or of less than nothing.
    steps = itertools.cycle([0.0, 3600.0, -3600.0])
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(steps))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * (real() + next(steps))))
    matrix = np.ones((64, 64), np.float32)

    class Multiplying(PacedSession):
        def lap(self) -> None:
            for _ in range(20):
                matrix @ matrix

    protocol = LatencyProtocol(seconds=0.2, laps=1, openings=1, resamples=100, warmup_ms=20)
    session = Multiplying(WoundClock(), always(0.0))
    found = compare_latency(lambda: session, lambda: session, protocol, watch=Watch())
    assert max(found.laps.dense.laps_ms) < 3.6e6
    assert min(found.laps.dense.laps_ms) > 0
    assert found.watch is not None
    assert 0 < found.watch.seconds < 3600


def test_what_the_watch_saw_can_make_the_result_unstable() -> None:
    class Alarmed(Watch):
        def stop(self, *, threads: int = 1):
            return super().stop(threads=threads).model_copy(update={"doubt": "the house is on fire"})

    comparison, *_ = measure(always(3.0), always(1.0), watch=Alarmed())
    assert comparison.verdict == "unstable"
    assert comparison.reason.startswith("no verdict, because the house is on fire; speed-up 3.000")
