"""A comparison of criteria on paper: hand-made cells, whose means, order, counts and places can be told in advance."""

import html
import io
import itertools
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from rich.console import Console

from chip_deploy.export.laps import Quantiles, Speedup
from chip_deploy.export.machine import read_machine
from chip_deploy.export.protocol import LatencyProtocol
from chip_deploy.pipeline.criteria_chart import criteria_svg
from chip_deploy.pipeline.criteria_grid import Cell, CutBudget
from chip_deploy.pipeline.criteria_page import criteria_html, criteria_markdown, criteria_tables, write_pages
from chip_deploy.pipeline.criteria_result import (
    CellAccuracy,
    CellResult,
    CriteriaComparison,
    DenseNetwork,
    StructureLatency,
    criteria_rows,
    paired_rows,
)

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = """<script>alert("x")</script> & 'q' | [b]"""
DENSE = DenseNetwork(accuracy=0.9, n=1000, macs=1000, params=200)
HALF, THIRD = CutBudget(kind="macs", value=0.5), CutBudget(kind="macs", value=0.3)
# Criterion, allocation, budget -> accuracy after recalibration by seed; after the cut it is 0.3 less.
FOUND = {
    ("l1", "uniform", HALF): (0.70, 0.80),
    ("chip", "uniform", HALF): (0.81, 0.85),
    ("l1", "interaction", HALF): (0.72, 0.79),
    ("chip", "interaction", HALF): (0.80, 0.85),
    ("l1", "uniform", THIRD): (0.50, 0.54),
    ("chip", "uniform", THIRD): (0.41, 0.43),
    ("l1", "interaction", THIRD): (0.60, 0.62),
    ("chip", "interaction", THIRD): (0.41, 0.45),
}


def cell(criterion, allocation, budget, seed, recalibrated, **more):
    cut = None if recalibrated is None else round(recalibrated - 0.3, 3)
    accuracy = {"n": 0 if cut is None else 1000, "cut": cut, "recalibrated": recalibrated}
    return CellResult(
        key="0" * 64,
        cell=Cell(criterion=criterion, allocation=allocation, budget=budget, seed=seed),
        accuracy=CellAccuracy(**accuracy),
        macs=round(1000 * budget.value) - 2,
        params=100,
        widths={"conv": 8},
        structure=f"{allocation}{budget.value}{seed if allocation != 'uniform' else ''}",
        proof_gap=1e-16,
        images=64,
        seconds=1.0,
        **more,
    )


def make(cells=None, **changes):
    cells = cells or [cell(*where, seed, value) for where, values in FOUND.items() for seed, value in enumerate(values)]
    facts = {
        "title": "Criteria on net and data",
        "created": "2026-01-01T00:00:00+00:00",
        "command": "chip-deploy compare-criteria",
        "model": "net",
        "data": "data",
        "input_shape": [3, 8, 8],
        "classes": 10,
        "criteria": ["l1", "chip"],
        "budgets": [HALF, THIRD],
        "allocations": ["uniform", "interaction"],
        "seeds": [0, 1],
        "dense": DENSE,
        "rows": criteria_rows(cells, DENSE),
        "paired": paired_rows(cells, against="uniform"),
        "latencies": [],
        "cells": cells,
        "notes": ["one thing was so."],
        "machine": read_machine(),
        "versions": {"torch": "2"},
        "recipe": {},
        "digests": {},
    }
    return CriteriaComparison.model_validate(facts | changes)


def quantiles(p50_ms):
    return Quantiles(p50=p50_ms, p90=None, p99=None, n=300, mean=p50_ms, cv=0.01)


def three_seeds(values, against=(), *, structures=("a", "a", "b"), n=1000):
    """A comparison of one criterion and budget with three seeds: what uniform left, and what interaction left."""
    found = [cell("l1", "uniform", HALF, seed, value) for seed, value in enumerate(values)]
    found += [cell("l1", "interaction", HALF, seed, value) for seed, value in enumerate(against)]
    cells = [each.model_copy(update={"structure": structures[each.cell.seed]}) for each in found]
    allocations = ["uniform", "interaction"] if against else ["uniform"]
    return {"cells": cells, "criteria": ["l1"], "budgets": [HALF], "allocations": allocations, "seeds": [0, 1, 2]}


