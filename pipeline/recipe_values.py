"""What a recipe comes to: criteria, budget, rules for widths, images, device, and the type of what is not in 8 bits."""

from __future__ import annotations

import torch

from ..chip.allocate import Budget, Rules
from ..chip.criteria import make_criterion
from ..chip.criterion import Criterion, RunCriterion
from ..export.precision import Rest
from ..export.target import parse_target, width_step
from .device import TENSORRT
from .recipe import Recipe

JOINT_IMAGES = 64  # where the recipe names no number: the joint mode holds the maps of all of them at once
BY_SCORES = ("global", "isomorphic", "interaction")
"""Allocations whose widths are known only when the channels have been scored."""
MOST_REMOVED = 0.9  # of a group where one ranking of all channels might otherwise empty it; no other allocation can


def criteria_of(recipe: Recipe) -> list[Criterion]:
    """The criterion that scores, and the one whose strengths the allocation goes by where that is another."""
    found = [make_criterion(recipe.score.criterion, seed=recipe.seed)]
    if recipe.prune.allocation == "interaction" and not isinstance(found[0], RunCriterion):
        found.append(make_criterion("interactions", seed=recipe.seed))
    return found


def budget_of(recipe: Recipe) -> Budget:
    """How much may be left of the network: the one budget that a recipe without listed ratios has."""
    for kind in ("macs", "params", "ratio"):
        value = getattr(recipe.prune, kind)
        if value is not None:
            return Budget(kind, value)
    raise AssertionError("the recipe has a budget")


def rules_of(recipe: Recipe) -> Rules:
    """What the width of every group keeps to."""
    return Rules(width_multiple(recipe), recipe.prune.min_width, most_removed(recipe))


def width_multiple(recipe: Recipe) -> int:
    """What widths are a multiple of: what the recipe says, or the coarsest step that its targets pay for."""
    specs = [parse_target(text) for text in recipe.targets]
    steps = [width_step(spec, precision) for spec in specs for precision in recipe.export.precision]
    return recipe.prune.round_to or max(steps, default=1)


def most_removed(recipe: Recipe) -> float:
    """The largest share of its channels that a group may lose."""
    asked = recipe.prune
    return asked.max_ratio or (MOST_REMOVED if asked.allocation in BY_SCORES else 1.0)


def most_images(recipe: Recipe) -> int:
    """On how many images channels are scored at most where the recipe names no number."""
    return JOINT_IMAGES if recipe.score.joint else recipe.score.max_images


def score_device(recipe: Recipe) -> torch.device:
    """Where channels are scored.

    Raises: ValueError where a GPU was asked for and none can be used.
    """
    asked = recipe.score.device
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("score.device = 'cuda': torch sees no usable GPU here. Set score.device=cpu.")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def rest_of(recipe: Recipe) -> Rest:
    """The type of what is not quantised: FP16 where TensorRT alone will run it, unless the recipe says which."""
    if recipe.quantize.rest != "auto":
        return recipe.quantize.rest
    return "fp16" if all(parse_target(text).name in TENSORRT for text in recipe.targets) else "fp32"
