"""What a comparison of criteria runs: the lists that were asked for, checked, and every cell that they span."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from ..chip.criteria import CRITERIA
from .recipe import ALLOCATIONS, BUDGETS, MeasureSection, PruneSection, Recipe

SEEDS = (0, 1, 2)
BY_BUDGET = tuple(name for name in ALLOCATIONS if name != "list")
COUNTED = {"macs": "of the MACs kept", "params": "of the parameters kept", "ratio": "of the channels removed"}

T = TypeVar("T")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CutBudget(_Part):
    """How much is cut: `macs` and `params` are fractions kept, `ratio` is the fraction of channels removed."""

    kind: Literal["macs", "params", "ratio"]
    value: float

    @property
    def label(self) -> str:
        """`50 % of the MACs kept`."""
        return f"{100 * self.value:.4g} % {COUNTED[self.kind]}"

    @property
    def slug(self) -> str:
        """`macs0.5`, for the name of a file."""
        return f"{self.kind}{self.value:g}"


class Cell(_Part):
    """One run of a comparison: everything but the network and the images, which all cells share.

    seed: of the images that score, recalibrate and recover, of their order, of what is drawn, of the tuning order.
    """

    criterion: str
    allocation: str
    budget: CutBudget
    seed: int

    @property
    def label(self) -> str:
        """`chip, uniform, 50 % of the MACs kept, seed 0`."""
        return f"{self.criterion}, {self.allocation}, {self.budget.label}, seed {self.seed}"


@dataclass(frozen=True)
class Lists:
    """The lists on the command line; None where an option was left out."""

    criteria: tuple[str, ...] | None
    macs: tuple[float, ...] | None
    allocations: tuple[str, ...] | None
    seeds: tuple[int, ...]

    @property
    def overrides(self) -> dict[str, object]:
        """What the first of each list says instead of the recipe, under the recipe's keys."""
        firsts = {
            "score.criterion": self.criteria and self.criteria[0],
            "prune.macs": self.macs and self.macs[0],
            "prune.allocation": self.allocations and self.allocations[0],
        }
        return {key: first for key, first in firsts.items() if first is not None}


@dataclass(frozen=True)
class CriteriaGrid:
    """Every criterion by every allocation at every budget with every seed, of one dense network on one data set.

    recipe: what all cells share; its seed is the dense network's. targets: where latency is measured; none unless
    somebody asked.
    """

    recipe: Recipe
    criteria: tuple[str, ...]
    budgets: tuple[CutBudget, ...]
    allocations: tuple[str, ...]
    seeds: tuple[int, ...]
    targets: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def cells(self) -> list[Cell]:
        """Seed by seed, so that an interrupted comparison has whole seeds."""
        return [Cell(criterion=criterion, allocation=allocation, budget=budget, seed=seed)
            for seed in self.seeds
            for budget in self.budgets
            for allocation in self.allocations
            for criterion in self.criteria]  # fmt: skip

    @property
    def settings(self) -> list[Cell]:
        """The cells of the first seed: every criterion, allocation and budget once."""
        return [cell for cell in self.cells if cell.seed == self.seeds[0]]

    def recipe_of(self, cell: Cell) -> Recipe:
        """What `chip-deploy prune` would be asked for that cell."""
        score = self.recipe.score.model_copy(update={"criterion": cell.criterion})
        prune = _at(self.recipe.prune, cell.budget, cell.allocation)
        return self.recipe.model_copy(update={"score": score, "prune": prune, "seed": cell.seed})

    def dense_recipe(self) -> Recipe:
        """That of the first cell, with the seed of the dense network."""
        return self.recipe_of(self.cells[0]).model_copy(update={"seed": self.recipe.seed})

    def shared(self) -> Recipe:
        """The recipe without what the lists and the measurement decide: the same for all that share a folder."""
        score = self.recipe.score.model_copy(update={"criterion": CRITERIA[0]})
        prune = _at(self.recipe.prune, CutBudget(kind="macs", value=0.5), "uniform")
        update = {"score": score, "prune": prune, "measure": MeasureSection(), "targets": Recipe().targets}
        return self.recipe.model_copy(update=update)


def parse_lists(*, criteria: str | None, macs: str | None, allocation: str | None, seeds: str | None) -> Lists:
    """The lists of the options `--criteria --macs --allocation --seeds`.

    >>> parse_lists(criteria="chip,l1", macs="0.7,0.5", allocation=None, seeds="0").macs
    (0.7, 0.5)

    Raises: ValueError for an empty list, what is named twice, or what there is not.
    """
    found = _list("--criteria", criteria, lambda name: _known("criterion", name, CRITERIA), "chip,l1")
    return Lists(
        found,
        _list("--macs", macs, _fraction, "0.7,0.5,0.3"),
        _list("--allocation", allocation, lambda name: _known("allocation", name, BY_BUDGET), "uniform,interaction"),
        _list("--seeds", seeds, _seed, "0,1,2") or SEEDS,
    )


