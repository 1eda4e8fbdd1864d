"""What a report says, once, for the terminal, the Markdown and the HTML page: rows, sentences, chart geometry."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tomli_w
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from . import charts, quantities

if TYPE_CHECKING:
    from .report import EngineRow, GroupReport, Report, TrainCurve

TEMPLATES = Path(__file__).parent
VERDICT_STYLE = {"faster": "bold green", "not faster": "bold red", "unstable": "bold yellow", "not measured": "bold"}
MACHINE_LABELS = {
    "cpu": "CPU",
    "isa": "Instruction sets",
    "gpu": "GPU",
    "sm": "Compute capability",
    "governor": "Frequency governor",
    "load": "Load when it began",
}


class Row(NamedTuple):
    """One line of the comparison: dense, pruned and change; `whole` says it in one cell where that reads better."""

    label: str
    cells: tuple[str, str, str] | None
    whole: str = ""


class Block(NamedTuple):
    """Lines of the comparison under one heading: the network, then each engine."""

    title: str
    rows: list[Row]


class Card(NamedTuple):
    """An engine's verdict as the first screen shows it; every verdict gets the same card."""

    engine: str
    kind: str
    word: str
    number: str
    detail: str
    reason: str


class Stage(NamedTuple):
    """Accuracy at one point of the run; `percent` is None where it was not evaluated."""

    label: str
    value: str
    percent: float | None
    to_dense: str


class GroupView(NamedTuple):
    """One group of channels, numbered from 1 as in every chart."""

    number: int
    report: GroupReport
    kept_percent: float
    column: charts.Column
    profile: charts.ScoreProfile | None


class Laps(NamedTuple):
    """Every lap of one engine and of the dense network beside it."""

    dense_ms: list[float]
    pruned_ms: list[float]


class Distribution(NamedTuple):
    """Laps of one network as a histogram, with its percentiles placed on the axis."""

    name: Literal["dense", "pruned"]
    histogram: charts.Histogram
    beyond: str
    quantiles: str
    marks: list[tuple[str, float]]


class LatencyView(NamedTuple):
    """Both networks' laps on one time axis."""

    engine: str
    axis: charts.LatencyAxis
    ticks: list[charts.Tick]
    distributions: list[Distribution]
    laps: str


class CurveView(NamedTuple):
    """Loss and learning rate of one training run."""

    title: str
    epochs: int
    summary: str
    loss: charts.Curve
    lr: charts.Curve | None