def latency(structure, p50_ms, **changes):
    facts = {
        "structure": structure,
        "target": "ort-cpu",
        "precision": "fp32",
        "dense_ms": quantiles(2.0),
        "pruned_ms": quantiles(p50_ms),
        "speedup": Speedup(estimate=2 / p50_ms, low=1.9 / p50_ms, high=2.1 / p50_ms),
        "verdict": "faster",
        "reason": "measured",
        "protocol": LatencyProtocol(),
        "machine": read_machine(),
    }
    return StructureLatency.model_validate(facts | changes)


def shown(comparison):
    file = io.StringIO()
    Console(file=file, width=80).print(criteria_tables(comparison))
    return file.getvalue()


def table_below(text, heading):
    """The rows under a heading of the terminal, as words."""
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(heading))
    body = lines[start + 4 :]
    return [line.split() for line in body[: body.index("")]]


def test_rows_stand_by_falling_mean_after_recalibration_with_mean_and_range():
    text = shown(make())
    assert table_below(text, "50 % of the MACs kept, uniform") == [
        ["chip", "53.00", "(51.00–55.00)", "83.00", "(81.00–85.00)"],
        ["l1", "45.00", "(40.00–50.00)", "75.00", "(70.00–80.00)"],
    ]
    assert [row[0] for row in table_below(text, "30 % of the MACs kept, uniform")] == ["l1", "chip"]
    assert max(map(len, text.splitlines())) <= 80


def test_the_difference_of_allocations_is_told_by_row_and_by_seed():
    text = " ".join(shown(make()).split())
    assert "l1 +0.50 (-1.00 to +2.00) +9.00 (+8.00 to +10.00)" in text
    assert "chip -0.50 (-1.00 to ±0.00) +1.00 (±0.00 to +2.00)" in text
    assert "for 3 of 4 pairs of criterion and budget, by the mean over seeds, and less for 1" in text
    assert "Of the 8 single pairs with one seed it was better in 4, worse in 2, equal in 2" in text


def test_with_one_seed_there_is_no_range_and_the_legend_says_so():
    cells = [cell(*where, 0, values[0]) for where, values in FOUND.items()]
    text = shown(make(cells, seeds=[0]))
    assert table_below(text, "50 % of the MACs kept, uniform") == [["chip", "51.00", "81.00"], ["l1", "40.00", "70.00"]]
    assert "one seed" in text
    assert 'class="range" d' not in criteria_svg(make(cells, seeds=[0]))


def test_where_80_columns_are_too_few_the_range_stands_below_the_mean():
    tuned = [
        each.model_copy(
            update={
                "accuracy": each.accuracy.model_copy(
                    update={"recovered": each.accuracy.recalibrated, "tuned": each.accuracy.recalibrated}
                )
            }
        )
        for each in make().cells
    ]
    text = shown(make(tuned))
    assert max(map(len, text.splitlines())) <= 80
    assert table_below(text, "50 % of the MACs kept, uniform")[:2] == [
        ["chip", "53.00", "83.00", "83.00", "83.00"],
        ["51.00–55.00", "81.00–85.00", "81.00–85.00", "81.00–85.00"],
    ]


def test_without_accuracy_the_shares_that_are_left_are_shown_and_nothing_is_drawn(tmp_path):
    cells = [cell("l1", "uniform", HALF, seed, None) for seed in (0, 1)]
    dense = DenseNetwork(accuracy=None, n=0, macs=1000, params=200)
    comparison = make(cells, dense=dense, criteria=["l1"], budgets=[HALF], allocations=["uniform"], paired=[])
    assert table_below(shown(comparison), "50 %") == [["l1", "49.8", "(49.8–49.8)", "50.0", "(50.0–50.0)"]]
    assert "rows by" not in " ".join(shown(comparison).split())
    (tmp_path / "criteria.svg").write_text("of an earlier comparison")
    write_pages(comparison, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"criteria.json", "criteria.md", "criteria.html"}


