"""Recovery by the interaction difference: what it minimises, what it leaves alone, and that it helps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from chip_deploy.chip.cost import CostModel
from chip_deploy.chip.groups import ChannelGraph
from chip_deploy.chip.plan import make_plan
from chip_deploy.chip.surgery import apply_plan
from chip_deploy.pipeline.recover import RecoverSettings, recover
from chip_deploy.pipeline.tune import TrainingDiverged


def _plan(net, example, kept):
    groups = ChannelGraph(net, example).groups
    return make_plan(
        net,
        groups,
        {group.layer: kept.get(group.layer, group.channels) for group in groups if not group.protected},
        cost=CostModel(net, example),
        name="net",
        num_classes=3,
        input_shape=example.shape[1:],
        criterion="random",
        round_to=1,
        min_width=1,
    )


# -- a small network in float64 ----------------------------------------------------------------------------------------

KEPT = [1, 2, 4]


def _net(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).double().eval()  # fmt: skip
    net[1].running_mean.uniform_(-0.5, 0.5)
    return net


def _images(n=10):
    return torch.randn(n, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _labels(n=10):
    return torch.arange(n) % 3


def _recover(net, pruned, plan, *, data=None, **settings):
    images, labels = data or (_images(), _labels())
    asked = RecoverSettings(**{"steps": 2, "players": 3, **settings})
    return recover(pruned, net, plan, images, labels, settings=asked)


def _cut(net, kept=KEPT):
    plan = _plan(net, _images(1), {"0": kept})
    return apply_plan(net, plan, _images(1)), plan


def _interactions(net, players, images, labels):
    """v(N) - v(N without i) - v(i alone) + v(none), with the maps behind the first activation set to zero by hand."""
    width = net[0].out_channels

    def value(alive):
        with torch.no_grad():
            maps = net[:3](images) * torch.tensor([c in alive for c in range(width)]).view(1, -1, 1, 1)
            p = net[3:](maps).softmax(1)[torch.arange(len(images)), labels]
        return (p / (1 - p)).log()

    everyone = set(range(width))
    return torch.stack([value(everyone) - value(everyone - {i}) - value({i}) + value(set()) for i in players])


def test_the_difference_that_is_minimised_is_that_of_the_kept_channels_worked_out_by_hand():
    net = _net()
    pruned, plan = _cut(net)
    images, labels = _images(), _labels()
    theirs = _interactions(net, KEPT, images, labels)
    ours = _interactions(pruned, range(3), images, labels)
    with torch.no_grad():
        error = float(F.cross_entropy(pruned(images), labels))
    record = _recover(net, pruned, plan, ce_weight=0.5)
    expected = float((ours - theirs).square().mean() / theirs.square().mean())
    assert record.gap_before == pytest.approx(expected, rel=1e-9)
    assert record.interaction[0] == pytest.approx(expected, rel=1e-9)  # the first step looks at all three
    assert record.cross_entropy[0] == pytest.approx(error, rel=1e-9)
    assert record.loss[0] == pytest.approx(expected + 0.5 * error, rel=1e-9)
    after = _interactions(pruned, range(3), images, labels)
    assert record.gap_after == pytest.approx(float((after - theirs).square().mean() / theirs.square().mean()), rel=1e-9)
    assert record.gap_after != record.gap_before


def test_how_many_images_pass_at_once_changes_rounding_only():
    net = _net()
    found = []
    for batch in (1, 13, 1000):
        pruned, plan = _cut(net)
        found.append((_recover(net, pruned, plan, batch=batch), pruned.state_dict()))
    for record, weights in found[1:]:
        assert record.loss == pytest.approx(found[0][0].loss, rel=1e-9)
        assert all(torch.allclose(weights[name], found[0][1][name], atol=1e-7) for name in weights)


def test_only_weights_of_the_pruned_network_change_and_batch_norm_statistics_do_not():
    net = _net()
    pruned, plan = _cut(net)
    dense_before, before = copy.deepcopy(net.state_dict()), copy.deepcopy(pruned.state_dict())
    pruned.train()
    _recover(net, pruned, plan)
    changed = {name for name, tensor in pruned.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in pruned.named_parameters()}
    assert all(torch.equal(tensor, dense_before[name]) for name, tensor in net.state_dict().items())
    assert not any(module.training for module in [*net.modules(), *pruned.modules()])
    assert not any(module._forward_pre_hooks for module in pruned.modules())
    assert all(parameter.grad is None for parameter in [*net.parameters(), *pruned.parameters()])


def test_where_nothing_was_cut_nothing_changes():
    net = _net()
    pruned, plan = _cut(net, kept=range(5))
    record = _recover(net, pruned, plan)
    assert (record.steps, record.gap_before, record.gap_after, record.loss) == (0, 0, 0, [])
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in pruned.state_dict().items())


def test_one_seed_gives_one_result_and_another_draws_other_images():
    net = _net()
    found = []
    for seed in (0, 0, 1):
        pruned, plan = _cut(net)
        record = _recover(net, pruned, plan, data=(_images(20), _labels(20)), images=12, seed=seed)
        found.append((record, pruned.state_dict()))
    (first, weights), (again, same), (other, _) = found
    assert first.images == 12
    assert first.loss == again.loss
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert first.gap_before != other.gap_before


def test_a_group_of_which_one_channel_is_left_has_only_the_labels_to_learn_from():
    net = _net()
    pruned, plan = _cut(net, kept=[3])
    record = _recover(net, pruned, plan, steps=20, lr=0.02)
    assert record.gap_before == record.gap_after == 0
    assert record.interaction == [0.0] * 20
    assert record.cross_entropy[-1] < record.cross_entropy[0]


def test_networks_that_the_plan_does_not_fit_are_refused():
    net = _net()
    pruned, plan = _cut(net)
    with pytest.raises(ValueError, match="group '0' goes from 5 to 3 channels"):
        _recover(net, copy.deepcopy(net), plan)
    with pytest.raises(ValueError, match="other weights"):
        _recover(_net(seed=1), pruned, plan)


def test_images_and_labels_that_do_not_go_together_are_refused():
    net = _net()
    pruned, plan = _cut(net)
    with pytest.raises(ValueError, match="10 images came with labels of shape"):
        _recover(net, pruned, plan, data=(_images(), _labels(9)))
    with pytest.raises(ValueError, match="at least one image"):
        _recover(net, pruned, plan, data=(_images(0), _labels(0)))
    with pytest.raises(ValueError, match=r"class 7 .* only 3 outputs"):
        _recover(net, pruned, plan, data=(_images(), _labels() + 5))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "steps is 0; 1 or more"),
        ({"players": 0}, "players is 0; 1 or more"),
        ({"images": 0}, "images is 0; 1 or more"),
        ({"batch": 0}, "batch is 0; 1 or more"),
        ({"lr": 0.0}, "lr is 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"ce_weight": -1.0}, "ce_weight -1"),
    ],
)
def test_a_setting_without_sense_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        RecoverSettings(**settings)


def test_a_loss_that_is_no_number_names_the_step_and_the_learning_rate():
    net = _net()
    pruned, plan = _cut(net)
    with pytest.raises(TrainingDiverged, match=r"step 2 of 3: .* \(lr = 1e\+200\). Try a smaller tune.recover_lr"):
        _recover(net, pruned, plan, steps=3, lr=1e200)


def test_progress_ends_at_one():
    net, told = _net(), []
    pruned, plan = _cut(net)
    settings = RecoverSettings(steps=3, players=1)
    recover(pruned, net, plan, _images(), _labels(), settings=settings, progress=lambda part, _: told.append(part))
    assert told == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]


# -- a trained network -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """Handwritten digits, shuffled: images (N, 1, 8, 8) and labels, to learn from and to judge by."""
    loaded = load_digits()
    order = torch.randperm(len(loaded.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(loaded.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(loaded.target)[order]
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


@pytest.fixture(scope="module")
def trained(digits):
    """A network that knows them."""
    (images, labels), _ = digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 24, 3, padding=1, stride=2), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(6):
            for chosen in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
                optimizer.step()
    return net.eval()


def _quarter_gone(net, example):
    """Every group without a random quarter of its channels."""
    generator = torch.Generator().manual_seed(0)
    kept = {
        group.layer: sorted(torch.randperm(group.width, generator=generator)[: group.width * 3 // 4].tolist())
        for group in ChannelGraph(net, example).groups
        if not group.protected
    }
    plan = _plan(net, example, kept)
    return apply_plan(net, plan, example), plan


def _accuracy(net, images, labels):
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).double().mean())


def test_right_after_a_cut_recovery_brings_back_more_than_half_of_the_accuracy_that_was_lost(digits, trained):
    (images, labels), test = digits
    pruned, plan = _quarter_gone(trained, images[:1])
    lost = _accuracy(trained, *test) - _accuracy(pruned, *test)
    assert lost > 0.2
    settings = RecoverSettings(steps=24, lr=3e-3)
    record = recover(pruned, trained, plan, images[:96], labels[:96], settings=settings)
    assert _accuracy(trained, *test) - _accuracy(pruned, *test) < lost / 2
    assert sum(record.loss[-4:]) < 2 / 3 * sum(record.loss[:4])
    assert record.gap_after < 0.8 * record.gap_before


def test_without_labels_in_the_loss_channels_act_together_more_like_before(digits, trained):
    (images, labels), _ = digits
    pruned, plan = _quarter_gone(trained, images[:1])
    settings = RecoverSettings(steps=24, ce_weight=0)
    record = recover(pruned, trained, plan, images[:96], labels[:96], settings=settings)
    assert record.loss == record.interaction
    assert record.gap_after < 0.75 * record.gap_before
