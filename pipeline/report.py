"""What a run found, as one typed value: written as JSON, Markdown and one HTML page, and read back."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..export.agree import Agreement
from ..export.bundle import write_atomic
from ..export.laps import Control, Quantiles, Speedup
from ..export.laps_file import RecordedLaps, find_laps, read_laps
from ..export.machine import Machine
from ..export.measure import BatchRow, GpuTimes
from ..export.precision import Conversion
from ..export.profile import LayerComparison
from ..export.protocol import LatencyProtocol
from ..export.sensitivity import Sensitivity
from ..export.target import LayerTypes
from ..export.watch import MachineWatch
from .report_page import html_page, markdown_page, pages_unavailable, summary_table

__all__ = [
    "Accuracy",
    "Cost",
    "EngineRow",
    "GroupReport",
    "NetworkCost",
    "PrecisionRow",
    "Report",
    "TrainCurve",
    "read_report",
    "render",
    "report_schema",
    "summary_table",
    "write_report",
]

REPORT = "report.json"
PAGES = ("report.md", "report.html")
MACS_CONVENTION = "MACs are multiply-accumulates of convolutions and linear layers only, for one image."

Fraction = Annotated[float, Field(ge=0, le=1)]
Verdict = Literal["faster", "not faster", "unstable", "not measured"]


class _Part(BaseModel):
    """Frozen, closed and free of NaN and infinity, which JSON does not have."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, json_schema_serialization_defaults_required=True
    )


class Accuracy(_Part):
    """Top-1 accuracy on the same `n` images along the run; a stage that was not evaluated is None.

    With random data no accuracy exists: `n` is 0 and every stage None.
    """

    n: int = Field(default=0, ge=0)
    dense: Fraction | None = None
    pruned: Fraction | None = None
    """Right after the cut."""
    recalibrated: Fraction | None = None
    """After the BatchNorm statistics were taken anew."""
    recovered: Fraction | None = None
    """After the recovery on a few images, where one was asked for."""
    tuned: Fraction | None = None
    onnx: Fraction | None = None

    @model_validator(mode="after")
    def _counted(self) -> Accuracy:
        if self.n == 0 and any(value is not None for name, value in self if name != "n"):
            raise ValueError("an accuracy needs the number of images `n` it was measured on")
        return self


class NetworkCost(_Part):
    """What one network costs, whatever runs it."""

    macs: int = Field(gt=0)
    params: int = Field(gt=0)
    onnx_bytes: int = Field(gt=0)


class Cost(_Part):
    """The network before and after."""

    dense: NetworkCost
    pruned: NetworkCost


class EngineRow(_Part):
    """An engine, and what was measured of it; an engine that was not measured has no number at all."""

    target: str
    precision: str
    file: str
    """Relative to the bundle, with forward slashes."""
    sha256: str
    bytes: int = Field(gt=0)
    latency_ms: Quantiles | None = None
    dense_latency_ms: Quantiles | None = None
    """The dense network under the same runtime settings, measured in turns with this engine."""
    speedup: Speedup | None = None
    accuracy: Fraction | None = None
    agreement: Agreement | None = None
    verdict: Verdict
    reason: str
    protocol: LatencyProtocol | None = None
    machine: Machine | None = None
    """Where it was measured."""
    batch: int = Field(default=1, ge=1)
    """Images in one lap."""
    control: Control | None = None
    """The dense network against itself: what counts as no difference on that machine."""
    watch: MachineWatch | None = None
    """The machine before and after the laps."""
    layers: LayerComparison | None = None
    """Where the time went, layer by layer."""
    times: GpuTimes | None = None
    """Device compute, with transfers and host end to end, kept apart; GPU targets only."""
    batches: list[BatchRow] = []
    """One a batch size where several were measured; the first is this row's own."""
    built_for: dict[str, str] = {}
    flags: dict[str, Any] = {}
    versions: dict[str, str] = {}
    build_seconds: float | None = Field(default=None, ge=0)
    layer_types: LayerTypes | None = None
    """In which number types its layers really run."""

    @model_validator(mode="after")
    def _truthful(self) -> EngineRow:
        numbers = (self.latency_ms, self.dense_latency_ms, self.speedup)
        findings = (*numbers, self.control, self.layers, self.times, *self.batches)
        if self.verdict == "not measured" and any(finding is not None for finding in findings):
            raise ValueError(f"{self.target}: an engine that was not measured cannot have a latency or a speed-up")
        if self.verdict in ("faster", "not faster") and any(number is None for number in numbers):
            raise ValueError(f"{self.target}: the verdict {self.verdict!r} needs both latencies and the speed-up")
        if self.speedup is not None and self.verdict == ("not faster" if self.speedup.low > 1 else "faster"):
            raise ValueError(f"{self.target}: {self.verdict!r} contradicts a speed-up of {self.speedup.low:g} or more")
        return self


