"""A group stops paying for images when its kept set is stable; one process or several find the same."""

import pytest
import torch
from torch import nn

from chip_deploy.chip.criterion import MapCriterion
from chip_deploy.chip.evidence import score_groups
from chip_deploy.chip.groups import ChannelGraph, ChannelGroup
from chip_deploy.chip.image_pass import Share
from chip_deploy.chip.maps import Reading
from chip_deploy.chip.shards import Shards
from chip_deploy.chip.stability import ReaderScores, StoppingRule, group_scores, kept_overlaps

WIDTH = 20


def _group(width=WIDTH, atoms=None):
    return ChannelGroup("conv", tuple(range(width)), (), atoms or tuple((c,) for c in range(width)), None)


def _reader(noise, images, *, seed=0, width=WIDTH):
    """Scores 1, 2, 3, ... with noise of that size on every image."""
    generator = torch.Generator().manual_seed(seed)
    reader = ReaderScores(range(width))
    levels = torch.arange(1.0, width + 1, dtype=torch.float64)
    for batch in torch.arange(images).split(8):
        reader.add(levels + noise * torch.randn(len(batch), width, generator=generator, dtype=torch.float64))
    return reader


def test_scores_without_noise_keep_the_same_channels_in_every_resample():
    overlaps = kept_overlaps(_group(), [_reader(0, 32)], StoppingRule({"conv": 10}))
    assert overlaps == {10: 1.0}


def test_noise_makes_the_kept_set_unstable_and_more_images_make_it_stable_again():
    rule = StoppingRule({"conv": 10})
    few, many = (kept_overlaps(_group(), [_reader(20, n)], rule)[10] for n in (16, 8192))
    assert few < 0.75
    assert many >= 0.9


def test_the_bootstrap_tells_how_far_the_kept_set_is_from_the_true_one():
    """In 95 % of the cases the true kept set overlaps by at least what the bootstrap says, up to one channel."""
    truth, good = set(range(10, 20)), 0
    for seed in range(60):
        reader = _reader(6, 64, seed=seed)
        kept = set(group_scores(_group(), [reader]).topk(10).indices.tolist())
        said = kept_overlaps(_group(), [reader], StoppingRule({"conv": 10}))[10]
        good += len(kept & truth) / 10 >= said - 0.1
    assert good >= 54  # 0.9 of 60: three standard deviations below 0.95 of a perfect bound


def test_a_group_without_a_planned_width_is_watched_at_three():
    assert StoppingRule().watched(_group()) == [6, 10, 14]
    assert StoppingRule({"conv": 9}).watched(_group()) == [9]


def test_one_channel_may_always_change():
    rule = StoppingRule({"conv": 4}, overlap=0.95)
    assert rule.is_stable(_group(), {4: 0.75})
    assert not rule.is_stable(_group(), {4: 0.5})
    for width in (3, 7, 19, 27):  # as a mean over channels rounds it
        assert StoppingRule({"conv": width}, overlap=1).is_stable(_group(30), {width: (width - 1) / width})
    atoms = tuple(tuple(range(4 * n, 4 * n + 4)) for n in range(5))
    assert StoppingRule({"conv": 16}).is_stable(_group(atoms=atoms), {16: 0.75})
    assert not StoppingRule({"conv": 40}).is_stable(_group(64), {40: 0.94})


def test_atoms_are_kept_whole():
    """Channels 0 and 10, 1 and 11, ... go together: noise within an atom's sum is what counts."""
    atoms = tuple((c, c + 10) for c in range(10))
    assert kept_overlaps(_group(atoms=atoms), [_reader(0, 16)], StoppingRule({"conv": 10})) == {10: 1.0}


def test_consumers_count_alike_and_only_where_they_cover():
    one, two = ReaderScores([0, 1, 2]), ReaderScores([1, 2])
    one.add(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))
    two.add(torch.tensor([[30.0, 10.0]], dtype=torch.float64))
    assert group_scores(_group(3), [one, two]).tolist() == pytest.approx([0.5, (1 + 1.5) / 2, (1.5 + 0.5) / 2])


