"""The run, stage by stage: dense, score, plan, cut, tune, export, agree, build, measure, report."""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .. import __version__
from ..chip.allocate import Budget, Rules, allocate, kept_channels, listed_widths, require_reachable
from ..chip.cost import Cost, CostModel, paper_flops, removed_at
from ..chip.criteria import make_criterion
from ..chip.criterion import Criterion, Grade, RunCriterion
from ..chip.evidence import RUN_IMAGES, joint_groups, judged_groups, score_all
from ..chip.groups import CannotCut, ChannelGraph, ChannelGroup
from ..chip.image_pass import Batch
from ..chip.plan import PrunePlan, make_plan, weights_digest
from ..chip.scores import ChannelScores, Scored
from ..chip.shards import Shards, joined, processes
from ..chip.stability import StoppingRule
from ..chip.surgery import SurgeryRefused, apply_plan, prove
from ..export.agree import Agreement, compare_outputs, require_agreement
from ..export.bundle import (
    WORK,
    onnx_name,
    require_place,
    sha256_file,
    verify_bundle,
    write_atomic,
    write_manifest,
    writing_atomically,
)
from ..export.candidates import build_best
from ..export.errors import IntegrityError, TargetUnavailable
from ..export.golden import GOLDEN, Golden, Runner, read_golden, run_in_batches, write_golden
from ..export.machine import fingerprint, read_machine
from ..export.measure import LatencyProtocol, laps_path
from ..export.onnx_export import OnnxInfo, export_onnx
from ..export.precision import QUANTISED, Reference, Rest, require_quantisable
from ..export.target import (
    PRECISIONS,
    Target,
    engine_path,
    parse_target,
    read_engine,
    require_precision,
    require_usable,
    width_step,
)
from ..export.target_torch import PROGRAM_PRECISIONS, TorchTarget, program_path, write_program
from ..export.targets import make_target
from . import report as reports
from .convert import ROUNDING, Evidence, convert_networks
from .data import DataSet, Images, default_size, normalise, open_data, shuffled
from .device import TENSORRT, agreement_check, measured_row, unmeasured_row
from .display import Display
from .journal import Journal, StageResult, digest_of
from .models import BuiltModel, build_model, import_object, load_weights
from .recipe import Recipe, recipe_digest, recipe_toml
from .recover import RecoverRecord, RecoverSettings, recover
from .tune import TrainRecord, evaluate, predict, recalibrate, train

JOINT_IMAGES = 64  # where the recipe names no number: the joint mode holds the maps of all of them at once
SMALL_SET = 20_000  # a data set with at most so many training images may train its own dense model
GOLDEN_IMAGES = 8
OUTPUTS = "outputs.npy"
ALARM = 0.02  # a loss of accuracy above two points is said aloud
BY_SCORES = ("global", "isomorphic", "interaction")
"""Allocations whose widths are known only when the channels have been scored."""
MOST_REMOVED = 0.9  # of a group where one ranking of all channels might otherwise empty it; no other allocation can
GRADES: dict[Grade, str] = {
    "code": "follows the code of its authors",
    "after the abstract": "is built after the abstract of its paper, and the rest is this project's choice",
    "baseline": "is a baseline that the papers compare with",
}
RECIPE_FILE = "recipe.toml"
BUNDLE_FILES = (
    RECIPE_FILE,
    "plan.json",
    "scores.safetensors",
    "model.safetensors",
    *(onnx_name(network, precision) for network in ("model", "dense") for precision in PRECISIONS),
    GOLDEN,
    *(
        program_path(Path(onnx_name(network, precision))).name
        for network in ("model", "dense")
        for precision in PROGRAM_PRECISIONS
    ),
)
PACKAGES = (
    "torch", "torchvision", "torch-pruning", "lightning", "onnx", "onnxscript", "numpy", "onnxruntime",
    "onnxruntime-gpu", "numba", "scipy", "tensorrt", "tensorrt-rtx", "safetensors", "pillow", "scikit-learn", "timm",
)  # fmt: skip

Progress = Callable[[float, str], None]

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind; two runs in one folder are not kept apart there
    fcntl = None


@dataclass(frozen=True)
class CutRow:
    """One channel group of a preview: widths before and after, and how many layers are coupled with its root.

    macs_before, macs_after: of the convolutions and linears that produce the group's channels.
    """

    layer: str
    coupled: int
    before: int
    after: int
    macs_before: int
    macs_after: int


@dataclass(frozen=True)
class CutPreview:
    """What a run would cut."""

    rows: list[CutRow]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int


@dataclass(frozen=True)
class OnnxFiles:
    """Where the ONNX files of a run lie: those in FP32, and those in other precisions where any were asked for."""

    exported: StageResult
    converted: StageResult | None

    def path(self, network: str, precision: str) -> Path:
        """The file of `network` (model or dense) in that precision."""
        stage = self.exported if precision == "fp32" or self.converted is None else self.converted
        return stage.file(onnx_name(network, precision))

    @property
    def golden(self) -> Path:
        """The golden images and outputs."""
        return (self.converted or self.exported).file(GOLDEN)

    @property
    def digest(self) -> str:
        """Of all the files."""
        return digest_of(self.exported.digest, self.converted.digest) if self.converted else self.exported.digest


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
    def trains_dense(self) -> bool:
        """Whether the dense model has to be trained first."""
        return self.recipe.model.weights is None and self.data.has_accuracy


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
    _require_own_folder(out, recipe)
    ready = prepare(recipe, display)
    if resume and _is_finished(out, ready):
        shutil.rmtree(out / WORK, ignore_errors=True)
        display.note(f"{out} holds the finished run of this recipe; nothing is left to do.")
        return reports.read_report(out)
    existed = out.exists()
    _make_folder(out)
    with alone_in(out):
        if not resume:
            _clear(out)
        _make_folder(out / WORK)
        write_atomic(out / WORK / RECIPE_FILE, recipe_toml(recipe).encode())
        try:
            return _run(ready, out, display, command)
        except (ValueError, FileNotFoundError, CannotCut, SurgeryRefused):
            if not (out / WORK / "cut").exists():  # what is found wrong later costs no finished work
                _clear(out)
                if not existed:
                    shutil.rmtree(out)
            raise


def dry_run(recipe: Recipe, display: Display) -> CutPreview:
    """What the recipe would cut; writes nothing, trains nothing, scores only where the widths follow from scores."""
    ready = prepare(recipe, display)
    widths = ready.widths if ready.widths is not None else widths_by_scores(ready, _preview_scores(ready, display))
    removed = removed_at(ready.groups, widths)
    after = ready.cost.after(removed)
    macs = [ready.cost.layer_macs(gone) for gone in ({}, removed)]
    rows = [
        CutRow(
            group.layer,
            len(group.coupled),
            group.width,
            widths[group.layer],
            *(round(sum(of.get(layer, 0) for layer in (group.layer, *group.coupled))) for of in macs),
        )
        for group in ready.groups
        if group.layer in widths
    ]
    dense: Cost = ready.cost.dense
    return CutPreview(rows, dense.macs, after.macs, dense.params, after.params)


