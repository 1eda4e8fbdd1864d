"""Where the time went, layer by layer, as the pages show it: dense beside pruned, and what the MACs promised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..export.profile import LayerComparison, LayerTime
from . import quantities
from .report_latency import anchors, engine_name

if TYPE_CHECKING:
    from .report import EngineRow

# So many layers are read in one go; of a deeper network the slowest are shown first and the others on request.
MOST_LAYERS = 40
SLOWEST = 20

REASONS = {
    "launch-bound": "its time is little more than the cost of starting it",
    "memory-bound": "it waits for memory, not for arithmetic",
    "not faster": "its time did not fall with its MACs",
    "fell behind": "its time fell, but less than its MACs: narrower layers run fewer MACs a second",
    "overhead": "work without MACs that the runtime added, or no longer fuses",
}


class LayerView(NamedTuple):
    """One layer: its times, and bars in percent of the slowest layer of all."""

    number: int
    layer: str
    operators: str
    widths: str
    dense: str
    pruned: str
    macs: str
    change: str
    promised: str
    why: str
    dense_bar: float
    pruned_bar: float
    promised_bar: float | None


class LayersView(NamedTuple):
    """The layers of one engine: those to read first, the others, and what they say together."""

    id: str
    engine: str
    profiled_on: str
    sentences: list[str]
    all: list[LayerView]
    first: list[LayerView]
    rest: list[LayerView]
    rest_share: str
    reasons: dict[str, str]


def layers_views(engines: Sequence[EngineRow]) -> list[LayersView]:
    """The engines whose layers were timed."""
    return [
        _layers_view(engine_name(engine), anchor, engine.layers)
        for engine, anchor in zip(engines, anchors(engines), strict=True)
        if engine.layers is not None
    ]


def _layers_view(engine: str, anchor: str, layers: LayerComparison) -> LayersView:
    longest = max((ms for row in layers.rows for ms in (row.dense_ms, row.pruned_ms) if ms is not None), default=0.0)
    views = [_layer_view(number, row, longest or 1.0) for number, row in enumerate(layers.rows, start=1)]
    chosen = _slowest(layers.rows) if len(views) > MOST_LAYERS else set(range(len(views)))
    rest = [row for index, row in enumerate(layers.rows) if index not in chosen]
    total = sum(row.dense_ms for row in layers.rows)
    return LayersView(
        id=anchor,
        engine=engine,
        profiled_on=layers.profiled_on,
        sentences=layers.sentences,
        all=views,
        first=[view for index, view in enumerate(views) if index in chosen],
        rest=[view for index, view in enumerate(views) if index not in chosen],
        reasons={why: means for why, means in REASONS.items() if any(row.why == why for row in layers.rows)},
        rest_share=quantities.fraction(sum(row.dense_ms for row in rest) / total) if total else "",
    )


def _slowest(rows: Sequence[LayerTime]) -> set[int]:
    """Which layers took longest, dense or pruned."""
    longest_first = sorted(range(len(rows)), key=lambda n: -max(rows[n].dense_ms, rows[n].pruned_ms or 0.0))
    return set(longest_first[:SLOWEST])


def _layer_view(number: int, row: LayerTime, longest_ms: float) -> LayerView:
    return LayerView(
        number=number,
        layer=row.layer,
        operators=", ".join(dict.fromkeys(row.operators)),
        widths=row.widths.replace("->", "→"),
        dense=_microseconds(row.dense_ms),
        pruned=_microseconds(row.pruned_ms),
        macs=f"{quantities.count(row.dense_macs)} → {quantities.count(row.pruned_macs)}" if row.dense_macs else "",
        change=_factor(row.dense_ms, row.pruned_ms),
        promised=_factor(row.dense_ms, row.predicted_ms),
        why=row.why,
        dense_bar=_share(row.dense_ms, longest_ms) or 0.0,
        pruned_bar=_share(row.pruned_ms, longest_ms) or 0.0,
        promised_bar=_share(row.predicted_ms, longest_ms),
    )


def _microseconds(value_ms: float | None) -> str:
    """A layer's time without its unit, which the table's head names."""
    return "none" if value_ms is None else quantities.significant(1e3 * value_ms)


def _factor(before_ms: float | None, after_ms: float | None) -> str:
    return quantities.factor(before_ms / after_ms) if before_ms and after_ms else ""


def _share(value_ms: float | None, longest_ms: float) -> float | None:
    return None if value_ms is None else round(min(100.0, 100 * value_ms / longest_ms), 2)
