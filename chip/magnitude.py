"""Criteria that look at a layer's own numbers: norms, distances, batch-norm scales, and chance."""

import hashlib
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .criterion import Filters, Grade, GroupWeights, Need, WeightCriterion, equal_say

# Shape letters: C channels of a group, K of them that one layer holds, N weights of one channel in a layer.

_SAME = 1 - 1e-12  # squared norms this close are equal: the order of a sum must not choose between twins
_ROUNDING = 1e-12  # of two squared norms: squared distances below it are the Gram product's rounding
_ROWS = 512  # of the distance matrix at a time


class L1Norm(WeightCriterion):
    """The sum of a filter's absolute weights; several producers have the same say, biases have none.

    Grade: baseline. Source (after): Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017.
    """

    name: ClassVar[str] = "l1"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})
    grade: ClassVar[Grade] = "baseline"

    def score_weights(self, groups: Mapping[str, GroupWeights]) -> dict[str, Tensor]:
        """Shares of the average filter's norm, for every group. Shapes: group -> (C,) float64."""
        return _by_producer(groups, lambda filters: filters.values_KN.abs().sum(1))


class L2Norm(WeightCriterion):
    """The Euclidean norm of a filter; several producers have the same say, biases have none.

    Grade: baseline. Source (code): he-y/filter-pruning-geometric-median ranks by it before it looks at distances; as
    "weight norm" it is what most papers compare with.
    """

    name: ClassVar[str] = "l2"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})
    grade: ClassVar[Grade] = "baseline"

    def score_weights(self, groups: Mapping[str, GroupWeights]) -> dict[str, Tensor]:
        """Shares of the average filter's norm, for every group. Shapes: group -> (C,) float64."""
        return _by_producer(groups, lambda filters: torch.linalg.vector_norm(filters.values_KN, dim=1))


class GeometricMedian(WeightCriterion):
    """The sum of a filter's Euclidean distances to the layer's others: near the geometric median, it is replaceable.

    A filter of zeros is not the first to go where the others lie around it at odd distances; the paper knows no such
    rule, and the authors take the filters of small norm out before, if asked. Filters all alike score 0 each.

    Grade: baseline. Source (code): He et al., FPGM, CVPR 2019. Differences: no share of the layer is taken by norm
    first, and a group's producers have the same say where theirs are masked one by one.
    """

    name: ClassVar[str] = "fpgm"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})
    grade: ClassVar[Grade] = "baseline"

    def score_weights(self, groups: Mapping[str, GroupWeights]) -> dict[str, Tensor]:
        """Shares of the average filter's distance, for every group. Cost: a K x K Gram product for each producer.

        Shapes: group -> (C,) float64.
        """
        return _by_producer(groups, lambda filters: _distances(filters.values_KN))


class BatchNormScale(WeightCriterion):
    """The absolute scale |gamma| of the batch norms on a channel; several have the same say.

    Grade: baseline. Source (code): Liu et al., network slimming, ICCV 2017. Differences: they train with a penalty on
    the scales first and cut all layers at one threshold; here the network is taken as it is, and scales are compared
    within a group.
    """

    name: ClassVar[str] = "bn-scale"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})
    grade: ClassVar[Grade] = "baseline"

    def lacks(self, group: GroupWeights) -> str | None:
        """A reason where some channel has no batch norm."""
        if not group.scales:
            return "it has no batch norm"
        bare = group.width - len({channel for scale in group.scales for channel in scale.channels})
        return f"{bare} of its {group.width} channels have no batch norm" if bare else None

    def score_weights(self, groups: Mapping[str, GroupWeights]) -> dict[str, Tensor]:
        """Shares of the average scale, for every group, none of which may lack them. Shapes: group -> (C,) float64."""
        return {
            layer: equal_say(group.width, [(scale.channels, scale.values_KN.abs().sum(1)) for scale in group.scales])
            for layer, group in groups.items()
        }


class Lamp(WeightCriterion):
    """A filter's squared norm over the sum of the squared norms that are at least as large.

    The scores compare across groups: whatever a layer's scale, its largest filter has 1, or 1/n where n are equally
    large.

    Grade: baseline. Source (code): Lee et al., LAMP, ICLR 2021. Adapted: they score single weights, we score channels;
    squared norms of several producers are put into shares and averaged first; and equal filters are equal here, each
    over the sum with all its equals in it, where they leave ties to the order of sorting.
    """

    name: ClassVar[str] = "lamp"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})
    grade: ClassVar[Grade] = "baseline"
    comparable: ClassVar[bool] = True

    def score_weights(self, groups: Mapping[str, GroupWeights]) -> dict[str, Tensor]:
        """Between 0, a dead filter, and 1. Shapes: group -> (C,) float64."""
        squares = _by_producer(groups, lambda filters: filters.values_KN.square().sum(1))
        return {layer: _share_of_the_rest(squares_C) for layer, squares_C in squares.items()}


class RandomChoice(WeightCriterion):
    """A number in (0, 1) for every channel, drawn from the seed and the channel's own weights.

    Permuted channels keep their draws, and equal channels draw equally, whatever their order. The draws of all groups
    are of one distribution, so they compare.

    Grade: baseline. Source: none, the floor that every criterion must beat. The draw is the first 52 bits of the
    SHA-256 of the seed, a line feed, and the channel's rows in all producers as little-endian float64.
    """

    name: ClassVar[str] = "random"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})
    grade: ClassVar[Grade] = "baseline"
    comparable: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score_weights(self, groups: Mapping[str, GroupWeights]) -> dict[str, Tensor]:
        """The draws, for every group. Shapes: group -> (C,) float64."""
        return {layer: self._draws(group) for layer, group in groups.items()}

    def _draws(self, group: GroupWeights) -> Tensor:
        hashes = [hashlib.sha256(f"{self.seed}\n".encode()) for _ in range(group.width)]
        for filters in group.producers:
            rows = (filters.values_KN.detach().cpu() + 0.0).numpy().astype("<f8")  # + 0.0: -0 equals 0
            for channel, row in zip(filters.channels, rows, strict=True):
                hashes[channel].update(row.tobytes())
        bits = [int.from_bytes(found.digest()[:8], "big") >> 12 for found in hashes]
        return torch.tensor([(drawn + 0.5) / 2**52 for drawn in bits], dtype=torch.float64)


def _by_producer(groups: Mapping[str, GroupWeights], measure: Callable[[Filters], Tensor]) -> dict[str, Tensor]:
    return {
        layer: equal_say(group.width, [(filters.channels, measure(filters)) for filters in group.producers])
        for layer, group in groups.items()
    }


def _distances(values_KN: Tensor) -> Tensor:
    """(K,): each row's Euclidean distances to all rows, added up; rows within 1e-6 of their norms are the same."""
    squares_K = values_KN.square().sum(1)
    sums = []
    for rows_RN, squares_R in zip(values_KN.split(_ROWS), squares_K.split(_ROWS), strict=True):
        both_RK = squares_R[:, None] + squares_K
        apart_RK = both_RK - 2 * rows_RN @ values_KN.T
        sums.append(torch.where(apart_RK <= _ROUNDING * both_RK, 0.0, apart_RK).sqrt().sum(1))
    return torch.cat(sums)


def _share_of_the_rest(squares_C: Tensor) -> Tensor:
    ordered_C = squares_C.sort().values
    at_least_C = ordered_C.flip(0).cumsum(0).flip(0)
    rest_C = at_least_C[torch.searchsorted(ordered_C, squares_C * _SAME).clamp(max=len(ordered_C) - 1)]
    return squares_C / torch.where(rest_C > 0, rest_C, 1.0)
