"""Whether a bundle may ship: its files, then its outputs, then its accuracy and size, then its latency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, computed_field

from .agree import Agreement, compare_outputs, require_agreement
from .bundle import verify_bundle
from .errors import IntegrityError, MachineMismatch, ParityFailed
from .golden import Golden, read_golden, run_in_batches
from .laps import bootstrap_quantile, laps_needed, quantile
from .machine import Machine, differences, fingerprint, read_machine
from .measure import RecordedLaps, laps_path, read_laps
from .requirement import METRICS, QUANTILES, Requirement, examples
from .requirement import parse_requirement as parse_requirement
from .target import Session, TargetSpec, parse_target, read_engine
from .targets import make_target

Status = Literal["met", "failed", "inconclusive"]

LATENCY = ("speedup", *QUANTILES)
# Metric -> how a sentence names it, its unit there, and how many of the metric's own units that is.
TEXTS = {
    "top1_drop": ("top-1 drop", " points", 1.0),
    "size": ("size", " MB", 1e6),
    "speedup": ("speed-up", "", 1.0),
    **{name: (name, " ms", 1.0) for name in QUANTILES},
}
PARITY = "parity"
ONNX = "model.onnx"
REPORT = "report.json"


class GateRow(BaseModel):
    """One requirement, held against one engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requirement: str
    engine: str
    """Its file in the bundle."""
    estimate: float | None
    """In the unit of the requirement's metric."""
    bound: float | None
    """The end of the estimate's 95 % interval that lies towards the limit; None where the value is exact."""
    status: Status
    sentence: str


class GateResult(BaseModel):
    """Every requirement held against every engine that it concerns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: list[GateRow]

    @computed_field
    @property
    def exit_code(self) -> int:
        """0 when everything is met, 4 when anything failed, else 5; a gate that judged nothing is inconclusive."""
        statuses = {row.status for row in self.rows}
        if "failed" in statuses:
            return 4
        return 0 if statuses == {"met"} else 5


class _Part(BaseModel):
    """A part of report.json, of which only what a gate needs is read."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _Accuracy(_Part):
    dense: float | None = None
    onnx: float | None = None


class _Speedup(_Part):
    estimate: float
    low: float
    high: float


class _Engine(_Part):
    target: str
    precision: str
    file: str
    sha256: str
    speedup: _Speedup | None = None
    accuracy: float | None = None
    agreement: Agreement | None = None
    verdict: Literal["faster", "not faster", "unstable", "not measured"]
    reason: str

    @property
    def measured(self) -> bool:
        return self.verdict != "not measured"


class _Report(_Part):
    accuracy: _Accuracy
    agreement: Agreement | None = None
    engines: list[_Engine]


class _Found(NamedTuple):
    """A value with the interval it may lie in; both ends are the value where it is exact."""

    estimate: float
    low: float
    high: float


class _Parity(NamedTuple):
    """A file whose outputs were compared, with which arithmetic it computes, and how that is known."""

    file: str
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
    """Each requirement held against the bundle's engines: those of `target`, or all that it concerns.

    Accuracy and size concern every engine; parity and latency every one that was measured, or that `target` names. In
    order: the files are what the manifest says; outputs for the golden images are the network's (run here where this
    machine can, else as recorded); accuracy; size; latency, as recorded on this machine.
    A requirement is met when the estimate and its bound both keep the limit, failed when neither does, and
    inconclusive in between, or when the engine was not measured, or not steadily.
    Raises: ValueError for no requirement, or a target that the bundle has no engine for; IntegrityError;
    ParityFailed; MachineMismatch when a latency was recorded on another machine.
    """
    if not requirements:
        raise ValueError(f"nothing is required of {bundle}. {examples()}")
    wanted = None if target is None else parse_target(target)
    facts = _read_facts(bundle)
    engines = _engines_for(facts, wanted)
    measured = engines if wanted else [engine for engine in engines if engine.measured]
    rows = list(_parity_rows(facts, measured))
    for requirement in sorted(requirements, key=lambda requirement: list(METRICS).index(requirement.metric)):
        concerned = measured or engines if requirement.metric in LATENCY else engines
        left_out = [engine.file for engine in engines if engine not in concerned]
        rows += [
            _judge(requirement, engine.file, _find(requirement.metric, engine, facts), left_out=left_out)
            for engine in concerned
        ]
    return GateResult(rows=rows)


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


def _parity_rows(facts: _Facts, engines: Sequence[_Engine]) -> Iterator[GateRow]:
    """The ONNX file, then each engine, against the golden outputs. Raises: ParityFailed."""
    golden = read_golden(facts.bundle)
    yield _parity_row(_onnx_parity(facts, golden))
    for engine in engines:
        yield _parity_row(_engine_parity(facts, engine, golden))


def _parity_row(parity: _Parity) -> GateRow:
    """Raises: ParityFailed when the outputs are known not to be the network's."""
    file, precision, agreement, how = parity
    if agreement is None:
        sentence = f"{file}: whether its outputs are the network's is not known: {how}."
        return _undecided(PARITY, file, sentence)
    require_agreement(agreement, what=file, precision=precision)
    return GateRow(
        requirement=PARITY,
        engine=file,
        estimate=agreement.largest_relative_difference,
        bound=None,
        status="met",
        sentence=f"{file}: outputs are the network's, {how}: {agreement}.",
    )


def _onnx_parity(facts: _Facts, golden: Golden) -> _Parity:
    target = make_target(TargetSpec(name="ort-cpu"))
    reason = target.unusable()
    if reason:
        return _recorded(ONNX, "fp32", facts.report.agreement, reason.rstrip("."))
    with closing(target.open_onnx(facts.bundle / ONNX)) as session:
        return _run(ONNX, "fp32", session, golden)


