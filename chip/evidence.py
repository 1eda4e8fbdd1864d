"""One pass of the model over plain images feeds every criterion what it asked for; the scores of all channel groups."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .cost import CostModel
from .criterion import Criterion, GroupWeights, MapCriterion, RunCriterion, WeightCriterion, equal_say
from .groups import ChannelGroup, why_protected
from .image_pass import Batch, ImagePass
from .joint import Reader, joint_scores
from .maps import MapSink, covered_places, side_by_side, watched
from .masked import MaskedRuns
from .scores import LayerEvidence, Scored
from .shards import Shards
from .stability import StoppingRule
from .weights import group_weights

# Shape letters: B images, C channels, H W pixels.

RUN_IMAGES = 64
"""How many images masked runs look at where nobody says otherwise."""
ALONE = Shards()
_HELD_BYTES = 2**30


def score_groups(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Criterion,
    batches: Iterable[Tensor],
    *,
    cost: CostModel | None = None,
    stopping: StoppingRule | None = None,
    shards: Shards = ALONE,
    progress: Callable[[int], None] | None = None,
) -> Scored:
    """What `score_all` finds by one criterion, on images without labels. Shapes: batches of (B, 3, H, W)."""
    found = score_all(
        model,
        groups,
        [criterion],
        map(Batch, batches),
        cost=cost,
        stopping=stopping,
        shards=shards,
        progress=progress,
    )
    return found[criterion.name]


def score_all(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criteria: Sequence[Criterion],
    batches: Iterable[Batch],
    *,
    cost: CostModel | None = None,
    stopping: StoppingRule | None = None,
    run_images: int = RUN_IMAGES,
    shards: Shards = ALONE,
    progress: Callable[[int], None] | None = None,
    run_progress: Callable[[float, str], None] | None = None,
) -> dict[str, Scored]:
    """By each criterion's name, the score of every channel of every group that may be cut.

    One pass over the images serves all: maps are scored as they stream by, gradients of the cross-entropy are summed
    over images in the same pass, and the first `run_images` are kept for masked runs. Criteria that need neither touch
    no image.

    Maps are read where the consumers read them: at the input of each convolution or linear that takes the group's
    channels, or, where a global pool lies between, at the pool's input. Consumers that read the very same tensor count
    once. Rule for a group: each consumer's scores, averaged over images, are divided by their mean over the group's
    channels; the group's score is the average over its consumers. So every consumer has the same say, whatever the
    scale of its maps. Other scores stay as they are where the criterion ranks the channels of all groups, and are
    divided by their mean over the group where it does not. Groups that a criterion `lacks` something to judge by have
    no scores by it.

    With a stopping rule, a group whose kept set has become stable is not shown to that criterion any more; gradients
    see every image there is, and the pass ends early only where nobody asked for them. With `shards`, `batches` are
    those of this process (`Shards.own`), and every process returns what one alone would have found on all batches.

    cost: of the dense model; needed where a criterion scores weights or runs.
    progress: is told the images so far; run_progress: the part of the masked runs that is done, and the group.
    Shapes: batches of (B, 3, H, W), on the model's device -> group -> (C,) float64 on the CPU.
    Unit: of map criteria none, 1 is an average channel, 0 a dead one; of others as said above.
    Cost: one forward pass, one backward pass where gradients are asked for, and each criterion's own time; of the maps
    only B x C scores are kept. On a GPU the device is waited for once a batch, by `hrank` more often; every pass is
    computed by kernels that repeat, without TF32, so that no criterion's scores depend on which others are asked for.
    Raises: ValueError naming the layer whose maps, weights or gradients are not finite; ValueError where a criterion
    needs images or labels and there are none.
    """
    wanted = {group.layer: group for group in groups if group.protected is None}
    if not wanted:
        return {criterion.name: Scored({}, {}) for criterion in criteria}
    if cost is None and not all(isinstance(criterion, MapCriterion) for criterion in criteria):
        raise ValueError("criteria that score weights or masked runs need `cost`, the CostModel of the dense network.")
    one_pass = ImagePass(model, wanted, criteria, stopping=stopping, run_images=run_images, shards=shards)
    with _repeatable():
        one_pass.take(batches, progress)
    weights: dict[str, GroupWeights] = {}
    if cost is not None and any(isinstance(criterion, WeightCriterion) for criterion in criteria):
        weights = group_weights(model, groups, cost, gradients=one_pass.summed_gradients())
    found: dict[str, Scored] = {}
    for criterion in criteria:
        match criterion:
            case MapCriterion():
                found[criterion.name] = one_pass.by_maps(criterion)
            case WeightCriterion():
                judged = {layer: of for layer, of in weights.items() if criterion.lacks(of) is None}
                found[criterion.name] = _by_weights(criterion, judged, images=one_pass.images_seen(criterion))
            case RunCriterion():
                masked = MaskedRuns(model, groups, *one_pass.kept_images())
                with _repeatable():
                    found[criterion.name] = _by_runs(criterion, masked, wanted, shards, run_progress)
            case _:
                raise TypeError(f"'{criterion.name}' is no map, weight or run criterion.")
    return found


def judged_groups(
    model: nn.Module, groups: Sequence[ChannelGroup], criteria: Sequence[Criterion], *, cost: CostModel
) -> list[ChannelGroup]:
    """The groups, those of them protected that one of the criteria has nothing to judge by, with what it lacks.

    Raises: ValueError when no group is left to cut; it names the groups and why.
    """
    found = []
    for group in groups:
        weights = group_weights(model, [group], cost)  # one at a time: all together are two copies of the network
        reasons = [
            f"'{criterion.name}' cannot judge it: {reason}"
            for criterion in criteria
            if group.layer in weights and (reason := criterion.lacks(weights[group.layer])) is not None
        ]
        found.append(replace(group, protected=reasons[0]) if reasons else group)
    if all(group.protected for group in found):
        free = any(group.protected is None for group in groups)
        whose = "another criterion or another network" if free else "another network"
        raise ValueError(f"nothing of this network can be cut ({why_protected(found)}). Take {whose}.")
    return found


def joint_groups(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Tensor],
    *,
    progress: Callable[[int], None] | None = None,
) -> Scored:
    """The scores of `joint.joint_scores` for every group that may be cut: of two identical channels one stays.

    The maps of a group's consumers are held at once, so as many groups are taken together as fit into 1 GiB, and the
    model passes over the batches again for the next. Consumers are those of `score_all`.

    Shapes: batches of (B, 3, H, W), on any device -> group -> (C,) float64 on the CPU.
    Unit: none; 1 is an average channel, 0 a dead one.
    Cost: a few passes of the model, and per removed channel a downdate of each image; minutes where `score_all` takes
    seconds.
    Raises: ValueError naming the layer whose maps are not finite.
    """
    wanted = {group.layer: group for group in groups if group.protected is None}
    if not batches:
        raise ValueError("joint scores need images, and there are none. Give at least one batch.")
    covered = covered_places(model, wanted.values())
    images = sum(len(batch) for batch in batches)
    scores: dict[str, Tensor] = {}
    layers: dict[str, LayerEvidence] = {}
    while len(scores) < len(wanted):
        for layer, held in _held(model, [group for group in wanted.values() if group.layer not in scores], batches):
            started = time.perf_counter()
            readers = [Reader(maps, covered[layer, consumer]) for consumer, maps in held.items()]
            scores[layer] = joint_scores(readers, width=wanted[layer].width).cpu()
            layers[layer] = LayerEvidence(images, None, settled=False, seconds=time.perf_counter() - started)
            if progress is not None:
                progress(len(scores))
    return Scored({layer: scores[layer] for layer in wanted}, {layer: layers[layer] for layer in wanted})


def _held(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Sequence[Tensor]
) -> list[tuple[str, dict[str, Tensor]]]:
    """Group, and by consumer its maps over all batches, of as many groups as fit into memory; at least of one."""
    by = "maps"
    sink = MapSink({group.layer: group for group in groups}, {by: _copied}, join=side_by_side)
    images = sum(len(batch) for batch in batches)
    with watched(model, sink):
        _, first = sink.run(model, batches[0])
        fitting: list[str] = []
        held_bytes = 0
        for group in groups:
            own_bytes = sum(maps.nbytes for reading, maps in first.items() if reading.layer == group.layer)
            held_bytes += own_bytes * images // len(batches[0])
            if fitting and held_bytes > _HELD_BYTES:
                break
            fitting.append(group.layer)
        sink.wanted = {by: fitting}
        parts = {reading: [maps] for reading, maps in first.items() if reading.layer in fitting}
        del first
        for batch in batches[1:]:
            for reading, maps in sink.run(model, batch)[1].items():
                parts[reading].append(maps)
    return [
        (layer, {reading.consumer: torch.cat(maps) for reading, maps in parts.items() if reading.layer == layer})
        for layer in fitting
    ]


def _copied(maps_BCP: Tensor, sides: tuple[int, int]) -> Tensor:
    del sides
    return maps_BCP.clone()  # what follows may work in place


def _by_weights(criterion: WeightCriterion, groups: Mapping[str, GroupWeights], *, images: int) -> Scored:
    for weights in groups.values():
        _require_finite(weights)
    started = time.perf_counter()
    raw = criterion.score_weights(groups) if groups else {}
    seconds = (time.perf_counter() - started) / max(1, len(groups))
    scores = {layer: _in_shares(criterion, weights, raw[layer]) for layer, weights in groups.items()}
    evidence = {layer: LayerEvidence(images, None, settled=False, seconds=seconds) for layer in groups}
    return Scored(scores, evidence)


def _by_runs(
    criterion: RunCriterion,
    masked: MaskedRuns,
    groups: Mapping[str, ChannelGroup],
    shards: Shards,
    progress: Callable[[float, str], None] | None,
) -> Scored:
    """Each process plays its share of the groups, all on the same images; what is wrong in one, all hear of."""
    played: dict[str, _Play] | str
    try:
        played = _plays(criterion, masked, groups, list(groups)[shards.rank :: shards.world], progress)
    except ValueError as err:
        if shards.world == 1:
            raise
        played = str(err)
    everything: dict[str, _Play] = {}
    for part in shards.gather(played):
        if isinstance(part, str):
            raise ValueError(part)
        everything |= part
    scores, evidence, strengths = {}, {}, {}
    for layer, group in groups.items():
        importance_C, strengths[layer], seconds = everything[layer]
        scores[layer] = _in_shares(criterion, group, importance_C)
        evidence[layer] = LayerEvidence(len(masked.images), None, settled=False, seconds=seconds)
    return Scored(scores, evidence, strengths)


class _Play(NamedTuple):
    """What the runs of one group gave, and how long they took."""

    importance_C: Tensor
    strength: float
    seconds: float


def _plays(
    criterion: RunCriterion,
    masked: MaskedRuns,
    groups: Mapping[str, ChannelGroup],
    own: Sequence[str],
    progress: Callable[[float, str], None] | None,
) -> dict[str, _Play]:
    played: dict[str, _Play] = {}
    for count, layer in enumerate(own):
        told = None if progress is None else _told(progress, count, len(own), layer)
        started = time.perf_counter()
        found = criterion.score_runs(masked.runs(layer), groups[layer].width, progress=told)
        played[layer] = _Play(found.importance_C.cpu(), found.strength, time.perf_counter() - started)
    return played


def _repeatable() -> AbstractContextManager[None]:
    """Kernels that repeat, and no TF32: gradients, and differences of runs or maps, may be below its rounding."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def _in_shares(criterion: Criterion, group: GroupWeights | ChannelGroup, scores_C: Tensor) -> Tensor:
    """The scores as they are where they rank the channels of all groups, else in shares of the average channel."""
    shape = tuple(scores_C.shape)
    assert shape == (group.width,), f"{criterion.name}: scores of shape {shape} for the {group.width} of {group.layer}"
    if not bool(scores_C.isfinite().all()):
        raise ValueError(
            f"criterion '{criterion.name}' finds no finite score for '{group.layer}': what it was shown of the network "
            "grows beyond all bounds. The network cannot be scored by it; take another criterion."
        )
    scores_C = scores_C.double().cpu()
    return scores_C if criterion.comparable else equal_say(group.width, [(range(group.width), scores_C)])


def _require_finite(weights: GroupWeights) -> None:
    for part in (*weights.producers, *weights.consumers, *weights.scales):
        if not bool(part.values_KN.isfinite().all()):
            raise ValueError(
                f"'{part.layer}' holds a weight that is not finite, so the network cannot be scored. Give weights that "
                "training left finite."
            )


def _told(progress: Callable[[float, str], None], count: int, groups: int, layer: str) -> Callable[[float], None]:
    """What one group's progress means for all of this process's groups."""
    return lambda part: progress((count + part) / groups, layer)
