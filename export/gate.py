"""Whether a bundle may ship: its files, then its outputs, then its accuracy and size, then its latency."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, computed_field

from .agree import Agreement, compare_outputs, require_agreement
from .bundle import MANIFEST, verify_bundle
from .errors import IntegrityError, ParityFailed
from .golden import Golden, engine_agreement, read_golden, rounding_of, run_in_batches
from .laps import Speedup, bootstrap_quantile, laps_needed, session_spread
from .laps_file import RecordedLaps, find_laps, read_laps
from .machine import Machine, differences, fingerprint, read_machine
from .requirement import METRICS, QUANTILES, Requirement, examples
from .requirement import parse_requirement as parse_requirement
from .target import Session, TargetSpec, parse_target, read_engine
from .targets import make_target

Status = Literal["met", "failed", "inconclusive", "another machine", "broken"]

# Metric -> how a sentence names it, its unit there, and how many of the metric's own units that is.
TEXTS = {
    "top1_drop": ("top-1 drop", " points", 1.0),
    "size": ("size", " MB", 1e6),
    "speedup": ("speed-up", "", 1.0),
    **{name: (name, " ms", 1.0) for name in QUANTILES},
}
# Required of every bundle, whatever else is.
INTEGRITY = "integrity"
PARITY = "parity"
ONNX = "model.onnx"
REPORT = "report.json"


class GateRow(BaseModel):
    """One requirement, held against one engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requirement: str
    """As it was written, or `integrity` or `parity`, which are required of every bundle."""
    engine: str
    """The file in the bundle that it was held against."""
    estimate: float | None
    """In the unit of the requirement's metric."""
    bound: float | None
    """The end of the estimate's 95 % interval that lies towards the limit; None where the value is exact."""
    value: str = ""
    """Both as text, with the unit; empty where there is no value."""
    status: Status
    sentence: str


class JudgedEngine(BaseModel):
    """An engine that the requirements were held against, and what is recorded of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Target and precision: `ort-cpu fp32`."""
    file: str
    verdict: Literal["faster", "not faster", "unstable", "not measured"]
    reason: str
    speedup: Speedup | None
    dense_top1: float | None
    """Fraction of the images that the dense network gets right."""
    top1: float | None
    """That of the engine, or of the ONNX file where the engine's own was not taken."""


class GateResult(BaseModel):
    """Every requirement held against every engine that it concerns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str = ""
    rows: list[GateRow]
    engines: list[JudgedEngine] = []
    left_out: list[str] = []
    """Files of engines that were not judged, because they were not measured while others were."""

    @computed_field
    @property
    def exit_code(self) -> int:
        """6 when a file is broken; else 4 when anything failed; else 3 when a latency belongs to another machine.

        Otherwise 0 when all is met, and 5 when something is inconclusive; a gate that judged nothing is.
        """
        statuses = {row.status for row in self.rows}
        if "broken" in statuses:
            return 6
        if "failed" in statuses:
            return 4
        if "another machine" in statuses:
            return 3
        return 0 if statuses == {"met"} else 5

    @computed_field
    @property
    def verdict(self) -> str:
        """What the gate says of the bundle, in one sentence."""
        met = sum(row.status == "met" for row in self.rows)
        end = f" ({met} of {len(self.rows)} checks met)."
        match self.exit_code:
            case 0:
                return f"passed: all {met} checks are met."
            case 6:
                return "failed: the bundle is broken."
            case 4:
                return f"failed: {self._asked('failed')}{end}"
            case 3:
                return f"cannot be judged here: {self._asked('another machine')}, measured on another machine{end}"
        return f"inconclusive: {self._asked('inconclusive') or 'nothing was judged'}{end}"

    def _asked(self, status: Status) -> str:
        return ", ".join(dict.fromkeys(row.requirement for row in self.rows if row.status == status))


class _Part(BaseModel):
    """A part of report.json, of which only what a gate needs is read."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _Accuracy(_Part):
    dense: float | None = None
    onnx: float | None = None


class _Engine(_Part):
    target: str
    precision: str
    file: str
    sha256: str
    speedup: Speedup | None = None
    accuracy: float | None = None
    agreement: Agreement | None = None
    verdict: Literal["faster", "not faster", "unstable", "not measured"]
    reason: str

    @property
    def measured(self) -> bool:
        return self.verdict != "not measured"


class _Precision(_Part):
    precision: str
    accuracy: float | None = None


