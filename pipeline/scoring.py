"""The scores of a run's channels: which images are read, in what order, on which device, and until when."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..chip.criterion import Criterion
from ..chip.evidence import RUN_IMAGES, joint_groups, score_all
from ..chip.groups import ChannelGroup
from ..chip.image_pass import Batch
from ..chip.plan import weights_digest
from ..chip.scores import ChannelScores, Scored
from ..chip.shards import Shards
from ..chip.stability import StoppingRule
from .data import Progress, normalise, shuffled
from .dense import cached_dense, filled_from
from .display import Display
from .prepared import Prepared
from .recipe_values import score_device
from .score_file import read_scores


def scored(ready: Prepared, display: Display, shards: Shards) -> ChannelScores:
    """The scores by the recipe's criterion, and the strengths where its allocation goes by them."""
    recipe = ready.recipe
    found = scored_by(ready, ready.criteria, ready.groups, display.progress, shards)
    own = found[recipe.score.label]
    strengths = next((of.strengths for of in found.values() if of.strengths), {})
    images = max(of.images for of in found.values())
    digest = weights_digest(ready.built.module)
    return ChannelScores(own.scores, recipe.score.label, images, digest, own.layers, strengths)


def scored_by(
    ready: Prepared,
    criteria: Sequence[Criterion],
    groups: Sequence[ChannelGroup],
    progress: Progress,
    shards: Shards,
) -> dict[str, Scored]:
    """By each criterion's name, the scores of those groups, all from one pass; those of the joint mode by its label.

    On images in an order of their own, on the device that the recipe names.
    """
    asked, model = ready.recipe.score, ready.built.module
    alone = [criterion for criterion in criteria if not asked.joint or criterion.name != asked.criterion]
    device = score_device(ready.recipe)
    model.to(device)
    try:
        found = _scored_alone(ready, alone, groups, progress, shards, device) if alone else {}
        if len(alone) < len(criteria):
            found[asked.label] = _scored_jointly(ready, groups, progress, device)
    finally:
        model.to("cpu")
    return found


def preview_scores(ready: Prepared, display: Display) -> ChannelScores:
    """The scores that a dry run's widths follow from. Raises: ValueError where a network has to be trained first."""
    if ready.recipe.score.file is not None:
        return read_scores(ready.recipe, ready.groups, ready.built.module, check_weights=not ready.trains_dense)
    if ready.trains_dense and not filled_from(cached_dense(ready), ready.built.module):
        raise ValueError(
            f"with prune.allocation = '{ready.recipe.prune.allocation}' the widths follow from the scores of a trained "
            "network, and a dry run trains none. Give trained --weights, or --scores, or run without --dry-run."
        )
    display.stage("score")
    return scored(ready, display, Shards())


def _scored_alone(
    ready: Prepared,
    criteria: Sequence[Criterion],
    groups: Sequence[ChannelGroup],
    progress: Progress,
    shards: Shards,
    device: torch.device,
) -> dict[str, Scored]:
    images, labelled = ready.score_images, ready.data.has_accuracy
    return score_all(
        ready.built.module,
        groups,
        criteria,
        (
            Batch(normalise(images.read(indices)).to(device), images.labels[indices] if labelled else None)
            for indices in shards.own(_score_order(ready))
        ),
        cost=ready.cost,
        stopping=_stopping(ready),
        run_images=ready.recipe.score.images or RUN_IMAGES,
        shards=shards,
        progress=lambda n: progress(n / len(images), f"{n} of at most {len(images)} images"),
        run_progress=lambda part, layer: progress(part, f"masked runs of {layer}"),
    )


def _scored_jointly(
    ready: Prepared, groups: Sequence[ChannelGroup], progress: Progress, device: torch.device
) -> Scored:
    free = len([group for group in groups if group.protected is None])
    return joint_groups(
        ready.built.module,
        groups,
        [normalise(ready.score_images.read(indices)).to(device) for indices in _score_order(ready)],
        progress=lambda n: progress(n / free, f"{n} of {free} groups"),
    )


def _score_order(ready: Prepared) -> Sequence[Tensor]:
    """The numbers of the score images, batch by batch."""
    recipe = ready.recipe
    return shuffled(len(ready.score_images), recipe.seed, "score order").split(recipe.score.batch)


def _stopping(ready: Prepared) -> StoppingRule:
    """The rule of the recipe at the planned widths; a fixed number of images is a rule that stops there."""
    asked, images = ready.recipe.score, len(ready.score_images)
    return StoppingRule(
        widths={layer: width for layer, width in (ready.widths or {}).items() if width < _width(ready, layer)},
        overlap=asked.overlap,
        confidence=asked.confidence,
        least=images if asked.images is not None else min(asked.min_images, images),
        most=images,
        seed=ready.recipe.seed,
    )


def _width(ready: Prepared, layer: str) -> int:
    return next(group.width for group in ready.groups if group.layer == layer)
