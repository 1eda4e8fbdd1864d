"""What TensorRT tells while it works: a logger that keeps its errors and warnings, a profiler that keeps layer times.

The module of TensorRT comes in as an argument here and in its neighbours: `tensorrt` or `tensorrt_rtx`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import BuildFailed


def collecting_logger(trt: Any) -> Any:
    """A logger for `trt` that keeps what it is told: `text()` gives the errors, `warnings()` the warnings."""
    errors = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class CollectingLogger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (*errors, trt.ILogger.Severity.WARNING):
                self.lines.append((severity, " ".join(message.split())))

        def text(self) -> str:
            found = dict.fromkeys(line.rstrip(".") for kind, line in self.lines if kind in errors)
            return "; ".join(found) or "it logged no error"

        def warnings(self) -> list[str]:
            return list(dict.fromkeys(line for kind, line in self.lines if kind not in errors))

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


def construct(make: Callable[[], Any], log: Any, *, what: str) -> Any:
    """What `make` makes. Raises: BuildFailed with the log where TensorRT gives None, a TypeError to its bindings."""
    try:
        made = make()
    except TypeError as err:
        raise BuildFailed(f"{what}: {log.text()}.") from err
    if made is None:
        raise BuildFailed(f"{what}: {log.text()}.")
    return made
