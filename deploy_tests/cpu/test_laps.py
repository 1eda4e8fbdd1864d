"""Statistics of laps against hand-worked values, numpy written out in full, and noise whose truth is known."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from chip_deploy.export.laps import (
    SESSION_SPREAD,
    Measurement,
    Speedup,
    bootstrap_quantile,
    bootstrap_speedup,
    laps_needed,
    quantile,
    resampled_quantile,
    summarise,
)

# Shape letters: P pairs of blocks, N laps of one block, R resamples.


def side(*blocks: list[float]) -> Measurement:
    """Blocks 0, 1, ... with these laps."""
    laps = [(lap, number) for number, block in enumerate(blocks) for lap in block]
    return Measurement(laps_ms=[lap for lap, _ in laps], blocks=[number for _, number in laps])


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
    np.testing.assert_allclose(resampled_quantile(measured, draws_RP, q), expected, rtol=1e-12)


def test_blocks_are_matched_by_number_and_not_by_place() -> None:
    dense = Measurement(laps_ms=[3.0, 1.0, 3.0, 1.0], blocks=[7, 2, 7, 2])
    pruned = Measurement(laps_ms=[1.0, 1.0, 3.0, 3.0], blocks=[2, 2, 7, 7])
    ends = speedup(dense, pruned)
    # Every resample holds the same blocks of both sides, so every ratio is 1.
    assert (ends.low, ends.high) == pytest.approx((math.exp(-SESSION_SPREAD), math.exp(SESSION_SPREAD)), rel=1e-12)


def test_the_speedup_of_steady_laps_is_their_ratio_and_as_sure_as_two_sessions_can_be_compared() -> None:
    found = speedup(side(*[[3.0] * 5] * 20), side(*[[2.0] * 5] * 20))
    assert found.estimate == 1.5
    assert (found.low, found.high) == pytest.approx((1.5 * math.exp(-0.005), 1.5 * math.exp(0.005)), rel=1e-12)


def test_the_interval_is_the_percentile_bootstrap_over_pairs_widened_by_what_sessions_differ() -> None:
    dense, pruned = noisy_sides(3, factor=1.2)
    dense_PN, pruned_PN = (np.reshape(measured.laps_ms, (24, 20)) for measured in (dense, pruned))
    ratios = [
        np.median(dense_PN[draw]) / np.median(pruned_PN[draw])
        for draw in np.random.default_rng(0).integers(24, size=(1000, 24))
    ]
    estimate = np.median(dense_PN) / np.median(pruned_PN)
    below, above = np.log(np.quantile(ratios, [0.025, 0.975]) / estimate)
    expected = estimate * np.exp([-math.sqrt(below**2 + 0.005**2), math.sqrt(above**2 + 0.005**2)])
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
