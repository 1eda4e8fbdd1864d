"""Criteria side by side: one dense network cut by each criterion, allocation, budget and seed, on one test set."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from ..chip.criteria import CRITERIA, make_criterion
from ..chip.groups import CannotCut
from ..chip.plan import PrunePlan, weights_digest
from ..chip.scores import ChannelScores, Scored
from ..chip.shards import Shards, processes
from ..chip.surgery import SurgeryRefused, apply_plan, prove
from ..export.bundle import WORK, write_atomic, write_json_atomic
from ..export.machine import read_machine
from . import quantities
from .alone import alone_in
from .criteria_grid import Cell, CriteriaGrid
from .criteria_latency import Structure, measure_structures
from .criteria_page import PAGES, write_pages
from .criteria_result import (
    CellAccuracy,
    CellResult,
    CriteriaComparison,
    DenseNetwork,
    criteria_rows,
    paired_rows,
)
from .data import DataSet
from .dense import dense_stage
from .display import Display
from .journal import Journal, StageResult, digest_of
from .prepared import Prepared, plan_at, prepare, variant, widths_by_scores
from .provenance import source_digest, versions
from .recipe import Recipe
from .recipe_values import most_removed, score_device, width_multiple
from .refusals import needs_labels
from .run_folder import require_folder
from .scoring import scored_by
from .stages import recover_pruned
from .tune import TrainingDiverged, evaluate, recalibrate, train
from .wording import plural

ASKED = "asked.json"
CELLS, SCORES, LATENCY = "cells", "scores", "latency"
OURS = (*PAGES, CELLS, SCORES, LATENCY, WORK, ASKED)
"""Everything that this command writes into its folder; what says whose folder it is goes last."""
COMPUTING = (
    "chip-deploy", "torch", "torchvision", "timm", "torch-pruning", "lightning", "numpy", "numba", "scipy", "pillow",
)  # fmt: skip
"""Packages whose version may change a network, an image, a score or an accuracy."""
CELL_FAILURES = (TrainingDiverged, SurgeryRefused, CannotCut, ValueError)

CURVES = ("loss", "interaction", "cross_entropy")
"""Of a recovery's record, what a cell leaves out: a value for every step."""

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class _Place:
    """A cell, what it is cut by, where its result lies, and the digest of all that decides about it."""

    cell: Cell
    ready: Prepared
    key: str
    path: Path

    @property
    def label(self) -> str:
        """`chip uniform macs0.5 seed 0`, for a bar."""
        cell = self.cell
        return f"{cell.criterion} {cell.allocation} {cell.budget.slug} seed {cell.seed}"


def compare_criteria(
    grid: CriteriaGrid, out: Path, *, resume: bool, display: Display, command: str = ""
) -> CriteriaComparison:
    """Every cell of the grid, its tables and its plot, in the folder `out`.

    The dense network is prepared once. Every seed scores all criteria in one pass over images of its own, as
    `chip-deploy score` does: until what is kept at 70, 50 and 30 % of each group is stable, whatever the budgets. Each
    cell is a file that depends on no other: with resume=True those that are there, also from another folder, are used.
    Latency is measured once for each set of widths, on the network of the first cell that ended with it, after
    everything else: the pages are there by then, and written again with it.

    Raises: ValueError and FileNotFoundError for what the user can put right, before any work where it can be known;
    TargetUnavailable; CannotCut, SurgeryRefused and TrainingDiverged, naming the cell. Finished cells stay.
    """
    if processes() > 1:
        raise ValueError("compare-criteria is one process. Run it without torchrun.")
    _require_own_folder(out, grid, resume=resume)
    ready = prepare(
        grid.dense_recipe(),
        display,
        needs_engines=bool(grid.targets),
        admit=lambda data: _require_labels(grid, data),
    )
    for cell in grid.settings:
        variant(ready, grid.recipe_of(cell))
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        if not resume:
            _clear(out)
        write_json_atomic(out / ASKED, _asked(grid))
        try:
            return _run(grid, ready, out, display, command)
        except (ValueError, FileNotFoundError, CannotCut, SurgeryRefused):
            if not any(path.is_file() for name in (CELLS, SCORES) for path in (out / name).glob("*")):
                # What is found wrong later costs no finished work.
                _clear(out)
                if not existed:
                    shutil.rmtree(out)
            raise


