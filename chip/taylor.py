"""The criterion `taylor`: at most so much would the loss move, to first order, if a filter were set to zero."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from .criterion import Filters, Grade, GroupWeights, Need, WeightCriterion, equal_say


class Taylor(WeightCriterion):
    """The sum over a filter's weights of |w dL/dw|, with the loss summed over the images; producers have the same say.

    Grade: baseline. Source (code): Molchanov et al., CVPR 2019, the variant on weights. Differences: they square each
    product where we take its absolute value (as torch-pruning does), and they add up batch by batch what we take once
    from the gradient of all images, so that the size of a batch does not matter; one look, no pruning in steps.
    """

    name: ClassVar[str] = "taylor"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights", "gradients", "labels"})
    grade: ClassVar[Grade] = "baseline"

    def score_weights(self, groups: Mapping[str, GroupWeights]) -> dict[str, Tensor]:
        """Shares of the average filter's effect, for every group. Shapes: group -> (C,) float64."""
        return {
            layer: equal_say(group.width, [(filters.channels, _effect(filters)) for filters in group.producers])
            for layer, group in groups.items()
        }


def _effect(filters: Filters) -> Tensor:
    assert filters.gradients_KN is not None, f"'{filters.layer}' came without the gradients that taylor declares"
    return (filters.values_KN * filters.gradients_KN).abs().sum(1)
