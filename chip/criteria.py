"""The table of criteria: every name that `--criterion` takes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .criterion import Criterion

CRITERIA = (
    "chip",
    "cpmc",
    "capacity",
    "interactions",
    "l1",
    "l2",
    "fpgm",
    "bn-scale",
    "lamp",
    "taylor",
    "hrank",
    "random",
)


def make_criterion(name: str, *, seed: int = 0) -> "Criterion":
    """The criterion of that name; `seed` is for those that draw at random.

    Raises: ValueError naming what is available.
    """
    match name:
        case "chip":
            from .independence import ChannelIndependence

            return ChannelIndependence()
        case "cpmc":
            from .cpmc import MultiCriteria

            return MultiCriteria()
        case "capacity":
            from .capacity import InformationCapacity

            return InformationCapacity()
        case "interactions":
            from .interactions import FilterInteractions

            return FilterInteractions(seed=seed)
        case "l1":
            from .magnitude import L1Norm

            return L1Norm()
        case "l2":
            from .magnitude import L2Norm

            return L2Norm()
        case "fpgm":
            from .magnitude import GeometricMedian

            return GeometricMedian()
        case "bn-scale":
            from .magnitude import BatchNormScale

            return BatchNormScale()
        case "lamp":
            from .magnitude import Lamp

            return Lamp()
        case "taylor":
            from .taylor import Taylor

            return Taylor()
        case "hrank":
            from .rank import HRank

            return HRank()
        case "random":
            from .magnitude import RandomChoice

            return RandomChoice(seed=seed)
        case _:
            raise ValueError(f"unknown criterion '{name}'; available: {', '.join(CRITERIA)}.")