def score(recipe: Recipe, out_file: Path, *, display: Display) -> ChannelScores:
    """Write the scores of every channel that may be cut to a safetensors file.

    Under torchrun every process scores its share of the images, and the first one writes the file.
    The accuracy of the dense network is not measured: scores do not need it.
    Raises: as `prune`; FileNotFoundError, PermissionError, ValueError when `out_file` cannot be written.
    """
    out_file = _score_place(out_file)
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
        if shards.world > 1 and ready.trains_dense and not _cached_dense(ready).is_file():
            raise ValueError(
                "under torchrun the dense network must be trained already. Give --weights, or run this once without "
                "torchrun, which trains it and keeps it for the next run."
            )
        journal = Journal(Path(work), display, versions=versions())
        dense_stage(ready, journal, judged=False)
        display.stage("score")
        found = _scored(ready, display, shards)
        if shards.rank == 0:
            write_atomic(out_file, found.to_bytes())
        return found


def _score_place(out_file: Path) -> Path:
    """Where the scores are written, links followed. Raises: FileNotFoundError, PermissionError, ValueError."""
    place = require_place(out_file, [])
    try:
        with tempfile.TemporaryFile(dir=place.parent):
            return place
    except OSError as err:
        raise PermissionError(f"{out_file.parent} cannot be written ({err.strerror}). Give another --out.") from err


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


# -- before any work ---------------------------------------------------------------------------------------------------


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
    targets = [
        make_target(parse_target(text), threads=recipe.measure.threads, options=recipe.build) for text in recipe.targets
    ]
    for target in targets if needs_cut and needs_engines else []:
        require_usable(target)
        for precision in recipe.export.precision:
            require_precision(target, precision)
    if needs_cut and needs_engines:
        require_usable(_reference_target())
    _require_free_batch(recipe)
    if recipe.model.weights is not None and not Path(recipe.model.weights).is_file():
        raise FileNotFoundError(f"{recipe.model.weights}: no such weights file. Check --weights.")
    if recipe.score.file is not None:
        _require_score_file(Path(recipe.score.file))
    size = recipe.data.size or default_size(recipe.model.name, recipe.data.name)
    data = open_data(recipe.data.name, size=size, seed=recipe.seed, progress=display.progress)
    if admit is not None:
        admit(data)
    criteria = _criteria(recipe)
    if recipe.score.file is None:
        score_device(recipe)
    _require_labels(recipe, criteria, data)
    built = _build(recipe, data)
    _require_weights(recipe, data)
    if needs_cut:
        _require_data_for_8_bits(recipe, targets, data)
        _require_no_turing_products(recipe, targets, built.module)
    network = digest_of(weights_digest(built.module), source_digest(recipe.model.name))
    if recipe.model.weights is not None:
        load_weights(built.module, recipe.model.weights)
    example = normalise(data.test.read(torch.arange(1)))
    if needs_cut:
        _require_left_out(recipe, built.module, example)
    cost = CostModel(built.module, example)
    found = ChannelGraph(built.module, example).groups
    groups = judged_groups(built.module, found, criteria, cost=cost)
    rules = _rules(recipe)
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
        _sampled(data.train, recipe.score.images, recipe.seed, "score.images", otherwise=_most_images(recipe)),
        _sampled(data.test, recipe.data.eval_images, recipe.seed, "data.eval_images", otherwise=len(data.test)),
        network,
    )
    if recipe.score.file is not None:
        _read_scores(ready, check_weights=not ready.trains_dense)
    if needs_cut:
        display.progress(0.8, "proving that this network can be cut")
        trial = _trial_plan(ready)
        apply_plan(built.module, trial, example)
        prove(built.module, trial, example, seed=recipe.seed)
    return ready


def variant(ready: Prepared, recipe: Recipe) -> Prepared:
    """The same network and test images for a recipe with another criterion, budget, allocation or seed.

    Raises: ValueError where the criterion can judge no group, or the budget cannot be met.
    """
    criteria, groups = _criteria(recipe), ready.groups
    if [each.name for each in criteria] != [each.name for each in ready.criteria]:
        groups = judged_groups(ready.built.module, ready.found_groups, criteria, cost=ready.cost)
    rules = _rules(recipe)
    images = _sampled(
        ready.data.train, recipe.score.images, recipe.seed, "score.images", otherwise=_most_images(recipe)
    )
    return replace(
        ready,
        recipe=recipe,
        criteria=criteria,
        groups=groups,
        rules=rules,
        widths=_early_widths(recipe, groups, ready.cost, rules),
        score_images=images,
    )


def _require_free_batch(recipe: Recipe) -> None:
    if recipe.measure.batch > 1 and not recipe.export.dynamic_batch:
        raise ValueError(
            f"measure.batch is {recipe.measure.batch}, but the exported network takes one image. "
            "Add --set export.dynamic_batch=true."
        )


def _require_data_for_8_bits(recipe: Recipe, targets: list[Target], data: DataSet) -> None:
    """Raises: ValueError where 8 bits are asked for without real images; TargetUnavailable for a type of the rest that
    a target gets wrong."""
    asked = [precision for precision in recipe.export.precision if precision in QUANTISED]
    if not asked:
        return
    if not data.has_accuracy:
        raise ValueError(
            f"{asked[0].upper()} asked without data: its ranges come from real images, and '{recipe.data.name}' draws "
            f"random ones. Give real --data, or leave {asked[0]} out of --precision."
        )
    for target in targets:
        if recipe.quantize.rest == "fp16" and target.spec.name not in TENSORRT:
            raise TargetUnavailable(
                f"target '{target.spec}' takes no {asked[0]} with quantize.rest = 'fp16': onnxruntime makes int32 "
                "biases of the FP16 ones, with scales that FP16 cannot hold. Set quantize.rest=auto."
            )


def _require_left_out(recipe: Recipe, model: nn.Module, example: Tensor) -> None:
    """The dense network is exported to see its layers: an addition has a name in the ONNX file alone.

    Raises: ValueError for a layer to be left out of 8 bits that there is not, or where none would be left.
    """
    asked = recipe.quantize
    if not any(precision in QUANTISED for precision in recipe.export.precision):
        return
    if not asked.exclude and not asked.first_last:
        return
    with tempfile.TemporaryDirectory(prefix="chip-deploy-") as folder:
        source = Path(folder) / onnx_name("dense", "fp32")
        export_onnx(model, example, source, dynamic_batch=recipe.export.dynamic_batch)
        require_quantisable(source, asked)