class PrecisionRow(_Part):
    """The pruned network as an ONNX file in one other precision than FP32, and what that costs on the same images."""

    precision: str
    onnx_bytes: int = Field(gt=0)
    dense_onnx_bytes: int = Field(gt=0)
    accuracy: Fraction | None = None
    agreement: Agreement
    """Its outputs against those of the FP32 file."""
    conversion: Conversion
    sensitivities: list[Sensitivity] = []
    """What each layer costs when it alone is quantised, the most sensitive first."""
    left_out_by_bound: int = Field(default=0, ge=0)
    """How many layers are left out to keep `quantize.max_drop`: the number was chosen on the evaluation images."""
    emulated: bool = False
    """Whether 16-bit tensors were judged in FP32, each rounded to 16 bits: onnxruntime's CPU cannot run them."""


class GroupReport(_Part):
    """One group of channels that were kept or cut together."""

    layer: str
    """The layer the group is named after."""
    coupled: list[str] = []
    """The other layers whose channels went with it."""
    width_before: int = Field(gt=0)
    width_after: int = Field(gt=0)
    scores: list[float] = []
    """One a channel, in the dense network's numbering; empty where the group was not scored."""
    kept: list[int]
    """Positions in the dense network's numbering."""
    images: int | None = Field(default=None, ge=1)
    """Images that the scores were made from."""
    stability: Fraction | None = None
    """Share of the kept set that stays the same in 95 % of the bootstrap resamples of the images."""
    settled: bool | None = None
    """Whether more images would have left the kept set as it is, as far as the resamples tell."""
    score_seconds: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> GroupReport:
        if len(self.scores) not in (0, self.width_before):
            raise ValueError(f"{self.layer}: {len(self.scores)} scores for {self.width_before} channels")
        if len(self.kept) != self.width_after or len(set(self.kept)) != self.width_after:
            raise ValueError(f"{self.layer}: {len(self.kept)} kept channels do not make the width {self.width_after}")
        if not all(0 <= channel < self.width_before for channel in self.kept):
            raise ValueError(f"{self.layer}: a kept channel is none of its {self.width_before}")
        return self


class TrainCurve(_Part):
    """A training run, epoch by epoch."""

    epochs: int = Field(ge=0)
    seconds: float = Field(ge=0)
    loss: list[float]
    """Mean training loss of each epoch."""
    lr: list[float] = []
    """Learning rate of each epoch."""


