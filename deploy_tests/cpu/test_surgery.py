"""The cut and its proof: right cuts pass to rounding, wrong ones are caught."""

import copy
import random

import pytest
import torch
import torchvision
from torch import nn

from chip_deploy.chip import surgery
from chip_deploy.chip.allocate import Budget, Rules, allocate, kept_channels, listed_widths
from chip_deploy.chip.cost import CostModel
from chip_deploy.chip.groups import ChannelGraph
from chip_deploy.chip.plan import PrunePlan, make_plan
from chip_deploy.chip.shortcut import ChannelMap
from chip_deploy.chip.surgery import SurgeryRefused, apply_plan, prove
from chip_deploy.pipeline.models import build_model


def _plan(net, example, kept):
    graph = ChannelGraph(net, example)
    return make_plan(
        net,
        graph.groups,
        {group.layer: kept.get(group.layer, group.channels) for group in graph.groups if not group.protected},
        cost=CostModel(net, example),
        name="net",
        num_classes=2,
        input_shape=example.shape[1:],
        criterion="chip",
        round_to=1,
        min_width=1,
    )


def _half(net, example, *, seed=0):
    graph, cost = ChannelGraph(net, example), CostModel(net, example)
    widths = allocate(graph.groups, cost, Budget("macs", 0.5), Rules(8, 8), way="uniform")
    generator = torch.Generator().manual_seed(seed)
    return _plan(
        net,
        example,
        {
            group.layer: kept_channels(
                group, widths[group.layer], torch.rand(group.width, generator=generator).tolist()
            )
            for group in graph.groups
            if group.layer in widths
        },
    )


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 12, 1)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3, bias=True)
        self.leave = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return self.leave(self.grouped(self.enter(x).relu()).relu()).mean((2, 3))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.leave = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.leave(self.norm(self.enter(x)).relu()).mean((2, 3))


class FixedWidth(nn.Module):
    """Keeps a width outside its layers, where torch-pruning does not see it."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 1)
        self.leave = nn.Conv2d(16, 4, 1)
        self.register_buffer("gain", torch.rand(1, 16, 1, 1))

    def forward(self, x):
        return self.leave(self.enter(x) * self.gain).mean((2, 3))


class ReadsAll(nn.Module):
    """A mean over channels is a consumer without columns: silencing cannot reproduce the cut."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 1)
        self.leave = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.enter(x)
        return self.leave(x - x.mean(1, keepdim=True)).mean((2, 3))


EXAMPLE = torch.zeros(1, 3, 8, 8)


def test_a_grouped_convolution_keeps_the_same_positions_in_every_group():
    torch.manual_seed(0)
    net = Grouped()
    plan = _plan(net, EXAMPLE, {"enter": [1, 2, 5, 6, 9, 10], "grouped": [0, 3, 4, 7, 8, 11]})
    assert prove(net, plan, EXAMPLE) < 1e-12
    pruned = apply_plan(net, plan, EXAMPLE)
    assert torch.equal(pruned.grouped.weight[0], net.grouped.weight[0, 1:3])
    assert torch.equal(pruned.grouped.weight[5], net.grouped.weight[11, 1:3])


def test_different_positions_in_the_groups_are_caught_by_the_proof():
    torch.manual_seed(0)
    net = Grouped()
    plan = _plan(net, EXAMPLE, {"enter": [0, 1, 5, 6, 10, 11]})
    apply_plan(net, plan, EXAMPLE)  # shapes are right, so nothing else notices
    with pytest.raises(SurgeryRefused, match="differs from the dense one"):
        prove(net, plan, EXAMPLE)


def test_group_norm_is_proved_on_the_kept_channels():
    torch.manual_seed(0)
    plan = _plan(Normed(), EXAMPLE, {"enter": [0, 1, 2, 5, 6, 7, 9, 10, 11, 12, 14, 15]})
    torch.manual_seed(0)
    assert prove(Normed(), plan, EXAMPLE) < 1e-12


def test_a_width_kept_outside_the_layers_is_refused():
    net = FixedWidth()
    with pytest.raises(SurgeryRefused, match="does not run"):
        apply_plan(net, _plan(net, EXAMPLE, {"enter": range(8)}), EXAMPLE)


def test_a_consumer_that_the_graph_does_not_see_is_refused():
    net = ReadsAll()
    with pytest.raises(SurgeryRefused, match="differs from the dense one"):
        prove(net, _plan(net, EXAMPLE, {"enter": range(8)}), EXAMPLE)


class DeadBranch(nn.Module):
    """A flatten that torch-pruning reads wrongly, behind an activation that never opens, beside a living branch."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 1)
        self.wrong = nn.Linear(32, 16)
        self.late = nn.Linear(16, 4)
        self.other = nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        squares = nn.functional.adaptive_avg_pool2d(self.body(x), 2).permute(0, 2, 3, 1).flatten(1)
        return self.late((self.wrong(squares) - 1e3).relu()) + self.head(self.other(x).relu().mean((2, 3)))


def test_a_branch_that_never_reaches_the_output_cannot_be_proved():
    torch.manual_seed(0)
    net = DeadBranch()
    plan = _plan(net, EXAMPLE, {"body": range(4), "other": range(4)})
    with pytest.raises(SurgeryRefused, match=r"'(wrong|late)' reads never reaches the output"):
        prove(net, plan, EXAMPLE)


def test_weights_that_ignore_their_input_do_not_spoil_the_proof():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        net[1].weight.zero_()
    assert prove(net, _plan(net, EXAMPLE, {"0": range(4)}), EXAMPLE) < 1e-12


@pytest.mark.parametrize("slopes", [1, 16])
def test_one_slope_for_all_channels_or_one_for_each_is_cut_rightly(slopes):
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.PReLU(slopes), nn.Conv2d(16, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    plan = _plan(net, EXAMPLE, {"0": range(6)})
    assert prove(net, plan, EXAMPLE) < 1e-12
    assert apply_plan(net, plan, EXAMPLE)[1].num_parameters == min(slopes, 6)


class Partial(nn.Module):
    """The middle layer's channels belong half to one group and half to another."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 8, 1)
        self.whole = nn.Conv2d(3, 16, 1)
        self.right = nn.Conv2d(3, 8, 1)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.out(self.whole(x) + torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3))