def _require_no_turing_products(recipe: Recipe, targets: list[Target], model: nn.Module) -> None:
    """TensorRT-RTX 1.7 builds no FP32 matrix product for Turing, and says so only after everything else is done."""
    in_fp32 = {"fp32"} if _rest(recipe) == "fp16" else {"fp32", *QUANTISED}
    precision = next((name for name in recipe.export.precision if name in in_fp32), None)
    linear = next((name for name, module in model.named_modules() if isinstance(module, nn.Linear)), None)
    for target in targets:
        if linear is not None and precision is not None and "sm75" in target.spec.capabilities:
            raise TargetUnavailable(
                f"target '{target.spec}' cannot be used here: TensorRT-RTX has no FP32 matrix product for sm75, and "
                f"'{linear}' is one in {precision}. Leave sm75 out, use --precision fp16, or use --target trt on the "
                "device."
            )


def _rest(recipe: Recipe) -> Rest:
    """The type of what is not quantised: FP16 where TensorRT alone will run it, unless the recipe says which."""
    if recipe.quantize.rest != "auto":
        return recipe.quantize.rest
    return "fp16" if all(parse_target(text).name in TENSORRT for text in recipe.targets) else "fp32"


def _build(recipe: Recipe, data: DataSet) -> BuiltModel:
    classes = data.n_classes if data.has_accuracy else None
    return build_model(recipe.model.name, num_classes=classes, seed=recipe.seed, size=data.size)


def _require_weights(recipe: Recipe, data: DataSet) -> None:
    if recipe.model.weights is None and data.has_accuracy and len(data.train) > SMALL_SET:
        raise ValueError(
            f"no weights were given for '{recipe.model.name}', and {recipe.data.name} has {len(data.train):,} training "
            f"images; only sets of up to {SMALL_SET:,} train their own dense model. Give trained --weights."
        )


def _rules(recipe: Recipe) -> Rules:
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


def _criteria(recipe: Recipe) -> list[Criterion]:
    found = [make_criterion(recipe.score.criterion, seed=recipe.seed)]
    if recipe.prune.allocation == "interaction" and not isinstance(found[0], RunCriterion):
        found.append(make_criterion("interactions", seed=recipe.seed))
    return found


def needs_labels(criterion: Criterion) -> bool:
    """Whether that criterion can score only on images whose classes are known."""
    return bool(criterion.needs & {"labels", "gradients", "masked runs"})


def _require_labels(recipe: Recipe, criteria: Sequence[Criterion], data: DataSet) -> None:
    """Raises: ValueError where the images have no labels, and a criterion or the recovery needs them."""
    if data.has_accuracy:
        return
    if recipe.tune.recover:
        raise ValueError(
            f"tune.recover = '{recipe.tune.recover}' needs labels, and the images of '{recipe.data.name}' have none. "
            "Give labelled --data, or leave it out."
        )
    if recipe.score.file is not None:
        return
    for criterion in criteria:
        if needs_labels(criterion):
            asked = (
                "" if criterion is criteria[0] else f", which prune.allocation = '{recipe.prune.allocation}' goes by,"
            )
            other = "criterion" if criterion is criteria[0] else "allocation"
            raise ValueError(
                f"criterion '{criterion.name}'{asked} needs labels, and the images of '{recipe.data.name}' have none. "
                f"Give labelled --data, or choose another {other}."
            )


def _early_widths(
    recipe: Recipe, groups: Sequence[ChannelGroup], cost: CostModel, rules: Rules
) -> dict[str, int] | None:
    """The widths where the recipe and the structure settle them; None, and a budget in reach, where scores will."""
    if recipe.prune.layer_ratios:
        return listed_widths(groups, recipe.prune.layer_ratios, rules)
    way = recipe.prune.allocation
    if way in BY_SCORES:
        require_reachable(groups, cost, _budget(recipe), rules, way=way)
        return None
    return allocate(groups, cost, _budget(recipe), rules, way=way)


def widths_by_scores(ready: Prepared, found: ChannelScores) -> dict[str, int]:
    """The width of every group where the scores decide about it."""
    return allocate(
        ready.groups,
        ready.cost,
        _budget(ready.recipe),
        ready.rules,
        way=ready.recipe.prune.allocation,
        scores={layer: vector.tolist() for layer, vector in found.scores.items()},
        strengths=found.strengths,
    )


def _budget(recipe: Recipe) -> Budget:
    for kind in ("macs", "params", "ratio"):
        value = getattr(recipe.prune, kind)
        if value is not None:
            return Budget(kind, value)
    raise AssertionError("the recipe has a budget")


def _trial_plan(ready: Prepared) -> PrunePlan:
    """A plan for proving that the network can be cut: at the widths that are known, or those of channels all alike."""
    free = {group.layer: group.width for group in ready.groups if group.protected is None}
    alike = {layer: torch.zeros(width, dtype=torch.float64) for layer, width in free.items()}
    no_scores = ChannelScores(alike, "", 0, "", strengths=dict.fromkeys(free, 1.0))
    widths = ready.widths if ready.widths is not None else widths_by_scores(ready, no_scores)
    return plan_at(ready, widths, {layer: [-float(channel) for channel in range(free[layer])] for layer in widths})


def _preview_scores(ready: Prepared, display: Display) -> ChannelScores:
    """The scores that a dry run's widths follow from. Raises: ValueError where a network has to be trained first."""
    if ready.recipe.score.file is not None:
        return _read_scores(ready, check_weights=not ready.trains_dense)
    if ready.trains_dense and not _filled_from(_cached_dense(ready), ready.built.module):
        raise ValueError(
            f"with prune.allocation = '{ready.recipe.prune.allocation}' the widths follow from the scores of a trained "
            "network, and a dry run trains none. Give trained --weights, or --scores, or run without --dry-run."
        )
    display.stage("score")
    return _scored(ready, display, Shards())


def _sampled(images: Images, n: int | None, seed: int, what: str, *, otherwise: int) -> Images:
    return images.sample(min(otherwise, len(images)) if n is None else n, seed=seed, what=what)


def _reference_target() -> Target:
    """onnxruntime on this CPU: what every exported network is compared on."""
    return make_target(parse_target("ort-cpu"), threads=1)


# -- the output folder -------------------------------------------------------------------------------------------------


def require_folder(out: Path) -> None:
    """Nothing, if `out` is a folder that can be written, or can become one.

    Raises: ValueError, NotADirectoryError, PermissionError.
    """
    try:
        present = out.exists()
    except OSError as err:
        raise ValueError(f"--out cannot be used ({err.strerror}): {str(out)[:40]}... Give another --out.") from err
    if present and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; --out needs a folder. Give another --out.")
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(f"{out} cannot be written: {parent} is not a writable folder. Give another --out.")


def _require_own_folder(out: Path, recipe: Recipe) -> None:
    require_folder(out)
    if not out.exists() or (
        {path.name for path in out.iterdir()} <= {WORK} and not (out / WORK / RECIPE_FILE).exists()
    ):
        return  # new, empty, or killed before it began
    found = [path for path in (out / RECIPE_FILE, out / WORK / RECIPE_FILE) if path.is_file()]
    if not found:
        raise ValueError(f"{out} is not empty and holds no run of this tool. Give another --out, or empty it.")
    if any(path.read_text(encoding="utf-8") != recipe_toml(recipe) for path in found):
        raise ValueError(f"{out} holds the run of another recipe. Give another --out, or remove {out}.")


