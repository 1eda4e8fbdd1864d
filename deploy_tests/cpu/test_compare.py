"""Bundles are compared only where they were measured alike, and the front is the one that a slow look finds."""

import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from chip_deploy.export.bundle import sha256_file, write_json_atomic, write_manifest
from chip_deploy.export.errors import IntegrityError, MachineMismatch
from chip_deploy.export.laps import Quantiles, Speedup
from chip_deploy.export.machine import Machine, read_machine
from chip_deploy.export.protocol import LatencyProtocol, protocol_named
from chip_deploy.pipeline.compare import BundleComparison, Candidate, bundle_labels, compare_bundles, pareto_front
from chip_deploy.pipeline.compare_page import (
    comparison_html,
    comparison_json,
    comparison_markdown,
    comparison_svg,
    comparison_tables,
    require_comparison_place,
    write_comparison,
)
from chip_deploy.pipeline.report import Accuracy, Cost, EngineRow, NetworkCost, Report

HOSTILE = """<script>alert("x")</script> & 'q' | [b]"""
SVG = "{http://www.w3.org/2000/svg}"


def quantiles(p50_ms: float) -> Quantiles:
    return Quantiles(p50=p50_ms, p90=None, p99=None, n=300, mean=p50_ms, cv=0.01)


def make_engine(
    bundle: Path, target: str, *, dense_ms: float, p50_ms: float, accuracy: float | None, **changes: Any
) -> EngineRow:
    """A measured engine, of which only the file's digest is real."""
    file = bundle / f"engines/{target.replace(':', '-')}.fp32.engine"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"an engine")
    ratio = dense_ms / p50_ms
    facts = {
        "target": target,
        "precision": "fp32",
        "file": file.relative_to(bundle).as_posix(),
        "sha256": sha256_file(file),
        "bytes": file.stat().st_size,
        "latency_ms": quantiles(p50_ms),
        "dense_latency_ms": quantiles(dense_ms),
        "speedup": Speedup(estimate=ratio, low=0.99 * ratio, high=1.01 * ratio),
        "accuracy": accuracy,
        "verdict": "faster",
        "reason": "measured",
        "protocol": LatencyProtocol(),
        "machine": read_machine(),
    }
    return EngineRow.model_validate(facts | changes)


def make_bundle(
    path: Path,
    *,
    p50_ms: float = 2.0,
    accuracy: float | None = 0.9,
    dense_ms: float = 4.0,
    targets: tuple[str, ...] = ("ort-cpu",),
    report: dict[str, Any] | None = None,
    **engine: Any,
) -> Path:
    """A bundle whose report and manifest are real, with a dense network of 95 % and half of its MACs kept."""
    path.mkdir(parents=True)
    rows = [
        make_engine(path, target, dense_ms=dense_ms, p50_ms=p50_ms, accuracy=accuracy, **engine) for target in targets
    ]
    seen = Accuracy(n=2000, dense=0.95, onnx=accuracy) if accuracy is not None else Accuracy()
    facts = {
        "title": "a network",
        "created": "2026-05-04T09:31:22+00:00",
        "model": "resnet18",
        "data": "digits",
        "criterion": "chip",
        "budget": "keep half of the MACs; widths rounded to 16",
        "input_shape": [3, 32, 32],
        "classes": 10,
        "accuracy": seen,
        "cost": Cost(
            dense=NetworkCost(macs=40_000_000, params=11_000_000, onnx_bytes=44_000_000),
            pruned=NetworkCost(macs=20_000_000, params=4_400_000, onnx_bytes=18_000_000),
        ),
        "engines": rows,
        "groups": [],
        "stages_s": {},
        "machine": read_machine(),
        "versions": {},
        "recipe": {},
    }
    write_json_atomic(path / "report.json", Report.model_validate(facts | (report or {})))
    write_manifest(path, versions={}, lineage={})
    return path


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """A fast one, an accurate one, and one that is as accurate as the fast one but slower."""
    return [
        make_bundle(tmp_path / "fast", p50_ms=1.0, accuracy=0.90),
        make_bundle(tmp_path / "accurate", p50_ms=2.0, accuracy=0.94),
        make_bundle(tmp_path / "neither", p50_ms=1.5, accuracy=0.90),
    ]