class _Report(_Part):
    accuracy: _Accuracy
    agreement: Agreement | None = None
    precisions: list[_Precision] = []
    engines: list[_Engine]

    def onnx_top1(self, precision: str) -> float | None:
        """The accuracy of the ONNX file in that precision."""
        if precision == "fp32":
            return self.accuracy.onnx
        return next((row.accuracy for row in self.precisions if row.precision == precision), None)


class _Found(NamedTuple):
    """A value with the interval it may lie in; both ends are the value where it is exact."""

    estimate: float
    low: float
    high: float


class _Unknown(NamedTuple):
    """Why there is no value, as a phrase, and what that makes of a requirement."""

    why: str
    status: Status = "inconclusive"


class _Parity(NamedTuple):
    """How closely a file's outputs agree, with which arithmetic it computes, and how that is known."""

    precision: str
    agreement: Agreement | None
    how: str


class _Facts(NamedTuple):
    """A bundle whose files are what its manifest says, and the machine that judges it."""

    bundle: Path
    report: _Report
    sizes: dict[str, int]
    """Bytes of each file, by path."""
    here: Machine


def check_gate(bundle: Path, requirements: Sequence[Requirement], *, target: str | None = None) -> GateResult:
    """Each requirement held against the bundle's engines: those of `target`, or every one that was measured.

    Where none was measured, all are judged: nothing passes because nobody looked. In order: the files are what the
    manifest says; outputs for the golden images are the network's (run here where this machine can, else as
    recorded); accuracy; size; latency, as recorded on this machine. An engine whose outputs are others is judged no
    further.
    A requirement is met when the estimate and its bound both keep the limit, failed when neither does, and
    inconclusive in between, or when the engine was not measured, or not steadily; a latency that was recorded on
    another machine is neither. A broken file ends the gate with that one row.
    Raises: ValueError for no requirement, or a target that the bundle has no engine for.
    """
    if not requirements:
        raise ValueError(f"nothing is required of {bundle}. {examples()}")
    wanted = None if target is None else parse_target(target)
    name = os.fsencode(bundle.resolve().name).decode(errors="replace")
    try:
        return _held_against(_read_facts(bundle), requirements, wanted).model_copy(update={"bundle": name})
    except IntegrityError as err:
        return GateResult(bundle=name, rows=[_without_value(INTEGRITY, MANIFEST, "broken", str(err))])


def _held_against(facts: _Facts, requirements: Sequence[Requirement], wanted: TargetSpec | None) -> GateResult:
    """The gate of a bundle whose files are what its manifest says. Raises: IntegrityError; ValueError."""
    engines = _engines_for(facts, wanted)
    if wanted is None:
        engines = [engine for engine in engines if engine.measured] or engines
    rows = [_integrity_row(facts), *_parity_rows(facts, engines)]
    others = {row.engine for row in rows if row.status == "failed"}
    return GateResult(
        rows=[*rows, *_requirement_rows(facts, list(dict.fromkeys(requirements)), engines, others)],
        engines=[_judged(engine, facts.report) for engine in engines],
        left_out=[engine.file for engine in facts.report.engines if wanted is None and engine not in engines],
    )


def _read_facts(bundle: Path) -> _Facts:
    """What there is to judge. Raises: IntegrityError when a file, or a row of the report, is about another build."""
    files = {entry.path: entry for entry in verify_bundle(bundle).files}
    path = bundle / REPORT
    if REPORT not in files:
        raise IntegrityError(f"{path}: missing, so nothing is known of this bundle. Build it again.")
    try:
        report = _Report.model_validate_json(path.read_bytes())
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise IntegrityError(f"{path}: not a report ({where}: {first['msg']}). Build the bundle again.") from err
    for engine in report.engines:
        entry = files.get(engine.file)
        if entry is None or entry.sha256 != engine.sha256:
            raise IntegrityError(f"{engine.file}: {REPORT} tells of another build of it. Run `chip-deploy measure`.")
    return _Facts(bundle, report, {name: entry.bytes for name, entry in files.items()}, read_machine())


def _engines_for(facts: _Facts, wanted: TargetSpec | None) -> list[_Engine]:
    """The engines of a target (a name without capabilities means any), or all; never none.

    Raises: ValueError when there is none.
    """
    engines = facts.report.engines
    if wanted is not None:
        engines = [engine for engine in engines if str(wanted) in (engine.target, engine.target.partition(":")[0])]
    if not engines:
        have = ", ".join(engine.target for engine in facts.report.engines) or "no engine at all"
        asked = f"no engine for target '{wanted}'" if wanted else "no engine to judge"
        raise ValueError(f"{facts.bundle}: {asked} (it has: {have}). Build one with `chip-deploy build`.")
    return engines


