"""Masked runs give what the network would give without the channels, however they are played."""

import copy
import math

import pytest
import torch
from torch import nn

from chip_deploy.chip import masked
from chip_deploy.chip.cost import CostModel
from chip_deploy.chip.groups import ChannelGraph
from chip_deploy.chip.masked import MaskedRuns, label_margins, masked_scores
from chip_deploy.chip.plan import make_plan
from chip_deploy.chip.surgery import apply_plan
from chip_deploy.pipeline.models import build_model

EXACT = {"rtol": 0, "atol": 1e-11}  # float64; a few thousand terms a score


def _images(n=5, size=8, seed=0):
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _labels(n=5):
    return torch.arange(n) % 2


def _groups(net, size=8):
    return [group for group in ChannelGraph(net, _images(1, size)).groups if group.protected is None]


def _masks(count, width, seed=0):
    return torch.rand(count, width, generator=torch.Generator().manual_seed(seed)) < 0.5


def _plain_margins(net, images, labels):
    """The definition, from the probabilities."""
    with torch.no_grad():
        p = net.eval()(images).softmax(1)[torch.arange(len(images)), labels]
    return (p / (1 - p)).log()


def _without(net, kept, size=8):
    """The network after the surgery that keeps these channels."""
    example = _images(1, size)
    groups = ChannelGraph(net, example).groups
    plan = make_plan(
        net,
        groups,
        {group.layer: kept.get(group.layer, group.channels) for group in groups if not group.protected},
        cost=CostModel(net, example),
        name="net",
        num_classes=2,
        input_shape=example.shape[1:],
        criterion="chip",
        round_to=1,
        min_width=1,
    )
    return apply_plan(net, plan, example)


class Flattened(nn.Module):
    """A linear layer that reads four positions of each channel."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu()).relu()
        return self.head(x.flatten(1))


class Branching(nn.Module):
    """Two consumers, a depthwise convolution with a bias, a grouped one, a concatenation, keyword arguments."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 4, 1)
        self.late = nn.Conv2d(12, 6, 1)
        self.grouped = nn.Conv2d(6, 6, 1, groups=2)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.depthwise(self.first(x).relu()).relu()
        x = torch.cat([x, self.wide(input=x).relu()], 1)
        return self.head(self.grouped(self.late(x).relu()).mean((2, 3)))


class ChannelsLast(nn.Module):
    """Linear layers that read channels as the last of four axes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.inner = nn.Linear(4, 6)
        self.outer = nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x).permute(0, 2, 3, 1)
        return self.head(self.outer(self.inner(x).relu()).relu().mean((1, 2)))


def _net(kind):
    torch.manual_seed(0)
    net = kind().double().eval()
    for module in net.modules():  # statistics and shifts other than 0 and 1, which would hide a wrong place
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            nn.init.uniform_(module.bias, -1, 1)
    return net


@pytest.mark.parametrize("kind", [Flattened, Branching, ChannelsLast])
def test_masking_the_consumers_is_the_same_as_cutting_the_channels(kind):
    net, images, labels = _net(kind), _images(), _labels()
    for group in _groups(net):
        gone = group.atoms[::2]
        kept = [channel for channel in group.channels if not any(channel in atom for atom in gone)]
        alive_C = torch.tensor([channel in kept for channel in group.channels])
        found = MaskedRuns(net, _groups(net), images, labels).runs(group.layer)(alive_C)
        assert torch.allclose(found, _plain_margins(_without(net, {group.layer: kept}), images, labels), **EXACT)


def test_all_groups_of_a_resnet_masked_at_once_give_what_surgery_gives_across_its_option_a_shortcuts():
    net = build_model("resnet20", num_classes=10, seed=0).module.double()
    images = _images(3, 16)
    groups = _groups(net, 16)
    alive = {group.layer: _masks(1, group.width, seed=n) for n, group in enumerate(groups)}
    for alive_SC in alive.values():
        alive_SC[:, 0] = True
    kept = {g.layer: [c for c, on in zip(g.channels, alive[g.layer][0].tolist(), strict=True) if on] for g in groups}
    with torch.no_grad():
        found = masked_scores(net.eval(), images, groups, alive, masks=1)[0]
        assert torch.allclose(found, _without(net, kept, 16)(images), **EXACT)
        assert not torch.allclose(found, net(images), rtol=1e-3)


def test_masking_is_the_same_as_silencing_the_producer_where_nothing_lies_between_but_a_relu():
    net, images, labels = _net(Flattened), _images(), _labels()
    alive_C = torch.tensor([True, False, True, True, False])
    silenced = copy.deepcopy(net)
    with torch.no_grad():
        silenced.second.weight[~alive_C] = 0
        silenced.second.bias[~alive_C] = 0
    found = MaskedRuns(net, _groups(net), images, labels).runs("second")(alive_C)
    assert torch.allclose(found, _plain_margins(silenced, images, labels), **EXACT)


def test_with_all_channels_alive_the_value_is_the_log_odds_of_the_label():
    net, images, labels = _net(Flattened), _images(), torch.tensor([0, 2, 1, 1, 0])
    found = MaskedRuns(net, _groups(net), images, labels).runs("first")(torch.ones(6, dtype=torch.bool))
    assert found.dtype == torch.float64
    assert torch.allclose(found, _plain_margins(net, images, labels), **EXACT)


def test_log_odds_stay_exact_where_the_probability_rounds_to_one():
    scores = torch.tensor([[1000.0, 0.0, 0.0], [0.0, 1000.0, -5.0]])
    found = label_margins(scores, torch.tensor([0, 2]))
    assert torch.allclose(found, torch.tensor([1000 - math.log(2), -1005.0], dtype=torch.float64), rtol=1e-15)


@pytest.mark.parametrize("batch", [1, 3, 5, 11, 256])
def test_masks_played_together_give_what_each_gives_alone(batch):
    net, images, labels = _net(Branching), _images(), _labels()
    table = MaskedRuns(net, _groups(net), images, labels, batch=batch)
    for group in _groups(net):
        masks = _masks(9, group.width)
        runs = table.runs(group.layer)
        together = runs.many(masks)
        assert together.shape == (9, 5)
        assert torch.allclose(together, torch.stack([runs(alive_C) for alive_C in masks]), **EXACT)


class InPlace(nn.Module):
    """Works on its input in place, as some networks do to normalise it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x.sub_(0.5).div_(0.25)).relu()
        return self.head(self.second(x).mean((2, 3)))