class Report(_Part):
    """Dense beside pruned, per engine, with a verdict; and everything needed to doubt it."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: Literal["chip-deploy.report/1"] = Field(default="chip-deploy.report/1", alias="schema")
    title: str
    created: str
    """ISO 8601, UTC."""
    model: str
    data: str
    criterion: str
    budget: str
    """What was asked for, as a sentence."""
    input_shape: list[int]
    """Channels, height, width of one image."""
    classes: int = Field(gt=0)
    accuracy: Accuracy
    cost: Cost
    macs_convention: str = MACS_CONVENTION
    agreement: Agreement | None = None
    """The ONNX file against torch."""
    precisions: list[PrecisionRow] = []
    """The precisions that were asked for, without FP32."""
    engines: list[EngineRow]
    groups: list[GroupReport]
    score_images: int | None = None
    dense_training: TrainCurve | None = None
    """Only where the dense network was trained by this run."""
    tuning: TrainCurve | None = None
    stages_s: dict[str, float]
    machine: Machine
    versions: dict[str, str]
    digests: dict[str, str] = {}
    """SHA-256 of what this run started from and of what it made, by name."""
    command: str = ""
    """The command line that ran, quoted for a shell."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    notes: list[str] = []
    """What a reader has to know, one sentence each."""


def write_report(report: Report, out_dir: Path) -> list[Path]:
    """The files that hold `report` now: report.json, report.md and report.html in `out_dir`.

    The laps of measured engines are read from `engines/NAME.latency.json.gz` where these exist. Without jinja2 (a
    device that carries the base package only) the pages are not written, and older ones, which would contradict the
    JSON, are removed: `report_page.pages_unavailable()` says so in a sentence, and `render` makes them elsewhere.
    Raises: ValueError, with nothing written, for a report that contradicts itself (copies are checked here again).
    """
    path = out_dir / REPORT
    text = _json_text(report)
    Report.model_validate_json(text)
    write_atomic(path, text.encode())
    return [path, *_write_pages(report, out_dir)]


def render(report_dir: Path) -> list[Path]:
    """report.md and report.html of a bundle, made again from its report.json and its laps alone.

    Raises: FileNotFoundError without a report.json, ValueError for one that cannot be read, ModuleNotFoundError with
    the package to install when the pages cannot be made here.
    """
    report = read_report(report_dir)
    reason = pages_unavailable()
    if reason is not None:
        raise ModuleNotFoundError(reason, name="jinja2")
    return _write_pages(report, report_dir)


def read_report(path: Path) -> Report:
    """The report in a report.json, or in the bundle directory that holds one.

    Raises: FileNotFoundError when there is none; ValueError naming the first field that is not as expected.
    """
    file = path / REPORT if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no report here. Give the directory that `chip-deploy prune --out` wrote.")
    try:
        return Report.model_validate_json(file.read_bytes())
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise ValueError(
            f"{file}: not a report of this version ({where}: {first['msg']}). Run `chip-deploy prune` again."
        ) from err


def report_schema() -> dict[str, Any]:
    """The JSON Schema of report.json, as it ships in the package's report.schema.json."""
    schema = Report.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """`report_schema()` as the text of report.schema.json."""
    return json.dumps(report_schema(), indent=2, ensure_ascii=False) + "\n"


def _write_pages(report: Report, out_dir: Path) -> list[Path]:
    markdown, page = (out_dir / name for name in PAGES)
    if pages_unavailable() is not None:
        markdown.unlink(missing_ok=True)
        page.unlink(missing_ok=True)
        return []
    write_atomic(markdown, markdown_page(report).encode())
    write_atomic(page, html_page(report, _laps(report, out_dir)).encode())
    return [markdown, page]


def _laps(report: Report, out_dir: Path) -> dict[str, RecordedLaps]:
    """Laps by engine file, for the engines whose laps lie beside them."""
    laps = {}
    for engine in report.engines:
        path = find_laps(out_dir / PurePosixPath(engine.file))
        if engine.latency_ms is not None and path.is_file():
            laps[engine.file] = read_laps(path)
    return laps


def _json_text(report: Report) -> str:
    """Indented JSON with each list of numbers on one line.

    Strings are safe from the second step: JSON writes their line breaks as `\\n`, and the pattern needs a real one.
    """
    text = json.dumps(report.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False, allow_nan=False)
    one_line = re.sub(r"\[\n[\s\d.eE+,-]+\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    return one_line + "\n"
