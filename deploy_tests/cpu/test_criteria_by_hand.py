"""Criteria that read weights, and `hrank`: scores worked out by hand, and torch-pruning's own on single layers."""

import hashlib
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch_pruning import DependencyGraph, prune_conv_out_channels, prune_linear_out_channels
from torch_pruning.pruner import importance

from chip_deploy.chip.capacity import InformationCapacity
from chip_deploy.chip.cost import CostModel
from chip_deploy.chip.cpmc import MultiCriteria
from chip_deploy.chip.criterion import Filters, GroupWeights
from chip_deploy.chip.groups import ChannelGraph
from chip_deploy.chip.magnitude import BatchNormScale, GeometricMedian, L1Norm, L2Norm, Lamp, RandomChoice
from chip_deploy.chip.rank import HRank
from chip_deploy.chip.taylor import Taylor
from chip_deploy.chip.weights import group_weights

CLOSE = 1e-12  # float64, a handful of operations
SINGLE = 1e-5  # torch-pruning scores in float32


def rows(values, *, channels=None, taps=1, gradients=None, layer="layer"):
    """One layer's filters, given as nested lists or a tensor."""
    values = torch.as_tensor(values, dtype=torch.float64)
    channels = tuple(range(len(values)) if channels is None else channels)
    gradients = None if gradients is None else torch.as_tensor(gradients, dtype=torch.float64)
    return Filters(layer, channels, values, gradients, taps)


def group(*producers, width=None, consumers=(), scales=(), macs=1.0, params=1.0):
    width = width or max(max(filters.channels) for filters in (*producers, *scales)) + 1
    return GroupWeights("layer", width, tuple(producers), tuple(consumers), tuple(scales), macs, params)


def scored(criterion, *producers, **parts):
    return criterion.score_weights({"layer": group(*producers, **parts)})["layer"].tolist()


def approx(values, rel=CLOSE):
    return pytest.approx(list(values), rel=rel, abs=rel)


def in_shares(values):
    return [value * len(values) / sum(values) for value in values]


# l1, l2


@pytest.mark.parametrize(("criterion", "norms"), [(L1Norm(), [7, 1, 0]), (L2Norm(), [5, 1, 0])], ids=["l1", "l2"])
def test_a_filter_scores_its_norm_in_shares_of_the_average(criterion, norms):
    assert scored(criterion, rows([[3, -4], [-1, 0], [0, 0]])) == approx(in_shares(norms))


def test_producers_have_the_same_say_whatever_their_scale():
    first, second = rows([[3.0], [1.0]]), rows([[1000.0], [3000.0]])
    assert scored(L1Norm(), first, second) == approx([1, 1])


def test_a_channel_is_judged_by_the_producers_that_cover_it():
    whole, part = rows([[1.0], [1.0], [4.0]]), rows([[1.0], [3.0]], channels=(0, 2))
    assert scored(L1Norm(), whole, part) == approx([(0.5 + 0.5) / 2, 0.5, (2 + 1.5) / 2])


# fpgm


def test_the_filter_among_the_others_goes_first_however_large():
    # distances on a line: 10 to 11 and 16 is 1 + 6, 11 is 1 + 5, 16 is 6 + 5
    assert scored(GeometricMedian(), rows([[10.0], [11.0], [16.0]])) == approx(in_shares([7, 6, 11]), rel=1e-9)


def test_distances_are_straight_lines():
    # the corners of a 3-4-5 triangle
    assert scored(GeometricMedian(), rows([[0, 0], [3, 0], [0, 4]])) == approx(in_shares([7, 8, 9]))


def test_filters_all_alike_are_no_distance_apart():
    twins = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)).repeat(70, 1)
    assert scored(GeometricMedian(), rows(twins)) == [0.0] * 70