def test_a_network_that_works_on_its_input_in_place_does_not_spoil_the_images():
    net, images, labels = _net(InPlace), _images(), _labels()
    kept = images.clone()
    runs = MaskedRuns(net, _groups(net), images, labels).runs("first")
    masks = _masks(9, 6)
    together = runs.many(masks)
    assert torch.equal(images, kept)
    assert torch.allclose(together, torch.stack([runs(alive_C) for alive_C in masks]), **EXACT)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_a_kept_prefix_changes_no_value(name):
    net = build_model(name, num_classes=4, seed=0, size=32).module.double()
    images, labels = _images(2, 32), _labels(2)
    groups = _groups(net, 32)
    for group in groups[:: len(groups) // 2]:
        masks = _masks(masked._FEW, group.width)
        runs = MaskedRuns(net, groups, images, labels).runs(group.layer)
        found = runs.many(masks)
        assert runs._shared  # so a prefix was in use
        expected = torch.stack([runs(alive_C) for alive_C in masks])
        assert torch.allclose(found, expected, **EXACT)


class Counting(nn.Conv2d):
    """Counts the rows that it computes."""

    rows = 0

    def forward(self, x):
        self.rows += len(x)
        return super().forward(x)


def test_what_comes_before_the_first_consumer_is_computed_a_few_times_only():
    torch.manual_seed(0)
    net = nn.Sequential(
        Counting(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 1), nn.ReLU(inplace=True), Counting(5, 6, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    ).double()  # fmt: skip
    table = MaskedRuns(net, _groups(net), _images(), _labels(), batch=10)
    net[0].rows = net[4].rows = 0
    table.runs("2").many(_masks(30, 5))
    assert net[4].rows >= 30 * 5
    assert net[0].rows < 3 * 5


class Remembers(nn.Module):
    """Throws the result of an in-place activation away, and uses the tensor that it changed."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(self.first(x))
        self.relu(x)
        return self.head(self.second(x).relu().mean((2, 3)))


class Table(nn.Module):
    """Its output is no row an image, though as long as the trial's two images."""

    def forward(self):
        return torch.tensor([[1.0], [2.0]], dtype=torch.float64)


class SumsTable(Remembers):
    """Copies of the table would change what it computes."""

    def __init__(self):
        super().__init__()
        self.table = Table()

    def gain(self):
        return self.table().sum()

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.head(self.second(x * self.gain()).relu().mean((2, 3)))


class ShapesTable(SumsTable):
    """Copies of the table would not fit."""

    def gain(self):
        return self.table().view(2)[1]


@pytest.mark.parametrize("kind", [Remembers, SumsTable, ShapesTable])
def test_a_network_that_cannot_be_shortened_is_run_whole(kind):
    net, images, labels = _net(kind), _images(), _labels()
    runs = MaskedRuns(net, _groups(net), images, labels).runs("first")
    masks = _masks(6, 4)
    found = runs.many(masks)
    assert runs._shared == []
    assert torch.allclose(found, torch.stack([runs(alive_C) for alive_C in masks]), **EXACT)


def test_a_batch_norm_without_statistics_is_shown_one_mask_at_a_time():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ).double()  # fmt: skip
    images, labels = _images(), _labels()
    masks = _masks(6, 4)
    runs = MaskedRuns(net, _groups(net), images, labels).runs("0")
    assert torch.allclose(runs.many(masks), torch.stack([runs(alive_C) for alive_C in masks]), **EXACT)
    with pytest.raises(ValueError, match="no statistics of its own"):
        masked_scores(net, images, _groups(net), {"0": masks}, masks=6)


def test_a_dead_channel_changes_nothing_even_where_it_is_infinite():
    net, images, labels = _net(Flattened), _images(), _labels()
    with torch.no_grad():
        net.second.bias[2] = math.inf
    runs = MaskedRuns(net, _groups(net), images, labels).runs("second")
    assert bool(runs(torch.tensor([True, True, False, True, True])).isfinite().all())
    with pytest.raises(ValueError, match=r"channels of 'second' set to zero, the scores of image 0 are not finite"):
        runs(torch.ones(5, dtype=torch.bool))


def test_masked_runs_leave_modes_hooks_weights_and_forwards_as_they_were():
    net = _net(Flattened)
    groups = _groups(net)
    net.train()
    net.norm.eval()
    before = copy.deepcopy(net.state_dict())
    runs = MaskedRuns(net, groups, _images(), _labels()).runs("second")
    runs.many(_masks(6, 5))
    net.head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        runs.many(_masks(6, 5))
    net.head.weight.data[0, 0] = before["head.weight"][0, 0]
    assert [module.training for module in net.modules()] == [True, True, False, True, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())
    assert not any("forward" in vars(module) for module in net.modules())


def test_gradients_through_masks_are_those_of_the_cut_network():
    net, images = _net(Flattened), _images()
    alive_C = torch.tensor([True, False, True, True, False])
    masks = torch.stack([alive_C, ~alive_C])
    label_margins(masked_scores(net, images, _groups(net), {"second": masks}, masks=2)[0], _labels()).sum().backward()
    cut = _without(net, {"second": [0, 2, 3]})
    label_margins(cut(images), _labels()).sum().backward()
    assert torch.allclose(net.first.weight.grad, cut.first.weight.grad, **EXACT)
    assert torch.allclose(net.second.weight.grad[alive_C], cut.second.weight.grad, **EXACT)
    assert not net.second.weight.grad[~alive_C].any()


def test_what_cannot_be_played_is_refused_in_a_sentence():
    net = _net(Flattened)
    groups = _groups(net)
    everyone = torch.ones(6, dtype=torch.bool)
    with pytest.raises(ValueError, match="5 images came with labels of shape"):
        MaskedRuns(net, groups, _images(), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one image"):
        MaskedRuns(net, groups, _images(0), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="no group 'third'; there are first, second"):
        MaskedRuns(net, groups, _images(), _labels()).runs("third")
    with pytest.raises(ValueError, match="has 6 channels, but the mask has shape"):
        MaskedRuns(net, groups, _images(), _labels()).runs("first")(everyone[:5])
    with pytest.raises(ValueError, match=r"class 3 \(counted from 0\), but the model has only 3 outputs"):
        MaskedRuns(net, groups, _images(), torch.tensor([0, 1, 3, 1, 2])).runs("first")(everyone)
    with pytest.raises(ValueError, match="no layer reads the channels of 'head'"):
        MaskedRuns(net, ChannelGraph(net, _images(1)).groups, _images(), _labels()).runs("head")


def test_a_network_without_class_scores_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    with pytest.raises(ValueError, match=r"one row of scores an image, .* the network gave shape \(5, 2, 8, 8\)"):
        MaskedRuns(net, _groups(net), _images(), _labels()).runs("0")(torch.ones(4, dtype=torch.bool))
