"""Maps are read where the consumers read them, and group scores follow the documented rule."""

import math

import pytest
import torch
from torch import nn

from chip_deploy.chip import evidence
from chip_deploy.chip.criterion import Criterion
from chip_deploy.chip.evidence import joint_groups, score_groups
from chip_deploy.chip.groups import ChannelGraph
from chip_deploy.chip.independence import ChannelIndependence
from chip_deploy.chip.joint import Reader, joint_scores
from chip_deploy.chip.nuclear import channel_independence_svd
from chip_deploy.pipeline.models import build_model


class Remembering(Criterion):
    """Scores every channel by its number, and keeps the maps it was shown."""

    name = "remembering"
    needs = frozenset({"maps"})

    def __init__(self):
        self.seen = []

    def score_maps(self, maps_BCP):
        self.seen.append(maps_BCP.clone())
        return torch.arange(1.0, maps_BCP.shape[1] + 1, dtype=torch.float64).expand(maps_BCP.shape[:2])


def _images(n=4, size=16, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _scores(net, images, criterion=None):
    groups = ChannelGraph(net, images[:1]).groups
    return score_groups(net, groups, criterion or ChannelIndependence(), images.split(2)).scores


def test_maps_come_from_the_input_of_the_consumer_after_the_activation():
    net = nn.Sequential(
        nn.Conv2d(3, 5, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    images = _images()
    with torch.no_grad():
        maps = net[:3](images)
    raw = channel_independence_svd(maps).mean(0)
    assert torch.allclose(_scores(net, images)["0"], raw / raw.mean(), rtol=1e-6)


@pytest.mark.parametrize("functional", [True, False])
def test_behind_a_global_pool_the_maps_are_those_that_go_into_the_pool(functional):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 6, 3)
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.drop = nn.Dropout(0.5)
            self.square = nn.Linear(6, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            x = self.body(x).relu()
            x = x.mean((2, 3)) if functional else self.pool(x).flatten(1)
            return self.head(self.square(self.drop(x)).relu())

    torch.manual_seed(0)
    net, images = Pooled().eval(), _images()
    with torch.no_grad():
        maps = net.body(images).relu()
    scores = _scores(net, images)
    raw = channel_independence_svd(maps).mean(0)
    assert torch.allclose(scores["body"], raw / raw.mean(), rtol=1e-6)
    with torch.no_grad():  # the next layer reads vectors of its own, not the pool's
        vectors = net.square(maps.mean((2, 3))).relu()[..., None]
    raw = channel_independence_svd(vectors).mean(0)
    assert torch.allclose(scores["square"], raw / raw.mean(), rtol=1e-6)


def test_consumers_have_the_same_say_and_the_same_tensor_counts_once():
    class TwoReaders(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 4, 1)
            self.first = nn.Conv2d(4, 2, 1)
            self.twin = nn.Conv2d(4, 2, 1)
            self.scaled = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.body(x).relu()
            return (self.first(x) + self.twin(x) + self.scaled(100 * x.square())).mean((2, 3))

    torch.manual_seed(0)
    net, images = TwoReaders().eval(), _images()
    with torch.no_grad():
        maps = net.body(images).relu()
    readings = [channel_independence_svd(m).mean(0) for m in (maps, 100 * maps.square())]
    expected = sum(r / r.mean() for r in readings) / 2
    assert torch.allclose(_scores(net, images)["body"], expected, rtol=1e-6)


def test_a_tensor_at_the_address_of_one_that_is_gone_is_another_one():
    class Alike(nn.Module):
        """Both readers are handed a fresh tensor of the same shape; the first is freed before the second is made."""

        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 4, 1)
            self.first = nn.Conv2d(4, 2, 1)
            self.second = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.body(x)
            return (self.first(x.relu()) + self.second((-x).relu())).mean((2, 3))

    torch.manual_seed(0)
    net, images = Alike().eval(), _images()
    with torch.no_grad():
        maps = net.body(images)
    readings = [channel_independence_svd(m).mean(0) for m in (maps.relu(), (-maps).relu())]
    expected = sum(r / r.mean() for r in readings) / 2
    for _ in range(5):
        assert torch.allclose(_scores(net, images)["body"], expected, rtol=1e-6)


def test_an_activation_in_place_makes_other_maps_of_the_same_tensor():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 4, 1)
            self.before = nn.Conv2d(4, 2, 1)
            self.after = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.body(x)
            early = self.before(x)
            return (early + self.after(x.relu_())).mean((2, 3))

    torch.manual_seed(0)
    net, images = InPlace().eval(), _images()
    with torch.no_grad():
        maps = net.body(images)
    readings = [channel_independence_svd(m).mean(0) for m in (maps, maps.relu())]
    expected = sum(r / r.mean() for r in readings) / 2
    assert torch.allclose(_scores(net, images)["body"], expected, rtol=1e-6)


def test_a_flatten_gives_each_channel_its_own_pixels():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 256, 2))
    images = _images()
    with torch.no_grad():
        maps = net[:2](images)
    raw = channel_independence_svd(maps).mean(0)
    assert torch.allclose(_scores(net, images)["0"], raw / raw.mean(), rtol=1e-6)


