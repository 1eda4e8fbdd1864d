"""The protocol of a measurement on a clock that tests can wind, and the verdicts on laps made by hand."""

import gc
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chip_deploy.export.errors import MeasureFailed
from chip_deploy.export.laps import Measurement
from chip_deploy.export.machine import read_machine
from chip_deploy.export.measure import (
    BLOCK_LAPS,
    PAIRS,
    WARMUP_WINDOWS,
    Comparison,
    LatencyProtocol,
    compare_laps,
    compare_latency,
    laps_path,
    read_laps,
    write_laps,
)

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
    return *compare_latency(*sessions, protocol, clock=clock, **options), clock


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
    assert comparison.reason == "speed-up 1.500 (95 % interval 1.493 to 1.508), p50 1 ms against 1.5 ms of dense."


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


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, Measurement, Measurement]:
    dense, pruned = laps_of([1.234567, 2.5]), laps_of([0.1, 0.2, 0.3])
    path = laps_path(tmp_path / "ort-cpu.fp32.engine")
    write_laps(path, protocol=LatencyProtocol(), machine=read_machine(), dense=dense, pruned=pruned)
    return path, dense, pruned


def test_laps_are_read_back_as_they_were(recorded: tuple[Path, Measurement, Measurement]) -> None:
    path, dense, pruned = recorded
    laps = read_laps(path)
    assert path.name == "ort-cpu.fp32.latency.json"
    assert (laps.dense, laps.pruned, laps.protocol) == (dense, pruned, LatencyProtocol())
    assert laps.machine.cpu == read_machine().cpu


def test_a_laps_file_is_plain_json_with_a_line_for_each_list(recorded: tuple[Path, Measurement, Measurement]) -> None:
    text = recorded[0].read_text("utf-8")
    plain = json.loads(text)
    assert list(plain) == ["protocol", "machine", "dense_laps_ms", "dense_blocks", "pruned_laps_ms", "pruned_blocks"]
    assert plain["dense_laps_ms"][:2] == [1.234567, 2.5]
    assert len(text.splitlines()) == 8


def test_a_file_that_holds_no_laps_is_refused_by_name(recorded: tuple[Path, Measurement, Measurement]) -> None:
    path, _, _ = recorded
    plain = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(plain | {"dense_laps_ms": [1.0, -1.0]}), "utf-8")
    with pytest.raises(ValueError, match=r"ort-cpu.fp32.latency.json: no laps of this version \(dense_laps_ms.1"):
        read_laps(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no laps here"):
        read_laps(path)