def _is_finished(out: Path, ready: Prepared) -> bool:
    """Whether the folder holds a whole bundle, made from the same inputs with the same versions."""
    try:
        manifest = verify_bundle(out)
    except IntegrityError:
        return False
    return manifest.versions == versions() and _origin(ready).items() <= manifest.lineage.items()


def _origin(ready: Prepared) -> dict[str, str]:
    """Digests of everything that a run starts from."""
    weights = ready.recipe.model.weights
    return {
        "recipe_sha256": recipe_digest(ready.recipe),
        "data_sha256": ready.data.digest,
        "network_sha256": ready.network,
        "training_code_sha256": source_digest(ready.recipe.tune.train or ""),
        **({"scores_file_sha256": sha256_file(Path(ready.recipe.score.file))} if ready.recipe.score.file else {}),
        **({"weights_file_sha256": sha256_file(Path(weights))} if weights else {}),
    }


def source_digest(name: str) -> str:
    """sha256 of the source file behind a `package.module:name` of the user's; of nothing for any other name."""
    if ":" not in name or name.partition(":")[0] in ("torchvision", "timm"):
        return ""
    file = inspect.getsourcefile(inspect.unwrap(import_object(name, what="code")))
    return sha256_file(Path(file)) if file else ""


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold the folder against a second run; the lock goes with the process, however it ends.

    Raises: ValueError when another run holds it.
    """
    if fcntl is None:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(folder)
        raise ValueError(f"another run is working in {out}. Wait for it, or give another --out.") from err
    try:
        yield
    finally:
        os.close(folder)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise PermissionError(f"{path.parent} cannot be written ({err.strerror}). Give another --out.") from err


def _clear(out: Path) -> None:
    """Remove what this tool wrote there, and nothing else."""
    for name in ("manifest.json", reports.REPORT, *reports.PAGES, *reversed(BUNDLE_FILES)):  # recipe.toml goes last:
        for path in (out / f".{name}.part", out / name):  # it says whose folder this is
            if name == RECIPE_FILE:
                for folder in ("engines", WORK):
                    shutil.rmtree(out / folder, ignore_errors=True)
            path.unlink(missing_ok=True)


# -- the stages --------------------------------------------------------------------------------------------------------


def _run(ready: Prepared, out: Path, display: Display, command: str) -> reports.Report:
    journal = Journal(out / WORK, display, versions=versions())
    dense = dense_stage(ready, journal)
    scores = _score_stage(ready, journal, dense)
    plan = _plan_stage(ready, journal, dense, scores)
    cut = _cut_stage(ready, journal, dense, plan)
    tuned = _tune_stage(ready, journal, dense, plan, cut)
    onnx = _export_stage(ready, journal, dense, plan, tuned)
    agreed = _agree_stage(ready, journal, onnx, plan, tuned)
    converted = _convert_stage(ready, journal, onnx, agreed, plan, tuned) if _lower_precisions(ready) else None
    files = OnnxFiles(onnx, converted)
    built = _build_stage(ready, journal, files)
    measured = _measure_stage(ready, journal, files, built, before=agreed.facts["accuracy"])
    stages = {
        "dense": dense, "score": scores, "plan": plan, "cut": cut, "tune": tuned, "export": onnx, "agree": agreed,
        **({"convert": converted} if converted else {}), "build": built, "measure": measured,
    }  # fmt: skip
    return _report_stage(ready, journal, out, stages, command)


def dense_stage(ready: Prepared, journal: Journal, *, judged: bool = True) -> StageResult:
    """The dense weights: given, or trained on a small data set and kept in the cache; and accuracy, if `judged`."""
    recipe, data = ready.recipe, ready.data

    def make(folder: Path) -> Mapping[str, Any]:
        model, record, notes = ready.built.module, None, []
        if ready.trains_dense:
            cached = _cached_dense(ready)
            if _filled_from(cached, model):
                notes.append(
                    f"no weights were given: the dense model is one that an earlier run trained ({cached.name})."
                )
            else:
                work = journal.work / "dense.epochs"
                record = train(
                    model, data, recipe.dense, seed=recipe.seed, work=work, progress=journal.display.progress
                )
                with contextlib.suppress(OSError):  # a cache that cannot be written costs the next run its time
                    cached.parent.mkdir(parents=True, exist_ok=True)
                    write_atomic(cached, save(_tensors(model)))
                shutil.rmtree(work, ignore_errors=True)
                notes.append(
                    f"no weights were given: the dense model was trained first, {record.epochs} epochs on "
                    f"{min(len(data.train), recipe.dense.max_images or len(data.train)):,} images."
                )
        elif not data.has_accuracy and recipe.model.weights is None:
            notes.append("the dense weights are random: structure and latency are real, accuracy does not exist.")
        write_atomic(folder / "dense.safetensors", save(_tensors(model)))
        accuracy = _accuracy(model, ready, journal) if judged else None
        return {"accuracy": accuracy, "training": _plain(record), "notes": notes}

    inputs = {
        "model": recipe.model.name,
        "weights": sha256_file(Path(recipe.model.weights)) if recipe.model.weights else _dense_digest(ready),
        "network": ready.network,
        "test": _test_key(ready),
    }
    result = journal.stage("dense", inputs, make)
    for note in result.facts["notes"]:
        journal.display.note(note)
    ready.built.module.load_state_dict(load_file(result.file("dense.safetensors")))
    ready.built.module.eval()
    return result


def _score_stage(ready: Prepared, journal: Journal, dense: StageResult) -> StageResult:
    """The score of every channel that may be cut: made here, or by an earlier `chip-deploy score`."""
    recipe = ready.recipe
    asked = recipe.score

    def make(folder: Path) -> Mapping[str, Any]:
        if asked.file is not None:
            found = _read_scores(ready, check_weights=True)
        else:
            found = _scored(ready, journal.display, Shards())
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


def _scored(ready: Prepared, display: Display, shards: Shards) -> ChannelScores:
    """The scores by the recipe's criterion, and the strengths where its allocation goes by them."""
    recipe = ready.recipe
    found = scored_by(ready, ready.criteria, ready.groups, display.progress, shards)
    scored = found[recipe.score.label]
    strengths = next((of.strengths for of in found.values() if of.strengths), {})
    images = max(of.images for of in found.values())
    digest = weights_digest(ready.built.module)
    return ChannelScores(scored.scores, recipe.score.label, images, digest, scored.layers, strengths)


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


def score_device(recipe: Recipe) -> torch.device:
    """Where channels are scored.

    Raises: ValueError where a GPU was asked for and none can be used.
    """
    asked = recipe.score.device
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("score.device = 'cuda': torch sees no usable GPU here. Set score.device=cpu.")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


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


