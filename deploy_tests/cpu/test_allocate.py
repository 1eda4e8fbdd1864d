"""Budgets, floors, rounding and the orders of the cuts against counts by hand, slow loops and torch-pruning."""

import copy
import re
import warnings
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
import torch_pruning
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from chip_deploy.chip.allocate import (
    ALLOCATIONS,
    Budget,
    Rules,
    allocate,
    kept_channels,
    listed_widths,
    require_reachable,
)
from chip_deploy.chip.cost import CostModel, paper_flops, removed_at, removed_by
from chip_deploy.chip.groups import ChannelGraph, ChannelGroup, Member
from chip_deploy.pipeline.models import build_model

WAYS = tuple(way for way in ALLOCATIONS if way != "list")


def _net():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, groups=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


EXAMPLE = torch.zeros(1, 3, 8, 8)


def _uniform(groups, cost, budget, rules):
    return allocate(groups, cost, budget, rules, way="uniform")


@pytest.fixture
def counted():
    net = _net()
    return ChannelGraph(net, EXAMPLE).groups, CostModel(net, EXAMPLE)


def test_macs_and_parameters_are_those_counted_by_hand(counted):
    _, cost = counted
    assert cost.dense.macs == 64 * (32 * 27 + 64 * 32 * 9) + 640
    assert cost.dense.params == 32 * 27 + 64 + (64 * 32 * 9 + 64) + 650


def test_the_cost_after_a_cut_is_that_of_the_smaller_network_built_anew(counted):
    groups, cost = counted
    after = cost.after(removed_by(groups, {"0": range(20), "3": range(40)}))
    assert after.macs == 64 * (20 * 27 + 40 * 20 * 9) + 400
    assert after.params == 20 * 27 + 40 + (40 * 20 * 9 + 40) + 410
    assert cost.after(removed_at(groups, {"0": 20, "3": 40})) == after


def test_paper_flops_add_batch_norms_and_convolution_biases():
    assert paper_flops(_net(), EXAMPLE) == 64 * (32 * 27 + 64 * 32 * 9) + 640 + 2 * 32 * 64 + 64 * 64


@pytest.mark.parametrize(("step", "floor"), [(1, 1), (4, 8), (8, 8), (16, 16)])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_is_met_within_one_step(counted, step, floor, kind):
    groups, cost = counted
    widths = _uniform(groups, cost, Budget(kind, 0.5), Rules(step, floor))
    used = getattr(cost.after(removed_at(groups, widths)), kind) / getattr(cost.dense, kind)
    assert used <= 0.5
    assert all(width % step == 0 and width >= floor for width in widths.values())
    one_step_back = [
        getattr(cost.after(removed_at(groups, widths | {layer: width + step})), kind) / getattr(cost.dense, kind)
        for layer, width in widths.items()
    ]
    assert max(one_step_back) > 0.5


def test_a_ratio_removes_that_share_of_every_group(counted):
    groups, cost = counted
    assert _uniform(groups, cost, Budget("ratio", 0.25), Rules(1, 1)) == {"0": 24, "3": 48}
    assert _uniform(groups, cost, Budget("ratio", 0.3), Rules(16, 1)) == {"0": 32, "3": 48}


def test_an_unreachable_budget_names_the_smallest_reachable_and_the_rounding_that_would_do(counted):
    groups, cost = counted
    smallest = (64 * (16 * 27 + 16 * 16 * 9) + 160) / cost.dense.macs
    with pytest.raises(ValueError, match="cannot be reached") as caught:
        _uniform(groups, cost, Budget("macs", 0.06), Rules(16, 8))
    printed = float(str(caught.value).split("smallest reachable is ")[1].split(" ")[0].rstrip("."))
    assert smallest <= printed < smallest + 2e-4
    assert "--set prune.round_to=8 would reach it" in str(caught.value)
    assert _uniform(groups, cost, Budget("macs", printed), Rules(16, 8)) == {"0": 16, "3": 16}
    assert _uniform(groups, cost, Budget("macs", 0.06), Rules(8, 8))


