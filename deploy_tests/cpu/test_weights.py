"""The weights of every channel are those that autograd finds behind it, and its cost is what a real cut saves."""

import copy

import pytest
import torch
from torch import nn

from chip_deploy.chip.cost import CostModel
from chip_deploy.chip.groups import CannotCut, ChannelGraph, ChannelGroup, Member
from chip_deploy.chip.weights import group_weights, weight_names


class Residual(nn.Module):
    """A stem and two convolutions on one residual stream, with a batch norm each, and a head behind a global pool."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 4, 3, padding=1)
        self.outer = nn.Conv2d(4, 6, 3, padding=1)
        self.square = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.inner(x).relu())
        x = x + self.square(x)
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Two steps of a dense block: the norm and the convolution behind each concatenation read parts of two groups."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.grow = nn.Conv2d(4, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.join = nn.Conv2d(7, 5, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.grow(x.relu())], 1)
        return self.head(self.join(self.norm(x).relu()).mean((2, 3)))


def _flattened():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2))


def _depthwise():
    return nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 2, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _transposed():
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 5, 2, stride=2), nn.ReLU(), nn.Conv2d(5, 2, 1), nn.Flatten(2)
    )


NETS = {"residual": Residual, "dense": Dense, "flatten": _flattened, "depthwise": _depthwise, "transposed": _transposed}


def _net(name):
    torch.manual_seed(0)
    net = NETS[name]().eval()
    for module in net.modules():  # every weight another number, so that a number says where it stood
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
    return net


def _groups_of(net, example):
    groups = ChannelGraph(net, example).groups
    return [group for group in groups if group.protected is None]


def _numbers(net, name):
    return set(net.get_submodule(name).weight.detach().double().flatten().tolist())


@pytest.mark.parametrize("name", NETS)
def test_the_rows_of_a_channel_are_the_weights_that_vanish_with_it(name):
    net, example = _net(name), torch.zeros(1, 3, 6, 6)
    groups = _groups_of(net, example)
    weights = group_weights(net, groups, CostModel(net, example))
    assert groups
    for group in groups:
        of = weights[group.layer]
        for channel in range(group.width):
            cut = copy.deepcopy(net)
            ChannelGraph(cut, example).cut(group.layer, [group.channels[channel]])
            for layer in {part.layer for part in (*of.producers, *of.consumers, *of.scales)}:
                held = [part for part in (*of.producers, *of.consumers, *of.scales) if part.layer == layer]
                rows = [p.values_KN[p.channels.index(channel)].tolist() for p in held if channel in p.channels]
                gone = _numbers(net, layer) - _numbers(cut, layer)
                assert {number for row in rows for number in row} == gone, (group.layer, channel, layer)


@pytest.mark.parametrize("name", NETS)
def test_the_cost_of_a_channel_is_what_a_real_cut_of_one_saves(name):
    net, example = _net(name), torch.zeros(1, 3, 6, 6)
    groups, cost = _groups_of(net, example), CostModel(net, example)
    for layer, of in group_weights(net, groups, cost).items():
        cut = copy.deepcopy(net)
        ChannelGraph(cut, example).cut(layer, [0])
        after = CostModel(cut, example).dense
        assert of.macs == pytest.approx(cost.dense.macs - after.macs, rel=1e-12), layer
        assert of.params == pytest.approx(cost.dense.params - after.params, rel=1e-12), layer


LAYERS = {
    "conv": (nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3), (4, 5)),
    "conv3d": (nn.Conv3d(2, 4, 2), (2, 3, 3, 3)),
    "oblong": (nn.Conv2d(4, 6, (1, 3)), (4, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "one row a group": (nn.Conv2d(4, 8, 3, groups=4), (4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), (4, 5, 5)),
    "transposed in groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5)),
    "transposed 1d": (nn.ConvTranspose1d(3, 2, 4), (3, 5)),
    "linear": (nn.Linear(4, 6), (4,)),
}


def _held_by(layer, side):
    """What `group_weights` says of a group whose channels are all those of that side of one layer."""
    net = nn.Sequential(layer)
    width = {
        "in": getattr(layer, "in_channels", None) or getattr(layer, "in_features", 0),
        "out": getattr(layer, "out_channels", None) or getattr(layer, "out_features", 0),
    }[side]
    every = tuple(range(width))
    group = ChannelGroup("0", every, (Member("0", side, every, every),), tuple((c,) for c in every), None)
    example = torch.zeros(1, *next(shape for known, shape in LAYERS.values() if known is layer))
    found = group_weights(net, [group], CostModel(net, example))["0"]
    (part,) = found.producers if side == "out" else found.consumers
    return part, width


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("side", ["out", "in"])
def test_a_row_holds_the_weights_that_autograd_finds_between_a_channel_and_the_rest(name, side):
    layer, shape = LAYERS[name]
    part, width = _held_by(layer, side)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    assert part.channels == tuple(range(width))
    for channel in range(width):
        shown = x
        if side == "in":
            shown = torch.zeros_like(x)
            shown[:, channel] = x[:, channel]
        output = layer(shown)
        target = output[:, channel] if side == "out" else output
        (gradient,) = torch.autograd.grad(target.square().sum(), layer.weight)
        expected = layer.weight[gradient != 0].detach().double()
        assert sorted(part.values_KN[channel].tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "linear"])
@pytest.mark.parametrize("side", ["out", "in"])
def test_so_many_neighbouring_values_of_a_row_are_one_kernel(name, side):
    layer, _ = LAYERS[name]
    part, _ = _held_by(layer, side)
    kernels = {tuple(kernel) for kernel in layer.weight.detach().double().flatten(2).flatten(0, 1).tolist()}
    rows = part.values_KN.reshape(-1, part.taps)
    assert {tuple(kernel) for kernel in rows.tolist()} == kernels


def test_a_linear_behind_a_flatten_has_the_columns_of_a_channel_in_one_row():
    net, example = _net("flatten"), torch.zeros(1, 3, 6, 6)
    weights = group_weights(net, _groups_of(net, example), CostModel(net, example))["0"]
    (reads,) = weights.consumers
    matrix = net[3].weight.detach().double()
    for channel in range(4):
        by_hand = [matrix[row, 16 * channel + pixel].item() for pixel in range(16) for row in range(2)]
        assert sorted(reads.values_KN[channel].tolist()) == sorted(by_hand)
    assert reads.taps == 1


def test_a_layer_that_reads_a_part_of_the_group_names_the_places_of_that_part():
    net = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(2, 4, 1))
    members = (Member("0", "out", (1, 2, 4), (1, 2, 4)), Member("1", "in", (0, 1), (4, 2)))
    group = ChannelGroup("0", (1, 2, 4), members, ((1,), (2,), (4,)), None)
    cost = CostModel(nn.Sequential(net[0]), torch.zeros(1, 3, 4, 4))
    found = group_weights(net, [group], cost)["0"]
    (reads,) = found.consumers
    assert reads.channels == (1, 2)  # channels 2 and 4 stand at places 1 and 2
    columns = net[1].weight.detach().double()[:, :, 0, 0]
    assert torch.equal(reads.values_KN, torch.stack([columns[:, 1], columns[:, 0]]))
    (made,) = found.producers
    assert torch.equal(made.values_KN, net[0].weight.detach().double()[[1, 2, 4]].flatten(1))


def test_a_layer_that_reads_some_channels_twice_comes_in_two_parts():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(4, 2, 1))
    members = (Member("0", "out", (0, 1, 2), (0, 1, 2)), Member("1", "in", (0, 1, 2, 3), (0, 1, 2, 1)))
    group = ChannelGroup("0", (0, 1, 2), members, ((0,), (1,), (2,)), None)
    cost = CostModel(nn.Sequential(net[0]), torch.zeros(1, 3, 4, 4))
    once, twice = group_weights(net, [group], cost)["0"].consumers
    assert (once.channels, twice.channels) == ((0, 2), (1,))
    columns = net[1].weight.detach().double()[:, :, 0, 0]
    assert torch.equal(twice.values_KN, torch.cat([columns[:, 1], columns[:, 3]])[None])


def test_the_scales_of_a_group_are_its_part_of_every_batch_norm():
    net, example = _net("dense"), torch.zeros(1, 3, 6, 6)
    weights = group_weights(net, _groups_of(net, example), CostModel(net, example))
    scale = net.norm.weight.detach().double()
    assert torch.equal(weights["stem"].scales[0].values_KN[:, 0], scale[:4])
    assert torch.equal(weights["grow"].scales[0].values_KN[:, 0], scale[4:])
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1))
    groups = _groups_of(plain, example)
    assert group_weights(plain, groups, CostModel(plain, example))["0"].scales == ()


def test_gradients_lie_as_their_weights_do():
    net, example = _net("depthwise"), torch.zeros(1, 3, 6, 6)
    groups = _groups_of(net, example)
    gradients = {name: 3 * net.get_parameter(name).detach().double() for name in weight_names(net, groups)}
    for of in group_weights(net, groups, CostModel(net, example), gradients=gradients).values():
        for part in (*of.producers, *of.scales):
            assert torch.equal(part.gradients_KN, 3 * part.values_KN)
        assert [part.gradients_KN for part in of.consumers] == [None] * len(of.consumers)


def test_protected_groups_have_no_weights():
    net, example = _net("residual"), torch.zeros(1, 3, 6, 6)
    groups = ChannelGraph(net, example).groups
    assert {group.layer for group in groups} - set(group_weights(net, groups, CostModel(net, example))) == {"head"}


def test_a_layer_that_computes_its_weight_is_refused_with_the_remedy():
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    net, example = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2)), torch.zeros(1, 3, 6, 6)
    group = ChannelGroup(
        "0", (0, 1, 2, 3), (Member("0", "out", (0, 1, 2, 3), (0, 1, 2, 3)),), ((0,), (1,), (2,), (3,)), None
    )
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2))
    with pytest.raises(CannotCut, match=r"'0' computes its weight .*remove_parametrizations"):
        group_weights(net, [group], CostModel(plain, example))