def _most_images(recipe: Recipe) -> int:
    return JOINT_IMAGES if recipe.score.joint else recipe.score.max_images


def _require_score_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder, but a score file is expected. Give the .safetensors file.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such score file. Write one with `chip-deploy score --out {path}`.")


def _read_scores(ready: Prepared, *, check_weights: bool) -> ChannelScores:
    """The scores in the recipe's file. Raises: FileNotFoundError; ValueError when they belong to something else."""
    path = Path(str(ready.recipe.score.file))
    _require_score_file(path)
    found = ChannelScores.from_file(str(path))
    expected = {group.layer: group.width for group in ready.groups if group.protected is None}
    held = {layer: len(vector) for layer, vector in found.scores.items()}
    asked = ready.recipe.score
    if found.criterion != asked.label:
        name = found.criterion.removesuffix(" joint")
        same = (
            f"Set score.joint={str(found.criterion != name).lower()}"
            if name == asked.criterion
            else f"Give --criterion {name}"
        )
        raise ValueError(
            f"{path} holds scores by '{found.criterion}', and the recipe asks for '{asked.label}'. {same}, or score "
            "the model anew."
        )
    again = f"Score this model with `chip-deploy score --out {path}`."
    if held != expected:
        layer = min(layer for layer in {**held, **expected} if held.get(layer) != expected.get(layer))
        there, here = (f"{of[layer]} channels" if layer in of else "no such group" for of in (held, expected))
        raise ValueError(
            f"{path} holds the scores of another model: for '{layer}', {there} there and {here} here. {again}"
        )
    if check_weights and found.weights_sha256 != weights_digest(ready.built.module):
        raise ValueError(f"{path} holds the scores of another model: the same network with other weights. {again}")
    if ready.recipe.prune.allocation == "interaction" and set(found.strengths) != set(found.scores):
        raise ValueError(
            f"{path} does not say how strongly the channels of each group act together, and prune.allocation = "
            "'interaction' goes by that. Score with `chip-deploy score --criterion "
            f"{asked.criterion} --set prune.allocation=interaction --out {path}`."
        )
    return found


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
        replay = _read_plan(plan)
        journal.display.progress(0.1, "cutting")
        pruned = apply_plan(ready.built.module, replay, ready.example)
        journal.display.progress(0.3, "proving the cut in float64")
        gap = prove(ready.built.module, replay, ready.example, seed=ready.recipe.seed)
        write_atomic(folder / "cut.safetensors", save(_tensors(pruned)))
        counted = paper_flops(pruned, ready.example)
        return {"gap": gap, "paper_flops": counted, "accuracy": _accuracy(pruned, ready, journal)}

    return journal.stage("cut", {"plan": plan.digest, "dense": dense.digest, "test": _test_key(ready)}, make)


def _tune_stage(
    ready: Prepared, journal: Journal, dense: StageResult, plan: StageResult, cut: StageResult
) -> StageResult:
    """Batch-norm statistics measured again, recovery on a few images where it is asked for, then fine-tuning."""
    recipe, data = ready.recipe, ready.data

    def make(folder: Path) -> Mapping[str, Any]:
        model = _pruned(ready, plan, cut.file("cut.safetensors"))
        n = min(recipe.tune.recalibrate_images, len(data.train))
        progress = journal.display.progress
        recalibrate(model, data.train, n=n, batch=recipe.tune.batch, seed=recipe.seed, progress=progress)
        recalibrated = _accuracy(model, ready, journal)
        recovery = recover_pruned(model, ready, _read_plan(plan), progress) if recipe.tune.recover else None
        recovered = _accuracy(model, ready, journal) if recovery else None
        teacher = ready.built.module if recipe.tune.distill > 0 else None
        work = journal.work / "tune.epochs"
        record = train(model, data, recipe.tune, seed=recipe.seed, work=work, teacher=teacher, progress=progress)
        untrained = recovered if recovery else recalibrated
        tuned = _accuracy(model, ready, journal) if recipe.tune.epochs else untrained
        write_atomic(folder / "model.safetensors", save(_tensors(model)))
        return {
            "recalibrated": recalibrated,
            "recovered": recovered,
            "recovery": recovery.model_dump() if recovery else None,
            "accuracy": tuned,
            "training": _plain(record),
        }

    inputs = {
        "cut": cut.digest,
        "tune": recipe.tune.model_dump(),
        "code": source_digest(recipe.tune.train or ""),
        "data": data.digest,
        "test": _test_key(ready),
        "seed": recipe.seed,
    }
    result = journal.stage("tune", inputs, make)
    shutil.rmtree(journal.work / "tune.epochs", ignore_errors=True)
    return result


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


def _export_stage(
    ready: Prepared, journal: Journal, dense: StageResult, plan: StageResult, tuned: StageResult
) -> StageResult:
    """Both networks as ONNX, and golden inputs with torch's outputs."""

    def make(folder: Path) -> Mapping[str, Any]:
        pruned = _pruned(ready, plan, tuned.file("model.safetensors"))
        info, control = export_both(ready, pruned, folder, journal.display.progress)
        return {"onnx_bytes": info.bytes, "dense_onnx_bytes": control.bytes, "opset": info.opset, "ir": info.ir_version}

    inputs = {
        "tuned": tuned.digest,
        "dense": dense.digest,
        "export": ready.recipe.export.model_dump(),
        "programs": _wants_programs(ready),
        "test": _test_key(ready),
    }
    return journal.stage("export", inputs, make)


def export_both(ready: Prepared, pruned: nn.Module, folder: Path, progress: Progress) -> tuple[OnnxInfo, OnnxInfo]:
    """model.onnx, dense.onnx and golden.npz in `folder`, and the torch programs where a target runs those."""
    dynamic = ready.recipe.export.dynamic_batch
    progress(0.1, "pruned network")
    info: OnnxInfo = export_onnx(pruned, ready.example, folder / "model.onnx", dynamic_batch=dynamic)
    progress(0.5, "dense network")
    control = export_onnx(ready.built.module, ready.example, folder / "dense.onnx", dynamic_batch=dynamic)
    _write_programs(ready, {"model": pruned, "dense": ready.built.module}, "fp32", folder)
    golden = normalise(ready.test.read(torch.arange(min(GOLDEN_IMAGES, len(ready.test)))))
    with torch.no_grad():
        outputs = torch.cat([pruned(image) for image in golden.split(1)])
    write_golden(folder / GOLDEN, Golden(golden.numpy(), outputs.numpy()))
    return info, control


def _wants_programs(ready: Prepared) -> bool:
    """Whether a target runs the network by torch itself, which no ONNX file can be turned back into."""
    return any(isinstance(target, TorchTarget) for target in ready.targets)


