"""The groups of channels as the pages show them: widths before and after, sorted scores, and how settled these are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import charts, quantities, wording

if TYPE_CHECKING:
    from .report import GroupReport

# So many groups are read in one go; of a deeper network the least stable are shown first and the others on request.
MOST_GROUPS = 50
LEAST_STABLE = 10


class GroupView(NamedTuple):
    """One group of channels, numbered from 1 as in every chart; texts are empty where nothing is known."""

    number: int
    report: GroupReport
    kept_percent: float
    column: charts.Column
    profile: charts.ScoreProfile | None
    images: str
    stability: str
    stable_percent: float | None
    settled: str
    score_time: str


class StabilityView(NamedTuple):
    """The groups that images were looked at for: those to read first, the others, and a summary.

    judged: whether the stability of any kept set was.
    """

    judged: bool
    summary: str
    first: list[GroupView]
    rest: list[GroupView]


def group_views(groups: Sequence[GroupReport]) -> list[GroupView]:
    """Every group in the order of the network."""
    columns = charts.width_columns([(group.width_before, group.width_after) for group in groups])
    return [
        _group_view(number, group, column)
        for number, (group, column) in enumerate(zip(groups, columns, strict=True), start=1)
    ]


def stability_view(views: Sequence[GroupView]) -> StabilityView | None:
    """How settled the scores are, the least stable groups first where there are many; None where nothing is known."""
    known = [view for view in views if view.images or view.stability or view.settled]
    if not known:
        return None
    first = known if len(known) <= MOST_GROUPS else sorted(known, key=_stability)[:LEAST_STABLE]
    numbers = {view.number for view in first}
    return StabilityView(
        judged=any(view.stability for view in known),
        summary=_summary(known),
        first=list(first),
        rest=[view for view in known if view.number not in numbers],
    )


def channel_sentence(groups: Sequence[GroupReport]) -> str:
    """How many channels were kept, in how many groups, and how many of those nothing was cut from."""
    before = sum(group.width_before for group in groups)
    after = sum(group.width_after for group in groups)
    whole = sum(group.width_before == group.width_after for group in groups)
    left_whole = f"; {wording.plural(whole, 'group')} left whole" if whole else ""
    return (
        f"{after} of {wording.plural(before, 'channel')} kept, in {wording.plural(len(groups), 'group')}{left_whole}."
    )


def width_ticks(groups: Sequence[GroupReport]) -> list[charts.Tick]:
    """Half and the whole of the widest group."""
    widest = max((group.width_before for group in groups), default=0)
    return [charts.Tick(percent, widest * percent / 100) for percent in (0, 50, 100)]


def number_ticks(n: int) -> list[charts.Tick]:
    """Group numbers under the middle of their columns: the first, and so many more as can be read on a phone."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if n / step * len(str(n)) <= 24)
    numbers = [number for number in range(1, n + 1) if number == 1 or number % step == 0]
    return [charts.Tick(round(100 * (number - 0.5) / n, 2), number) for number in numbers]


def _group_view(number: int, group: GroupReport, column: charts.Column) -> GroupView:
    return GroupView(
        number=number,
        report=group,
        kept_percent=round(100 * group.width_after / group.width_before, 2),
        column=column,
        profile=charts.score_profile(group.scores, group.kept) if group.scores else None,
        images="" if group.images is None else str(group.images),
        stability="" if group.stability is None else _share(group.stability),
        stable_percent=None if group.stability is None else round(100 * group.stability, 2),
        settled={None: "", True: "yes", False: "no"}[group.settled],
        score_time="" if group.score_seconds is None else quantities.seconds(group.score_seconds),
    )


def _share(stability: float) -> str:
    """A share with one decimal, rounded down: 100.0 % is said only of the whole."""
    return f"{int(1000 * stability + 1e-9) / 10:.1f} %"


def _stability(view: GroupView) -> tuple[bool, float, int]:
    """Sorts what is not settled first, then by the share that is stable; unknown shares come last."""
    stable = view.report.stability
    return view.report.settled is not False, 2.0 if stable is None else stable, view.number


def _summary(known: Sequence[GroupView]) -> str:
    groups = [view.report for view in known]
    parts = []
    tested = [group.settled for group in groups if group.settled is not None]
    if tested:
        parts.append(f"{sum(tested)} of {wording.plural(len(tested), 'group')} settled")
    shares = [
        (group.stability, view.number) for group, view in zip(groups, known, strict=True) if group.stability is not None
    ]
    if shares:
        least, number = min(shares)
        parts.append(f"the least stable is group {number} with {_share(least)} of its kept channels")
    images = sorted({group.images for group in groups if group.images is not None})
    if images:
        parts.append(f"from {images[0]} images" if len(images) == 1 else f"from {images[0]} to {images[-1]} images")
    taken = [group.score_seconds for group in groups if group.score_seconds is not None]
    if taken:
        parts.append(f"scored in {quantities.seconds(sum(taken))}")
    return wording.sentence("; ".join(parts))