def test_latencies_stand_beside_accuracies_and_say_whose_they_are():
    found = [latency("uniform0.5", 1.0), latency("interaction0.50", 1.1), latency("interaction0.51", 1.3)]
    reason = "no verdict, because the fan stopped; speed-up 1.5"
    slow = latency("uniform0.3", 2.1, verdict="unstable", reason=reason)
    text = shown(make(latencies=[*found, slow]))
    assert table_below(text, "50 % of the MACs kept, uniform")[0][-1] == "1.00"
    assert table_below(text, "50 % of the MACs kept, interaction")[0][-2:] == ["1.20", "(1.10–1.30)"]
    flat = " ".join(text.split())
    assert "50 % macs uniform 2.00 ms 1.00 ms 2.00 (1.90 to 2.10) faster" in flat
    assert "50 % macs interaction, 2.00 ms 1.10 ms" in flat
    assert "30 % macs uniform: unstable: no verdict, because the fan stopped." in flat
    assert max(map(len, text.splitlines())) <= 80


def test_the_latency_of_a_row_is_the_mean_over_its_seeds_not_over_its_structures():
    facts = three_seeds((0.7, 0.7, 0.7))
    both = [latency("a", 1.0), latency("b", 1.6)]
    assert table_below(shown(make(**facts, latencies=both)), "50 %")[0][-2:] == ["1.20", "(1.00–1.60)"]
    doubtful = shown(make(**facts, latencies=[both[0], latency("b", 1.6, verdict="unstable", reason="it drifted.")]))
    assert table_below(doubtful, "50 %")[0][-2:] == ["1.20*", "(1.00–1.60)"]
    assert "unstable: it drifted. " in " ".join(doubtful.split())
    assert "* marks a p50 whose laps were unstable." in " ".join(doubtful.split())


def test_a_row_with_a_structure_that_was_not_measured_has_no_latency():
    cells = [*three_seeds((0.7, 0.7, 0.7))["cells"], *three_seeds((0.6, 0.6, 0.6), structures="aaa")["cells"]]
    cells[3:] = [
        each.model_copy(update={"cell": each.cell.model_copy(update={"criterion": "chip"})}) for each in cells[3:]
    ]
    facts = {"budgets": [HALF], "allocations": ["uniform"], "seeds": [0, 1, 2]}
    rows = table_below(shown(make(cells, **facts, latencies=[latency("a", 1.0)])), "50 %")
    assert [(row[0], row[-1]) for row in rows] == [("l1", "-"), ("chip", "1.00")]


def test_differences_that_cancel_are_neither_better_nor_worse():
    facts = three_seeds((0.700, 0.500, 0.600), (0.701, 0.502, 0.597))
    comparison = make(**facts)
    (row,) = comparison.paired
    assert (row.difference.mean, row.better, row.worse, row.equal) == (0, 2, 1, 0)
    assert "for 0 of 1 pairs of criterion and budget, by the mean over seeds, and less for 0." in " ".join(
        shown(comparison).split()
    )


def test_widths_that_several_allocations_share_are_named_by_all_of_them():
    facts = three_seeds((0.7, 0.7, 0.7), (0.7, 0.7, 0.7), structures="aab")
    flat = " ".join(criteria_markdown(make(**facts, latencies=[latency("a", 1.0), latency("b", 1.1)])).split())
    assert "50 % macs uniform, seed 0, 1; 50 % macs interaction, seed 0, 1" in flat
    assert "50 % macs uniform, seed 2; 50 % macs interaction, seed 2" in flat


def test_where_nothing_is_recalibrated_rows_stand_by_what_the_cut_left_and_the_page_says_so():
    bare = [
        each.model_copy(update={"accuracy": each.accuracy.model_copy(update={"recalibrated": None})})
        for each in make().cells
    ]
    text = shown(make(bare))
    flat = " ".join(text.split())
    assert table_below(text, "50 % of the MACs kept, uniform") == [
        ["chip", "53.00", "(51.00–55.00)"],
        ["l1", "45.00", "(40.00–50.00)"],
    ]
    assert "rows by the mean right after the cut" in flat
    assert "points of accuracy right after the cut" in flat
    assert "recalibrat" not in flat + criteria_svg(make(bare))