def test_a_group_that_is_a_part_of_its_root_is_left_alone():
    net = Partial()
    groups = {group.layer: group for group in ChannelGraph(net, EXAMPLE).groups}
    assert groups["whole"].protected == "only a part of 'whole' belongs to it, the rest to another group"
    assert prove(net, _plan(net, EXAMPLE, {"left": range(4)}), EXAMPLE) < 1e-12
    with pytest.raises(ValueError, match="belong to several groups: name 'left', 'whole'"):
        listed_widths(list(groups.values()), {"whole": 0.5}, Rules(1, 1))


def test_the_dense_model_stays_as_it_is():
    net = build_model("resnet20", num_classes=10, seed=0).module
    example = torch.zeros(1, 3, 32, 32)
    before = copy.deepcopy(net.state_dict())
    apply_plan(net, _half(net, example), example)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_plan_for_another_model_is_refused():
    example = torch.zeros(1, 3, 32, 32)
    plan = _half(build_model("resnet20", num_classes=10, seed=0).module, example)
    with pytest.raises(ValueError, match="other layers or shapes"):
        apply_plan(build_model("resnet32", num_classes=10, seed=0).module, plan, example)
    with pytest.raises(ValueError, match="other weights"):
        apply_plan(build_model("resnet20", num_classes=10, seed=1).module, plan, example)


def test_a_plan_read_back_from_json_gives_the_same_network_bit_for_bit():
    net = build_model("resnet20", num_classes=10, seed=0).module
    example = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plan = _half(net, example)
    again = PrunePlan.model_validate_json(plan.model_dump_json(by_alias=True))
    with torch.no_grad():
        assert torch.equal(apply_plan(net, plan, example)(example), apply_plan(net, again, example)(example))


def test_a_surgery_that_misses_a_layer_is_caught(monkeypatch):
    net = build_model("resnet20", num_classes=10, seed=0).module
    example = torch.zeros(1, 3, 32, 32)
    plan = _half(net, example)
    wrong = plan.model_copy(update={"macs_after": plan.macs_after + 1})
    with pytest.raises(SurgeryRefused, match="MACs"):
        apply_plan(net, wrong, example)
    reorder = surgery._reorder

    def forgets_shortcuts(thing, side, order):
        if not isinstance(thing, ChannelMap):
            reorder(thing, side, order)

    monkeypatch.setattr(surgery, "_reorder", forgets_shortcuts)
    assert any(cut.kept != sorted(cut.kept) for cut in plan.groups)
    with pytest.raises(SurgeryRefused, match="differs from the dense one"):
        prove(net, plan, example)


@pytest.mark.parametrize("seed", range(12))
def test_option_a_shortcuts_stay_aligned_and_become_slice_and_pad(seed):
    net = build_model("resnet20", num_classes=10, seed=0).module
    example = torch.zeros(1, 3, 32, 32)
    rng = random.Random(seed)
    kept = {
        group.layer: sorted(rng.sample(group.channels, rng.randint(group.width // 2 + 1, group.width)))
        for group in ChannelGraph(net, example).groups
        if not group.protected and (group.layer != "conv1" or seed % 2)
    }
    plan = _plan(net, example, kept)
    assert prove(net, plan, example) < 1e-12
    if not seed % 2:  # the stem stays whole, as in every published row
        shortcuts = [m for m in apply_plan(net, plan, example).modules() if isinstance(m, ChannelMap)]
        assert len(shortcuts) == 3
        assert all(shortcut._run is not None for shortcut in shortcuts)


def test_stem_and_stages_of_a_cifar_resnet_are_four_groups():
    net = build_model("resnet56", num_classes=10, seed=0).module
    wide = [g for g in ChannelGraph(net, torch.zeros(1, 3, 32, 32)).groups if len(g.consumers) > 1 and not g.protected]
    assert [(group.layer, group.width) for group in wide] == [
        ("conv1", 16),
        ("layer1.0.conv2", 16),
        ("layer2.0.conv2", 32),
        ("layer3.0.conv2", 64),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "densenet121", "efficientnet_b0", "regnet_y_400mf",
        "resnext50_32x4d", "googlenet", "squeezenet1_1", "convnext_tiny",
    ],
)  # fmt: skip
def test_the_cut_is_exact_on(name):
    net = build_model(name, num_classes=10, seed=0, size=64).module
    example = torch.zeros(1, 3, 64, 64)
    plan = _half(net, example)
    assert plan.macs_after <= 0.5 * plan.macs_before
    apply_plan(net, plan, example)
    assert prove(net, plan, example) < 1e-12


def test_torchvision_and_the_model_table_build_the_same_resnet50():
    ours = build_model("resnet50", num_classes=1000, seed=0).module
    theirs = torchvision.models.resnet50(weights=None)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