def _judged(engine: _Engine, report: _Report) -> JudgedEngine:
    return JudgedEngine(
        name=f"{engine.target} {engine.precision}",
        file=engine.file,
        verdict=engine.verdict,
        reason=engine.reason,
        speedup=engine.speedup,
        dense_top1=report.accuracy.dense,
        top1=_top1(engine, report),
    )


def _integrity_row(facts: _Facts) -> GateRow:
    files = f"{len(facts.sizes)} files"
    return GateRow(
        requirement=INTEGRITY,
        engine=MANIFEST,
        estimate=None,
        bound=None,
        value=files,
        status="met",
        sentence=f"{MANIFEST}: {files}, each as it says.",
    )


def _parity_rows(facts: _Facts, engines: Sequence[_Engine]) -> Iterator[GateRow]:
    """The ONNX file, then each engine, against the golden outputs."""
    golden = read_golden(facts.bundle)
    yield _parity_row(ONNX, golden, functools.partial(_onnx_parity, facts, golden))
    for engine in engines:
        yield _parity_row(engine.file, golden, functools.partial(_engine_parity, facts, engine, golden))


def _parity_row(file: str, golden: Golden, compare: Callable[[], _Parity]) -> GateRow:
    try:
        precision, agreement, how = compare()
        if agreement is None:
            sentence = f"{file}: whether its outputs are the network's is not known: {how}."
            return _without_value(PARITY, file, "inconclusive", sentence)
        require_agreement(agreement, what=file, precision=precision, rounding=rounding_of(precision, golden))
    except ParityFailed as err:
        sentence = str(err) if str(err).startswith(file) else f"{file}: {err}"
        return _without_value(PARITY, file, "failed", sentence)
    return GateRow(
        requirement=PARITY,
        engine=file,
        estimate=agreement.largest_relative_difference,
        bound=None,
        value=f"difference {agreement.largest_relative_difference:.1e}",
        status="met",
        sentence=f"{file}: outputs are the network's, {how}: {agreement}.",
    )


def _requirement_rows(
    facts: _Facts, requirements: Sequence[Requirement], engines: Sequence[_Engine], others: set[str]
) -> Iterator[GateRow]:
    """Requirement by requirement in the order of METRICS; `others` are files whose outputs are not the network's."""
    for requirement in sorted(requirements, key=lambda requirement: list(METRICS).index(requirement.metric)):
        for engine in engines:
            wrong = next((file for file in (ONNX, engine.file) if file in others), None)
            found = (
                _Unknown(f"the outputs of {wrong} are not the network's")
                if wrong
                else _find(requirement.metric, engine, facts)
            )
            yield _judge(requirement, engine.file, found)


def _onnx_parity(facts: _Facts, golden: Golden) -> _Parity:
    target = make_target(TargetSpec(name="ort-cpu"))
    reason = target.unusable()
    if reason:
        return _recorded("fp32", facts.report.agreement, reason.rstrip("."))
    with closing(target.open_onnx(facts.bundle / ONNX)) as session:
        return _run(ONNX, "fp32", session, golden, compare=functools.partial(compare_outputs, golden.outputs))


def _engine_parity(facts: _Facts, engine: _Engine, golden: Golden) -> _Parity:
    path = facts.bundle / engine.file
    built = read_engine(path)
    target = make_target(parse_target(engine.target))
    reason = target.cannot_run(built)
    if reason:
        return _recorded(built.arithmetic, engine.agreement, reason)
    with closing(target.open(path)) as session:
        return _run(
            engine.file, built.arithmetic, session, golden, compare=functools.partial(engine_agreement, built, golden)
        )


def _run(
    file: str, precision: str, session: Session, golden: Golden, *, compare: Callable[[np.ndarray], Agreement]
) -> _Parity:
    """Raises: ParityFailed also for a session that takes other images, or gives outputs of another shape."""
    try:
        agreement = compare(run_in_batches(session, golden.images))
    except ValueError as err:
        raise ParityFailed(f"{file}: cannot give the golden outputs: {err}") from err
    return _Parity(precision, agreement, "run here")


def _recorded(precision: str, agreement: Agreement | None, reason: str) -> _Parity:
    how = f"as recorded ({reason})" if agreement else f"nothing is recorded, and it cannot run here ({reason})"
    return _Parity(precision, agreement, how)


def _find(metric: str, engine: _Engine, facts: _Facts) -> _Found | _Unknown:
    """The value of a metric with its interval; or why there is none."""
    if metric == "size":
        return _exactly(facts.sizes[engine.file])
    if metric == "top1_drop":
        return _top1_drop(engine, facts.report)
    return _latency(metric, engine, facts)


