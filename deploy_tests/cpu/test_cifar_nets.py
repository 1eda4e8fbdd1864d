"""Our own networks: what others publish of their cost, and which of their channels go together."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from chip_deploy.chip.allocate import Budget, Rules, allocate, kept_channels
from chip_deploy.chip.cost import CostModel, paper_flops
from chip_deploy.chip.groups import ChannelGraph, ChannelGroup
from chip_deploy.chip.plan import make_plan
from chip_deploy.chip.surgery import apply_plan, prove
from chip_deploy.pipeline.cifar_nets import (
    CIFAR_NETS,
    CifarAlexNet,
    CifarDenseNet,
    CifarPreResNet,
    CifarResNet,
    CifarVgg,
    MobileNetV1,
)
from chip_deploy.pipeline.models import build_model

SMALL = torch.zeros(1, 3, 32, 32)


def macs(net: nn.Module, example: Tensor) -> int:
    """Of convolutions and linears."""
    return CostModel(net, example).dense.macs


def macs_and_biases(net: nn.Module, example: Tensor) -> int:
    """One more for every value that a convolution's bias is added to; on these nets each has a batch norm behind it."""
    norms = sum(values for values in _norm_values(net, example).values())
    return macs(net, example) + norms


def macs_norms_and_activations(net: nn.Module, example: Tensor) -> int:
    """Two for every value of a batch norm, one for the ReLU behind it, one for every pixel of the last pool's input."""
    values = _norm_values(net, example)
    last = list(values.values())[-1]
    return macs(net, example) + 3 * sum(values.values()) + last


def _norm_values(net: nn.Module, example: Tensor) -> dict[str, int]:
    """How many values each batch norm over maps sees in one image, in the order of the forward pass."""
    found: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: found.update({name: inputs[0].numel()}))
        for name, module in net.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        net.eval()(example)
    for hook in hooks:
        hook.remove()
    return found


def _params(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
        ("resnet164", 1_703_258),  # osmr/imgclsmob, PreResNet-164(BN)
        ("mobilenet_v1_cifar", 3_217_226),  # tables of kuangliu/pytorch-cifar's MobileNet
        ("mobilenet_v1", 4_231_976),  # TensorFlow's mobilenet_v1_1.0_224
    ],
)
def test_networks_have_the_parameters_that_their_reference_code_counts(name: str, params: int) -> None:
    assert _params(build_model(name, num_classes=None, seed=0, size=32).module) == params


@pytest.mark.parametrize(
    ("name", "classes", "params_m", "count", "macs_m"),
    [
        ("resnet20", 10, "0.27", None, ""),  # He et al., table 6, and so the next three
        ("resnet32", 10, "0.46", None, ""),
        ("resnet44", 10, "0.66", None, ""),
        ("resnet56", 10, "0.85", macs, "125.49"),  # the dense figures of CHIP and HRank
        ("resnet110", 10, "1.73", macs, "252.89"),  # CHIP
        ("resnet164", 10, "1.7", None, ""),  # Huang et al., table 2
        ("resnet164", 100, "1.73", paper_flops, "253.97"),  # the baselines that CPMC's rows are printed with
        ("vgg16_bn_cifar", 10, "14.99", None, ""),  # CHIP
        ("densenet40", 10, "1.06", macs_norms_and_activations, "290.13"),  # the baselines of CPMC's rows
        ("densenet40", 100, "1.10", paper_flops, "287.75"),  # network slimming's table; CPMC's rows
        ("mobilenet_v1_cifar", 10, "3.22", paper_flops, "47.18"),  # published tables of kuangliu's MobileNet
        ("mobilenet_v1", 1000, "4.2", macs, "569"),  # Howard et al., table 8
        ("alexnet_cifar", 10, "2.47", None, ""),  # bearpaw/pytorch-classification
    ],
)
def test_networks_cost_what_is_published_to_its_last_digit(
    name: str, classes: int, params_m: str, count: Callable[[nn.Module, Tensor], int] | None, macs_m: str
) -> None:
    built = build_model(name, num_classes=classes, seed=0)
    assert _rounded(_params(built.module), like=params_m) == params_m
    if count is not None:
        example = torch.zeros(1, 3, built.input_size, built.input_size)
        assert _rounded(count(built.module, example), like=macs_m) == macs_m


def _rounded(count: int, *, like: str) -> str:
    """In millions, to as many decimals as the published figure."""
    return f"{count / 1e6:.{len(like.partition('.')[2])}f}"


