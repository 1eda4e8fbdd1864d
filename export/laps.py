"""Laps of a network, and what they say: median, percentiles, the ratio of two medians, and how sure each is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import Annotated, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

# Shape letters: L laps of one side, P pairs of blocks, K openings, U either of them, R resamples, S stretches of W
# laps.

PROTOCOL_ID: Final = "chip-deploy.latency/1"
# A percentile is given only with so many laps above it: with fewer it is the slowest lap, whatever that was.
TAIL_LAPS = 2
# Two sessions on one file differ because of where their memory came to lie, however long both are measured: half the
# width of a 95 % interval for the ratio of two of them, relative. Seen on onnxruntime's CPU provider with a ResNet-18
# of 1 ms and its pruned half: the ratios of 48 pairs of sessions were 1.0 % off in the mean square, 2.4 % at most.
SESSION_SPREAD = 0.02
# Of the pairs of blocks in one opening this part at either end does not count: something came between their laps.
TRIMMED = 0.2
# Confidence of MLPerf's early stopping.
EARLY_STOPPING = 0.99

LapMs = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Measurement(BaseModel):
    """Every lap of one side, with the number of the block it was run in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: str = PROTOCOL_ID
    laps_ms: list[LapMs] = Field(min_length=1)
    blocks: list[int]
    opened: list[int] = [0]
    """The blocks before which the session was opened anew."""

    @model_validator(mode="after")
    def _one_block_a_lap(self) -> Measurement:
        if len(self.laps_ms) != len(self.blocks):
            raise ValueError(f"{len(self.laps_ms)} laps with {len(self.blocks)} block numbers")
        return self

    @property
    def openings_P(self) -> np.ndarray:
        """Which opening each block belongs to, blocks in ascending order and openings counted from 0. Shapes: (P,)."""
        found = np.searchsorted(np.sort(self.opened), sorted(set(self.blocks)), side="right")
        return np.unique(found, return_inverse=True)[1]


class Quantiles(BaseModel):
    """Laps in a few numbers, in ms; a percentile that so few laps cannot tell is None."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    p50: float
    p90: float | None
    p99: float | None
    n: int
    mean: float
    cv: float
    """Standard deviation of the laps as a fraction of their mean."""
    throughput: float | None = None
    """Items per second: batch times laps over the time that they took; None in a record from before it was kept."""
    early_stopping_p90: float | None = None
    """MLPerf's estimate of p90, in ms, where the protocol asks for it and there are laps enough."""


class Speedup(BaseModel):
    """Median latency of the dense network over that of the pruned one, block beside block; an interval at `level`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    estimate: float
    low: float
    high: float
    level: float = 0.95


class Control(BaseModel):
    """The dense network against itself, opened a second time and measured in the same turns."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    speedup: Speedup
    """Its truth is 1; the interval is that of the laps alone."""
    noise: float
    """How far from 1 the machine may put two equal networks, relative: the far end of that interval."""


def summarise(laps_ms: Sequence[float], *, batch: int = 1) -> Quantiles:
    """Median, upper percentiles, mean, spread and throughput of laps of `batch` items.

    p50 is the middle lap, or the mean of the two middle ones; others lie between neighbouring laps in proportion
    (numpy's default). p90 needs 20 laps and p99 needs 200, so that at least two laps lie above it.
    Unit: ms; `cv` is a fraction. Raises: ValueError without laps.
    """
    if not len(laps_ms):
        raise ValueError("no laps to summarise: at least one expected. Measure first.")
    laps_L = np.asarray(laps_ms, dtype=np.float64)
    mean = float(laps_L.mean())
    return Quantiles(
        p50=float(np.median(laps_L)),
        p90=quantile(laps_L, 0.90),
        p99=quantile(laps_L, 0.99),
        n=len(laps_L),
        mean=mean,
        cv=float(laps_L.std()) / mean,
        throughput=1e3 * batch / mean,
    )


