"""The tables that the command line prints, beside the report's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..export.measure import Quantiles
    from .report import EngineRow
    from .stages import CutPreview


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


def engine_table(rows: list[EngineRow]) -> Table:
    """What was measured, dense beside pruned for every engine, and the verdict; any other than faster says why."""
    table = plain_table("engine", "dense p50", "pruned p50", "speed-up", last="verdict")
    for row in rows:
        speedup = row.speedup
        table.add_row(
            Text(f"{row.target} {row.precision}"),
            _p50(row.dense_latency_ms),
            _p50(row.latency_ms),
            f"{speedup.estimate:.2f} ({speedup.low:.2f} to {speedup.high:.2f})" if speedup else "-",
            Text(row.verdict if row.verdict == "faster" else f"{row.verdict}: {row.reason}"),
        )
    return table


def _p50(quantiles: Quantiles | None) -> str:
    return "-" if quantiles is None or quantiles.p50 is None else f"{quantiles.p50:.3f} ms"
