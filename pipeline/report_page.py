"""What a report says, once, for the terminal, the Markdown and the HTML page: rows, sentences, sections."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tomli_w
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..export.laps_file import RecordedLaps
from ..export.verdict_files import markdown_text
from . import charts, quantities, report_groups, wording
from .report_latency import (
    PERCENTILES,
    IntervalView,
    anchors,
    card_intervals,
    engine_name,
    interval_text,
    measured_views,
)
from .report_layers import layers_views
from .report_precision import (
    accuracy_in,
    doubts,
    precision_views,
    ranking_sentences,
    rankings,
    to_fp32,
    type_sentences,
)

if TYPE_CHECKING:
    from ..export.laps import Quantiles
    from .report import EngineRow, Report, TrainCurve

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

    id: str
    engine: str
    kind: str
    word: str
    number: str
    interval: IntervalView | None
    bounds: str
    medians: str
    reason: str
    trust: list[str]


class Stage(NamedTuple):
    """Accuracy at one point of the run; `percent` is None where it was not evaluated."""

    label: str
    value: str
    percent: float | None
    to_dense: str


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
                table.add_row(
                    Text(f"  {row.label}"), *(Text(wording.ascii_minus(cell), style=style) for cell in row.cells)
                )
    ranked = [Text(wording.ascii_minus(sentence)) for sentence in ranking_sentences(report)]
    return Group(table, *(_spoken_verdict(report, engine) for engine in report.engines), *ranked)


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


def html_page(report: Report, laps: Mapping[str, RecordedLaps]) -> str:
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
        "md": lambda value: markdown_text(str(value)),
        "moment": wording.moment,
        "seconds": quantities.seconds,
        "sentence": wording.sentence,
        "significant": quantities.significant,
        "tick": lambda value: f"{value:.10g}".replace("-", quantities.MINUS),
    }
    return environment


def _page(report: Report, laps: Mapping[str, RecordedLaps]) -> dict[str, Any]:
    """Everything the templates place; they compute nothing."""
    recipe = tomli_w.dumps(_without_none(report.recipe)).strip()
    groups = report_groups.group_views(report.groups)
    return {
        "report": report,
        "cards": _cards(report),
        "comparison": comparison(report),
        "facts": [_accuracy_row(report), *_cost_rows(report)],
        "no_accuracy": no_accuracy(report),
        "stages": list(_stages(report)),
        "measured": measured_views(report.engines, laps),
        "layered": layers_views(report.engines),
        "rankings": rankings(report),
        "precisions": precision_views(report),
        "types": type_sentences(report),
        "groups": groups,
        "many_groups": len(groups) > report_groups.MOST_GROUPS,
        "width_ticks": report_groups.width_ticks(report.groups),
        "number_ticks": report_groups.number_ticks(len(groups)),
        "channels": report_groups.channel_sentence(report.groups),
        "stability": report_groups.stability_view(groups),
        "curves": list(_curves(report)),
        "seconds_total": sum(report.stages_s.values()),
        "seconds_most": max(report.stages_s.values(), default=0.0) or 1.0,
        "machine": _machine_rows(report.machine.model_dump()),
        "commands": _commands(report),
        "recipe_toml": recipe,
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0)),
        "engines": [
            (anchor, engine_name(engine), engine, _engine_facts(engine))
            for anchor, engine in zip(anchors(report.engines), report.engines, strict=True)
        ],
    }


def _accuracy_row(report: Report) -> Row:
    """Dense against what ships: the ONNX file where it was evaluated, else the last stage that was."""
    accuracy = report.accuracy
    if not accuracy.n:
        return Row("Accuracy", ("none", "none", "no labels"))
    stages = (accuracy.onnx, accuracy.tuned, accuracy.recovered, accuracy.recalibrated, accuracy.pruned)
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
        for name in PERCENTILES:
            before, after = getattr(dense, name), getattr(pruned, name)
            if before is not None and after is not None:
                texts = quantities.milliseconds(before), quantities.milliseconds(after)
                yield Row(f"Latency {name}", (*texts, quantities.change(before, after)))
        yield from _throughput_row(dense, pruned)
    if engine.speedup is not None:
        yield _speedup_row(engine)
        yield _efficiency_row(report, engine)
    accuracy = accuracy_in(report, engine)
    if engine.precision != "fp32" and accuracy is not None:
        label = "Accuracy" if engine.accuracy is not None else "Accuracy, ONNX file"
        yield Row(label, ("", quantities.percent(accuracy, report.accuracy.n), to_fp32(report, accuracy)))
    yield Row("Verdict", ("", engine.verdict, ""), engine.verdict)
    if engine.speedup is None and engine.reason:
        yield Row("Reason", None, wording.sentence(engine.reason))


def _throughput_row(dense: Quantiles, pruned: Quantiles) -> Iterator[Row]:
    before, after = dense.throughput, pruned.throughput
    if before and after:
        texts = f"{quantities.significant(before)}/s", f"{quantities.significant(after)}/s"
        yield Row("Throughput", (*texts, quantities.change(before, after)))


def _speedup_row(engine: EngineRow) -> Row:
    assert engine.speedup is not None
    estimate, interval = quantities.factor(engine.speedup.estimate), interval_text(engine.speedup)
    return Row("Speed-up", ("", estimate, interval), f"{estimate} ({interval})")


def _efficiency_row(report: Report, engine: EngineRow) -> Row:
    """The speed-up as a share of what fewer MACs alone would promise."""
    assert engine.speedup is not None
    share = f"{engine.speedup.estimate / macs_factor(report):.2f}"
    reduction = f"MACs\u00a0÷\u00a0{quantities.factor(macs_factor(report))[:-1]}"
    speedup = f"speed-up\u00a0{quantities.factor(engine.speedup.estimate)}"
    return Row("Efficiency", ("", share, reduction.replace("\u00a0", " ")), f"{share} ({speedup}, {reduction})")


def _spoken_verdict(report: Report, engine: EngineRow) -> Text:
    """One engine's verdict as a sentence of the terminal, with the reason where the table above does not show it."""
    reason = "" if engine.verdict == "faster" else wording.ascii_minus(wording.sentence(engine.reason))
    further = [f" {each}" for each in (reason, *doubts(report, engine)) if each]
    return Text.assemble(f"{engine_name(engine)}: ", (engine.verdict, VERDICT_STYLE[engine.verdict]), ".", *further)


