"""How far the numbers of a tensor reach: counts of magnitudes over many images, and where an 8-bit range should end.

onnxruntime ships calibrators of its own. They are not used: they hold every tensor of every image in memory at once,
and their entropy, as it is set, tries one single range.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

# Shape letters: B bins, L levels.

Method = Literal["entropy", "percentile", "min-max"]
METHODS: tuple[Method, ...] = get_args(Method)

BINS = 2048
# Magnitudes that 8 bits with a sign tell apart.
LEVELS = 128
# What a level without values counts as: so little that cutting off costs something, and not everything.
EMPTY = 1e-4
# Of the values that entropy may cut off: where all of them are far from zero, cutting off all would lose nothing by it.
MOST_CUT_OFF_PERCENT = 1.0
# Ranges go down to this power of two; a tensor below it is as good as zero.
SMALLEST_EXPONENT = -60


class Magnitudes:
    """How often a tensor's values had which magnitude, in bins of one width from zero on; zeros are not counted.

    The range is a power of two. A larger value doubles it, and two bins become one, exactly: the counts do not depend
    on the order in which values come, nor on how they are split.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self.range = 0.0
        self.counts_B = np.zeros(BINS, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count more values. Raises: ValueError for one that is not finite."""
        found = np.abs(values, dtype=np.float32).ravel()
        if not self._heed(float(found.max(initial=0.0))):
            return
        places = (found * np.float32(BINS / self.range)).astype(np.intp)
        counted = np.bincount(places, minlength=BINS + 1)
        counted[0] -= found.size - np.count_nonzero(found)
        counted[BINS - 1] += counted[BINS]  # a value at the very end of the range
        self.counts_B += counted[:BINS]

    def add_largest(self, values: np.ndarray) -> None:
        """Heed the largest of more values, and count none. Raises: ValueError for one that is not finite."""
        self._heed(float(np.abs(values).max(initial=0.0)))

    def _heed(self, largest: float) -> bool:
        """Whether there is anything but zeros; the range holds it then."""
        if not np.isfinite(largest):
            raise ValueError("values that are not finite cannot be counted. Look for the layer that overflows in FP32.")
        if not largest:
            return False
        self.largest = max(self.largest, largest)
        self._reach(largest)
        return True

    def _reach(self, largest: float) -> None:
        if self.range == 0.0:
            self.range = float(2.0 ** max(np.ceil(np.log2(largest)), SMALLEST_EXPONENT))
        while self.range < largest:
            pairs = self.counts_B.reshape(-1, 2).sum(axis=1)
            self.counts_B = np.concatenate([pairs, np.zeros_like(pairs)])
            self.range *= 2

    @property
    def width(self) -> float:
        """How broad a bin is."""
        return self.range / BINS


def reach(magnitudes: Magnitudes, *, method: Method, percentile: float = 99.99) -> float:
    """Where the range of 8 bits should end: above it values are cut off, below it they are rounded.

    `min-max` cuts off nothing. `percentile` cuts off the rest of so many percent of the values. `entropy` loses least
    information.
    Source (code): Migacz, 8-bit Inference with TensorRT, GTC 2017, for entropy: the slides' pseudocode. Zeros are not
    counted here, a level that holds nothing but what was cut off counts as EMPTY values and not as infinitely bad, and
    at most MOST_CUT_OFF_PERCENT of the values are cut off.
    """
    if not magnitudes.largest or method == "min-max":
        return magnitudes.largest
    end = _percentile(magnitudes, percentile) if method == "percentile" else _least_divergence(magnitudes)
    return min(end, magnitudes.largest)


def reaches(of: Mapping[str, Magnitudes], *, method: Method, percentile: float = 99.99) -> dict[str, float]:
    """`reach` of every tensor, by name."""
    return {name: reach(found, method=method, percentile=percentile) for name, found in of.items()}


def divergence(counts_B: np.ndarray, *, end: int) -> float:
    """How much information is lost when the first `end` bins become LEVELS levels and the others the last bin.

    The Kullback-Leibler divergence of what the levels tell from what was counted, in nats.
    """
    kept_B = counts_B[:end].astype(np.float64)
    clipped_B = kept_B.copy()
    clipped_B[-1] += counts_B[end:].sum()
    starts_L = np.arange(LEVELS) * end // LEVELS
    sums_L = np.add.reduceat(kept_B, starts_L)
    filled_L = np.add.reduceat((clipped_B > 0).astype(np.float64), starts_L)
    level_of_B = np.repeat(np.arange(LEVELS), np.diff(np.append(starts_L, end)))
    seen = clipped_B > 0
    told = np.maximum((sums_L / np.maximum(filled_L, 1))[level_of_B][seen], EMPTY)
    counted, told = clipped_B[seen] / clipped_B.sum(), told / told.sum()
    return float(np.sum(counted * np.log(counted / told)))


def _percentile(magnitudes: Magnitudes, percentile: float) -> float:
    below_B = np.cumsum(magnitudes.counts_B)
    place = int(np.searchsorted(below_B, below_B[-1] * percentile / 100))
    return (place + 1) * magnitudes.width


def _least_divergence(magnitudes: Magnitudes) -> float:
    """The end with the least divergence; the farthest of several, which cuts off least."""
    used = int(np.flatnonzero(magnitudes.counts_B)[-1]) + 1
    first = round(_percentile(magnitudes, 100 - MOST_CUT_OFF_PERCENT) / magnitudes.width)
    ends = range(max(first, LEVELS), max(used, LEVELS) + 1)
    best = min(reversed(ends), key=lambda end: divergence(magnitudes.counts_B, end=end))
    return best * magnitudes.width
