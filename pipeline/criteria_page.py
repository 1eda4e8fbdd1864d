"""A comparison of criteria for the terminal, as JSON, Markdown, one HTML page and a drawing."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..export.bundle import write_atomic, write_json_atomic
from ..export.verdict_files import markdown_text
from . import quantities
from .compare_page import html_page, html_table, markdown_table, scrolling
from .criteria_chart import criteria_svg
from .criteria_grid import Cell, CutBudget
from .criteria_result import (
    CriteriaComparison,
    CriteriaRow,
    PairedRow,
    Spread,
    StructureLatency,
)
from .wording import ascii_minus, moment, plural, sentence

PAGES = ("criteria.json", "criteria.md", "criteria.html", "criteria.svg")
HEADS = {"cut": "after cut", "recalibrated": "recalibrated", "recovered": "recovered", "tuned": "tuned"}
TERMINAL = 80
GAP = 2
UNSTABLE = "*"
LATENCY_COLUMNS = ("widths", "dense p50", "pruned p50", "speed-up", "verdict")


class _Value(NamedTuple):
    """A mean, and its range, empty where there is none."""

    mean: str
    span: str = ""

    @property
    def line(self) -> str:
        return f"{self.mean} ({self.span})" if self.span else self.mean


class _Board(NamedTuple):
    """One table: a heading, the names of its columns, and its rows, each a name and its values."""

    heading: str
    columns: list[str]
    rows: list[tuple[str, list[_Value]]]


class _LatencyBoard(NamedTuple):
    """The latencies on one target, and what must be said of them."""

    heading: str
    rows: list[list[str]]
    sentences: list[str]


def criteria_tables(comparison: CriteriaComparison) -> Group:
    """The comparison for a terminal of 80 columns: a table for each budget and allocation, then what follows of it."""
    parts: list[RenderableType] = [Text(comparison.title), Text(_summary(comparison)), Text(_legend(comparison))]
    for board in _boards(comparison):
        parts += ["", Text(board.heading), "", _terminal_table(board)]
    parts += ["", *(Text(ascii_minus(line)) for line in _verdicts(comparison))] if comparison.paired else []
    for latency in _latency_boards(comparison):
        parts += ["", Text(latency.heading), *(["", _latency_table(latency), ""] if latency.rows else [])]
        parts += map(Text, latency.sentences)
    return Group(*parts, "", *(Text(sentence(note)) for note in comparison.notes))


def criteria_markdown(comparison: CriteriaComparison) -> str:
    """The comparison as Markdown."""
    parts = [f"# {markdown_text(comparison.title)}"]
    parts += [markdown_text(line) for line in (_summary(comparison), _legend(comparison))]
    for board in _boards(comparison):
        parts += [f"## {markdown_text(board.heading)}", markdown_table(_columns(board), _lines(board))]
    parts += [markdown_text(line) for line in _verdicts(comparison)]
    for latency in _latency_boards(comparison):
        parts += [f"## {markdown_text(latency.heading)}"]
        parts += [markdown_table(LATENCY_COLUMNS, latency.rows)] if latency.rows else []
        parts += [markdown_text(line) for line in latency.sentences]
    parts += ["## Notes", "\n".join(f"- {markdown_text(sentence(note))}" for note in comparison.notes)]
    return "\n\n".join([*parts, *map(markdown_text, _provenance(comparison))]) + "\n"


def criteria_html(comparison: CriteriaComparison) -> str:
    """The comparison as one page that needs nothing else, no script and no network."""
    body = [f"<h1>{_text(comparison.title)}</h1>", *map(_paragraph, (_summary(comparison), _legend(comparison)))]
    if comparison.stages:
        body += [scrolling("Plot of accuracies", criteria_svg(comparison))]
    for board in _boards(comparison):
        body += [f"<h2>{_text(board.heading)}</h2>", html_table(board.heading, _columns(board), _lines(board))]
    body += map(_paragraph, _verdicts(comparison))
    for latency in _latency_boards(comparison):
        body += [f"<h2>{_text(latency.heading)}</h2>"]
        body += [html_table(latency.heading, LATENCY_COLUMNS, latency.rows)] if latency.rows else []
        body += map(_paragraph, latency.sentences)
    notes = "\n".join(f"<li>{_text(sentence(note))}</li>" for note in comparison.notes)
    body += ["<h2>Notes</h2>", f"<ul>\n{notes}\n</ul>"]
    body += [f'<p class="soft">{_text(line)}</p>' for line in _provenance(comparison)]
    return html_page(comparison.title, body)


def write_pages(comparison: CriteriaComparison, out: Path) -> None:
    """Every page of the comparison in `out`; no drawing where no accuracy exists."""
    write_json_atomic(out / "criteria.json", comparison)
    write_atomic(out / "criteria.md", criteria_markdown(comparison).encode())
    write_atomic(out / "criteria.html", criteria_html(comparison).encode())
    if comparison.stages:
        write_atomic(out / "criteria.svg", f"{criteria_svg(comparison)}\n".encode())
    else:
        (out / "criteria.svg").unlink(missing_ok=True)


# -- what stands in the tables -----------------------------------------------------------------------------------------


def _summary(comparison: CriteriaComparison) -> str:
    dense = comparison.dense
    judged = (
        f"{quantities.percent(dense.accuracy, dense.n)} of {dense.n} images, " if dense.accuracy is not None else ""
    )
    cost = f"{quantities.count(dense.macs)} MACs, {quantities.count(dense.params)} parameters"
    return f"Dense: {judged}{cost}."


def _legend(comparison: CriteriaComparison) -> str:
    seeds = plural(len(comparison.seeds), "seed")
    what = "Top-1 accuracy in %" if comparison.stages else "Shares of the dense network in %"
    over = ", one seed" if len(comparison.seeds) == 1 else f": mean (lowest to highest) over {seeds}"
    order = f"; rows by the mean {_when(comparison)}" if comparison.stages else ""
    doubt = any(each.verdict == "unstable" for each in comparison.latencies)
    return f"{what}{over}{order}." + (f" {UNSTABLE} marks a p50 whose laps were unstable." if doubt else "")


def _when(comparison: CriteriaComparison) -> str:
    return "right after the cut" if comparison.ranked_by == "cut" else "after recalibration"


def _boards(comparison: CriteriaComparison) -> list[_Board]:
    found = [
        _board(comparison, budget, allocation) for budget in comparison.budgets for allocation in comparison.allocations
    ]
    others = dict.fromkeys(row.allocation for row in comparison.paired)
    return [*found, *(_paired_board(comparison, allocation) for allocation in others)]


def _board(comparison: CriteriaComparison, budget: CutBudget, allocation: str) -> _Board:
    rows = sorted_rows([
        row for row in comparison.rows if (row.budget, row.allocation) == (budget, allocation)
    ])  # fmt: skip
    targets = [key for key in _targets(comparison) if any(_p50(comparison, row, key).mean != "-" for row in rows)]
    stages, n = comparison.stages, comparison.dense.n
    columns = [HEADS[stage] for stage in stages] or ["MACs left", "parameters left"]
    lines = []
    for row in rows:
        accuracies = [getattr(row, stage) for stage in stages]
        values = [_percents(each, n) for each in accuracies] or [_shares(row.macs_kept), _shares(row.params_kept)]
        lines.append((comparison.label(row.criterion), [*values, *(_p50(comparison, row, key) for key in targets)]))
    left = [value for row in rows for value in (row.macs_kept.low, row.macs_kept.high)]
    span = _range(f"{100 * min(left):.1f}", f"{100 * max(left):.1f}")
    heading = f"{budget.label}, {allocation}: {span} % of the MACs left"
    return _Board(heading, [*columns, *(f"{target} p50, ms" for target, _ in targets)], lines)


def _paired_board(comparison: CriteriaComparison, allocation: str) -> _Board:
    rows = [row for row in comparison.paired if row.allocation == allocation]
    values = {(row.criterion, row.budget): _points(row.difference, comparison.dense.n) for row in rows}
    criteria = dict.fromkeys(row.criterion for row in rows)
    return _Board(
        f"{allocation} against {rows[0].against}: points of accuracy {_when(comparison)}",
        [f"{100 * budget.value:.4g} % {budget.kind}" for budget in comparison.budgets],
        [
            (
                comparison.label(criterion),
                [values.get((criterion, budget), _Value("-")) for budget in comparison.budgets],
            )
            for criterion in criteria
        ],
    )


def sorted_rows(rows: Sequence[CriteriaRow]) -> list[CriteriaRow]:
    """The rows by falling mean accuracy before anything is learnt again; as they are where there is none."""
    return sorted(rows, key=lambda row: -(row.untaught.mean if row.untaught else 0.0))


def _percents(value: Spread | None, n: int) -> _Value:
    if value is None:
        return _Value("-")
    mean, low, high = (quantities.percent(each, n).removesuffix(" %") for each in (value.mean, value.low, value.high))
    return _Value(mean, f"{low}–{high}" if value.n > 1 else "")


def _shares(value: Spread) -> _Value:
    mean, low, high = (f"{100 * each:.1f}" for each in (value.mean, value.low, value.high))
    return _Value(mean, f"{low}–{high}" if value.n > 1 else "")


def _points(value: Spread, n: int) -> _Value:
    mean, low, high = (
        quantities.points(each, n).removesuffix(" points") for each in (value.mean, value.low, value.high)
    )
    return _Value(mean, f"{low} to {high}" if value.n > 1 else "")


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low}–{high}"


def _p50(comparison: CriteriaComparison, row: CriteriaRow, key: tuple[str, str]) -> _Value:
    """The median latency, as the mean over the row's cells, and its range where they are not all of one structure.

    None of it where one cell's is missing: a mean over the others would be of other seeds.
    """
    by_structure = {
        each.structure: (each.pruned_ms.p50, each.verdict)
        for each in comparison.latencies
        if (each.target, each.precision) == key and each.pruned_ms is not None and each.pruned_ms.p50 is not None
    }
    if not set(row.structures) <= by_structure.keys():
        return _Value("-")
    p50s_ms, verdicts = zip(*(by_structure[structure] for structure in row.structures), strict=True)
    low, mean, high = map(quantities.significant, (min(p50s_ms), sum(p50s_ms) / len(p50s_ms), max(p50s_ms)))
    mark = UNSTABLE if "unstable" in verdicts else ""
    return _Value(f"{mean}{mark}", f"{low}–{high}" if len(set(row.structures)) > 1 else "")


def _verdicts(comparison: CriteriaComparison) -> list[str]:
    """How often an allocation was better than the one it is compared with, and how often worse."""
    return [
        _verdict([row for row in comparison.paired if row.allocation == allocation])
        for allocation in dict.fromkeys(row.allocation for row in comparison.paired)
    ]


def _verdict(rows: Sequence[PairedRow]) -> str:
    ours, theirs = rows[0].allocation, rows[0].against
    more, less = (sum(sign * row.difference.mean > 0 for row in rows) for sign in (1, -1))
    better, worse, equal = (sum(getattr(row, name) for row in rows) for name in ("better", "worse", "equal"))
    pairs = better + worse + equal
    return (
        f"{ours} left more accuracy than {theirs} for {more} of {len(rows)} pairs of criterion and budget, by the mean "
        f"over seeds, and less for {less}. Of the {pairs} single pairs with one seed it was better in {better}, worse "
        f"in {worse}, equal in {equal}."
    )


def _latency_boards(comparison: CriteriaComparison) -> list[_LatencyBoard]:
    """For each target its structures; where it could run none of them, the reason alone."""
    boards = []
    for target, precision in _targets(comparison):
        found = [each for each in comparison.latencies if (each.target, each.precision) == (target, precision)]
        measured = [each for each in found if each.verdict != "not measured"]
        reasons = dict.fromkeys(each.reason for each in found if each.verdict == "not measured")
        boards.append(
            _LatencyBoard(
                f"{target} {precision}: latency in turns with the dense network",
                [_latency_row(comparison, each) for each in measured],
                [
                    *(f"Not measured: {reason.removesuffix('.')}." for reason in reasons),
                    *(_why(comparison, each) for each in measured if each.verdict != "faster"),
                    *dict.fromkeys(_how(each) for each in measured),
                ],
            )
        )
    return boards


def _targets(comparison: CriteriaComparison) -> list[tuple[str, str]]:
    return list(dict.fromkeys((each.target, each.precision) for each in comparison.latencies))


def _latency_row(comparison: CriteriaComparison, latency: StructureLatency) -> list[str]:
    p50s = [
        quantities.milliseconds(found.p50) if found is not None and found.p50 is not None else "-"
        for found in (latency.dense_ms, latency.pruned_ms)
    ]
    return [_whose(comparison, latency.structure), *p50s, _speedup(latency), latency.verdict]


def _why(comparison: CriteriaComparison, latency: StructureLatency) -> str:
    """Why a verdict is not `faster`; the numbers after the semicolon stand in the table."""
    reason = latency.reason.partition(";")[0].removesuffix(".")
    return f"{_whose(comparison, latency.structure)}: {latency.verdict}: {reason}."


def _how(latency: StructureLatency) -> str:
    """How and where it was measured."""
    protocol, machine = latency.protocol, latency.machine
    if protocol is None or machine is None:
        return "How it was measured is not recorded."
    where = " with ".join(filter(None, [machine.cpu, machine.gpu]))
    return f"Batch {protocol.batch}, {plural(protocol.threads, 'thread')}, {protocol.id}, on {where}."


def _speedup(latency: StructureLatency) -> str:
    found = latency.speedup
    return "-" if found is None else f"{found.estimate:.2f} ({found.low:.2f} to {found.high:.2f})"


def _whose(comparison: CriteriaComparison, structure: str) -> str:
    """Whose widths they are: `50 % macs uniform`, and which criteria and seeds where it is not all of them."""
    owners: dict[tuple[CutBudget, str], list[Cell]] = {}
    for each in comparison.cells:
        if each.structure == structure:
            owners.setdefault((each.cell.budget, each.cell.allocation), []).append(each.cell)
    return "; ".join(_owner(comparison, cells) for cells in owners.values())


def _owner(comparison: CriteriaComparison, cells: Sequence[Cell]) -> str:
    """Those cells of one budget and allocation in a few words."""
    first = cells[0]
    budget = f"{100 * first.budget.value:.4g} % {first.budget.kind} {first.allocation}"
    criteria = list(dict.fromkeys(comparison.label(cell.criterion) for cell in cells))
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    named = ", ".join(criteria) if len(criteria) < 3 else f"{len(criteria)} criteria"
    by = [] if len(criteria) == len(comparison.criteria) else [named]
    with_seeds = [f"seed {', '.join(map(str, seeds))}"] if len(seeds) < len(comparison.seeds) else []
    return ", ".join([budget, *by, *with_seeds])


def _provenance(comparison: CriteriaComparison) -> list[str]:
    machine = " with ".join(filter(None, [comparison.machine.cpu, comparison.machine.gpu]))
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    return [f"Made {moment(comparison.created)} on {machine} by: {comparison.command}", f"Versions: {versions}."]


# -- how they are laid out ---------------------------------------------------------------------------------------------


def _columns(board: _Board) -> list[str]:
    return ["criterion", *board.columns]


def _lines(board: _Board) -> list[list[str]]:
    return [[name, *(value.line for value in values)] for name, values in board.rows]


def _terminal_table(board: _Board) -> Table:
    """Mean and range beside each other where 80 columns hold them, else the range below the mean."""
    wide = [[value.line for value in values] for _, values in board.rows]
    names = [name for name, _ in board.rows]
    breadth = max(map(len, [*names, "criterion"])) + sum(
        GAP + max(map(len, column)) for column in zip(board.columns, *wide, strict=True)
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP, 0, 0), collapse_padding=True)
    table.add_column("criterion", overflow="fold")
    for column in board.columns:
        table.add_column(column, justify="right", overflow="fold")
    for name, values in board.rows:
        cells = [value.line if breadth <= TERMINAL else f"{value.mean}\n{value.span}".rstrip() for value in values]
        table.add_row(Text(name), *(Text(ascii_minus(cell)) for cell in cells))
    return table


def _latency_table(board: _LatencyBoard) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP, 0, 0), collapse_padding=True)
    for column in LATENCY_COLUMNS:
        words = column in ("widths", "verdict")
        table.add_column(column, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for row in board.rows:
        table.add_row(*map(Text, row))
    return table


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def _text(text: str) -> str:
    return html.escape(text)