def _cards(report: Report) -> list[Card]:
    intervals = card_intervals(report.engines)
    return [
        Card(
            id=anchor,
            engine=engine_name(engine),
            kind=engine.verdict.replace(" ", "-"),
            word=engine.verdict.capitalize(),
            number="" if engine.speedup is None else quantities.factor(engine.speedup.estimate),
            interval=intervals.get(engine.file),
            bounds="" if engine.speedup is None else interval_text(engine.speedup),
            medians=_medians(engine),
            reason=" ".join(filter(None, (_card_reason(engine), *doubts(report, engine)))),
            trust=list(_trust(engine)),
        )
        for anchor, engine in zip(anchors(report.engines), report.engines, strict=True)
    ]


def _medians(engine: EngineRow) -> str:
    if engine.latency_ms is None or engine.dense_latency_ms is None:
        return ""
    before, after = (quantities.milliseconds(q.p50) for q in (engine.dense_latency_ms, engine.latency_ms))
    return f"Median {before} dense, {after} pruned"


def _card_reason(engine: EngineRow) -> str:
    """The reason without the numbers that the card shows beside it; the section on the engine has it whole."""
    if engine.speedup is None:
        return wording.sentence(engine.reason)
    found = re.match(r"(.*?)(?:[;:] |^)speed-up \d+\.\d+ \(", engine.reason)
    return wording.sentence(found[1] if found else engine.reason)


def _trust(engine: EngineRow) -> Iterator[str]:
    """What the card says about the measurement itself: the noise floor, and whether the machine kept still."""
    if engine.control is not None:
        yield f"Noise floor {quantities.fraction(engine.control.noise)}"
    if engine.watch is not None:
        yield "machine not steady" if engine.watch.doubt else "machine steady"


def _stages(report: Report) -> Iterator[Stage]:
    accuracy = report.accuracy
    yield Stage("Dense", _top1(accuracy.dense, accuracy.n), _bar(accuracy.dense), "")
    later = [
        ("Pruned, right after the cut", accuracy.pruned),
        ("Recalibrated", accuracy.recalibrated),
        *([("Recovered", accuracy.recovered)] if accuracy.recovered is not None else []),
        ("Tuned", accuracy.tuned),
        ("ONNX", accuracy.onnx),
        *((f"ONNX in {row.precision}", row.accuracy) for row in report.precisions),
        *((f"Engine {engine_name(engine)}", engine.accuracy) for engine in report.engines),
    ]
    for label, value in later:
        to_dense = _drop(accuracy.dense, value, accuracy.n)
        yield Stage(label, _top1(value, accuracy.n), _bar(value), to_dense)


def _bar(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 3)


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
                summary=f"{wording.plural(run.epochs, 'epoch')} in {quantities.seconds(run.seconds)}; "
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
        ("Number types", engine.layer_types.sentence if engine.layer_types else None),
        ("Outputs against torch", engine.agreement),
        ("Measured by", None if engine.protocol is None else engine.protocol.model_dump()),
        ("Measured on", None if engine.machine is None else dict(_machine_rows(engine.machine.model_dump()))),
    ]
    return [(name, wording.plain(value)) for name, value in facts if value not in (None, "", {})]


def _commands(report: Report) -> list[tuple[str, str]]:
    """What to type to check this bundle, and to make it again, with what each does."""
    measured = [engine.target for engine in report.engines if engine.latency_ms is not None]
    return [
        *([("This bundle was made by", report.command)] if report.command else []),
        ("Check that every file is the one that was written", "chip-deploy verify BUNDLE"),
        *(("Measure again, on this machine or another", f"chip-deploy measure BUNDLE --target {t}") for t in measured),
        ("Run all of it again", "chip-deploy prune BUNDLE/recipe.toml --out OTHER"),
        ("Make this page again from report.json", "chip-deploy report BUNDLE"),
    ]


def _machine_rows(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = {name: value for name, value in machine.items() if value not in (None, [], "")}
    if memory_gib := known.pop("memory_gib", None):
        known["memory"] = f"{memory_gib:.1f} GiB"
    return [(MACHINE_LABELS.get(n, wording.label(n)), wording.plain(value)) for n, value in known.items()]


def _without_none(value: Any) -> Any:
    """`value` without the keys that have no value, which TOML cannot write."""
    if isinstance(value, Mapping):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_without_none(part) for part in value if part is not None]
    return value
