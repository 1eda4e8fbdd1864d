"""A comparison of bundles for the terminal, as Markdown, as one HTML page, and as a drawing: the Pareto plot."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..export.bundle import require_place, write_atomic
from ..export.verdict_files import markdown_text
from . import quantities
from .charts import axis_ticks
from .compare import BundleComparison, Candidate, TargetComparison

NETWORK_COLUMNS = ("bundle", "model", "criterion", "MACs", "kept", "params", "kept", "asked")
WORDS = ("", "bundle", "model", "criterion", "asked", "verdict", "Pareto")
CANDIDATE_COLUMNS = ("", "accuracy", "p50", "speed-up", "efficiency", "verdict", "Pareto")
LEGEND = (
    "front: no other is as fast and as accurate, and better in one of the two; speed-up over dense with its 95 % "
    "interval; efficiency: speed-up over MACs reduction."
)
NO_PLOT = "no target has both latencies and accuracies to plot"

# The drawing, in SVG units.
WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 64, 56
RADIUS = 6
FONT = 14
LETTER = 0.58 * FONT
LONGEST_LABEL = 28
MARGIN = 0.12

SVG_STYLE = f"""
.pareto {{ --paper: #ffffff; --ink: #1b2029; --soft: #566070; --line: #d5dae1; --front: #0b5cab;
  background: var(--paper); font: {FONT}px system-ui, sans-serif; }}
