"""How many channels each group keeps: a budget becomes widths."""

import difflib
import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

from .cost import CostModel, removed_at
from .groups import ChannelGroup, why_protected

ALLOCATIONS = ("uniform", "list", "global", "isomorphic", "interaction")
"""uniform: the same share of every group. list: a ratio per layer (`listed_widths`); the others are `allocate`'s.
global: one ranking of all channels, by scores in shares of their group's average, or as they are where the criterion's
compare (`Criterion.comparable`). isomorphic: one ranking for each kind of structure, the same share of every kind.
interaction: the more the channels of a group act together, the more of them stay."""

ROUNDING = 1e-9  # shares of channels that differ by less are equal; the next share is thousands of times further off


@dataclass(frozen=True)
class Budget:
    """macs, params: the fraction that may remain; ratio: the fraction of channels to remove.

    A ratio is a share of each group where the way is uniform, else of the channels of all groups that may be cut.
    """

    kind: Literal["macs", "params", "ratio"]
    value: float


@dataclass(frozen=True)
class Rules:
    """What no allocation may break.

    round_to: kept widths are multiples of it; min_width: no group falls below it; most_removed: the largest share of a
    group's channels that may go.
    """

    round_to: int
    min_width: int
    most_removed: float = 1.0


def allocate(
    groups: Sequence[ChannelGroup],
    cost: CostModel,
    budget: Budget,
    rules: Rules,
    *,
    way: str,
    scores: Mapping[str, Sequence[float]] | None = None,
    strengths: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """The width of every group that may be cut, within the budget and never more than one step below it.

    Every group has a ladder of widths that the rules allow. A step down it has a key, and the steps of all groups are
    taken in the order of their keys until the budget holds. Among equal keys the step that leaves its group with the
    larger share goes first, then the deeper layer's.

    way           key of a step
    uniform       none: the shares alone decide
    global        mean score of the channels that go, which are those that `kept_channels` drops
    isomorphic    groups of one structure form a class; its steps are taken by their mean scores, and the key is the
                  share of the class's channels that is gone after the step
    interaction   the group's strength / the share of it that is left after the step: the order in which
                  1 - k strength / largest strength passes each step's share as k falls

    A uniform ratio is met from above: no group loses more than that share.
    scores, strengths: by group, for the ways that read them. A group that nobody can judge must come in protected.
    Raises: ValueError when the rules keep the budget out of reach, when nothing would be cut, for an unknown way, or
    when a group has no scores or strength.
    Source (code): isomorphic: Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024, as torch-pruning ranks by
    it. Its classes also tell operations and kinds of layer apart.
    Source (after): interaction: the abstract of Tang et al., arXiv 2307.00758; the rule is ours.
    """
    ladders = _ladders(groups, rules)
    free = [group for group in groups if group.layer in ladders]
    steps = _in_order(ladders, _keys(free, ladders, cost, way, scores, strengths))
    if way == "uniform" and budget.kind == "ratio":
        count = sum(step.gone <= budget.value + ROUNDING for step in steps)
    else:
        require_reachable(groups, cost, budget, rules, way=way)
        left = partial(_left, groups, cost, budget)
        count = bisect_left(range(len(steps)), -_most(budget), key=lambda n: -left(_after(ladders, steps[:n])))
    widths = _after(ladders, steps[:count])
    _require_a_cut(groups, widths, rules)
    return widths


def require_reachable(
    groups: Sequence[ChannelGroup], cost: CostModel, budget: Budget, rules: Rules, *, way: str
) -> None:
    """Return where this budget can be met, whatever the scores will be: to be asked before any work.

    Raises: ValueError with the nearest budget that can, and the rules that would do, when even the narrowest network
    that the rules allow exceeds it, or when every group is protected. A uniform ratio is always met.
    """
    smallest = _left(groups, cost, budget, _narrowest(groups, rules))
    if smallest > _most(budget) and not (way == "uniform" and budget.kind == "ratio"):
        raise ValueError(_unreachable(groups, cost, budget, rules, smallest))


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
    return sorted(c for _, atom in _ranked(group, scores)[: width // len(group.atoms[0])] for c in atom)


class _Step(NamedTuple):
    """One step down the ladder of a group; steps sort in the order in which they are taken."""

    key: float
    gone: float  # the share of the group that is gone after it
    place: int  # the deeper the layer, the smaller
    layer: str
    width: int  # after it
    channels: int  # that go


def _in_order(ladders: Mapping[str, Sequence[int]], keys: Mapping[tuple[str, int], float]) -> list[_Step]:
    """keys: by group and width after the step; they never fall along a ladder."""
    return sorted(
        _Step(keys[layer, width], 1 - width / ladder[0], -place, layer, width, before - width)
        for place, (layer, ladder) in enumerate(ladders.items())
        for before, width in pairwise(ladder)
    )


def _after(ladders: Mapping[str, Sequence[int]], steps: Sequence[_Step]) -> dict[str, int]:
    return {layer: ladder[0] for layer, ladder in ladders.items()} | {step.layer: step.width for step in steps}


def _keys(
    groups: Sequence[ChannelGroup],
    ladders: Mapping[str, Sequence[int]],
    cost: CostModel,
    way: str,
    scores: Mapping[str, Sequence[float]] | None,
    strengths: Mapping[str, float] | None,
) -> dict[tuple[str, int], float]:
    match way:
        case "uniform":
            return {(layer, width): 0.0 for layer, ladder in ladders.items() for width in ladder}
        case "global":
            return dict(_mean_scores(groups, ladders, _checked_scores(groups, scores, way)))
        case "isomorphic":
            means = dict(_mean_scores(groups, ladders, _checked_scores(groups, scores, way)))
            return dict(_class_shares(_classes(groups, cost.layer_macs({})), ladders, means))
        case "interaction":
            return dict(_strength_per_share(ladders, _checked_strengths(groups, strengths)))
        case "list":
            raise ValueError("allocation 'list' has no budget of its own: give a ratio per layer, prune.layer_ratios.")
        case _:
            near = difflib.get_close_matches(way.lower(), ALLOCATIONS, 1, cutoff=0.4)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"unknown allocation '{way}'.{hint} Available: {', '.join(ALLOCATIONS)}.")


def _mean_scores(
    groups: Sequence[ChannelGroup], ladders: Mapping[str, Sequence[int]], scores: Mapping[str, Sequence[float]]
) -> Iterator[tuple[tuple[str, int], float]]:
    for group in groups:
        ranked, atom = _ranked(group, scores[group.layer]), len(group.atoms[0])
        for before, width in pairwise(ladders[group.layer]):
            yield (group.layer, width), _mean([mean for mean, _ in ranked[width // atom : before // atom]])


def _class_shares(
    classes: Sequence[Sequence[ChannelGroup]],
    ladders: Mapping[str, Sequence[int]],
    means: Mapping[tuple[str, int], float],
) -> Iterator[tuple[tuple[str, int], float]]:
    for alike in classes:
        channels, gone = sum(group.width for group in alike), 0
        for step in _in_order({group.layer: ladders[group.layer] for group in alike}, means):
            gone += step.channels
            yield (step.layer, step.width), gone / channels


def _strength_per_share(
    ladders: Mapping[str, Sequence[int]], strengths: Mapping[str, float]
) -> Iterator[tuple[tuple[str, int], float]]:
    largest = max(strengths.values()) or 1.0  # where all are zero, the shares alone decide
    for layer, ladder in ladders.items():
        for width in ladder[1:]:
            yield (layer, width), strengths[layer] / largest * (ladder[0] / width)


def _classes(groups: Sequence[ChannelGroup], matrices: Collection[str]) -> list[list[ChannelGroup]]:
    """Groups of one structure: as many producers, consumers and per-channel layers, whatever their widths."""
    classes: dict[tuple[tuple[str, bool, float], ...], list[ChannelGroup]] = {}
    for group in groups:
        kinds = ((m.side, m.layer in matrices, len(m.positions) / group.width) for m in group.members)
        classes.setdefault(tuple(sorted(kinds)), []).append(group)
    return list(classes.values())


def _ranked(group: ChannelGroup, scores: Sequence[float]) -> list[tuple[float, tuple[int, ...]]]:
    """The atoms and their mean scores, the best first, ties to the lower channel."""
    score = dict(zip(group.channels, scores, strict=True))
    means = [(_mean([score[c] for c in atom]), atom) for atom in group.atoms]
    return sorted(means, key=lambda found: (-found[0], found[1]))


def _mean(values: Sequence[float]) -> float:
    """Never outside the values by rounding, so that equal ones stay equal and sorted runs have sorted means."""
    return min(max(math.fsum(values) / len(values), min(values)), max(values))


def _checked_scores(
    groups: Sequence[ChannelGroup], scores: Mapping[str, Sequence[float]] | None, way: str
) -> Mapping[str, Sequence[float]]:
    scores = scores or {}
    for group in groups:
        if group.layer not in scores:
            raise ValueError(
                f"allocation '{way}' ranks channels by their scores, and group '{group.layer}' has none. Score every "
                "group that may be cut, or use prune.allocation=uniform."
            )
        found = scores[group.layer]
        if len(found) != group.width or not all(map(math.isfinite, found)):
            raise ValueError(
                f"allocation '{way}': group '{group.layer}' has {len(found)} scores where {group.width} finite numbers "
                "are expected. Score the model again."
            )
    return scores


def _checked_strengths(groups: Sequence[ChannelGroup], strengths: Mapping[str, float] | None) -> dict[str, float]:
    strengths = strengths or {}
    for group in groups:
        if group.layer not in strengths:
            raise ValueError(
                f"allocation 'interaction' goes by how strongly channels act together, and group '{group.layer}' has "
                "no such strength. Score with --criterion interactions, or use another prune.allocation."
            )
        if not 0 <= strengths[group.layer] < math.inf:
            raise ValueError(
                f"allocation 'interaction': the strength of group '{group.layer}' is {strengths[group.layer]:g}, where "
                "a finite number of at least 0 is expected. Score the model again."
            )
    return {group.layer: strengths[group.layer] for group in groups}


def _ladders(groups: Sequence[ChannelGroup], rules: Rules) -> dict[str, list[int]]:
    """group -> its admissible widths. Raises: ValueError when every group is protected, with the reasons."""
    ladders = {group.layer: _admissible(group, rules) for group in groups if group.protected is None}
    if not ladders:
        raise ValueError(
            f"this network has no channels that may be cut ({why_protected(groups)}). Use another network."
        )
    return ladders


def _admissible(group: ChannelGroup, rules: Rules) -> list[int]:
    """Widths the group may take, descending, the dense one first.

    Multiples of the step that whole atoms can make up. Where the dense width is itself no multiple and no aligned
    width exists below it, there is no alignment to lose, and whole atoms alone decide.
    """
    atom = len(group.atoms[0])
    floor = max(rules.min_width, atom, math.ceil(group.width * (1 - rules.most_removed) - ROUNDING))
    whole = [width for width in range(group.width - atom, 0, -atom) if width >= floor]
    aligned = [width for width in whole if width % rules.round_to == 0]
    if not aligned and group.width % rules.round_to and atom > 1:
        aligned = whole
    return [group.width, *aligned]


def _narrowest(groups: Sequence[ChannelGroup], rules: Rules) -> dict[str, int]:
    return {layer: ladder[-1] for layer, ladder in _ladders(groups, rules).items()}


def _left(groups: Sequence[ChannelGroup], cost: CostModel, budget: Budget, widths: Mapping[str, int]) -> float:
    """The fraction that remains of what the budget counts. widths: of all groups that may be cut."""
    if budget.kind == "ratio":
        return sum(widths.values()) / sum(group.width for group in groups if group.layer in widths)
    after = cost.after(removed_at(groups, widths))
    return after.macs / cost.dense.macs if budget.kind == "macs" else after.params / cost.dense.params


def _most(budget: Budget) -> float:
    """The fraction that may remain."""
    return 1 - budget.value + ROUNDING if budget.kind == "ratio" else budget.value


def _unreachable(groups: Sequence[ChannelGroup], cost: CostModel, budget: Budget, rules: Rules, smallest: float) -> str:
    nearest, instead = f"the smallest reachable is {_up(smallest):g}", "more"
    if budget.kind == "ratio":
        nearest, instead = f"the largest reachable is {_down(1 - smallest):g}", "less"
    share = f" or {1 - rules.most_removed:.0%} of its own" if rules.most_removed < 1 else ""
    sentence = (
        f"--{budget.kind} {budget.value:g} cannot be reached with widths rounded to {rules.round_to} and no group "
        f"below {rules.min_width} channels{share}: {nearest}."
    )
    for looser, settings in _looser(rules):
        if _left(groups, cost, budget, _narrowest(groups, looser)) <= _most(budget):
            return f"{sentence} {settings} would reach it."
    return f"{sentence} No rounding or floor reaches it; ask for {instead}."


def _looser(rules: Rules) -> Iterator[tuple[Rules, str]]:
    """Rules that allow narrower groups, the nearest first, and how to ask for them."""
    for step in (16, 8, 4, 2, 1):
        if step < rules.round_to:
            yield replace(rules, round_to=step), f"--set prune.round_to={step}"
    if rules.most_removed < 1:
        yield replace(rules, most_removed=1.0), "--set prune.max_ratio=1"
    for floor in (4, 2, 1):
        if floor <= rules.min_width:
            settings = f"--set prune.round_to=1 --set prune.min_width={floor}"
            yield replace(rules, round_to=1, min_width=floor), settings
            if rules.most_removed < 1:
                yield Rules(1, floor), f"{settings} --set prune.max_ratio=1"


def _up(fraction: float) -> float:
    """Rounded up to 4 decimals, so that asking for the printed value works."""
    return math.ceil(fraction * 1e4) / 1e4


def _down(fraction: float) -> float:
    """Rounded down to 4 decimals, so that asking for the printed value works."""
    return math.floor(fraction * 1e4) / 1e4


def _require_a_cut(groups: Sequence[ChannelGroup], widths: Mapping[str, int], rules: Rules) -> None:
    if all(widths.get(group.layer, group.width) == group.width for group in groups):
        widest = max((group for group in groups if group.protected is None), key=lambda group: group.width)
        raise ValueError(
            f"nothing would be cut: with widths rounded to {rules.round_to} and a floor of {rules.min_width} every "
            f"group keeps its width (the widest group, '{widest.layer}', has {widest.width} channels). Ask for more to "
            "be removed, or set a lower prune.round_to or prune.min_width."
        )
