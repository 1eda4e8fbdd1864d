"""What can be required of a bundle, and how it is written: `speedup>=1.3`, `p99<=4ms`, `size<=10MB`."""

from __future__ import annotations

import difflib
import math
import re
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}


class Metric(NamedTuple):
    """Something that can be required: from which side it is limited, in which units, and an example."""

    comparison: Literal[">=", "<="]
    units: dict[str, float]
    example: str


# In the order in which they are judged.
METRICS: dict[str, Metric] = {
    "top1_drop": Metric("<=", {}, "top1_drop<=0.5"),
    "size": Metric("<=", BYTES, "size<=10MB"),
    "speedup": Metric(">=", {}, "speedup>=1.3"),
    "p50": Metric("<=", MILLISECONDS, "p50<=900us"),
    "p90": Metric("<=", MILLISECONDS, "p90<=3ms"),
    "p99": Metric("<=", MILLISECONDS, "p99<=4ms"),
}
QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}


class Requirement(BaseModel):
    """A limit on one metric, in the metric's own unit.

    Unit of `limit`: ms for p50, p90 and p99; bytes for size; percentage points for top1_drop; none for speedup.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    metric: str
    limit: float

    def __str__(self) -> str:
        return self.text

    def met_by(self, value: float) -> bool:
        """Whether `value` keeps the limit; the limit itself does."""
        return value >= self.limit if METRICS[self.metric].comparison == ">=" else value <= self.limit


def parse_requirement(text: str) -> Requirement:
    """The limit that `text` states: a metric, its comparison, a number and the metric's unit, spaces between or not.

        requirement = metric comparison number unit
        metric      = one of METRICS, written as there
        comparison  = ">=" where more is better (speedup), "<=" where less is (all others)
        number      = digits with a decimal point and an exponent, if any; a sign makes sense for top1_drop alone
        unit        = us, µs, ms or s for p50, p90, p99; B, kB, MB or GB (powers of 1000) for size; none otherwise

    >>> parse_requirement("p50 <= 900us").limit
    0.9

    Raises: ValueError saying which part is wrong, and how it is written.
    """
    found = re.fullmatch(r"\s*([\w-]+)\s*([<>=!≤≥]*)\s*(.*?)\s*", text)
    if found is None:
        raise ValueError(f"requirement {text!r}: no metric in it. {examples()}")
    name, comparison, value = found.groups()
    metric = _metric(text, name)
    if comparison != metric.comparison:
        given = f"{comparison!r} given" if comparison else "no comparison given"
        if not comparison and not value:
            given += " (quote the requirement: a shell takes < and > for files)"
        raise ValueError(f"requirement {text!r}: {name} takes {metric.comparison}, {given}. Write {metric.example!r}.")
    number = re.match(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value)
    if number is None:
        given = f"no number in {value!r}" if value else "the number is missing"
        raise ValueError(f"requirement {text!r}: {given}. Write {metric.example!r}.")
    scale = _scale(text, name, value[number.end() :].strip())
    limit = float(number[0]) * scale
    if not math.isfinite(limit) or (limit <= 0 and name != "top1_drop"):
        raise ValueError(f"requirement {text!r}: a finite number above 0 expected. Write {metric.example!r}.")
    return Requirement(text=" ".join(text.split()), metric=name, limit=limit)


def examples() -> str:
    """How requirements are written, as a sentence."""
    return f"Write one or more of {', '.join(repr(metric.example) for metric in METRICS.values())}."


def _metric(text: str, name: str) -> Metric:
    if name in METRICS:
        return METRICS[name]
    near = difflib.get_close_matches(name.lower(), list(METRICS), n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"requirement {text!r}: unknown metric {name!r}.{hint} Available: {', '.join(METRICS)}.")


def _scale(text: str, name: str, unit: str) -> float:
    """What a number with this unit is multiplied with. Raises: ValueError for a unit that the metric does not have."""
    metric = METRICS[name]
    unit = unit.replace("μ", "µ")  # the Greek letter for the micro sign, which keyboards give as often
    if unit in (metric.units or {"": 1.0}):
        return metric.units.get(unit, 1.0)
    if re.match(r",\d", unit):
        raise ValueError(f"requirement {text!r}: a decimal point expected, a comma given. Write {metric.example!r}.")
    given = f"unit {unit!r} given" if unit else "no unit given"
    expected = f"one of {', '.join(metric.units)} expected" if metric.units else "a number without unit expected"
    if name == "top1_drop":
        expected += " (percentage points)"
    raise ValueError(f"requirement {text!r}: {given}, {expected}. Write {metric.example!r}.")