def _write_programs(ready: Prepared, networks: Mapping[str, nn.Module], precision: str, folder: Path) -> None:
    """The torch programs of both networks beside their ONNX files, if a target runs them in that precision."""
    if _wants_programs(ready) and precision in PROGRAM_PRECISIONS:
        for name, network in networks.items():
            path = program_path(folder / onnx_name(name, precision))
            dynamic = ready.recipe.export.dynamic_batch
            write_program(network, ready.example, path, dynamic_batch=dynamic, precision=precision)


def _agree_stage(
    ready: Prepared, journal: Journal, onnx: StageResult, plan: StageResult, tuned: StageResult
) -> StageResult:
    """The ONNX file against torch, on the images that accuracy is measured on."""

    def make(folder: Path) -> Mapping[str, Any]:
        pruned = _pruned(ready, plan, tuned.file("model.safetensors"))
        journal.display.progress(0.0, "torch")
        reference = predict(pruned, ready.test, progress=None).numpy()
        with contextlib.closing(_reference_target().open_onnx(onnx.file("model.onnx"))) as session:
            outputs = _outputs(session, ready.test, journal.display.progress)
        agreement = compare_outputs(reference, outputs)
        require_agreement(agreement, what="model.onnx")
        np.save(folder / OUTPUTS, outputs)  # what other precisions are compared with
        return {"agreement": agreement.model_dump(), "accuracy": _top1(outputs, ready)}

    return journal.stage("agree", {"onnx": onnx.digest, "test": _test_key(ready)}, make)


def _convert_stage(
    ready: Prepared,
    journal: Journal,
    onnx: StageResult,
    agreed: StageResult,
    plan: StageResult,
    tuned: StageResult,
) -> StageResult:
    """Both networks in the other precisions that were asked for, each judged on the images of the evaluation."""
    recipe, progress = ready.recipe, journal.display.progress

    def make(folder: Path) -> Mapping[str, Any]:
        networks = {"model": _pruned(ready, plan, tuned.file("model.safetensors")), "dense": ready.built.module}
        evidence = _evidence(ready, np.load(agreed.file(OUTPUTS)), progress)
        golden, own, rows = read_golden(onnx.folder), {}, []
        for precision in _lower_precisions(ready):
            progress(0.0, precision)
            row = convert_networks(
                onnx.folder,
                folder,
                precision=precision,
                settings=recipe.quantize,
                rest=_rest(recipe),
                evidence=evidence,
                progress=progress,
            )
            rows.append(row.model_dump(mode="json"))
            if precision in QUANTISED:
                own[precision] = Reference(folder / onnx_name("model", precision)).outputs(golden.images)
            _write_programs(ready, networks, precision, folder)
        write_golden(folder / GOLDEN, golden._replace(by_precision=own))
        return {"precisions": rows}

    inputs = {
        "onnx": onnx.digest,
        "agreed": agreed.digest,
        "precision": recipe.export.precision,
        "quantize": recipe.quantize.model_dump(),
        "rest": _rest(recipe),
        "data": ready.data.digest,
        "test": _test_key(ready),
        "seed": recipe.seed,
    }
    result = journal.stage("convert", inputs, make)
    for note in _precision_warnings(result.facts["precisions"], agreed.facts["accuracy"]):
        journal.display.note(note)
    return result


def _evidence(ready: Prepared, outputs: np.ndarray, progress: Progress) -> Evidence:
    """Training images for calibration, never those of the evaluation; and how a file is judged on the latter."""
    train_set = ready.data.train
    n = min(ready.recipe.quantize.images, len(train_set))
    images = train_set.sample(n, seed=ready.recipe.seed, what="quantize.images")
    return Evidence(
        images=normalise(images.read(torch.arange(n))).numpy(),
        what="calibration images" if ready.data.has_accuracy else "random images",
        outputs=outputs,
        labels=ready.test.labels.numpy() if ready.data.has_accuracy else None,
        judge=lambda session: _outputs(session, ready.test, progress),
    )


def _lower_precisions(ready: Prepared) -> list[str]:
    """The precisions that have files of their own."""
    return [precision for precision in ready.recipe.export.precision if precision != "fp32"]


def _build_stage(ready: Prepared, journal: Journal, files: OnnxFiles) -> StageResult:
    """One engine file and sidecar for each target and precision."""

    def make(folder: Path) -> Mapping[str, Any]:
        wanted = _engines(ready)
        for count, (target, precision) in enumerate(wanted):
            journal.display.progress(count / len(wanted), f"{target.spec} {precision}")
            path = engine_path(folder, target.spec, precision)
            check = agreement_check(lambda: read_golden(files.golden.parent))
            build_best(target, files.path("model", precision), path, precision=precision, check=check)
        return {}

    inputs = {"onnx": files.digest, "options": ready.recipe.build.model_dump(mode="json"),
              "targets": ready.recipe.targets, "precision": ready.recipe.export.precision,
              "threads": ready.recipe.measure.threads, "versions": versions()}  # fmt: skip
    return journal.stage("build", inputs, make)


def _measure_stage(
    ready: Prepared, journal: Journal, files: OnnxFiles, built: StageResult, *, before: float | None
) -> StageResult:
    """Every engine that this machine can run, in turns with the dense network; the others with the reason why not.

    `before`: the accuracy of the FP32 file.
    """
    recipe = ready.recipe
    asked = recipe.measure.model_dump() | {"seed": recipe.seed}

    def make(folder: Path) -> Mapping[str, Any]:
        golden = read_golden(files.golden.parent)
        rows, warnings = [], []
        for target, precision in _engines(ready):
            path = engine_path(built.folder, target.spec, precision)
            engine = read_engine(path)
            reason = target.cannot_run(engine)
            if reason:
                rows.append(unmeasured_row(engine, f"built, not measured on this machine: {reason}"))
                continue
            row = measured_row(
                target,
                path,
                files.path("dense", precision),
                golden,
                LatencyProtocol.model_validate(asked),
                journal.display.progress,
                laps_file=folder / laps_path(path).name,
                judge=lambda session: _top1(_outputs(session, ready.test, journal.display.progress), ready),
            )
            if over := _over_bound(row, before, most=recipe.quantize.max_drop):
                warnings.append(f"WARNING: {over}")
                row = row.model_copy(update={"reason": f"{row.reason} {warnings[-1]}"})
            rows.append(row)
            for advice in row.watch.advice if row.watch else []:
                journal.display.note(advice)
        return {"engines": [row.model_dump(mode="json") for row in rows], "warnings": warnings}

    inputs = {
        "bound": [recipe.quantize.max_drop, before],
        "built": built.digest,
        "onnx": files.digest,
        "measure": asked,
        "machine": fingerprint(read_machine()),
        "test": _test_key(ready),
    }
    result = journal.stage("measure", inputs, make)
    for warning in result.facts["warnings"]:
        journal.display.note(warning)
    return result