def _run(grid: CriteriaGrid, ready: Prepared, out: Path, display: Display, command: str) -> CriteriaComparison:
    for name in (CELLS, SCORES):
        (out / name).mkdir(exist_ok=True)
    journal = Journal(out / WORK, display, versions=versions())
    dense = dense_stage(ready, journal)
    places = _places(grid, ready, out)
    found = {place.key: result for place in places if (result := _read_cell(place)) is not None}
    missing = [place for place in places if place.key not in found]
    if found and missing:
        display.note(f"{len(found)} of {len(places)} cells are there already.")
    if missing:
        scores = _score_stage(ready, missing, out, display)
        display.stage("cells")
        started = perf_counter()
        for number, place in enumerate(missing):
            left = _time_left(perf_counter() - started, number, len(missing))
            what = f"{number + 1}/{len(missing)}{left}: {place.label}"
            progress = _part(display.progress, number, len(missing), what)
            with _naming(place.cell):
                found[place.key] = _made_cell(place, scores[place.cell.seed], out, progress)
    comparison = _comparison(grid, ready, dense, [found[place.key] for place in places], command)
    if grid.targets:
        notes = [*comparison.notes, "latency has not been measured yet."]
        write_pages(comparison.model_copy(update={"notes": notes}), out)
        structures = _structures(grid, places, found, out, display)
        latencies = measure_structures(structures, out / LATENCY, display, seed=grid.recipe.seed)
        comparison = comparison.model_copy(update={"latencies": latencies})
    display.stage("report")
    write_pages(comparison, out)
    return comparison


def _time_left(passed_s: float, done: int, total: int) -> str:
    """`, 12 min 05 s left`, as far as the cells so far can tell; nothing before the first is done."""
    return f", {quantities.seconds(passed_s / done * (total - done))} left" if done else ""


@contextlib.contextmanager
def _naming(cell: Cell) -> Iterator[None]:
    """What fails in the block says in which cell. Raises: one of CELL_FAILURES, whose subclasses become it."""
    try:
        yield
    except CELL_FAILURES as err:
        kind = next(kind for kind in CELL_FAILURES if isinstance(err, kind))
        raise kind(f"{cell.label}: {err}") from err


# -- before any work ---------------------------------------------------------------------------------------------------


def _require_labels(grid: CriteriaGrid, data: DataSet) -> None:
    """Raises: ValueError where the images have no labels and a criterion, the allocation or the tuning needs them."""
    if data.has_accuracy:
        return
    needing = {name for name in CRITERIA if needs_labels(make_criterion(name))}
    refused = [name for name in grid.criteria if name in needing]
    if refused:
        able = ",".join(name for name in CRITERIA if name not in needing)
        raise ValueError(
            f"{_named('criterion', 'criteria', refused)} labels, and the images of '{data.name}' have none. Give "
            f"labelled --data, or those that do without: --criteria {able}."
        )
    if "interaction" in grid.allocations:
        raise ValueError(
            f"allocation 'interaction' needs labels, and the images of '{data.name}' have none. Give labelled --data, "
            "or another --allocation."
        )
    if grid.recipe.tune.epochs:
        raise ValueError(
            f"tune.epochs = {grid.recipe.tune.epochs} needs labels, and the images of '{data.name}' have none. Give "
            "labelled --data, or leave it out."
        )


def _named(one: str, many: str, names: Sequence[str]) -> str:
    """`criterion 'a' needs`, `criteria 'a', 'b' need`."""
    quoted = ", ".join(f"'{name}'" for name in names)
    return f"{one} {quoted} needs" if len(names) == 1 else f"{many} {quoted} need"


# -- the folder --------------------------------------------------------------------------------------------------------


def _asked(grid: CriteriaGrid) -> dict[str, Any]:
    """What the folder is for: the shared recipe, with what its widths are a multiple of, and the lists."""
    recipe = grid.shared()
    # Targets come and go, and what they pay for decides about widths where the recipe does not.
    prune = recipe.prune.model_copy(update={"round_to": width_multiple(grid.recipe)})
    return {
        "schema": "chip-deploy.criteria-asked/1",
        "recipe": recipe.model_copy(update={"prune": prune}).model_dump(mode="json"),
        "lists": {
            "criteria": list(grid.criteria),
            "budgets": [budget.model_dump() for budget in grid.budgets],
            "allocations": list(grid.allocations),
            "seeds": list(grid.seeds),
        },
    }


