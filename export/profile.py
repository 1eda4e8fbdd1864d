"""Why a pruned network is faster, or is not: the time of every torch layer, dense beside pruned, against its MACs.

What the machine can do is read off the two profiles themselves: the cheapest node, and the highest rates seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from .layers import LayerWork
from .node_times import Profile, ProfiledNode

# Times are known to about this much: onnxruntime counts microseconds.
RESOLUTION_MS = 0.001
# A layer kept up with its MACs when it saved this part of what they promised.
KEPT_UP = 0.5
# A layer that takes longer than its MACs promised by more than this part of it fell behind them.
BEHIND = 0.25
# A promise below this part of a layer's time is none.
SMALL_PROMISE = 0.05
# A layer within so many times of the cheapest node is paid for by being started, not by its work.
LAUNCHES = 3.0
# No runtime needs longer to start a node: where the cheapest one takes more, it has work to do.
LONGEST_START_MS = 0.02
# A layer that moves values at this part of the highest rate seen is held up by memory.
NEAR_BANDWIDTH = 1 / 3
# What is lost below this part of the dense time, or spent below this part of the pruned one, is not worth a sentence.
WORTH_TELLING = 0.05
RUNTIME = "runtime: "

Why = Literal["", "launch-bound", "memory-bound", "not faster", "fell behind", "overhead"]


class LayerTime(BaseModel):
    """One torch layer, or several that a runtime runs as one; dense beside pruned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: str
    operators: list[str]
    """What the runtime executed for it, in either network."""
    dense_ms: float
    pruned_ms: float | None
    """None when the pruned network ran nothing of its own for this layer."""
    dense_macs: int
    pruned_macs: int
    widths: str
    predicted_ms: float | None
    """The dense time times the fraction of the MACs that is left; None for a layer without MACs."""
    why: Why
    """Why its time did not follow its MACs; empty when it did."""