def _over_bound(row: reports.EngineRow, before: float | None, *, most: float | None) -> str:
    """What is wrong with an 8-bit engine that loses more than `most` points of top-1; empty for any other.

    The bound was kept by its ONNX file, and an engine may compute otherwise.
    """
    if most is None or before is None or row.accuracy is None or row.precision not in QUANTISED:
        return ""
    drop = 100 * (before - row.accuracy)
    if drop <= most + ROUNDING:
        return ""
    return (
        f"{row.file} loses {drop:.2f} points of top-1 on the evaluation images, and at most {most:g} may be lost: its "
        "ONNX file keeps the bound, the engine does not. Lower --max-drop, or take another precision."
    )


def _report_stage(
    ready: Prepared, journal: Journal, out: Path, stages: Mapping[str, StageResult], command: str
) -> reports.Report:
    """The bundle put together: files into place, report, manifest; the work folder goes last."""
    journal.display.stage("report")
    _place(out, stages)
    plan = _read_plan(stages["plan"])
    lineage = {
        **_origin(ready),
        "dense_weights_sha256": plan.weights_sha256,
        "plan_sha256": sha256_file(out / "plan.json"),
        "onnx_sha256": sha256_file(out / "model.onnx"),
    }
    report = _report(ready, journal, stages, lineage).model_copy(update={"command": command})
    for note in report.notes[: len(_collapse(report.accuracy))]:
        journal.display.note(note)
    reports.write_report(report, out)
    write_manifest(out, versions=versions(), lineage=lineage)
    shutil.rmtree(out / WORK)
    journal.display.done()
    return report


def _place(out: Path, stages: Mapping[str, StageResult]) -> None:
    sources = {
        RECIPE_FILE: out / WORK / RECIPE_FILE,
        "plan.json": stages["plan"].file("plan.json"),
        "scores.safetensors": stages["score"].file("scores.safetensors"),
        "model.safetensors": stages["tune"].file("model.safetensors"),
        **{name: stages["export"].file(name) for name in ("model.onnx", "dense.onnx", GOLDEN)},
        **{path.name: path for path in _converted_files(stages)},
    }
    programs = [path for name in ("export", "convert") if name in stages for path in stages[name].folder.glob("*.pt2")]
    for name, source in [*sources.items(), *((path.name, path) for path in sorted(programs))]:
        _copy_atomically(source, out / name)
    shutil.rmtree(out / "engines", ignore_errors=True)
    (out / "engines").mkdir()
    engines = sorted(stages["build"].file("engines").iterdir())
    laps = sorted(stages["measure"].folder.glob("*.latency.json.gz"))
    for path in (*engines, *laps):
        _copy_atomically(path, out / "engines" / path.name)


def _converted_files(stages: Mapping[str, StageResult]) -> list[Path]:
    """The ONNX files in other precisions, and the golden outputs that hold theirs as well."""
    if "convert" not in stages:
        return []
    return [*sorted(stages["convert"].folder.glob("*.onnx")), stages["convert"].file(GOLDEN)]


def _copy_atomically(source: Path, target: Path) -> None:
    with writing_atomically(target) as unfinished:
        shutil.copyfile(source, unfinished)


# -- the report --------------------------------------------------------------------------------------------------------


def _report(
    ready: Prepared, journal: Journal, stages: Mapping[str, StageResult], lineage: Mapping[str, str]
) -> reports.Report:
    recipe, plan = ready.recipe, _read_plan(stages["plan"])
    facts = {name: stage.facts for name, stage in stages.items()}
    accuracies = {
        "dense": facts["dense"]["accuracy"],
        "pruned": facts["cut"]["accuracy"],
        "recalibrated": facts["tune"]["recalibrated"],
        "recovered": facts["tune"]["recovered"],
        "tuned": facts["tune"]["accuracy"],
        "onnx": facts["agree"]["accuracy"],
    }
    accuracy = reports.Accuracy(n=len(ready.test) if ready.data.has_accuracy else 0, **accuracies)
    return reports.Report(
        title=f"{recipe.model.name} on {recipe.data.name}",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=recipe.model.name,
        data=recipe.data.name,
        criterion=facts["score"]["criterion"],
        budget=_budget_sentence(ready),
        input_shape=plan.input_shape,
        classes=ready.built.num_classes,
        accuracy=accuracy,
        cost=reports.Cost(
            dense=reports.NetworkCost(
                macs=plan.macs_before, params=plan.params_before, onnx_bytes=facts["export"]["dense_onnx_bytes"]
            ),
            pruned=reports.NetworkCost(
                macs=plan.macs_after, params=plan.params_after, onnx_bytes=facts["export"]["onnx_bytes"]
            ),
        ),
        agreement=Agreement.model_validate(facts["agree"]["agreement"]),
        precisions=[reports.PrecisionRow.model_validate(row) for row in _precision_rows(facts)],
        engines=[reports.EngineRow.model_validate(row) for row in facts["measure"]["engines"]],
        groups=_group_reports(ready, stages, plan),
        score_images=facts["score"]["images"] or None,
        dense_training=_curve(facts["dense"]["training"]),
        tuning=_curve(facts["tune"]["training"]),
        stages_s=journal.seconds,
        machine=read_machine(),
        versions=versions(),
        recipe=recipe.model_dump(mode="json"),
        digests={name.removesuffix("_sha256").replace("_", " "): digest for name, digest in lineage.items() if digest},
        notes=[
            *_collapse(accuracy),
            *_precision_warnings(_precision_rows(facts), accuracy.onnx),
            *facts["measure"]["warnings"],
            *_notes(ready, facts, plan),
        ],
    )


def _group_reports(ready: Prepared, stages: Mapping[str, StageResult], plan: PrunePlan) -> list[reports.GroupReport]:
    scored = ChannelScores.from_file(str(stages["score"].file("scores.safetensors")))
    seconds = stages["score"].facts["seconds"]
    found = []
    for cut in plan.groups:
        rests_on = scored.layers.get(cut.layer)
        place = {channel: n for n, channel in enumerate(cut.channels or range(cut.width_before))}
        found.append(
            reports.GroupReport(
                layer=cut.layer,
                coupled=cut.coupled,
                width_before=cut.width_before,
                width_after=cut.width_after,
                scores=scored.scores[cut.layer].tolist(),
                kept=[place[channel] for channel in cut.kept],
                images=(rests_on.images or None) if rests_on else None,
                stability=rests_on.stability if rests_on else None,
                settled=rests_on.settled if rests_on and rests_on.stability is not None else None,
                score_seconds=seconds.get(cut.layer),
            )
        )
    return found


def _notes(ready: Prepared, facts: Mapping[str, Mapping[str, Any]], plan: PrunePlan) -> list[str]:
    flops = facts["cut"]["paper_flops"]
    protected = [f"{group.layer} ({group.protected})" for group in ready.groups if group.protected]
    return [
        *facts["dense"]["notes"],
        (
            f"the cut was proved in float64: largest relative gap to the dense network with the same channels silenced "
            f"{facts['cut']['gap']:.1e}."
        ),
        (
            f"MACs fall by {1 - plan.macs_after / plan.macs_before:.2%}; counted as CHIP's authors print FLOPs (batch "
            f"norms and convolution biases on the pruned side only), by {1 - flops / plan.macs_before:.2%}."
        ),
        *_sources(ready),
        f"kept widths are multiples of {plan.round_to} where the dense width allows it, never below {plan.min_width}.",
        *([f"left as they are: {'; '.join(protected)}."] if protected else []),
        *_recovery_notes(facts["tune"]["recovery"]),
        *((facts["tune"]["training"] or {}).get("notes") or []),
    ]