def test_nothing_to_cut_is_an_error(counted):
    groups, cost = counted
    with pytest.raises(ValueError, match="nothing would be cut"):
        _uniform(groups, cost, Budget("ratio", 0.1), Rules(16, 8))


def test_listed_ratios_truncate_as_the_papers_do(counted):
    groups, _ = counted
    assert listed_widths(groups, {"3": 0.4}, Rules(1, 1)) == {"0": 32, "3": int(64 * 0.6)}


def test_a_listed_layer_that_does_not_exist_names_the_nearest():
    net = build_model("resnet20", num_classes=10, seed=0).module
    groups = ChannelGraph(net, torch.zeros(1, 3, 32, 32)).groups
    with pytest.raises(ValueError, match=r"Did you mean 'layer1\.0\.conv1'"):
        listed_widths(groups, {"layer1.0.convv1": 0.5}, Rules(1, 1))
    with pytest.raises(ValueError, match="cannot be cut: its channels reach the network's output"):
        listed_widths(groups, {"linear": 0.5}, Rules(1, 1))
    with pytest.raises(ValueError, match="share their channels"):
        listed_widths(groups, {"layer1.0.conv2": 0.5, "layer1.1.conv2": 0.4}, Rules(1, 1))


def test_the_channels_with_the_largest_scores_stay_and_ties_go_to_the_lower_number():
    group = ChannelGroup("x", (0, 1, 2, 3, 4), (), tuple((c,) for c in range(5)), None)
    assert kept_channels(group, 3, [0.5, 2.0, 0.5, 1.0, 0.5]) == [0, 1, 3]


def test_atoms_are_kept_whole_by_their_mean_score():
    group = ChannelGroup("x", tuple(range(6)), (), ((0, 3), (1, 4), (2, 5)), None)
    assert kept_channels(group, 4, [9.0, 1.0, 2.0, 0.0, 1.0, 3.0]) == [0, 2, 3, 5]


def test_every_width_of_a_grouped_network_is_made_of_whole_atoms():
    net = build_model("resnext50_32x4d", num_classes=10, seed=0, size=64).module
    example = torch.zeros(1, 3, 64, 64)
    groups = ChannelGraph(net, example).groups
    widths = _uniform(groups, CostModel(net, example), Budget("macs", 0.5), Rules(16, 8))
    assert all(widths[g.layer] % len(g.atoms[0]) == 0 for g in groups if g.layer in widths)


# -- chains of linear layers, whose cost is a sum of products ----------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """3 inputs, linear layers of these widths, 2 outputs, which are protected; some layers have a batch norm."""

    groups: list[ChannelGroup]
    cost: CostModel
    scores: dict[str, list[float]]
    strengths: dict[str, float]

    @property
    def free(self):
        return self.groups[:-1]

    def allocate(self, way, budget, rules):
        return allocate(
            self.groups, self.cost, budget, rules, way=way, scores=self.scores, strengths=self.strengths
        )  # fmt: skip

    def left(self, kind, widths):
        """By hand: the fraction of the multiply-accumulates or the channels that these widths leave."""
        now, dense = [widths[g.layer] for g in self.free], [g.width for g in self.free]
        if kind == "ratio":
            return Fraction(sum(now), sum(dense))
        return Fraction(*(sum(a * b for a, b in zip([3, *w], [*w, 2], strict=True)) for w in (now, dense)))


