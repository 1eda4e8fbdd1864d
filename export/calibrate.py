"""How far the numbers of a tensor reach: counts of magnitudes over many images, and where an 8-bit range should end.

onnxruntime ships calibrators of its own. They are not used: they hold every tensor of every image in memory at once,
and their entropy, as it is set, tries one single range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

# Shape letters: B bins, L levels, O octaves, S steps of an octave.

Method = Literal["entropy", "percentile", "min-max"]
METHODS: tuple[Method, ...] = get_args(Method)

BINS = 2048
# An octave holds what lies between two powers of two, in steps of one width: the upper half of BINS equal bins.
STEPS = BINS // 2
# Where float32 keeps exponent and fraction, and how much of the fraction is finer than a step.
FRACTION_BITS = 23
FINER_BITS = FRACTION_BITS - STEPS.bit_length() + 1
EXPONENT_BIAS = 127
# Magnitudes that 8 bits with a sign tell apart.
LEVELS = 128
# What a level without values counts as: so little that cutting off costs something, and not everything.
EMPTY = 1e-4
# Of the values that entropy may cut off: where all of them are far from zero, cutting off all would lose nothing by it.
MOST_CUT_OFF_PERCENT = 1.0
# So few of the values are outliers where they lie FAR times beyond all others: they have no part in the bins by which
# entropy judges, or the others would all fall into one, and seem to lose nothing by it.
OUTLIERS_PERCENT, FAR = 0.01, 16.0


class Magnitudes:
    """How often a tensor's values had which magnitude, for every octave in STEPS steps; zeros are not counted.

    A step is as wide, for its magnitude, whether the largest value is near or far: one outlier takes nothing from the
    others. The counts do not depend on the order in which values come, nor on how they are split.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self.finite = True
        """Whether all values were; those that were not are neither counted nor the largest."""
        self.lowest = 0
        """The exponent of two at which the first octave begins."""
        self.counts_OS = np.zeros((0, STEPS), np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count more values."""
        found = self._heeded(np.abs(values, dtype=np.float32).ravel())
        places = found.view(np.int32) >> FINER_BITS
        octaves = int(places.max(initial=0)) // STEPS + 1
        steps = np.bincount(places, minlength=octaves * STEPS).reshape(octaves, STEPS)
        steps[0] = 0  # zeros, and what float32 holds with few bits
        filled = np.flatnonzero(steps.any(axis=1))
        if len(filled):
            first, last = int(filled[0]), int(filled[-1])
            own = self._octaves(first - EXPONENT_BIAS, last - EXPONENT_BIAS)
            self.counts_OS[own] += steps[first : last + 1]

    def add_largest(self, values: np.ndarray) -> None:
        """Heed the largest of more values, and count none."""
        self._heeded(np.abs(values))

    def _heeded(self, found: np.ndarray) -> np.ndarray:
        """The finite ones of the magnitudes, after heeding their largest."""
        if not np.isfinite(found.max(initial=0.0)):
            self.finite = False
            found = found[np.isfinite(found)]
        self.largest = max(self.largest, float(found.max(initial=0.0)))
        return found

    @property
    def ceiling(self) -> int:
        """The exponent of the first power of two above all that was counted."""
        return self.lowest + len(self.counts_OS)

    def bins(self, exponent: int) -> np.ndarray:
        """The counts in BINS equal bins from zero to that power of two, and behind them all that lies beyond.

        Shapes: (BINS + 1,), int64.
        """
        counts_B = np.zeros(BINS + 1, np.int64)
        for octave, counts_S in enumerate(self.counts_OS, start=self.lowest):
            below = exponent - octave
            if below <= 0:
                counts_B[BINS] += counts_S.sum()
                continue
            held = BINS >> below  # bins that the octave fills, as many from zero on as it begins at
            if held:
                counts_B[held : 2 * held] += counts_S.reshape(held, -1).sum(axis=1)
            else:
                counts_B[0] += counts_S.sum()
        return counts_B

    def _octaves(self, first: int, last: int) -> slice:
        """The rows of these octaves, after making room for them."""
        if not len(self.counts_OS):
            self.lowest = first
        before, after = max(0, self.lowest - first), max(0, last + 1 - self.ceiling)
        if before or after:
            self.counts_OS = np.pad(self.counts_OS, ((before, after), (0, 0)))
            self.lowest -= before
        return slice(first - self.lowest, last - self.lowest + 1)


def reach(magnitudes: Magnitudes, *, method: Method, percentile: float = 99.99) -> float:
    """Where the range of 8 bits should end: above it values are cut off, below it they are rounded.

    `min-max` cuts off nothing. `percentile` cuts off the rest of so many percent of the values. `entropy` loses least
    information.
    Source (code): Migacz, 8-bit Inference with TensorRT, GTC 2017, for entropy: the slides' pseudocode. Zeros are not
    counted here, few and far outliers are always cut off, a level that holds nothing but what was cut off counts as
    EMPTY values and not as infinitely bad, and at most MOST_CUT_OFF_PERCENT of the values are cut off.
    """
    if not magnitudes.counts_OS.any() or method == "min-max":
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
    """The upper edge of the step in which that percentile lies."""
    below = np.cumsum(magnitudes.counts_OS)
    octave, step = divmod(int(np.searchsorted(below, below[-1] * percentile / 100)), STEPS)
    return 2.0 ** (magnitudes.lowest + octave) * (1 + (step + 1) / STEPS)


def _least_divergence(magnitudes: Magnitudes) -> float:
    """The end with the least divergence; the farthest of several, which cuts off least."""
    farthest = FAR * _percentile(magnitudes, 100 - OUTLIERS_PERCENT)
    exponent = min(magnitudes.ceiling, math.frexp(farthest)[1])
    counts_B, width = magnitudes.bins(exponent), 2.0**exponent / BINS
    used = int(np.flatnonzero(counts_B[:BINS])[-1]) + 1
    first = round(_percentile(magnitudes, 100 - MOST_CUT_OFF_PERCENT) / width)
    ends = range(max(first, LEVELS), max(used, LEVELS) + 1)
    best = min(reversed(ends), key=lambda end: divergence(counts_B, end=end))
    return best * width
