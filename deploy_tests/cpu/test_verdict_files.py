"""A gate's result as a build reads it: well-formed whatever the names are, and never greener than the gate."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from chip_deploy.export.bundle import require_place
from chip_deploy.export.gate import GateResult, GateRow, JudgedEngine
from chip_deploy.export.laps import Speedup
from chip_deploy.export.verdict_files import (
    clear_verdicts,
    junit_xml,
    markdown_summary,
    markdown_text,
    result_json,
    write_verdicts,
)

ORT = "engines/ort-cpu.fp32.engine"
HOSTILE = """<img src=x> & "q" 'q' | `t` *b* _i_ [a](//b) \\ \x00\x1b[31m\ud800 ]]> -->"""
# Element -> the attributes and the children that the schema of JUnit 4 reports allows (as Jenkins publishes it), and
# which of the attributes it demands. An order among the children matters only where there are several kinds.
SCHEMA = {
    "testsuites": ({"name", "time", "tests", "failures", "disabled", "errors"}, {"testsuite"}, set()),
    "testsuite": (
        {
            *("name", "tests", "failures", "errors", "time", "disabled", "skipped"),
            *("timestamp", "hostname", "id", "package"),
        },
        {"properties", "testcase", "system-out", "system-err"},
        {"name", "tests"},
    ),
    "testcase": (
        {"name", "assertions", "time", "classname", "status"},
        {"skipped", "error", "failure", "system-out", "system-err"},
        {"name", "classname"},
    ),
    "failure": ({"type", "message"}, set(), {"type"}),
    "error": ({"type", "message"}, set(), {"type"}),
    "system-out": (set(), set(), set()),
}


def row(status: str, requirement: str = "p99<=4ms", engine: str = ORT, sentence: str = "a sentence.") -> GateRow:
    facts = {"requirement": requirement, "engine": engine, "estimate": None, "bound": None}
    return GateRow.model_validate({**facts, "value": "3.8 ms", "status": status, "sentence": sentence})


def result(*rows: GateRow, bundle: str = "first") -> GateResult:
    return GateResult(bundle=bundle, rows=list(rows))


def outcomes(text: str) -> list[str]:
    """What a reader of JUnit reports makes of each test case."""
    return [
        next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        for case in ET.fromstring(text).iter("testcase")
    ]


def require_schema(element: ET.Element) -> None:
    attributes, children, needed = SCHEMA[element.tag]
    assert needed <= element.attrib.keys() <= attributes
    for child in element:
        assert child.tag in children
        require_schema(child)


STATUSES = ("met", "failed", "inconclusive", "another machine", "broken")


def test_every_status_is_seen_for_what_it_is() -> None:
    text = junit_xml(result(*map(row, STATUSES)))
    assert outcomes(text) == ["passed", "failure", "error", "error", "error"]


@given(st.lists(st.sampled_from(STATUSES), max_size=6))
def test_a_test_report_is_green_only_where_the_gate_exits_0(statuses: list[str]) -> None:
    made = result(*map(row, statuses))
    suite = ET.fromstring(junit_xml(made))[0]
    is_green = suite.get("failures") == suite.get("errors") == "0" and suite.get("tests") != "0"
    assert is_green == (made.exit_code == 0)


def test_the_counts_are_those_of_the_cases() -> None:
    root = ET.fromstring(junit_xml(result(*map(row, ["met", "failed", "failed", "broken"]))))
    for element in (root, root[0]):
        assert [element.get(name) for name in ("tests", "failures", "errors")] == ["4", "2", "1"]


def test_what_is_not_met_says_why_in_message_and_text() -> None:
    root = ET.fromstring(junit_xml(result(row("failed", sentence="p99 5 ms misses p99<=4ms."))))
    failure = next(root.iter("failure"))
    assert failure.get("message") == failure.text == "p99 5 ms misses p99<=4ms."


def test_the_report_keeps_to_the_schema_that_build_servers_publish() -> None:
    require_schema(ET.fromstring(junit_xml(result(*map(row, STATUSES)))))


def test_the_check_of_the_schema_finds_what_is_not_in_it() -> None:
    for text in ("<testsuites><testcase/></testsuites>", '<testsuites verdict="x"/>', "<testsuite/>"):
        with pytest.raises((AssertionError, KeyError)):
            require_schema(ET.fromstring(text))


def test_two_engines_under_one_requirement_are_two_tests() -> None:
    root = ET.fromstring(junit_xml(result(row("met"), row("failed", engine="engines/trt.fp32.engine"))))
    assert len({(case.get("classname"), case.get("name")) for case in root.iter("testcase")}) == 2


def test_a_dot_in_the_bundles_name_makes_no_package_of_it() -> None:
    case = next(ET.fromstring(junit_xml(result(row("met"), bundle="v1.2.3"))).iter("testcase"))
    assert case.get("classname") == "gate.v1_2_3"


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)


@given(ANY_TEXT, ANY_TEXT)
def test_any_name_makes_well_formed_xml_that_says_it(name: str, sentence: str) -> None:
    # Frozen models take no lone surrogates; a file system and a runtime may, and nothing may fall over them.
    odd = row("failed").model_copy(update={"engine": name, "sentence": sentence})
    text = junit_xml(GateResult.model_construct(bundle=name, rows=[odd], engines=[], left_out=[]))
    failure = next(ET.fromstring(text.encode()).iter("failure"))
    assert failure.get("message") == re.sub(
        "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", sentence
    )


