"""Bundles side by side: what each network costs, and for each target which of them are worth shipping."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from ..export.bundle import verify_bundle
from ..export.errors import IntegrityError, MachineMismatch
from ..export.laps import Speedup
from ..export.machine import Machine, differences, fingerprint
from ..export.protocol import LatencyProtocol
from ..export.target import parse_target
from .report import EngineRow, Report, read_report

# Two sessions in which the dense network differs by more were not under the same conditions.
SESSIONS_APART = 1.05


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ComparedNetwork(_Part):
    """One bundle's network, whatever runs it."""

    label: str
    """The bundle's folder, with as much of its path as tells it from the others."""
    model: str
    data: str
    criterion: str
    budget: str
    macs: int
    macs_kept: float
    """As a fraction of the dense network's."""
    params: int
    params_kept: float


class Candidate(_Part):
    """One network on one target: a bundle's, or a dense one beside which bundles were measured."""

    label: str
    is_dense: bool = False
    accuracy: float | None
    images: int
    """How many the accuracy was taken on."""
    p50_ms: float | None
    """Of a dense network, the median over the bundles that share it."""
    sessions: int = 1
    """Of how many measurements `p50_ms` is the median."""
    speedup: Speedup | None = None
    efficiency: float | None = None
    """The speed-up over the MACs reduction; 1 is what the MACs promise."""
    verdict: Literal["faster", "not faster", "unstable", "not measured", "dense"]
    reason: str
    on_front: bool = False
    """No other candidate is as accurate and as fast, and better in one of the two."""
    behind: str | None = None
    """The label of a candidate on the front that is as accurate and as fast, and better in one of the two."""


class TargetComparison(_Part):
    """All candidates on one target, measured alike."""

    target: str
    precision: str
    protocol: LatencyProtocol | None
    machine: Machine | None
    """Both are None where nothing was measured."""
    candidates: list[Candidate]
    notes: list[str] = []

    @property
    def name(self) -> str:
        """Target and precision: `ort-cpu fp32`."""
        return f"{self.target} {self.precision}"

    @property
    def placed(self) -> list[Candidate]:
        """The candidates that have a place in a plot of accuracy against latency, the fastest first."""
        placed = [each for each in self.candidates if each.on_front or each.behind]
        return sorted(placed, key=lambda each: (each.p50_ms or 0.0, each.accuracy or 0.0))


class BundleComparison(_Part):
    """Two or more bundles, by network and by target."""

    networks: list[ComparedNetwork]
    targets: list[TargetComparison]
    notes: list[str] = []


class _Bundle(NamedTuple):
    label: str
    report: Report

    def row(self, key: tuple[str, str]) -> EngineRow:
        return next(row for row in self.report.engines if _key(row) == key)

    def dense(self) -> tuple[str, str, int, int, float | None]:
        """What tells its dense network from another one."""
        report = self.report
        return (report.model, report.data, report.cost.dense.macs, report.cost.dense.params, report.accuracy.dense)


class _Measured(NamedTuple):
    label: str
    row: EngineRow
    protocol: LatencyProtocol
    machine: Machine


def compare_bundles(paths: Sequence[Path], *, target: str | None = None) -> BundleComparison:
    """The bundles side by side, on every target that all of them have (or on `target` alone).

    The same bundle may be given twice. A candidate is on the Pareto front of its target when no other one, dense
    networks included, is as accurate and as fast and better in one of the two; an unstable measurement has no place.
    Raises: ValueError for fewer than two bundles, no common target, or unlike protocols; MachineMismatch for unlike
    machines; IntegrityError, FileNotFoundError.
    """
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} bundles to compare: at least two expected. Give the folders of two or more.")
    bundles = [_read_bundle(path, label) for path, label in zip(paths, bundle_labels(paths), strict=True)]
    keys = _common_targets(bundles, None if target is None else str(parse_target(target)))
    return BundleComparison(
        networks=[_network(bundle) for bundle in bundles],
        targets=[_compare_on(key, bundles) for key in keys],
        notes=list(_left_out(bundles, keys)) if target is None else [],
    )


