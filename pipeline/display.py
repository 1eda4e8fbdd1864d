"""What a person watches while a run works: a bar on a terminal, one line a stage anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

NAME_WIDTH = 10
BAR_WIDTH = 24
LOG_PART = 0.1  # of a stage, and
LOG_PAUSE_S = 60.0  # seconds must have passed before a log hears of a stage again


class Display(Protocol):
    """Where a stage tells how far it is.

    `stage` ends the stage before it and begins the next; `progress` takes a fraction from 0 to 1 and a few words;
    `note` leaves a sentence that stays; `done` ends the last stage.
    """

    def stage(self, name: str) -> None:
        """The work called `name` begins; the one before it is done."""
        ...

    def progress(self, fraction: float, text: str = "") -> None:
        """The stage is `fraction` done (0 to 1), and at `text` right now."""
        ...

    def note(self, text: str) -> None:
        """A sentence worth keeping on the screen."""
        ...

    def done(self) -> None:
        """The last stage is done; nothing more follows."""
        ...


class RichDisplay:
    """A live bar for the stage that runs, and one line with its seconds for every stage that is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn("line"),
            TextColumn(f"{{task.description:<{NAME_WIDTH}}}", markup=False),
            BarColumn(bar_width=BAR_WIDTH),
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            expand=True,
        )
        self._running: tuple[str, TaskID, float] | None = None

    def stage(self, name: str) -> None:
        """Begins a bar for `name`; it swings until the first progress is known."""
        self._end_stage()
        self._bars.stop()
        self._bars.live.auto_refresh = not name.startswith("measure")  # a thread that redraws would cost laps time
        self._bars.start()
        self._running = (name, self._bars.add_task(name, total=None, text=""), time.monotonic())

    def progress(self, fraction: float, text: str = "") -> None:
        """Moves the bar of the running stage."""
        if self._running:
            self._bars.update(self._running[1], total=1.0, completed=min(max(fraction, 0.0), 1.0), text=text)
            if not self._bars.live.auto_refresh:
                self._bars.refresh()

    def note(self, text: str) -> None:
        """Prints a sentence above the bar, wrapped at the width of the terminal."""
        self._console.print(Text(text), highlight=False)

    def done(self) -> None:
        """Ends the last stage and takes the bar away."""
        self._end_stage()
        self._bars.stop()

    def stop(self) -> None:
        """Takes the bar away without calling the stage done: it failed or was interrupted."""
        self._running = None
        self._bars.stop()

    def _end_stage(self) -> None:
        if not self._running:
            return
        name, task, started = self._running
        self._running = None
        self._bars.remove_task(task)
        self._console.print(Text(f"{name:<{NAME_WIDTH}} {time.monotonic() - started:8.1f} s"), highlight=False)


class PlainDisplay:
    """One line a stage: its name when it begins, its seconds when it ends. For logs and pipes; never a flood.

    A stage that takes minutes tells how far it is as well: a line a tenth, and at most one a minute.
    """

    def __init__(self, console: Console, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock_s = clock_s
        self._running: tuple[str, float] | None = None
        self._told: tuple[float, float] = 0.0, 0.0  # how far the stage was in the line before, and when
        self._line_is_open = False

    def stage(self, name: str) -> None:
        """Begins a line with the name of the stage."""
        self._end_stage()
        now_s = self._clock_s()
        self._running, self._told = (name, now_s), (0.0, now_s)
        self._write(f"{name:<{NAME_WIDTH}} ")
        self._line_is_open = True

    def progress(self, fraction: float, text: str = "") -> None:
        """Writes a line where both a tenth of the stage and a minute have passed since the one before."""
        (part, since_s), now_s = self._told, self._clock_s()
        if self._running and fraction >= part + LOG_PART and now_s >= since_s + LOG_PAUSE_S:
            self._told = fraction, now_s
            self.note(f"{self._running[0]:<{NAME_WIDTH}} {100 * fraction:6.0f} % {text}".rstrip())

    def note(self, text: str) -> None:
        """Writes a sentence on a line of its own."""
        self._close_line()
        self._write(f"{text}\n")

    def done(self) -> None:
        """Ends the line of the last stage."""
        self._end_stage()

    def stop(self) -> None:
        """Ends the line without the seconds: the stage failed or was interrupted."""
        self._running = None
        self._close_line()

    def _end_stage(self) -> None:
        if not self._running:
            return
        name, started = self._running
        again = "" if self._line_is_open else f"{name:<{NAME_WIDTH}} "
        self._running, self._line_is_open = None, False
        self._write(f"{again}{self._clock_s() - started:8.1f} s\n")

    def _close_line(self) -> None:
        if self._line_is_open:
            self._line_is_open = False
            self._write("\n")

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


def make_display(console: Console) -> RichDisplay | PlainDisplay:
    """The display that suits where `console` writes: bars on a terminal that can move its cursor, lines elsewhere."""
    if console.is_terminal and not console.is_dumb_terminal:
        return RichDisplay(console)
    return PlainDisplay(console)
