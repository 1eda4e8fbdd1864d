"""Laps of a network, and what they say: median, percentiles, the ratio of two medians, and how sure each is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

# Shape letters: L laps of one side, P pairs of blocks, R resamples, S stretches of W laps.

PROTOCOL_ID = "chip-deploy.latency/1"
# A percentile is given only with so many laps above it: with fewer it is the slowest lap, whatever that was.
TAIL_LAPS = 2
# Two sessions on one file differ by so much because of where their memory came to lie, however long both are
# measured: half the width of a 95 % interval, relative; more than was ever seen between two of one network on a CPU.
SESSION_SPREAD = 0.005

LapMs = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Measurement(BaseModel):
    """Every lap of one side, with the number of the block it was run in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: str = PROTOCOL_ID
    laps_ms: list[LapMs] = Field(min_length=1)
    blocks: list[int]

    @model_validator(mode="after")
    def _one_block_a_lap(self) -> Measurement:
        if len(self.laps_ms) != len(self.blocks):
            raise ValueError(f"{len(self.laps_ms)} laps with {len(self.blocks)} block numbers")
        return self


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


class Speedup(BaseModel):
    """Median latency of the dense network over that of the pruned one, with an interval at `level`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    estimate: float
    low: float
    high: float
    level: float = 0.95


def summarise(laps_ms: Sequence[float]) -> Quantiles:
    """Median, upper percentiles, mean and spread of laps.

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
    )


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
    dense: Measurement, pruned: Measurement, *, resamples: int, seed: int, level: float = 0.95
) -> Speedup:
    """Ratio of the medians of all laps, dense over pruned, with a percentile bootstrap over pairs of blocks.

    A resample draws as many pairs as there are, with replacement, and takes the medians of all laps in them: laps of
    one block are too alike to count one by one, and neighbours share what the machine did meanwhile. To this error
    SESSION_SPREAD is added as an independent one (root of the sum of squares, of the logarithms): it is the part of
    the error that is the same in every block, and that no resampling can see.
    Raises: ValueError for sides whose blocks are not paired.
    """
    pairs = set(dense.blocks)
    if pairs != set(pruned.blocks):
        raise ValueError("dense and pruned laps are not from the same blocks. Measure them in one session.")
    draws_RP = _draws(len(pairs), resamples=resamples, seed=seed)
    ratios_R = resampled_quantile(dense, draws_RP, 0.5) / resampled_quantile(pruned, draws_RP, 0.5)
    estimate = float(np.median(dense.laps_ms) / np.median(pruned.laps_ms))
    low, high = (
        math.hypot(math.log(end / estimate), SESSION_SPREAD) for end in _interval(ratios_R, level, around=estimate)
    )
    return Speedup(estimate=estimate, low=estimate * math.exp(-low), high=estimate * math.exp(high), level=level)


def bootstrap_quantile(
    measured: Measurement, q: float, *, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float] | None:
    """An interval for the `q` quantile of laps, blocks resampled; None with fewer laps than `laps_needed(q)`.

    Unit: ms.
    """
    estimate = quantile(measured.laps_ms, q)
    if estimate is None:
        return None
    draws_RP = _draws(len(set(measured.blocks)), resamples=resamples, seed=seed)
    return _interval(resampled_quantile(measured, draws_RP, q), level, around=estimate)


def resampled_quantile(measured: Measurement, draws_RP: np.ndarray, q: float) -> np.ndarray:
    """The `q` quantile of the laps in each resample of blocks, equal to numpy's on the laps written out.

    Shapes: (R, P), positions among the block numbers in ascending order -> (R,).
    Cost: R times the square root of the laps; no resample is ever written out.
    """
    numbers, block_L = np.unique(np.asarray(measured.blocks), return_inverse=True)
    order_L = np.argsort(np.asarray(measured.laps_ms), kind="stable")
    laps_L, block_L = np.asarray(measured.laps_ms, dtype=np.float64)[order_L], block_L[order_L]
    counts_RP = _counts(draws_RP, len(numbers))
    last_R = counts_RP @ np.bincount(block_L) - 1
    rank_R = q * last_R
    lower_R = np.floor(rank_R).astype(np.int64)
    upper_R = np.minimum(lower_R + 1, last_R)
    below_R, above_R = (laps_L[_place_of_rank(block_L, counts_RP, each_R)] for each_R in (lower_R, upper_R))
    return below_R + (above_R - below_R) * (rank_R - lower_R)


def _draws(pairs: int, *, resamples: int, seed: int) -> np.ndarray:
    """Which pairs each resample holds. Shapes: -> (R, P) integers below P."""
    return np.random.default_rng(seed).integers(pairs, size=(resamples, pairs))


def _counts(draws_RP: np.ndarray, pairs: int) -> np.ndarray:
    """How often each resample holds each of `pairs` pairs. Shapes: (R, any) -> (R, P)."""
    offsets_R1 = pairs * np.arange(len(draws_RP))[:, None]
    cells = len(draws_RP) * pairs
    return np.bincount((draws_RP + offsets_R1).ravel(), minlength=cells).reshape(-1, pairs)


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


def _interval(values_R: np.ndarray, level: float, *, around: float) -> tuple[float, float]:
    """The percentile interval of resampled values, wide enough to hold the estimate itself."""
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    return min(float(low), around), max(float(high), around)
