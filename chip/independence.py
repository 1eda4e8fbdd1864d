"""The criterion `chip`: a channel matters as much as the nuclear norm of its layer's maps falls without it."""

from typing import ClassVar

from torch import Tensor

from .criterion import Criterion, Need
from .nuclear import independence_or_nan


class ChannelIndependence(Criterion):
    """Channel independence, averaged over images by the caller.

    Source (code): Sui et al., CHIP, NeurIPS 2021, Eq. 3 and Algorithm 1. Differences from the authors' script: plain
    images in evaluation mode instead of augmented ones, no rounding of the maps to 4 decimals, and the maps are those
    the consumers read.
    """

    name: ClassVar[str] = "chip"
    needs: ClassVar[frozenset[Need]] = frozenset({"maps"})

    def score_maps(self, maps_BCP: Tensor) -> Tensor:
        """Channel independence per image; NaN throughout an image that is not finite.

        Shapes: (B, C, P) -> (B, C) float64.
        """
        return independence_or_nan(maps_BCP)
