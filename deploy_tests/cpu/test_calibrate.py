"""Where an 8-bit range ends: counts that do not depend on their order, and three rules, against slower ways there."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from chip_deploy.export.calibrate import (
    BINS,
    EMPTY,
    LEVELS,
    METHODS,
    MOST_CUT_OFF_PERCENT,
    STEPS,
    Magnitudes,
    divergence,
    reach,
    reaches,
)

FINITE = st.floats(-1e6, 1e6, width=32)


def counted(*parts: np.ndarray) -> Magnitudes:
    found = Magnitudes()
    for part in parts:
        found.add(part)
    return found


def normal(n: int = 20_000, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


@given(st.lists(arrays.arrays(np.float32, st.integers(1, 20), elements=FINITE), min_size=1, max_size=6), st.randoms())
@settings(deadline=None)
def test_counts_depend_neither_on_the_order_of_the_values_nor_on_their_parts(parts, chance) -> None:
    whole = counted(np.concatenate(parts))
    chance.shuffle(parts)
    split = counted(*parts)
    assert (split.lowest, split.largest) == (whole.lowest, whole.largest)
    np.testing.assert_array_equal(split.counts_OS, whole.counts_OS)


@pytest.mark.parametrize("exponent", [-3, 0, 2, 4, 9])
def test_counts_are_those_of_numpy_without_zeros_in_bins_up_to_any_power_of_two(exponent: int) -> None:
    values = np.maximum(normal(), 0) * 3
    found = counted(values[:7], values[7:])
    expected, _ = np.histogram(values[(values > 0) & (values < 2.0**exponent)], bins=BINS, range=(0, 2.0**exponent))
    counts = found.bins(exponent)
    np.testing.assert_array_equal(counts[:BINS], expected)
    assert counts[BINS] == np.count_nonzero(values >= 2.0**exponent)
    assert counts.sum() == np.count_nonzero(values)
    assert (found.ceiling, found.largest) == (4, values.max())


def test_the_largest_alone_is_heeded_without_a_count() -> None:
    found = Magnitudes()
    found.add_largest(np.float32([-3.0, 2.0]))
    assert (found.largest, found.counts_OS.sum()) == (3.0, 0)


def test_what_float32_holds_with_few_bits_counts_as_zero() -> None:
    found = counted(np.float32([1e-40, 1.0]))
    assert (found.lowest, found.counts_OS.sum()) == (0, 1)
    assert reach(counted(np.float32([1e-40])), method="entropy") == pytest.approx(1e-40, rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_noted_and_not_counted(bad: float) -> None:
    for add in ("add", "add_largest"):
        found = Magnitudes()
        getattr(found, add)(np.float32([1.0, -3.0]))
        assert found.finite
        getattr(found, add)(np.float32([2.0, bad]))
        assert (found.finite, found.largest) == (False, 3.0)
        assert found.counts_OS.sum() == (3 if add == "add" else 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros_reaches_nowhere(method) -> None:
    assert reach(counted(np.zeros(5, np.float32)), method=method) == 0.0


def test_min_max_ends_at_the_largest_value() -> None:
    values = normal()
    assert reach(counted(values), method="min-max") == np.abs(values).max()


@pytest.mark.parametrize("outlier", [0.0, 1e9])
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.99])
def test_a_percentile_is_that_of_numpy_to_within_a_step(percentile: float, outlier: float) -> None:
    values = np.append(normal(), np.float32(outlier))
    expected = np.percentile(np.abs(values[values != 0]), percentile, method="inverted_cdf")
    found = reach(counted(values), method="percentile", percentile=percentile)
    assert expected <= found <= expected * (1 + 1 / STEPS)


def test_no_rule_goes_beyond_the_largest_value() -> None:
    found = counted(normal())
    ends = [reach(found, method=method, percentile=100.0) for method in METHODS]
    assert max(ends) <= found.largest


def test_entropy_cuts_off_a_lone_outlier_and_keeps_what_is_spread_evenly() -> None:
    lone = counted(normal(), np.float32([1000.0]))
    assert reach(lone, method="entropy") < 100
    even = counted(np.linspace(0, 1, 100_000, dtype=np.float32))
    assert reach(even, method="entropy") > 0.99


@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e30])
def test_how_far_a_lone_outlier_lies_does_not_change_where_entropy_ends(outlier: float) -> None:
    ends = [reach(counted(normal(), np.float32([far])), method="entropy") for far in (100.0, outlier)]
    assert ends[1] == ends[0] < 10


@pytest.mark.parametrize("outlier", [20.0, 1e6])
def test_entropy_takes_the_end_with_the_least_divergence_of_all(outlier: float) -> None:
    found = counted(normal(), np.float32([outlier]))
    exponent = 6 if outlier > 64 else 5  # 16 times the largest of the others, or the outlier itself
    counts, width = found.bins(exponent), 2.0**exponent / BINS
    used = int(np.flatnonzero(counts[:BINS])[-1]) + 1
    most = 100 - MOST_CUT_OFF_PERCENT
    first = max(LEVELS, round(reach(found, method="percentile", percentile=most) / width))
    losses = {end: divergence(counts, end=end) for end in range(first, max(used, LEVELS) + 1)}
    chosen = round(reach(found, method="entropy") / width)
    assert losses[chosen] == min(losses.values())


def test_entropy_does_not_cut_off_values_that_all_lie_far_from_zero() -> None:
    far = counted(np.linspace(0.9, 1.0, 144, dtype=np.float32))
    assert divergence(far.bins(0), end=LEVELS) == pytest.approx(0.0, abs=1e-12)
    assert reach(far, method="entropy") > 0.99


@pytest.mark.parametrize("end", [LEVELS, LEVELS + 1, 500, 777, BINS])
def test_divergence_is_that_of_the_published_loop(end: int) -> None:
    counts = np.random.default_rng(1).integers(0, 50, BINS)
    counts[[3, 130, 131, 600]] = 0
    assert divergence(counts, end=end) == pytest.approx(slow_divergence(counts, end), rel=1e-9)


def test_levels_that_tell_everything_lose_nothing() -> None:
    counts = np.zeros(BINS, np.int64)
    counts[:LEVELS] = np.arange(1, LEVELS + 1)
    assert divergence(counts, end=LEVELS) == pytest.approx(0.0, abs=1e-12)


def test_cutting_off_costs_by_how_much_is_cut_off() -> None:
    counts = np.zeros(BINS, np.int64)
    counts[:100] = 5
    losses = []
    for cut_off in (0, 1, 50):
        counts[-1] = cut_off
        losses.append(divergence(counts, end=LEVELS))
    assert losses[0] == pytest.approx(0.0, abs=1e-12)
    assert 0 < losses[1] < losses[2] < math.inf


def test_every_tensor_gets_its_own_end() -> None:
    found = reaches({"a": counted(np.float32([1.0])), "b": counted(np.float32([5.0]))}, method="min-max")
    assert found == {"a": 1.0, "b": 5.0}


def slow_divergence(counts: np.ndarray, end: int) -> float:
    """The loop of the slides: clip, merge into levels, spread each level over its bins that are not empty, compare."""
    clipped = [int(count) for count in counts[:end]]
    clipped[-1] += int(counts[end:].sum())
    told = [0.0] * end
    for level in range(LEVELS):
        first, last = level * end // LEVELS, (level + 1) * end // LEVELS
        filled = [place for place in range(first, last) if clipped[place]]
        total = sum(int(counts[place]) for place in range(first, last))
        for place in filled:
            told[place] = max(total / len(filled), EMPTY)
    p, q = sum(clipped), sum(told)
    return sum(c / p * math.log((c / p) / (t / q)) for c, t in zip(clipped, told, strict=True) if c)