def _engine_parity(facts: _Facts, engine: _Engine, golden: Golden) -> _Parity:
    path = facts.bundle / engine.file
    built = read_engine(path)
    target = make_target(parse_target(engine.target))
    reason = target.cannot_run(built)
    if reason:
        return _recorded(engine.file, built.arithmetic, engine.agreement, reason)
    with closing(target.open(path)) as session:
        return _run(engine.file, built.arithmetic, session, golden)


def _run(file: str, precision: str, session: Session, golden: Golden) -> _Parity:
    """Raises: ParityFailed also for a session that takes other images, or gives outputs of another shape."""
    try:
        agreement = compare_outputs(golden.outputs, run_in_batches(session, golden.images))
    except ValueError as err:
        raise ParityFailed(f"{file}: cannot give the golden outputs: {err}") from err
    return _Parity(file, precision, agreement, "run here")


def _recorded(file: str, precision: str, agreement: Agreement | None, reason: str) -> _Parity:
    how = "as recorded" if agreement else "and nothing is recorded"
    return _Parity(file, precision, agreement, f"{how} ({reason})")


def _find(metric: str, engine: _Engine, facts: _Facts) -> _Found | str:
    """The value of a metric with its interval; or why there is none, as a phrase."""
    if metric == "size":
        return _exactly(facts.sizes[engine.file])
    if metric == "top1_drop":
        return _top1_drop(engine, facts.report.accuracy)
    return _latency(metric, engine, facts)


def _top1_drop(engine: _Engine, accuracy: _Accuracy) -> _Found | str:
    """Percentage points of top-1 accuracy that the engine, or the ONNX file it was built from, lost."""
    after = accuracy.onnx if engine.accuracy is None else engine.accuracy
    if accuracy.dense is None or after is None:
        return "no accuracy was recorded"
    return _exactly(round(100 * (accuracy.dense - after), 9))


def _latency(metric: str, engine: _Engine, facts: _Facts) -> _Found | str:
    """Speed-up or a percentile in ms. Raises: MachineMismatch when it was recorded on another machine."""
    if not engine.measured:
        return f"not measured: {engine.reason.rstrip('.')}"
    path = laps_path(facts.bundle / engine.file)
    if path.relative_to(facts.bundle).as_posix() not in facts.sizes:
        return "its laps are missing; run `chip-deploy measure`"
    laps = read_laps(path)
    _require_same_machine(laps.machine, facts.here, what=engine.file)
    if engine.verdict == "unstable":
        return f"unstable: {engine.reason.rstrip('.')}"
    if metric == "speedup":
        return _Found(*(value for _, value in engine.speedup)) if engine.speedup else "no speed-up was recorded"
    return _percentile(metric, laps)


def _percentile(metric: str, laps: RecordedLaps) -> _Found | str:
    q = QUANTILES[metric]
    estimate = quantile(laps.pruned_laps_ms, q)
    ends = bootstrap_quantile(laps.pruned, q, resamples=laps.protocol.resamples, seed=laps.protocol.seed)
    if estimate is None or ends is None:
        return f"{metric} needs {laps_needed(q)} laps, {len(laps.pruned_laps_ms)} were recorded"
    return _Found(estimate, *ends)


def _require_same_machine(recorded: Machine, here: Machine, *, what: str) -> None:
    if fingerprint(recorded) != fingerprint(here):
        raise MachineMismatch(
            f"{what}: measured on another machine ({differences(recorded, here)}). "
            "Run `chip-deploy measure` here, or the gate there."
        )


def _judge(requirement: Requirement, engine: str, found: _Found | str, *, left_out: Sequence[str]) -> GateRow:
    """The row of one requirement and one engine; `left_out` are engines that it does not concern."""
    end = f"; not measured, and so not judged: {', '.join(left_out)}." if left_out else "."
    if isinstance(found, str):
        return _undecided(str(requirement), engine, f"{engine}: {requirement} cannot be judged: {found}{end}")
    met = requirement.met_by(found.estimate)
    # The end of the interval on the limit's side: the pessimistic one of a value that meets, the hopeful one else.
    bound = found.low if met == (METRICS[requirement.metric].comparison == ">=") else found.high
    sure = requirement.met_by(bound) == met
    status: Status = "inconclusive" if not sure else "met" if met else "failed"
    words = {"met": f"meets {requirement}", "failed": f"misses {requirement}"}
    ending = words.get(status, f"is too close to {requirement} to tell")
    return GateRow(
        requirement=str(requirement),
        engine=engine,
        estimate=found.estimate,
        bound=None if found.low == found.high else bound,
        status=status,
        sentence=f"{engine}: {_value_text(requirement.metric, found)} {ending}{end}",
    )


def _undecided(requirement: str, engine: str, sentence: str) -> GateRow:
    return GateRow(
        requirement=requirement, engine=engine, estimate=None, bound=None, status="inconclusive", sentence=sentence
    )


def _value_text(metric: str, found: _Found) -> str:
    """`p99 3.81 ms (95 % interval 3.7 to 3.95)`."""
    name, unit, scale = TEXTS[metric]
    text = f"{name} {found.estimate / scale:.4g}{unit}"
    if found.low == found.high:
        return text
    return f"{text} (95 % interval {found.low / scale:.4g} to {found.high / scale:.4g})"


def _exactly(value: float) -> _Found:
    return _Found(value, value, value)