def bundle_labels(paths: Sequence[Path]) -> list[str]:
    """A name for each bundle: its folder's, with as many parents as it takes to tell them apart.

    >>> bundle_labels([Path("/a/x"), Path("/b/x"), Path("/a/y"), Path("/a/y")])
    ['a/x', 'b/x', 'y', 'y (2)']
    """
    places = [path.resolve() for path in paths]
    labels, seen = [], {}
    for place in places:
        others = [other for other in places if other != place]
        depth = 1
        while depth < len(place.parts) and any(other.parts[-depth:] == place.parts[-depth:] for other in others):
            depth += 1
        seen[place] = seen.get(place, 0) + 1
        again = f" ({seen[place]})" if seen[place] > 1 else ""
        labels.append(_printable(Path(*place.parts[-depth:]).as_posix()) + again)
    return labels


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int | None]:
    """For each (accuracy, latency): None where it is on the front, else which point of the front leaves it behind.

    A point is left behind by one that is at least as accurate and at least as fast, and better in one of the two; of
    several on the front, the fastest is named. Equal points are all on the front.

    >>> pareto_front([(0.9, 2.0), (0.8, 1.0), (0.8, 1.5)])
    [None, None, 1]
    """
    better = [[j for j, other in enumerate(points) if _leaves_behind(other, point)] for point in points]
    return [
        min((j for j in ahead if not better[j]), key=lambda j: (points[j][1], j)) if ahead else None for ahead in better
    ]


def _leaves_behind(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] <= other[1]


def _read_bundle(path: Path, label: str) -> _Bundle:
    """Raises: IntegrityError when a file, or a row of the report, is about another build; FileNotFoundError."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such bundle. Give the folder that `chip-deploy prune --out` wrote.")
    digests = {entry.path: entry.sha256 for entry in verify_bundle(path).files}
    report = read_report(path)
    for row in report.engines:
        if digests.get(row.file) != row.sha256:
            raise IntegrityError(
                f"{path / row.file}: report.json tells of another build of it. Run `chip-deploy measure`."
            )
    return _Bundle(label, report)


def _common_targets(bundles: Sequence[_Bundle], wanted: str | None) -> list[tuple[str, str]]:
    """Target and precision of the engines that all bundles have, in the order of the first one; never none."""
    have = {bundle.label: [_key(row) for row in bundle.report.engines] for bundle in bundles}
    common = [key for key in have[bundles[0].label] if all(key in keys for keys in have.values())]
    if wanted is not None:
        common = [key for key in common if key[0] == wanted]
    if not common:
        lists = "; ".join(
            f"{label} has {', '.join(' '.join(key) for key in keys) or 'no engine'}" for label, keys in have.items()
        )
        asked = "no target in common" if wanted is None else f"not all of them have an engine for '{wanted}'"
        raise ValueError(f"{asked}: {lists}. Build the missing engine with `chip-deploy build`.")
    return common


def _left_out(bundles: Sequence[_Bundle], keys: Sequence[tuple[str, str]]) -> Iterator[str]:
    for bundle in bundles:
        names = [" ".join(_key(row)) for row in bundle.report.engines if _key(row) not in keys]
        if names:
            yield f"{bundle.label} also has {', '.join(names)}, which not all of the others have."


def _network(bundle: _Bundle) -> ComparedNetwork:
    report = bundle.report
    dense, pruned = report.cost.dense, report.cost.pruned
    return ComparedNetwork(
        label=bundle.label,
        model=report.model,
        data=report.data,
        criterion=report.criterion,
        budget=report.budget,
        macs=pruned.macs,
        macs_kept=pruned.macs / dense.macs,
        params=pruned.params,
        params_kept=pruned.params / dense.params,
    )


def _compare_on(key: tuple[str, str], bundles: Sequence[_Bundle]) -> TargetComparison:
    """Raises: ValueError for unlike protocols, MachineMismatch for unlike machines."""
    measured = [
        _Measured(bundle.label, row, row.protocol, row.machine or bundle.report.machine)
        for bundle in bundles
        if (row := bundle.row(key)).protocol is not None and row.verdict != "not measured"
    ]
    for one, other in combinations(measured, 2):
        _require_alike(one, other, where=" ".join(key))
    dense = list(_dense_candidates(key, bundles))
    candidates = [*dense, *(_candidate(bundle, bundle.row(key)) for bundle in bundles)]
    shared = [
        f"{each.label}: its p50 is the median of {each.sessions} measurements." for each in dense if each.sessions > 1
    ]
    notes = [*shared, *_not_placed(candidates), *_sessions_apart(key, bundles)]
    unlike = _unlike_accuracies(bundles)
    if unlike:
        notes.append(unlike)
    return TargetComparison(
        target=key[0],
        precision=key[1],
        protocol=measured[0].protocol if measured else None,
        machine=measured[0].machine if measured else None,
        candidates=candidates if unlike else _with_front(candidates),
        notes=notes,
    )


def _require_alike(one: _Measured, other: _Measured, *, where: str) -> None:
    unlike = [
        f"{name} {getattr(one.protocol, name)} and {getattr(other.protocol, name)}"
        for name in ("id", "batch", "threads", "openings")
        if getattr(one.protocol, name) != getattr(other.protocol, name)
    ]
    if unlike:
        raise ValueError(
            f"{where}: {one.label} and {other.label} were measured by unlike protocols ({'; '.join(unlike)}). "
            "Run `chip-deploy measure` on one of them as the other was."
        )
    if fingerprint(one.machine) != fingerprint(other.machine):
        apart = differences(one.machine, other.machine, there=f"for {one.label}", here_is=f"for {other.label}")
        raise MachineMismatch(
            f"{where}: {one.label} was measured on another machine than {other.label} ({apart}). "
            "Run `chip-deploy measure` on both on one machine."
        )


def _candidate(bundle: _Bundle, row: EngineRow) -> Candidate:
    report = bundle.report
    reduction = report.cost.dense.macs / report.cost.pruned.macs
    return Candidate(
        label=bundle.label,
        accuracy=report.accuracy.onnx if row.accuracy is None else row.accuracy,
        images=report.accuracy.n,
        p50_ms=row.latency_ms.p50 if row.latency_ms else None,
        speedup=row.speedup,
        efficiency=row.speedup.estimate / reduction if row.speedup else None,
        verdict=row.verdict,
        reason=row.reason,
    )


def _dense_candidates(key: tuple[str, str], bundles: Sequence[_Bundle]) -> Iterator[Candidate]:
    """Each dense network once, however many bundles were cut from it; an unstable session tells nothing of it."""
    families: dict[tuple[str, str, int, int, float | None], list[_Bundle]] = {}
    for bundle in bundles:
        families.setdefault(bundle.dense(), []).append(bundle)
    alone = len(families) == 1 and all(bundle.label != "dense" for bundle in bundles)
    for family in families.values():
        rows = [row for row in (bundle.row(key) for bundle in family) if row.verdict != "unstable"]
        p50s_ms = [row.dense_latency_ms.p50 for row in rows if row.dense_latency_ms]
        accuracy = family[0].report.accuracy
        yield Candidate(
            label="dense" if alone else f"dense of {', '.join(bundle.label for bundle in family)}",
            is_dense=True,
            accuracy=accuracy.dense,
            images=accuracy.n,
            p50_ms=statistics.median(p50s_ms) if p50s_ms else None,
            verdict="dense",
            sessions=len(p50s_ms),
            reason="the network before the cut",
        )


def _with_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, those with an accuracy and a steady latency placed before or behind one another."""
    points = {
        number: (each.accuracy, each.p50_ms)
        for number, each in enumerate(candidates)
        if each.accuracy is not None and each.p50_ms is not None and each.verdict != "unstable"
    }
    numbers = list(points)
    changed = list(candidates)
    for number, place in zip(numbers, pareto_front(list(points.values())), strict=True):
        behind = None if place is None else candidates[numbers[place]].label
        changed[number] = candidates[number].model_copy(update={"on_front": behind is None, "behind": behind})
    return changed