def test_the_cifar_vgg_costs_what_is_published_but_for_the_last_bias() -> None:
    """313.73M is printed; multiply-accumulates and the biases of all convolutions come to 313.74M."""
    net = CifarVgg(num_classes=10)
    assert macs_and_biases(net, SMALL) == pytest.approx(313.73e6, abs=0.015e6)


def test_densenet40_with_a_stem_of_16_is_the_one_in_its_authors_tables() -> None:
    net = CifarDenseNet(40, num_classes=10, stem=16)
    assert _params(net) == 1_019_722
    assert _params(CifarDenseNet(40, num_classes=100, stem=16)) == 1_060_132


def test_the_masks_of_network_slimming_make_up_for_the_parameters_that_its_tables_have_more() -> None:
    """1.71M and 1.07M are printed: one entry for each channel of a batch norm that reads a sum or a concatenation."""
    for name, printed in (("resnet164", "1.71"), ("densenet40", "1.07")):
        net = build_model(name, num_classes=10, seed=0).module
        entries = sum(
            module.num_features
            for path, module in net.named_modules()
            if isinstance(module, nn.BatchNorm2d) and path.rpartition(".")[2] in ("bn1", "bn")
        )
        assert _rounded(_params(net) + entries, like=printed) == printed


@pytest.mark.parametrize("name", ["alexnet", "resnet50"])
def test_torchvisions_own_counts_of_its_networks_come_out(name: str) -> None:
    meta = next(iter(get_model_weights(name))).meta
    built = build_model(name, num_classes=None, seed=0)
    assert _params(built.module) == meta["num_params"]
    assert macs(built.module, torch.zeros(1, 3, 224, 224)) / 1e9 == pytest.approx(meta["_ops"], abs=0.0006)


def test_the_cifar_vgg_has_the_layers_that_the_papers_cut() -> None:
    net = CifarVgg(num_classes=10)
    hooked = [2, 6, 9, 13, 16, 19, 23, 26, 29, 33, 36, 39]  # CHIP's own indices of ReLUs and pools
    kinds = [type(net.features[index]).__name__ for index in hooked]

    assert [index for index, kind in zip(hooked, kinds, strict=True) if kind == "MaxPool2d"] == [6, 13, 23, 33]
    assert {kind for kind in kinds if kind != "MaxPool2d"} == {"ReLU"}
    assert sum(isinstance(layer, nn.Conv2d) for layer in net.features) == 13
    assert [type(layer).__name__ for layer in net.classifier] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]


def test_every_cifar_stage_begins_with_a_channel_map_and_only_begins() -> None:
    net = CifarResNet(32, num_classes=10)
    for stage in (net.layer1, net.layer2, net.layer3):
        assert [type(block.shortcut).__name__ for block in stage.children()] == ["ChannelMap"] + ["Identity"] * 4


def test_a_pre_activation_block_adds_its_branch_to_the_sum_that_came_in() -> None:
    net = CifarPreResNet(20, num_classes=10).eval()
    block = net.layer1[1]
    sum_BCHW = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        block.conv3.weight.zero_()
        assert torch.equal(block(sum_BCHW), sum_BCHW), "a sum with negative values goes through as it is"


