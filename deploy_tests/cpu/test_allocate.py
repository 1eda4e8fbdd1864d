"""Budgets, floors and rounding against counts worked out by hand."""

import pytest
import torch
from torch import nn

from chip_deploy.chip.allocate import Budget, Rules, kept_channels, listed_widths, uniform_widths
from chip_deploy.chip.cost import CostModel, paper_flops, removed_at, removed_by
from chip_deploy.chip.groups import ChannelGraph, ChannelGroup
from chip_deploy.pipeline.models import build_model


def _net():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, groups=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


EXAMPLE = torch.zeros(1, 3, 8, 8)


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
    widths = uniform_widths(groups, cost, Budget(kind, 0.5), Rules(step, floor))
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
    assert uniform_widths(groups, cost, Budget("ratio", 0.25), Rules(1, 1)) == {"0": 24, "3": 48}
    assert uniform_widths(groups, cost, Budget("ratio", 0.3), Rules(16, 1)) == {"0": 32, "3": 48}


def test_an_unreachable_budget_names_the_smallest_reachable_and_the_rounding_that_would_do(counted):
    groups, cost = counted
    smallest = (64 * (16 * 27 + 16 * 16 * 9) + 160) / cost.dense.macs
    with pytest.raises(ValueError, match="cannot be reached") as caught:
        uniform_widths(groups, cost, Budget("macs", 0.06), Rules(16, 8))
    printed = float(str(caught.value).split("smallest reachable is ")[1].split(" ")[0].rstrip("."))
    assert smallest <= printed < smallest + 2e-4
    assert "--set prune.round_to=8 would reach it" in str(caught.value)
    assert uniform_widths(groups, cost, Budget("macs", printed), Rules(16, 8)) == {"0": 16, "3": 16}
    assert uniform_widths(groups, cost, Budget("macs", 0.06), Rules(8, 8))


def test_nothing_to_cut_is_an_error(counted):
    groups, cost = counted
    with pytest.raises(ValueError, match="nothing would be cut"):
        uniform_widths(groups, cost, Budget("ratio", 0.1), Rules(16, 8))


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
    widths = uniform_widths(groups, CostModel(net, example), Budget("macs", 0.5), Rules(16, 8))
    assert all(widths[g.layer] % len(g.atoms[0]) == 0 for g in groups if g.layer in widths)
