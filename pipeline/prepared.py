"""A run before any work: its network, images and targets, looked at, and what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path

import torch
from torch import Tensor

from ..chip.allocate import Rules, allocate, kept_channels, listed_widths, require_reachable
from ..chip.cost import CostModel
from ..chip.criterion import Criterion
from ..chip.evidence import judged_groups
from ..chip.groups import ChannelGraph, ChannelGroup
from ..chip.plan import PrunePlan, make_plan, weights_digest
from ..chip.scores import ChannelScores
from ..chip.surgery import apply_plan, prove
from ..export.target import Target, left_out_options, parse_target, require_effect, require_usable
from ..export.targets import make_target
from .data import DataSet, Images, default_size, normalise, open_data
from .display import Display
from .journal import digest_of
from .models import BuiltModel, build_model, load_weights
from .provenance import source_digest
from .recipe import Recipe
from .recipe_values import BY_SCORES, budget_of, criteria_of, most_images, rules_of, score_device
from .refusals import (
    require_data_for_8_bits,
    require_free_batch,
    require_labels,
    require_left_out,
    require_no_turing_products,
    require_precisions,
    require_shapes,
    require_weights,
)
from .score_file import read_scores, require_score_file


@dataclass
class Prepared:
    """Everything that can be known, and refused, before any work starts.

    criteria: the one that scores the channels, and where the allocation goes by another one's strengths, that one too.
    widths: how many channels each group keeps; None where the scores will decide.
    """

    recipe: Recipe
    targets: list[Target]
    built: BuiltModel
    data: DataSet
    example: Tensor
    criteria: list[Criterion]
    found_groups: list[ChannelGroup]
    """As the network has them, whatever the criteria can judge."""
    groups: list[ChannelGroup]
    cost: CostModel
    rules: Rules
    widths: dict[str, int] | None
    score_images: Images
    test: Images
    network: str
    """Digest of the dense network as it is before any weights are loaded, and of the user's code behind it."""

    @property
    def engines(self) -> list[tuple[Target, str]]:
        """Each target with each of the precisions that it takes."""
        asked = product(self.targets, self.recipe.export.precision)
        return [(target, precision) for target, precision in asked if not target.refuses(precision)]

    @property
    def left_out(self) -> list[str]:
        """For each precision or build option that a target does not take while another does: that it is left out."""
        asked = product(self.targets, self.recipe.export.precision)
        refused = [(target.spec, precision, target.refuses(precision)) for target, precision in asked]
        precisions = [f"{what} is left out for target '{spec}': {why}" for spec, what, why in refused if why]
        options = [left_out_options(target, self.recipe.build) for target in self.targets]
        return [*precisions, *chain.from_iterable(options)]

    @property
    def trains_dense(self) -> bool:
        """Whether the dense model has to be trained first."""
        return self.recipe.model.weights is None and self.data.has_accuracy


def prepare(
    recipe: Recipe,
    display: Display,
    *,
    needs_cut: bool = True,
    needs_engines: bool = True,
    admit: Callable[[DataSet], None] | None = None,
) -> Prepared:
    """The network and its images, looked at before any work: what cannot be is refused here.

    needs_cut: nothing is cut without it, and no budget is looked at. needs_engines: the targets must be usable.
    admit: is shown the images before the network is built, and may refuse them.
    Raises: as `prune`, and what `admit` raises.
    """
    display.stage("prepare")
    targets = made_targets(recipe)
    if needs_cut and needs_engines:
        require_effect(targets, recipe.build)
        for target in [*targets, reference_target()]:
            require_usable(target)
        require_precisions(targets, recipe.export.precision)
    require_free_batch(recipe)
    if recipe.model.weights is not None and not Path(recipe.model.weights).is_file():
        raise FileNotFoundError(f"{recipe.model.weights}: no such weights file. Check --weights.")
    if recipe.score.file is not None:
        require_score_file(Path(recipe.score.file))
    size = recipe.data.size or default_size(recipe.model.name, recipe.data.name)
    data = open_data(recipe.data.name, size=size, seed=recipe.seed, progress=display.progress)
    if admit is not None:
        admit(data)
    criteria = criteria_of(recipe)
    if recipe.score.file is None:
        score_device(recipe)
    require_labels(recipe, criteria, data)
    built = build_network(recipe, data)
    require_weights(recipe, data)
    if needs_cut:
        require_data_for_8_bits(recipe, targets, data)
        require_no_turing_products(recipe, targets, built.module)
    network = digest_of(weights_digest(built.module), source_digest(recipe.model.name))
    if recipe.model.weights is not None:
        load_weights(built.module, recipe.model.weights)
    example = normalise(data.test.read(torch.arange(1)))
    if needs_cut and needs_engines:
        require_shapes(recipe, targets, example)
    if needs_cut:
        require_left_out(recipe, built.module, example)
    cost = CostModel(built.module, example)
    found = ChannelGraph(built.module, example).groups
    groups = judged_groups(built.module, found, criteria, cost=cost)
    rules = rules_of(recipe)
    widths = _early_widths(recipe, groups, cost, rules) if needs_cut else {}
    ready = Prepared(
        recipe,
        targets,
        built,
        data,
        example,
        criteria,
        found,
        groups,
        cost,
        rules,
        widths,
        _sampled(data.train, recipe.score.images, recipe.seed, "score.images", otherwise=most_images(recipe)),
        _sampled(data.test, recipe.data.eval_images, recipe.seed, "data.eval_images", otherwise=len(data.test)),
        network,
    )
    for sentence in ready.left_out:
        display.note(sentence)
    if recipe.score.file is not None:
        read_scores(recipe, groups, built.module, check_weights=not ready.trains_dense)
    if needs_cut:
        display.progress(0.8, "proving that this network can be cut")
        trial = _trial_plan(ready)
        apply_plan(built.module, trial, example)
        prove(built.module, trial, example, seed=recipe.seed)
    return ready


