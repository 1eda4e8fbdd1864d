"""The latency of every pruned structure of a comparison, on one cell's network, in turns with the dense network."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..chip.plan import PrunePlan, structure_digest
from ..chip.surgery import apply_plan
from ..export.golden import read_golden
from ..export.machine import fingerprint, read_machine
from ..export.measure import LatencyProtocol, laps_path
from ..export.target import Target, engine_path, read_engine
from .criteria_result import StructureLatency
from .data import Progress
from .device import measured_row, unmeasured_row
from .display import Display
from .engine_stages import export_both
from .journal import Journal, digest_of
from .prepared import Prepared
from .provenance import versions
from .report import EngineRow
from .tune import recalibrate

NETWORKS = "networks"


class Structure(NamedTuple):
    """Pruned networks of the same widths. plan, ready: of the first of the cells that ended with them."""

    name: str
    plan: PrunePlan
    ready: Prepared


def measure_structures(
    structures: Sequence[Structure], folder: Path, display: Display, *, seed: int
) -> list[StructureLatency]:
    """Every structure on every target of the recipe, each in a folder of its own that keeps the laps.

    Networks of the same widths share one measurement, that of the first cell. Their weights do not matter; but behind
    an option-A shortcut, which copies channels by their number, they differ a little in which channels they copy.
    seed: of the order in which dense and pruned take turns.

    A target that cannot run its engine here gives the reason instead of numbers. What was measured before, on this
    machine and in the same way, is used again.
    """
    journal = Journal(folder, display, versions=versions())
    found = []
    for target in structures[0].ready.targets:
        for precision in structures[0].ready.recipe.export.precision:
            found += _latencies(structures, target, precision, journal, seed)
    return found


def _latencies(
    structures: Sequence[Structure], target: Target, precision: str, journal: Journal, seed: int
) -> list[StructureLatency]:
    """Every structure on one target; where it cannot run the first one's engine here, it could run no other's."""
    first = _latency(structures[0], target, precision, journal, seed)
    if first.verdict == "not measured":
        return [first.model_copy(update={"structure": structure.name}) for structure in structures]
    return [first, *(_latency(structure, target, precision, journal, seed) for structure in structures[1:])]


def _latency(structure: Structure, target: Target, precision: str, journal: Journal, seed: int) -> StructureLatency:
    ready = structure.ready
    measure = ready.recipe.measure.model_dump() | {"seed": seed}

    def make(folder: Path) -> Mapping[str, Any]:
        row = _measured(structure, target, precision, folder, LatencyProtocol.model_validate(measure), journal.display)
        shutil.rmtree(folder / NETWORKS)
        return {"row": row.model_dump(mode="json")}

    inputs = {
        "kept": digest_of(structure.plan.kept),
        "network": ready.network,
        "dense": structure_digest(ready.built.module),
        "target": str(target.spec),
        "precision": precision,
        "export": ready.recipe.export.model_dump(),
        "measure": measure,
        "machine": fingerprint(read_machine()),
    }
    name = f"measure-{str(target.spec).replace(':', '-').replace(',', '-')}-{precision}-{structure.name[:8]}"
    result = journal.stage(name, inputs, make)
    row = EngineRow.model_validate(result.facts["row"])
    laps = next(iter(result.folder.glob("*.latency.json.gz")), None)
    return StructureLatency(
        structure=structure.name,
        target=row.target,
        precision=row.precision,
        dense_ms=row.dense_latency_ms,
        pruned_ms=row.latency_ms,
        speedup=row.speedup,
        verdict=row.verdict,
        reason=row.reason,
        protocol=row.protocol,
        machine=row.machine,
        laps=f"{journal.work.name}/{name}/{laps.name}" if laps else None,
    )


def _measured(
    structure: Structure, target: Target, precision: str, folder: Path, protocol: LatencyProtocol, display: Display
) -> EngineRow:
    """Both networks exported, the engine built and timed; without the times of single layers, which nobody reads."""
    networks = folder / NETWORKS
    networks.mkdir()
    _export_both(structure, networks, display.progress)
    path = engine_path(networks, target.spec, precision)
    target.build(networks / "model.onnx", path, precision=precision)
    engine = read_engine(path)
    reason = target.cannot_run(engine)
    if reason:
        return unmeasured_row(engine, f"built, not measured on this machine: {reason}")
    row = measured_row(
        target,
        path,
        networks / "dense.onnx",
        read_golden(networks),
        protocol,
        display.progress,
        laps_file=folder / laps_path(path).name,
    )
    for advice in row.watch.advice if row.watch else []:
        display.note(advice)
    return row.model_copy(update={"layers": None})


def _export_both(structure: Structure, folder: Path, progress: Progress) -> None:
    """model.onnx, dense.onnx and golden.npz: the pruned network keeps the channels that the cell's plan keeps.

    Its batch norms are set to what they see, so that no value grows or dies on the way through and is slow for that.
    """
    ready = structure.ready
    pruned = apply_plan(ready.built.module, structure.plan, ready.example)
    tune, train_set = ready.recipe.tune, ready.data.train
    n = min(tune.recalibrate_images, len(train_set))
    recalibrate(pruned, train_set, n=n, batch=tune.batch, seed=ready.recipe.seed)
    export_both(ready, pruned, folder, progress)
