"""What each precision gives and costs, as the pages show it: engines by latency, and how a network was converted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..export.agree import LIMITS
from ..export.precision import QUANTISED
from ..export.sensitivity import ROUNDING
from ..export.target import arithmetic_of
from . import quantities, wording
from .report_latency import engine_name

if TYPE_CHECKING:
    from ..export.sensitivity import Sensitivity
    from .report import EngineRow, PrecisionRow, Report

# So many layers are read in one go; the most sensitive are shown first and the others on request.
MOST_LAYERS = 12
# Names in a sentence, before the rest is counted.
NAMED = 6
# Medians of two precisions that differ by less name no winner: they are not measured in turns with each other.
CLOSE = 0.03


class Rank(NamedTuple):
    """One engine among those of its target: its latency, and what its precision costs."""

    precision: str
    median: str
    to_dense: str
    speedup: str
    accuracy: str
    to_fp32: str
    size: str


class Ranking(NamedTuple):
    """The engines of one target, the fastest first; what was not measured comes last, with its size alone."""

    target: str
    sentence: str
    rows: list[Rank]


class SensitiveLayer(NamedTuple):
    """One layer alone in 8 bits: what it costs, and a bar in percent of the most sensitive one."""

    layer: str
    operator: str
    snr: str
    error: str
    bar: float
    quantised: str


class PrecisionView(NamedTuple):
    """How the network came into one precision."""

    id: str
    precision: str
    sentences: list[str]
    kept: list[tuple[str, str, str]]
    left_out: list[tuple[str, str, str]]
    first: list[SensitiveLayer]
    rest: list[SensitiveLayer]


def rankings(report: Report) -> list[Ranking]:
    """The targets for which there is an engine in any precision but FP32."""
    targets = dict.fromkeys(engine.target for engine in report.engines)
    found = [(target, [engine for engine in report.engines if engine.target == target]) for target in targets]
    return [
        Ranking(target, _ranking_sentence(report, engines), [_rank(report, engine) for engine in _by_latency(engines)])
        for target, engines in found
        if any(engine.precision != "fp32" for engine in engines)
    ]


def ranking_sentences(report: Report) -> list[str]:
    """Which precision is fastest on each target, and what it costs; nothing where there is no choice."""
    return [ranking.sentence for ranking in rankings(report) if ranking.sentence]


def precision_views(report: Report) -> list[PrecisionView]:
    """Every precision but FP32, in the order they were asked for."""
    return [_view(report, row) for row in report.precisions]


def type_sentences(report: Report) -> list[tuple[str, str]]:
    """For each engine that tells in which types its layers run, what it tells."""
    return [(engine_name(each), each.layer_types.sentence) for each in report.engines if each.layer_types is not None]


def accuracy_in(report: Report, engine: EngineRow) -> float | None:
    """The engine's own accuracy, or that of the ONNX file it was built from."""
    if engine.accuracy is not None:
        return engine.accuracy
    if engine.precision == "fp32":
        return report.accuracy.onnx
    return next((row.accuracy for row in report.precisions if row.precision == engine.precision), None)


def to_fp32(report: Report, value: float | None) -> str:
    """An accuracy's distance from that of the FP32 file, in points."""
    before = report.accuracy.onnx
    return "" if before is None or value is None else quantities.points(value - before, report.accuracy.n)


def over_bound(report: Report, engine: EngineRow) -> str:
    """What is wrong with an 8-bit engine that loses more of top-1 than was allowed; empty for any other.

    The bound was kept by its ONNX file, and an engine may compute otherwise.
    """
    before, after = report.accuracy.onnx, engine.accuracy
    most = report.recipe.get("quantize", {}).get("max_drop")
    if most is None or before is None or after is None or engine.precision not in QUANTISED:
        return ""
    drop = 100 * (before - after)
    if drop <= most + ROUNDING:
        return ""
    return (
        f"WARNING: {engine.file} loses {drop:.2f} points of top-1 on the evaluation images, and at most {most:g} may "
        "be lost: its ONNX file keeps the bound, the engine does not. Lower --max-drop, or take another precision."
    )


