"""What a channel-importance criterion is: it declares what it needs and scores what it is shown."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

Need = Literal["maps"]


class Criterion(ABC):
    """Scores channels; knows neither the graph nor other criteria.

    needs: what one pass of the model must hand over. "maps": the feature maps as a consumer of the channels reads them.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]

    @abstractmethod
    def score_maps(self, maps_BCP: Tensor) -> Tensor:
        """How much each channel matters in each image; larger stays longer.

        Shapes: (B, C, P) floating -> (B, C) float64, on the device of the maps. Where maps are not finite, so is the
        score: NaN, at least for that channel. It never waits for the device.
        """
