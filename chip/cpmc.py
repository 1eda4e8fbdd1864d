"""The criterion `cpmc`: what a channel's weights are worth, here and in the layers that read it, and what it costs."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .criterion import Grade, GroupWeights, Need, WeightCriterion


class MultiCriteria(WeightCriterion):
    """alpha times the value of a channel, plus beta and gamma times how little of MACs and parameters goes with it.

    The value is the sum of the absolute weights that vanish with the channel: its filter in every producer and its
    slice in every consumer, so a residual group counts all its members and a dense block all its later readers. It is
    divided by the largest of the group, the MACs and the parameters that go with one channel by the largest of all
    groups that are scored together; both enter as 1 - share, so that of two channels of equal value the dearer one
    goes first. One ranking serves all groups.

    Grade: after the abstract. Source (after): Yan et al., CPMC, arXiv 2011.03240: value, cost and parameter quantity
    of the filter and of the next layer's slice, global normalisation, one global ranking. The signs and the sum of
    three terms follow COP (Wang et al., IJCAI 2019, code read); absolute weights, normalisers and weights of 1 are our
    choices.
    """

    name: ClassVar[str] = "cpmc"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights", "consumer weights", "cost"})
    grade: ClassVar[Grade] = "after the abstract"
    comparable: ClassVar[bool] = True

    def __init__(self, *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 1.0) -> None:
        """Raises: ValueError when one of them is no number from 0 up."""
        for name, weight in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"cpmc: {name} is {weight:g}; expected a number from 0 up. The default is 1.")
        self.alpha, self.beta, self.gamma = alpha, beta, gamma

    def score_weights(self, groups: Mapping[str, GroupWeights]) -> dict[str, Tensor]:
        """Between 0 and alpha + beta + gamma, for every group. Shapes: group -> (C,) float64."""
        macs = max((group.macs for group in groups.values()), default=0.0) or 1.0
        params = max((group.params for group in groups.values()), default=0.0) or 1.0
        return {
            layer: self.alpha * _value(group)
            + self.beta * (1 - group.macs / macs)
            + self.gamma * (1 - group.params / params)
            for layer, group in groups.items()
        }


def _value(group: GroupWeights) -> Tensor:
    """(C,): the absolute weights of each channel in all layers, in shares of the group's largest."""
    total_C = torch.zeros(group.width, dtype=torch.float64)
    for filters in (*group.producers, *group.consumers):
        total_C[torch.as_tensor(filters.channels)] += filters.values_KN.abs().sum(1)
    largest = total_C.max()
    return total_C / torch.where(largest > 0, largest, 1.0)