def candidates(comparison: BundleComparison) -> dict[str, Candidate]:
    return {each.label: each for each in comparison.targets[0].candidates}


def test_a_network_is_on_the_front_unless_another_is_as_good_and_in_one_thing_better(three: list[Path]) -> None:
    found = candidates(compare_bundles(three))
    assert {label: (each.on_front, each.behind) for label, each in found.items()} == {
        "dense": (True, None),  # the slowest, and the most accurate of all
        "fast": (True, None),
        "accurate": (True, None),
        "neither": (False, "fast"),
    }


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_the_one_that_a_slow_look_finds(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    for (accuracy, latency), behind in zip(points, front, strict=True):
        beaten = any(a >= accuracy and b <= latency and (a > accuracy or b < latency) for a, b in points)
        assert beaten == (behind is not None)
        if behind is not None:
            assert front[behind] is None
            assert points[behind][0] >= accuracy
            assert points[behind][1] <= latency


def test_figures_are_those_of_the_reports(three: list[Path]) -> None:
    comparison = compare_bundles(three)
    fast, dense = candidates(comparison)["fast"], candidates(comparison)["dense"]
    assert (fast.accuracy, fast.p50_ms, fast.verdict) == (0.90, 1.0, "faster")
    # Four times as fast with half of the MACs.
    assert (fast.speedup and fast.speedup.estimate, fast.efficiency) == (4.0, 2.0)
    assert (dense.accuracy, dense.p50_ms, dense.speedup) == (0.95, 4.0, None)
    assert [(each.label, each.macs_kept, each.params_kept) for each in comparison.networks[:1]] == [("fast", 0.5, 0.4)]


def test_the_same_bundle_may_be_given_twice(three: list[Path]) -> None:
    found = candidates(compare_bundles([three[0], three[0]]))
    assert found.keys() == {"dense", "fast", "fast (2)"}
    assert found["fast"].on_front
    assert found["fast (2)"].on_front


def test_labels_tell_bundles_of_one_name_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "other", tmp_path / "a" / ".." / "other"]
    assert bundle_labels(paths) == ["a/run", "b/run", "other", "other (2)"]
    assert bundle_labels([Path("/run"), Path("/b/run")]) == ["/run", "b/run"]


def test_dense_networks_that_differ_are_each_shown(tmp_path: Path) -> None:
    one = make_bundle(tmp_path / "one")
    trained_again = make_bundle(tmp_path / "two", report={"accuracy": Accuracy(n=2000, dense=0.96, onnx=0.9)})
    assert list(candidates(compare_bundles([one, trained_again])))[:2] == [
        "dense of one",
        "dense of two",
    ]


def test_a_bundle_called_dense_is_not_taken_for_the_dense_network(tmp_path: Path) -> None:
    paths = [make_bundle(tmp_path / "dense"), make_bundle(tmp_path / "x", p50_ms=1.0)]
    assert list(candidates(compare_bundles(paths))) == ["dense of dense, x", "dense", "x"]


