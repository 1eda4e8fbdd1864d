"""Tables keep every figure they are given, within 80 columns."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from chip_deploy.export.laps import Quantiles, Speedup
from chip_deploy.export.measure import BatchRow
from chip_deploy.pipeline.cut_preview import CutPreview, CutRow
from chip_deploy.pipeline.report import EngineRow
from chip_deploy.pipeline.tables import engine_sentences, engine_table, preview_table


def shown(table: Table) -> list[list[str]]:
    """The words of each printed line."""
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    return [line.split() for line in lines]


QUANTILES = Quantiles(p50=1.25, p90=None, p99=None, n=9, mean=1.3, cv=0.1)


def engine_row(verdict: str, reason: str) -> EngineRow:
    numbers = {
        "latency_ms": QUANTILES,
        "dense_latency_ms": QUANTILES.model_copy(update={"p50": 2.5}),
        "speedup": Speedup(estimate=2.0, low=1.9, high=2.1),
    }
    facts = {"target": "ort-cpu", "precision": "fp32", "file": "engines/ort-cpu.fp32.engine", "sha256": "0" * 64}
    told = {"bytes": 10, "verdict": verdict, "reason": reason}
    return EngineRow.model_validate({**facts, **told, **({} if verdict == "not measured" else numbers)})


def test_a_preview_shows_each_group_and_what_remains() -> None:
    preview = CutPreview([CutRow("layer1.0.conv1", 3, 64, 48, 6000, 4500)], 2_000_000, 1_000_000, 400, 100)
    lines = shown(preview_table(preview))
    assert ["layer1.0.conv1", "3", "64", "->", "48", "6,000", "4,500"] in lines
    assert ["MACs", "50.0%", "2,000,000", "1,000,000"] in lines
    assert ["parameters", "25.0%", "400", "100"] in lines


def test_a_measured_engine_is_shown_beside_the_dense_network() -> None:
    expected = "ort-cpu fp32 1 2.500 ms 1.250 ms 2.00 (1.90 to 2.10) faster"
    assert expected.split() in shown(engine_table([engine_row("faster", "twice as fast")]))


@pytest.mark.parametrize("verdict", ["not measured", "unstable"])
def test_any_other_verdict_than_faster_says_why(verdict: str) -> None:
    row = engine_row(verdict, "because")
    assert any(" ".join(line).endswith(verdict) for line in shown(engine_table([row])))
    assert engine_sentences([row]) == [f"ort-cpu fp32: {verdict}: because"]
    assert engine_sentences([engine_row("faster", "twice as fast")]) == []


def test_every_batch_has_a_row_of_its_own() -> None:
    speedup = Speedup(estimate=2.0, low=1.9, high=2.1)
    batches = [
        BatchRow(batch=n, dense=QUANTILES, pruned=QUANTILES, speedup=speedup, verdict=verdict, reason="because")
        for n, verdict in ((1, "faster"), (8, "unstable"))
    ]
    row = engine_row("faster", "twice as fast").model_copy(update={"batches": batches})
    assert [line[2] for line in shown(engine_table([row])) if line[:2] == ["ort-cpu", "fp32"]] == ["1", "8"]
    assert engine_sentences([row]) == ["ort-cpu fp32, batch 8: unstable: because"]


def test_names_are_no_markup() -> None:
    preview = CutPreview([CutRow("[bold]conv", 1, 2, 1, 20, 10)], 2, 1, 2, 1)
    assert ["[bold]conv", "1", "2", "->", "1", "20", "10"] in shown(preview_table(preview))