def test_wide_layers_are_taken_in_parts_without_a_change():
    values = torch.randn(1030, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sums = [sum(math.dist(one, other) for other in values.tolist()) for one in values[::103].tolist()]
    average = float(torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").sum(1).mean())
    assert scored(GeometricMedian(), rows(values))[::103] == approx([s / average for s in sums], rel=1e-9)


# bn-scale


def test_a_batch_norm_scale_counts_without_its_sign():
    assert scored(BatchNormScale(), scales=[rows([[2.0], [-1.0], [0.0]])]) == approx([2, 1, 0])


def test_several_batch_norms_have_the_same_say():
    scales = [rows([[0.1], [0.3]]), rows([[3.0], [1.0]])]
    assert scored(BatchNormScale(), scales=scales) == approx([1, 1])


def test_a_group_without_batch_norm_cannot_be_judged_by_it():
    assert BatchNormScale().lacks(group(rows([[1.0]]))) == "it has no batch norm"
    part = group(rows([[1.0], [1.0], [1.0]]), scales=[rows([[1.0], [1.0]], channels=(0, 2))])
    assert BatchNormScale().lacks(part) == "1 of its 3 channels have no batch norm"
    assert BatchNormScale().lacks(group(rows([[1.0]]), scales=[rows([[1.0]])])) is None


# lamp


def test_lamp_is_the_share_of_what_is_at_least_as_large():
    assert scored(Lamp(), rows([[math.sqrt(2)], [1.0], [math.sqrt(3)], [0.0]])) == approx([2 / 5, 1 / 6, 1, 0])


def test_equal_filters_have_equal_lamp_scores():
    assert scored(Lamp(), rows([[1.0], [2.0], [-1.0], [2.0]])) == approx([1 / 10, 4 / 8, 1 / 10, 4 / 8])


def test_twins_but_for_rounding_have_equal_lamp_scores():
    found = scored(Lamp(), rows([[1.0], [1.0 + 2**-52], [1.0 - 2**-53]]))
    assert found == approx([1 / 3, 1 / 3, 1 / 3])


@given(st.floats(1e-6, 1e6))
def test_lamp_does_not_see_the_scale_of_a_layer(scale):
    values = torch.randn(9, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert scored(Lamp(), rows(values * scale)) == approx(scored(Lamp(), rows(values)), rel=1e-9)


def test_the_largest_filter_of_a_coupled_group_has_lamp_1_too():
    # squared norms 1, 3 and 900, 300 in shares: 0.5, 1.5 and 1.5, 0.5; the third channel 1.0 in the only one it has
    first, second = rows([[1.0], [math.sqrt(3)]]), rows([[30.0], [math.sqrt(300)], [math.sqrt(600)]])
    assert scored(Lamp(), first, second) == approx([1 / 3, 1 / 3, 1 / 3])
    assert max(scored(Lamp(), first, rows([[1.0], [2.0]]))) == 1.0


# random


def test_a_draw_can_be_worked_out_from_the_seed_and_the_weights():
    digest = hashlib.sha256(b"7\n" + struct.pack("<2d", 1.5, -2.0) + struct.pack("<d", 3.0)).digest()
    expected = (int.from_bytes(digest[:8], "big") // 2**12 + 0.5) / 2**52
    assert scored(RandomChoice(7), rows([[1.5, -2.0]]), rows([[3.0]])) == [expected]


def test_draws_are_uniform_between_0_and_1():
    values = torch.arange(20000, dtype=torch.float64)[:, None]
    drawn = torch.tensor(scored(RandomChoice(0), rows(values))).sort().values
    assert drawn[0] > 0
    assert drawn[-1] < 1
    steps = torch.arange(20001) / 20000
    apart = max(float((steps[1:] - drawn).max()), float((drawn - steps[:-1]).max()))
    assert apart < 1.63 / math.sqrt(20000)  # Kolmogorov and Smirnov, at 1 %


def test_another_seed_draws_without_regard_to_the_first():
    values = torch.arange(20000, dtype=torch.float64)[:, None]
    drawn = [torch.tensor(scored(RandomChoice(seed), rows(values))) for seed in (0, 1)]
    assert abs(float(torch.corrcoef(torch.stack(drawn))[0, 1])) < 3 / math.sqrt(20000)  # three standard deviations


def test_a_negative_zero_is_a_zero():
    assert scored(RandomChoice(0), rows([[-0.0, 1.0]])) == scored(RandomChoice(0), rows([[0.0, 1.0]]))


# taylor


def test_the_effect_of_a_filter_is_weight_times_gradient_without_signs():
    values, gradients = [[1.0, -2.0], [3.0, 1.0], [0.0, 0.0]], [[2.0, 2.0], [-1.0, 1.0], [5.0, 5.0]]
    assert scored(Taylor(), rows(values, gradients=gradients)) == approx(in_shares([6, 4, 0]))


def test_two_linear_layers_by_hand():
    """loss = v . W x, so that dL/dW_ij = v_i x_j: filter i scores |v_i| times the sum of |W_ij x_j|."""
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 1.0], [4.0, 0.0]]))
        net[1].weight.copy_(torch.tensor([[2.0, -3.0, 0.5]]))
    net(torch.tensor([[3.0, -1.0]], dtype=torch.float64)).sum().backward()
    expected = in_shares([2 * (3 + 2), 3 * (3 + 1), 0.5 * 12])
    assert scored(Taylor(), rows(net[0].weight.detach(), gradients=net[0].weight.grad)) == approx(expected)