def doubts(report: Report, engine: EngineRow) -> list[str]:
    """What a reader has to know before an engine is shipped, a sentence each."""
    return [each for each in (over_bound(report, engine), far_off(report, engine)) if each]


def far_off(report: Report, engine: EngineRow) -> str:
    """Where its network magnifies rounding, that an engine's outputs are far from torch's by right; else empty."""
    arithmetic = arithmetic_of(engine.precision, engine.flags)
    if engine.agreement is None or LIMITS[arithmetic].keeps(engine.agreement):
        return ""
    builds = arithmetic == "tf32" and not engine.target.startswith("torch")  # torch takes no build options
    other = ", or build with build.tf32=false" if builds else ", or take another precision or target"
    return (
        f"WARNING: {engine.file}: this network magnifies rounding in {arithmetic} ({engine.agreement}). Its outputs "
        f"say little about right or wrong: {judged_by(report.accuracy.onnx, engine.accuracy)}{other}."
    )


def judged_by(before: float | None, after: float | None) -> str:
    """By what a network is judged whose outputs rounding moves far."""
    if before is None or after is None:
        return "judge it by its accuracy on your own data"
    return f"judge it by its accuracy (top-1 from {before:.1%} to {after:.1%})"


def _by_latency(engines: Sequence[EngineRow]) -> list[EngineRow]:
    return sorted(engines, key=lambda each: each.latency_ms.p50 if each.latency_ms else float("inf"))


def _rank(report: Report, engine: EngineRow) -> Rank:
    accuracy = accuracy_in(report, engine)
    measured, dense_ms = engine.latency_ms, _dense_fp32_ms(report, engine.target)
    return Rank(
        precision=engine.precision,
        median=quantities.milliseconds(measured.p50) if measured else "not measured",
        to_dense=quantities.factor(dense_ms / measured.p50) if measured and dense_ms else "",
        speedup=quantities.factor(engine.speedup.estimate) if engine.speedup else "",
        accuracy=quantities.percent(accuracy, report.accuracy.n) + _whose(engine) if accuracy is not None else "",
        to_fp32=to_fp32(report, accuracy) if engine.precision != "fp32" else "",
        size=quantities.size(engine.bytes),
    )


def _dense_fp32_ms(report: Report, target: str) -> float | None:
    """The median of the dense network in FP32 on that target, where an engine in FP32 was measured beside it."""
    fp32 = (each for each in report.engines if each.target == target and each.precision == "fp32")
    return next((each.dense_latency_ms.p50 for each in fp32 if each.dense_latency_ms), None)


def _ranking_sentence(report: Report, engines: Sequence[EngineRow]) -> str:
    """The order by measured medians, fastest first; empty where fewer than two were measured."""
    measured = [each for each in _by_latency(engines) if each.latency_ms is not None]
    if len(measured) < 2:
        return ""
    named = [f"{each.precision} {quantities.milliseconds(each.latency_ms.p50)}" for each in measured if each.latency_ms]
    best = measured[0]
    near = [each.precision for each in measured if _too_close(best, each)]
    doubtful = any(each.verdict == "unstable" for each in measured)
    doubt = " At least one of these measurements is unstable: the order may be chance." if doubtful else ""
    if len(near) > 1:
        winner = f"{', '.join(near[:-1])} and {near[-1]} are too close to say which is fastest"
    else:
        winner = f"{best.precision} is fastest{_against_dense(report, best)}{_cost(report, best)}"
    return f"{best.target}: by median latency {', '.join(named)}. {winner}.{doubt}"


def _too_close(best: EngineRow, other: EngineRow) -> bool:
    """Whether their medians are nearer to each other than the machine's noise, as far as it was measured."""
    assert best.latency_ms is not None
    assert other.latency_ms is not None
    noise = max(CLOSE, *(each.control.noise for each in (best, other) if each.control is not None), 0.0)
    return other.latency_ms.p50 <= (1 + noise) * best.latency_ms.p50