def _top1(engine: _Engine, report: _Report) -> float | None:
    return report.onnx_top1(engine.precision) if engine.accuracy is None else engine.accuracy


def _top1_drop(engine: _Engine, report: _Report) -> _Found | _Unknown:
    """Percentage points of top-1 accuracy that the engine, or the ONNX file it was built from, lost."""
    dense, after = report.accuracy.dense, _top1(engine, report)
    if dense is None or after is None:
        return _Unknown("no accuracy was recorded")
    return _exactly(round(100 * (dense - after), 9))


def _latency(metric: str, engine: _Engine, facts: _Facts) -> _Found | _Unknown:
    """Speed-up, or a percentile in ms, if it was recorded on this machine and steadily."""
    if not engine.measured:
        return _Unknown(f"not measured: {engine.reason.rstrip('.')}")
    path = find_laps(facts.bundle / engine.file)
    if path.relative_to(facts.bundle).as_posix() not in facts.sizes:
        return _Unknown("its laps are missing; run `chip-deploy measure`")
    try:
        laps = read_laps(path)
    except ValueError as err:
        raise IntegrityError(str(err)) from err
    if fingerprint(laps.machine) != fingerprint(facts.here):
        where = f"measured on another machine ({differences(laps.machine, facts.here)})"
        return _Unknown(f"{where}; run `chip-deploy measure` here, or the gate there", "another machine")
    if not laps.complete:
        return _Unknown("its measurement was interrupted; run `chip-deploy measure`")
    if engine.verdict == "unstable":
        return _Unknown(f"unstable: {engine.reason.rstrip('.')}")
    if metric != "speedup":
        return _percentile(metric, laps)
    speedup = engine.speedup
    return _Found(speedup.estimate, speedup.low, speedup.high) if speedup else _Unknown("no speed-up was recorded")


def _percentile(metric: str, laps: RecordedLaps) -> _Found | _Unknown:
    """By the rule of the protocol, with what one session is off by added to the interval, as for the speed-up."""
    q = QUANTILES[metric]
    estimate = getattr(laps.protocol.summarise(laps.pruned_laps_ms), metric)
    ends = bootstrap_quantile(laps.pruned, q, resamples=laps.protocol.resamples, seed=laps.protocol.seed)
    if estimate is None or ends is None:
        return _Unknown(f"{metric} needs {laps_needed(q)} laps, {len(laps.pruned_laps_ms)} were recorded")
    spread = session_spread(laps.pruned) / math.sqrt(2)  # of one session; the constant is for the ratio of two
    low, high = (math.hypot(math.log(estimate / end), spread) for end in ends)
    return _Found(estimate, estimate * math.exp(-low), estimate * math.exp(high))


def _judge(requirement: Requirement, engine: str, found: _Found | _Unknown) -> GateRow:
    if isinstance(found, _Unknown):
        sentence = f"{engine}: {requirement} cannot be judged: {found.why}."
        return _without_value(str(requirement), engine, found.status, sentence)
    met = requirement.met_by(found.estimate)
    # The end of the interval on the limit's side: the pessimistic one of a value that meets, the hopeful one else.
    bound = found.low if met == (METRICS[requirement.metric].comparison == ">=") else found.high
    sure = requirement.met_by(bound) == met
    status: Status = "inconclusive" if not sure else "met" if met else "failed"
    words = {"met": f"meets {requirement}", "failed": f"misses {requirement}"}
    name, value = _value_text(requirement.metric, found)
    return GateRow(
        requirement=str(requirement),
        engine=engine,
        estimate=found.estimate,
        bound=None if found.low == found.high else bound,
        value=value,
        status=status,
        sentence=f"{engine}: {name} {value} {words.get(status, f'is too close to {requirement} to tell')}.",
    )


def _without_value(requirement: str, engine: str, status: Status, sentence: str) -> GateRow:
    return GateRow(requirement=requirement, engine=engine, estimate=None, bound=None, status=status, sentence=sentence)


def _value_text(metric: str, found: _Found) -> tuple[str, str]:
    """A metric's name and its value: `p99`, `3.81 ms (95 % interval 3.7 to 3.95)`."""
    name, unit, scale = TEXTS[metric]
    text = f"{found.estimate / scale:.4g}{unit}"
    if found.low == found.high:
        return name, text
    return name, f"{text} (95 % interval {found.low / scale:.4g} to {found.high / scale:.4g})"


def _exactly(value: float) -> _Found:
    return _Found(value, value, value)