class LayerComparison(BaseModel):
    """Every layer dense beside pruned, and what a person should know about them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: list[LayerTime]
    """In the order of the network; what the runtime added comes last."""
    profiled_on: str
    efficiency: float
    """Speed-up over MACs reduction: 1 when the time fell as the MACs did."""
    sentences: list[str]


def compare_layers(
    dense: Profile, pruned: Profile, *, speedup: float | None = None, width_step: int = 1
) -> LayerComparison:
    """Every layer dense beside pruned, with what its MACs predict and why it did not follow them.

    `speedup` is the measured one, else that of the profiles; `width_step` is the number of channels that the target
    pays for at once. Layers that a runtime ran as one in either network share a row.
    """
    rows = _rows(dense, pruned)
    judge = _Judge(rows, dense, pruned, width_step)
    times = [_layer_time(row, judge.why(row), width_step) for row in rows]
    reduction = dense.macs / pruned.macs if pruned.macs else 1.0
    profiled = dense.total_ms / pruned.total_ms if pruned.total_ms else 1.0
    faster = profiled if speedup is None else speedup
    name = "speed-up of the profiles" if speedup is None else "speed-up"
    efficiency = f"MACs fell {reduction:.2f} times and the {name} is {faster:.2f}: an efficiency of"
    return LayerComparison(
        rows=times,
        profiled_on=f"{dense.runtime}, batch {dense.batch}, median of {dense.laps} laps",
        efficiency=faster / reduction,
        sentences=[f"{efficiency} {faster / reduction:.0%}.", *_sentences(times)],
    )


@dataclass(frozen=True)
class _Row:
    """One line of the comparison before it is judged; `layers` is empty for what the runtime added."""

    label: str
    layers: tuple[str, ...]
    dense: list[ProfiledNode]
    pruned: list[ProfiledNode]
    dense_work: list[LayerWork]
    pruned_work: list[LayerWork]

    @property
    def dense_ms(self) -> float:
        return sum(node.ms for node in self.dense)

    @property
    def pruned_ms(self) -> float:
        return sum(node.ms for node in self.pruned)

    @property
    def dense_macs(self) -> int:
        return sum(work.macs for work in self.dense_work)

    @property
    def pruned_macs(self) -> int:
        return sum(work.macs for work in self.pruned_work)

    @property
    def left_blocks(self) -> bool:
        """Whether the dense layer ran in the runtime's blocked layout and the pruned one does not."""
        return _all_blocked(self.dense) and bool(self.pruned) and not _all_blocked(self.pruned)

    def same_blocks(self, step: int) -> bool:
        """Whether the widths of this one layer changed, but fill as many blocks of `step` channels as before."""
        if step == 1 or len(self.dense_work) != 1 or len(self.pruned_work) != 1:
            return False
        dense, pruned = (work[0][3:5] for work in (self.dense_work, self.pruned_work))
        return dense != pruned and [-(-width // step) for width in dense] == [-(-width // step) for width in pruned]


class _Judge:
    """Says why a row did not follow its MACs, from what the two profiles show of the machine.

    The cheapest node is the price of starting one. The highest rates of MACs and of moved values among the rows that
    cost more are the roof: a layer is held up by memory when moving takes the larger part under that roof, and it
    moves about as fast as the machine was seen to.
    """

    def __init__(self, rows: Sequence[_Row], dense: Profile, pruned: Profile, step: int) -> None:
        self._step = step
        self._batch = dense.batch
        self._left = pruned.macs / dense.macs if dense.macs else 1.0
        cheapest = min((node.ms for node in (*dense.nodes, *pruned.nodes) if node.ms > 0), default=0.0)
        self._launch_ms = LAUNCHES * min(max(cheapest, RESOLUTION_MS), LONGEST_START_MS)
        sides = [(row.dense_work, row.dense_ms) for row in rows] + [(row.pruned_work, row.pruned_ms) for row in rows]
        costly = [(work, ms) for work, ms in sides if ms > self._launch_ms]
        self._macs_rate = max((_macs(work) / ms for work, ms in costly), default=0.0)
        self._moved_rate = max((self._moved(work) / ms for work, ms in costly), default=0.0)

    def why(self, row: _Row) -> Why:
        """Why the pruned time is not what the MACs promised; empty when it is, or when they promised nothing."""
        if not row.pruned:
            return ""
        grew = row.pruned_ms > (1 + SMALL_PROMISE) * row.dense_ms + 2 * RESOLUTION_MS
        if not row.layers or (grew and not row.pruned_macs):
            return "overhead"
        kept_up = not grew and self._kept_up(row)
        if kept_up and not _fell_behind(row):
            return ""
        if row.pruned_ms <= self._launch_ms * len(row.pruned):
            return "launch-bound"
        slower: Why = "fell behind" if kept_up else "not faster"
        if row.pruned_macs and (row.left_blocks or row.same_blocks(self._step)):
            return slower
        return "memory-bound" if self._held_up_by_memory(row) else slower

    def _kept_up(self, row: _Row) -> bool:
        left = row.pruned_macs / row.dense_macs if row.dense_macs else self._left
        promised = (1 - left) * row.dense_ms
        if promised < max(SMALL_PROMISE * row.dense_ms, 2 * RESOLUTION_MS):
            return True
        return row.dense_ms - row.pruned_ms >= KEPT_UP * promised

    def _held_up_by_memory(self, row: _Row) -> bool:
        moved, macs = self._moved(row.pruned_work), row.pruned_macs
        if not macs:
            return True
        if not self._macs_rate or not self._moved_rate:
            return False
        below_the_ridge = moved / self._moved_rate > macs / self._macs_rate
        return below_the_ridge and moved / row.pruned_ms >= NEAR_BANDWIDTH * self._moved_rate

    def _moved(self, works: Iterable[LayerWork]) -> int:
        return sum(work.moved(self._batch) for work in works)


def _fell_behind(row: _Row) -> bool:
    """Whether the time is clearly above what the MACs promised, be it lower than before."""
    if not row.dense_macs:
        return False
    promised_ms = row.dense_ms * row.pruned_macs / row.dense_macs
    return row.pruned_ms > (1 + BEHIND) * promised_ms + 2 * RESOLUTION_MS


def _rows(dense: Profile, pruned: Profile) -> list[_Row]:
    """One row for every set of layers that is timed together, in the order of the network, then the runtime's own."""
    together = _timed_together([node.layers for node in (*dense.nodes, *pruned.nodes)])
    order = {layer: place for place, layer in enumerate((*dense.work, *pruned.work))}
    timed = {layer for node in (*dense.nodes, *pruned.nodes) for layer in node.layers}
    counted = {layer for work in (dense.work, pruned.work) for layer, own in work.items() if own.macs}
    groups = sorted(
        {tuple(sorted(together.get(layer, {layer}), key=order.__getitem__)) for layer in timed | counted},
        key=lambda group: order[group[0]],
    )
    rows = [
        _Row(
            _label(group),
            group,
            [node for node in dense.nodes if set(node.layers) & set(group)],
            [node for node in pruned.nodes if set(node.layers) & set(group)],
            [dense.work[layer] for layer in group if layer in dense.work],
            [pruned.work[layer] for layer in group if layer in pruned.work],
        )
        for group in groups
    ]
    own = [[node for node in profile.nodes if not node.layers] for profile in (dense, pruned)]
    labels = dict.fromkeys(_runtime_label(node.operator) for nodes in own for node in nodes)
    for label in labels:
        first, second = ([node for node in nodes if _runtime_label(node.operator) == label] for nodes in own)
        rows.append(_Row(label, (), first, second, [], []))
    return rows


def _timed_together(claims: Iterable[tuple[str, ...]]) -> dict[str, set[str]]:
    """Layer -> all layers whose time cannot be told from its own, because some node stands for both."""
    together: dict[str, set[str]] = {}
    for layers in claims:
        joined = set(layers).union(*(together.get(layer, set()) for layer in layers))
        together.update(dict.fromkeys(joined, joined))
    return together


def _label(layers: tuple[str, ...]) -> str:
    if len(layers) <= 2:
        return " + ".join(layers)
    return f"{layers[0]} ... {layers[-1]} ({len(layers)} layers)"


def _runtime_label(operator: str) -> str:
    kind = operator.partition(" ")[0]
    return RUNTIME + ("reorder" if kind.startswith("Reorder") else kind.lower())


def _layer_time(row: _Row, why: Why, step: int) -> LayerTime:
    predicted = row.dense_ms * row.pruned_macs / row.dense_macs if row.dense_macs and row.dense else None
    return LayerTime(
        layer=row.label,
        operators=list(dict.fromkeys(node.operator for node in (*row.dense, *row.pruned))),
        dense_ms=row.dense_ms,
        pruned_ms=row.pruned_ms if row.pruned else None,
        dense_macs=row.dense_macs,
        pruned_macs=row.pruned_macs,
        widths=_widths(row, step, with_cause=why in ("not faster", "fell behind")),
        predicted_ms=predicted,
        why=why,
    )


def _widths(row: _Row, step: int, *, with_cause: bool) -> str:
    """The channels of a row that is one layer: `64 in, 64 -> 45 out: the same number of 16-channel blocks`."""
    if len(row.dense_work) != 1 or len(row.pruned_work) != 1:
        return ""
    dense, pruned = row.dense_work[0], row.pruned_work[0]
    if not dense.width_out:
        return ""
    if dense.depthwise or not dense.macs:
        text = f"{_change(dense.width_out, pruned.width_out)} channels"
    else:
        into, out = (_change(*pair) for pair in zip(dense[3:5], pruned[3:5], strict=True))
        text = f"{into} in, {out} out"
    cause = _cause(row, step) if with_cause else ""
    return f"{text}: {cause}" if cause else text


def _cause(row: _Row, step: int) -> str:
    """What about the widths keeps the time up, as a phrase; empty where they do not explain it."""
    pruned = row.pruned_work[0]
    odd = [width for width in pruned[3:5] if width % step]
    if row.left_blocks:
        return f"off the blocked layout with {pruned.width_in} input channels"
    if row.same_blocks(step):
        return f"the same number of {step}-channel blocks"
    return f"{odd[0]} is no multiple of {step}" if odd else ""


def _change(dense: int, pruned: int) -> str:
    return str(dense) if dense == pruned else f"{dense} -> {pruned}"


def _sentences(rows: list[LayerTime]) -> list[str]:
    """What to know beside the efficiency: the promise, where it was lost, and what no pruning changes."""
    dense_ms, pruned_ms = sum(row.dense_ms for row in rows), _spent(rows)
    working = [row for row in rows if row.predicted_ms is not None]
    promised = sum(row.dense_ms - (row.predicted_ms or 0.0) for row in working)
    saved = sum(row.dense_ms for row in working) - _spent(working)
    came = f"they saved {_ms(saved)}" if saved > 0 else f"they take {_ms(-saved)} more"
    told = f"Layers with MACs were promised to save {_ms(promised)} of {_ms(dense_ms)}; {came}."
    kept = [told] if promised >= RESOLUTION_MS else []
    return [*kept, *_where_lost(rows, dense_ms), *_fixed_costs(rows, pruned_ms)]


def _where_lost(rows: list[LayerTime], dense_ms: float) -> list[str]:
    """Which stage lost most of what MACs promised, and its worst layer; nothing where little was lost."""
    lost = {row.layer: _lost_ms(row) for row in rows}
    total = sum(lost.values())
    if total <= WORTH_TELLING * dense_ms:
        return []
    stage_of = _stages([row.layer for row in rows])
    stages: dict[str, float] = {}
    for row in rows:
        stages[stage_of(row.layer)] = stages.get(stage_of(row.layer), 0.0) + lost[row.layer]
    stage = max(stages, key=stages.__getitem__)
    worst = max((row for row in rows if stage_of(row.layer) == stage), key=lambda row: lost[row.layer])
    promised = worst.predicted_ms if worst.predicted_ms is not None else worst.dense_ms
    took = f"{_ms(worst.pruned_ms or 0.0)} where {_ms(promised)} {'was promised' if worst.dense_macs else 'was before'}"
    notes = "; ".join(filter(None, [worst.why, worst.widths]))
    inside = "" if stage == worst.layer else f", the worst in {worst.layer}"
    return [
        f"{stages[stage] / total:.0%} of the time lost is in {stage}{inside}: {took}{f' ({notes})' if notes else ''}."
    ]


def _fixed_costs(rows: list[LayerTime], pruned_ms: float) -> list[str]:
    """What the runtime added, and the layers that start-up or memory keeps as slow as they are; if it is worth it."""
    parts = []
    added = [row for row in rows if row.layer.startswith(RUNTIME) or (row.why == "overhead" and not row.dense_ms)]
    if _worth_telling(added, pruned_ms):
        kinds = dict.fromkeys(_kind(row) for row in added if row.pruned_ms)
        before = f"{_ms(sum(row.dense_ms for row in added))} in the dense network"
        parts.append(
            f"{_share(added, pruned_ms)} go to nodes that the runtime added or no longer fuses "
            f"({', '.join(kinds)}; {before})"
        )
    for why, cause in (
        ("launch-bound", "whose time is little more than their start"),
        ("memory-bound", "where values wait for memory"),
    ):
        some = [row for row in rows if row.why == why]
        if _worth_telling(some, pruned_ms):
            layers = f"{len(some)} {why} {'layer' if len(some) == 1 else 'layers'}"
            parts.append(f"{_share(some, pruned_ms)} go to {layers}, {cause}")
    return [f"Of the pruned time, {'; '.join(parts)}."] if parts else []


def _worth_telling(rows: Sequence[LayerTime], pruned_ms: float) -> bool:
    return _spent(rows) > WORTH_TELLING * pruned_ms


def _share(rows: Sequence[LayerTime], pruned_ms: float) -> str:
    return f"{_ms(_spent(rows))} ({_spent(rows) / pruned_ms:.0%})"


def _kind(row: LayerTime) -> str:
    return row.layer.removeprefix(RUNTIME) if row.layer.startswith(RUNTIME) else " and ".join(row.operators)


def _lost_ms(row: LayerTime) -> float:
    """By how much a row takes longer than its MACs promised, or than before where it has none; 0 if it does not."""
    promised = row.predicted_ms if row.predicted_ms is not None else row.dense_ms
    return max(0.0, (row.pruned_ms or 0.0) - promised)


def _spent(rows: Iterable[LayerTime]) -> float:
    return sum(row.pruned_ms or 0.0 for row in rows)


def _stages(layers: Sequence[str]) -> Callable[[str], str]:
    """The stage of a layer, as a pattern (`layer3.*`): the beginning of its path, as long as tells three apart."""
    own = [layer for layer in layers if not layer.startswith(RUNTIME)]

    def stage_of(layer: str, depth: int) -> str:
        parts = layer.split(".")
        whole = layer.startswith(RUNTIME) or " " in layer or len(parts) <= depth
        return layer if whole else ".".join([*parts[:depth], "*"])

    deepest = max((layer.count(".") for layer in own), default=0) + 1
    apart = (
        depth for depth in range(1, deepest) if len({stage_of(layer, depth) for layer in own if "." in layer}) >= 3
    )
    depth = next(apart, deepest)
    return lambda layer: stage_of(layer, depth)


def _all_blocked(nodes: Sequence[ProfiledNode]) -> bool:
    return bool(nodes) and all(node.operator.endswith("(blocked)") for node in nodes)


def _macs(works: Iterable[LayerWork]) -> int:
    return sum(work.macs for work in works)


def _ms(value_ms: float) -> str:
    return f"{value_ms:.3g} ms"
