"""Statistics of laps against hand-worked values, numpy written out in full, and noise whose truth is known."""

import math

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from chip_deploy.export.laps import (
    SESSION_SPREAD,
    Measurement,
    Speedup,
    bootstrap_quantile,
    bootstrap_speedup,
    compare_control,
    early_stopping_quantile,
    laps_needed,
    level_laps,
    quantile,
    ranked_quantile,
    resampled_quantile,
    summarise,
)

# Shape letters: P pairs of blocks, N laps of one block, R resamples.


def side(*blocks: list[float], opened: tuple[int, ...] = (0,)) -> Measurement:
    """Blocks 0, 1, ... with these laps."""
    laps = [(lap, number) for number, block in enumerate(blocks) for lap in block]
    return Measurement(laps_ms=[lap for lap, _ in laps], blocks=[number for _, number in laps], opened=list(opened))


def speedup(dense: Measurement, pruned: Measurement, *, resamples: int = 1000) -> Speedup:
    return bootstrap_speedup(dense, pruned, resamples=resamples, seed=0)


def noisy_sides(seed: int, *, factor: float, pairs: int = 24) -> tuple[Measurement, Measurement]:
    """A B B A blocks on a machine that drifts, is interrupted, and is slower in some blocks than in others."""
    random = np.random.default_rng(seed)
    machine = np.exp(0.01 * random.standard_normal(2 * pairs) + 0.002 * random.standard_normal(2 * pairs).cumsum())
    laps_PN = machine[:, None] * np.exp(0.02 * random.standard_normal((2 * pairs, 20)))
    laps_PN[random.random(laps_PN.shape) < 0.05] *= 5
    order = np.array([0, 1, 1, 0] * (pairs // 2))
    return side(*(factor * laps_PN[order == 0]).tolist()), side(*laps_PN[order == 1].tolist())


@pytest.mark.parametrize(
    ("laps", "median"), [([7.0], 7.0), ([1.0, 2.0], 1.5), ([9.0, 1.0, 2.0], 2.0), ([4.0, 1.0, 3.0, 100.0], 3.5)]
)
def test_the_median_is_the_middle_lap_or_the_mean_of_the_two_middle_ones(laps: list[float], median: float) -> None:
    assert summarise(laps).p50 == median


def test_mean_and_spread_are_those_of_the_whole_sample() -> None:
    # 2, 4, 4, 4, 5, 5, 7, 9: the textbook sample with mean 5 and population standard deviation 2.
    summary = summarise([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert (summary.n, summary.mean, summary.cv) == (8, 5.0, 0.4)


@pytest.mark.parametrize(("n", "p90", "p99"), [(1, None, None), (19, None, None), (20, 18.1, None), (199, 179.2, None)])
def test_a_percentile_that_so_few_laps_cannot_tell_is_none(n: int, p90: float | None, p99: float | None) -> None:
    # Laps 1, 2, ..., n: the 90th percentile lies at 1 + 0.9 (n - 1).
    summary = summarise([float(lap) for lap in range(1, n + 1)])
    assert (summary.p90, summary.p99) == (pytest.approx(p90) if p90 else None, p99)


@pytest.mark.parametrize(("q", "n"), [(0.9, 20), (0.99, 200)])
def test_at_least_two_laps_lie_above_a_percentile_that_is_given(q: float, n: int) -> None:
    laps = np.arange(float(n))
    value = quantile(laps, q)
    assert laps_needed(q) == n
    assert value is not None
    assert (laps > value).sum() == 2
    assert quantile(laps[1:], q) is None


@pytest.mark.parametrize("n", [200, 201, 1337])
def test_percentiles_are_numpys(n: int) -> None:
    laps = np.random.default_rng(n).lognormal(size=n)
    summary = summarise(laps.tolist())
    assert [summary.p50, summary.p90, summary.p99] == pytest.approx(np.percentile(laps, [50, 90, 99]), rel=1e-12)


def test_no_laps_are_refused() -> None:
    with pytest.raises(ValueError, match="no laps"):
        summarise([])


@pytest.mark.parametrize(
    ("laps", "blocks", "complaint"),
    [
        ([1.0, 2.0], [0], "2 laps with 1 block numbers"),
        ([0.0], [0], "greater than 0"),
        ([math.nan], [0], "finite"),
        ([], [], "at least 1 item"),
    ],
)
def test_laps_that_are_none_are_refused(laps: list[float], blocks: list[int], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Measurement(laps_ms=laps, blocks=blocks)


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", range(4))
def test_resampled_quantiles_are_numpys_on_the_blocks_written_out(q: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    # Blocks of unequal length, with ties.
    blocks = [random.lognormal(size=random.integers(1, 30)).round(1) + 0.1 for _ in range(random.integers(1, 12))]
    draws_RP = random.integers(len(blocks), size=(50, len(blocks)))
    expected = [np.quantile(np.concatenate([blocks[k] for k in draw]), q) for draw in draws_RP]
    measured = side(*[block.tolist() for block in blocks])
    counts_RP = np.array([np.bincount(draw, minlength=len(blocks)) for draw in draws_RP])
    np.testing.assert_allclose(resampled_quantile(measured, counts_RP, q), expected, rtol=1e-12)


def test_blocks_are_matched_by_number_and_not_by_place() -> None:
    dense = Measurement(laps_ms=[3.0, 1.0, 3.0, 1.0], blocks=[7, 2, 7, 2])
    pruned = Measurement(laps_ms=[1.0, 1.0, 3.0, 3.0], blocks=[2, 2, 7, 7])
    ends = speedup(dense, pruned)
    # Every resample holds the same blocks of both sides, so every ratio is 1.
    assert (ends.low, ends.high) == pytest.approx((math.exp(-SESSION_SPREAD), math.exp(SESSION_SPREAD)), rel=1e-12)


def test_the_speedup_of_steady_laps_is_their_ratio_and_as_sure_as_two_sessions_can_be_compared() -> None:
    found = speedup(side(*[[3.0] * 5] * 20), side(*[[2.0] * 5] * 20))
    assert found.estimate == pytest.approx(1.5, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((1.5 * math.exp(-0.02), 1.5 * math.exp(0.02)), rel=1e-12)


def test_the_interval_is_the_percentile_bootstrap_over_pairs_widened_by_what_sessions_differ() -> None:
    dense, pruned = noisy_sides(3, factor=1.2)
    dense_PN, pruned_PN = (np.reshape(measured.laps_ms, (24, 20)) for measured in (dense, pruned))
    ratios_P = np.median(dense_PN, axis=1) / np.median(pruned_PN, axis=1)
    draws = np.random.default_rng(0).integers(24, size=(1000, 24))
    # Of 24 pairs the four lowest and the four highest do not count.
    ratios = [math.exp(stats.trim_mean(np.log(ratios_P[draw]), 0.2)) for draw in draws]
    estimate = math.exp(stats.trim_mean(np.log(ratios_P), 0.2))
    below, above = np.log(np.quantile(ratios, [0.025, 0.975]) / estimate)
    expected = estimate * np.exp([-math.sqrt(below**2 + 0.02**2), math.sqrt(above**2 + 0.02**2)])
    found = speedup(dense, pruned)
    assert (found.estimate, found.low, found.high) == pytest.approx((estimate, *expected), rel=1e-12)


def test_the_same_seed_gives_the_same_interval_and_another_one_another() -> None:
    dense, pruned = noisy_sides(1, factor=1.0)
    assert speedup(dense, pruned) == speedup(dense, pruned)
    assert bootstrap_speedup(dense, pruned, resamples=1000, seed=1) != speedup(dense, pruned)


@pytest.fixture
def _one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laps as if sessions did not differ, so that the bootstrap stands alone."""
    monkeypatch.setattr("chip_deploy.export.laps.SESSION_SPREAD", 0.0)


@pytest.mark.usefixtures("_one_session")
@pytest.mark.parametrize("factor", [1.0, 1.05])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(factor: float) -> None:
    found = [speedup(*noisy_sides(seed, factor=factor), resamples=400) for seed in range(100)]
    # 95 of 100 are meant to hold it; 89 or fewer would be 2.8 standard deviations off (lap by lap it is 78).
    assert sum(one.low <= factor <= one.high for one in found) >= 90
    # Were the interval merely wide, it would say nothing: the noise moves block medians by 1 %.
    assert np.median([one.high - one.low for one in found]) < 0.04


@pytest.mark.usefixtures("_one_session")
def test_equal_networks_are_hardly_ever_found_faster() -> None:
    faster = sum(speedup(*noisy_sides(seed, factor=1.0), resamples=400).low > 1 for seed in range(100, 200))
    # 2.5 of 100 are meant to be; 7 or more would be 2.9 standard deviations off.
    assert faster <= 6


def test_sides_from_different_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="not from the same blocks"):
        speedup(side([1.0], [1.0]), side([1.0]))


def test_the_interval_of_a_percentile_holds_it_and_grows_with_the_noise() -> None:
    calm = side(*[[1.0 + 0.0001 * lap for lap in range(10)]] * 20)
    wild = side(*[[1.0 + 0.0001 * lap + 0.05 * block for lap in range(10)] for block in range(20)])
    for measured, widest, narrowest in ((calm, 0.001, 0.0), (wild, 1.0, 0.05)):
        found = bootstrap_quantile(measured, 0.99, resamples=500, seed=0)
        assert found is not None
        assert found[0] <= np.quantile(measured.laps_ms, 0.99) <= found[1]
        assert narrowest <= found[1] - found[0] <= widest
    assert bootstrap_quantile(side([1.0] * 199), 0.99, resamples=500, seed=0) is None


def sessions_that_differ(seed: int, *, factor: float, openings: int = 6, spread: float = 0.01) -> list[Measurement]:
    """Laps of two networks whose sessions come out a little faster or slower each time they are opened."""
    random = np.random.default_rng(seed)
    opened = tuple(range(0, 4 * openings, 4))
    sides = []
    for scale in (factor, 1.0):
        sessions = scale * np.exp(spread * random.standard_normal(openings) / math.sqrt(2))
        blocks = np.repeat(sessions, 4)[:, None] * np.exp(0.02 * random.standard_normal((4 * openings, 20)))
        sides.append(side(*blocks.tolist(), opened=opened))
    return sides


@pytest.mark.usefixtures("_one_session")
@pytest.mark.parametrize("openings", [3, 6])
def test_sessions_that_differ_are_in_the_interval_when_they_were_opened_often(openings: int) -> None:
    found = [speedup(*sessions_that_differ(seed, factor=1.05, openings=openings), resamples=400) for seed in range(100)]
    # 95 of 100 are meant to hold it; 89 or fewer would be 2.8 standard deviations off.
    assert sum(one.low <= 1.05 <= one.high for one in found) >= 90


@pytest.mark.usefixtures("_one_session")
def test_one_interval_over_blocks_alone_would_be_too_sure_of_sessions_that_differ() -> None:
    pairs = [sessions_that_differ(seed, factor=1.05, spread=0.02) for seed in range(100)]
    found = [speedup(*(one.model_copy(update={"opened": [0]}) for one in pair), resamples=400) for pair in pairs]
    # Four blocks of one session look like four witnesses: the interval is half as wide as it should be.
    assert sum(one.low <= 1.05 <= one.high for one in found) < 85


def changing_machine(seed: int, *, factor: float) -> list[Measurement]:
    """Six openings of ten pairs on a machine that is a third slower for many blocks at a time, half of the time."""
    random = np.random.default_rng(seed)
    slow_P = np.repeat(random.random(12) < 0.5, 5)
    opened = tuple(range(0, 60, 10))
    return [
        side(
            *(scale * np.where(slow_P, 1.33, 1.0)[:, None] * random.lognormal(0, 0.05, (60, 15))).tolist(),
            opened=opened,
        )
        for scale in (factor, 1.0)
    ]


def test_a_machine_that_changes_its_speed_for_both_does_not_change_the_ratio() -> None:
    found = [speedup(*changing_machine(seed, factor=1.05), resamples=400) for seed in range(40)]
    # A median of 15 laps is 0.05 * 1.25 / sqrt(15) off, the mean of 60 ratios of two such 0.3 %.
    assert max(abs(one.estimate - 1.05) for one in found) < 0.0125
    assert sum(one.low > 1 for one in found) >= 39
    sides = [changing_machine(seed, factor=1.05) for seed in range(40)]
    pooled = [np.median(dense.laps_ms) / np.median(pruned.laps_ms) for dense, pruned in sides]
    assert max(abs(ratio - 1.05) for ratio in pooled) > 0.03  # the medians of all laps fall into either speed


def test_levelled_laps_are_in_shares_of_what_their_pair_took() -> None:
    dense, pruned = side([2.0, 2.0, 4.0], [20.0, 20.0, 10.0]), side([8.0, 8.0, 8.0], [80.0, 20.0, 80.0])
    dense_L, pruned_L = level_laps(dense, pruned)
    # The levels: sqrt(2 * 8) and sqrt(20 * 80).
    assert dense_L.tolist() == pytest.approx([0.5, 0.5, 1.0, 0.5, 0.5, 0.25], rel=1e-12)
    assert pruned_L.tolist() == pytest.approx([2.0, 2.0, 2.0, 2.0, 0.5, 2.0], rel=1e-12)
    with pytest.raises(ValueError, match="not from the same blocks"):
        level_laps(dense, side([1.0]))


def test_openings_are_told_from_the_blocks_before_which_they_were() -> None:
    measured = side(*[[1.0]] * 7, opened=(0, 2, 5))
    assert measured.openings_P.tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_what_is_known_of_sessions_counts_less_the_more_often_they_were_opened() -> None:
    steady = [side(*[[lap] * 5] * 8, opened=(0, 2, 4, 6)) for lap in (3.0, 2.0)]
    found = speedup(*steady)
    # Four openings: half of SESSION_SPREAD; laps that never differ add nothing.
    assert (found.low, found.high) == pytest.approx((1.5 * math.exp(-0.01), 1.5 * math.exp(0.01)), rel=1e-9)


@pytest.mark.parametrize(("openings", "student"), [(2, 12.706), (3, 4.303), (4, 3.182), (6, 2.571), (11, 2.228)])
def test_an_interval_over_few_openings_is_stretched_by_students_factor(openings: int, student: float) -> None:
    # The table's 97.5 % quantiles for one degree of freedom less than openings.
    dense, pruned = sessions_that_differ(0, factor=1.0, openings=openings)
    dense_KN, pruned_KN = (np.median(np.reshape(each.laps_ms, (openings, 4, 20)), 2) for each in (dense, pruned))
    # Of four pairs none is left out; whole openings are drawn.
    logs_K = np.log(dense_KN / pruned_KN).mean(1)
    means = logs_K[np.random.default_rng(0).integers(openings, size=(1000, openings))].mean(1)
    estimate = math.exp(logs_K.mean())
    high = max(float(np.quantile(means, 0.975)) - logs_K.mean(), 0.0)
    stretched = high * student / 1.959964 * math.sqrt(openings / (openings - 1))
    found = bootstrap_speedup(dense, pruned, resamples=1000, seed=0, unseen=0.0)
    assert math.log(found.high / estimate) == pytest.approx(stretched, rel=1e-3)


def test_a_control_is_as_noisy_as_the_far_end_of_its_interval() -> None:
    dense, control = sessions_that_differ(1, factor=0.97)
    found = compare_control(dense, control, resamples=500, seed=0)
    assert found.speedup.low < 0.98
    assert found.noise == pytest.approx(1 / found.speedup.low - 1, rel=1e-12)
    assert compare_control(dense, dense, resamples=500, seed=0).noise == 0.0


def test_throughput_is_items_over_time() -> None:
    # Four laps of 8 items in 20 ms: 32 items in 0.02 s.
    assert summarise([2.0, 4.0, 6.0, 8.0], batch=8).throughput == pytest.approx(1600.0)


@pytest.mark.parametrize(("q", "fewest"), [(0.9, 64), (0.99, 662)])
def test_early_stopping_needs_as_many_laps_as_mlperf_says(q: float, fewest: int) -> None:
    laps = [float(lap) for lap in range(1, fewest + 1)]
    assert early_stopping_quantile(laps[:-1], q) is None
    # With the fewest laps, the estimate is the slowest of them.
    assert early_stopping_quantile(laps, q) == fewest


@pytest.mark.parametrize("n", [100, 1000, 4321])
def test_early_stopping_drops_as_many_laps_as_the_binomial_distribution_allows(n: int) -> None:
    def log_ways(k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    def at_most(t: int) -> float:
        return math.fsum(math.exp(log_ways(k) + k * math.log(0.1) + (n - k) * math.log(0.9)) for k in range(t + 1))

    laps = [float(lap) for lap in np.random.default_rng(n).permutation(n) + 1]
    over = max(t for t in range(n // 10) if at_most(t) <= 0.01)
    estimate = early_stopping_quantile(laps, 0.9)
    assert estimate == n - over + 1
    assert estimate > np.quantile(laps, 0.9)


@pytest.mark.parametrize(
    ("n", "q", "rank"), [(10, 0.9, 9), (10, 0.99, 10), (100, 0.9, 90), (1000, 0.99, 990), (1, 0.9, 1)]
)
def test_trtexecs_percentiles_are_laps_and_no_mixtures(n: int, q: float, rank: int) -> None:
    # Of n in ascending order, the one at n - 1 - floor((1 - q) n), counted from 0; the lap here is its rank.
    assert ranked_quantile([float(lap) for lap in range(n, 0, -1)], q) == rank