def test_a_dense_block_hands_on_all_that_it_was_given_and_made() -> None:
    net = CifarDenseNet(10, num_classes=10).eval()
    read: list[Tensor] = []
    net.transition1.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    made: list[Tensor] = []
    for layer in (net.conv1, *net.block1):
        layer.register_forward_hook(lambda _, inputs, output: made.append(output))
    with torch.no_grad():
        net(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(read[0], torch.cat(made, 1))


@pytest.mark.parametrize("name", [name for name in CIFAR_NETS if name not in ("resnet110", "resnet164")])
def test_cifar_nets_take_larger_images_too(name: str) -> None:
    assert build_model(name, num_classes=10, seed=0, size=64).num_classes == 10


# -- which channels go together ----------------------------------------------------------------------------------------


def _groups(net: nn.Module) -> dict[str, ChannelGroup]:
    return {group.layer: group for group in ChannelGraph(net, SMALL).groups}


def test_the_stages_of_a_pre_activation_net_are_read_through_each_blocks_own_norm() -> None:
    groups = _groups(CifarPreResNet(20, num_classes=10))
    wide = {layer: group for layer, group in groups.items() if len(group.coupled) > 1 or layer == "conv1"}
    found = {layer: ({*group.coupled}, {member.layer for member in group.consumers}) for layer, group in wide.items()}
    assert found == {
        "conv1": ({"layer1.0.bn1"}, {"layer1.0.conv1", "layer1.0.shortcut"}),
        "layer1.0.conv3": (
            {"layer1.0.shortcut", "layer1.1.conv3", "layer1.1.bn1", "layer2.0.bn1"},
            {"layer1.1.conv1", "layer2.0.conv1", "layer2.0.shortcut"},
        ),
        "layer2.0.conv3": (
            {"layer2.0.shortcut", "layer2.1.conv3", "layer2.1.bn1", "layer3.0.bn1"},
            {"layer2.1.conv1", "layer3.0.conv1", "layer3.0.shortcut"},
        ),
        "layer3.0.conv3": (
            {"layer3.0.shortcut", "layer3.1.conv3", "layer3.1.bn1", "bn"},
            {"layer3.1.conv1", "linear"},
        ),
    }


def test_every_layer_of_a_densenet_reads_the_channels_of_all_before_it_in_their_order() -> None:
    net = CifarDenseNet(13, num_classes=10)
    groups = _groups(net)
    reads: dict[str, dict[int, tuple[str, int]]] = {}
    for group in groups.values():
        for member in group.members:
            if member.layer != group.layer:
                there = reads.setdefault(member.layer, {})
                there |= {p: (group.layer, root) for p, root in zip(member.positions, member.roots, strict=True)}

    state, expected = ["conv1"], {}
    for block, after in (("block1", "transition1"), ("block2", "transition2"), ("block3", None)):
        for layer in range(3):
            expected |= {f"{block}.{layer}.{part}": list(state) for part in ("bn1", "conv1")}
            state.append(f"{block}.{layer}.conv1")
        last = (f"{after}.bn1", f"{after}.conv1") if after else ("bn", "linear")
        expected |= {name: list(state) for name in last}
        state = [f"{after}.conv1"]

    assert {name: _in_order(found) for name, found in reads.items()} == {
        name: [(source, channel) for source in sources for channel in range(groups[source].width)]
        for name, sources in expected.items()
    }


def _in_order(by_position: dict[int, tuple[str, int]]) -> list[tuple[str, int]]:
    assert sorted(by_position) == [*range(len(by_position))]
    return [by_position[position] for position in range(len(by_position))]


def test_a_depthwise_convolution_goes_with_what_it_filters() -> None:
    groups = _groups(MobileNetV1(num_classes=10, stem_stride=1))
    assert [*groups] == ["conv1", *(f"blocks.{n}.pointwise" for n in range(13)), "linear"]
    assert {*groups["conv1"].coupled} == {"bn1", "blocks.0.depthwise", "blocks.0.bn1"}
    assert {*groups["blocks.4.pointwise"].coupled} == {"blocks.4.bn2", "blocks.5.depthwise", "blocks.5.bn1"}
    assert [member.layer for member in groups["blocks.4.pointwise"].consumers] == ["blocks.5.pointwise"]
    assert all(len(atom) == 1 for group in groups.values() for atom in group.atoms)


@pytest.mark.parametrize(
    "net",
    [
        CifarPreResNet(20, num_classes=10),
        CifarDenseNet(13, num_classes=10),
        MobileNetV1(num_classes=10, stem_stride=1),
        CifarAlexNet(num_classes=10),
    ],
    ids=lambda net: type(net).__name__,
)
def test_half_the_macs_are_cut_exactly_on(net: nn.Module) -> None:
    groups, cost = ChannelGraph(net, SMALL).groups, CostModel(net, SMALL)
    widths = allocate(groups, cost, Budget("macs", 0.5), Rules(1, 1), way="uniform")
    generator = torch.Generator().manual_seed(0)
    plan = make_plan(
        net,
        groups,
        {
            group.layer: kept_channels(
                group, widths[group.layer], torch.rand(group.width, generator=generator).tolist()
            )
            for group in groups
            if group.layer in widths
        },
        cost=cost,
        name="net",
        num_classes=10,
        input_shape=SMALL.shape[1:],
        criterion="chip",
        round_to=1,
        min_width=1,
    )
    assert plan.macs_after <= 0.5 * plan.macs_before
    assert [group.layer for group in groups if group.protected] == [groups[-1].layer], "the output layer alone"
    apply_plan(net, plan, SMALL)
    assert prove(net, plan, SMALL) < 1e-12
