"""What was measured of an engine, as the pages show it: laps, their drift, noise floor, machine, batches, GPU times."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..export.laps import Quantiles, Speedup
from ..export.laps_file import RecordedLaps
from ..export.measure import BatchRow
from . import charts, quantities, wording

if TYPE_CHECKING:
    from .report import EngineRow

PERCENTILES = ("p50", "p90", "p99")
PATHS = {
    "Device compute": "device_compute",
    "With transfers": "with_transfers",
    "Host, end to end": "host_end_to_end",
    "Device compute, kernel by kernel": "kernel_by_kernel",
}
STATE_LABELS = {
    "cpu": "CPU",
    "governor": "Frequency governor",
    "load": "Load, last minute",
    "others_share": "CPU used by others",
    "waited_share": "Waited for a core",
    "throttled": "Thermal throttling events",
    "quota_s": "Held back by its CPU quota",
    "gpu": "GPU",
    "power_mode": "Power mode",
    "sm": "compute capability",
    "sm_mhz": "SM clock",
    "memory_mhz": "memory clock",
    "power_limit_w": "power limit",
    "power_w": "power",
    "temperature_c": "temperature",
    "reasons": "why the clocks are not higher",
    "power_held_s": "held down by its power limit so far",
    "thermal_held_s": "held down by heat so far",
    "name": "name",
}
STATE_UNITS = {"_mhz": " MHz", "_w": " W", "_c": " °C", "_s": " s"}


class Distribution(NamedTuple):
    """Laps of one network as a histogram, with its percentiles placed on the axis."""

    name: Literal["dense", "pruned"]
    histogram: charts.Histogram
    beyond: str
    quantiles: str
    marks: list[tuple[str, float]]


class LapsView(NamedTuple):
    """Both networks' laps on one time axis, and how their medians moved over the run."""

    ticks: list[charts.Tick]
    distributions: list[Distribution]
    laps: str
    drift: charts.Drift


class Interval(NamedTuple):
    """A speed-up with its interval on an axis of factors."""

    label: str
    kind: str
    span: charts.Span
    text: str


class IntervalView(NamedTuple):
    """Speed-ups on one axis: its ticks, and where no difference lies, in percent."""

    ticks: list[charts.Tick]
    none: float
    intervals: list[Interval]


class Steadiness(NamedTuple):
    """What speaks for and against an engine's numbers: its noise floor, and the machine before and after."""

    control: IntervalView | None
    control_sentence: str
    doubt: str
    advice: list[str]
    states: list[tuple[str, str, str]]
    moved: list[bool]


class Beside(NamedTuple):
    """One line of a table with dense, pruned and speed-up; the rest only of a batch size, which has its own."""

    label: str
    dense: str
    pruned: str
    speedup: str
    throughput: str = ""
    verdict: str = ""
    reason: str = ""


class MeasuredView(NamedTuple):
    """One measured engine, in the section on latency and in the one on noise."""

    id: str
    engine: str
    laps: LapsView | None
    times: list[Beside]
    batches: list[Beside]
    steadiness: Steadiness


def engine_name(engine: EngineRow) -> str:
    """An engine as the report calls it: `ort-cpu fp32`."""
    return f"{engine.target} {engine.precision}"


def interval_text(speedup: Speedup) -> str:
    """`95 % interval 1.60–1.66×`."""
    return f"{100 * speedup.level:g} % interval {quantities.factor_interval(speedup.low, speedup.high)}"


def measured_views(engines: Sequence[EngineRow], laps: Mapping[str, RecordedLaps]) -> list[MeasuredView]:
    """The engines that were measured, with what their laps show; `laps` by engine file."""
    return [
        MeasuredView(
            id=anchor,
            engine=engine_name(engine),
            laps=_laps_view(engine, laps[engine.file]) if engine.file in laps else None,
            times=list(_times(engine)),
            batches=[_batch(row) for row in engine.batches] if len(engine.batches) > 1 else [],
            steadiness=_steadiness(engine),
        )
        for engine, anchor in zip(engines, anchors(engines), strict=True)
        if engine.latency_ms is not None
    ]


def anchors(engines: Sequence[EngineRow]) -> list[str]:
    """An anchor for every engine, from its name; the second of one name is numbered."""
    found: list[str] = []
    for engine in engines:
        name = wording.slug(engine_name(engine)) or "engine"
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        found.append(next(anchor for anchor in itertools.chain([name], numbered) if anchor not in found))
    return found


def card_intervals(engines: Sequence[EngineRow]) -> dict[str, IntervalView]:
    """Each measured engine's speed-up by its file, all on one axis, so that the cards can be compared by eye."""
    speedups = {engine.file: engine.speedup for engine in engines if engine.speedup is not None}
    axis = charts.factor_axis([(speedup.low, speedup.high) for speedup in speedups.values()])
    return {file: _interval_view([("", "pruned", speedup)], axis) for file, speedup in speedups.items()}


def _laps_view(engine: EngineRow, laps: RecordedLaps) -> LapsView:
    axis = charts.latency_axis(laps.dense_laps_ms, laps.pruned_laps_ms)
    beside: list[tuple[Literal["dense", "pruned"], list[float], Any]] = [
        ("dense", laps.dense_laps_ms, engine.dense_latency_ms),
        ("pruned", laps.pruned_laps_ms, engine.latency_ms),
    ]
    return LapsView(
        ticks=axis.ticks(),
        distributions=[_distribution(name, laps_ms, quantiles, axis) for name, laps_ms, quantiles in beside],
        laps=f"{len(laps.dense_laps_ms)} laps dense, {len(laps.pruned_laps_ms)} laps pruned, "
        f"{wording.plural(engine.batch, 'image')} a lap",
        drift=charts.drift(
            _blocks(laps.dense_laps_ms, laps.dense_blocks), _blocks(laps.pruned_laps_ms, laps.pruned_blocks)
        ),
    )