class Counting(MapCriterion):
    """Scores by the mean of the map; counts the images it was asked about, by number of channels."""

    name = "counting"
    needs = frozenset({"maps"})
    grade = "baseline"

    def __init__(self):
        self.asked = {}

    def score_maps(self, maps_BCP, sides):
        channels = maps_BCP.shape[1]
        self.asked[channels] = self.asked.get(channels, 0) + len(maps_BCP)
        return maps_BCP.double().mean(-1)


def _noisy_net():
    torch.manual_seed(1)
    body = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 2, 1)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def _images(n):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def _score(net, images, rule, criterion=None, shards=None):
    groups = ChannelGraph(net, images[:1]).groups
    batches = images.split(8)
    if shards is None:
        return score_groups(net, groups, criterion or Counting(), batches, stopping=rule)
    return score_groups(net, groups, criterion or Counting(), shards.own(batches), stopping=rule, shards=shards)


def test_a_settled_group_stops_paying_while_others_go_on():
    criterion = Counting()
    rule = StoppingRule({"0": 4, "2": 6}, overlap=1.0, confidence=0.999, least=32, most=160)
    net = _noisy_net()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.copy_(torch.arange(1.0, 9.0))
        net[2].weight.normal_()
    found = _score(net, _images(160), rule, criterion)
    assert found.layers["0"].settled
    assert found.layers["0"].stability == 1.0
    assert found.layers["0"].images == criterion.asked[8] == 64  # seen stable after 32 and after 64


def test_nothing_is_settled_before_the_least_and_nothing_is_asked_after_the_most():
    criterion = Counting()
    rule = StoppingRule({"0": 4, "2": 6}, overlap=1.0, confidence=0.999, least=40, most=96)
    found = _score(_noisy_net(), _images(400), rule, criterion)
    assert all(40 <= layer.images <= 96 for layer in found.layers.values())
    assert max(criterion.asked.values()) <= 96


def test_without_a_rule_every_image_counts_and_nothing_is_judged():
    found = _score(_noisy_net(), _images(24), None)
    assert {(layer.images, layer.stability, layer.settled) for layer in found.layers.values()} == {(24, None, False)}


def test_fewer_images_than_the_least_are_all_used_and_still_judged():
    found = _score(_noisy_net(), _images(16), StoppingRule({"0": 4}))
    assert {layer.images for layer in found.layers.values()} == {16}
    assert all(layer.stability is not None for layer in found.layers.values())


class _Together(Shards):
    """Three processes played by one: what the others would send is worked out here, batch by batch."""

    def __new__(cls, net, batches):
        made = super().__new__(cls, 0, 3)
        made.net, made.others, made.turn = net, [batches[1::3], batches[2::3]], 0
        return made

    def gather(self, found):
        if isinstance(found, dict):
            return [found]  # the seconds at the end
        rounds = [found]
        for batches in self.others:
            rounds.append(self._share(batches[self.turn]) if self.turn < len(batches) else None)
        self.turn += 1
        return rounds

    def _share(self, batch):
        """What one batch gives, by hand: the means of what the second and third convolution read."""
        with torch.no_grad():
            first = self.net[:2](batch)
            second = self.net[2:4](first)
        means = {("0", "2"): first.flatten(2).double().mean(-1), ("2", "4"): second.flatten(2).double().mean(-1)}
        return Share(len(batch), {Reading("counting", *key): rows for key, rows in means.items()}, None)


def test_three_processes_find_what_one_finds_even_where_groups_settle_within_a_round():
    net, images = _noisy_net(), _images(200)
    rule = StoppingRule({"0": 4, "2": 6}, overlap=0.8, least=32, most=160)
    alone = _score(net, images, rule)
    shards = _Together(net, images.split(8))
    together = _score(net, images, rule, shards=shards)
    for layer, scores in alone.scores.items():
        assert torch.allclose(together.scores[layer], scores, rtol=1e-12, atol=0)
        assert together.layers[layer].images == alone.layers[layer].images
