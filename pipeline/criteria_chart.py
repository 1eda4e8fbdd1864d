"""The plot of a comparison of criteria: a panel for each budget, a row for each criterion, a line for an allocation."""

from __future__ import annotations

import html
from collections.abc import Sequence

from .charts import Axis
from .criteria_grid import CutBudget
from .criteria_result import CriteriaComparison, CriteriaRow, Spread

# The drawing, in SVG units.
WIDTH = 760
NAMES, ALLOCATIONS, NUMBERS = 108, 92, 58  # columns beside the plot
TOP, HEAD, FOOT, BETWEEN = 64, 34, 46, 14
LINE, ROW_GAP = 18, 6
RADIUS = 4.5
FONT = 14

LEGEND = {"cut": "right after the cut", "recalibrated": "recalibrated", "recovered": "recovered", "tuned": "tuned"}

SVG_STYLE = f"""
.criteria {{ --paper: #ffffff; --ink: #1b2029; --soft: #566070; --line: #d5dae1; --first: #0b5cab; --other: #b4530a;
  background: var(--paper); font: {FONT}px system-ui, sans-serif; }}
@media (prefers-color-scheme: dark) {{
  .criteria {{ --paper: #14181e; --ink: #e8ecf1; --soft: #a9b3c0; --line: #38414d; --first: #6fb6ff;
    --other: #f2a15c; }} }}
@media print {{
  .criteria {{ --paper: #ffffff; --ink: #1b2029; --soft: #566070; --line: #d5dae1; --first: #0b5cab;
    --other: #b4530a; }} }}
.criteria text {{ fill: var(--ink); }}
.criteria .soft {{ fill: var(--soft); }} .criteria .title {{ font-weight: 600; }}
.criteria .paper {{ fill: var(--paper); }} .criteria .grid {{ stroke: var(--line); }}
.criteria .dense {{ stroke: var(--soft); stroke-dasharray: 4 3; }}
.criteria .first {{ color: var(--first); }} .criteria .other {{ color: var(--other); }}
.criteria .range {{ stroke: currentColor; stroke-width: 2; }}
.criteria .mark {{ fill: currentColor; stroke: var(--paper); stroke-width: 1; }}
.criteria .hollow {{ fill: var(--paper); stroke: currentColor; stroke-width: 2; }}
"""


def criteria_svg(comparison: CriteriaComparison) -> str:
    """Accuracy to the right, criteria by the falling mean that rows are ordered by; bars are ranges over seeds.

    Marks are means, and tell the stage by their shape: hollow circle right after the cut, circle after recalibration,
    square after recovery, diamond after tuning. The number is the mean of the last stage. Every allocation has a line
    of its own with its name beside it; the first has one colour, all others share the second. The dashed line is the
    dense network. There must be accuracies.
    """
    axis = _axis(comparison)
    top, panels = TOP, []
    for budget in comparison.budgets:
        rows = _panel_rows(comparison, budget)
        panels.append(f'<g transform="translate(0 {top})">{_panel(comparison, budget, rows, axis)}</g>')
        top += _panel_height(rows) + BETWEEN
    height = top
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="criteria" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{_text(_in_words(comparison))}">\n<style>{SVG_STYLE}</style>\n'
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>\n{_heading(comparison)}\n'
        + "\n".join(panels)
        + "\n</svg>"
    )


def _axis(comparison: CriteriaComparison) -> Axis:
    """Percents that show every range and the dense network."""
    spreads = [found for row in comparison.rows for stage in comparison.stages if (found := getattr(row, stage))]
    values = [100 * value for found in spreads for value in (found.low, found.high)]
    values += [100 * comparison.dense.accuracy] if comparison.dense.accuracy is not None else []
    margin = 0.04 * (max(values) - min(values)) or 1.0
    return Axis(max(0.0, min(values) - margin), min(100.0, max(values) + margin) if max(values) < 100 else 101.0)


def _panel_rows(comparison: CriteriaComparison, budget: CutBudget) -> list[list[CriteriaRow]]:
    """A list for each criterion, its allocations in the order asked; the criterion with the best mean first."""
    by_criterion: dict[str, list[CriteriaRow]] = {}
    for row in comparison.rows:
        if row.budget == budget:
            by_criterion.setdefault(row.criterion, []).append(row)
    for rows in by_criterion.values():
        rows.sort(key=lambda row: comparison.allocations.index(row.allocation))
    return sorted(by_criterion.values(), key=lambda rows: -_mean(rows[0]))


def _mean(row: CriteriaRow) -> float:
    return row.untaught.mean if row.untaught else 0.0


def _panel_height(rows: Sequence[Sequence[CriteriaRow]]) -> int:
    return HEAD + sum(LINE * len(lines) + ROW_GAP for lines in rows) + FOOT


def _left(comparison: CriteriaComparison) -> int:
    return NAMES + (ALLOCATIONS if len(comparison.allocations) > 1 else 0)


def _x(percent: float, axis: Axis, left: int) -> float:
    return left + (WIDTH - NUMBERS - left) * axis.percent(percent) / 100