def _blocks(laps_ms: Sequence[float], blocks: Sequence[int]) -> list[list[float]]:
    """The laps of each block, in the order in which the blocks ran."""
    pairs = itertools.groupby(zip(blocks, laps_ms, strict=True), key=lambda pair: pair[0])
    return [[lap_ms for _, lap_ms in laps] for _, laps in pairs]


def _distribution(
    name: Literal["dense", "pruned"], laps_ms: list[float], quantiles: Any, axis: charts.Axis
) -> Distribution:
    known = [(p, getattr(quantiles, p)) for p in PERCENTILES if getattr(quantiles, p, None) is not None]
    drawn = charts.histogram(laps_ms, axis)
    return Distribution(
        name=name,
        histogram=drawn,
        beyond=f"{wording.plural(drawn.beyond, 'slower lap')} beyond the axis" if drawn.beyond else "",
        quantiles=" · ".join(f"{p}\u00a0{quantities.milliseconds(value)}" for p, value in known),
        marks=[(p, axis.percent(value)) for p, value in known if axis.low <= value <= axis.high],
    )


def _steadiness(engine: EngineRow) -> Steadiness:
    watch = engine.watch
    states = [] if watch is None else _states(watch.before.model_dump(), watch.after.model_dump())
    return Steadiness(
        control=_control_view(engine),
        control_sentence=_control_sentence(engine),
        doubt="" if watch is None else wording.sentence(watch.doubt),
        advice=[] if watch is None else [wording.sentence(text) for text in watch.advice],
        states=states,
        moved=[before != after for _, before, after in states],
    )


def _control_view(engine: EngineRow) -> IntervalView | None:
    if engine.control is None or engine.speedup is None:
        return None
    rows = [
        ("Dense against pruned", "pruned", engine.speedup),
        ("Dense against itself", "dense", engine.control.speedup),
    ]
    return _interval_view(rows, charts.factor_axis([(speedup.low, speedup.high) for _, _, speedup in rows]))


def _interval_view(rows: Sequence[tuple[str, str, Speedup]], axis: charts.Axis) -> IntervalView:
    return IntervalView(
        ticks=axis.ticks(most=5),
        none=axis.percent(1.0),
        intervals=[
            Interval(
                label=label,
                kind=kind,
                span=charts.span(speedup.low, speedup.estimate, speedup.high, axis),
                text=f"{quantities.factor(speedup.estimate)} ({interval_text(speedup)})",
            )
            for label, kind, speedup in rows
        ],
    )


def _control_sentence(engine: EngineRow) -> str:
    if engine.control is None:
        return "No A/A control is in this report: the dense network was not measured against itself."
    speedup, noise = engine.control.speedup, quantities.fraction(engine.control.noise)
    return (
        f"The dense network, opened twice and measured against itself, came out at "
        f"{quantities.fine_factor(speedup.estimate)} "
        f"({100 * speedup.level:g}\u00a0% interval {quantities.fine_factor(speedup.low)} to "
        f"{quantities.fine_factor(speedup.high)}): a difference below {noise} is noise on this machine."
    )


def _times(engine: EngineRow) -> Iterator[Beside]:
    """GPU times kept apart, each with its own speed-up."""
    if engine.times is None:
        return
    for label, name in PATHS.items():
        dense, pruned = getattr(engine.times.dense, name), getattr(engine.times.pruned, name)
        if dense is None or pruned is None:
            continue
        launch = f" ({engine.times.launch})" if name == "device_compute" and engine.times.launch else ""
        yield Beside(f"{label}{launch}", _median(dense), _median(pruned), quantities.factor(dense.p50 / pruned.p50))


def _states(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What the machine told of itself, before and after, by a name that people read."""
    rows = []
    for name in before:
        first, last = before[name], after[name]
        if isinstance(first, Mapping) and isinstance(last, Mapping):
            rows += [(f"GPU: {label}", one, other) for label, one, other in _states(first, last)]
        elif not (_empty(first) and _empty(last)):
            rows.append((STATE_LABELS.get(name, wording.label(name)), _state(name, first), _state(name, last)))
    return rows


def _state(name: str, value: Any) -> str:
    if _empty(value):
        return "none" if isinstance(value, list) else "not known"
    if name.endswith("_share"):
        return quantities.fraction(value)
    unit = next((unit for end, unit in STATE_UNITS.items() if name.endswith(end)), "")
    return f"{wording.plain(value)}{unit}"


def _empty(value: Any) -> bool:
    return value in (None, "", [])


def _batch(row: BatchRow) -> Beside:
    return Beside(
        label=str(row.batch),
        dense=_median(row.dense),
        pruned=_median(row.pruned),
        speedup=f"{quantities.factor(row.speedup.estimate)} "
        f"({quantities.factor_interval(row.speedup.low, row.speedup.high)})",
        throughput="" if row.pruned.throughput is None else quantities.significant(row.pruned.throughput),
        verdict=row.verdict,
        reason=wording.sentence(row.reason),
    )


def _median(quantiles: Quantiles) -> str:
    return quantities.milliseconds(quantiles.p50)
