"""The table of criteria: every name that `--criterion` takes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .criterion import Criterion

CRITERIA = ("chip",)


def make_criterion(name: str) -> "Criterion":
    """The criterion of that name.

    Raises: ValueError naming what is available.
    """
    match name:
        case "chip":
            from .independence import ChannelIndependence

            return ChannelIndependence()
        case _:
            raise ValueError(f"unknown criterion '{name}'; available: {', '.join(CRITERIA)}.")