def _chain(widths, *, atoms=(), normed=(), scores=None, strengths=None):
    net, groups = nn.Sequential(), []
    last = len(widths)
    for place, (before, width) in enumerate(zip([3, *widths], [*widths, 2], strict=True)):
        net.add_module(f"fc{place}", nn.Linear(before, width, bias=False))
        whole = tuple(range(width))
        members = [Member(f"fc{place}", "out", whole, whole)]
        if place in normed:
            net.add_module(f"bn{place}", nn.BatchNorm1d(width))
            members.append(Member(f"bn{place}", "out", whole, whole))
        if place < last:
            members.append(Member(f"fc{place + 1}", "in", whole, whole))
        size = atoms[place] if place < len(atoms) else 1
        units = tuple(tuple(range(start, width, width // size)) for start in range(width // size))
        reason = None if place < last else "its channels reach the network's output"
        groups.append(ChannelGroup(f"fc{place}", whole, tuple(members), units, reason))
    names = [group.layer for group in groups[:last]]
    scores = scores or [list(range(width)) for width in widths]
    strengths = strengths or [1.0] * last
    cost = CostModel(net, torch.zeros(1, 3))
    return Chain(groups, cost, dict(zip(names, scores, strict=True)), dict(zip(names, strengths, strict=True)))


@st.composite
def chains(draw):
    """With many ties among scores and strengths, and numbers whose quotients floats hold or round alike."""
    sizes = draw(st.lists(st.sampled_from([1, 1, 2, 3]), min_size=1, max_size=4))
    widths = [size * draw(st.integers(1, 12)) for size in sizes]
    scores = [draw(st.lists(st.integers(0, 6), min_size=width, max_size=width)) for width in widths]
    strengths = [draw(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])) for _ in widths]
    normed = [place for place in range(len(widths)) if draw(st.booleans())]
    return _chain(widths, atoms=sizes, normed=normed, scores=scores, strengths=strengths)


rules = st.builds(
    Rules,
    round_to=st.sampled_from([1, 1, 2, 4, 8]),
    min_width=st.integers(1, 4),
    most_removed=st.sampled_from([1.0, 0.9, 0.7, 0.5]),
)
budgets = st.builds(Budget, kind=st.sampled_from(["macs", "ratio"]), value=st.integers(5, 95).map(lambda p: p / 100))


def _fits(chain, budget, widths):
    allowed = 1 - Fraction(str(budget.value)) if budget.kind == "ratio" else Fraction(budget.value)
    return chain.left(budget.kind, widths) <= allowed


def _allowed_widths(group, rules):
    """The rules, said once more: whole atoms, aligned unless nothing about the group is, not below any floor."""
    size, least = len(group.atoms[0]), group.width * (1 - Fraction(str(rules.most_removed)))
    whole = [w for w in range(size, group.width, size) if w >= rules.min_width and w >= least]
    aligned = [w for w in whole if w % rules.round_to == 0]
    bare = size > 1 and group.width % rules.round_to != 0 and not aligned
    return [*(whole if bare else aligned), group.width]


def _mean_score_of_the_dropped(chain, group, before, after):
    score, size = chain.scores[group.layer], len(group.atoms[0])
    worst_last = sorted(Fraction(sum(score[c] for c in atom), size) for atom in group.atoms)[::-1]
    dropped = worst_last[after // size : before // size]
    return sum(dropped) / len(dropped)


def _walk(chain, way, rules):
    """Every width on the way from the dense chain to its floors, one step at a time, each chosen anew."""
    widths = {group.layer: group.width for group in chain.free}
    place = {group.layer: number for number, group in enumerate(chain.groups)}
    kind = {group.layer: len(group.members) for group in chain.free}
    yield dict(widths)
    while True:
        steps = []
        for group in chain.free:
            before = widths[group.layer]
            narrower = [w for w in _allowed_widths(group, rules) if w < before]
            if not narrower:
                continue
            after = max(narrower)
            tie = (1 - Fraction(after, group.width), -place[group.layer], group.layer, after)
            mean = _mean_score_of_the_dropped(chain, group, before, after)
            if way == "uniform":
                steps.append((0, *tie))
            elif way == "global":
                steps.append((mean, *tie))
            elif way == "interaction":
                steps.append((Fraction(chain.strengths[group.layer]) * group.width / after, *tie))
            else:
                alike = [g for g in chain.free if kind[g.layer] == kind[group.layer]]
                gone = before - after + sum(g.width - widths[g.layer] for g in alike)
                first = (mean, *tie), (Fraction(gone, sum(g.width for g in alike)), *tie), kind[group.layer]
                steps.append(first)
        if not steps:
            return
        if way == "isomorphic":  # of each class the step with the lowest scores, of those the smallest share
            steps = [min(step for step in steps if step[2] == k)[1] for k in {step[2] for step in steps}]
        *_, layer, after = min(steps)
        widths[layer] = after
        yield dict(widths)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=60)
@given(chain=chains(), budget=budgets, rules=rules)
def test_steps_are_taken_one_by_one_in_their_order_until_the_budget_holds(way, chain, budget, rules):
    assume((way, budget.kind) != ("uniform", "ratio"))
    expected = next((widths for widths in _walk(chain, way, rules) if _fits(chain, budget, widths)), None)
    if expected is None:
        with pytest.raises(ValueError, match="cannot be reached"):
            require_reachable(chain.groups, chain.cost, budget, rules, way=way)
        with pytest.raises(ValueError, match="cannot be reached"):
            chain.allocate(way, budget, rules)
    else:
        require_reachable(chain.groups, chain.cost, budget, rules, way=way)
        assert chain.allocate(way, budget, rules) == expected


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40)
@given(chain=chains(), kind=st.sampled_from(["macs", "params", "ratio"]), rules=rules, data=st.data())
def test_a_smaller_budget_never_leaves_a_group_wider(way, chain, kind, rules, data):
    values = sorted(data.draw(st.lists(st.integers(5, 95), min_size=2, max_size=2)), reverse=kind != "ratio")
    found = []
    for percent in values:
        try:
            found.append(chain.allocate(way, Budget(kind, percent / 100), rules))
        except ValueError:
            assume(False)
    wide, narrow = found
    assert all(narrow[layer] <= wide[layer] for layer in wide)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40)