def _not_placed(candidates: Sequence[Candidate]) -> Iterator[str]:
    if all(each.accuracy is None for each in candidates):
        yield "no accuracy was recorded, so there is no Pareto front."
    for each in candidates:
        if each.verdict in ("unstable", "not measured"):
            yield f"{each.label}: {each.verdict}: {each.reason.rstrip('.')}."


def _sessions_apart(key: tuple[str, str], bundles: Sequence[_Bundle]) -> Iterator[str]:
    """A note where one dense network was not equally fast in two sessions."""
    sessions: dict[tuple[str, int], list[tuple[float, str]]] = {}
    for bundle in bundles:
        quantiles = bundle.row(key).dense_latency_ms
        if quantiles:
            dense = (bundle.report.model, bundle.report.cost.dense.macs)
            sessions.setdefault(dense, []).append((quantiles.p50, bundle.label))
    for (model, _), p50s_ms in sessions.items():
        (fast_ms, fast), (slow_ms, slow) = min(p50s_ms), max(p50s_ms)
        if slow_ms > SESSIONS_APART * fast_ms:
            yield (
                f"the dense {model} took {fast_ms:.4g} ms beside {fast} and {slow_ms:.4g} ms beside {slow}: the "
                "machine was not equally fast, so the speed-ups tell more than the milliseconds."
            )


def _unlike_accuracies(bundles: Sequence[_Bundle]) -> str:
    """Why the accuracies cannot be held against each other, as a sentence; empty when they can."""
    found = {(bundle.report.data, bundle.report.accuracy.n): bundle.label for bundle in bundles}
    if len(found) == 1:
        return ""
    texts = [f"{label} on {n} images of {data}" for (data, n), label in found.items()]
    return f"the accuracies are of unlike images, so there is no Pareto front: {', '.join(texts)}."


def _key(row: EngineRow) -> tuple[str, str]:
    return row.target, row.precision


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
