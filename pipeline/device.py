"""What runs on the device, without torch: build an engine from a bundle, measure it beside the dense network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..export.agree import compare_outputs, require_agreement
from ..export.bundle import verify_bundle, write_manifest
from ..export.errors import MachineMismatch
from ..export.golden import Golden, read_golden, run_in_batches
from ..export.machine import read_machine
from ..export.measure import LatencyProtocol, compare_latency, laps_path, write_laps
from ..export.target import Engine, Session, Target, engine_path, parse_target, read_engine
from ..export.targets import make_target
from .display import Display
from .report import EngineRow, Report, read_report, write_report

PRECISION = "fp32"

Progress = Callable[[float, str], None]
Judge = Callable[[Session], float | None]


def rebuild(bundle: Path, target: str) -> Engine:
    """The engine for that target, built here from the bundle's ONNX file; report and manifest are brought up to date.

    Raises: IntegrityError when the bundle is not as its manifest says; TargetUnavailable; BuildFailed.
    """
    manifest = verify_bundle(bundle)
    made = make_target(parse_target(target), threads=_threads(read_report(bundle)))
    path = engine_path(bundle, made.spec, PRECISION)
    engine = made.build(bundle / "model.onnx", path, precision=PRECISION)
    laps_path(path).unlink(missing_ok=True)
    reason = made.cannot_run(engine) or "built, and not measured since; run `chip-deploy measure`"
    _replace_rows(bundle, [unmeasured_row(engine, reason)])
    write_manifest(bundle, versions=manifest.versions, lineage=manifest.lineage)
    return engine


def remeasure(bundle: Path, target: str | None, display: Display) -> list[EngineRow]:
    """Measure the bundle's engines again on this machine (one target's, or all that can run here).

    Raises: IntegrityError; ValueError when the bundle has no engine for that target; MachineMismatch when none of the
    engines asked for can run here.
    """
    manifest = verify_bundle(bundle)
    report = read_report(bundle)
    wanted = [row for row in report.engines if target is None or row.target == str(parse_target(target))]
    if not wanted:
        have = ", ".join(sorted({row.target for row in report.engines})) or "none"
        raise ValueError(
            f"{bundle} has no engine for target '{target}' (it has: {have}). Build one with `chip-deploy build`."
        )
    rows, reasons = [], []
    for row in wanted:
        made = make_target(parse_target(row.target), threads=_threads(report))
        reason = made.cannot_run(read_engine(bundle / row.file))
        if reason:
            reasons.append(f"{row.file}: {reason}")
            continue
        display.stage(f"measure {row.target}")
        protocol = row.protocol or LatencyProtocol.model_validate(_measure(report))
        engine, golden = bundle / row.file, read_golden(bundle)
        laps = laps_path(engine)
        rows.append(
            measured_row(made, engine, bundle / "dense.onnx", golden, protocol, display.progress, laps_file=laps)
        )
    if not rows:
        raise MachineMismatch(f"nothing was measured: {'; '.join(reasons)}.")
    _replace_rows(bundle, rows)
    write_manifest(bundle, versions=manifest.versions, lineage=manifest.lineage)
    return rows


def unmeasured_row(engine: Engine, reason: str) -> EngineRow:
    """An engine that exists, with the reason why there is no number of it."""
    return EngineRow(
        target=engine.target,
        precision=engine.precision,
        file=engine.file,
        sha256=engine.sha256,
        bytes=engine.bytes,
        verdict="not measured",
        reason=reason,
        built_for=engine.built_for,
        flags=engine.flags,
        versions=engine.versions,
        build_seconds=engine.build_seconds,
    )


def measured_row(
    target: Target,
    engine_file: Path,
    dense_onnx: Path,
    golden: Golden,
    protocol: LatencyProtocol,
    progress: Progress,
    *,
    laps_file: Path,
    judge: Judge | None = None,
) -> EngineRow:
    """An engine measured in turns with the dense network, its outputs compared with torch's; the laps go to
    `laps_file`.

    `judge` tells the accuracy of an open engine where evaluation data is at hand.
    Raises: ParityFailed when the engine's outputs are not torch's; MeasureFailed.
    """
    engine = read_engine(engine_file)
    machine = read_machine()
    with (
        contextlib.closing(target.open(engine_file)) as pruned,
        contextlib.closing(target.open_onnx(dense_onnx)) as dense,
    ):
        agreement = compare_outputs(golden.outputs, run_in_batches(pruned, golden.images))
        require_agreement(agreement, what=engine.file, precision=engine.arithmetic)
        accuracy = judge(pruned) if judge else None
        feeds = np.resize(golden.images, (protocol.batch, *golden.images.shape[1:]))
        for session in (dense, pruned):
            session.bind({session.input_names[0]: feeds})
        comparison, dense_laps, pruned_laps = compare_latency(
            dense, pruned, protocol, progress=lambda fraction: progress(fraction, f"{target.spec} {engine.precision}")
        )
    write_laps(laps_file, protocol=protocol, machine=machine, dense=dense_laps, pruned=pruned_laps)
    numbers = {
        "latency_ms": comparison.pruned,
        "dense_latency_ms": comparison.dense,
        "speedup": comparison.speedup,
        "accuracy": accuracy,
        "agreement": agreement,
        "verdict": comparison.verdict,
        "protocol": protocol,
        "machine": machine,
    }
    return EngineRow.model_validate(dict(unmeasured_row(engine, comparison.reason)) | numbers)


def _measure(report: Report) -> dict[str, Any]:
    """How the recipe wants measurements made."""
    return {**report.recipe["measure"], "seed": report.recipe["seed"]}


def _threads(report: Report) -> int:
    return int(report.recipe["measure"]["threads"])


def _replace_rows(bundle: Path, rows: list[EngineRow]) -> Report:
    report = read_report(bundle)
    files = {row.file for row in rows}
    known = {row.file: row.accuracy for row in report.engines if row.accuracy is not None}
    kept = [row for row in report.engines if row.file not in files]
    same_engine = {(row.file, row.sha256) for row in report.engines}
    fresh = [
        row.model_copy(update={"accuracy": known.get(row.file)})
        if row.accuracy is None and (row.file, row.sha256) in same_engine and row.verdict != "not measured"
        else row
        for row in rows
    ]
    order = {row.file: place for place, row in enumerate(report.engines)}
    engines = sorted([*kept, *fresh], key=lambda row: order.get(row.file, len(order)))
    updated = report.model_copy(update={"engines": engines})
    write_report(updated, bundle)
    return updated