def make_grid(recipe: Recipe, lists: Lists) -> CriteriaGrid:
    """What that recipe and those lists ask for; nothing is tuned where the recipe does not say how long.

    Without a list: every criterion there is, the recipe's budget and allocation, the seeds 0, 1, 2. The recipe must be
    loaded with `lists.overrides`.
    Raises: ValueError for what cannot be compared.
    """
    criteria = lists.criteria or CRITERIA
    _require_comparable(recipe, criteria)
    notes = []
    if lists.criteria is None and "criterion" in recipe.score.model_fields_set:
        notes.append(f"score.criterion = '{recipe.score.criterion}' is not used: every criterion is compared.")
    if "epochs" not in recipe.tune.model_fields_set:
        recipe = recipe.model_copy(update={"tune": recipe.tune.model_copy(update={"epochs": 0})})
        notes.append("nothing is tuned, since nobody said for how long (tune.epochs).")
    targets = recipe.targets if "targets" in recipe.model_fields_set else ()
    if not targets:
        notes.append("no latency is measured, since no --target was named.")
    return CriteriaGrid(
        recipe,
        criteria,
        _budgets(recipe, lists.macs),
        lists.allocations or (recipe.prune.allocation,),
        lists.seeds,
        targets,
        tuple(notes),
    )


def _require_comparable(recipe: Recipe, criteria: Sequence[str]) -> None:
    """Raises: ValueError for settings of one criterion's own, and for those that leave nothing to compare at."""
    if recipe.score.file is not None:
        raise ValueError(
            f"score.file = '{recipe.score.file}' holds scores of one criterion and seed, and a comparison makes its "
            "own. Leave it out."
        )
    if recipe.score.joint and tuple(criteria) != ("chip",):
        others = ", ".join(name for name in criteria if name != "chip")
        raise ValueError(
            f"score.joint = true is a mode of 'chip' alone, and {others} would be compared as well. Give --criteria "
            "chip, or leave it out."
        )
    if recipe.export.precision != Recipe().export.precision:
        raise ValueError(
            f"export.precision = {', '.join(recipe.export.precision)}: a comparison of criteria times fp32 alone. "
            "Leave it out, and give the precision to `chip-deploy prune`."
        )
    if recipe.prune.layer_ratios:
        raise ValueError(
            "prune.layer_ratios gives every layer its own ratio, and a comparison shares out budgets. Give --macs "
            "0.7,0.5,0.3 instead."
        )
    if not recipe.prune.budgets:
        raise ValueError("no budget was given. Give --macs 0.7,0.5,0.3, or one budget in the recipe.")


def _budgets(recipe: Recipe, macs: Sequence[float] | None) -> tuple[CutBudget, ...]:
    if macs is not None:
        return tuple(CutBudget(kind="macs", value=value) for value in macs)
    (kind,) = recipe.prune.budgets
    return (CutBudget.model_validate({"kind": kind, "value": getattr(recipe.prune, kind)}),)


def _at(prune: PruneSection, budget: CutBudget, allocation: str) -> PruneSection:
    return prune.model_copy(
        update={**dict.fromkeys(BUDGETS), budget.kind: budget.value, "allocation": allocation, "layer_ratios": {}}
    )


def _list(option: str, text: str | None, parsed: Callable[[str], T], example: str) -> tuple[T, ...] | None:
    """The values between the commas, or None where the option was left out."""
    if text is None:
        return None
    values: list[T] = []
    for part in text.split(","):
        if not part.strip():
            raise ValueError(f"{option} '{text}': a value is missing. Give them with commas, for example {example}.")
        try:
            value = parsed(part.strip())
        except ValueError as err:
            raise ValueError(f"{option} '{text}': {err}") from err
        if value in values:
            raise ValueError(f"{option} '{text}': {part.strip()} is named twice. Name each value once.")
        values.append(value)
    return tuple(values)


def _known(kind: str, name: str, known: Sequence[str]) -> str:
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, 1, cutoff=0.4)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"unknown {kind} '{name}'.{hint} Available: {', '.join(known)}.")
    return name


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise ValueError(f"'{text}' is no fraction of the MACs to keep, above 0 and below 1. Give 0.5, for example.")
    return value


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) >= 2**32:
        raise ValueError(f"'{text}' is no seed; a whole number from 0 to {2**32 - 1} is expected.")
    return int(text)