@pytest.mark.parametrize(
    ("protocol", "complaint"),
    [
        (LatencyProtocol(batch=8), "batch 1 and 8"),
        (LatencyProtocol(threads=2), "threads 1 and 2"),
        (protocol_named("mlperf-like"), "id chip-deploy.latency/1 and mlperf-like/1"),
        (protocol_named("trtexec", batch=4), "id chip-deploy.latency/1 and trtexec-10/1; batch 1 and 4"),
    ],
)
def test_unlike_protocols_are_refused(tmp_path: Path, protocol: LatencyProtocol, complaint: str) -> None:
    paths = [make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b", protocol=protocol)]
    with pytest.raises(ValueError, match="ort-cpu fp32: a and b were measured by unlike protocols") as caught:
        compare_bundles(paths)
    assert complaint in str(caught.value)


def test_protocols_that_differ_in_length_alone_are_alike(tmp_path: Path) -> None:
    paths = [make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b", protocol=LatencyProtocol(seconds=9, laps=999))]
    assert len(compare_bundles(paths).targets) == 1


def test_unlike_machines_are_refused(tmp_path: Path) -> None:
    other = read_machine().model_copy(update={"cpu": "another CPU"})
    paths = [make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b", machine=other)]
    with pytest.raises(MachineMismatch, match="a was measured on another machine than b") as caught:
        compare_bundles(paths)
    assert "'another CPU' for b" in str(caught.value)


def test_a_machine_that_was_busier_is_the_same_machine(tmp_path: Path) -> None:
    busier: Machine = read_machine().model_copy(update={"load": 17.0, "governor": "powersave"})
    paths = [make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b", machine=busier)]
    assert len(compare_bundles(paths).targets) == 1


def test_targets_that_not_all_have_are_named_and_left_out(tmp_path: Path) -> None:
    paths = [make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b", targets=("trt", "ort-cpu"))]
    comparison = compare_bundles(paths)
    assert [each.name for each in comparison.targets] == ["ort-cpu fp32"]
    assert comparison.notes == ["b also has trt fp32, which not all of the others have."]


def test_one_target_can_be_compared_where_another_was_measured_unlike(tmp_path: Path) -> None:
    paths = [make_bundle(tmp_path / name, targets=("trt", "ort-cpu")) for name in ("a", "b")]
    report = json.loads((paths[1] / "report.json").read_text("utf-8"))
    report["engines"][0]["protocol"]["batch"] = 8
    (paths[1] / "report.json").write_text(json.dumps(report), "utf-8")
    write_manifest(paths[1], versions={}, lineage={})
    with pytest.raises(ValueError, match="trt fp32: a and b"):
        compare_bundles(paths)
    assert [each.target for each in compare_bundles(paths, target="ort-cpu").targets] == ["ort-cpu"]


@pytest.mark.parametrize(("target", "complaint"), [(None, "no target in common"), ("trt", "not all of them have")])
def test_bundles_without_a_common_target_are_refused(tmp_path: Path, target: str | None, complaint: str) -> None:
    paths = [make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b", targets=("trt",))]
    with pytest.raises(ValueError, match=complaint) as caught:
        compare_bundles(paths, target=target)
    assert "a has ort-cpu fp32; b has trt fp32" in str(caught.value)


@pytest.mark.parametrize("number", [0, 1])
def test_fewer_than_two_bundles_are_refused(three: list[Path], number: int) -> None:
    with pytest.raises(ValueError, match=f"{number} bundles to compare"):
        compare_bundles(three[:number])


def test_what_is_no_bundle_is_refused(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such bundle"):
        compare_bundles([three[0], tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(IntegrityError, match=r"no manifest\.json"):
        compare_bundles([three[0], tmp_path / "empty"])


def test_a_broken_bundle_is_refused(three: list[Path]) -> None:
    engine = three[1] / "engines" / "ort-cpu.fp32.engine"
    engine.write_bytes(b"not engine")
    with pytest.raises(IntegrityError, match="ort-cpu"):
        compare_bundles(three)
    write_manifest(three[1], versions={}, lineage={})
    with pytest.raises(IntegrityError, match="tells of another build"):
        compare_bundles(three)


def test_an_unstable_measurement_has_no_place_and_the_reason_is_told(three: list[Path], tmp_path: Path) -> None:
    shaky = make_bundle(tmp_path / "shaky", p50_ms=0.1, accuracy=0.99, verdict="unstable", reason="a busy machine.")
    comparison = compare_bundles([*three, shaky])
    found = candidates(comparison)
    assert (found["shaky"].on_front, found["shaky"].behind) == (False, None)
    assert found["fast"].on_front
    assert "shaky: unstable: a busy machine." in comparison.targets[0].notes


def test_an_engine_that_was_not_measured_is_listed_without_numbers(three: list[Path], tmp_path: Path) -> None:
    nothing = {"latency_ms": None, "dense_latency_ms": None, "speedup": None, "protocol": None, "machine": None}
    unmeasured = make_bundle(tmp_path / "new", verdict="not measured", reason="built elsewhere", **nothing)
    comparison = compare_bundles([three[0], unmeasured])
    found = candidates(comparison)["new"]
    assert (found.p50_ms, found.on_front, found.behind) == (None, False, None)
    assert comparison.targets[0].notes == ["new: not measured: built elsewhere."]
    assert [each.protocol for each in compare_bundles([unmeasured, unmeasured]).targets] == [None]


def test_accuracies_of_unlike_images_make_no_front(three: list[Path], tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", report={"data": "cifar10"})
    target = compare_bundles([three[0], other]).targets[0]
    assert target.placed == []
    assert "fast on 2000 images of digits, other on 2000 images of cifar10" in target.notes[-1]


def test_without_accuracy_there_is_a_table_and_no_drawing(tmp_path: Path) -> None:
    comparison = compare_bundles([make_bundle(tmp_path / name, accuracy=None) for name in ("a", "b")])
    assert comparison.targets[0].notes == [
        "dense: its p50 is the median of 2 measurements.",
        "no accuracy was recorded, so there is no Pareto front.",
    ]
    assert "2.00 ms" in comparison_markdown(comparison)
    with pytest.raises(ValueError, match="no accuracy was recorded"):
        comparison_svg(comparison)


@pytest.mark.parametrize(("dense_ms", "noted"), [(4.1, False), (4.4, True)])
def test_a_dense_network_that_took_longer_in_one_session_is_noted(tmp_path: Path, dense_ms: float, noted: bool) -> None:
    paths = [make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b", dense_ms=dense_ms)]
    notes = compare_bundles(paths).targets[0].notes
    assert any("took 4 ms beside a and 4.4 ms beside b" in note for note in notes) == noted


def shown(comparison: BundleComparison) -> list[str]:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    console.print(comparison_tables(comparison))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_terminal_shows_every_figure_in_80_columns(three: list[Path]) -> None:
    lines = shown(compare_bundles(three))
    assert max(map(len, lines)) <= 80
    words = [" ".join(line.split()) for line in lines]
    assert "fast 90.00 % 1.00 ms 4.00 (3.96 to 4.04) 2.00 faster front" in words
    assert any(line.startswith("neither 90.00 % 1.50 ms 2.67 (2.64 to 2.69) 1.33 faster behind") for line in words)
    assert any(line.startswith("ort-cpu fp32: batch 1, 1 thread, chip-deploy.latency/1, on ") for line in lines)


def test_a_long_name_is_broken_and_no_number_is(tmp_path: Path) -> None:
    long = "resnet18-with-a-very-long-name-that-somebody-gave-it"
    lines = shown(compare_bundles([make_bundle(tmp_path / long), make_bundle(tmp_path / "b", p50_ms=3.0)]))
    assert max(map(len, lines)) <= 80
    assert sum("2.00 (1.98 to 2.02)" in line for line in lines) == 1
    assert long in "".join(line.split()[0] for line in lines if line.strip())


class Page(HTMLParser):
    """Which elements a page has, and its words; fails on one that is closed out of order."""

    VOID = ("meta", "rect", "circle", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.split()


def test_the_page_holds_the_table_and_the_plot_and_needs_nothing_else(three: list[Path]) -> None:
    text = comparison_html(compare_bundles(three))
    page = Page(text)
    assert {"table", "svg", "main", "h1"} <= set(page.tags)
    assert page.links == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert {"fast", "accurate", "neither", "dense", "1.33"} <= set(page.words)


def test_the_drawing_places_every_network_by_latency_and_accuracy(three: list[Path]) -> None:
    root = ET.fromstring(comparison_svg(compare_bundles(three)))
    circles = {(each.findtext(f"{SVG}title") or "").partition(":")[0]: each for each in root.iter(f"{SVG}circle")}
    places = {label: (float(each.get("cx", 0)), float(each.get("cy", 0))) for label, each in circles.items()}
    assert places["fast"][0] < places["neither"][0] < places["accurate"][0]
    assert places["accurate"][1] < places["fast"][1] == places["neither"][1]
    # Latencies 1, 1.5 and 2 ms: the middle one is half way, to the tenth that is written.
    assert places["neither"][0] == pytest.approx((places["fast"][0] + places["accurate"][0]) / 2, abs=0.1)
    assert {label: each.get("class") for label, each in circles.items()} == {
        "fast": "front",
        "neither": "behind",
        "accurate": "front",
    }
    assert len([each for each in root.iter(f"{SVG}rect") if each.get("class") == "front"]) == 1  # dense
    assert "on the Pareto front: fast, accurate, dense" in root.get("aria-label", "")


def test_labels_of_crowded_networks_hide_no_other_label(tmp_path: Path) -> None:
    paths = [make_bundle(tmp_path / f"run-{k}", p50_ms=2.0 + 0.002 * k, accuracy=0.9 + 0.0002 * k) for k in range(9)]
    root = ET.fromstring(comparison_svg(compare_bundles(paths)))
    labels = [each for each in root.iter(f"{SVG}text") if re.fullmatch(r"run-\d|dense", each.text or "")]
    assert len(labels) >= 5
    corners = [(float(each.get("x", 0)), float(each.get("y", 0))) for each in labels]
    for number, (x, y) in enumerate(corners):
        # A label of five letters is about 40 units long and 18 high.
        assert not any(abs(x - other_x) < 38 and abs(y - other_y) < 17.9 for other_x, other_y in corners[:number])


def test_networks_that_are_all_one_can_still_be_drawn(three: list[Path]) -> None:
    report = {"accuracy": Accuracy(n=2000, dense=0.9, onnx=0.9)}
    same = make_bundle(three[0].parent / "same", p50_ms=4.0, dense_ms=4.0, report=report, verdict="not faster")
    root = ET.fromstring(comparison_svg(compare_bundles([same, same])))
    assert {each.get("cx") for each in root.iter(f"{SVG}circle")} == {"340.0"}


def test_each_target_has_its_own_panel(tmp_path: Path) -> None:
    paths = [make_bundle(tmp_path / name, targets=("trt", "ort-cpu")) for name in ("a", "b")]
    root = ET.fromstring(comparison_svg(compare_bundles(paths)))
    assert root.get("viewBox") == "0 0 640 800"
    assert [each.text for each in root.iter(f"{SVG}text") if each.get("class") == "title"] == [
        "trt fp32",
        "ort-cpu fp32",
    ]


def test_hostile_names_are_text_everywhere(tmp_path: Path) -> None:
    texts = {"model": HOSTILE, "criterion": HOSTILE, "budget": HOSTILE}
    paths = [make_bundle(tmp_path / f"{k}<script>x&|", report=texts, p50_ms=1.0 + k) for k in range(2)]
    comparison = compare_bundles(paths)
    assert "script" not in Page(comparison_html(comparison)).tags
    drawn = ET.fromstring(comparison_svg(comparison))
    assert not list(drawn.iter(f"{SVG}script"))
    assert "[b]" in "".join("".join(line.split()) for line in shown(comparison))
    table = [line for line in comparison_markdown(comparison).splitlines() if line.startswith("| 0")]
    assert [len(re.split(r"(?<!\\)\|", line)) for line in table] == [10, 9]  # eight columns and seven, with both ends


def test_every_writing_tells_the_same_figures(three: list[Path]) -> None:
    comparison = compare_bundles(three)
    for text in (comparison_markdown(comparison), comparison_html(comparison)):
        for figure in ("4.00 (3.96 to 4.04)", "90.00 %", "1.50 ms", "behind fast", "20.0 M"):
            assert figure in text
    read = BundleComparison.model_validate_json(comparison_json(comparison))
    assert read == comparison


@pytest.mark.parametrize("ending", [".html", ".svg", ".md", ".json", ".SVG"])
def test_the_ending_names_the_form(three: list[Path], tmp_path: Path, ending: str) -> None:
    comparison = compare_bundles(three)
    out = tmp_path / f"compared{ending}"
    write_comparison(comparison, out)
    begins = {".html": "<!DOCTYPE html>", ".svg": "<svg ", ".md": "# Bundles compared", ".json": "{\n"}
    assert out.read_text("utf-8").startswith(begins[ending.lower()])


def test_a_place_that_cannot_hold_a_comparison_is_refused_before_any_work(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown ending '.png'. Available: .html, .json, .md, .svg"):
        require_comparison_place(tmp_path / "x.png", three)
    with pytest.raises(ValueError, match="inside the bundle"):
        require_comparison_place(three[1] / "x.html", three)
    require_comparison_place(tmp_path / "x.html", three)