def ranked_quantile(laps_ms: Sequence[float], q: float) -> float:
    """The lap that trtexec calls the `q` quantile: of n in ascending order the one at n - 1 - floor((1 - q) n).

    Unit: ms. Source (code): percentiles of trtexec 10, which interpolates for the median only.
    """
    laps = sorted(laps_ms)
    # Rounded, because 1 - 0.9 is a little less than a tenth.
    return laps[max(len(laps) - 1 - math.floor(round((1 - q) * len(laps), 6)), 0)]


def early_stopping_quantile(laps_ms: Sequence[float], q: float) -> float | None:
    """MLPerf's estimate of the `q` quantile from laps that were stopped early; None with too few laps for one.

    Let t be the most laps over the true quantile that n laps can have and still speak for it at confidence 0.99: the
    largest t for which a binomial variable of n draws at 1 - q is at most t with a probability of no more than 0.01.
    The estimate is the highest lap once the t - 1 highest are dropped, so it lies above the plain quantile; it takes
    64 laps for q = 0.9.
    Unit: ms. Source (after): the rules of MLPerf Inference, with tolerance 0; a submission needs their LoadGen.
    """
    n = len(laps_ms)
    over = _most_laps_over(n, q)
    return None if over < 1 else sorted(laps_ms)[n - over]


def quantile(laps_ms: Sequence[float] | np.ndarray, q: float) -> float | None:
    """The `q` quantile (0 < q < 1) of laps; None with fewer laps than `laps_needed(q)`."""
    return float(np.quantile(laps_ms, q)) if len(laps_ms) >= laps_needed(q) else None


def laps_needed(q: float) -> int:
    """The fewest laps that can tell the `q` quantile: 1 for the median, above it so many that two lie beyond.

    >>> [laps_needed(q) for q in (0.5, 0.9, 0.99)]
    [1, 20, 200]
    """
    return 1 if q <= 0.5 else math.ceil(round(TAIL_LAPS / (1 - q), 6))


def bootstrap_speedup(
    dense: Measurement,
    pruned: Measurement,
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
    unseen: float | None = None,
) -> Speedup:
    """How many times as long the dense network takes, from blocks that ran side by side, with a bootstrap interval.

    Each pair of blocks gives the ratio of its medians: what the machine did meanwhile is in both, so that a machine
    which changes its speed does not change the ratio. Of an opening's pairs the trimmed mean counts (of logarithms,
    the outer fifth at either end left out), and the estimate is the mean over openings, which also share where their
    memory came to lie. A resample draws openings, or pairs where there is one opening only, with replacement. So few
    openings would make the interval too narrow; it is stretched by Student's factor for their number. An error is
    added (root of the sum of squares, of the logarithms) that no resampling sees: `unseen`, or by default
    `session_spread`.
    Raises: ValueError for sides whose blocks are not paired.
    """
    if set(dense.blocks) != set(pruned.blocks):
        raise ValueError("dense and pruned laps are not from the same blocks. Measure them in one session.")
    openings_P = dense.openings_P
    openings = int(openings_P.max()) + 1
    ratios_P = np.log(block_medians(dense)) - np.log(block_medians(pruned))
    if openings > 1:
        ratios_K = np.array([_trimmed_mean(ratios_P[openings_P == opening]) for opening in range(openings)])
        logs_R = ratios_K[_draws(openings, resamples=resamples, seed=seed)].mean(axis=1)
        estimate = math.exp(float(ratios_K.mean()))
    else:
        logs_R = _trimmed_mean(ratios_P[_draws(len(ratios_P), resamples=resamples, seed=seed)])
        estimate = math.exp(float(_trimmed_mean(ratios_P)))
    further = session_spread(dense) if unseen is None else unseen
    low, high = (
        math.hypot(math.log(end / estimate), further)
        for end in _interval(np.exp(logs_R), level, around=estimate, openings=openings)
    )
    return Speedup(estimate=estimate, low=estimate * math.exp(-low), high=estimate * math.exp(high), level=level)