def test_a_criterion_in_a_mode_of_its_own_is_called_by_it():
    comparison = make(labels={"chip": "chip joint"})
    assert table_below(shown(comparison), "50 % of the MACs kept, uniform")[0][:2] == ["chip", "joint"]
    assert "chip joint, uniform, recalibrated: 83.00 %" in criteria_svg(comparison)
    assert "chip joint" in criteria_markdown(comparison)


def test_a_target_that_measured_nothing_is_a_reason_and_no_column():
    nothing = {"dense_ms": None, "pruned_ms": None, "speedup": None, "protocol": None, "machine": None}
    gone = latency("uniform0.5", 1.0, target="trt-rtx:sm86", verdict="not measured", reason="no CUDA driver", **nothing)
    text = shown(make(latencies=[latency("uniform0.5", 1.0), gone]))
    assert "trt-rtx:sm86 p50" not in text
    assert "Not measured: no CUDA driver." in text
    assert "Not measured: no CUDA driver." in criteria_markdown(make(latencies=[gone]))


def test_the_pages_hold_what_the_terminal_holds():
    comparison = make(latencies=[latency("uniform0.5", 1.0)])
    cells = set(re.findall(r"\d\d\.\d\d", shown(comparison)))
    for page in (criteria_markdown(comparison), html.unescape(criteria_html(comparison))):
        assert cells <= set(re.findall(r"\d\d\.\d\d", page))
        assert "One thing was so." in page
        assert "Made 2026-01-01 00:00 UTC on" in page


class Scripts(HTMLParser):
    """What must not be in a page: scripts, and addresses of elsewhere."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [tag] if tag in ("script", "link", "img", "iframe") else []
        self.found += [value for name, value in attrs if name in ("src", "href")]


def test_hostile_names_stay_text():
    comparison = make(title=HOSTILE, command=HOSTILE, notes=[HOSTILE])
    parser = Scripts()
    parser.feed(criteria_html(comparison))
    assert parser.found == []
    assert not re.search(r"(?<!\\)<script>", criteria_markdown(comparison))
    assert HOSTILE in " ".join(shown(comparison).split())
    ET.fromstring(criteria_svg(comparison))


def marks(comparison):
    """The told values of all marks, and where they stand."""
    root = ET.fromstring(criteria_svg(comparison))
    return [(found[0].text, found) for found in root.iter() if len(found) and found[0].tag == f"{SVG}title"]


def test_every_mean_is_a_mark_at_its_place():
    comparison = make()
    places = {}
    for told, mark in marks(comparison):
        if "," in told:
            percent = float(re.search(r": ([\d.]+) %", told)[1])
            places.setdefault(round(percent, 2), set()).add(float(mark.get("cx")))
    expected = {
        round(100 * getattr(row, stage).mean, 2) for row in comparison.rows for stage in ("cut", "recalibrated")
    }
    assert set(places) == expected
    assert all(max(where) - min(where) <= 0.11 for where in places.values())  # one decimal is written
    ordered = sorted((percent, min(where)) for percent, where in places.items())
    steps = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(ordered)]
    assert max(steps) - min(steps) <= 0.35  # a straight scale, up to the decimal over steps of half a percent and more


def test_a_bar_spans_the_range_around_its_mark():
    root = ET.fromstring(criteria_svg(make()))
    bars = [path.get("d") for path in root.iter(f"{SVG}path") if path.get("class") == "range"]
    spans = [
        tuple(map(float, found.groups())) for bar in bars if (found := re.match(r"M([\d.]+) [\d.]+H([\d.]+)", bar))
    ]
    centres = [float(mark.get("cx")) for told, mark in marks(make()) if "," in told]
    assert len(spans) == len(centres) == 16
    for (low, high), centre in zip(spans, centres, strict=True):  # of two seeds the mean lies in the middle
        assert (low + high) / 2 == pytest.approx(centre, abs=0.2)


def test_the_drawing_names_every_criterion_and_allocation_and_speaks_its_order():
    svg = criteria_svg(make())
    root = ET.fromstring(svg)
    texts = [found.text for found in root.iter(f"{SVG}text")]
    assert [text for text in texts if text in ("chip", "l1")] == ["chip", "l1", "l1", "chip"]
    assert texts.count("interaction") == texts.count("uniform") == 4
    assert "50 % of the MACs kept, uniform: chip 83.0, l1 75.0" in root.get("aria-label")