def _heading(comparison: CriteriaComparison) -> str:
    """The title, and what the marks mean."""
    parts = [f'<text class="title" x="12" y="22">{_text(comparison.title)}: top-1 accuracy</text>', '<g class="first">']
    x = 20.0
    for stage in comparison.stages:
        label = LEGEND[stage]
        parts.append(f'{_mark(stage, x, 43, label)}<text class="soft" x="{x + 12:.0f}" y="48">{label}</text>')
        x += 12 + 0.56 * FONT * len(label) + 24
    bar = f'<path class="range" d="M{x:.0f} 43h22"/>' if len(comparison.seeds) > 1 else ""
    span = f'<text class="soft" x="{x + 28:.0f}" y="48">range over seeds</text>' if bar else ""
    return "".join([*parts, bar, span, "</g>"])


def _panel(comparison: CriteriaComparison, budget: CutBudget, rows: Sequence[Sequence[CriteriaRow]], axis: Axis) -> str:
    left, bottom = _left(comparison), _panel_height(rows) - FOOT
    parts = [f'<text class="title" x="12" y="18">{_text(budget.label)}</text>', *_grid(comparison, axis, left, bottom)]
    y = float(HEAD)
    for lines in rows:
        parts.append(f'<text x="12" y="{y + LINE / 2 + 5:.1f}">{_text(comparison.label(lines[0].criterion))}</text>')
        for row in lines:
            parts.append(_line(comparison, row, axis, left, y + LINE / 2))
            y += LINE
        y += ROW_GAP
    return "\n".join(parts)


def _grid(comparison: CriteriaComparison, axis: Axis, left: int, bottom: int) -> list[str]:
    parts = []
    for tick in axis.ticks(most=8):
        x = _x(tick.value, axis, left)
        parts.append(f'<path class="grid" d="M{x:.1f} {HEAD - 6}V{bottom}"/>')
        parts.append(
            f'<text class="soft" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick.value:.10g} %</text>'
        )
    if comparison.dense.accuracy is not None:
        x = _x(100 * comparison.dense.accuracy, axis, left)
        parts.append(f'<path class="dense" d="M{x:.1f} {HEAD - 6}V{bottom}"/>')
        parts.append(f'<text class="soft" x="{x:.1f}" y="{HEAD - 12}" text-anchor="end">dense</text>')
    parts.append(f'<text class="soft" x="{WIDTH - 10}" y="{HEAD - 12}" text-anchor="end">mean</text>')
    return parts


def _line(comparison: CriteriaComparison, row: CriteriaRow, axis: Axis, left: int, y: float) -> str:
    kind = "first" if row.allocation == comparison.allocations[0] else "other"
    parts = []
    if len(comparison.allocations) > 1:
        parts.append(f'<text class="soft" x="{NAMES}" y="{y + 5:.1f}">{_text(row.allocation)}</text>')
    last: Spread | None = None
    for stage in comparison.stages:
        found: Spread | None = getattr(row, stage)
        if found is None:
            continue
        last = found
        x, low, high = (_x(100 * value, axis, left) for value in (found.mean, found.low, found.high))
        parts.append(f'<path class="range" d="M{low:.1f} {y:.1f}H{high:.1f}"/>' if found.n > 1 else "")
        span = f", {100 * found.low:.2f} to {100 * found.high:.2f}" if found.n > 1 else ""
        name = comparison.label(row.criterion)
        told = f"{name}, {row.allocation}, {LEGEND[stage]}: {100 * found.mean:.2f} %{span}"
        parts.append(_mark(stage, x, y, told))
    if last is not None:
        parts.append(f'<text x="{WIDTH - 10}" y="{y + 5:.1f}" text-anchor="end">{100 * last.mean:.1f}</text>')
    return f'<g class="{kind}">{"".join(parts)}</g>'


def _mark(stage: str, x: float, y: float, told: str) -> str:
    title, r = f"<title>{_text(told)}</title>", RADIUS
    match stage:
        case "cut":
            return f'<circle class="hollow" cx="{x:.1f}" cy="{y:.1f}" r="{r - 0.5}">{title}</circle>'
        case "recalibrated":
            return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{r + 0.5}">{title}</circle>'
        case "recovered":
            corner = f'x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}"'
            return f'<rect class="mark" {corner}>{title}</rect>'
        case _:
            d = 1.4 * r
            corners = f"M{x:.1f} {y - d:.1f}l{d:.1f} {d:.1f}l-{d:.1f} {d:.1f}l-{d:.1f}-{d:.1f}Z"
            return f'<path class="mark" d="{corners}">{title}</path>'


def _in_words(comparison: CriteriaComparison) -> str:
    """What a reader who does not see it should hear: for each budget, the criteria from the best mean to the worst."""
    told = []
    for budget in comparison.budgets:
        order = ", ".join(
            f"{comparison.label(rows[0].criterion)} {100 * _mean(rows[0]):.1f}"
            for rows in _panel_rows(comparison, budget)
        )
        told.append(f"{budget.label}, {comparison.allocations[0]}: {order}")
    when = "right after the cut" if comparison.ranked_by == "cut" else "after recalibration"
    return f"mean top-1 accuracy {when} in percent. {'; '.join(told)}"


def _text(text: str) -> str:
    return html.escape(text)
