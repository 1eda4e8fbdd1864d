"""How many channels each group keeps: a budget becomes widths."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .cost import Cost, CostModel, removed_at
from .groups import ChannelGroup


@dataclass(frozen=True)
class Budget:
    """macs, params: the fraction that may remain; ratio: the fraction of every group's channels to remove."""

    kind: Literal["macs", "params", "ratio"]
    value: float


@dataclass(frozen=True)
class Rules:
    """round_to: kept widths are multiples of it; min_width: no group falls below it."""

    round_to: int
    min_width: int


def uniform_widths(groups: Sequence[ChannelGroup], cost: CostModel, budget: Budget, rules: Rules) -> dict[str, int]:
    """The same share of every group, cut step by step until the budget holds; never more than one step too far.

    Every group steps down through its admissible widths. Steps are taken in the order of the share they remove, and
    among equals the deeper layer first, until the cost is within the budget.
    Returns: group -> width, for every group that may be cut.
    Raises: ValueError when the floor and the rounding keep the budget out of reach, or when nothing would be cut.
    """
    ladders = _ladders(groups, rules)
    if budget.kind == "ratio":
        widths = {
            layer: min(width for width in ladder if width >= ladder[0] * (1 - budget.value) - 1e-9)
            for layer, ladder in ladders.items()
        }
    else:
        widths = _within(groups, ladders, cost, budget, rules)
    _require_a_cut(groups, widths, rules)
    return widths


def listed_widths(groups: Sequence[ChannelGroup], ratios: Mapping[str, float], rules: Rules) -> dict[str, int]:
    """A ratio per layer, the papers' way: width = int(channels * (1 - ratio)), then up to the next admissible width.

    A layer names its whole group; groups that are not named stay as they are.
    Raises: ValueError for a layer that is unknown or protected, or two ratios for one group, or when nothing is cut.
    """
    ladders = _ladders(groups, rules)
    names: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        for layer in dict.fromkeys(member.layer for member in group.members if member.side == "out"):
            names.setdefault(layer, []).append(group)
    widths = {layer: ladder[0] for layer, ladder in ladders.items()}
    given: dict[str, str] = {}
    for layer, ratio in ratios.items():
        found = names.get(layer, [])
        if not found:
            near = difflib.get_close_matches(layer, names, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"prune.layer_ratios: this network has no layer '{layer}' to cut.{hint}")
        if len(found) > 1:
            parts = ", ".join(f"'{group.layer}'" for group in found)
            raise ValueError(f"prune.layer_ratios: the channels of '{layer}' belong to several groups: name {parts}.")
        group = found[0]
        if group.protected:
            raise ValueError(f"prune.layer_ratios: '{layer}' cannot be cut: {group.protected}.")
        if given.setdefault(group.layer, layer) != layer:
            raise ValueError(
                f"prune.layer_ratios: '{given[group.layer]}' and '{layer}' share their channels; give one ratio."
            )
        asked = int(group.width * (1 - ratio))
        widths[group.layer] = min(width for width in ladders[group.layer] if width >= min(asked, group.width))
    _require_a_cut(groups, widths, rules)
    return widths


def kept_channels(group: ChannelGroup, width: int, scores: Sequence[float]) -> list[int]:
    """The channels to keep: the atoms with the largest mean score, ties to the lower channel; ascending."""
    score = dict(zip(group.channels, scores, strict=True))
    ranked = sorted(group.atoms, key=lambda atom: (-sum(score[c] for c in atom) / len(atom), atom))
    return sorted(c for atom in ranked[: width // len(group.atoms[0])] for c in atom)


def smallest_cost(groups: Sequence[ChannelGroup], cost: CostModel, rules: Rules) -> Cost:
    """The cost with every group at its floor."""
    return cost.after(removed_at(groups, {layer: ladder[-1] for layer, ladder in _ladders(groups, rules).items()}))


def _ladders(groups: Sequence[ChannelGroup], rules: Rules) -> dict[str, list[int]]:
    return {group.layer: _admissible(group, rules) for group in groups if group.protected is None}


def _admissible(group: ChannelGroup, rules: Rules) -> list[int]:
    """Widths the group may take, descending, the dense one first.

    Multiples of the step that whole atoms can make up. Where the dense width is itself no multiple and no aligned
    width exists below it, there is no alignment to lose, and whole atoms alone decide.
    """
    atom = len(group.atoms[0])
    floor = max(rules.min_width, atom)
    whole = [width for width in range(group.width - atom, 0, -atom) if width >= floor]
    aligned = [width for width in whole if width % rules.round_to == 0]
    if not aligned and group.width % rules.round_to and atom > 1:
        aligned = whole
    return [group.width, *aligned]


def _within(
    groups: Sequence[ChannelGroup], ladders: dict[str, list[int]], cost: CostModel, budget: Budget, rules: Rules
) -> dict[str, int]:
    order = {layer: place for place, layer in enumerate(ladders)}
    steps = sorted(
        (
            (1 - width / ladder[0], -order[layer], layer, width)
            for layer, ladder in ladders.items()
            for width in ladder[1:]
        )
    )

    def after(count: int) -> dict[str, int]:
        return {layer: ladder[0] for layer, ladder in ladders.items()} | {s[2]: s[3] for s in steps[:count]}

    def left(count: int) -> float:
        return _fraction(cost.after(removed_at(groups, after(count))), cost.dense, budget.kind)

    if left(len(steps)) > budget.value:
        raise ValueError(_unreachable(groups, cost, budget, rules, left(len(steps))))
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= budget.value else (middle + 1, high)
    return after(low)


def _fraction(cost: Cost, dense: Cost, kind: str) -> float:
    return cost.macs / dense.macs if kind == "macs" else cost.params / dense.params


def _unreachable(groups: Sequence[ChannelGroup], cost: CostModel, budget: Budget, rules: Rules, smallest: float) -> str:
    sentence = (
        f"--{budget.kind} {budget.value:g} cannot be reached with widths rounded to {rules.round_to} and no group "
        f"below {rules.min_width} channels: the smallest reachable is {_up(smallest):g}."
    )
    for finer in (step for step in (16, 8, 4, 2, 1) if step < rules.round_to):
        reached = smallest_cost(groups, cost, Rules(finer, rules.min_width))
        if _fraction(reached, cost.dense, budget.kind) <= budget.value:
            return f"{sentence} --set prune.round_to={finer} would reach it."
    for floor in (4, 2, 1):
        reached = smallest_cost(groups, cost, Rules(1, floor))
        if floor < rules.min_width and _fraction(reached, cost.dense, budget.kind) <= budget.value:
            return f"{sentence} --set prune.round_to=1 --set prune.min_width={floor} would reach it."
    return f"{sentence} No rounding or floor reaches it; ask for more."


def _up(fraction: float) -> float:
    """Rounded up to 4 decimals, so that asking for the printed value works."""
    return -(-fraction * 1e4 // 1) / 1e4


def _require_a_cut(groups: Sequence[ChannelGroup], widths: Mapping[str, int], rules: Rules) -> None:
    if all(widths.get(group.layer, group.width) == group.width for group in groups):
        free = [group for group in groups if group.protected is None]
        widest = max(free, key=lambda group: group.width, default=None)
        detail = f"the widest group, '{widest.layer}', has {widest.width} channels" if widest else "no group may be cut"
        raise ValueError(
            f"nothing would be cut: with widths rounded to {rules.round_to} and a floor of {rules.min_width} every "
            f"group keeps its width ({detail}). Ask for a smaller budget, or a finer --set prune.round_to."
        )
