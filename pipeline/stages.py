"""The run, stage by stage: dense, score, plan, cut, tune, export, agree, build, measure, report."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from ..chip.cost import paper_flops
from ..chip.groups import CannotCut
from ..chip.plan import PrunePlan
from ..chip.scores import ChannelScores
from ..chip.shards import Shards, joined, processes
from ..chip.surgery import SurgeryRefused, apply_plan, prove
from ..export.bundle import WORK, sha256_file, write_atomic, write_manifest
from . import report as reports
from .alone import alone_in
from .cut_preview import CutPreview, cut_preview
from .data import Progress, normalise
from .dense import cached_dense, dense_stage
from .display import Display
from .engine_stages import (
    OnnxFiles,
    agree_stage,
    build_stage,
    convert_stage,
    export_stage,
    lower_precisions,
    measure_stage,
)
from .evaluation import accuracy_of, evaluation_key
from .journal import Journal, StageResult
from .models import build_model
from .prepared import Prepared, plan_at, prepare, widths_by_scores
from .provenance import source_digest, versions
from .recipe import Recipe, recipe_toml
from .recover import RecoverRecord, RecoverSettings, recover
from .run_folder import (
    RECIPE_FILE,
    clear_folder,
    is_finished,
    make_folder,
    origin_of,
    place_files,
    require_own_folder,
)
from .run_report import collapse_warnings, make_report
from .score_file import read_scores, score_place
from .scoring import preview_scores, scored
from .stage_files import read_plan, read_pruned, tensors_of
from .tune import recalibrate, train


def prune(recipe: Recipe, out: Path, *, resume: bool, display: Display, command: str = "") -> reports.Report:
    """Run every stage into the folder `out`; with resume=True go on where an earlier run of this recipe stopped.

    `command` is what the report says was run.

    Raises: ValueError and FileNotFoundError for what the user can put right (nothing is left behind then);
    TargetUnavailable; CannotCut and SurgeryRefused when the network cannot be cut rightly; other ExportErrors.
    """
    if processes() > 1:
        raise ValueError(
            "torchrun shares out scoring alone. Run `chip-deploy score` under it, and then `chip-deploy prune --scores "
            "FILE` without it."
        )
    require_own_folder(out, recipe)
    ready = prepare(recipe, display)
    if resume and is_finished(out, ready):
        shutil.rmtree(out / WORK, ignore_errors=True)
        display.note(f"{out} holds the finished run of this recipe; nothing is left to do.")
        return reports.read_report(out)
    existed = out.exists()
    make_folder(out)
    with alone_in(out):
        if not resume:
            clear_folder(out)
        make_folder(out / WORK)
        write_atomic(out / WORK / RECIPE_FILE, recipe_toml(recipe).encode())
        try:
            return _run(ready, out, display, command)
        except (ValueError, FileNotFoundError, CannotCut, SurgeryRefused):
            if not (out / WORK / "cut").exists():  # what is found wrong later costs no finished work
                clear_folder(out)
                if not existed:
                    shutil.rmtree(out)
            raise


def dry_run(recipe: Recipe, display: Display) -> CutPreview:
    """What the recipe would cut; writes nothing, trains nothing, scores only where the widths follow from scores."""
    ready = prepare(recipe, display)
    widths = ready.widths if ready.widths is not None else widths_by_scores(ready, preview_scores(ready, display))
    return cut_preview(ready, widths)


def score(recipe: Recipe, out_file: Path, *, display: Display) -> ChannelScores:
    """Write the scores of every channel that may be cut to a safetensors file.

    Under torchrun every process scores its share of the images, and the first one writes the file.
    The accuracy of the dense network is not measured: scores do not need it.
    Raises: as `prune`; FileNotFoundError, PermissionError, ValueError when `out_file` cannot be written.
    """
    out_file = score_place(out_file)
    if recipe.score.file is not None:
        raise ValueError(
            "score.file is for `chip-deploy prune`, which takes scores; this command makes them. Leave it out."
        )
    ready = prepare(recipe, display, needs_cut=False)
    with joined() as shards, tempfile.TemporaryDirectory(prefix="chip-deploy-") as work:
        if shards.world > 1 and recipe.score.joint:
            raise ValueError(
                "torchrun shares out images, and the joint mode needs all of them at once. Run it without torchrun."
            )
        if shards.world > 1 and ready.trains_dense and not cached_dense(ready).is_file():
            raise ValueError(
                "under torchrun the dense network must be trained already. Give --weights, or run this once without "
                "torchrun, which trains it and keeps it for the next run."
            )
        journal = Journal(Path(work), display, versions=versions())
        dense_stage(ready, journal, judged=False)
        display.stage("score")
        found = scored(ready, display, shards)
        if shards.rank == 0:
            write_atomic(out_file, found.to_bytes())
        return found


def load_pruned(bundle: Path) -> nn.Module:
    """The tuned, pruned network of a bundle: dense architecture, plan replayed, tensors loaded; nothing is unpickled.

    Raises: ValueError when the plan does not fit the architecture that the bundle's recipe names.
    """
    plan = PrunePlan.model_validate_json((bundle / "plan.json").read_text(encoding="utf-8"))
    size = plan.input_shape[-1]
    dense = build_model(plan.model, num_classes=plan.num_classes, seed=0, size=size).module
    pruned = apply_plan(dense, plan, torch.zeros(1, *plan.input_shape), weights=False)
    pruned.load_state_dict(load_file(bundle / "model.safetensors"), strict=True)
    return pruned.eval()


def recover_pruned(model: nn.Module, ready: Prepared, plan: PrunePlan, progress: Progress) -> RecoverRecord:
    """The pruned network is taught in place to act together as the dense one does, on images of its own drawing."""
    asked, train_set = ready.recipe.tune, ready.data.train
    images = train_set.sample(
        min(asked.recover_images, len(train_set)), seed=ready.recipe.seed, what="tune.recover_images"
    )
    return recover(
        model,
        ready.built.module,
        plan,
        normalise(images.read(torch.arange(len(images)))),
        images.labels,
        settings=RecoverSettings(
            steps=asked.recover_steps,
            lr=asked.recover_lr,
            images=len(images),
            batch=asked.batch,
            seed=ready.recipe.seed,
        ),
        progress=progress,
    )


def _run(ready: Prepared, out: Path, display: Display, command: str) -> reports.Report:
    journal = Journal(out / WORK, display, versions=versions())
    dense = dense_stage(ready, journal)
    scores = _score_stage(ready, journal, dense)
    plan = _plan_stage(ready, journal, dense, scores)
    cut = _cut_stage(ready, journal, dense, plan)
    tuned = _tune_stage(ready, journal, plan, cut)
    onnx = export_stage(ready, journal, dense, plan, tuned)
    agreed = agree_stage(ready, journal, onnx, plan, tuned)
    converted = convert_stage(ready, journal, onnx, agreed, plan, tuned) if lower_precisions(ready) else None
    files = OnnxFiles(onnx, converted)
    built = build_stage(ready, journal, files)
    measured = measure_stage(ready, journal, files, built)
    stages = {
        "dense": dense, "score": scores, "plan": plan, "cut": cut, "tune": tuned, "export": onnx, "agree": agreed,
        **({"convert": converted} if converted else {}), "build": built, "measure": measured,
    }  # fmt: skip
    return _report_stage(ready, journal, out, stages, command)


def _score_stage(ready: Prepared, journal: Journal, dense: StageResult) -> StageResult:
    """The score of every channel that may be cut: made here, or by an earlier `chip-deploy score`."""
    recipe = ready.recipe
    asked = recipe.score

    def make(folder: Path) -> Mapping[str, Any]:
        if asked.file is not None:
            found = read_scores(recipe, ready.groups, ready.built.module, check_weights=True)
        else:
            found = scored(ready, journal.display, Shards())
        write_atomic(folder / "scores.safetensors", found.to_bytes())
        return {
            "images": found.images,
            "criterion": found.criterion,
            "seconds": {layer: round(of.seconds, 3) for layer, of in found.layers.items()},
        }

    inputs = {
        "dense": dense.digest,
        "score": asked.model_dump(),
        "file": sha256_file(Path(asked.file)) if asked.file is not None else None,
        "criteria": [criterion.name for criterion in ready.criteria],
        "widths": ready.widths,
        "data": ready.data.digest,
        "seed": recipe.seed,
    }
    return journal.stage("score", inputs, make)


def _plan_stage(ready: Prepared, journal: Journal, dense: StageResult, scores: StageResult) -> StageResult:
    """Which channels stay."""
    recipe = ready.recipe

    def make(folder: Path) -> Mapping[str, Any]:
        found = ChannelScores.from_file(str(scores.file("scores.safetensors")))
        widths = ready.widths if ready.widths is not None else widths_by_scores(ready, found)
        plan = plan_at(ready, widths, {layer: vector.tolist() for layer, vector in found.scores.items()})
        write_atomic(folder / "plan.json", (plan.model_dump_json(by_alias=True, indent=2) + "\n").encode())
        return {}

    inputs = {
        "scores": scores.digest,
        "dense": dense.digest,
        "prune": recipe.prune.model_dump(),
        "widths": ready.widths,
        "rules": asdict(ready.rules),
    }
    return journal.stage("plan", inputs, make)


def _cut_stage(ready: Prepared, journal: Journal, dense: StageResult, plan: StageResult) -> StageResult:
    """The network right after the cut, proved to compute what the plan says."""

    def make(folder: Path) -> Mapping[str, Any]:
        replay = read_plan(plan)
        journal.display.progress(0.1, "cutting")
        pruned = apply_plan(ready.built.module, replay, ready.example)
        journal.display.progress(0.3, "proving the cut in float64")
        gap = prove(ready.built.module, replay, ready.example, seed=ready.recipe.seed)
        write_atomic(folder / "cut.safetensors", save(tensors_of(pruned)))
        counted = paper_flops(pruned, ready.example)
        return {"gap": gap, "paper_flops": counted, "accuracy": accuracy_of(pruned, ready, journal)}

    return journal.stage("cut", {"plan": plan.digest, "dense": dense.digest, "test": evaluation_key(ready)}, make)


def _tune_stage(ready: Prepared, journal: Journal, plan: StageResult, cut: StageResult) -> StageResult:
    """Batch-norm statistics measured again, recovery on a few images where it is asked for, then fine-tuning."""
    recipe, data = ready.recipe, ready.data

    def make(folder: Path) -> Mapping[str, Any]:
        model = read_pruned(ready, plan, cut.file("cut.safetensors"))
        n = min(recipe.tune.recalibrate_images, len(data.train))
        progress = journal.display.progress
        recalibrate(model, data.train, n=n, batch=recipe.tune.batch, seed=recipe.seed, progress=progress)
        recalibrated = accuracy_of(model, ready, journal)
        recovery = recover_pruned(model, ready, read_plan(plan), progress) if recipe.tune.recover else None
        recovered = accuracy_of(model, ready, journal) if recovery else None
        teacher = ready.built.module if recipe.tune.distill > 0 else None
        work = journal.work / "tune.epochs"
        record = train(model, data, recipe.tune, seed=recipe.seed, work=work, teacher=teacher, progress=progress)
        untrained = recovered if recovery else recalibrated
        tuned = accuracy_of(model, ready, journal) if recipe.tune.epochs else untrained
        write_atomic(folder / "model.safetensors", save(tensors_of(model)))
        return {
            "recalibrated": recalibrated,
            "recovered": recovered,
            "recovery": recovery.model_dump() if recovery else None,
            "accuracy": tuned,
            "training": record.model_dump(),
        }

    inputs = {
        "cut": cut.digest,
        "tune": recipe.tune.model_dump(),
        "code": source_digest(recipe.tune.train or ""),
        "data": data.digest,
        "test": evaluation_key(ready),
        "seed": recipe.seed,
    }
    result = journal.stage("tune", inputs, make)
    shutil.rmtree(journal.work / "tune.epochs", ignore_errors=True)
    return result


def _report_stage(
    ready: Prepared, journal: Journal, out: Path, stages: Mapping[str, StageResult], command: str
) -> reports.Report:
    """The bundle put together: files into place, report, manifest; the work folder goes last."""
    journal.display.stage("report")
    place_files(out, stages)
    plan = read_plan(stages["plan"])
    lineage = {
        **origin_of(ready),
        "dense_weights_sha256": plan.weights_sha256,
        "plan_sha256": sha256_file(out / "plan.json"),
        "onnx_sha256": sha256_file(out / "model.onnx"),
    }
    report = make_report(ready, journal, stages, lineage).model_copy(update={"command": command})
    for note in report.notes[: len(collapse_warnings(report.accuracy))]:
        journal.display.note(note)
    reports.write_report(report, out)
    write_manifest(out, versions=versions(), lineage=lineage)
    shutil.rmtree(out / WORK)
    journal.display.done()
    return report
