"""Several builds of one file: the fastest that agrees is kept, with all of them in its sidecar."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from chip_deploy.export import candidates
from chip_deploy.export.candidates import build_arithmetic, build_best, example_feeds, fastest, median_laps_ms
from chip_deploy.export.errors import BuildFailed, ParityFailed
from chip_deploy.export.target import (
    Build,
    BuildOptions,
    Engine,
    RoundTrip,
    Session,
    Target,
    TargetSpec,
    engine_path,
    read_engine,
    sidecar_path,
)


class PacedSession:
    """A session whose laps take what the engine file says, by a clock of its own; its output is the file's second
    word."""

    opened = 0

    def __init__(self, plan: str) -> None:
        self.input_names, self.output_names = ["input"], ["output"]
        self.input_shapes = {"input": (1, 3)}
        lap_ms, self.word = plan.split()
        self.lap_ms = float(lap_ms)
        self.closed = False
        PacedSession.opened += 1

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"output": np.array([[float(self.word)]])}

    def bind(self, feeds: Mapping[str, Any]) -> None:
        assert feeds["input"].shape == (1, 3)

    def lap(self) -> None:
        assert not self.closed

    def timed_lap_ms(self) -> float:
        return self.lap_ms

    def round_trip(self) -> RoundTrip:
        raise AssertionError("nobody asks for transfers")

    def profiled(self) -> Any:
        raise AssertionError("nobody asks for layers")

    def close(self) -> None:
        self.closed = True
        PacedSession.opened -= 1


class FickleTarget(Target):
    """A runtime whose builds differ: each takes the next plan of the list."""

    builds_differ = True
    takes = ("builds",)

    def __init__(self, plans: list[str], *, builds: int = 1) -> None:
        super().__init__(TargetSpec(name="trt"), options=BuildOptions(builds=builds, runtime_cache=False))
        self.plans = iter(plans)
        self.weights: list[Path | None] = []

    def unusable(self) -> str | None:
        return None

    def _build(self, onnx_path: Path, engine_path: Path) -> Build:
        plan = next(self.plans)
        if plan == "fails":
            raise BuildFailed("no plan: out of memory.")
        engine_path.write_text(plan)
        return Build({"gpu": "L4"}, {"tf32": False}, {"tensorrt": "11.4"})

    def _cannot_run(self, engine: Engine) -> str | None:
        return None

    def _open(self, engine_path: Path, *, weights: Path | None = None) -> Session:
        self.weights.append(weights)
        return PacedSession(engine_path.read_text())

    def _open_onnx(self, onnx_path: Path) -> Session:
        raise AssertionError("nobody opens the file")


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(candidates, "WARMUP_SECONDS", 0.0)
    monkeypatch.setattr(candidates, "SECONDS_A_TURN", 0.0)
    PacedSession.opened = 0
    yield
    assert PacedSession.opened == 0, "every session is closed"


@pytest.fixture
def onnx_path(tmp_path: Path) -> Path:
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3]) for name in ("input", "output")]
    node = onnx.helper.make_node("Relu", ["input"], ["output"])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:])), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def right(session: Session, engine: Engine) -> None:
    """The check of a network whose output is 1."""
    if session.run({})["output"].item() != 1.0:
        raise ParityFailed(f"{engine.file}: outputs differ.")


def build(target: Target, onnx_path: Path, check: Callable[[Session, Engine], Any] = right) -> tuple[Path, Engine]:
    path = engine_path(onnx_path.parent, target.spec, "fp32")
    return path, build_best(target, onnx_path, path, check=check)


def test_the_fastest_of_three_is_kept_under_the_name_that_was_asked_for(onnx_path: Path) -> None:
    target = FickleTarget(["3.0 1", "2.0 1", "2.5 1"], builds=3)
    path, engine = build(target, onnx_path)
    assert path.read_text() == "2.0 1"
    assert engine == read_engine(path)
    assert engine.file == "engines/trt.fp32.engine"
    assert {file.name for file in path.parent.iterdir()} == {"trt.fp32.engine", "trt.fp32.json"}
    assert sorted(file.name for file in onnx_path.parent.iterdir()) == ["engines", "m.onnx"]


def test_the_sidecar_tells_of_every_build_and_of_their_spread(onnx_path: Path) -> None:
    _, engine = build(FickleTarget(["3.0 1", "2.0 1", "2.5 1"], builds=3), onnx_path)
    told = engine.flags["builds"]
    assert (told["kept"], told["spread"]) == (1, 0.5)
    assert [each["p50_ms"] for each in told["candidates"]] == [3.0, 2.0, 2.5]
    assert all(each["bytes"] == 5 and each["build_seconds"] >= 0 for each in told["candidates"])
    assert engine.flags["options"] == {"builds": 3}, "what was chosen and has an effect"


def test_a_faster_one_whose_outputs_are_wrong_is_not_kept_and_not_forgotten(onnx_path: Path) -> None:
    path, engine = build(FickleTarget(["2.0 1", "1.0 7"], builds=2), onnx_path)
    assert path.read_text() == "2.0 1"
    refused = engine.flags["builds"]["candidates"][1]
    assert "outputs differ" in refused["refused"]
    assert "p50_ms" not in refused


def test_where_none_agrees_nothing_is_left(onnx_path: Path) -> None:
    with pytest.raises(ParityFailed, match=r"m\.onnx: none of 2 builds agrees; the first: .*outputs differ"):
        build(FickleTarget(["2.0 5", "1.0 7"], builds=2), onnx_path)
    assert [file.name for file in onnx_path.parent.iterdir()] == ["m.onnx"]


def test_a_build_that_fails_leaves_the_earlier_engine(onnx_path: Path) -> None:
    path, before = build(FickleTarget(["2.0 1"]), onnx_path)
    with pytest.raises(BuildFailed, match="out of memory"):
        build(FickleTarget(["1.0 1", "fails"], builds=2), onnx_path)
    assert read_engine(path) == before
    assert sorted(file.name for file in onnx_path.parent.iterdir()) == ["engines", "m.onnx"]


def test_a_candidate_without_weights_is_told_where_they_are(onnx_path: Path) -> None:
    target = FickleTarget(["1.0 1", "2.0 1"], builds=2)
    build(target, onnx_path)
    assert set(target.weights) == {onnx_path}


def test_a_single_build_is_not_opened(onnx_path: Path) -> None:
    def never(session: Session, engine: Engine) -> None:
        raise AssertionError("opened")

    _, engine = build(FickleTarget(["1.0 1"]), onnx_path, never)
    assert "builds" not in engine.flags


def test_where_builds_are_the_same_several_are_refused(onnx_path: Path) -> None:
    target = FickleTarget(["1.0 1"], builds=2)
    target.builds_differ = False
    with pytest.raises(ValueError, match="two builds of one file are the same, so there is nothing to choose from"):
        build(target, onnx_path)


def test_medians_come_from_two_rounds_in_opposite_order() -> None:
    order: list[str] = []
    paces = {"a": itertools.chain([4.0] * candidates.FEWEST_LAPS, itertools.repeat(2.0)), "b": itertools.repeat(2.5)}

    def opener(name: str) -> Callable[[], Session]:
        def opened() -> Session:
            order.append(name)
            session = PacedSession("1.0 1")
            session.timed_lap_ms = lambda: next(paces[name])  # pyright: ignore[reportAttributeAccessIssue]
            return session

        return opened

    assert median_laps_ms([opener("a"), opener("b")]) == [3.0, 2.5]
    assert order == ["a", "b", "b", "a"]


def test_the_fastest_is_told_by_its_place() -> None:
    assert fastest(paced("2.0 1", "1.0 1", "3.0 1"), arithmetic="fp32") == 1


@pytest.mark.parametrize("wrong", ["7", "nan"])
def test_a_faster_build_whose_outputs_are_not_those_of_most_is_dropped(wrong: str) -> None:
    assert fastest(paced(f"1.0 {wrong}", "3.0 1", "2.0 1"), arithmetic="fp32") == 2


def test_builds_may_differ_by_what_their_arithmetic_explains() -> None:
    rounded = paced("1.0 1.01", "2.0 1", "3.0 1")  # 40 dB: within TF32, beyond FP32
    assert fastest(rounded, arithmetic="tf32") == 0
    assert fastest(rounded, arithmetic="fp32") == 1


def test_where_two_builds_disagree_nothing_tells_which_is_right() -> None:
    with pytest.raises(ParityFailed, match=r"2 builds of one file disagree by more than fp32 explains"):
        fastest(paced("1.0 1", "2.0 7"), arithmetic="fp32")


def test_builds_of_a_file_are_held_to_the_coarsest_type_it_multiplies_in(tmp_path: Path) -> None:
    halves, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    values = [onnx.helper.make_tensor_value_info(name, single, [1, 2, 4, 4]) for name in ("input", "output")]
    weights = [onnx.numpy_helper.from_array(np.ones((2, 2, 1, 1), kind), kind) for kind in ("float16", "float32")]
    nodes = [
        onnx.helper.make_node("Cast", ["input"], ["low"], to=halves),
        onnx.helper.make_node("Conv", ["low", "float16"], ["first"]),
        onnx.helper.make_node("Cast", ["first"], ["high"], to=single),
        onnx.helper.make_node("Conv", ["high", "float32"], ["output"]),
    ]
    alone = [onnx.helper.make_node("Conv", ["input", "float32"], ["output"])]
    for read, taken in (("fp16", nodes), ("fp32", alone)):
        graph = onnx.helper.make_graph(taken, "g", values[:1], values[1:], weights)
        onnx.save(onnx.helper.make_model(graph), tmp_path / f"{read}.onnx")
    assert build_arithmetic(tmp_path / "fp16.onnx", tf32=True) == "fp16"
    assert build_arithmetic(tmp_path / "fp32.onnx", tf32=True) == "tf32"
    assert build_arithmetic(tmp_path / "fp32.onnx", tf32=False) == "fp32"


def paced(*plans: str) -> list[Callable[[], Session]]:
    return [functools.partial(PacedSession, plan) for plan in plans]


def test_example_inputs_are_of_the_shape_that_an_engine_expects_and_the_same_every_time() -> None:
    session = PacedSession("1.0 1")
    session.input_shapes = {"input": (-1, 3)}
    assert example_feeds(session)["input"].shape == (1, 3)
    session.expected_shapes = {"input": (8, 3)}  # pyright: ignore[reportAttributeAccessIssue]
    feeds = example_feeds(session)["input"]
    assert (feeds.shape, feeds.dtype) == ((8, 3), np.float32)
    assert np.array_equal(feeds, example_feeds(session)["input"])
    session.close()


def test_a_sidecar_that_cannot_be_written_leaves_no_engine(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("chip_deploy.export.target.write_json_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        build(FickleTarget(["1.0 1"]), onnx_path)
    path = engine_path(onnx_path.parent, TargetSpec(name="trt"), "fp32")
    assert not path.exists()
    assert not sidecar_path(path).exists()