# capacity


def entropy(*shares):
    return -sum(share * math.log2(share) for share in shares if share)


def stretched(values):
    return [(value - min(values)) / (max(values) - min(values)) for value in values]


THREE = [[1.0, 1.0], [1.0, 0.0], [3.0, 1.0]]
THREE_CAPACITY = stretched([entropy(0.5, 0.5), entropy(1), entropy(0.75, 0.25)])
_COSINES = {"01": 1 / math.sqrt(2), "02": 2 / math.sqrt(5), "12": 3 / math.sqrt(10)}
THREE_INDEPENDENCE = stretched(
    [1 - (_COSINES[a] + _COSINES[b]) / 2 for a, b in (("01", "02"), ("01", "12"), ("02", "12"))]
)


@pytest.mark.parametrize("balance", [0.0, 1.0, 2.5])
def test_capacity_is_the_entropy_over_kernels_plus_the_independence_of_filters(balance):
    expected = [h + balance * d for h, d in zip(THREE_CAPACITY, THREE_INDEPENDENCE, strict=True)]
    assert scored(InformationCapacity(balance=balance), rows(THREE)) == approx(in_shares(expected), rel=1e-9)


def test_a_kernel_counts_by_its_norm():
    # kernels of two taps: norms (5, 5) and (13, 0) and (3, 9)
    values = [[3, 4, 5, 0], [5, 12, 0, 0], [0, 3, 9, 0]]
    expected = stretched([1.0, 0.0, entropy(0.25, 0.75)])
    assert scored(InformationCapacity(balance=0), rows(values, taps=2)) == approx(in_shares(expected), rel=1e-9)


def test_a_filter_and_its_negative_are_not_independent():
    found = scored(InformationCapacity(), rows([[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0], [1.0, 0.0, 2.0]]))
    assert found[0] == pytest.approx(found[1])
    assert found[2] > found[0]