def _require_own_folder(out: Path, grid: CriteriaGrid, *, resume: bool) -> None:
    """Raises: ValueError, NotADirectoryError, PermissionError for a folder that is somebody else's, or cannot be."""
    require_folder(out)
    present = {path.name for path in out.iterdir()} - {f".{ASKED}.part"} if out.exists() else set()
    if not present or (resume and present <= {CELLS, SCORES}):
        return
    before = _read_asked(out / ASKED)
    if before is None:
        raise ValueError(
            f"{out} is not empty and holds no comparison of criteria. Give another --out, or empty it; a folder with "
            f"nothing but {CELLS}/ and {SCORES}/ can be used with --resume."
        )
    asked = _asked(grid)
    _require_same_recipe(out, before.get("recipe"), asked["recipe"])
    if resume:
        return
    if before != asked:
        raise ValueError(
            f"{out} holds a comparison of other criteria, budgets, allocations or seeds. Add --resume, which keeps its "
            "cells, or give another --out."
        )
    others = _cells_besides(out / CELLS, grid)
    if others:
        raise ValueError(
            f"{out} holds {plural(others, 'cell')} of other criteria, budgets, allocations or seeds as well, and would "
            "lose them. Add --resume, which keeps them, or give another --out."
        )


def _require_same_recipe(out: Path, before: Any, asked: dict[str, Any]) -> None:
    """Raises: ValueError, naming the multiple of the widths where it is all that differs."""
    if before == asked or _with_defaults(before) == asked:
        return
    prune = before.get("prune") if isinstance(before, dict) else None
    step, wanted = prune.get("round_to") if isinstance(prune, dict) else None, asked["prune"]["round_to"]
    if step is not None and before == {**asked, "prune": {**asked["prune"], "round_to": step}}:
        raise ValueError(
            f"{out} holds cells whose widths are multiples of {step}, and multiples of {wanted} are asked for now, by "
            f"the targets or by prune.round_to; no cell would serve. Set prune.round_to={step}, or give another --out."
        )
    raise ValueError(f"{out} holds a comparison by another recipe. Give another --out, or remove {out}.")


def _with_defaults(before: Any) -> dict[str, Any] | None:
    """A recipe that an earlier version wrote, with what it did not know yet; None where it cannot be one."""
    try:
        return Recipe.model_validate(before).model_dump(mode="json")
    except ValidationError:
        return None


def _cells_besides(folder: Path, grid: CriteriaGrid) -> int:
    """How many results lie there of cells that this grid does not have."""
    asked = set(grid.cells)
    found = [_cell_in(path) for path in folder.glob("*.json")]
    return sum(result is not None and result.cell not in asked for result in found)


def _read_asked(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == "chip-deploy.criteria-asked/1" else None


def _clear(out: Path) -> None:
    """Remove what this command wrote there, and nothing else."""
    for name in OURS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# -- cells -------------------------------------------------------------------------------------------------------------


def _places(grid: CriteriaGrid, ready: Prepared, out: Path) -> list[_Place]:
    """Every cell with its key; the dense network must hold its weights."""
    shared = _shared_inputs(ready)
    places, near = [], {}
    for cell in grid.cells:
        # From one by the same criterion, whose groups have been looked at already.
        own = variant(near.get((cell.criterion, cell.allocation), ready), grid.recipe_of(cell))
        near[cell.criterion, cell.allocation] = own
        key = digest_of("chip-deploy.criteria-cell/1", shared, _score_inputs(own), _cut_inputs(own))
        name = f"{cell.criterion}-{cell.allocation}-{cell.budget.slug}-seed{cell.seed}-{key[:16]}.json"
        places.append(_Place(cell, own, key, out / CELLS / name))
    return places


def _shared_inputs(ready: Prepared) -> dict[str, Any]:
    """What all cells depend on: the dense network, the images, the versions, and the kind of device."""
    recipe, known = ready.recipe, versions()
    return {
        "model": recipe.model.name,
        "code": source_digest(recipe.model.name),
        "dense": weights_digest(ready.built.module),
        "data": ready.data.digest,
        "flip": ready.data.flip,
        "size": ready.data.size,
        "versions": {name: known[name] for name in COMPUTING if name in known},
        "cuda": torch.cuda.is_available(),
        "test": [recipe.data.eval_images, recipe.seed],
    }


def _score_inputs(ready: Prepared) -> dict[str, Any]:
    """What scores depend on besides."""
    asked = ready.recipe.score.model_dump(exclude={"device", "file"})
    return {"score": asked, "device": score_device(ready.recipe).type, "seed": ready.recipe.seed}


def _cut_inputs(ready: Prepared) -> dict[str, Any]:
    """What a cell depends on besides: how it is cut, and what is done about it."""
    prune, tune = ready.recipe.prune, ready.recipe.tune
    return {
        "prune": {"macs": prune.macs, "params": prune.params, "ratio": prune.ratio, "allocation": prune.allocation},
        "rules": asdict(ready.rules),
        "tune": tune.model_dump(),
        "code": source_digest(tune.train or ""),
    }


def _read_cell(place: _Place) -> CellResult | None:
    """The cell's result, if it was made from the very same things."""
    found = _cell_in(place.path)
    return found if found is not None and (found.key, found.cell) == (place.key, place.cell) else None


def _cell_in(path: Path) -> CellResult | None:
    """The result in that file; a damaged one counts as none."""
    try:
        return CellResult.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError, ValidationError):
        return None


