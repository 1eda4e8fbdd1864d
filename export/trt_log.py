"""What TensorRT tells while it works: a logger that keeps its errors and warnings, a profiler that keeps layer times.

The module of TensorRT comes in as an argument here and in its neighbours: `tensorrt` or `tensorrt_rtx`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .errors import BuildFailed

# What TensorRT says to a logger that is not the first of the process: true of a program that has one of its own.
ANOTHER_LOGGER = "differs from one already registered"


class Log:
    """What TensorRT tells from now on, to whomever it tells it.

    It keeps the first logger of the process, whoever else comes, and writes to it even when it is gone. So there is
    one for each module of TensorRT, which is never given back; each user reads on from where it began.
    """

    def __init__(self, trt: Any) -> None:
        self.logger = _logger(trt.ILogger)
        self._begun = len(self.logger.lines)

    def text(self) -> str:
        """The errors, each once."""
        return "; ".join(dict.fromkeys(line.rstrip(".") for line in self._lines(error=True))) or "it logged no error"

    def warnings(self) -> list[str]:
        """The warnings, each once."""
        return [line for line in dict.fromkeys(self._lines(error=False)) if ANOTHER_LOGGER not in line]

    def _lines(self, *, error: bool) -> list[str]:
        return [line for is_error, line in self.logger.lines[self._begun :] if is_error is error]


@functools.cache
def _logger(base: Any) -> Any:
    """The one logger that TensorRT is given; `lines` holds every error and warning, and whether it is an error."""
    errors = (base.Severity.INTERNAL_ERROR, base.Severity.ERROR)

    class CollectingLogger(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.lines: list[tuple[bool, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (*errors, base.Severity.WARNING):
                self.lines.append((severity in errors, " ".join(message.split())))

    return CollectingLogger()


def layer_timer(trt: Any) -> Any:
    """A profiler for `trt` that keeps what it is told: `laps` holds the ms of every layer in every lap."""

    class LayerTimer(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.laps: list[dict[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.laps[-1][layer_name] = self.laps[-1].get(layer_name, 0.0) + ms

    return LayerTimer()


def release(trt: Any) -> str:
    """The package with its version, as errors name it: `tensorrt_rtx 1.7.1.116`."""
    return f"{trt.__name__} {trt.__version__}"


def construct(make: Callable[[], Any], log: Log, *, what: str) -> Any:
    """What `make` makes. Raises: BuildFailed with the log where TensorRT gives None, a TypeError to its bindings."""
    try:
        made = make()
    except TypeError as err:
        raise BuildFailed(f"{what}: {log.text()}.") from err
    if made is None:
        raise BuildFailed(f"{what}: {log.text()}.")
    return made
