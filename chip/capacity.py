"""The criterion `capacity`: the entropy of a filter's weights and its independence of the layer's other filters."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .criterion import Filters, Grade, GroupWeights, Need, WeightCriterion, equal_say

# Shape letters: K filters of a layer, N weights of one filter, I of its kernels, one for each input channel.

BINS = 10  # of the histogram of a filter that is one kernel
DEAD = 1e-6  # of the layer's largest norm: the epsilon of a batch norm silences what is below it
_FLAT = 1e-9  # a measure that varies by less says nothing: the rest is rounding
_LEAST = 1e-12  # what a living filter scores at least


class InformationCapacity(WeightCriterion):
    """Information capacity plus `balance` times independence, each from 0 to 1 over the layer; no image is needed.

    Capacity is the entropy of how a filter's weight is spread over its input channels: with p_c the share of kernel c
    in the sum of the kernels' Euclidean norms, H = - sum p_c log2 p_c. A filter that is one kernel (a depthwise
    convolution, the first layer on grey images) has no such spread; there H is the entropy of the histogram of its
    weights, `BINS` bins over the range of the layer. Independence is D = 1 - the average |cosine| with the other
    filters. A measure that is the same for all filters gives each of them 1.

    Entropy does not see scale: a filter of zeros has no distribution, and one of noise near zero an even one, which
    would rank it first. So filters whose norm is at most `DEAD` of the layer's largest are taken out before anything
    is measured, and score 0; the living score more, by however little. Several producers have the same say.

    Grade: after the abstract. Source (after): Tang et al., information capacity and independence, IEEE TNNLS 36(5),
    2025, arXiv 2303.03645: entropy of the weights and independence among filters, fused with a balancing parameter.
    The entropy over kernel norms is that of a third party's code; independence by cosines, the scaling to 0..1, the
    histogram and the balance of 1 are our choices.
    """

    name: ClassVar[str] = "capacity"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})
    grade: ClassVar[Grade] = "after the abstract"

    def __init__(self, *, balance: float = 1.0) -> None:
        """Raises: ValueError when the balance is no number from 0 up."""
        if not 0 <= balance < math.inf:
            raise ValueError(
                f"capacity: a balance of {balance:g} between entropy and independence; expected a number from 0 "
                "(entropy alone) up. The default is 1."
            )
        self.balance = balance

    def score_weights(self, groups: Mapping[str, GroupWeights]) -> dict[str, Tensor]:
        """Shares of the average filter's score, for every group. Cost: a K x K Gram product for each producer.

        Shapes: group -> (C,) float64.
        """
        return {
            layer: equal_say(group.width, [(filters.channels, self._scores(filters)) for filters in group.producers])
            for layer, group in groups.items()
        }

    def _scores(self, filters: Filters) -> Tensor:
        norms_K = torch.linalg.vector_norm(filters.values_KN, dim=1)
        dead_K = norms_K <= DEAD * norms_K.max()
        living_KN = filters.values_KN[~dead_K]
        scores_K = torch.zeros_like(norms_K)
        if len(living_KN):
            capacity_K = _stretched(_entropy(living_KN, filters.taps))
            independence_K = _stretched(_independence(living_KN / norms_K[~dead_K, None]))
            scores_K[~dead_K] = (capacity_K + self.balance * independence_K).clamp(min=_LEAST)
        return scores_K


def _entropy(values_KN: Tensor, taps: int) -> Tensor:
    """(K,), in bits."""
    if values_KN.shape[1] == taps:
        return _bits(_histograms(values_KN))
    norms_KI = torch.linalg.vector_norm(values_KN.unflatten(1, (-1, taps)), dim=2)
    return _bits(norms_KI / norms_KI.sum(1, keepdim=True))


def _bits(shares_KI: Tensor) -> Tensor:
    return torch.special.entr(shares_KI).sum(1) / math.log(2)


def _histograms(values_KN: Tensor) -> Tensor:
    """(K, BINS): the shares of each row's values that lie in the bins between the layer's smallest and largest."""
    low, high = values_KN.aminmax()
    width = torch.where(high > low, high - low, 1.0)
    places_KN = ((values_KN - low) / width * BINS).long().clamp(0, BINS - 1)
    counts_KI = values_KN.new_zeros(len(values_KN), BINS)
    return counts_KI.scatter_add_(1, places_KN, torch.ones_like(values_KN)) / values_KN.shape[1]


def _independence(unit_KN: Tensor) -> Tensor:
    cosines_KK = (unit_KN @ unit_KN.T).abs_()
    return 1 - cosines_KK.fill_diagonal_(0).sum(1) / max(len(unit_KN) - 1, 1)


def _stretched(values_K: Tensor) -> Tensor:
    """From 0, the smallest, to 1, the largest; 1 for all where they do not differ."""
    low, high = values_K.aminmax()
    return torch.ones_like(values_K) if high - low <= _FLAT else (values_K - low) / (high - low)