def _made_cell(place: _Place, scores: Mapping[str, Scored], out: Path, progress: Progress) -> CellResult:
    """One cell: widths, plan, cut, proof, and the accuracy after each thing that is done about it."""
    started = perf_counter()
    ready = place.ready
    scored = _channel_scores(ready, scores)
    widths = ready.widths if ready.widths is not None else widths_by_scores(ready, scored)
    plan = plan_at(ready, widths, {layer: vector.tolist() for layer, vector in scored.scores.items()})
    dense = ready.built.module
    pruned = apply_plan(dense, plan, ready.example)
    gap = prove(dense, plan, ready.example, seed=ready.recipe.seed)
    accuracy, recovery = _judged(place, plan, pruned, out / WORK / f"tune-{place.key[:16]}", progress)
    every = {group.layer: widths.get(group.layer, group.width) for group in ready.groups}
    result = CellResult(
        key=place.key,
        cell=place.cell,
        accuracy=accuracy,
        macs=plan.macs_after,
        params=plan.params_after,
        widths=every,
        structure=digest_of(every)[:16],
        proof_gap=gap,
        images=scored.images,
        recovery=recovery,
        seconds=round(perf_counter() - started, 3),
    )
    write_json_atomic(place.path, result)
    return result


def _judged(
    place: _Place, plan: PrunePlan, pruned: nn.Module, work: Path, progress: Progress
) -> tuple[CellAccuracy, dict[str, Any] | None]:
    """Accuracy after the cut, and after recalibration, recovery and tuning where they were done."""
    ready, tune = place.ready, place.ready.recipe.tune
    train_set = ready.data.train
    if not ready.data.has_accuracy:
        return CellAccuracy(n=0), None
    steps = 3 + 2 * (tune.recover is not None) + 2 * (tune.epochs > 0)
    step = (_part(progress, number, steps) for number in range(steps))

    def top1() -> float:
        return evaluate(pruned, ready.test, progress=next(step)).top1

    after: dict[str, float] = {"cut": top1()}
    n, seed = min(tune.recalibrate_images, len(train_set)), ready.recipe.seed
    if recalibrate(pruned, train_set, n=n, batch=tune.batch, seed=seed, progress=next(step)):
        after["recalibrated"] = top1()
    recovery = None
    if tune.recover is not None:
        recovery = recover_pruned(pruned, ready, plan, next(step)).model_dump(exclude={"seconds", *CURVES})
        after["recovered"] = top1()
    if tune.epochs:
        teacher = ready.built.module if tune.distill > 0 else None
        train(pruned, ready.data, tune, seed=seed, work=work, teacher=teacher, progress=next(step))
        shutil.rmtree(work, ignore_errors=True)
        after["tuned"] = top1()
    return CellAccuracy(n=len(ready.test), **after), recovery


# -- scores ------------------------------------------------------------------------------------------------------------


def _score_stage(
    ready: Prepared, missing: Sequence[_Place], out: Path, display: Display
) -> dict[int, dict[str, Scored]]:
    """Seed -> criterion -> scores, of all that the missing cells need: read, or made in one pass a seed and kept."""
    display.stage("score")
    shared = _shared_inputs(ready)
    seeds = list(dict.fromkeys(place.cell.seed for place in missing))
    return {
        seed: _scored_with(
            [place for place in missing if place.cell.seed == seed],
            shared,
            out / SCORES,
            _part(display.progress, number, len(seeds), f"seed {seed}"),
        )
        for number, seed in enumerate(seeds)
    }