@media (prefers-color-scheme: dark) {{
  .pareto {{ --paper: #14181e; --ink: #e8ecf1; --soft: #a9b3c0; --line: #38414d; --front: #6fb6ff; }} }}
@media print {{
  .pareto {{ --paper: #ffffff; --ink: #1b2029; --soft: #566070; --line: #d5dae1; --front: #0b5cab; }} }}
.pareto text {{ fill: var(--ink); stroke: var(--paper); stroke-width: 4; paint-order: stroke; }}
.pareto .soft {{ fill: var(--soft); }} .pareto .title {{ font-weight: 600; }}
.pareto .paper {{ fill: var(--paper); }} .pareto .grid {{ stroke: var(--line); }}
.pareto .steps {{ fill: none; stroke: var(--front); stroke-width: 1.5; stroke-dasharray: 5 4; }}
.pareto .front {{ fill: var(--front); stroke: var(--front); }}
.pareto .behind {{ fill: var(--paper); stroke: var(--soft); stroke-width: 2; }}
"""
PAGE_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b2029; --soft: #566070; --line: #d5dae1; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181e; --ink: #e8ecf1; --soft: #a9b3c0; --line: #38414d; } }
@media print { :root { --paper: #ffffff; --ink: #1b2029; --soft: #566070; --line: #d5dae1; } }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.soft { color: var(--soft); }
.wide { overflow-x: auto; } .wide svg { display: block; width: 100%; min-width: 30rem; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: left; border-bottom: 1px solid var(--line); overflow-wrap: normal; }
tr.front th { font-weight: 700; } tbody th { font-weight: 400; }
"""


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


class _Frame(NamedTuple):
    """The part of the plane that is drawn: latencies in ms to the right, accuracies in percent upwards."""

    fastest_ms: float
    slowest_ms: float
    least: float
    most: float

    def x(self, p50_ms: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (p50_ms - self.fastest_ms) / (self.slowest_ms - self.fastest_ms)

    def y(self, accuracy_percent: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (accuracy_percent - self.least) / (self.most - self.least)


def comparison_tables(comparison: BundleComparison) -> Group:
    """The comparison for a terminal of 80 columns: the networks, then each target with what is noted of it."""
    parts: list[RenderableType] = [_terminal_table(NETWORK_COLUMNS, _network_rows(comparison))]
    for compared in comparison.targets:
        table = _terminal_table(CANDIDATE_COLUMNS, _candidate_rows(compared))
        parts += ["", Text(_heading(compared)), "", table, "", *map(Text, _notes(compared))]
    return Group(*parts, *map(Text, comparison.notes))


def comparison_json(comparison: BundleComparison) -> str:
    """The comparison as JSON."""
    return comparison.model_dump_json(indent=2) + "\n"


def comparison_markdown(comparison: BundleComparison) -> str:
    """The comparison as Markdown: the tables, and the plot in words (which candidates are on the front)."""
    parts = ["# Bundles compared", markdown_table(NETWORK_COLUMNS, _network_rows(comparison))]
    for compared in comparison.targets:
        parts += [f"## {markdown_text(_heading(compared))}"]
        parts += [markdown_table(CANDIDATE_COLUMNS, _candidate_rows(compared))]
        parts += [markdown_text(note) for note in _notes(compared)]
    return "\n\n".join([*parts, *map(markdown_text, comparison.notes)]) + "\n"


def comparison_html(comparison: BundleComparison) -> str:
    """The comparison as one page that needs nothing else, no script and no network."""
    body = ["<h1>Bundles compared</h1>", html_table("Networks", NETWORK_COLUMNS, _network_rows(comparison))]
    for compared in comparison.targets:
        fronts = [candidate.on_front for candidate in compared.candidates]
        body += [f"<h2>{_text(_heading(compared))}</h2>"]
        if compared.placed:
            body += [scrolling(f"Plot for {compared.name}", pareto_svg([compared]))]
        body += [html_table(compared.name, CANDIDATE_COLUMNS, _candidate_rows(compared), strong=fronts)]
        body += [f'<p class="soft">{_text(note)}</p>' for note in _notes(compared)]
    body += [f'<p class="soft">{_text(note)}</p>' for note in comparison.notes]
    return html_page(f"Bundles compared: {', '.join(network.label for network in comparison.networks)}", body)


def html_page(title: str, body: Sequence[str]) -> str:
    """One page of those parts that needs nothing else, no script and no network."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n"
        f"<style>{PAGE_STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def comparison_svg(comparison: BundleComparison) -> str:
    """The Pareto plots of all targets, one below the other. Raises: ValueError when there is nothing to plot."""
    drawn = [compared for compared in comparison.targets if compared.placed]
    if not drawn:
        notes = " ".join(note for compared in comparison.targets for note in compared.notes)
        raise ValueError(f"{NO_PLOT}: {notes or 'nothing was measured.'} Write a table instead: .md, .html or .json.")
    return f"{pareto_svg(drawn)}\n"


def pareto_svg(compared: Sequence[TargetComparison]) -> str:
    """Accuracy against latency, a panel for each target; the front is filled and joined by steps, the rest hollow.

    A dense network is a square. Every target must have candidates to place.
    """
    panels = [
        f'<g transform="translate(0 {number * HEIGHT})">{_panel(each)}</g>' for number, each in enumerate(compared)
    ]
    label = "; ".join(f"{each.name}: {_plot_in_words(each)}" for each in compared)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="pareto" viewBox="0 0 {WIDTH} {HEIGHT * len(compared)}" '
        f'role="img" aria-label="{_text(label)}">\n<style>{SVG_STYLE}</style>\n'
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT * len(compared)}"/>\n' + "\n".join(panels) + "\n</svg>"
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows as a table in Markdown, what would be markup taken as text."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(markdown_text, row))} |" for row in rows)])


def html_table(
    name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, strong: Sequence[bool] | None = None
) -> str:
    """The rows as a table in HTML that scrolls by itself; the first column names the row. strong: rows to stress."""
    head = "".join(f'<th scope="col">{_text(column or "network")}</th>' for column in columns)
    lines = []
    for row, is_front in zip(rows, strong or [False] * len(rows), strict=True):
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        kind = ' class="front"' if is_front else ""
        lines.append(f'<tr{kind}><th scope="row">{_text(row[0])}</th>{cells}</tr>')
    body = "\n".join(lines)
    return scrolling(f"Table: {name}", f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>")


def scrolling(name: str, content: str) -> str:
    """What may be wider than a telephone, in a box of its own that scrolls, also by the keyboard."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{_text(name)}">\n{content}\n</div>'


# By the ending of the file.
WRITERS: dict[str, Callable[[BundleComparison], str]] = {
    ".html": comparison_html,
    ".json": comparison_json,
    ".md": comparison_markdown,
    ".svg": comparison_svg,
}


def require_comparison_place(path: Path, bundles: Sequence[Path]) -> None:
    """Nothing, if a comparison of `bundles` can be written to `path`.

    Raises: ValueError for an unknown ending, or a place inside a bundle; FileNotFoundError without its folder.
    """
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"{path}: unknown ending '{path.suffix}'. Available: {', '.join(WRITERS)}.")
    require_place(path, bundles)


def write_comparison(comparison: BundleComparison, path: Path) -> None:
    """`path` holds the comparison in the form that its ending names.

    Raises: ValueError for an unknown ending, or a drawing of nothing.
    """
    write = WRITERS.get(path.suffix.lower())
    if write is None:
        raise ValueError(f"{path}: unknown ending '{path.suffix}'. Available: {', '.join(WRITERS)}.")
    write_atomic(path.resolve(), write(comparison).encode())


def _network_rows(comparison: BundleComparison) -> list[list[str]]:
    return [
        [
            each.label,
            each.model,
            each.criterion,
            quantities.count(each.macs),
            f"{each.macs_kept:.0%}",
            quantities.count(each.params),
            f"{each.params_kept:.0%}",
            each.budget.partition(";")[0],
        ]
        for each in comparison.networks
    ]


def _candidate_rows(compared: TargetComparison) -> list[list[str]]:
    return [
        [
            each.label,
            "-" if each.accuracy is None else quantities.percent(each.accuracy, each.images),
            "-" if each.p50_ms is None else quantities.milliseconds(each.p50_ms),
            _speedup_text(each),
            "-" if each.efficiency is None else f"{each.efficiency:.2f}",
            each.verdict,
            "front" if each.on_front else f"behind {each.behind}" if each.behind else "-",
        ]
        for each in compared.candidates
    ]


def _speedup_text(candidate: Candidate) -> str:
    speedup = candidate.speedup
    return "-" if speedup is None else f"{speedup.estimate:.2f} ({speedup.low:.2f} to {speedup.high:.2f})"


def _heading(compared: TargetComparison) -> str:
    """`ort-cpu fp32: batch 1, 1 thread, chip-deploy.latency/1, on AMD EPYC 9B14`."""
    protocol, machine = compared.protocol, compared.machine
    if protocol is None or machine is None:
        return f"{compared.name}: not measured"
    threads = f"{protocol.threads} thread{'s' if protocol.threads != 1 else ''}"
    where = " with ".join(filter(None, [machine.cpu, machine.gpu]))
    return f"{compared.name}: batch {protocol.batch}, {threads}, {protocol.id}, on {where}"


def _notes(compared: TargetComparison) -> list[str]:
    return [*([LEGEND] if compared.placed else []), *compared.notes]


def _plot_in_words(compared: TargetComparison) -> str:
    front = ", ".join(each.label for each in compared.placed if each.on_front)
    return f"accuracy against latency of {len(compared.placed)} networks; on the Pareto front: {front}"


def _panel(compared: TargetComparison) -> str:
    frame = _frame(compared.placed)
    steps = _steps([each for each in compared.placed if each.on_front], frame)
    return "\n".join(
        [
            f'<text class="title" x="{LEFT}" y="24">{_text(_shortened(compared.name, 2 * LONGEST_LABEL))}</text>',
            f'<text class="soft" x="{LEFT}" y="46">top-1 accuracy, %</text>',
            *_axes(frame),
            f'<path class="steps" d="{steps}"/>',
            *_points(compared.placed, frame),
        ]
    )


def _frame(placed: Sequence[Candidate]) -> _Frame:
    """What shows every candidate, with a margin; one point alone stands in the middle."""
    latencies_ms = [each.p50_ms or 0.0 for each in placed]
    percents = [100 * (each.accuracy or 0.0) for each in placed]
    margin_ms = MARGIN * (max(latencies_ms) - min(latencies_ms)) or MARGIN * max(latencies_ms)
    margin = MARGIN * (max(percents) - min(percents)) or 1.0
    return _Frame(
        max(0.0, min(latencies_ms) - margin_ms),
        max(latencies_ms) + margin_ms,
        min(percents) - margin,
        max(percents) + margin,
    )


def _axes(frame: _Frame) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines = [f'<path class="grid" d="M{LEFT} {bottom}H{right}"/>']
    for tick in axis_ticks(frame.fastest_ms, frame.slowest_ms):
        x = frame.x(tick.value)
        lines.append(f'<path class="grid" d="M{x:.1f} {bottom}v6"/>')
        lines.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 22}" text-anchor="middle">{tick.value:.10g}</text>')
    for tick in axis_ticks(frame.least, frame.most):
        y = frame.y(tick.value)
        lines.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        lines.append(f'<text class="soft" x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{tick.value:.10g}</text>')
    lines.append(f'<text class="soft" x="{right}" y="{HEIGHT - 12}" text-anchor="end">latency p50, ms</text>')
    return lines


def _steps(front: Sequence[Candidate], frame: _Frame) -> str:
    """The best accuracy to be had up to each latency: level from one candidate of the front to the next, then up."""
    points = [(frame.x(each.p50_ms or 0.0), frame.y(100 * (each.accuracy or 0.0))) for each in front]
    start = f"M{points[0][0]:.1f} {points[0][1]:.1f}" if points else ""
    return start + "".join(f"H{x:.1f}V{y:.1f}" for x, y in points[1:]) + (f"H{WIDTH - RIGHT}" if points else "")


def _points(placed: Sequence[Candidate], frame: _Frame) -> list[str]:
    """Every candidate's mark, and its label where it hides neither a mark nor another label."""
    places = [(frame.x(each.p50_ms or 0.0), frame.y(100 * (each.accuracy or 0.0))) for each in placed]
    taken = [_Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in places]
    marks, labels = [], []
    for each, (x, y) in zip(placed, places, strict=True):
        marks.append(_mark(each, x, y))
        text = _shortened(each.label, LONGEST_LABEL)
        box = _free_box(x, y, len(text) * LETTER, taken)
        if box is not None:
            taken.append(box)
            labels.append(f'<text x="{box.left:.1f}" y="{box.bottom - 4:.1f}">{_text(text)}</text>')
    return [*marks, *labels]


def _mark(candidate: Candidate, x: float, y: float) -> str:
    values = f"{100 * (candidate.accuracy or 0.0):.2f} %, {quantities.milliseconds(candidate.p50_ms or 0.0)}"
    title = f"<title>{_text(f'{candidate.label}: {values}')}</title>"
    kind = "front" if candidate.on_front else "behind"
    if candidate.is_dense:
        side = 2 * RADIUS - 2
        corner = f'x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side}" height="{side}"'
        return f'<rect class="{kind}" {corner}>{title}</rect>'
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}">{title}</circle>'


def _free_box(x: float, y: float, breadth: float, taken: Sequence[_Box]) -> _Box | None:
    """Where a label fits right or left of its mark, a little above it or lower; None where nowhere."""
    line = FONT + 4
    sides = (x + RADIUS + 2, x - RADIUS - 2 - breadth)
    # Above first: the steps of the front leave a mark to its right and downwards.
    tops = [(side, y - line / 2 + shift * line) for shift in (-0.8, 0, 0.8, -1.8, 1.8) for side in sides]
    for box_left, top in tops:
        box = _Box(box_left, top, box_left + breadth, top + line)
        inside = box.left >= LEFT and box.right <= WIDTH and box.top >= 48 and box.bottom <= HEIGHT - BOTTOM
        if inside and not any(box.meets(other) for other in taken):
            return box
    return None


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _terminal_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table that breaks words before it breaks numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        is_words = column in WORDS
        table.add_column(column, justify="left" if is_words else "right", no_wrap=not is_words, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _text(text: str) -> str:
    return html.escape(text)
