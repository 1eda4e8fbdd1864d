"""A gate's result as the files that a build reads: JUnit XML for its test report, Markdown for a pull request, JSON."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from .bundle import require_place, write_atomic
from .gate import GateResult, GateRow, JudgedEngine

# What XML 1.0 can hold; a name from a file system, or a runtime's message, may hold more.
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# What Markdown would take for markup: `<` before a tag, `&` before an entity, `_` where an emphasis begins or ends.
MARKUP = re.compile(r"[\\`*{}\[\]|~#]|<(?=[\w/!?])|&(?=[\w#])|(?<!\w)_|_(?!\w)")
REPLACEMENT = "\ufffd"


def junit_xml(result: GateResult) -> str:
    """The result as a JUnit test report: one test case a row; what is not met carries its sentence.

    A requirement that failed is a `failure`. One that could not be decided is an `error`, not a skipped test: the
    gate does not pass with it, and no test report may look as if it did.
    """
    cases = [_test_case(row, result.bundle) for row in result.rows]
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": str(sum(case.find("error") is not None for case in cases)),
        "time": "0",  # readers add times up, and not all of them survive one that is missing
    }
    root = ET.Element("testsuites", {"name": "chip-deploy gate", **counts})
    suite = ET.SubElement(root, "testsuite", {"name": _xml_text(f"chip-deploy gate {result.bundle}"), **counts})
    suite.extend(cases)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def markdown_summary(result: GateResult) -> str:
    """The result for a pull request: the verdict, a line for each engine, every row in a table, and what is open."""
    table = [
        "| requirement | engine | value | status |",
        "|---|---|---|---|",
        *(f"| {' | '.join(map(markdown_text, _cells(row)))} |" for row in result.rows),
    ]
    open_rows = [f"- {markdown_text(f'{row.status}: {row.sentence}')}" for row in result.rows if row.status != "met"]
    engines = [f"- {markdown_text(_engine_line(engine))}" for engine in result.engines]
    left_out = [f"- {markdown_text(f'{file}: not measured, and so not judged.')}" for file in result.left_out]
    parts = [_headline(result), "\n".join(engines + left_out), "\n".join(table), "\n".join(open_rows)]
    return "\n\n".join(filter(None, parts)) + "\n"


def result_json(result: GateResult) -> str:
    """The result as JSON, with its exit code and its verdict."""
    return result.model_dump_json(indent=2) + "\n"


def markdown_text(text: str) -> str:
    """`text` on one line, so that Markdown shows it as it is."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return MARKUP.sub(lambda found: f"\\{found[0]}", line)


def clear_verdicts(paths: Sequence[Path], bundle: Path) -> None:
    """No file at `paths`: the verdict of an earlier gate must not outlive one that ends early.

    Raises: ValueError and FileNotFoundError as `require_place`, and ValueError for two that are one, with nothing
    removed.
    """
    places = [require_place(path, [bundle]) for path in paths]
    if len(set(places)) < len(places):
        raise ValueError(f"{paths[-1]}: given for two files. Give each a name of its own.")
    for place in places:
        place.unlink(missing_ok=True)


def write_verdicts(result: GateResult, *, junit: Path | None = None, markdown: Path | None = None) -> None:
    """The files that were asked for, each whole."""
    for path, text in ((junit, junit_xml), (markdown, markdown_summary)):
        if path is not None:
            write_atomic(path.resolve(), text(result).encode(errors="replace"))


def _test_case(row: GateRow, bundle: str) -> ET.Element:
    # Jenkins takes what stands before the last dot for a package, so a dot in the bundle's name would split it.
    group = f"gate.{bundle.replace('.', '_')}"
    names = {"classname": _xml_text(group), "name": _xml_text(f"{row.requirement}: {row.engine}"), "time": "0"}
    case = ET.Element("testcase", names)
    sentence = _xml_text(row.sentence)
    if row.status == "met":
        ET.SubElement(case, "system-out").text = sentence
    else:
        kind = "failure" if row.status == "failed" else "error"
        ET.SubElement(case, kind, {"message": sentence, "type": row.status}).text = sentence
    return case


def _xml_text(text: str) -> str:
    return NOT_XML.sub(REPLACEMENT, text)


def _headline(result: GateResult) -> str:
    word, _, rest = result.verdict.partition(":")
    return f"### Gate {markdown_text(word)}: {markdown_text(result.bundle)}\n\n{markdown_text(rest.strip())}"


def _cells(row: GateRow) -> tuple[str, str, str, str]:
    return row.requirement, row.engine, row.value or "-", row.status


def _engine_line(engine: JudgedEngine) -> str:
    """`ort-cpu fp32: faster, speed-up 1.62 (95 % interval 1.58 to 1.66); top-1 98.1 %, -0.5 points to dense.`"""
    speedup, top1, dense = engine.speedup, engine.top1, engine.dense_top1
    latency = engine.verdict
    if speedup is not None:
        interval = f"{100 * speedup.level:g} % interval {speedup.low:.2f} to {speedup.high:.2f}"
        latency += f", speed-up {speedup.estimate:.2f} ({interval})"
    accuracy = "accuracy unknown"
    if top1 is not None:
        accuracy = f"top-1 {100 * top1:.2f} %"
        accuracy += "" if dense is None else f", {100 * (top1 - dense):+.2f} points to dense ({100 * dense:.2f} %)"
    return f"{engine.name}: {latency}; {accuracy}."
