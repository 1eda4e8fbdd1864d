"""What a comparison of criteria found: every cell, and its means and ranges over seeds; nothing picks the best seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..export.laps import Quantiles, Speedup
from ..export.machine import Machine
from ..export.protocol import LatencyProtocol
from .criteria_grid import Cell, CutBudget

Fraction = Annotated[float, Field(ge=0, le=1)]

STAGES = ("cut", "recalibrated", "recovered", "tuned")
"""Where accuracy is taken: right after the cut, and after each thing that is done about it."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class CellAccuracy(_Part):
    """Top-1 accuracy on `n` images, the same for all cells; None for what was not done. Without labels n is 0.

    recalibrated: None also where the network has no batch norm to recalibrate.
    """

    n: int = Field(ge=0)
    cut: Fraction | None = None
    recalibrated: Fraction | None = None
    recovered: Fraction | None = None
    tuned: Fraction | None = None

    @property
    def untaught(self) -> float | None:
        """Before anything is learnt again: after recalibration, or right after the cut where there is none."""
        return self.cut if self.recalibrated is None else self.recalibrated


class CellResult(_Part):
    """What one cell gave.

    key: digest of everything that decides about the result. macs, params: of the pruned network. widths: of every
    channel group; structure: their digest, the same for networks that differ in weights only. proof_gap: largest
    relative gap in float64 between the cut network and the dense one with the same channels silenced. images: the most
    that any group was scored on. recovery: as `recover.RecoverRecord` has it, without its curves.
    """

    schema_: Literal["chip-deploy.criteria-cell/1"] = Field(default="chip-deploy.criteria-cell/1", alias="schema")
    key: str
    cell: Cell
    accuracy: CellAccuracy
    macs: int
    params: int
    widths: dict[str, int]
    structure: str
    proof_gap: float
    images: int
    recovery: dict[str, Any] | None = None
    seconds: float


class DenseNetwork(_Part):
    """The network that all cells start from. accuracy: on the images that the cells are judged on."""

    accuracy: Fraction | None
    n: int
    macs: int
    params: int


class Spread(_Part):
    """The mean over `n` seeds, and the least and largest of them."""

    mean: float
    low: float
    high: float
    n: int


class CriteriaRow(_Part):
    """One criterion, allocation and budget over all seeds.

    macs_kept, params_kept: in shares of the dense network. structures: of every seed's cell, in the order of the seeds;
    the same one again where seeds ended with the same widths.
    """

    criterion: str
    allocation: str
    budget: CutBudget
    cut: Spread | None
    recalibrated: Spread | None
    recovered: Spread | None
    tuned: Spread | None
    macs_kept: Spread
    params_kept: Spread
    structures: list[str]

    @property
    def untaught(self) -> Spread | None:
        """As `CellAccuracy.untaught`: what rows are ordered by."""
        return self.cut if self.recalibrated is None else self.recalibrated


class PairedRow(_Part):
    """How much more accuracy than by `against` one allocation leaves before anything is learnt again, seed by seed.

    difference: in fractions of the images; better, worse, equal: in how many seeds. Both count whole images.
    """

    criterion: str
    budget: CutBudget
    allocation: str
    against: str
    difference: Spread
    better: int
    worse: int
    equal: int


class StructureLatency(_Part):
    """One pruned structure on one target, measured in turns with the dense network; or the reason why not.

    What was measured is the network of the first cell that ended with these widths; others with the same widths may
    differ from it in which channels a shortcut copies. laps: the file with every lap, relative to the folder of the
    comparison.
    """

    structure: str
    target: str
    precision: str
    dense_ms: Quantiles | None = None
    pruned_ms: Quantiles | None = None
    speedup: Speedup | None = None
    verdict: Literal["faster", "not faster", "unstable", "not measured"]
    reason: str
    protocol: LatencyProtocol | None = None
    machine: Machine | None = None
    laps: str | None = None