def block_medians(measured: Measurement) -> np.ndarray:
    """The median of each block's laps in ms, in the order of the block numbers. Shapes: (P,)."""
    order_L = np.argsort(measured.blocks, kind="stable")
    first_P = np.unique(np.asarray(measured.blocks)[order_L], return_index=True)[1]
    return np.array([np.median(laps) for laps in np.split(np.asarray(measured.laps_ms)[order_L], first_P[1:])])


def level_laps(dense: Measurement, pruned: Measurement) -> tuple[np.ndarray, np.ndarray]:
    """Every lap of either side over what the machine did just then: the root of the product of its pair's medians.

    Shapes: (L,) each. Raises: ValueError for sides whose blocks are not paired.
    """
    if set(dense.blocks) != set(pruned.blocks):
        raise ValueError("dense and pruned laps are not from the same blocks. Measure them in one session.")
    level_P = np.sqrt(block_medians(dense) * block_medians(pruned))
    dense_L, pruned_L = (
        np.asarray(side.laps_ms) / level_P[np.unique(side.blocks, return_inverse=True)[1]] for side in (dense, pruned)
    )
    return dense_L, pruned_L


def session_spread(measured: Measurement) -> float:
    """How far the ratio of two equal networks is off because of where their memory lies, whatever else is known.

    SESSION_SPREAD for one opening, less by the root of the number of openings for more.
    """
    return SESSION_SPREAD / math.sqrt(int(measured.openings_P.max()) + 1)


def compare_control(dense: Measurement, control: Measurement, *, resamples: int, seed: int) -> Control:
    """What the laps of one network in two sessions say about the machine.

    Raises: ValueError for sides whose blocks are not paired.
    """
    speedup = bootstrap_speedup(dense, control, resamples=resamples, seed=seed, unseen=0.0)
    return Control(speedup=speedup, noise=max(speedup.high, 1 / speedup.low) - 1)


def bootstrap_quantile(
    measured: Measurement, q: float, *, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float] | None:
    """An interval for the `q` quantile of laps; None below `laps_needed(q)` laps.

    Whole openings are resampled, or blocks where there is one opening only.
    Unit: ms.
    """
    estimate = quantile(measured.laps_ms, q)
    if estimate is None:
        return None
    openings_P = measured.openings_P
    openings = int(openings_P.max()) + 1
    units_P = openings_P if openings > 1 else np.arange(len(openings_P))
    draws = _draws(int(units_P.max()) + 1, resamples=resamples, seed=seed)
    values_R = resampled_quantile(measured, _counts(draws)[:, units_P], q)
    return _interval(values_R, level, around=estimate, openings=openings)


def resampled_quantile(measured: Measurement, counts_RP: np.ndarray, q: float) -> np.ndarray:
    """The `q` quantile of the laps in each resample of blocks, equal to numpy's on the laps written out.

    Shapes: (R, P), how often each resample holds each block, block numbers in ascending order -> (R,).
    Cost: R times the square root of the laps; no resample is ever written out.
    """
    block_L = np.unique(np.asarray(measured.blocks), return_inverse=True)[1]
    order_L = np.argsort(np.asarray(measured.laps_ms), kind="stable")
    laps_L, block_L = np.asarray(measured.laps_ms, dtype=np.float64)[order_L], block_L[order_L]
    last_R = counts_RP @ np.bincount(block_L) - 1
    rank_R = q * last_R
    lower_R = np.floor(rank_R).astype(np.int64)
    upper_R = np.minimum(lower_R + 1, last_R)
    below_R, above_R = (laps_L[_place_of_rank(block_L, counts_RP, each_R)] for each_R in (lower_R, upper_R))
    return below_R + (above_R - below_R) * (rank_R - lower_R)


def _draws(units: int, *, resamples: int, seed: int) -> np.ndarray:
    """Which of so many units each resample holds, drawn with replacement. Shapes: -> (R, U) integers below U."""
    return np.random.default_rng(seed).integers(units, size=(resamples, units))


