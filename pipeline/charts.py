"""The geometry of the report's charts: numbers in, SVG path data and positions in percent out; no markup, no text.

Every drawing is stretched to the width of the page, so nothing inside it may be text: labels stand beside it as HTML.
"""

from __future__ import annotations

import itertools
import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

WIDTH = 1000
HEIGHT = 100
PROFILE_BARS = 64
HISTOGRAM_BINS = 72
DRIFT_POINTS = 240


class Tick(NamedTuple):
    """A mark on an axis: where (percent of its length) and the value there."""

    percent: float
    value: float


class ScoreProfile(NamedTuple):
    """The scores of one layer from the highest to the lowest, the kept and the cut channels as two areas."""

    kept: str
    cut: str
    low: float
    high: float


class Column(NamedTuple):
    """One layer in the widths chart: left edge and breadth, heights of the kept and of the cut part, in SVG units."""

    x: float
    breadth: float
    kept: float
    cut: float


class Histogram(NamedTuple):
    """Laps of one network on a shared axis, and how many fell beyond its end."""

    path: str
    beyond: int


class Axis(NamedTuple):
    """The part of an axis that is drawn, in the unit of its values."""

    low: float
    high: float

    def percent(self, value: float) -> float:
        """Where `value` lies on the axis, in percent of its length."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    def ticks(self, *, most: int = 6) -> list[Tick]:
        """Round values on this axis, where they lie on it."""
        return axis_ticks(self.low, self.high, most=most)


class Curve(NamedTuple):
    """A line over steps 1..n; ticks of the vertical axis, which starts at zero."""

    path: str
    ticks: list[Tick]


class Span(NamedTuple):
    """A stretch of an axis and a point in it: left end, length and point, in percent of the axis."""

    left: float
    length: float
    point: float


class Drift(NamedTuple):
    """How two networks' laps moved over the run: a line each, and ticks of the axis that they share."""

    dense: str
    pruned: str
    ticks: list[Tick]


class _Bar(NamedTuple):
    x: float
    breadth: float
    height: float
    is_kept: bool


def score_profile(scores: Sequence[float], kept: Sequence[int]) -> ScoreProfile:
    """The sorted scores as bars; above PROFILE_BARS channels several share a bar, the kept ones to its left.

    A bar's height is the mean of its channels, so nothing is hidden and nothing is invented.
    Shapes: scores (C,), kept (K,) positions in it.
    """
    low, high = min(scores), max(scores)
    bars = _profile_bars(scores, set(kept))
    floor = min(0.0, low)
    scale = HEIGHT / ((max(0.0, high) - floor) or 1.0)
    baseline = HEIGHT + floor * scale
    return ScoreProfile(
        kept=_bars_path([bar for bar in bars if bar.is_kept], baseline=baseline, scale=scale),
        cut=_bars_path([bar for bar in bars if not bar.is_kept], baseline=baseline, scale=scale),
        low=low,
        high=high,
    )


def width_columns(widths: Sequence[tuple[int, int]]) -> list[Column]:
    """Layers side by side, as high as they are wide; the widest fills the height.

    Shapes: (before, after) of every layer, in order.
    """
    if not widths:
        return []
    tallest = max(before for before, _ in widths)
    pitch = WIDTH / len(widths)
    gap = min(0.2 * pitch, 6.0)
    return [
        Column(
            x=_tidy(index * pitch + gap / 2),
            breadth=_tidy(pitch - gap),
            kept=_tidy(HEIGHT * after / tallest),
            cut=_tidy(HEIGHT * (before - after) / tallest),
        )
        for index, (before, after) in enumerate(widths)
    ]


def latency_axis(*laps_ms: Sequence[float]) -> Axis:
    """The shortest axis that shows all laps but the slowest hundredth of each network, with a margin."""
    shown = [sorted(laps)[: max(1, math.ceil(0.99 * len(laps)))] for laps in laps_ms]
    low, high = min(laps[0] for laps in shown), max(laps[-1] for laps in shown)
    margin = 0.04 * (high - low) or 0.05 * high or 1.0
    return Axis(low=max(0.0, low - margin), high=high + margin)


def histogram(laps_ms: Sequence[float], axis: Axis) -> Histogram:
    """How the laps spread over `axis`; the fullest bin fills the height."""
    bins = [0] * HISTOGRAM_BINS
    for lap_ms in laps_ms:
        index = math.floor((lap_ms - axis.low) / (axis.high - axis.low) * HISTOGRAM_BINS)
        if 0 <= index < HISTOGRAM_BINS:
            bins[index] += 1
    breadth = WIDTH / HISTOGRAM_BINS
    bars = [_Bar(index * breadth, breadth, number, is_kept=True) for index, number in enumerate(bins) if number]
    return Histogram(
        path=_bars_path(bars, baseline=HEIGHT, scale=HEIGHT / max(1, *bins)),
        beyond=len(laps_ms) - sum(bins),
    )