def summary_table(report: Report) -> Group:
    """Dense beside pruned for a terminal of 80 columns, with each engine's verdict in words."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(report.title), title_justify="left", expand=False)
    table.add_column("")
    for heading in ("dense", "pruned", "change"):
        table.add_column(heading, justify="right")
    for block in comparison(report):
        table.add_row(Text(block.title, style="bold"))
        for row in block.rows:
            if row.cells is not None:
                style = VERDICT_STYLE.get(row.whole, "")
                table.add_row(Text(f"  {row.label}"), *(Text(_ascii_minus(cell), style=style) for cell in row.cells))
    return Group(table, *map(_spoken_verdict, report.engines))


def pages_unavailable() -> str | None:
    """Why Markdown and HTML cannot be made here, as a sentence; None when they can."""
    if importlib.util.find_spec("jinja2") is not None:
        return None
    return (
        "report.md and report.html need jinja2, which is not installed here. Install `chip-deploy[report]`, "
        "or run `chip-deploy report` where it is."
    )


def markdown_page(report: Report) -> str:
    """The report as Markdown: tables and sentences, no charts."""
    return _environment(escape_html=False).get_template("report.md.j2").render(_page(report, {}))


def html_page(report: Report, laps: Mapping[str, Laps]) -> str:
    """The report as one HTML page that needs nothing else; the same report and laps give the same bytes.

    `laps` holds those of measured engines by engine file.
    """
    return _environment(escape_html=True).get_template("report.html.j2").render(_page(report, laps))


def comparison(report: Report) -> list[Block]:
    """The comparison, dense beside pruned: the network first, then what each engine was measured at."""
    return [
        Block("Network", [_accuracy_row(report), *_cost_rows(report)]),
        *(Block(engine_name(engine), list(_engine_rows(report, engine))) for engine in report.engines),
    ]


def engine_name(engine: EngineRow) -> str:
    """An engine as the report calls it: `ort-cpu fp32`."""
    return f"{engine.target} {engine.precision}"


def macs_factor(report: Report) -> float:
    """How many times fewer MACs the pruned network has."""
    return report.cost.dense.macs / report.cost.pruned.macs


def no_accuracy(report: Report) -> str | None:
    """Why there is no accuracy, as a sentence; None when there is one."""
    if report.accuracy.n:
        return None
    return f"No accuracy exists: {report.data} has no labels that mean anything."


def _environment(*, escape_html: bool) -> Any:
    # Here and not above: a device has the base package only, and needs the rest of this module for its table.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=escape_html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "filesize": quantities.size,
        "metric": quantities.count,
        "md": _markdown_text,
        "moment": _moment,
        "seconds": quantities.seconds,
        "sentence": _sentence,
        "significant": quantities.significant,
        "tick": "{:.10g}".format,
    }
    return environment


def _page(report: Report, laps: Mapping[str, Laps]) -> dict[str, Any]:
    """Everything the templates place; they compute nothing."""
    recipe = tomli_w.dumps(_without_none(report.recipe)).strip()
    return {
        "report": report,
        "cards": [_card(engine) for engine in report.engines],
        "comparison": comparison(report),
        "facts": [_accuracy_row(report), *_cost_rows(report)],
        "no_accuracy": no_accuracy(report),
        "stages": list(_stages(report)),
        "groups": _group_views(report),
        "width_ticks": _width_ticks(report),
        "number_ticks": _number_ticks(len(report.groups)),
        "channels": _channel_sentence(report),
        "latencies": [_latency_view(e, laps[e.file]) for e in report.engines if e.file in laps],
        "without_laps": [engine_name(e) for e in report.engines if e.latency_ms is not None and e.file not in laps],
        "curves": list(_curves(report)),
        "seconds_total": sum(report.stages_s.values()),
        "seconds_most": max(report.stages_s.values(), default=0.0) or 1.0,
        "machine": _machine_rows(report.machine.model_dump()),
        "recipe_toml": recipe,
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0)),
        "engine_name": engine_name,
        "engine_facts": _engine_facts,
    }


def _accuracy_row(report: Report) -> Row:
    """Dense against what ships: the ONNX file where it was evaluated, else the last stage that was."""
    accuracy = report.accuracy
    if not accuracy.n:
        return Row("Accuracy", ("none", "none", "no labels"))
    stages = (accuracy.onnx, accuracy.tuned, accuracy.recalibrated, accuracy.pruned)
    last = next((value for value in stages if value is not None), None)
    texts = _top1(accuracy.dense, accuracy.n), _top1(last, accuracy.n), _drop(accuracy.dense, last, accuracy.n)
    return Row("Accuracy", texts)


def _top1(value: float | None, n: int) -> str:
    return "not evaluated" if value is None else quantities.percent(value, n)


def _drop(dense: float | None, value: float | None, n: int) -> str:
    return "" if dense is None or value is None else quantities.points(value - dense, n)


def _cost_rows(report: Report) -> list[Row]:
    dense, pruned = report.cost.dense, report.cost.pruned
    return [
        Row(label, (write(before), write(after), quantities.change(before, after)))
        for label, write, before, after in (
            ("MACs", quantities.count, dense.macs, pruned.macs),
            ("Parameters", quantities.count, dense.params, pruned.params),
            ("ONNX file", quantities.size, dense.onnx_bytes, pruned.onnx_bytes),
        )
    ]


def _engine_rows(report: Report, engine: EngineRow) -> Iterator[Row]:
    dense, pruned = engine.dense_latency_ms, engine.latency_ms
    if dense is not None and pruned is not None:
        for name in ("p50", "p90", "p99"):
            before, after = getattr(dense, name), getattr(pruned, name)
            if before is not None and after is not None:
                texts = quantities.milliseconds(before), quantities.milliseconds(after)
                yield Row(f"Latency {name}", (*texts, quantities.change(before, after)))
    if engine.speedup is not None:
        yield _speedup_row(engine)
        yield _efficiency_row(report, engine)
    yield Row("Verdict", ("", engine.verdict, ""), engine.verdict)
    if engine.speedup is None and engine.reason:
        yield Row("Reason", None, _sentence(engine.reason))


def _speedup_row(engine: EngineRow) -> Row:
    assert engine.speedup is not None
    estimate, interval = quantities.factor(engine.speedup.estimate), _interval(engine)
    return Row("Speed-up", ("", estimate, interval), f"{estimate} ({interval})")


def _efficiency_row(report: Report, engine: EngineRow) -> Row:
    """The speed-up as a share of what fewer MACs alone would promise."""
    assert engine.speedup is not None
    share = f"{engine.speedup.estimate / macs_factor(report):.2f}"
    reduction = f"MACs\u00a0÷\u00a0{quantities.factor(macs_factor(report))[:-1]}"
    speedup = f"speed-up\u00a0{quantities.factor(engine.speedup.estimate)}"
    return Row("Efficiency", ("", share, reduction.replace("\u00a0", " ")), f"{share} ({speedup}, {reduction})")


def _interval(engine: EngineRow) -> str:
    assert engine.speedup is not None
    low, high = engine.speedup.low, engine.speedup.high
    return f"{100 * engine.speedup.level:g} % interval {quantities.factor_interval(low, high)}"


def _spoken_verdict(engine: EngineRow) -> Text:
    """One engine's verdict as a sentence of the terminal, with the reason where the table above does not show it."""
    reason = "" if engine.verdict == "faster" else _ascii_minus(_sentence(engine.reason))
    return Text.assemble(
        f"{engine_name(engine)}: ", (engine.verdict, VERDICT_STYLE[engine.verdict]), f". {reason}" if reason else "."
    )


