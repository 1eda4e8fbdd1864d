"""The criterion `hrank`: the rank of a channel's feature map, averaged over images by the caller."""

from typing import ClassVar

import torch
from torch import Tensor

from .criterion import Grade, MapCriterion, Need

# Shape letters: B images, C channels, P values of one channel in one image, H x W of them as a map.


class HRank(MapCriterion):
    """The rank of each feature map as a matrix of its height and width.

    Singular values below the rounding of the maps' own type, max(H, W) eps of the largest, count as none.

    Grade: baseline. Source (code): Lin et al., HRank, CVPR 2020. Differences: plain images in evaluation mode where
    they take augmented ones, and the maps are those that the consumers read where they take the activations.
    """

    name: ClassVar[str] = "hrank"
    needs: ClassVar[frozenset[Need]] = frozenset({"maps"})
    grade: ClassVar[Grade] = "baseline"

    def score_maps(self, maps_BCP: Tensor, sides: tuple[int, int]) -> Tensor:
        """The rank of every map; 1 or 0, alive or dead, where a side is 1; NaN for a map that is not finite.

        Shapes: (B, C, P) floating, P = H x W = sides[0] x sides[1] -> (B, C) float64, on the device of the maps.
        Cost: the singular values of every map. On a GPU their driver waits for the device once; maps with a side of 1
        need none.
        """
        maps_BCP = maps_BCP.detach()
        finite_BC = maps_BCP.isfinite().all(-1)
        clean_BCP = torch.where(finite_BC[:, :, None], maps_BCP, 0.0)
        ranks_BC = (clean_BCP != 0).any(-1) if min(sides) == 1 else _ranks(clean_BCP.unflatten(-1, sides))
        return torch.where(finite_BC, ranks_BC.double(), torch.nan)


def _ranks(maps_BCHW: Tensor) -> Tensor:
    precise = maps_BCHW if maps_BCHW.dtype == torch.float64 else maps_BCHW.float()  # no decomposition takes halves
    return torch.linalg.matrix_rank(precise, rtol=torch.finfo(maps_BCHW.dtype).eps * max(maps_BCHW.shape[2:]))
