"""Maps are read where the consumers read them, and group scores follow the documented rule."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from chip_deploy.chip import evidence
from chip_deploy.chip.cost import CostModel
from chip_deploy.chip.criterion import MapCriterion, Played, RunCriterion, WeightCriterion
from chip_deploy.chip.evidence import joint_groups, judged_groups, score_all, score_groups
from chip_deploy.chip.groups import ChannelGraph
from chip_deploy.chip.image_pass import Batch
from chip_deploy.chip.independence import ChannelIndependence
from chip_deploy.chip.joint import Reader, joint_scores
from chip_deploy.chip.magnitude import BatchNormScale, L1Norm
from chip_deploy.chip.nuclear import channel_independence_svd
from chip_deploy.chip.rank import HRank
from chip_deploy.chip.shards import Shards
from chip_deploy.chip.stability import StoppingRule
from chip_deploy.chip.taylor import Taylor
from chip_deploy.pipeline.models import build_model


class Remembering(MapCriterion):
    """Scores every channel by its number, and keeps the maps it was shown."""

    name = "remembering"
    needs = frozenset({"maps"})
    grade = "baseline"

    def __init__(self):
        self.seen = []

    def score_maps(self, maps_BCP, sides):
        assert maps_BCP.shape[2] == sides[0] * sides[1]
        self.seen.append((maps_BCP.clone(), sides))
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
    net.bn1.eval()  # as one does to freeze a norm
    modes = [module.training for module in net.modules()]
    score_groups(net, groups, ChannelIndependence(), [_images(2, 32)])
    assert [module.training for module in net.modules()] == modes
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


def test_a_map_comes_with_its_height_and_width_wherever_it_is_read():
    class Readers(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 4, 3)
            self.conv = nn.Conv2d(4, 3, 1)
            self.pooled = nn.Linear(4, 5)
            self.vector = nn.Linear(5, 2)
            self.flat = nn.Linear(3 * 5 * 7, 2)

        def forward(self, x):
            x = self.body(x).relu()
            return self.flat(self.conv(x).flatten(1)) + self.vector(self.pooled(x.mean((2, 3))).relu())

    criterion = Remembering()
    images = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    _scores(Readers().eval(), images, criterion)
    seen = {(tuple(maps.shape[1:]), sides) for maps, sides in criterion.seen}
    assert seen == {((4, 35), (5, 7)), ((3, 35), (35, 1)), ((5, 1), (1, 1))}


class Weighing(WeightCriterion):
    """Scores channels by their place; keeps the weights it was shown."""

    name = "weighing"
    needs = frozenset({"weights"})
    grade = "baseline"

    def __init__(self, *needs, comparable=False, lacking=()):
        self.needs = frozenset({"weights", *needs})
        self.comparable = comparable
        self.lacking = lacking
        self.seen = {}

    def lacks(self, group):
        return "it is not to this one's taste" if group.layer in self.lacking else None

    def score_weights(self, groups):
        self.seen = dict(groups)
        return {layer: torch.arange(1.0, of.width + 1, dtype=torch.float64) for layer, of in groups.items()}


class Playing(RunCriterion):
    """A channel is worth what the network makes of the images with it alone; keeps what it makes of all channels."""

    name = "playing"
    needs = frozenset({"masked runs", "labels"})
    grade = "baseline"
    comparable = True

    def __init__(self):
        self.whole = {}

    def score_runs(self, runs, width, *, progress=None):
        self.whole[width] = runs(torch.ones(width, dtype=torch.bool))
        alone = torch.stack([runs(torch.arange(width) == channel).mean() for channel in range(width)])
        if progress is not None:
            progress(1.0)
        return Played(alone, float(width))


def _classifier():
    torch.manual_seed(7)
    body = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).eval()


def _labelled(images, size):
    labels = torch.arange(len(images)) % 4
    return [Batch(*both) for both in zip(images.split(size), labels.split(size), strict=True)]


def _judged(net, images, criteria, batches, **more):
    groups = ChannelGraph(net, images[:1]).groups
    return score_all(net, groups, criteria, batches, cost=CostModel(net, images[:1]), **more)


def test_one_pass_feeds_maps_and_gradients_and_every_criterion_finds_what_it_finds_alone():
    net, images = _classifier(), _images(12, 8)
    together = [ChannelIndependence(), HRank(), Taylor(), L1Norm()]
    groups, cost = ChannelGraph(net, images[:1]).groups, CostModel(net, images[:1])
    passes = []
    handle = net.register_forward_hook(lambda *_: passes.append(1))
    found = score_all(net, groups, together, _labelled(images, 4), cost=cost)
    handle.remove()
    assert len(passes) == 3
    for criterion in together:
        alone = _judged(net, images, [criterion], _labelled(images, 4))[criterion.name]
        assert alone.scores.keys() == found[criterion.name].scores.keys() == {"0", "3"}
        assert all(torch.equal(alone.scores[layer], found[criterion.name].scores[layer]) for layer in alone.scores)
    assert [found[criterion.name].images for criterion in together] == [12, 12, 12, 0]


class Flags(Remembering):
    """Also keeps how cuDNN was told to compute while maps were scored."""

    def __init__(self):
        super().__init__()
        self.flags = []

    def score_maps(self, maps_BCP, sides):
        cudnn = torch.backends.cudnn
        self.flags.append((cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32))
        return super().score_maps(maps_BCP, sides)


def test_maps_come_from_kernels_that_repeat_whatever_else_is_asked_for():
    net, criterion = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1), nn.Flatten()), Flags()
    before = (torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32)
    _scores(net, _images(), criterion)
    assert set(criterion.flags) == {(True, False, False)}
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32) == before


def test_criteria_that_read_weights_touch_no_image():
    net, images = _classifier(), _images(1, 8)

    def never():
        raise AssertionError("an image was read")
        yield

    assert _judged(net, images, [L1Norm()], never())["l1"].layers["0"].images == 0


def test_the_gradient_is_that_of_the_cross_entropy_summed_over_all_images():
    net, images = _classifier(), _images(10, 8)
    net[3].weight.requires_grad = False
    criterion = Weighing("gradients", "labels")
    _judged(net, images, [criterion], _labelled(images, 4))
    assert not net[3].weight.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    exact = copy.deepcopy(net).double().requires_grad_()
    log_p = exact(images.double()).log_softmax(1)
    (-log_p[torch.arange(10), torch.arange(10) % 4].sum()).backward()
    by_name = {"0": exact[0], "3": exact[3]}
    for layer, module in by_name.items():
        (made,) = criterion.seen[layer].producers
        expected = module.weight.grad.flatten(1)
        assert torch.allclose(made.gradients_KN, expected, rtol=1e-4, atol=1e-5)  # float32 against float64
    (scale,) = criterion.seen["0"].scales
    assert torch.allclose(scale.gradients_KN[:, 0], exact[1].weight.grad, rtol=1e-4, atol=1e-5)


def test_maps_that_have_settled_do_not_keep_gradients_from_the_rest_of_the_images():
    net, images = _classifier(), _images(96, 8)
    rule = StoppingRule({"0": 3, "3": 2}, overlap=0.01, least=8, most=64)
    found = _judged(net, images, [ChannelIndependence(), Taylor()], _labelled(images, 8), stopping=rule)
    assert {of.images for of in found["chip"].layers.values()} == {16}  # stable after 8 and after 16
    assert {of.images for of in found["taylor"].layers.values()} == {96}
    alone = _judged(net, images, [ChannelIndependence()], _labelled(images, 8), stopping=rule)
    assert torch.equal(alone["chip"].scores["0"], found["chip"].scores["0"])


def test_scores_that_compare_stay_as_they_are_and_others_become_shares_of_their_group():
    net, images = _classifier(), _images(1, 8)
    plain = _judged(net, images, [Weighing(comparable=True)], [])["weighing"].scores["3"]
    shares = _judged(net, images, [Weighing()], [])["weighing"].scores["3"]
    assert plain.tolist() == [1, 2, 3, 4, 5]
    assert shares.tolist() == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])


def test_masked_runs_see_the_first_images_whatever_the_batches():
    net, images = _classifier(), _images(24, 8)
    first, second = Playing(), Playing()
    told = []
    found = _judged(
        net, images, [first], _labelled(images, 8), run_images=10, run_progress=lambda *part: told.append(part)
    )["playing"]
    assert told == [(0.5, "0"), (1.0, "3")]
    _judged(net, images, [second, ChannelIndependence()], _labelled(images, 3), run_images=10)
    with torch.no_grad():
        p = net(images[:10].clone()).double().softmax(1)[torch.arange(10), torch.arange(10) % 4]
    for criterion in (first, second):
        assert torch.allclose(criterion.whole[6], (p / (1 - p)).log(), atol=1e-5)
    assert found.strengths == {"0": 6.0, "3": 5.0}
    assert {of.images for of in found.layers.values()} == {10}


@pytest.mark.parametrize("criterion", [Taylor(), Playing()])
def test_a_criterion_that_needs_labels_says_so_before_the_first_pass(criterion):
    net, images = _classifier(), _images(4, 8)
    groups, cost = ChannelGraph(net, images[:1]).groups, CostModel(net, images[:1])
    net.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=f"'{criterion.name}' needs labels, and these images have none"):
        score_all(net, groups, [L1Norm(), criterion], [Batch(images)], cost=cost)
    with pytest.raises(ValueError, match=f"'{criterion.name}' needs images, and there are none"):
        score_all(net, groups, [L1Norm(), criterion], [], cost=cost)


def test_labels_that_are_no_classes_of_the_network_are_refused():
    net, images = _classifier(), _images(4, 8)
    with pytest.raises(ValueError, match=r"the data has class 9 \(counted from 0\), but the model has only 4 outputs"):
        _judged(net, images, [Taylor()], [Batch(images, torch.tensor([2, 3, 9, 2]))])


def test_weights_and_gradients_that_are_not_finite_are_named_by_their_layer():
    net, images = _classifier(), _images(4, 8)
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken[3].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="'3' holds a weight that is not finite"):
        _judged(broken, images, [L1Norm()], [])
    with torch.no_grad():
        net[7].bias[0] = math.inf
    with pytest.raises(ValueError, match=r"the gradient of the loss by '\S+' is not finite"):
        _judged(net, images, [Taylor()], _labelled(images, 4))


def test_weights_are_not_scored_without_the_cost_of_the_network():
    net, images = _classifier(), _images(1, 8)
    with pytest.raises(ValueError, match="need `cost`"):
        score_groups(net, ChannelGraph(net, images).groups, L1Norm(), [])


def test_a_group_that_the_criterion_cannot_judge_is_protected_with_the_reason():
    net, images = _classifier(), _images(1, 8)
    groups, cost = ChannelGraph(net, images).groups, CostModel(net, images)
    found = {group.layer: group.protected for group in judged_groups(net, groups, [BatchNormScale()], cost=cost)}
    assert found["0"] is None
    assert found["3"] == "'bn-scale' cannot judge it: it has no batch norm"
    assert found["7"] == "its channels reach the network's output"
    assert set(score_all(net, groups, [BatchNormScale()], [], cost=cost)["bn-scale"].scores) == {"0"}


def test_where_nothing_is_left_to_cut_every_reason_is_named_with_its_first_groups():
    layers = [nn.Conv2d(3, 3, 1) for _ in range(8)]
    net, example = nn.Sequential(*layers).eval(), torch.zeros(1, 3, 4, 4)
    groups, cost = ChannelGraph(net, example).groups, CostModel(net, example)
    with pytest.raises(ValueError, match="nothing of this network can be cut") as caught:
        judged_groups(net, groups, [L1Norm(), BatchNormScale()], cost=cost)
    sentence = str(caught.value)
    assert "('0', '1', '2' and 4 more: 'bn-scale' cannot judge it: it has no batch norm; '7': its channels" in sentence
    assert sentence.endswith("reach the network's output). Take another criterion or another network.")
    with pytest.raises(ValueError, match=r"\('7': its channels reach the network's output\)\. Take another network"):
        judged_groups(net, groups[7:], [L1Norm()], cost=cost)


class _Meeting(Shards):
    """One of several processes, each played by a thread; what they gather goes through a list that they share."""

    def __new__(cls, rank, world, barrier, table):
        made = super().__new__(cls, rank, world)
        made.barrier, made.table = barrier, table
        return made

    def gather(self, found):
        self.table[self.rank] = found
        self.barrier.wait(timeout=60)
        everything = list(self.table)
        self.barrier.wait(timeout=60)
        return everything


def _in_threads(world, work):
    barrier, table = threading.Barrier(world), [None] * world
    with ThreadPoolExecutor(world) as pool:
        return [
            *pool.map(lambda rank: work(_Meeting(rank, world, barrier, table)), range(world)),
        ]


def test_several_processes_find_by_every_kind_of_criterion_what_one_finds():
    net, images = _classifier(), _images(20, 8)
    groups, cost = ChannelGraph(net, images[:1]).groups, CostModel(net, images[:1])
    kinds = (ChannelIndependence, Taylor, L1Norm, Playing)
    batches = _labelled(images, 4)

    def score(shards, own):
        return score_all(
            copy.deepcopy(net), groups, [kind() for kind in kinds], own, cost=cost, run_images=9, shards=shards
        )

    alone = score(Shards(), batches)
    for found in _in_threads(3, lambda shards: score(shards, shards.own(batches))):
        for name, scored in alone.items():
            assert found[name].strengths == scored.strengths
            assert {layer: of.images for layer, of in found[name].layers.items()} == {
                layer: of.images for layer, of in scored.layers.items()
            }
            for layer, scores in scored.scores.items():
                assert torch.allclose(found[name].scores[layer], scores, rtol=1e-9, atol=0)


def test_what_is_wrong_in_one_process_is_heard_in_all():
    net, images = _classifier(), _images(8, 8)
    groups, cost = ChannelGraph(net, images[:1]).groups, CostModel(net, images[:1])
    batches = [Batch(images[:4], torch.zeros(4, dtype=torch.long)), Batch(images[4:])]

    def refusal(shards):
        with pytest.raises(ValueError, match="needs labels") as caught:
            score_all(copy.deepcopy(net), groups, [Taylor()], shards.own(batches), cost=cost, shards=shards)
        return str(caught.value)

    assert len(set(_in_threads(2, refusal))) == 1
