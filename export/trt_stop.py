"""A build that a signal ends: what a handler raises in the midst of one, TensorRT's bindings drop."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stoppable_build(trt: Any, config: Any) -> Iterator[None]:
    """While the block builds with `config`, Ctrl-C and SIGTERM end the build, and are handled when it has ended.

    TensorRT builds without the interpreter. The next Python to run is a callback, and an exception of a handler that
    runs with it is printed and forgotten: the build would go on to its end. So signals are only noted, and a progress
    monitor, which may run on another thread than the one that handles signals, asks for the end of the build.

    Raises: what the handler that was there before raises, once for all signals that came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    told, tell = socket.socketpair()
    told.settimeout(0.0)
    tell.settimeout(0.0)
    config.progress_monitor = monitor = _stopper(trt, told)  # kept here: not every binding holds on to it
    woken = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    try:
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        told.close()
        tell.close()
        del monitor
    if came and callable(handler := before[came[0]]):
        handler(came[0], None)


def _stopper(trt: Any, told: socket.socket) -> Any:
    """A progress monitor for `trt` that has the build stop once a signal has been told."""

    class Stopper(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.asked = False

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            pass

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            with contextlib.suppress(OSError):  # nothing was told
                self.asked = self.asked or bool(told.recv(1))
            return not self.asked

    return Stopper()