@given(chain=chains(), budget=budgets, rules=rules)
def test_no_way_breaks_a_rule(way, chain, budget, rules):
    try:
        widths = chain.allocate(way, budget, rules)
    except ValueError as err:
        assert re.search("cannot be reached|nothing would be cut", str(err))  # noqa: PT017 (both ends are right)
        return
    assert set(widths) == {group.layer for group in chain.free}
    assert all(widths[group.layer] in _allowed_widths(group, rules) for group in chain.free)


@settings(max_examples=60)
@given(
    widths=st.lists(st.integers(2, 14), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    percent=st.integers(10, 95),
    kind=st.sampled_from(["macs", "ratio"]),
)
def test_global_without_rounding_is_one_sort_of_all_channels(widths, seed, percent, kind):
    order = torch.randperm(sum(widths), generator=torch.Generator().manual_seed(seed)).tolist()
    chain = _chain(widths, scores=[[order.pop() for _ in range(width)] for width in widths])
    budget = Budget(kind, percent / 100)
    alive = {group.layer: set(group.channels) for group in chain.free}
    ranking = sorted((score, layer, c) for layer, vector in chain.scores.items() for c, score in enumerate(vector))
    for _, layer, channel in ranking:
        if _fits(chain, budget, {name: len(kept) for name, kept in alive.items()}):
            break
        if len(alive[layer]) > 1:
            alive[layer].remove(channel)
    assume(_fits(chain, budget, {name: len(kept) for name, kept in alive.items()}))
    found = chain.allocate("global", budget, Rules(1, 1))
    kept = {group.layer: kept_channels(group, found[group.layer], chain.scores[group.layer]) for group in chain.free}
    assert kept == {layer: sorted(channels) for layer, channels in alive.items()}


@settings(max_examples=60)
@given(
    widths=st.lists(st.integers(2, 40), min_size=1, max_size=4),
    strengths=st.lists(st.integers(1, 1000), min_size=4, max_size=4),
    percent=st.integers(20, 95),
    step=st.sampled_from([1, 4]),
)
def test_interaction_is_the_clipped_line_whose_slope_meets_the_budget(widths, strengths, percent, step):
    chain, rules = _chain(widths, strengths=strengths[: len(widths)]), Rules(step, 1)
    largest = max(chain.strengths.values())

    def at(slope):
        line = {layer: 1 - slope * Fraction(strength, largest) for layer, strength in chain.strengths.items()}
        asked = {group.layer: group.width * (1 - min(max(line[group.layer], 0), 1)) for group in chain.free}
        return {g.layer: min(w for w in _allowed_widths(g, rules) if w >= asked[g.layer]) for g in chain.free}

    budget = Budget("macs", percent / 100)
    assume(_fits(chain, budget, at(0)))
    turns = [Fraction(w * largest, g.width * chain.strengths[g.layer]) for g in chain.free for w in range(g.width + 1)]
    meets = max(slope for slope in turns if _fits(chain, budget, at(slope)))
    exceeds = min(slope for slope in turns if slope > meets)
    found, narrow, wide = chain.allocate("interaction", budget, rules), at(meets), at(exceeds)
    assert all(narrow[layer] <= found[layer] <= wide[layer] for layer in found)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1e-300])