def test_the_rows_of_a_concatenated_group_are_its_own():
    class Concatenation(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.Conv2d(3, 4, 1)
            self.right = nn.Conv2d(3, 6, 1)
            self.join = nn.Conv2d(10, 5, 1)

        def forward(self, x):
            return self.join(torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3))

    torch.manual_seed(0)
    net, images = Concatenation().eval(), _images()
    with torch.no_grad():
        raw = channel_independence_svd(net.right(images)).mean(0)
    assert torch.allclose(_scores(net, images)["right"], raw / raw.mean(), rtol=1e-6)


def test_scores_do_not_depend_on_how_images_are_batched():
    net = build_model("resnet20", num_classes=10, seed=0).module
    groups = ChannelGraph(net, _images(1, 32)).groups
    images = _images(4, 32)
    once = score_groups(net, groups, ChannelIndependence(), [images]).scores
    twice = score_groups(net, groups, ChannelIndependence(), images.split(1)).scores
    assert all(torch.allclose(once[layer], twice[layer], atol=1e-5) for layer in once)


def test_every_group_that_may_be_cut_is_scored_even_where_activations_have_no_module():
    net = build_model("googlenet", num_classes=10, seed=0, size=64).module
    graph = ChannelGraph(net, _images(1, 64))
    criterion = Remembering()
    scores = score_groups(net, graph.groups, criterion, [_images(2, 64)]).scores
    free = [group for group in graph.groups if not group.protected]
    assert set(scores) == {group.layer for group in free}
    for group in free:
        width = group.width
        expected = torch.arange(1.0, width + 1, dtype=torch.float64) * 2 / (width + 1)
        assert torch.allclose(scores[group.layer], expected)


def test_infinite_activations_name_the_layer_that_reads_them():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[2] = math.inf
    groups = ChannelGraph(net, torch.zeros(1, 3, 16, 16)).groups
    with pytest.raises(ValueError, match=r"maps that '1' reads: image 0, channel 2 is not finite"):
        score_groups(net, groups, ChannelIndependence(), [_images()])


def test_scoring_leaves_the_training_mode_and_the_hooks_as_they_were():
    net = build_model("resnet20", num_classes=10, seed=0).module.train()
    groups = ChannelGraph(net, _images(1, 32)).groups
    net.train()
    score_groups(net, groups, ChannelIndependence(), [_images(2, 32)])
    assert net.training
    assert not any(module._forward_pre_hooks for module in net.modules())


