"""Channel groups on networks small enough to know the answer."""

import pytest
import torch
from torch import nn

from chip_deploy.chip.groups import CannotCut, ChannelGraph


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 1)
        self.outer = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.inner(x).relu())
        return self.head(x.mean((2, 3)))


class Concatenation(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 6, 1)
        self.join = nn.Conv2d(10, 5, 1)

    def forward(self, x):
        return self.join(torch.cat([self.left(x), self.right(x)], 1))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 12, 1)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=3)
        self.leave = nn.Conv2d(24, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.leave(self.grouped(self.enter(x).relu()).relu()).mean((2, 3)))


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        features = self.body(x).relu()
        return {"features": features, "scores": self.head(features.mean((2, 3)))}


class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.body(x)
        x = x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head(x).mean((2, 3))


def _groups(net, size=8):
    return {group.layer: group for group in ChannelGraph(net, torch.randn(1, 3, size, size)).groups}


def test_layers_of_a_residual_addition_share_a_group():
    groups = _groups(Residual())
    assert set(groups) == {"stem", "inner", "head"}
    assert set(groups["stem"].coupled) == {"norm", "outer"}
    assert {member.layer for member in groups["stem"].consumers} == {"inner", "head"}


def test_the_layer_behind_the_output_is_protected_without_being_told():
    groups = _groups(Residual())
    assert groups["head"].protected == "its channels reach the network's output"
    assert groups["stem"].protected is None


def test_an_output_that_is_also_read_inside_is_protected():
    assert _groups(TwoOutputs())["body"].protected == "its channels reach the network's output"


def test_concatenated_groups_read_their_own_columns():
    groups = _groups(Concatenation())
    (left,) = groups["left"].consumers
    (right,) = groups["right"].consumers
    assert sorted(left.positions) == [0, 1, 2, 3]
    assert sorted(right.positions) == [4, 5, 6, 7, 8, 9]
    assert sorted(right.roots) == [0, 1, 2, 3, 4, 5]


def test_channels_at_the_same_position_of_a_grouped_convolution_are_one_atom():
    groups = _groups(Grouped())
    assert set(groups["enter"].atoms) == {(0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11)}
    assert set(groups["grouped"].atoms) == {(p, p + 8, p + 16) for p in range(8)}


def test_a_flatten_gives_a_channel_several_columns():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 7), nn.ReLU(), nn.Linear(7, 2))
    (reader,) = _groups(net, size=4)["0"].consumers
    assert len(reader.positions) == 64
    assert sorted(p for p, root in zip(reader.positions, reader.roots, strict=True) if root == 1) == list(range(16, 32))


def test_a_channel_shuffle_is_refused_or_left_to_the_proof():
    try:
        groups = _groups(Shuffle())
    except CannotCut as err:
        assert "cannot" in str(err)  # noqa: PT017 (either outcome is right; a wrong cut is what must not happen)
    else:
        assert "body" in groups


def test_tracing_leaves_the_weights_alone():
    net = Residual()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    ChannelGraph(net, torch.randn(1, 3, 8, 8))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_an_input_of_the_wrong_shape_is_one_sentence():
    with pytest.raises(CannotCut, match="tracing the network"):
        ChannelGraph(Residual(), torch.randn(1, 4, 8, 8))


class Interruption(BaseException):
    """What a signal raises, wherever the program is."""


class Interrupted(Residual):
    """Its first forward pass is interrupted, as by Ctrl-C."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        if self.passes == 1:
            raise Interruption
        return super().forward(x)


def test_an_interruption_while_a_network_is_traced_is_not_dropped():
    """torch-pruning 1.6 runs the network inside a bare `except:` unless it is told how to run it."""
    with pytest.raises(Interruption):
        ChannelGraph(Interrupted(), torch.randn(1, 3, 8, 8))