@pytest.mark.parametrize("rules", [Rules(1, 1), Rules(8, 8), Rules(4, 1, 0.75)])
def test_equal_strengths_cut_the_same_share_everywhere(strength, rules):
    chain = _chain([60, 33, 32, 32, 100], atoms=[3, 1, 1, 1, 1], strengths=[strength] * 5)
    for percent in (80, 50, 35):
        budget = Budget("macs", percent / 100)
        assert chain.allocate("interaction", budget, rules) == chain.allocate("uniform", budget, rules)


@pytest.mark.parametrize("way", ["global", "isomorphic"])
def test_equal_scores_cut_the_same_share_everywhere_though_sums_round(way):
    assert sum([0.1] * 3) / 3 != 0.1
    widths = [60, 33, 32, 32, 100]
    chain = _chain(widths, atoms=[3, 1, 1, 1, 1], scores=[[0.1] * width for width in widths])
    for rules in (Rules(1, 1), Rules(8, 8), Rules(4, 1, 0.75)):
        budget = Budget("macs", 0.4)
        assert chain.allocate(way, budget, rules) == chain.allocate("uniform", budget, rules)


@pytest.mark.parametrize("way", WAYS)
def test_of_equal_steps_the_deeper_layer_goes_first(way):
    chain = _chain([10, 10, 10], scores=[[5] * 10] * 3)
    widths = chain.allocate(way, Budget("macs", 0.99), Rules(1, 1))
    assert widths == {"fc0": 10, "fc1": 10, "fc2": 9}


def test_a_group_without_strength_goes_to_its_floor_before_any_other_loses_a_channel():
    chain = _chain([8, 8], strengths=[0.0, 0.1])
    assert chain.allocate("interaction", Budget("ratio", 6 / 16), Rules(1, 2)) == {"fc0": 2, "fc1": 8}
    assert chain.allocate("interaction", Budget("ratio", 7 / 16), Rules(1, 2)) == {"fc0": 2, "fc1": 7}


def test_twice_the_strength_keeps_twice_the_share():
    chain = _chain([40, 40], strengths=[2.0, 1.0])
    assert chain.allocate("interaction", Budget("ratio", 41 / 80), Rules(1, 1)) == {"fc0": 26, "fc1": 13}


def test_a_first_step_that_only_aligns_is_ranked_by_what_it_drops():
    scores = [[0, 0, 0, 8, *[9] * 8], [1] * 8 + [2] * 8]  # 12 -> 8 drops 2.0 on average, 16 -> 8 drops 1.0
    chain = _chain([12, 16], scores=scores)
    assert chain.allocate("global", Budget("ratio", 8 / 28), Rules(8, 8)) == {"fc0": 12, "fc1": 8}
    assert chain.allocate("global", Budget("ratio", 12 / 28), Rules(8, 8)) == {"fc0": 8, "fc1": 8}


