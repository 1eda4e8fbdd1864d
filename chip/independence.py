"""The criterion `chip`: a channel matters as much as the nuclear norm of its layer's maps falls without it."""

from typing import ClassVar

from torch import Tensor

from .criterion import Grade, MapCriterion, Need
from .nuclear import independence_or_nan


class ChannelIndependence(MapCriterion):
    """Channel independence, averaged over images by the caller.

    Source (code): Sui et al., CHIP, NeurIPS 2021, Eq. 3 and Algorithm 1. Differences from the authors' script: plain
    images in evaluation mode instead of augmented ones, no rounding of the maps to 4 decimals, and the maps are those
    the consumers read.
    """

    name: ClassVar[str] = "chip"
    needs: ClassVar[frozenset[Need]] = frozenset({"maps"})
    grade: ClassVar[Grade] = "code"

    def score_maps(self, maps_BCP: Tensor, sides: tuple[int, int]) -> Tensor:
        """Channel independence per image; NaN throughout an image that is not finite.

        Shapes: (B, C, P) -> (B, C) float64.
        """
        del sides  # a map is one row, in whatever order its values come
        return independence_or_nan(maps_BCP)