def _card(engine: EngineRow) -> Card:
    return Card(
        engine=engine_name(engine),
        kind=engine.verdict.replace(" ", "-"),
        word=engine.verdict.capitalize(),
        number="" if engine.speedup is None else quantities.factor(engine.speedup.estimate),
        detail=_card_detail(engine),
        reason=_sentence(engine.reason),
    )


def _card_detail(engine: EngineRow) -> str:
    """The interval and both medians; empty where they do not exist, or where the reason tells them already."""
    if engine.speedup is None or engine.latency_ms is None or engine.dense_latency_ms is None:
        return ""
    if "interval" in engine.reason:
        return ""
    before, after = engine.dense_latency_ms.p50, engine.latency_ms.p50
    medians = f"median {quantities.milliseconds(before)} dense, {quantities.milliseconds(after)} pruned"
    return f"{_interval(engine)}; {medians}"


def _stages(report: Report) -> Iterator[Stage]:
    accuracy = report.accuracy
    yield Stage("Dense", _top1(accuracy.dense, accuracy.n), _bar(accuracy.dense), "")
    later = [
        ("Pruned, right after the cut", accuracy.pruned),
        ("Recalibrated", accuracy.recalibrated),
        ("Tuned", accuracy.tuned),
        ("ONNX", accuracy.onnx),
        *((f"Engine {engine_name(engine)}", engine.accuracy) for engine in report.engines),
    ]
    for label, value in later:
        to_dense = _drop(accuracy.dense, value, accuracy.n)
        yield Stage(label, _top1(value, accuracy.n), _bar(value), to_dense)


def _bar(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 3)


def _group_views(report: Report) -> list[GroupView]:
    columns = charts.width_columns([(group.width_before, group.width_after) for group in report.groups])
    return [
        GroupView(
            number=number,
            report=group,
            kept_percent=round(100 * group.width_after / group.width_before, 2),
            column=column,
            profile=charts.score_profile(group.scores, group.kept) if group.scores else None,
        )
        for number, (group, column) in enumerate(zip(report.groups, columns, strict=True), start=1)
    ]


def _width_ticks(report: Report) -> list[charts.Tick]:
    widest = max((group.width_before for group in report.groups), default=0)
    return [charts.Tick(percent, widest * percent / 100) for percent in (0, 50, 100)]


