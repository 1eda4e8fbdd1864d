"""Ctrl-C in the midst of a TensorRT build ends it; what handlers raise inside its callbacks would be forgotten."""

import importlib.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from chip_deploy.export import trt_stop
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.target import engine_path, parse_target
from chip_deploy.export.targets import make_target
from chip_deploy.export.trt_stop import stoppable_build

NO_RTX = importlib.util.find_spec("tensorrt_rtx") is None
needs_rtx = pytest.mark.skipif(NO_RTX, reason="tensorrt-rtx is not installed (it has wheels for x86-64 only)")


class Stopped(Exception):
    """What a handler raises."""


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals that our own handler got; it raises."""
    got: list[int] = []

    def stop(number: int, _: object) -> None:
        got.append(number)
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    yield got
    for number, handler in before.items():
        signal.signal(number, handler)


class Monitor:
    """Stands in for TensorRT's progress monitor."""

    def __init__(self) -> None:
        pass


STAND_IN = SimpleNamespace(IProgressMonitor=Monitor)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_build_and_is_handled_when_it_has_ended(handled: list[int], number: int) -> None:
    config: Any = SimpleNamespace()
    after = []

    def build() -> None:
        with stoppable_build(STAND_IN, config):
            assert config.progress_monitor.step_complete("timing", 0)
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # an impatient user
            after.extend(config.progress_monitor.step_complete("timing", step) for step in (1, 2))
            assert handled == []

    with pytest.raises(Stopped):
        build()
    assert after == [False, False]
    assert handled == [number]


def test_a_build_that_calls_back_on_another_thread_is_stopped_while_the_first_one_waits(handled: list[int]) -> None:
    config: Any = SimpleNamespace()
    stopped = []

    def call_back() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for step in range(1000):  # the system delivers it to the thread that waits, and in its own time
            if not config.progress_monitor.step_complete("timing", step):
                stopped.append(step)
                return
            time.sleep(0.01)

    def build() -> None:
        with stoppable_build(STAND_IN, config):
            thread = threading.Thread(target=call_back)
            thread.start()
            thread.join()

    with pytest.raises(Stopped):
        build()
    assert len(stopped) == 1
    assert handled == [signal.SIGINT]


def test_without_a_signal_handlers_are_as_before(handled: list[int]) -> None:
    mine = signal.getsignal(signal.SIGINT)
    config: Any = SimpleNamespace()
    with stoppable_build(STAND_IN, config):
        assert signal.getsignal(signal.SIGINT) is not mine
        assert config.progress_monitor.step_complete("timing", 0)
    assert signal.getsignal(signal.SIGINT) is mine
    assert signal.set_wakeup_fd(-1) == -1
    assert handled == []


def test_a_build_on_another_thread_leaves_signals_alone() -> None:
    config: Any = SimpleNamespace()

    def build() -> None:
        with stoppable_build(STAND_IN, config):
            pass

    thread = threading.Thread(target=build)
    thread.start()
    thread.join()
    assert not hasattr(config, "progress_monitor")


@needs_rtx
def test_tensorrt_itself_ends_its_build_and_leaves_nothing(
    handled: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    export_onnx(net, torch.zeros(1, 3, 32, 32), tmp_path / "model.onnx", dynamic_batch=False)
    made = trt_stop._stopper
    phases = []

    def interrupting(trt: Any, told: Any) -> Any:
        stopper = made(trt, told)

        class Interrupting(type(stopper)):
            def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
                phases.append(phase_name)
                if len(phases) == 1:
                    os.kill(os.getpid(), signal.SIGINT)

        return Interrupting()

    monkeypatch.setattr(trt_stop, "_stopper", interrupting)
    spec = parse_target("trt-rtx:sm86,sm89,sm120")
    path = engine_path(tmp_path, spec, "fp32")
    with pytest.raises(Stopped):
        make_target(spec).build(tmp_path / "model.onnx", path)
    assert phases
    assert handled == [signal.SIGINT]
    assert not path.exists()