def _scored_with(
    places: Sequence[_Place], shared: Mapping[str, Any], folder: Path, progress: Progress
) -> dict[str, Scored]:
    """By each criterion's name, or its label in the joint mode, the scores of one seed."""
    files, wanted = {}, {}
    for place in places:
        for criterion in place.ready.criteria:
            one = place.ready.recipe.score.model_copy(update={"criterion": criterion.name})
            joint = one.joint and criterion.name == place.cell.criterion
            inputs = _score_inputs(place.ready) | {"score": one.model_dump(exclude={"device", "file"})}
            label = one.label if joint else criterion.name
            own_name = f"{criterion.name}-seed{place.cell.seed}-{digest_of(shared, inputs)[:16]}.safetensors"
            files[label] = folder / own_name
            wanted[label] = criterion
    found = {label: scored for label, path in files.items() if (scored := _read_scores(path, label)) is not None}
    fresh = [criterion for label, criterion in wanted.items() if label not in found]
    if fresh:
        ready = replace(places[0].ready, widths=None)  # judged as where no width is planned
        made = scored_by(ready, fresh, ready.found_groups, progress, Shards())
        digest = weights_digest(ready.built.module)
        for label, scored in made.items():
            kept = ChannelScores(scored.scores, label, scored.images, digest, scored.layers, scored.strengths)
            write_atomic(files[label], kept.to_bytes())
        found |= made
    return found


def _read_scores(path: Path, label: str) -> Scored | None:
    """The scores in that file; None where there is none, or it is damaged."""
    try:
        found = ChannelScores.from_file(str(path))
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return None
    if found.criterion != label:
        return None
    return Scored(dict(found.scores), dict(found.layers), dict(found.strengths))


def _channel_scores(ready: Prepared, found: Mapping[str, Scored]) -> ChannelScores:
    """What the cell's criterion found, and the strengths where its allocation goes by another one's."""
    asked = ready.recipe.score
    scored = found[asked.label]
    by_name = [
        found[asked.label if criterion.name == asked.criterion else criterion.name] for criterion in ready.criteria
    ]
    strengths = next((of.strengths for of in by_name if of.strengths), {})
    digest = weights_digest(ready.built.module)
    return ChannelScores(scored.scores, asked.label, scored.images, digest, scored.layers, strengths)


# -- the result --------------------------------------------------------------------------------------------------------


def _structures(
    grid: CriteriaGrid, places: Sequence[_Place], found: Mapping[str, CellResult], out: Path, display: Display
) -> list[Structure]:
    """Every set of widths that the cells ended with, once, as the network of the first such cell, budget by budget.

    The channels that it keeps follow from its scores, which are made again where the folder has cells alone.
    """
    firsts: dict[str, _Place] = {}
    for place in places:
        firsts.setdefault(found[place.key].structure, place)
    order = {(budget, way): n for n, (budget, way) in enumerate(product(grid.budgets, grid.allocations))}
    ordered = sorted(firsts.items(), key=lambda item: order[item[1].cell.budget, item[1].cell.allocation])
    scores = _score_stage(places[0].ready, list(firsts.values()), out, display)
    return [
        Structure(name, _plan_of(place, found[place.key], scores[place.cell.seed]), place.ready)
        for name, place in ordered
    ]


def _plan_of(place: _Place, result: CellResult, scores: Mapping[str, Scored]) -> PrunePlan:
    """The plan that the cell was cut by."""
    free = [group.layer for group in place.ready.groups if group.protected is None]
    scored = _channel_scores(place.ready, scores)
    widths = {layer: result.widths[layer] for layer in free}
    return plan_at(place.ready, widths, {layer: vector.tolist() for layer, vector in scored.scores.items()})


