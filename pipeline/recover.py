"""Recovery after the cut on a few images: the pruned channels are taught to act together as they did before."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor, nn

from ..chip.groups import ChannelGraph, ChannelGroup
from ..chip.masked import MaskedRuns, label_margins, masked_scores
from ..chip.plan import PrunePlan
from .batches import shuffled, stream
from .data import Progress
from .tune import TrainingDiverged

# Shape letters: B images, K classes, C channels of a group, S masks, P players.


@dataclass(frozen=True)
class RecoverSettings:
    """One short optimisation with Adam on a fixed set of images, the learning rate falling along half a cosine.

    players: kept channels looked at in a step. images: at most so many of those given. ce_weight: of the
    cross-entropy beside the interaction difference. batch: most rows of one pass; no more are in memory at once.
    """

    steps: int = 40
    lr: float = 1e-3
    players: int = 4
    images: int = 256
    ce_weight: float = 1.0
    batch: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: ValueError for a setting that makes no sense."""
        for name, least in (("steps", 1), ("players", 1), ("images", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"recover: {name} is {getattr(self, name)}; {least} or more is expected.")
        if not (0 < self.lr < math.inf and 0 <= self.ce_weight < math.inf):
            raise ValueError(
                f"recover: lr is {self.lr:g} and ce_weight {self.ce_weight:g}; a number above 0, and one of 0 or more, "
                "are expected."
            )


class RecoverRecord(BaseModel, frozen=True):
    """How a recovery went.

    gap_before, gap_after: the interaction difference over every channel that was looked at in any step. Per step:
    interaction, the difference over that step's channels; cross_entropy; loss, what was minimised. Differences are
    squares, averaged over channels and images, in shares of the dense network's mean square.
    """

    steps: int
    images: int
    seconds: float
    gap_before: float
    gap_after: float
    loss: list[float]
    interaction: list[float]
    cross_entropy: list[float]


def recover(
    pruned: nn.Module,
    dense: nn.Module,
    plan: PrunePlan,
    images: Tensor,
    labels: Tensor,
    *,
    settings: RecoverSettings | None = None,
    progress: Progress | None = None,
) -> RecoverRecord:
    """Change the pruned network's weights in place so that its channels act together as in the dense network.

    For a kept channel i of a group, with v(S) the log-odds of an image's label when only the group's channels of S are
    alive (`masked.MaskedRuns`) and N all of them, dense or kept,

        dV(i) = v(N) - v(N without i) - v(i alone) + v(none)

    The loss is the mean over some kept channels of (dV_pruned(i) - dV_dense(i))^2, in shares of the mean of
    dV_dense(i)^2, plus `ce_weight` times the cross-entropy. Each step takes the next `players` channels of a random
    round over the groups that lost channels; a group of which one channel is left has no interactions. Every weight,
    bias and batch-norm scale is trained; batch-norm statistics stay. Where nothing was cut, nothing changes. Both
    networks end in evaluation mode; the dense one does not change. One seed, one result.

    Shapes: images (B, ...) as the networks read them, labels (B,).
    Cost: with p = min(players, cut groups), up to 1 + p + 2 `players` forward and backward passes of the images a step;
    and for each channel looked at, two forward passes of the dense network and four of the pruned one, two more a
    group.
    Raises: ValueError for networks that the plan does not fit, or images and labels that do not go together;
    tune.TrainingDiverged where the loss is no longer a number.
    Source (after): Tang, Wei and Li, arXiv 2307.00758 (SNPFI); only the abstract is known, which says that the
    interaction difference is minimised in place of iterative training. The loss and the optimiser are our choice.
    """
    settings = settings or RecoverSettings()
    started = time.perf_counter()
    if len(images) == 0 or labels.shape != (len(images),):
        raise ValueError(
            f"recover: {len(images)} images came with labels of shape {tuple(labels.shape)}; at least one image is "
            "needed, and one label for each."
        )
    plan.require_model(dense)
    pairs = _pairs(pruned, dense, plan, images[:1])
    if not any(cut.removed for cut in plan.groups):
        seconds = time.perf_counter() - started
        return RecoverRecord(
            steps=0, images=0, seconds=seconds, gap_before=0, gap_after=0, loss=[], interaction=[], cross_entropy=[]
        )
    rounds = _rounds(pairs, settings)
    players = list(dict.fromkeys(player for drawn in rounds for player in drawn))
    chosen = shuffled(len(images), settings.seed, "recover images")[: settings.images].sort().values
    with _on_one_device(pruned, dense) as device:
        seen = _Seen(images[chosen].to(device), labels[chosen].to(device), settings.batch)
        before = {layer: pair.before for layer, pair in pairs.items()}
        after = {layer: pair.after for layer, pair in pairs.items()}
        their_places = [_Player(layer, pairs[layer].place[channel]) for layer, channel in players]
        targets = _Targets(players, _interactions(dense, before, their_places, seen))
        gap_before = targets.gap(_interactions(pruned, after, players, seen))
        steps = _optimise(pruned, after, rounds, targets, seen, settings, progress)
        gap_after = targets.gap(_interactions(pruned, after, players, seen))
    return RecoverRecord(
        steps=settings.steps,
        images=len(chosen),
        seconds=time.perf_counter() - started,
        gap_before=gap_before,
        gap_after=gap_after,
        loss=[step.interaction + settings.ce_weight * step.cross_entropy for step in steps],
        interaction=[step.interaction for step in steps],
        cross_entropy=[step.cross_entropy for step in steps],
    )


class _Player(NamedTuple):
    """A channel by its place in its group."""

    layer: str
    channel: int


# -- which channels are looked at --------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """One group before and after the cut; place: where each kept channel was before."""

    before: ChannelGroup
    after: ChannelGroup
    place: list[int]


def _pairs(pruned: nn.Module, dense: nn.Module, plan: PrunePlan, example: Tensor) -> dict[str, _Pair]:
    """The groups that lost channels and still have some to interact."""
    found: dict[str, _Pair] = {}
    groups = [_groups(model, example) for model in (dense, pruned)]
    for cut in plan.groups:
        before, after = (named.get(cut.layer) for named in groups)
        if before is None or after is None or (before.width, after.width) != (cut.width_before, cut.width_after):
            raise ValueError(
                f"recover: this plan does not fit the networks: group '{cut.layer}' goes from {cut.width_before} to "
                f"{cut.width_after} channels in it. Give the network that was cut by this plan."
            )
        if cut.removed and len(cut.kept) > 1:
            place = {channel: n for n, channel in enumerate(before.channels)}
            found[cut.layer] = _Pair(before, after, [place[channel] for channel in cut.kept])
    return found


def _groups(model: nn.Module, example: Tensor) -> dict[str, ChannelGroup]:
    home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return {group.layer: group for group in ChannelGraph(model, example.to(home)).groups}


def _rounds(pairs: Mapping[str, _Pair], settings: RecoverSettings) -> list[list[_Player]]:
    """The players of every step: groups in turn, in an order drawn anew each turn, and so the channels of a group."""
    generator = stream(settings.seed, "recover players")
    layers = list(pairs)
    turn: list[int] = []
    left: dict[str, list[int]] = {layer: [] for layer in layers}

    def next_player() -> _Player:
        if not turn:
            turn.extend(torch.randperm(len(layers), generator=generator).tolist())
        layer = layers[turn.pop()]
        if not left[layer]:
            left[layer] = torch.randperm(len(pairs[layer].place), generator=generator).tolist()
        return _Player(layer, left[layer].pop())

    count = settings.players if layers else 0
    return [[next_player() for _ in range(count)] for _ in range(settings.steps)]


# -- how channels act together -----------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """The calibration images, and how many rows one pass may have."""

    images: Tensor
    labels: Tensor
    batch: int


class _Targets:
    """The dense network's interactions, and how far others are from them."""

    def __init__(self, players: Sequence[_Player], values_PB: Tensor) -> None:
        self.values_PB = values_PB
        self._row = {player: n for n, player in enumerate(players)}
        mean_square = float(values_PB.square().mean()) if players else 0.0
        self.scale = mean_square if mean_square > 0 else 1.0

    def of(self, players: Sequence[_Player]) -> Tensor:
        """Shapes: -> (P, B) float64 on the CPU."""
        return self.values_PB[[self._row[player] for player in players]]

    def gap(self, values_PB: Tensor) -> float:
        """The mean square of the differences, in shares of the dense network's own mean square."""
        return float((values_PB - self.values_PB).square().mean()) / self.scale if len(values_PB) else 0.0


def _interactions(
    model: nn.Module, groups: Mapping[str, ChannelGroup], players: Sequence[_Player], seen: _Seen
) -> Tensor:
    """dV of every player in every image, without gradients. Shapes: -> (P, B) float64 on the CPU."""
    found: dict[_Player, Tensor] = {}
    table = MaskedRuns(model, list(groups.values()), seen.images, seen.labels, batch=seen.batch)
    for layer in dict.fromkeys(player.layer for player in players):
        own = [player for player in players if player.layer == layer]
        masks = _Masks(groups, own)
        found |= zip(own, masks.interactions(table.runs(layer).many(masks.alive[layer])), strict=True)
    empty = torch.zeros(0, len(seen.images), dtype=torch.float64)
    return torch.stack([found[player] for player in players]) if players else empty


class _Masks:
    """The masks that the interactions of some players need: all alive, none of each group, without and alone."""

    def __init__(self, groups: Mapping[str, ChannelGroup], players: Sequence[_Player]) -> None:
        layers = list(dict.fromkeys(player.layer for player in players))
        self.none_P = [1 + layers.index(player.layer) for player in players]
        self.without_P = [1 + len(layers) + n for n in range(len(players))]
        self.alone_P = [1 + len(layers) + len(players) + n for n in range(len(players))]
        self.count = 1 + len(layers) + 2 * len(players)
        self.alive = {layer: torch.ones(self.count, groups[layer].width, dtype=torch.bool) for layer in layers}
        for (layer, channel), none, without, alone in zip(
            players, self.none_P, self.without_P, self.alone_P, strict=True
        ):
            alive_SC = self.alive[layer]
            alive_SC[none] = False
            alive_SC[without, channel] = False
            alive_SC[alone] = torch.arange(alive_SC.shape[1]) == channel

    def interactions(self, values_SB: Tensor) -> Tensor:
        """v(N) - v(N without i) - v(i alone) + v(none). Shapes: (S, B) -> (P, B)."""
        return values_SB[0] - values_SB[self.without_P] - values_SB[self.alone_P] + values_SB[self.none_P]


# -- the optimisation --------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    interaction: float
    cross_entropy: float


def _optimise(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    rounds: Sequence[Sequence[_Player]],
    targets: _Targets,
    seen: _Seen,
    settings: RecoverSettings,
    progress: Progress | None,
) -> list[_Step]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=settings.lr)
    steps: list[_Step] = []
    for number, players in enumerate(rounds):
        rate = settings.lr * (1 + math.cos(math.pi * number / settings.steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        steps.append(_gradients(model, groups, players, targets, seen, settings.ce_weight))
        loss = steps[-1].interaction + settings.ce_weight * steps[-1].cross_entropy
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"recovery diverged in step {number + 1} of {settings.steps}: the loss is {loss:g} at a learning rate "
                f"of {rate:.3g} (lr = {settings.lr:g}). Try a smaller tune.recover_lr."
            )
        optimizer.step()
        if progress is not None:
            progress((number + 1) / settings.steps, f"recovering, step {number + 1} of {settings.steps}")
    optimizer.zero_grad(set_to_none=True)
    return steps


def _gradients(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    players: Sequence[_Player],
    targets: _Targets,
    seen: _Seen,
    ce_weight: float,
) -> _Step:
    """Add the gradients of one step's loss to the weights, some images at a time."""
    masks = _Masks(groups, players)
    wanted_PB = targets.of(players).to(seen.images.device)
    interaction = cross_entropy = 0.0
    for share in torch.arange(len(seen.images)).split(max(1, seen.batch // masks.count)):
        images, labels = seen.images[share], seen.labels[share]
        with torch.enable_grad():
            scores_SBK = masked_scores(model, images, list(groups.values()), masks.alive, masks=masks.count)
            found_PB = masks.interactions(label_margins(scores_SBK, labels))
            miss = (found_PB - wanted_PB[:, share]).square().sum() / (max(1, wanted_PB.numel()) * targets.scale)
            error = F.cross_entropy(scores_SBK[0], labels, reduction="sum") / len(seen.images)
            (miss + ce_weight * error).backward()
        interaction += float(miss.detach())
        cross_entropy += float(error.detach())
    return _Step(interaction, cross_entropy)


@contextmanager
def _on_one_device(pruned: nn.Module, dense: nn.Module) -> Iterator[torch.device]:
    """Both networks in evaluation mode on the GPU, where there is one, with kernels that repeat; then back again."""
    homes = [next((p.device for p in model.parameters()), torch.device("cpu")) for model in (pruned, dense)]
    device = torch.device("cuda") if torch.cuda.is_available() else homes[0]
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        try:
            for model in (pruned, dense):
                model.to(device).eval()
            yield device
        finally:
            for model, home in zip((pruned, dense), homes, strict=True):
                model.to(home)