def _counts(draws_RU: np.ndarray) -> np.ndarray:
    """How often each resample holds each of U units. Shapes: (R, U) -> (R, U)."""
    resamples, units = draws_RU.shape
    offsets_R1 = units * np.arange(resamples)[:, None]
    return np.bincount((draws_RU + offsets_R1).ravel(), minlength=resamples * units).reshape(resamples, units)


def _trimmed_mean(values: np.ndarray) -> np.ndarray:
    """The mean along the last axis without the lowest and the highest TRIMMED part of the values."""
    left_out = int(TRIMMED * values.shape[-1])
    return np.sort(values, axis=-1)[..., left_out : values.shape[-1] - left_out].mean(axis=-1)


def _place_of_rank(block_L: np.ndarray, counts_RP: np.ndarray, rank_R: np.ndarray) -> np.ndarray:
    """Where among the sorted laps, each counted as often as its block was drawn, the lap of a rank (from 0) lies.

    Looked for in two steps, as in a book with a table of contents: in which stretch of the sorted laps the running
    count passes the rank, and where in that stretch.
    Shapes: (L,) the block of each sorted lap, (R, P), (R,) -> (R,).
    """
    laps, blocks = len(block_L), counts_RP.shape[1]
    length = math.isqrt(laps)
    stretches = math.ceil(laps / length)
    cells = np.bincount(block_L * stretches + np.arange(laps) // length, minlength=blocks * stretches)
    # In float64, where the product is fast and whole numbers are exact.
    passed_RS = counts_RP.astype(np.float64) @ cells.reshape(blocks, stretches).cumsum(axis=1)
    stretch_R = (passed_RS <= rank_R[:, None]).sum(axis=1)
    rows_R = np.arange(len(rank_R))
    before_R = np.where(stretch_R > 0, passed_RS[rows_R, stretch_R - 1], 0)
    places_RW = np.minimum(stretch_R[:, None] * length + np.arange(length), laps - 1)
    running_RW = before_R[:, None] + counts_RP[rows_R[:, None], block_L[places_RW]].cumsum(axis=1)
    return stretch_R * length + (running_RW <= rank_R[:, None]).sum(axis=1)


def _interval(values_R: np.ndarray, level: float, *, around: float, openings: int) -> tuple[float, float]:
    """The percentile interval of resampled values, stretched for few openings, wide enough to hold the estimate."""
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    stretch = _stretch(openings, level)
    below, above = (max(math.log(end) * sign, 0.0) for end, sign in ((low / around, -1), (high / around, 1)))
    return around * math.exp(-stretch * below), around * math.exp(stretch * above)


@cache
def _stretch(openings: int, level: float) -> float:
    """How much too narrow a bootstrap over so few openings is: Student's quantile for the normal one, and n for n - 1.

    1 for a single opening, over which nothing is resampled.
    """
    if openings == 1:
        return 1.0
    normal = NormalDist().inv_cdf((1 + level) / 2)
    return _student_quantile((1 + level) / 2, openings - 1) / normal * math.sqrt(openings / (openings - 1))


def _student_quantile(p: float, freedom: int) -> float:
    """The `p` quantile (0.5 <= p < 1) of Student's distribution, to four digits.

    With t = tan(a) times the root of the degrees of freedom, the density in the angle a is a power of its cosine.
    """
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.tan(float(np.interp(2 * p - 1, area / area[-1], angles))) * math.sqrt(freedom)


def _most_laps_over(n: int, q: float) -> int:
    """The largest t with P(X <= t) at most 1 - EARLY_STOPPING, where X counts laps of n over their `q` quantile.

    -1 where there is none. Each probability is made from the one before it, in logarithms.
    """
    t = np.arange(1, n + 1)
    steps = np.log((n - t + 1) / t) + math.log((1 - q) / q)
    log_probability = n * math.log(q) + np.concatenate([[0.0], np.cumsum(steps)])
    passed = np.cumsum(np.exp(log_probability))
    return int(np.searchsorted(passed, 1 - EARLY_STOPPING, side="right")) - 1
