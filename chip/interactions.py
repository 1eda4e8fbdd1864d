"""The criterion `interactions`: what a channel adds alone and among all others, and how much channels act together."""

from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from .criterion import Grade, Need, Played, RunCriterion, Runs

# Shape letters: B images, C channels of a group, S masks.

_TOGETHER = 64  # masks between two words on progress


class FilterInteractions(RunCriterion):
    """Channels as players of a game whose value is what the network makes of an image with only those alive.

    With N all C channels and v(S) the value with those of S alive, channel i has a last and a first contribution,

        last_i = v(N) - v(N without i)        first_i = v(i alone) - v(none)

    Importance: the mean over images of (last_i + first_i) / 2. It is the Shapley value where channels act on their own
    or in pairs, and an estimate of it elsewhere. It may be negative: such a channel harms. With `samples`, so many
    random orders of the channels, each also taken backwards, estimate the Shapley value instead; that converges to it.

    Strength: with I_i = (last_i - first_i) / (C - 1), which is exactly the mean over j of the Shapley interactions of
    i and j,

        U = mean over channels and images of |I_i|, over mean over images of |v(N) - v(none)| / C

    so it is in shares of what an average channel contributes, and groups compare. Interactions of one channel that
    differ in sign cancel within I_i. A group of one channel has strength 0, and so has one without any interaction;
    where all channels together change nothing though each does, the sum of what each does, (|last| + |first|) / 2,
    stands in for |v(N) - v(none)|.

    Unit: that of the values, log-odds of the label in `masked.MaskedRuns`, the same for all groups, so that
    importances compare as they are; U has none.
    Cost: 2 C + 2 runs of all images a group; `samples` adds 2 (C - 1) each.
    Source (after): Tang, Wei and Li, arXiv 2307.00758 (SNPFI); only the abstract is known, which names importance and
    utilization strength by filter-wise interactions. The formulas are our choice. The identity for I_i follows from
    the definitions in Zhang et al., arXiv 2010.14978.
    """

    name: ClassVar[str] = "interactions"
    needs: ClassVar[frozenset[Need]] = frozenset({"masked runs", "labels"})
    grade: ClassVar[Grade] = "after the abstract"
    comparable: ClassVar[bool] = True

    def __init__(self, *, samples: int = 0, seed: int = 0) -> None:
        """Raises: ValueError for a negative number of samples."""
        if samples < 0:
            raise ValueError(
                f"interactions: samples is {samples}; 0 (two contributions a channel) or more is expected."
            )
        self.samples = samples
        self.seed = seed

    def score_runs(self, runs: Runs, width: int, *, progress: Callable[[float], None] | None = None) -> Played:
        """Importance and strength of the group's channels.

        Shapes: -> (C,) float64 and a number. progress: is told the part that is done.
        Raises: ValueError where a value is not finite.
        """
        table = _Table(runs, 2 * width + 2 + 2 * self.samples * (width - 1), progress)
        one_each_CC = torch.eye(width, dtype=torch.bool)
        whole_B, none_B = table.values(torch.tensor([[True], [False]]).expand(2, width))
        last_CB = whole_B - table.values(~one_each_CC)
        first_CB = table.values(one_each_CC) - none_B
        if self.samples:
            importance_C = self._shapley_C(table, whole_B, none_B, width)
        else:
            importance_C = ((last_CB + first_CB) / 2).mean(1)
        return Played(importance_C, _strength(last_CB, first_CB, whole_B - none_B))

    def _shapley_C(self, table: "_Table", whole_B: Tensor, none_B: Tensor, width: int) -> Tensor:
        """What each channel adds to those before it, averaged over random orders, their reverses and images.

        The channels before one in an order are those behind it in the reverse: the subsets come in complementary pairs.
        """
        generator = torch.Generator().manual_seed(self.seed)
        total_C = torch.zeros(width, dtype=torch.float64)
        for _ in range(self.samples):
            order = torch.randperm(width, generator=generator)
            for players in (order, order.flip(0)):
                rank_C = torch.empty_like(players).index_copy_(0, players, torch.arange(width))
                inner_SB = table.values(rank_C < torch.arange(1, width)[:, None])
                steps_CB = torch.cat([none_B[None], inner_SB, whole_B[None]]).diff(dim=0)
                total_C[players] += steps_CB.mean(1)
        return total_C / (2 * self.samples)


@runtime_checkable
class _PlaysMany(Protocol):
    """Runs that can play several masks at once. Shapes: (S, C) bool -> (S, B) float64."""

    def many(self, alive_SC: Tensor) -> Tensor: ...


class _Table:
    """Values of masks, some at a time, each checked and counted."""

    def __init__(self, runs: Runs, total: int, progress: Callable[[float], None] | None) -> None:
        self.runs = runs
        self.total = total
        self.progress = progress
        self.done = 0
        self.images = 0

    def values(self, alive_SC: Tensor) -> Tensor:
        """Shapes: (S, C) bool -> (S, B) float64."""
        if len(alive_SC) == 0:
            return torch.zeros(0, self.images, dtype=torch.float64)
        return torch.cat([self._part(part) for part in alive_SC.split(_TOGETHER)])

    def _part(self, alive_SC: Tensor) -> Tensor:
        values_SB = self._played(alive_SC).double().cpu()
        if not bool(values_SB.isfinite().all()):
            mask, image = (~values_SB.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"interactions: with {int(alive_SC[mask].sum())} of {alive_SC.shape[1]} channels alive, the value of "
                f"image {image} is {float(values_SB[mask, image]):g}; finite values are needed. Look for weights that "
                "overflow, or choose another criterion."
            )
        self.images = values_SB.shape[1]
        self.done += len(alive_SC)
        if self.progress is not None:
            self.progress(self.done / self.total)
        return values_SB

    def _played(self, alive_SC: Tensor) -> Tensor:
        if isinstance(self.runs, _PlaysMany):
            return self.runs.many(alive_SC)
        return torch.stack([self.runs(alive_C) for alive_C in alive_SC])


def _strength(last_CB: Tensor, first_CB: Tensor, together_B: Tensor) -> float:
    """The mean size of a channel's average interaction, in shares of what an average channel contributes."""
    channels = len(last_CB)
    if channels == 1:
        return 0.0
    interaction = float((last_CB - first_CB).abs().mean()) / (channels - 1)
    contribution = float(together_B.abs().mean()) / channels
    if contribution == 0:
        contribution = float((last_CB.abs() + first_CB.abs()).mean()) / 2
    return interaction / contribution if contribution > 0 else 0.0
