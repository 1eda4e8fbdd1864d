"""What a run would cut, as a dry run shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..chip.cost import Cost, removed_at
from .prepared import Prepared


@dataclass(frozen=True)
class CutRow:
    """One channel group of a preview: widths before and after, and how many layers are coupled with its root.

    macs_before, macs_after: of the convolutions and linears that produce the group's channels.
    """

    layer: str
    coupled: int
    before: int
    after: int
    macs_before: int
    macs_after: int


@dataclass(frozen=True)
class CutPreview:
    """What a run would cut."""

    rows: list[CutRow]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int


def cut_preview(ready: Prepared, widths: Mapping[str, int]) -> CutPreview:
    """Every group before and after the cut to those widths, and what the whole network costs."""
    removed = removed_at(ready.groups, widths)
    after = ready.cost.after(removed)
    macs = [ready.cost.layer_macs(gone) for gone in ({}, removed)]
    rows = [
        CutRow(
            group.layer,
            len(group.coupled),
            group.width,
            widths[group.layer],
            *(round(sum(of.get(layer, 0) for layer in (group.layer, *group.coupled))) for of in macs),
        )
        for group in ready.groups
        if group.layer in widths
    ]
    dense: Cost = ready.cost.dense
    return CutPreview(rows, dense.macs, after.macs, dense.params, after.params)