def made_targets(recipe: Recipe) -> list[Target]:
    """The recipe's targets, each with the build options that it takes.

    Raises: ValueError for an unknown target, or shapes that are misspelt.
    """
    bare = [make_target(parse_target(text)) for text in recipe.targets]
    return [
        make_target(target.spec, threads=recipe.measure.threads, options=target.taken(recipe.build)) for target in bare
    ]


def variant(ready: Prepared, recipe: Recipe) -> Prepared:
    """The same network and test images for a recipe with another criterion, budget, allocation or seed.

    Raises: ValueError where the criterion can judge no group, or the budget cannot be met.
    """
    criteria, groups = criteria_of(recipe), ready.groups
    if [each.name for each in criteria] != [each.name for each in ready.criteria]:
        groups = judged_groups(ready.built.module, ready.found_groups, criteria, cost=ready.cost)
    rules = rules_of(recipe)
    images = _sampled(ready.data.train, recipe.score.images, recipe.seed, "score.images", otherwise=most_images(recipe))
    return replace(
        ready,
        recipe=recipe,
        criteria=criteria,
        groups=groups,
        rules=rules,
        widths=_early_widths(recipe, groups, ready.cost, rules),
        score_images=images,
    )


def widths_by_scores(ready: Prepared, found: ChannelScores) -> dict[str, int]:
    """The width of every group where the scores decide about it."""
    return allocate(
        ready.groups,
        ready.cost,
        budget_of(ready.recipe),
        ready.rules,
        way=ready.recipe.prune.allocation,
        scores={layer: vector.tolist() for layer, vector in found.scores.items()},
        strengths=found.strengths,
    )


def plan_at(ready: Prepared, widths: Mapping[str, int], scores: Mapping[str, Sequence[float]]) -> PrunePlan:
    """The plan that keeps the best channels of every group at its width."""
    kept = {
        group.layer: kept_channels(group, widths[group.layer], scores[group.layer])
        for group in ready.groups
        if group.layer in widths
    }
    return make_plan(
        ready.built.module,
        ready.groups,
        kept,
        cost=ready.cost,
        name=ready.recipe.model.name,
        num_classes=ready.built.num_classes,
        input_shape=ready.example.shape[1:],
        criterion=ready.recipe.score.criterion,
        round_to=ready.rules.round_to,
        min_width=ready.rules.min_width,
    )


def build_network(recipe: Recipe, data: DataSet) -> BuiltModel:
    """The dense network that the recipe names, with as many outputs as its images have classes."""
    classes = data.n_classes if data.has_accuracy else None
    return build_model(recipe.model.name, num_classes=classes, seed=recipe.seed, size=data.size)


def reference_target() -> Target:
    """onnxruntime on this CPU: what every exported network is compared on."""
    return make_target(parse_target("ort-cpu"), threads=1)


def _early_widths(
    recipe: Recipe, groups: Sequence[ChannelGroup], cost: CostModel, rules: Rules
) -> dict[str, int] | None:
    """The widths where the recipe and the structure settle them; None, and a budget in reach, where scores will."""
    if recipe.prune.layer_ratios:
        return listed_widths(groups, recipe.prune.layer_ratios, rules)
    way = recipe.prune.allocation
    if way in BY_SCORES:
        require_reachable(groups, cost, budget_of(recipe), rules, way=way)
        return None
    return allocate(groups, cost, budget_of(recipe), rules, way=way)


def _trial_plan(ready: Prepared) -> PrunePlan:
    """A plan for proving that the network can be cut: at the widths that are known, or those of channels all alike."""
    free = {group.layer: group.width for group in ready.groups if group.protected is None}
    alike = {layer: torch.zeros(width, dtype=torch.float64) for layer, width in free.items()}
    no_scores = ChannelScores(alike, "", 0, "", strengths=dict.fromkeys(free, 1.0))
    widths = ready.widths if ready.widths is not None else widths_by_scores(ready, no_scores)
    return plan_at(ready, widths, {layer: [-float(channel) for channel in range(free[layer])] for layer in widths})


def _sampled(images: Images, n: int | None, seed: int, what: str, *, otherwise: int) -> Images:
    return images.sample(min(otherwise, len(images)) if n is None else n, seed=seed, what=what)