def _number_ticks(n: int) -> list[charts.Tick]:
    """Group numbers under the middle of their columns: the first, and so many more as can be read on a phone."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if n / step * len(str(n)) <= 24)
    numbers = [number for number in range(1, n + 1) if number == 1 or number % step == 0]
    return [charts.Tick(round(100 * (number - 0.5) / n, 2), number) for number in numbers]


def _channel_sentence(report: Report) -> str:
    """How many channels were kept, in how many groups, and how many of those nothing was cut from."""
    before = sum(group.width_before for group in report.groups)
    after = sum(group.width_after for group in report.groups)
    whole = sum(group.width_before == group.width_after for group in report.groups)
    left_whole = f"; {_plural(whole, 'group')} left whole" if whole else ""
    return f"{after} of {_plural(before, 'channel')} kept, in {_plural(len(report.groups), 'group')}{left_whole}."


def _latency_view(engine: EngineRow, laps: Laps) -> LatencyView:
    axis = charts.latency_axis(laps.dense_ms, laps.pruned_ms)
    ticks = [t._replace(percent=axis.percent(t.value)) for t in charts.axis_ticks(axis.low, axis.high, most=6)]
    beside: list[tuple[Literal["dense", "pruned"], list[float], Any]] = [
        ("dense", laps.dense_ms, engine.dense_latency_ms),
        ("pruned", laps.pruned_ms, engine.latency_ms),
    ]
    return LatencyView(
        engine=engine_name(engine),
        axis=axis,
        ticks=ticks,
        distributions=[_distribution(name, laps_ms, quantiles, axis) for name, laps_ms, quantiles in beside],
        laps=f"{len(laps.dense_ms)} laps dense, {len(laps.pruned_ms)} laps pruned",
    )


def _distribution(
    name: Literal["dense", "pruned"], laps_ms: list[float], quantiles: Any, axis: charts.LatencyAxis
) -> Distribution:
    known = [(p, getattr(quantiles, p)) for p in ("p50", "p90", "p99") if getattr(quantiles, p) is not None]
    drawn = charts.histogram(laps_ms, axis)
    return Distribution(
        name=name,
        histogram=drawn,
        beyond=f"{_plural(drawn.beyond, 'slower lap')} beyond the axis" if drawn.beyond else "",
        quantiles=" · ".join(f"{p}\u00a0{quantities.milliseconds(value)}" for p, value in known),
        marks=[(p, axis.percent(value)) for p, value in known if axis.low <= value <= axis.high],
    )


def _curves(report: Report) -> Iterator[CurveView]:
    runs: list[tuple[str, TrainCurve | None]] = [
        ("Tuning of the pruned network", report.tuning),
        ("Training of the dense network", report.dense_training),
    ]
    for title, run in runs:
        if run is not None and run.loss:
            yield CurveView(
                title=title,
                epochs=len(run.loss),
                summary=f"{_plural(run.epochs, 'epoch')} in {quantities.seconds(run.seconds)}; "
                f"training loss {quantities.significant(run.loss[-1])} at the end.",
                loss=charts.curve(run.loss),
                lr=charts.curve(run.lr) if run.lr else None,
            )


def _engine_facts(engine: EngineRow) -> list[tuple[str, str]]:
    """How an engine was built and measured, as name and value; what is unknown is left out."""
    facts: list[tuple[str, Any]] = [
        ("File", engine.file),
        ("Size", quantities.size(engine.bytes)),
        ("SHA-256", engine.sha256),
        ("Built for", engine.built_for),
        ("Built in", None if engine.build_seconds is None else quantities.seconds(engine.build_seconds)),
        ("Build flags", engine.flags),
        ("Versions", engine.versions),
        ("Outputs against torch", engine.agreement),
        ("Measured by", None if engine.protocol is None else engine.protocol.model_dump()),
        ("Measured on", None if engine.machine is None else dict(_machine_rows(engine.machine.model_dump()))),
    ]
    return [(name, _plain(value)) for name, value in facts if value not in (None, "", {})]


def _machine_rows(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = {name: value for name, value in machine.items() if value not in (None, [], "")}
    if memory_gib := known.pop("memory_gib", None):
        known["memory"] = f"{memory_gib:.1f} GiB"
    return [(MACHINE_LABELS.get(n, n.replace("_", " ").capitalize()), _plain(value)) for n, value in known.items()]


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(part) for part in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _without_none(value: Any) -> Any:
    """`value` without the keys that have no value, which TOML cannot write."""
    if isinstance(value, Mapping):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_without_none(part) for part in value if part is not None]
    return value


def _moment(created: str) -> str:
    """An ISO 8601 time without its seconds: `2026-05-04 09:31 UTC`; other text as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:[\d.]+)?(Z|\+00:00)", created)
    return f"{found[1]} {found[2]} UTC" if found else created


def _sentence(text: str) -> str:
    """`text` with a capital and a full stop; empty stays empty."""
    text = text.strip()
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def _markdown_text(text: object) -> str:
    """`text` so that Markdown shows it as it is, in a table cell too."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", one_line)


def _ascii_minus(text: str) -> str:
    """For terminals whose code page has no U+2212, and to a reader the same."""
    return text.replace(quantities.MINUS, "-")
