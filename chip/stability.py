"""Whether a group's kept channels would be the same on other images: the rule by which scoring stops."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .criterion import equal_say
from .groups import ChannelGroup

# Shape letters: B images, C channels of a group, K of them that one consumer reads, R resamples, A atoms.

LEAST_IMAGES = 32
MOST_IMAGES = 640
KEPT = (0.7, 0.5, 0.3)
"""Shares of a group's channels at which its kept set must be stable where no width is planned."""


class ReaderScores:
    """One consumer's scores of the group's channels, image by image. Shapes: (B, K) with K = len(covered).

    covered: the places in the group of the channels that the consumer reads.
    """

    def __init__(self, covered: Sequence[int]) -> None:
        self.covered = tuple(covered)
        self._batches: list[Tensor] = []

    def add(self, scores_BC: Tensor) -> None:
        """Scores of further images."""
        self._batches.append(scores_BC)

    @property
    def scores_BC(self) -> Tensor:
        """The scores of all images so far."""
        if len(self._batches) > 1:
            self._batches = [torch.cat(self._batches)]
        return self._batches[0]


@dataclass(frozen=True)
class StoppingRule:
    """When a group has seen enough images.

    widths: how many channels each group is going to keep; a group that is not named is judged at KEPT.
    overlap, confidence: a kept set is stable when in `confidence` of the resamples at least `overlap` of it is the
    same, one channel (or atom) being always allowed to change. A group has settled when it was found stable twice in a
    row.
    least, most: the first look comes after `least` images, further ones after half as many again and `least` at the
    fewest; after `most` a group stops anyhow, and has settled if it is stable then.
    """

    widths: Mapping[str, int] = field(default_factory=dict)
    overlap: float = 0.95
    confidence: float = 0.95
    least: int = LEAST_IMAGES
    most: int = MOST_IMAGES
    resamples: int = 200
    seed: int = 0

    def watched(self, group: ChannelGroup) -> list[int]:
        """The numbers of channels at which the kept set of that group must be stable."""
        if group.layer in self.widths:
            return [self.widths[group.layer]]
        return sorted({max(1, round(share * group.width)) for share in KEPT})

    def is_stable(self, group: ChannelGroup, overlaps: Mapping[int, float]) -> bool:
        """Whether every watched kept set is stable enough. `overlaps`: as `kept_overlaps` gives them."""
        kept = {width: max(1, width // len(group.atoms[0])) for width in self.watched(group)}
        return all(overlaps[width] >= min(self.overlap, (kept[width] - 1) / kept[width]) for width in kept)


def group_scores(group: ChannelGroup, readers: Sequence[ReaderScores]) -> Tensor:
    """The score of each channel of the group: every consumer's mean over images, in shares of its own average channel.

    Shapes: -> (C,) float64, in the order of the group's channels. Unit: none; 1 is an average channel, 0 a dead one.
    """
    if not readers:  # nothing reads them in a forward pass
        return torch.zeros(group.width, dtype=torch.float64)
    return equal_say(group.width, [(reader.covered, reader.scores_BC.mean(0)) for reader in readers])


def kept_overlaps(group: ChannelGroup, readers: Sequence[ReaderScores], rule: StoppingRule) -> dict[int, float]:
    """Watched width -> the share of the kept set that stays the same in `confidence` of the bootstrap resamples.

    Images are drawn with replacement, as many as there are; how far the kept set of a resample is from that of the
    images themselves stands for how far the latter is from that of all images there could be.
    Unit: from 0 to 1. The draws depend on the seed and the number of images only.
    """
    images = len(readers[0].scores_BC) if readers else 0
    if images == 0:
        return dict.fromkeys(rule.watched(group), 0.0)
    counts_RB = _draws(rule.resamples, images, rule.seed)
    resampled_RC = equal_say(
        group.width, [(reader.covered, counts_RB @ reader.scores_BC / images) for reader in readers]
    )
    order_RA = _ranked(group, resampled_RC)
    order_A = _ranked(group, group_scores(group, readers)[None])[0]
    atom = len(group.atoms[0])
    return {
        width: _agreement(order_RA, order_A, max(1, width // atom), 1 - rule.confidence)
        for width in rule.watched(group)
    }


@lru_cache(maxsize=2)
def _draws(resamples: int, images: int, seed: int) -> Tensor:
    """How often each resample holds each image; groups that are looked at together share them. Shapes: -> (R, B)."""
    draws_RB = torch.randint(images, (resamples, images), generator=torch.Generator().manual_seed(seed))
    counts_RB = torch.zeros(resamples, images, dtype=torch.float64)
    return counts_RB.scatter_add_(1, draws_RB, torch.ones_like(draws_RB, dtype=torch.float64))


def _ranked(group: ChannelGroup, scores_RC: Tensor) -> Tensor:
    """The group's atoms by falling mean score, ties to the lower channel. Shapes: (R, C) -> (R, A)."""
    place = {channel: n for n, channel in enumerate(group.channels)}
    index_Aa = torch.tensor([[place[channel] for channel in atom] for atom in sorted(group.atoms)])
    return scores_RC[:, index_Aa].mean(-1).argsort(dim=1, descending=True, stable=True)


def _agreement(order_RA: Tensor, order_A: Tensor, kept: int, quantile: float) -> float:
    """The lower quantile, over resamples, of the share of the kept atoms that are kept in the resample too."""
    is_kept_A = torch.zeros(len(order_A), dtype=torch.float64)
    is_kept_A[order_A[:kept]] = 1.0
    overlap_R = is_kept_A[order_RA[:, :kept]].mean(1)
    return float(overlap_R.quantile(quantile, interpolation="lower"))
