"""The tables that the command line prints, beside the report's own."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..chip.scores import ChannelScores, LayerEvidence
    from ..export.laps import Quantiles, Speedup
    from .cut_preview import CutPreview
    from .recipe import ScoreSection
    from .report import EngineRow


BARS = 16
"""Columns of a bar chart in a table."""
BLOCKS, PLAIN = " ▁▂▃▄▅▆▇█", " .:-=+*#"


def plain_table(first: str, *numbers: str, last: str | None = None) -> Table:
    """A table without a frame: a column of names, columns of numbers, and a column of words if `last` heads one."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    if last is not None:
        table.add_column(last, overflow="fold")
    return table


def preview_table(preview: CutPreview) -> Table:
    """What would be cut: the width and the MACs of every group before and after, then all MACs and parameters."""
    table = plain_table("layer", "coupled", "width", "MACs before", "after")
    for row in preview.rows:
        width = f"{row.before} -> {row.after}" if row.after != row.before else str(row.before)
        table.add_row(Text(row.layer), str(row.coupled), width, f"{row.macs_before:,}", f"{row.macs_after:,}")
    table.add_section()
    for name, before, after in (
        ("MACs", preview.macs_before, preview.macs_after),
        ("parameters", preview.params_before, preview.params_after),
    ):
        table.add_row(name, "", f"{after / before:.1%}", f"{before:,}", f"{after:,}")
    return table


def score_table(found: ChannelScores, *, encoding: str = "utf-8") -> Table:
    """Per channel group: what its scores rest on, and the scores themselves from the best channel to the worst.

    The bars are shares of the group's best channel; where there are more channels than columns, a bar is the mean of
    neighbours in that order.
    """
    table = plain_table("layer", "width", "zero", "images", "stable", "settled", "seconds", last="scores, falling")
    table.columns[-1].overflow, table.columns[-1].no_wrap = "crop", True
    table.padding = (0, 1, 0, 0)  # every column counts where names are long
    for layer, vector in found.scores.items():
        on = found.layers.get(layer)
        table.add_row(
            Text(layer),
            str(len(vector)),
            str(int((vector == 0).sum()) or "-"),
            str(on.images) if on else "-",
            *_stability(on),
            f"{on.seconds:.2f}" if on else "-",
            Text(_bars(vector.tolist(), encoding)),
        )
    return table


def score_sentence(found: ChannelScores, asked: ScoreSection) -> str:
    """How many images the scores took, how many groups settled, and what to do about the others."""
    judged = [on for on in found.layers.values() if on.stability is not None]
    unsettled = sum(not on.settled for on in judged)
    on = f"on at most {found.images} images" if found.images else "without any image"
    text = f"{len(found.scores)} groups scored by {found.criterion} {on}"
    if not judged and found.images:
        way = "in joint mode" if asked.joint else "by this criterion"
        return f"{text}. How stable the kept sets are is not judged {way}."
    if not judged:
        return f"{text}."
    rule = (
        f"A kept set is settled when, in {asked.confidence:.0%} of bootstrap resamples of the images, "
        f"{asked.overlap:.0%} of it or all but one channel stay the same, twice in a row."
    )
    if not unsettled:
        return f"{text}; all have settled. {rule}"
    limit = asked.images or asked.max_images
    more = "Allow more with --set score.max_images=N." if found.images >= limit else "There are no more images."
    return f"{text}; {unsettled} have not settled: other images may keep other channels. {more} {rule}"


def _stability(on: LayerEvidence | None) -> tuple[str, str]:
    if on is None or on.stability is None:
        return "-", "-"
    return f"{math.floor(100 * on.stability)}%", "yes" if on.settled else "no"


def _bars(scores: list[float], encoding: str) -> str:
    """Falling bars, at most BARS of them, none below zero; plain signs where the terminal's encoding has no blocks."""
    ranked = sorted(scores, reverse=True)
    count = min(BARS, len(ranked))
    edges = [round(n * len(ranked) / count) for n in range(count + 1)]
    means = [max(sum(ranked[a:b]) / (b - a), 0.0) for a, b in pairwise(edges)]
    signs = _signs(encoding)
    top = means[0]
    return "".join(
        signs[min(len(signs) - 1, math.ceil(mean / top * (len(signs) - 1)))] if top else signs[0] for mean in means
    )


def _signs(encoding: str) -> str:
    try:
        BLOCKS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return PLAIN
    return BLOCKS


def engine_table(rows: list[EngineRow]) -> Table:
    """What was measured, dense beside pruned for every engine and batch, and the verdict."""
    table = plain_table("engine", "batch", "dense p50", "pruned p50", "speed-up", last="verdict")
    for row in rows:
        name = Text(f"{row.target} {row.precision}")
        if not row.batches:
            table.add_row(
                name, str(row.batch), *_latencies(row.dense_latency_ms, row.latency_ms, row.speedup), row.verdict
            )
        for each in row.batches:
            table.add_row(name, str(each.batch), *_latencies(each.dense, each.pruned, each.speedup), each.verdict)
    return table


def engine_sentences(rows: list[EngineRow]) -> list[str]:
    """Why an engine's verdict is none, a sentence for each engine and batch that was not found faster."""
    sentences = []
    for row in rows:
        name = f"{row.target} {row.precision}"
        if not row.batches and row.verdict != "faster":
            sentences.append(f"{name}: {row.verdict}: {row.reason}")
        sentences += [
            f"{name}, batch {each.batch}: {each.verdict}: {each.reason}"
            for each in row.batches
            if each.verdict != "faster"
        ]
    return sentences


def _latencies(dense: Quantiles | None, pruned: Quantiles | None, speedup: Speedup | None) -> tuple[str, str, str]:
    ratio = f"{speedup.estimate:.2f} ({speedup.low:.2f} to {speedup.high:.2f})" if speedup else "-"
    return _p50(dense), _p50(pruned), ratio


def _p50(quantiles: Quantiles | None) -> str:
    return "-" if quantiles is None or quantiles.p50 is None else f"{quantiles.p50:.3f} ms"