def _with_twins():
    """Channels 0 and 4 of the first layer are the same; channel 2 is a weak one of its own."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with torch.no_grad():
        net[0].weight[4] = net[0].weight[0]
        net[0].bias[4] = net[0].bias[0]
    return net


def test_of_two_identical_channels_the_one_shot_rule_deletes_both_and_the_joint_mode_keeps_one():
    net, images = _with_twins(), _images(8)
    groups = ChannelGraph(net, images[:1]).groups
    one_shot = score_groups(net, groups, ChannelIndependence(), images.split(4)).scores["0"]
    joint = joint_groups(net, groups, images.split(4)).scores["0"]
    assert {0, 4} == set(one_shot.argsort()[:2].tolist())  # the first two to go
    assert len({0, 4} & set(joint.argsort()[:2].tolist())) == 1


def test_joint_scores_of_a_network_are_those_of_its_maps():
    net, images = _with_twins(), _images(6)
    with torch.no_grad():
        maps = net[:2](images).flatten(2)
    expected = joint_scores([Reader(maps, range(8))], width=8)
    found = joint_groups(net, ChannelGraph(net, images[:1]).groups, images.split(2))
    assert torch.allclose(found.scores["0"], expected, rtol=1e-9)
    assert found.layers["0"].images == 6
    assert found.layers["0"].stability is None


def test_joint_mode_scores_the_same_where_the_maps_must_be_held_a_group_at_a_time(monkeypatch):
    net = build_model("resnet20", num_classes=10, seed=0).module
    images = _images(2, 16)
    groups = ChannelGraph(net, images[:1]).groups
    together = joint_groups(net, groups, images.split(1)).scores
    monkeypatch.setattr(evidence, "_HELD_BYTES", 0)
    apart = joint_groups(net, groups, images.split(1)).scores
    assert list(together) == list(apart)
    assert all(torch.equal(together[layer], apart[layer]) for layer in together)


def test_a_consumer_called_twice_counts_with_the_mean_of_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.second = nn.Conv2d(4, 4, 1)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(x)
            return self.head((self.second(x.relu()) + self.second(2 * x.relu())).mean((2, 3)))

    torch.manual_seed(0)
    net, images = Twice().eval(), _images()
    with torch.no_grad():
        maps = net.first(images).relu()
    raw = (channel_independence_svd(maps) + channel_independence_svd(2 * maps)).mean(0)
    assert torch.allclose(_scores(net, images)["first"], raw / raw.mean(), rtol=1e-6)


def test_joint_mode_keeps_the_maps_as_they_were_read_where_the_network_works_on_them_in_place():
    class Gated(nn.Module):
        def __init__(self, *, in_place):
            super().__init__()
            torch.manual_seed(5)
            self.first, self.gate, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)
            self.in_place = in_place

        def forward(self, x):
            x = self.first(x).relu()
            gate = self.gate(x).sigmoid()
            x = x.mul_(gate) if self.in_place else x * gate
            return self.head(x).mean((2, 3))

    images = _images(4)
    found = [
        joint_groups(net, ChannelGraph(net, images[:1]).groups, [images]).scores
        for net in (Gated(in_place=flag).eval() for flag in (False, True))
    ]
    assert all(torch.equal(found[0][layer], found[1][layer]) for layer in found[0])


def test_joint_mode_takes_a_consumer_that_is_called_at_two_sizes():
    class TwoSizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(x).relu()
            small = nn.functional.avg_pool2d(x, 2)
            return self.head(self.second(x).mean((2, 3)) + self.second(small).mean((2, 3)))

    torch.manual_seed(0)
    net, images = TwoSizes().eval(), _images()
    with torch.no_grad():
        maps = net.first(images).relu()
    together = torch.cat([maps.flatten(2), nn.functional.avg_pool2d(maps, 2).flatten(2)], -1)
    found = joint_groups(net, ChannelGraph(net, images[:1]).groups, images.split(2)).scores["first"]
    assert torch.allclose(found, joint_scores([Reader(together, range(4))], width=4), rtol=1e-9)
    with pytest.raises(ValueError, match="at least one batch"):
        joint_groups(net, [], [])


@pytest.mark.parametrize(
    "scored", [lambda *given: score_groups(*given[:2], ChannelIndependence(), given[2]), joint_groups]
)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_maps_that_are_not_finite_are_named_by_their_layer_in_both_modes(scored, bad):
    net, images = _with_twins(), _images(4)
    groups = ChannelGraph(net, images[:1]).groups
    with torch.no_grad():
        net[0].bias[3] = bad
    with pytest.raises(ValueError, match=r"the maps that '2' reads: image 0, channel 3 is not finite"):
        scored(net, groups, images.split(2))