def _against_dense(report: Report, best: EngineRow) -> str:
    dense_ms = _dense_fp32_ms(report, best.target)
    if dense_ms is None or best.latency_ms is None:
        return ""
    ratio = dense_ms / best.latency_ms.p50
    how = f"{quantities.factor(ratio)} faster" if ratio > 1 + CLOSE else "not faster"
    return f", {how} than the dense fp32 network"


def _cost(report: Report, best: EngineRow) -> str:
    if best.precision == "fp32" or not (cost := to_fp32(report, accuracy_in(report, best))):
        return ""
    return f" and top-1 {cost} to fp32{_whose(best)}"


def _whose(engine: EngineRow) -> str:
    """The mark of an accuracy that is not the engine's own."""
    return "" if engine.accuracy is not None else " (ONNX file)"


def _view(report: Report, row: PrecisionRow) -> PrecisionView:
    done = row.conversion
    out = {(each.layer, each.operator) for each in done.left_out}
    worst = max((_error(each) for each in row.sensitivities), default=0.0) or 1.0
    layers = [_sensitive(each, worst, left_out=(each.layer, each.operator) in out) for each in row.sensitivities]
    return PrecisionView(
        id=wording.slug(row.precision),
        precision=row.precision,
        sentences=list(_sentences(report, row)),
        kept=[(each.layer, each.operator, each.reason) for each in done.kept],
        left_out=[(each.layer, each.operator, each.reason) for each in done.left_out],
        first=layers[:MOST_LAYERS],
        rest=layers[MOST_LAYERS:],
    )


def _sentences(report: Report, row: PrecisionRow) -> Iterator[str]:
    done = row.conversion
    if done.layers:
        in_type = f"; what is not quantised is in {done.rest}"
        images = wording.plural(done.images, "training image")
        yield (
            f"{done.quantised} of {wording.plural(done.layers, 'layer')} are quantised, with ranges by "
            f"{done.calibration} from {images}{in_type}."
        )
        if row.left_out_by_bound:
            were = "was" if row.left_out_by_bound == 1 else "were"
            yield (
                f"To keep the bound on top-1, {wording.plural(row.left_out_by_bound, 'layer')} {were} left out. How "
                "many was chosen on the evaluation images: on others the file may do a little worse."
            )
    elif done.images:
        yield f"Looked for overflow on {wording.plural(done.images, 'image')}: {_overflow(row)}."
    if done.kept:
        kept = list(dict.fromkeys(each.layer for each in done.kept))
        stay = "stays" if len(done.kept) == 1 else "stay"
        yield f"{wording.plural(len(done.kept), 'node')} {stay} in fp32, in {_listed(kept)}."
    if row.accuracy is not None:
        change = to_fp32(report, row.accuracy)
        yield f"Top-1 of the ONNX file is {quantities.percent(row.accuracy, report.accuracy.n)}, {change} to fp32."
    how = "as it is written"
    if row.emulated:
        kind = done.emulates
        how = f"in float32, each tensor rounded to {kind}, as onnxruntime's CPU has no {kind} convolutions"
    yield f"Outputs against the FP32 file, on onnxruntime {how}: {row.agreement}."


def _overflow(row: PrecisionRow) -> str:
    found = sum("FP16 ends" in each.reason for each in row.conversion.kept)
    return f"found in {wording.plural(found, 'node')}, kept in fp32" if found else "none"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _sensitive(found: Sensitivity, worst: float, *, left_out: bool) -> SensitiveLayer:
    return SensitiveLayer(
        layer=found.layer,
        operator=found.operator,
        snr="no change" if found.snr_db is None else f"{found.snr_db:.1f} dB",
        error=quantities.fraction(_error(found)),
        bar=round(min(100.0, 100 * _error(found) / worst), 2),
        quantised="left out" if left_out else "yes",
    )


def _error(found: Sensitivity) -> float:
    """The root mean square of the outputs' change, as a share of that of the outputs."""
    return 0.0 if found.snr_db is None else 10 ** (-found.snr_db / 20)