def judged(**changes: object) -> JudgedEngine:
    facts = {
        "name": "ort-cpu fp32",
        "file": ORT,
        "verdict": "faster",
        "reason": "",
        "speedup": Speedup(estimate=1.624, low=1.58, high=1.66),
        "dense_top1": 0.985,
        "top1": 0.98,
    }
    return JudgedEngine.model_validate(facts | changes)


def test_a_summary_begins_with_the_verdict_and_has_a_line_for_each_engine() -> None:
    made = GateResult(bundle="first", rows=[row("met")], engines=[judged()], left_out=["engines/trt.fp32.engine"])
    lines = markdown_summary(made).splitlines()
    assert lines[:3] == ["### Gate passed: first", "", "all 1 checks are met."]
    assert (
        "- ort-cpu fp32: faster, speed-up 1.62 (95 % interval 1.58 to 1.66); "
        "top-1 98.00 %, -0.50 points to dense (98.50 %)."
    ) in lines
    assert "- engines/trt.fp32.engine: not measured, and so not judged." in lines


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"speedup": None, "verdict": "not measured"}, "not measured; top-1 98.00 %"),
        ({"top1": None}, "accuracy unknown."),
        ({"dense_top1": None}, "top-1 98.00 %."),
    ],
)
def test_what_is_not_known_of_an_engine_is_not_made_up(changes: dict[str, object], line: str) -> None:
    assert line in markdown_summary(GateResult(rows=[row("met")], engines=[judged(**changes)]))


def table_cells(markdown: str) -> list[list[str]]:
    """The table's cells, as a Markdown reader shows them."""
    html = MarkdownIt("commonmark").enable("table").render(markdown)
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in rows]


def test_the_table_of_a_summary_shows_every_row() -> None:
    cells = table_cells(markdown_summary(result(row("met"), row("failed", requirement="size<=10MB"))))
    assert cells == [
        ["requirement", "engine", "value", "status"],
        ["p99&lt;=4ms", ORT, "3.8 ms", "met"],
        ["size&lt;=10MB", ORT, "3.8 ms", "failed"],
    ]


def test_what_is_not_met_is_explained_below_the_table() -> None:
    text = markdown_summary(result(row("met", sentence="good."), row("inconclusive", sentence="too close.")))
    assert "- inconclusive: too close." in text
    assert "good." not in text


@given(st.text(max_size=30))
def test_markdown_shows_any_text_as_it_is(text: str) -> None:
    shown = MarkdownIt("commonmark").enable("strikethrough").render(f"x {markdown_text(text)} x")
    plain = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    escaped = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    assert shown.split() == f"<p>x {escaped} x</p>".split()


def test_a_hostile_name_stays_in_its_cell() -> None:
    odd = row("failed").model_copy(update={"engine": HOSTILE})
    cells = table_cells(
        markdown_summary(GateResult.model_construct(bundle=HOSTILE, rows=[odd], engines=[], left_out=[]))
    )
    assert [len(line) for line in cells] == [4, 4]
    assert cells[1][1].startswith("&lt;img src=x&gt; &amp;")


def test_json_holds_the_rows_the_verdict_and_the_exit_code() -> None:
    made = json.loads(result_json(result(row("failed"))))
    assert (made["exit_code"], made["verdict"]) == (4, "failed: p99<=4ms (0 of 1 checks met).")
    assert made["rows"][0]["status"] == "failed"


def test_files_that_were_asked_for_are_written_and_no_others(tmp_path: Path) -> None:
    write_verdicts(result(row("met")), junit=tmp_path / "gate.xml")
    assert [path.name for path in tmp_path.iterdir()] == ["gate.xml"]
    write_verdicts(result(row("met")), markdown=tmp_path / "gate.md")
    assert outcomes((tmp_path / "gate.xml").read_text("utf-8")) == ["passed"]
    assert (tmp_path / "gate.md").read_text("utf-8").startswith("### Gate passed")


def test_an_old_verdict_is_gone_before_a_new_gate_begins(tmp_path: Path) -> None:
    old = tmp_path / "gate.xml"
    old.write_text("green")
    clear_verdicts([old, tmp_path / "new.md"], tmp_path / "bundle")
    assert not old.exists()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("bundle/gate.xml", "inside the bundle"),
        ("bundle/../bundle/sub/gate.xml", "inside the bundle"),
        ("folder", "no regular file"),
        ("nowhere/gate.xml", "there is no folder"),
    ],
)
def test_a_verdict_goes_only_where_it_breaks_nothing(tmp_path: Path, name: str, complaint: str) -> None:
    for folder in ("bundle", "folder"):
        (tmp_path / folder).mkdir()
    good = tmp_path / "good.xml"
    good.write_text("old")
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        clear_verdicts([good, tmp_path / name], tmp_path / "bundle")
    assert good.exists()


def test_a_device_is_no_place_for_a_verdict() -> None:
    with pytest.raises(ValueError, match="no regular file"):
        require_place(Path("/dev/null"), [])


def test_one_file_cannot_hold_two_verdicts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="given for two files"):
        clear_verdicts([tmp_path / "a", tmp_path / "x" / ".." / "a"], tmp_path / "bundle")