class CriteriaComparison(_Part):
    """Everything that a comparison found, with what it was asked and where it ran."""

    schema_: Literal["chip-deploy.criteria/1"] = Field(default="chip-deploy.criteria/1", alias="schema")
    title: str
    created: str
    command: str
    model: str
    data: str
    input_shape: list[int]
    classes: int
    criteria: list[str]
    budgets: list[CutBudget]
    allocations: list[str]
    seeds: list[int]
    dense: DenseNetwork
    rows: list[CriteriaRow]
    paired: list[PairedRow]
    latencies: list[StructureLatency]
    cells: list[CellResult]
    notes: list[str]
    machine: Machine
    versions: dict[str, str]
    recipe: dict[str, Any]
    digests: dict[str, str]
    labels: dict[str, str] = {}
    """Of criteria that ran in a mode of theirs, the name with the mode."""

    def label(self, criterion: str) -> str:
        """What a table calls that criterion: `chip joint`."""
        return self.labels.get(criterion, criterion)

    @property
    def ranked_by(self) -> str | None:
        """The stage by which rows are ordered and allocations compared; None where no accuracy exists."""
        return next((stage for stage in ("recalibrated", "cut") if stage in self.stages), None)

    @property
    def stages(self) -> list[str]:
        """The stages at which this comparison has accuracies."""
        return [stage for stage in STAGES if any(getattr(row, stage) is not None for row in self.rows)]


def spread(values: Iterable[float], *, per: int = 1) -> Spread:
    """The mean and the range of at least one value, in shares of `per`.

    >>> spread([0.5, 0.75, 1.0])
    Spread(mean=0.75, low=0.5, high=1.0, n=3)
    >>> spread([1, 2, -3], per=1000)
    Spread(mean=0.0, low=-0.003, high=0.002, n=3)
    """
    found = list(values)
    low, high = min(found) / per, max(found) / per
    return Spread(mean=min(max(sum(found) / (len(found) * per), low), high), low=low, high=high, n=len(found))


def criteria_rows(cells: Sequence[CellResult], dense: DenseNetwork) -> list[CriteriaRow]:
    """The cells of each criterion, allocation and budget as one row, in the order in which they first come."""
    rows = []
    for same in _grouped(cells).values():
        first = same[0].cell
        rows.append(
            CriteriaRow(
                criterion=first.criterion,
                allocation=first.allocation,
                budget=first.budget,
                cut=_spread_of(same, "cut"),
                recalibrated=_spread_of(same, "recalibrated"),
                recovered=_spread_of(same, "recovered"),
                tuned=_spread_of(same, "tuned"),
                macs_kept=spread(each.macs / dense.macs for each in same),
                params_kept=spread(each.params / dense.params for each in same),
                structures=[each.structure for each in same],
            )
        )
    return rows


def paired_rows(cells: Sequence[CellResult], *, against: str) -> list[PairedRow]:
    """Every other allocation beside that one: for each criterion and budget, the differences of the same seeds.

    Differences are whole images, so that what is equal is equal. Empty where no accuracy exists.
    """
    groups = _grouped(cells)
    rows = []
    for (criterion, allocation, budget), same in groups.items():
        control = {each.cell.seed: each for each in groups.get((criterion, against, budget), [])}
        pairs = [(each, control[each.cell.seed]) for each in same if each.cell.seed in control]
        gaps = [round((ours - theirs) * each.accuracy.n) for each, other in pairs
            if (ours := each.accuracy.untaught) is not None
            and (theirs := other.accuracy.untaught) is not None]  # fmt: skip
        if allocation == against or not gaps:
            continue
        rows.append(
            PairedRow(
                criterion=criterion,
                budget=budget,
                allocation=allocation,
                against=against,
                difference=spread(gaps, per=same[0].accuracy.n),
                better=sum(gap > 0 for gap in gaps),
                worse=sum(gap < 0 for gap in gaps),
                equal=sum(gap == 0 for gap in gaps),
            )
        )
    return rows


def _grouped(cells: Sequence[CellResult]) -> dict[tuple[str, str, CutBudget], list[CellResult]]:
    groups: dict[tuple[str, str, CutBudget], list[CellResult]] = {}
    for each in cells:
        groups.setdefault((each.cell.criterion, each.cell.allocation, each.cell.budget), []).append(each)
    return groups


def _spread_of(cells: Sequence[CellResult], stage: str) -> Spread | None:
    values = [getattr(each.accuracy, stage) for each in cells]
    return None if any(value is None for value in values) else spread(values)
