"""The stages from the pruned network to its engines: export, agree, convert, build, measure."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..export.agree import compare_outputs, require_agreement
from ..export.bundle import onnx_name
from ..export.candidates import build_best
from ..export.golden import GOLDEN, Golden, read_golden, write_golden
from ..export.machine import fingerprint, read_machine
from ..export.measure import LatencyProtocol, laps_path
from ..export.onnx_export import OnnxInfo, export_onnx
from ..export.precision import Reference
from ..export.rounding import tf32_outputs
from ..export.target import engine_path, read_engine
from ..export.target_torch import PROGRAM_PRECISIONS, TorchTarget, program_path, write_program
from .convert import Evidence, convert_networks
from .data import Progress, normalise
from .device import agreement_check, measured_row, unmeasured_row
from .evaluation import evaluation_key, outputs_of, top1
from .journal import Journal, StageResult, digest_of
from .prepared import Prepared, reference_target
from .provenance import versions
from .recipe_values import rest_of
from .run_report import precision_warnings
from .stage_files import read_pruned
from .tune import predict

GOLDEN_IMAGES = 8
OUTPUTS = "outputs.npy"


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


def export_stage(
    ready: Prepared, journal: Journal, dense: StageResult, plan: StageResult, tuned: StageResult
) -> StageResult:
    """Both networks as ONNX, and golden inputs with torch's outputs."""

    def make(folder: Path) -> Mapping[str, Any]:
        pruned = read_pruned(ready, plan, tuned.file("model.safetensors"))
        info, control = export_both(ready, pruned, folder, journal.display.progress)
        return {"onnx_bytes": info.bytes, "dense_onnx_bytes": control.bytes, "opset": info.opset, "ir": info.ir_version}

    inputs = {
        "tuned": tuned.digest,
        "dense": dense.digest,
        "export": ready.recipe.export.model_dump(),
        "programs": _wants_programs(ready),
        "test": evaluation_key(ready),
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
    in_tf32 = tf32_outputs(folder / "model.onnx", golden.numpy())
    # Numbers near the end of FP32 cannot be split into two as the emulation does.
    others = {"tf32": in_tf32} if np.isfinite(in_tf32).all() else {}
    write_golden(folder / GOLDEN, Golden(golden.numpy(), outputs.numpy(), others))
    return info, control


def agree_stage(
    ready: Prepared, journal: Journal, onnx: StageResult, plan: StageResult, tuned: StageResult
) -> StageResult:
    """The ONNX file against torch, on the images that accuracy is measured on."""

    def make(folder: Path) -> Mapping[str, Any]:
        pruned = read_pruned(ready, plan, tuned.file("model.safetensors"))
        journal.display.progress(0.0, "torch")
        reference = predict(pruned, ready.test, progress=None).numpy()
        with contextlib.closing(reference_target().open_onnx(onnx.file("model.onnx"))) as session:
            outputs = outputs_of(session, ready.test, journal.display.progress)
        agreement = compare_outputs(reference, outputs)
        require_agreement(agreement, what="model.onnx")
        np.save(folder / OUTPUTS, outputs)  # what other precisions are compared with
        return {"agreement": agreement.model_dump(), "accuracy": top1(outputs, ready)}

    return journal.stage("agree", {"onnx": onnx.digest, "test": evaluation_key(ready)}, make)


def convert_stage(
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
        networks = {"model": read_pruned(ready, plan, tuned.file("model.safetensors")), "dense": ready.built.module}
        evidence = _evidence(ready, np.load(agreed.file(OUTPUTS)), progress)
        golden, rows = read_golden(onnx.folder), []
        own = dict(golden.by_precision)
        for precision in lower_precisions(ready):
            progress(0.0, precision)
            row = convert_networks(
                onnx.folder,
                folder,
                precision=precision,
                settings=recipe.quantize,
                rest=rest_of(recipe),
                evidence=evidence,
                progress=progress,
            )
            rows.append(row.model_dump(mode="json"))
            own[precision] = Reference(folder / onnx_name("model", precision)).outputs(golden.images)
            _write_programs(ready, networks, precision, folder)
        write_golden(folder / GOLDEN, golden._replace(by_precision=own))
        return {"precisions": rows}

    inputs = {
        "onnx": onnx.digest,
        "agreed": agreed.digest,
        "precision": recipe.export.precision,
        "quantize": recipe.quantize.model_dump(),
        "rest": rest_of(recipe),
        "data": ready.data.digest,
        "test": evaluation_key(ready),
        "seed": recipe.seed,
    }
    result = journal.stage("convert", inputs, make)
    for note in precision_warnings(result.facts["precisions"], agreed.facts["accuracy"]):
        journal.display.note(note)
    return result


def lower_precisions(ready: Prepared) -> list[str]:
    """The precisions that have files of their own."""
    return [precision for precision in ready.recipe.export.precision if precision != "fp32"]


def build_stage(ready: Prepared, journal: Journal, files: OnnxFiles) -> StageResult:
    """One engine file and sidecar for each target and precision."""

    def make(folder: Path) -> Mapping[str, Any]:
        for count, (target, precision) in enumerate(ready.engines):
            journal.display.progress(count / len(ready.engines), f"{target.spec} {precision}")
            path = engine_path(folder, target.spec, precision)
            check = agreement_check(lambda: read_golden(files.golden.parent))
            engine = build_best(target, files.path("model", precision), path, precision=precision, check=check)
            for warning in engine.flags.get("warnings", []):
                journal.display.note(warning)
        return {}

    inputs = {"onnx": files.digest, "options": ready.recipe.build.model_dump(mode="json"),
              "targets": ready.recipe.targets, "precision": ready.recipe.export.precision,
              "threads": ready.recipe.measure.threads, "versions": versions()}  # fmt: skip
    return journal.stage("build", inputs, make)


def measure_stage(ready: Prepared, journal: Journal, files: OnnxFiles, built: StageResult) -> StageResult:
    """Every engine that this machine can run, in turns with the dense network; the others with the reason why not."""
    asked = ready.recipe.measure.model_dump() | {"seed": ready.recipe.seed}

    def make(folder: Path) -> Mapping[str, Any]:
        golden = read_golden(files.golden.parent)
        rows = []
        for target, precision in ready.engines:
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
                judge=lambda session: top1(outputs_of(session, ready.test, journal.display.progress), ready),
            )
            rows.append(row)
            for advice in row.watch.advice if row.watch else []:
                journal.display.note(advice)
        return {"engines": [row.model_dump(mode="json") for row in rows]}

    inputs = {
        "built": built.digest,
        "onnx": files.digest,
        "measure": asked,
        "machine": fingerprint(read_machine()),
        "test": evaluation_key(ready),
    }
    return journal.stage("measure", inputs, make)


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
        judge=lambda session: outputs_of(session, ready.test, progress),
    )