def test_filters_that_differ_in_scale_alone_score_alike():
    one = torch.randn(300, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    scales = 1 + torch.rand(40, 1, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    assert scored(InformationCapacity(), rows(one * scales)) == approx([1.0] * 40)


@pytest.mark.parametrize("nearly", [0.0, 1e-30, 1e-9])
def test_a_dead_filter_comes_last_though_its_spread_is_even(nearly):
    # the second and the third have no entropy and one direction: the worst of the living
    values = [[nearly, nearly, nearly], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1.0, 2.0, 1.0]]
    found = scored(InformationCapacity(), rows(values))
    assert found[0] == 0
    assert 0 < found[1] == found[2] < found[3]


def test_dead_filters_change_nothing_among_the_living():
    living = scored(InformationCapacity(), rows(THREE))
    both = scored(InformationCapacity(), rows([*THREE, [0.0, 0.0]]))
    assert both == approx([*(score * 4 / 3 for score in living), 0.0], rel=1e-9)


def test_a_filter_of_one_kernel_is_measured_by_the_histogram_of_its_weights():
    # ten bins from 0 to 1: three weights and one share two bins; all four in bins of their own. Independence of two
    # filters is the same for both, which gives each of them 1.
    values = [[0.0, 0.0, 0.0, 1.0], [0.0, 0.25, 0.55, 1.0]]
    assert scored(InformationCapacity(), rows(values, taps=4)) == approx(in_shares([0 + 1, 1 + 1]))


def test_bins_lie_between_the_smallest_and_the_largest_weight_of_the_layer():
    # from -5 to 5 in tens: -5 and -4.1 share a bin, 4 and 5 do (the last bin has both its ends), -3 has its own
    values = [[-5.0, -4.1], [4.0, 5.0], [-3.0, 4.5], [-5.0, -4.5]]
    found = scored(InformationCapacity(balance=0), rows(values, taps=2))
    assert found == approx([0, 0, 4, 0], rel=1e-9)


@pytest.mark.parametrize("balance", [-1.0, math.nan, math.inf])
def test_a_balance_must_be_a_number_from_0_up(balance):
    with pytest.raises(ValueError, match=r"capacity: a balance of -?\w+ .* expected a number from 0 .*default is 1\."):
        InformationCapacity(balance=balance)


# cpmc

CHEAP = group(rows([[1, -1], [3, 1]]), consumers=[rows([[4.0], [0.0]])], macs=10, params=5)  # values 6 and 4
DEAR = group(rows([[1.0], [3.0]]), rows([[0.0], [-1.0]]), macs=40, params=20)  # values 1 and 4


@pytest.mark.parametrize(
    ("weights", "cheap", "dear"),
    [
        ({}, [1 + 0.75 + 0.75, 2 / 3 + 0.75 + 0.75], [1 / 4, 1]),
        ({"alpha": 0.0}, [1.5, 1.5], [0, 0]),
        ({"beta": 2.0, "gamma": 0.0}, [1 + 1.5, 2 / 3 + 1.5], [1 / 4, 1]),
        ({"alpha": 3.0, "beta": 0.0, "gamma": 4.0}, [3 + 3, 2 + 3], [3 / 4, 3]),
    ],
)
def test_value_macs_and_parameters_are_weighed_over_the_network(weights, cheap, dear):
    found = MultiCriteria(**weights).score_weights({"cheap": CHEAP, "dear": DEAR})
    assert found["cheap"].tolist() == approx(cheap)
    assert found["dear"].tolist() == approx(dear)


def test_a_reader_of_some_channels_only_adds_to_their_value():
    consumers = [rows([[2.0, 2.0]], channels=(1,))]
    assert scored(MultiCriteria(), rows([[2.0], [1.0]]), consumers=consumers) == approx([2 / 5, 1])


def test_a_network_of_two_convolutions_and_a_linear_layer_by_hand():
    """4 x 4 images, no padding: conv 1 -> 2 of 3 x 3 gives 2 x 2 maps, which a linear layer reads as 8 values."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight.copy_(torch.stack([torch.full((1, 3, 3), 1.0), torch.full((1, 3, 3), -2.0)]))
        net[3].weight.copy_(torch.cat([torch.full((3, 4), 0.5), torch.zeros(3, 4)], 1))
    graph = ChannelGraph(net, torch.zeros(1, 1, 4, 4))
    weights = group_weights(net, graph.groups, CostModel(net, torch.zeros(1, 1, 4, 4)))
    assert list(weights) == ["0"]
    # 9 + 3 * 4 * 0.5 and 18 + 0; one channel is 9 * 4 MACs of the convolution and 12 of the linear layer
    assert MultiCriteria().score_weights(weights)["0"].tolist() == approx([15 / 18, 1])
    assert weights["0"].macs == 9 * 4 + 12
    assert weights["0"].params == 9 + 1 + 12


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_weight_must_be_a_number_from_0_up(name, weight):
    with pytest.raises(ValueError, match=rf"cpmc: {name} is \S+; expected a number from 0 up\. The default is 1\."):
        MultiCriteria(**{name: weight})


# hrank

MAPS = {
    "zero": (torch.zeros(3, 4), 0),
    "one stripe": (torch.outer(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([1.0, 5.0, 0.0, 2.0])), 1),
    "two rows": (torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [2, -3, 0, 0]]), 2),
    "diagonal": (torch.eye(3, 4), 3),
}


def test_a_map_scores_its_rank():
    maps = torch.stack([shown for shown, _ in MAPS.values()])[None].flatten(2)
    assert HRank().score_maps(maps, (3, 4)).tolist() == [[rank for _, rank in MAPS.values()]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_rank_is_told_in_every_type(dtype):
    maps = torch.stack([shown for shown, _ in MAPS.values()])[None].flatten(2).to(dtype)
    found = HRank().score_maps(maps, (3, 4))
    assert found.dtype == torch.float64
    assert found.tolist() == [[rank for _, rank in MAPS.values()]]


@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(2, 9))
def test_ranks_are_those_of_another_library(seed, height, width):
    draw = np.random.default_rng(seed)
    full = min(height, width)
    maps = [draw.standard_normal((height, rank)) @ draw.standard_normal((rank, width)) for rank in range(full + 1)]
    found = HRank().score_maps(torch.tensor(np.stack(maps)).flatten(1)[None].float(), (height, width))
    assert found[0].tolist() == list(range(full + 1))
    assert found[0].tolist() == [int(np.linalg.matrix_rank(shown)) for shown in maps]


def test_rounding_of_single_precision_adds_no_rank():
    one = torch.outer(torch.rand(24, generator=torch.Generator().manual_seed(3)) / 3, torch.linspace(0, 7, 24))
    assert int(torch.linalg.matrix_rank(one.double())) > 1  # what the rounding of the product looks like
    assert HRank().score_maps(one.flatten()[None, None], (24, 24)).tolist() == [[1]]


@pytest.mark.parametrize("sides", [(5, 1), (1, 5)])
def test_without_sides_a_map_is_alive_or_dead(sides):
    assert HRank().score_maps(torch.tensor([[[0.0, 0, 0, 0, 1e-30], [0.0] * 5]]), sides).tolist() == [[1, 0]]


@pytest.mark.parametrize("sides", [(2, 2), (4, 1)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_map_that_is_not_finite_has_no_rank(sides, bad):
    maps = torch.tensor([[[1.0, 0, 0, 1], [bad, 0, 0, 1]]])
    found = HRank().score_maps(maps, sides)
    assert found[0, 0] == min(sides)
    assert found[0, 1].isnan()


# torch-pruning


def conv_net():
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 5, 3), nn.Flatten(), nn.Linear(80, 2)
    )


def linear_net():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 2))


def transposed_net():
    torch.manual_seed(6)
    return nn.Sequential(nn.ConvTranspose2d(4, 7, 2), nn.ReLU(), nn.Conv2d(7, 2, 3))


NETS = [(conv_net, (6, 3, 8, 8)), (linear_net, (6, 9)), (transposed_net, (6, 4, 5, 5))]
ALL_TYPES = [nn.Conv2d, nn.ConvTranspose2d, nn.Linear]
PAIRS = [
    (L1Norm(), importance.GroupMagnitudeImportance(1, "first", "mean", target_types=ALL_TYPES)),
    (Lamp(), importance.LAMPImportance(2, "first")),
    (Taylor(), importance.GroupTaylorImportance("first", "mean", target_types=ALL_TYPES)),
]


def both_ways(criterion, theirs, net, shape):
    """Our score of the first layer and torch-pruning's, from the same weights and gradients."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    found = net(images)
    loss = nn.functional.cross_entropy(found.flatten(1), torch.arange(len(images)) % 2, reduction="sum")
    loss.backward()
    graph = ChannelGraph(net, images[:1])
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    weights = group_weights(net, graph.groups, CostModel(net, images[:1]), gradients=gradients)
    ours = criterion.score_weights({"0": weights["0"]})["0"]
    cut = prune_linear_out_channels if isinstance(net[0], nn.Linear) else prune_conv_out_channels
    dependencies = DependencyGraph().build_dependency(net, images[:1])
    width = len(ours)
    return ours, theirs(dependencies.get_pruning_group(net[0], cut, list(range(width)))).double()


@pytest.mark.parametrize(("build", "shape"), NETS, ids=["convolution", "linear", "transposed"])
@pytest.mark.parametrize(("criterion", "theirs"), PAIRS, ids=[criterion.name for criterion, _ in PAIRS])
def test_a_single_layer_scores_as_in_torch_pruning(criterion, theirs, build, shape):
    ours, expected = both_ways(criterion, theirs, build(), shape)
    assert torch.allclose(ours, expected, rtol=SINGLE)


@pytest.mark.parametrize(("build", "shape"), NETS, ids=["convolution", "linear", "transposed"])
def test_distances_are_those_of_torch_pruning_where_weights_are_positive(build, shape):
    """It takes the distances of |w|^p, of which only p = 1 on positive weights are those of the paper."""
    net = build()
    with torch.no_grad():
        net[0].weight.abs_()
    theirs = importance.FPGMImportance(1, "first")
    ours, expected = both_ways(GeometricMedian(), theirs, net, shape)
    assert torch.allclose(ours, expected, rtol=SINGLE)


def test_batch_norm_scales_score_as_in_torch_pruning():
    net = conv_net()
    with torch.no_grad():
        net[1].weight.copy_(torch.linspace(-1, 2, 12))
    ours, expected = both_ways(BatchNormScale(), importance.BNScaleImportance(), net, (6, 3, 8, 8))
    assert torch.allclose(ours, expected, rtol=SINGLE)