def factor_axis(intervals: Sequence[tuple[float, float]]) -> Axis:
    """The shortest axis that shows every interval of factors and 1, with a margin; never narrower than a tenth."""
    low, high = min([1.0, *(low for low, _ in intervals)]), max([1.0, *(high for _, high in intervals)])
    margin = 0.08 * max(high - low, 0.1)
    missing = max(0.0, 0.1 - (high - low))
    return Axis(low=max(0.0, low - margin - missing / 2), high=high + margin + missing / 2)


def span(low: float, point: float, high: float, axis: Axis) -> Span:
    """The interval from `low` to `high` on `axis`, with its estimate."""
    left = axis.percent(low)
    return Span(left=left, length=round(axis.percent(high) - left, 2), point=axis.percent(point))


def drift(dense: Sequence[Sequence[float]], pruned: Sequence[Sequence[float]]) -> Drift:
    """Medians of blocks in the order they ran, in percent of the median of all laps of that network.

    The axis spans what the lines do, never less than 10 % to either side: calm laps look calm. Above DRIFT_POINTS
    blocks, neighbours are joined.
    Shapes: for each network, the laps of every block.
    """
    moved = [_relative_medians(blocks) for blocks in (dense, pruned)]
    far = max(10.0, *(abs(percent) for line in moved for percent in line)) * 1.05
    paths = [_line([HEIGHT * (far - percent) / (2 * far) for percent in line]) for line in moved]
    return Drift(dense=paths[0], pruned=paths[1], ticks=Axis(-far, far).ticks(most=4))


def curve(values: Sequence[float]) -> Curve:
    """Values over steps as a line above zero; one value alone is a level line."""
    low, high = min(0.0, *values), max(0.0, *values)
    extent = (high - low) or 1.0
    path = _line([HEIGHT * (high - value) / extent for value in values])
    return Curve(path=path, ticks=axis_ticks(low, high, most=4))


def axis_ticks(low: float, high: float, *, most: int = 6) -> list[Tick]:
    """Round values from `low` to `high`, at most `most` steps apart by 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [Tick(0.0, low)]
    step = _round_step((high - low) / most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [_tidy(index * step, digits=12) for index in range(first, last + 1)]
    return [Tick(round(100 * (value - low) / (high - low), 2), value) for value in values]


def _relative_medians(blocks: Sequence[Sequence[float]]) -> list[float]:
    whole = statistics.median(itertools.chain(*blocks))
    joined = (itertools.chain(*blocks[start:end]) for start, end in _shares(len(blocks), DRIFT_POINTS))
    return [100 * (statistics.median(laps) / whole - 1) for laps in joined]


def _line(heights: Sequence[float]) -> str:
    """A line through heights that are equally far apart; one alone is a level line."""
    level = [heights[0], heights[0]] if len(heights) == 1 else heights
    steps = [WIDTH * index / (len(level) - 1) for index in range(len(level))]
    return "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in zip(steps, level, strict=True))


def _profile_bars(scores: Sequence[float], kept: set[int]) -> list[_Bar]:
    order = sorted(range(len(scores)), key=lambda channel: (-scores[channel], channel))
    pitch = WIDTH / len(order)
    bars = []
    for start, end in _shares(len(order), PROFILE_BARS):
        x = start * pitch
        for is_kept in (True, False):
            members = [scores[channel] for channel in order[start:end] if (channel in kept) == is_kept]
            if members:
                breadth = len(members) * pitch
                bars.append(_Bar(x, breadth, sum(members) / len(members), is_kept))
                x += breadth
    return bars


def _shares(total: int, most: int) -> list[tuple[int, int]]:
    """`range(total)` in at most `most` slices of nearly equal length."""
    parts = min(total, most)
    edges = [total * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(edges))


def _bars_path(bars: Sequence[_Bar], *, baseline: float, scale: float) -> str:
    """Bars as one path; neighbours share their edge, so that no seam shows between them."""
    pieces: list[str] = []
    end = None
    for bar in bars:
        if end is None or abs(bar.x - end) > 1e-6:
            pieces.append(f"{_close(baseline) if pieces else ''}M{_number(bar.x)} {_number(baseline)}")
        end = bar.x + bar.breadth
        pieces.append(f"V{_number(baseline - bar.height * scale)}H{_number(end)}")
    return "".join(pieces) + (_close(baseline) if pieces else "")


def _close(baseline: float) -> str:
    return f"V{_number(baseline)}Z"


def _round_step(raw: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    choices = [1, 2, 5, 10]
    return power * choices[min(bisect_left(choices, raw / power), 3)]


def _number(value: float) -> str:
    return f"{_tidy(value) + 0.0:g}"  # + 0.0 turns minus zero into zero


def _tidy(value: float, *, digits: int = 1) -> float:
    return round(value, digits)