def _sources(ready: Prepared) -> list[str]:
    """How near what decided about channels is to the paper that it is named after."""
    recipe, after_the_abstract = ready.recipe, GRADES["after the abstract"]
    found = [f"the criterion '{recipe.score.criterion}' {GRADES[ready.criteria[0].grade]}."]
    if recipe.score.joint:
        found.append("channels left one at a time (score.joint), which is this project's choice.")
    if recipe.prune.allocation == "interaction":
        found.append(f"the allocation by interaction {after_the_abstract}.")
    if recipe.tune.recover:
        found.append(f"the recovery by interactions {after_the_abstract}.")
    return found


def _recovery_notes(recovery: Mapping[str, Any] | None) -> list[str]:
    if not recovery or not recovery["steps"]:
        return []
    note = (
        f"recovery took {recovery['steps']} steps on {recovery['images']} images: how channels act together was off "
        f"by {recovery['gap_before']:.2f} of the dense mean square before, by {recovery['gap_after']:.2f} after."
    )
    return [note]


def _collapse(accuracy: reports.Accuracy) -> list[str]:
    """A warning where the pruned network lost more accuracy than anybody would ship without looking."""
    if accuracy.dense is None or accuracy.onnx is None or accuracy.dense - accuracy.onnx <= ALARM:
        return []
    warning = (
        f"WARNING: top-1 fell from {accuracy.dense:.1%} to {accuracy.onnx:.1%}. Tune longer (--set tune.epochs=...), "
        "distil from the dense network (--set tune.distill=0.5), or keep more channels."
    )
    return [warning]


def _precision_rows(facts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return facts["convert"]["precisions"] if "convert" in facts else []


def _precision_warnings(rows: Sequence[Mapping[str, Any]], before: float | None) -> list[str]:
    """A warning for each precision in which the network lost more accuracy than anybody would ship without looking."""
    warnings = []
    for row in rows:
        after = row["accuracy"]
        if before is None or after is None or before - after <= ALARM:
            continue
        bound = " or leave the layers out that cost most (--max-drop 0.5)" if row["sensitivities"] else ""
        fell = f"top-1 fell from {before:.1%} to {after:.1%}"
        warnings.append(f"WARNING: in {row['precision']} {fell}. Take another precision{bound}.")
    return warnings


def _budget_sentence(ready: Prepared) -> str:
    asked, rules, criterion = ready.recipe.prune, ready.rules, ready.criteria[0]
    floor = f"no group below {rules.min_width}"
    share = f" or {1 - rules.most_removed:.0%} of its channels" if rules.most_removed < 1 else ""
    named = f"criterion {ready.recipe.score.label} ({criterion.grade})"
    rest = f"widths rounded to {rules.round_to}, {floor}{share}; {named}"
    if asked.layer_ratios:
        return f"ratios given for {len(asked.layer_ratios)} layers; {rest}"
    budget = _budget(ready.recipe)
    if budget.kind == "ratio":
        whose = "all channels" if asked.allocation in BY_SCORES else "the channels of every group"
        return f"remove {budget.value:.0%} of {whose}, {asked.allocation} allocation; {rest}"
    counted = "MACs" if budget.kind == "macs" else "parameters"
    return f"keep at most {budget.value:.0%} of the {counted}, {asked.allocation} allocation; {rest}"


def _curve(record: Mapping[str, Any] | None) -> reports.TrainCurve | None:
    if not record or not record["epochs"]:
        return None
    return reports.TrainCurve(**{name: record[name] for name in ("epochs", "seconds", "loss", "lr")})


# -- small things ------------------------------------------------------------------------------------------------------


def _engines(ready: Prepared) -> list[tuple[Target, str]]:
    return [(target, precision) for target in ready.targets for precision in ready.recipe.export.precision]


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


def _read_plan(plan: StageResult) -> PrunePlan:
    return PrunePlan.model_validate_json(plan.file("plan.json").read_text(encoding="utf-8"))


def _pruned(ready: Prepared, plan: StageResult, weights: Path) -> nn.Module:
    model = apply_plan(_build(ready.recipe, ready.data).module, _read_plan(plan), ready.example, weights=False)
    model.load_state_dict(load_file(weights))
    return model.eval()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every tensor in memory of its own, as safetensors wants it."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}


def _accuracy(model: nn.Module, ready: Prepared, journal: Journal) -> float | None:
    if not ready.data.has_accuracy:
        return None
    return evaluate(model, ready.test, progress=journal.display.progress).top1


def _top1(outputs: np.ndarray, ready: Prepared) -> float | None:
    if not ready.data.has_accuracy:
        return None
    return float((outputs.argmax(1) == ready.test.labels.numpy()).mean())


def _outputs(session: Runner, images: Images, progress: Progress) -> np.ndarray:
    """The session's outputs for every image, decoded as they are needed."""
    rows = []
    for indices in torch.arange(len(images)).split(32):
        rows.append(run_in_batches(session, normalise(images.read(indices)).numpy()))
        progress((int(indices[-1]) + 1) / len(images), "accuracy")
    return np.concatenate(rows)


def _test_key(ready: Prepared) -> str:
    return digest_of(ready.data.digest, ready.recipe.data.eval_images, ready.recipe.seed)


def _dense_digest(ready: Prepared) -> str:
    """What the trained dense model depends on; names its file in the cache."""
    recipe = ready.recipe
    settings = recipe.dense.model_dump() if ready.data.has_accuracy else None
    return digest_of(
        recipe.model.name,
        ready.built.num_classes,
        ready.data.digest,
        ready.data.size,
        ready.network,
        settings,
        recipe.seed,
        metadata.version("torch"),
    )[:32]


def _cached_dense(ready: Prepared) -> Path:
    return _cache_folder() / f"{_dense_digest(ready)}.safetensors"


def _filled_from(cached: Path, model: nn.Module) -> bool:
    """Whether the model now holds the cached tensors; a damaged file counts as none."""
    try:
        model.load_state_dict(load_file(cached))
    except (OSError, SafetensorError, RuntimeError):
        return False
    return True


def _cache_folder() -> Path:
    base = os.environ.get("CHIP_DEPLOY_CACHE_DIR")
    if base:
        return Path(base) / "dense"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chip-deploy" / "dense"


def _plain(record: TrainRecord | None) -> dict[str, Any] | None:
    return None if record is None else record.model_dump()


def versions() -> dict[str, str]:
    """This package, and the others that a result may depend on, with their versions where they are installed."""
    found = {"chip-deploy": __version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
