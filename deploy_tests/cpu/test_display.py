"""What a person sees while a run works: a bar on a terminal, one line a stage in a log."""

import io
import re

import pytest
from rich.console import Console

from chip_deploy.pipeline.display import PlainDisplay, RichDisplay, make_display


def console(*, terminal: bool, term: str = "xterm") -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, _environ={"TERM": term, "COLUMNS": "80"})


def text(where: Console) -> str:
    assert isinstance(where.file, io.StringIO)
    return where.file.getvalue()


def run(display: RichDisplay | PlainDisplay) -> None:
    """Two stages; the first reports often, with more words than fit and what looks like markup, and leaves a note."""
    display.stage("dense")
    for step in range(500):
        display.progress(step / 500, f"epoch {step} of 500, loss [bold]0.123[/bold], and a good deal more to say")
    display.note("The dense network [was] trained first.")
    display.stage("score")
    display.done()


def test_a_terminal_gets_bars_and_everything_else_lines() -> None:
    assert isinstance(make_display(console(terminal=True)), RichDisplay)
    assert isinstance(make_display(console(terminal=False)), PlainDisplay)
    assert isinstance(make_display(console(terminal=True, term="dumb")), PlainDisplay)


def test_a_log_gets_one_line_a_stage_and_the_notes() -> None:
    where = console(terminal=False)
    run(make_display(where))
    lines = text(where).splitlines()
    assert [line.split()[0] for line in lines] == ["dense", "The", "dense", "score"]
    assert lines[1] == "The dense network [was] trained first."
    assert all(re.fullmatch(r"\w+ +\d+\.\d s", line) for line in lines[2:])


def test_a_log_hears_of_a_long_stage_a_tenth_and_a_minute_apart() -> None:
    where, now_s = console(terminal=False), [0.0]
    display = PlainDisplay(where, clock_s=lambda: now_s[0])
    display.stage("cells")
    for step in range(1001):
        now_s[0] = 0.5 * step
        display.progress(step / 1000, f"{step}/1000")
    display.stage("report")
    now_s[0] += 59.0
    display.progress(0.9, "not yet")
    display.done()
    lines = [line.split() for line in text(where).splitlines()]
    # A tenth takes 50 s, so the minute decides; the stage ends before the ninth line.
    assert lines[0] == ["cells"]
    assert lines[1:9] == [["cells", f"{12 * n}", "%", f"{120 * n}/1000"] for n in range(1, 9)]
    assert lines[9:] == [["cells", "500.0", "s"], ["report", "59.0", "s"]]


def test_a_stage_without_notes_stays_on_its_line() -> None:
    where = console(terminal=False)
    display = make_display(where)
    display.stage("plan")
    assert text(where) == "plan       "
    display.done()
    assert re.fullmatch(r"plan +0\.\d s\n", text(where))


def test_a_stage_that_fails_gets_no_seconds() -> None:
    where = console(terminal=False)
    display = make_display(where)
    display.stage("build")
    display.stop()
    assert text(where) == "build      \n"


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_follows_when_all_is_done(terminal: bool) -> None:
    where = console(terminal=terminal)
    display = make_display(where)
    run(display)
    before = text(where)
    display.done()
    display.stop()
    assert visible(text(where)) == visible(before)


def test_a_terminal_keeps_the_notes_and_the_seconds_and_hides_the_cursor_no_longer() -> None:
    where = console(terminal=True)
    run(make_display(where))
    kept = [line for line in visible(text(where)).splitlines() if line.strip()]
    assert "The dense network [was] trained first." in kept
    assert [line.split()[0] for line in kept if re.fullmatch(r"\w+ +\d+\.\d s", line)] == ["dense", "score"]
    assert text(where).rindex("\x1b[?25h") > text(where).rindex("\x1b[?25l")


def test_the_bar_never_breaks_the_line_at_80_columns() -> None:
    where = console(terminal=True)
    display = make_display(where)
    display.stage("build trt-rtx:sm86,sm89")
    display.progress(0.5, "a very long text that cannot fit beside the bar, whatever the terminal does about it")
    assert isinstance(display, RichDisplay)
    display._bars.refresh()
    frames = re.split(r"[\r\n]", text(where))
    display.stop()
    widths = [len(visible(frame)) for frame in frames]
    assert max(widths) <= 80
    assert any("a very long text" in visible(frame) for frame in frames)


def test_a_fraction_out_of_range_is_shown_as_none_or_all() -> None:
    display = make_display(console(terminal=True))
    assert isinstance(display, RichDisplay)
    display.stage("tune")
    for given, shown in ((-1.0, 0.0), (7.0, 1.0), (0.25, 0.25)):
        display.progress(given)
        assert display._bars.tasks[0].completed == shown
    display.stop()


def test_progress_outside_a_stage_is_no_error() -> None:
    for terminal in (True, False):
        display = make_display(console(terminal=terminal))
        display.progress(0.5, "nothing runs")
        display.done()


def visible(text: str) -> str:
    """`text` without the control sequences of a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