def _comparison(
    grid: CriteriaGrid, ready: Prepared, dense: StageResult, cells: list[CellResult], command: str
) -> CriteriaComparison:
    recipe, model = grid.recipe, ready.recipe.model
    n = len(ready.test) if ready.data.has_accuracy else 0
    network = DenseNetwork(
        accuracy=dense.facts["accuracy"], n=n, macs=ready.cost.dense.macs, params=ready.cost.dense.params
    )
    against = "uniform" if "uniform" in grid.allocations else grid.allocations[0]
    return CriteriaComparison(
        title=f"Criteria on {model.name} and {recipe.data.name}",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        model=model.name,
        data=recipe.data.name,
        input_shape=list(ready.example.shape[1:]),
        classes=ready.built.num_classes,
        criteria=list(grid.criteria),
        budgets=list(grid.budgets),
        allocations=list(grid.allocations),
        seeds=list(grid.seeds),
        dense=network,
        rows=criteria_rows(cells, network),
        paired=paired_rows(cells, against=against),
        latencies=[],
        cells=cells,
        notes=[*dense.facts["notes"], *_notes(grid, ready, cells), *grid.notes],
        machine=read_machine(),
        versions=versions(),
        recipe=recipe.model_dump(mode="json"),
        digests={"dense_weights": weights_digest(ready.built.module), "data": ready.data.digest},
        labels={
            cell.criterion: label
            for cell in grid.settings
            if (label := grid.recipe_of(cell).score.label) != cell.criterion
        },
    )


def _notes(grid: CriteriaGrid, ready: Prepared, cells: Sequence[CellResult]) -> list[str]:
    """How the cells came about, as far as a reader must know it."""
    recipe, rules = grid.recipe, ready.rules
    judged = len(ready.test)
    notes = []
    if not ready.data.has_accuracy:
        notes.append(f"the images of {recipe.data.name} have no labels: no accuracy exists.")
    elif judged < len(ready.data.test):
        notes.append(f"accuracy is taken on {judged} of {len(ready.data.test)} test images, the same for all cells.")
    if len(grid.seeds) == 1:
        notes.append("there is one seed: a mean over one, and no range.")
    notes.append(
        "a seed decides which images score, recalibrate and recover, their order, what is drawn, and the order of "
        "tuning; the dense network is the same for all."
    )
    if ready.data.has_accuracy and all(cell.accuracy.recalibrated is None for cell in cells):
        notes.append("nothing was recalibrated: there is no batch norm, or tune.recalibrate_images = 0.")
    kept = "any number" if rules.round_to == 1 else f"where its width allows it a multiple of {rules.round_to}"
    notes.append(
        f"every group keeps {kept} of its channels, never below "
        f"{rules.min_width}{_shares_kept(grid)}; every cut was proved in float64, the largest relative gap was "
        f"{max(cell.proof_gap for cell in cells):.1e}."
    )
    if grid.targets:
        notes.append(
            "networks of the same widths share one latency, measured on the first cell that ended with them; behind "
            "an option-A shortcut they differ a little in which channels they copy."
        )
    abstract = [name for name in grid.criteria if make_criterion(name).grade == "after the abstract"]
    if abstract:
        notes.append(f"built after the abstracts of papers, the rest our choice: {', '.join(abstract)}.")
    return [*notes, *_dense_groups(grid, ready)]


def _shares_kept(grid: CriteriaGrid) -> str:
    """What groups keep besides the floor, by allocation; empty where that is nothing."""
    shares = {cell.allocation: round(1 - most_removed(grid.recipe_of(cell)), 9) for cell in grid.settings}
    kept = [f"at least {100 * share:.4g} % of its width by {way}" for way, share in shares.items() if share > 0]
    bare = [way for way, share in shares.items() if share == 0]
    down = f", while {' and '.join(bare)} may go down to that floor" if bare else ""
    return f", and {' and '.join(kept)}{down}" if kept else ""


def _dense_groups(grid: CriteriaGrid, ready: Prepared) -> list[str]:
    """A sentence for each criterion that leaves groups as they are because it cannot judge them."""
    notes = []
    for name in grid.criteria:
        cell = next(cell for cell in grid.settings if cell.criterion == name)
        free = {group.layer for group in ready.found_groups if group.protected is None}
        left = [
            group for group in variant(ready, grid.recipe_of(cell)).groups if group.protected and group.layer in free
        ]
        if left:
            layers = ", ".join(group.layer for group in left[:3])
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            notes.append(f"left as they are by {name}, which cannot judge them: {layers}{more}.")
    return notes


def _part(progress: Progress, number: int, total: int, what: str = "") -> Progress:
    """What moves `progress` through one of so many parts, naming the part where it has a name."""
    return lambda fraction, text: progress((number + fraction) / total, what or text)