def test_global_follows_the_scores_where_isomorphic_cuts_every_structure_by_the_same_share():
    low, high = [1, 2, 3, 4], [5, 6, 7, 8]
    chain = _chain([4, 4, 4], normed=[1, 2], scores=[low, [*high[:2], 10, 11], [8, 9, 12, 13]])
    budget = Budget("ratio", 6 / 12)
    assert chain.allocate("global", budget, Rules(1, 1)) == {"fc0": 1, "fc1": 2, "fc2": 3}
    assert chain.allocate("isomorphic", budget, Rules(1, 1)) == {"fc0": 2, "fc1": 2, "fc2": 2}
    assert chain.allocate("isomorphic", Budget("ratio", 5 / 12), Rules(1, 1)) == {"fc0": 3, "fc1": 2, "fc2": 2}


def _torch_pruning_widths(net, example, scores, *, isomorphic):
    """Half of all channels, or of every class's, gone by torch-pruning's own ranking."""
    net = copy.deepcopy(net)
    names = {module: name for name, module in net.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_pruning.pruner.BasePruner(
            net,
            example,
            importance=lambda group: scores[names[group[0].dep.target.module]],
            global_pruning=True,
            isomorphic=isomorphic,
            pruning_ratio=0.5,
            ignored_layers=[net.fc],
        ).step()
    return {name: module.out_channels for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}


@pytest.mark.parametrize("way", ["global", "isomorphic"])
def test_a_residual_network_gets_the_widths_that_torch_pruning_gives_it(way):
    torch.manual_seed(0)
    net, example = torchvision.models.resnet18(num_classes=10).eval(), torch.zeros(1, 3, 32, 32)
    groups = ChannelGraph(net, example).groups
    free = [group for group in groups if group.protected is None]
    scores = {group.layer: torch.rand(group.width) + place % 4 / 5 for place, group in enumerate(free)}
    everywhere = {m.layer: scores[group.layer] for group in free for m in group.members if m.side == "out"}
    theirs = _torch_pruning_widths(net, example, everywhere, isomorphic=way == "isomorphic")
    lists = {layer: vector.tolist() for layer, vector in scores.items()}
    ours = allocate(groups, CostModel(net, example), Budget("ratio", 0.5), Rules(1, 1), way=way, scores=lists)
    assert ours == {layer: theirs[layer] for layer in ours}
    assert len(set(ours.values())) > 8


# -- floors, and what is refused ---------------------------------------------------------------------------------------


def test_a_ranking_of_all_channels_stops_before_it_destroys_a_layer():
    chain = _chain([20, 20], scores=[[1] * 20, [9] * 20])
    budget = Budget("ratio", 19 / 40)
    assert chain.allocate("global", budget, Rules(1, 1)) == {"fc0": 1, "fc1": 20}
    assert chain.allocate("global", budget, Rules(1, 1, most_removed=0.9)) == {"fc0": 2, "fc1": 19}
    assert chain.allocate("global", budget, Rules(8, 1, most_removed=0.75)) == {"fc0": 8, "fc1": 8}


def test_a_uniform_ratio_and_listed_ratios_stop_where_no_more_may_go():
    chain = _chain([10, 20])
    rules = Rules(1, 1, most_removed=0.9)
    assert chain.allocate("uniform", Budget("ratio", 0.95), rules) == {"fc0": 1, "fc1": 2}
    assert listed_widths(chain.groups, {"fc1": 0.99}, rules) == {"fc0": 10, "fc1": 2}


def test_a_share_that_floats_cannot_hold_is_not_rounded_to_one_channel_more():
    assert 10 * (1 - 0.7) > 3
    widths = _chain([10, 10]).allocate("uniform", Budget("ratio", 0.95), Rules(1, 1, most_removed=0.7))
    assert widths == {"fc0": 3, "fc1": 3}


def test_an_unreachable_share_of_channels_names_the_largest():
    chain = _chain([10, 20])
    with pytest.raises(ValueError, match=r"--ratio 0\.95 cannot be reached .* ask for less") as caught:
        chain.allocate("global", Budget("ratio", 0.95), Rules(1, 1))
    printed = float(str(caught.value).split("largest reachable is ")[1].split(" ")[0].rstrip("."))
    assert 28 / 30 - 1e-4 < printed <= 28 / 30
    assert chain.allocate("global", Budget("ratio", printed), Rules(1, 1)) == {"fc0": 1, "fc1": 1}


@pytest.mark.parametrize(
    ("rules", "settings"),
    [
        (Rules(1, 1, 0.5), "--set prune.max_ratio=1 would reach it"),
        (Rules(8, 1, 0.9), "--set prune.round_to=4 would reach it"),
        (Rules(8, 8, 0.5), "--set prune.round_to=1 --set prune.min_width=4 --set prune.max_ratio=1 would reach it"),
    ],
)
def test_an_unreachable_budget_names_rules_that_would_reach_it(rules, settings):
    chain = _chain([16, 16])
    budget = Budget("macs", (4 * 5 + 4 * 4) / (16 * 5 + 16 * 16))  # both at 4 channels
    with pytest.raises(ValueError, match="cannot be reached") as caught:
        require_reachable(chain.groups, chain.cost, budget, rules, way="global")
    assert str(caught.value).endswith(f"{settings}.")
    asked = {key: int(value) for key, _, value in (s.partition("=") for s in settings.split() if "=" in s)}
    looser = replace(
        rules,
        round_to=asked.get("prune.round_to", rules.round_to),
        min_width=asked.get("prune.min_width", rules.min_width),
        most_removed=float(asked.get("prune.max_ratio", rules.most_removed)),
    )
    require_reachable(chain.groups, chain.cost, budget, looser, way="global")


def test_a_network_whose_groups_are_all_protected_says_why():
    groups = [replace(group, protected="it is coupled with 'x', a Fold") for group in _chain([4] * 4).groups]
    cost = _chain([4] * 4).cost
    groups[4] = replace(groups[4], protected="its channels reach the network's output")
    with pytest.raises(ValueError, match="no channels that may be cut") as caught:
        require_reachable(groups, cost, Budget("macs", 0.5), Rules(1, 1), way="global")
    assert "'fc0', 'fc1', 'fc2' and 1 more: it is coupled with 'x', a Fold" in str(caught.value)
    assert "'fc4': its channels reach the network's output" in str(caught.value)


@pytest.mark.parametrize("way", ["global", "isomorphic"])
@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (None, "group 'fc1' has none"),
        ([1.0, 2.0], "group 'fc1' has 2 scores where 3 finite numbers are expected"),
        ([1.0, float("nan"), 2.0], "3 finite numbers are expected"),
    ],
)
def test_a_group_without_proper_scores_is_named(way, found, sentence):
    chain = _chain([3, 3])
    scores = {"fc0": [1.0, 2.0, 3.0]} | ({} if found is None else {"fc1": found})
    with pytest.raises(ValueError, match=sentence):
        allocate(chain.groups, chain.cost, Budget("macs", 0.5), Rules(1, 1), way=way, scores=scores)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [(None, "group 'fc1' has no such strength"), (-1.0, "'fc1' is -1,"), (float("nan"), "'fc1' is nan,")],
)
def test_a_group_without_a_proper_strength_is_named(found, sentence):
    chain = _chain([3, 3])
    strengths = {"fc0": 1.0} | ({} if found is None else {"fc1": found})
    with pytest.raises(ValueError, match=sentence):
        allocate(chain.groups, chain.cost, Budget("macs", 0.5), Rules(1, 1), way="interaction", strengths=strengths)


def test_an_unknown_way_names_the_nearest():
    chain = _chain([3, 3])
    with pytest.raises(ValueError, match=r"unknown allocation 'isomorfic'\. Did you mean 'isomorphic'"):
        chain.allocate("isomorfic", Budget("macs", 0.5), Rules(1, 1))
    with pytest.raises(ValueError, match=r"prune\.layer_ratios"):
        chain.allocate("list", Budget("macs", 0.5), Rules(1, 1))
