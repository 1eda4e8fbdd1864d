"""What a channel-importance criterion is: it declares what it needs and scores what it is shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

# Shape letters: B images, C channels of a group, K of them that one layer holds, N weights of one channel in a layer,
# P values of one channel in one image.

Need = Literal["weights", "consumer weights", "gradients", "labels", "maps", "masked runs", "cost"]
"""weights, consumer weights: of the layers that produce the channels, and of those that read them. gradients: of the
loss. maps: as a consumer reads them. masked runs: of the network with only some channels alive. cost: what vanishes
with one channel. Gradients and masked runs need labels."""

Grade = Literal["code", "after the abstract", "baseline"]
"""How near a criterion is to its source: the authors' code was read; only the abstract was, the rest is our choice; a
baseline that every paper compares with."""

Runs = Callable[[Tensor], Tensor]
"""Which channels are alive, (C,) bool -> what the network makes of each image, (B,) float64."""


@dataclass(frozen=True)
class Filters:
    """What one layer holds of the channels: one row for each channel of the group that it covers.

    channels: the covered channels' places in the group, ascending; row k of the others belongs to channels[k].
    values_KN: float64. gradients_KN: of the loss, summed over images; None where no criterion asked for them.
    taps: so many neighbouring values of a row are one kernel; 1 for a linear layer or a scale.
    """

    layer: str
    channels: tuple[int, ...]
    values_KN: Tensor
    gradients_KN: Tensor | None = None
    taps: int = 1


@dataclass(frozen=True)
class GroupWeights:
    """One channel group as its layers hold it.

    producers: convolutions and linears whose outputs the channels are; consumers: those that read them; scales: the
    weights of the batch norms on them, N = 1.
    macs, params: what vanishes from the dense network with one channel of the group, in every layer it touches.
    """

    layer: str
    width: int
    producers: tuple[Filters, ...]
    consumers: tuple[Filters, ...]
    scales: tuple[Filters, ...]
    macs: float
    params: float


@dataclass(frozen=True)
class Played:
    """importance_C: how much each channel matters, float64; strength: how much the group's channels act together."""

    importance_C: Tensor
    strength: float


class Criterion(ABC):
    """Scores channels, larger stays longer; knows neither the graph nor other criteria.

    needs: what it must be handed. comparable: its scores rank the channels of all groups as they are; others are put
    into shares of their group's average channel.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    grade: ClassVar[Grade]
    comparable: ClassVar[bool] = False

    def lacks(self, group: GroupWeights) -> str | None:
        """Why this criterion cannot judge that group, such as "it has no batch norm"; None where it can."""
        del group
        return None


class MapCriterion(Criterion):
    """Scores each image's feature maps by themselves; the caller averages over images and consumers."""

    @abstractmethod
    def score_maps(self, maps_BCP: Tensor, sides: tuple[int, int]) -> Tensor:
        """How much each channel matters in each image.

        sides: height and width of one map, P = height x width; (P, 1) where the values have no such order.
        Shapes: (B, C, P) floating -> (B, C) float64, on the device of the maps. Where maps are not finite, so is the
        score: NaN, at least for that channel. It waits for the device only where its docstring says so.
        """


class WeightCriterion(Criterion):
    """Scores what the layers hold: weights, scales, gradients, cost; no image passes by it."""

    @abstractmethod
    def score_weights(self, groups: Mapping[str, GroupWeights]) -> dict[str, Tensor]:
        """How much each channel matters, for every group. Shapes: group -> (C,) float64."""


class RunCriterion(Criterion):
    """Scores by what the network can do with some of the channels only."""

    @abstractmethod
    def score_runs(self, runs: Runs, width: int, *, progress: Callable[[float], None] | None = None) -> Played:
        """Importance and joint strength of the group's channels. progress: is told the part that is done."""


def equal_say(width: int, parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """Scores of several layers as one: each in shares of its own average channel, then averaged where they cover.

    Shapes: per layer the places of its channels in the group and (..., K) -> (..., width). Unit: none; 1 is an average
    channel, 0 a dead one.
    """
    first = parts[0][1]
    total = torch.zeros(*first.shape[:-1], width, dtype=torch.float64)
    count = torch.zeros(width, dtype=torch.float64)
    for channels, scores in parts:
        index = torch.as_tensor(channels)
        average = scores.mean(-1, keepdim=True)
        total[..., index] += scores / torch.where(average > 0, average, 1.0)
        count[index] += 1
    return total / count.clamp(min=1)


def require_classes(labels: Tensor, *, classes: int) -> None:
    """Nothing, where every label is the number of an output. Shapes: (B,). Raises: ValueError."""
    low, high = (int(label) for label in labels.aminmax())
    if low < 0 or high >= classes:
        odd = low if low < 0 else high
        raise ValueError(
            f"the data has class {odd} (counted from 0), but the model has only {classes} outputs. Give the data that "
            "it was trained for."
        )
