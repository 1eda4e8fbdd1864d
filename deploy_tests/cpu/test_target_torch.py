"""PyTorch as a target: the program computes what the network computes, call by call, and leaves torch as it was."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from chip_deploy.export import target_torch
from chip_deploy.export.errors import BuildFailed, ExportFailed, MachineMismatch, MeasureFailed
from chip_deploy.export.layers import LayerMap
from chip_deploy.export.node_times import profile_of
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.onnx_graph import read_graph
from chip_deploy.export.program_file import plain_copy
from chip_deploy.export.target import DeviceTimer, Engine, engine_path, parse_target, width_step
from chip_deploy.export.target_torch import (
    CudaProfiledTorchSession,
    CudaTorchSession,
    TorchSession,
    TorchTarget,
    program_path,
    write_program,
)

SPEC = parse_target("torch:eager")
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU; this is about the CPU")


class Residual(nn.Module):
    """A convolution with its norm, and what it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm(self.conv(maps)) + maps)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    stem, head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)
    return nn.Sequential(stem, Residual(), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


@pytest.fixture(scope="module")
def onnx_path(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as an ONNX file and as a program, the batch free."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(net, torch.zeros(2, 3, 16, 16), path, dynamic_batch=True)
    write_program(net, torch.zeros(2, 3, 16, 16), program_path(path), dynamic_batch=True)
    return path


@pytest.fixture(scope="module")
def built(onnx_path: Path) -> tuple[Path, Engine]:
    path = engine_path(onnx_path.parent, SPEC, "fp32")
    return path, TorchTarget(SPEC).build(onnx_path, path)


@pytest.fixture
def session(built: tuple[Path, Engine]) -> Iterator[TorchSession]:
    session = TorchTarget(SPEC).open(built[0])
    assert isinstance(session, TorchSession)
    yield session
    session.close()


def images(count: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 16, 16), dtype=np.float32)


def of_torch(net: nn.Module, batch: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(batch)).numpy()


@on_a_cpu
@pytest.mark.parametrize("count", [1, 3])
def test_an_eager_engine_gives_the_bits_of_the_network(net: nn.Module, session: TorchSession, count: int) -> None:
    given = session.run({"input": images(count)})["output"]
    assert np.array_equal(given, of_torch(net, images(count)))


@on_a_cpu
def test_a_compiled_engine_agrees_with_the_network(net: nn.Module, onnx_path: Path, tmp_path: Path) -> None:
    spec = parse_target("torch:compiled")
    target = TorchTarget(spec)
    if reason := target.unusable():
        pytest.skip(reason)
    path = engine_path(tmp_path, spec, "fp32")
    target.build(onnx_path, path)
    session = target.open(path)
    # Float32 sums in another order: a few units in the last place (6e-8) of the largest output.
    for count in (1, 2, 1):
        expected = of_torch(net, images(count))
        given = session.run({"input": images(count)})["output"]
        np.testing.assert_allclose(given, expected, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(MeasureFailed, match=r"runs it as compiled.* Measure --target torch:eager"):
        session.profiled()
    session.close()


def test_a_free_batch_is_free_and_a_fixed_one_is_not(net: nn.Module, session: TorchSession, tmp_path: Path) -> None:
    assert session.input_shapes == {"input": (-1, 3, 16, 16)}
    write_program(net, torch.zeros(2, 3, 16, 16), tmp_path / "fixed.pt2")
    fixed = TorchTarget(SPEC)._open(tmp_path / "fixed.pt2")
    assert fixed.input_shapes == {"input": (2, 3, 16, 16)}
    with pytest.raises(ValueError, match=r"shape \(1, 3, 16, 16\) given, \(2, 3, 16, 16\) expected"):
        fixed.run({"input": images(1)})
    fixed.close()


@pytest.mark.parametrize(("precision", "bits"), [("fp16", 11), ("bf16", 8)])
def test_a_network_in_16_bits_takes_and_gives_float32(
    net: nn.Module, onnx_path: Path, precision: str, bits: int
) -> None:
    half = onnx_path.with_name(f"model.{precision}.onnx")
    half.write_bytes(onnx_path.read_bytes())
    write_program(net, torch.zeros(1, 3, 16, 16), program_path(half), precision=precision)
    path = engine_path(onnx_path.parent, SPEC, precision)
    target = TorchTarget(SPEC)
    engine = target.build(half, path, precision=precision)
    whole = program_path(onnx_path).stat().st_size
    assert engine.bytes < whole
    session = target.open(path)
    given, expected = session.run({"input": images()})["output"], of_torch(net, images())
    session.close()
    assert given.dtype == np.float32
    assert engine.layer_types is not None
    assert engine.layer_types.multiplying == {precision: 4}
    assert engine.layer_types.layers["fp32"] == 1  # the cast of the output
    assert engine.layer_types.sentence == f"All 4 multiplying layers run in {precision}."
    # A mantissa of so many bits rounds by half a unit; a dozen layers in a row lose a few of those.
    difference = np.abs(given - expected).max() / np.abs(expected).max()
    assert 0 < difference < 8 * 2.0**-bits


def test_writing_a_program_leaves_the_network_as_it_was(net: nn.Module, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.train()
    write_program(net, torch.zeros(1, 3, 16, 16), tmp_path / "model.pt2", precision="fp16")
    assert all(module.training for module in net.modules())
    net.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert {tensor.dtype for tensor in net.parameters()} == {torch.float32}


def test_a_program_names_no_file_of_this_machine_and_no_class(onnx_path: Path) -> None:
    data = program_path(onnx_path).read_bytes()
    for trace in (str(Path(torch.__file__).parent), __file__, "Residual", "site-packages", "stack_trace"):
        assert trace.encode() not in data, trace


def test_a_network_that_torch_cannot_export_is_one_sentence(tmp_path: Path) -> None:
    class ByValue(nn.Module):
        def forward(self, maps: torch.Tensor) -> torch.Tensor:
            return maps if float(maps.sum()) > 0 else -maps

    with pytest.raises(ExportFailed, match=r"cannot be exported as a torch program: .*\. Replace the layer") as caught:
        write_program(ByValue(), torch.zeros(1, 3), tmp_path / "model.pt2")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_there_is_no_program_of_quantised_layers(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"precision 'int8' has no torch program\. Available: fp32, fp16, bf16"):
        write_program(net, torch.zeros(1, 3, 16, 16), tmp_path / "model.pt2", precision="int8")


def test_a_bundle_without_a_program_says_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    for act in (TorchTarget(SPEC).open_onnx, lambda path: TorchTarget(SPEC).build(path, tmp_path / "e" / "x.engine")):
        with pytest.raises(FileNotFoundError, match=r"model\.pt2: no such torch program; .* --target torch\."):
            act(tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_program_that_could_run_code_is_not_given_to_torch(
    onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object) -> None:
        raise ValueError("it calls 'torch.hub.load', which is no tensor operator")

    monkeypatch.setattr(target_torch, "plain_copy", refuse)
    monkeypatch.setattr(torch.export, "load", lambda _: pytest.fail("torch read it"))
    with pytest.raises(BuildFailed, match=r"model\.pt2: torch .* cannot open it: it calls 'torch\.hub\.load'"):
        TorchTarget(SPEC).build(onnx_path, engine_path(tmp_path, SPEC, "fp32"))


def test_torch_is_given_the_bytes_that_were_checked(
    onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(program_path(onnx_path).read_bytes())

    def check_and_change(file: Path) -> io.BytesIO:
        plain = plain_copy(file)
        path.write_bytes(b"another file")
        return plain

    monkeypatch.setattr(target_torch, "plain_copy", check_and_change)
    target_torch._read_program(path)
    assert path.read_bytes() == b"another file"


def test_the_sidecar_names_device_way_threads_and_version(built: tuple[Path, Engine]) -> None:
    _, engine = built
    assert engine.built_for["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (engine.flags["way"], engine.flags["threads"]) == ("eager", 1)
    assert engine.versions["torch"] == torch.__version__


def test_the_sidecar_tells_that_float32_layers_run_in_float32(built: tuple[Path, Engine]) -> None:
    assert built[1].layer_types is not None
    assert (built[1].layer_types.source, built[1].layer_types.multiplying) == ("engine", {"fp32": 4})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"built_for": {"device": "tpu"}}, r"it was checked on device 'tpu', and this machine has 'c"),
        ({"versions": {"torch": "1.0"}}, r"it was checked with torch 1\.0, and this one is \d"),
    ],
)
def test_an_engine_of_another_device_or_torch_is_refused(
    built: tuple[Path, Engine], changes: dict[str, dict[str, str]], reason: str, tmp_path: Path
) -> None:
    other = built[1].model_copy(update=changes)
    path = tmp_path / "x.engine"
    path.write_bytes(built[0].read_bytes())
    path.with_suffix(".json").write_text(other.model_dump_json())
    with pytest.raises(MachineMismatch, match=reason):
        TorchTarget(SPEC).open(path)


@on_a_cpu
def test_a_cuda_graph_needs_a_gpu_and_says_so() -> None:
    reason = TorchTarget(parse_target("torch:cuda-graph")).unusable()
    assert reason == (
        "torch sees no CUDA device, and a CUDA graph needs one. Use --target torch:eager or torch:compiled."
    )


@on_a_cpu
def test_compiling_needs_a_compiler_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    target_torch._no_compiler.cache_clear()
    try:
        reason = TorchTarget(parse_target("torch:compiled")).unusable()
        assert reason == (
            "torch.compile needs a C++ compiler, and there is no no-such-compiler. Install one, or use torch:eager."
        )
        assert TorchTarget(SPEC).unusable() is None
    finally:
        target_torch._no_compiler.cache_clear()


def test_the_laps_have_the_threads_of_the_target_and_torch_gets_its_own_back(built: tuple[Path, Engine]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        outer = TorchTarget(SPEC, threads=1).open(built[0])
        inner = TorchTarget(SPEC, threads=2).open(built[0])
        assert torch.get_num_threads() == 2
        inner.close()
        assert torch.get_num_threads() == 1
        outer.close()
        outer.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [0, -1])
def test_fewer_than_one_thread_is_a_mistake(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads: {threads} given, at least 1 expected"):
        TorchTarget(SPEC, threads=threads)


def test_bound_inputs_are_copies(session: TorchSession) -> None:
    batch = images()
    session.bind({"input": batch})
    expected = session.outputs()["output"]
    batch[:] = 0
    session.lap()
    assert np.array_equal(session.outputs()["output"], expected)


def test_outputs_survive_the_next_run(session: TorchSession) -> None:
    first = session.run({"input": images(1, seed=0)})["output"]
    kept = first.copy()
    second = session.run({"input": images(1, seed=1)})["output"]
    assert np.array_equal(first, kept)
    assert not np.array_equal(first, second)


def test_a_lap_computes_the_outputs_anew(session: TorchSession) -> None:
    session.bind({"input": images()})
    expected = session.outputs()["output"]
    assert session._output is not None
    with torch.inference_mode():
        session._output.zero_()
    assert not session.outputs()["output"].any()
    session.lap()
    assert np.array_equal(session.outputs()["output"], expected)


def test_a_lap_before_binding_is_refused(session: TorchSession) -> None:
    with pytest.raises(MeasureFailed, match=r"no inputs are bound\. Call bind first"):
        session.lap()
    with pytest.raises(MeasureFailed, match=r"no inputs are bound\. Call bind first"):
        session.outputs()


def test_a_closed_session_is_refused(session: TorchSession) -> None:
    session.close()
    with pytest.raises(MeasureFailed, match="the session is closed"):
        session.run({"input": images()})


def test_what_torch_cannot_run_is_one_sentence(session: TorchSession, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal\n  story told over several lines")

    session.bind({"input": images()})
    monkeypatch.setattr(session, "_runs", fail)
    with pytest.raises(MeasureFailed, match=r"engine: torch .* cannot run it: CUDA error: an illegal\.$"):
        session.lap()


@on_a_cpu
def test_a_session_on_a_cpu_claims_no_clock_of_a_device(session: TorchSession) -> None:
    assert not isinstance(session, DeviceTimer)


def test_a_profile_computes_the_same_and_times_every_call(session: TorchSession) -> None:
    expected = session.run({"input": images()})["output"]
    profiled = session.profiled()
    assert np.array_equal(profiled.run({"input": images()})["output"], expected)
    for _ in range(5):
        profiled.lap()
    nodes = profiled.node_laps(4)
    block = ["conv2d", "batch_norm", "add", "relu_"]
    assert [node.operator for node in nodes] == ["conv2d", *block, *block, "adaptive_avg_pool2d", "flatten", "linear"]
    assert all(len(node.laps_ms) == 4 and min(node.laps_ms) > 0 for node in nodes)
    with pytest.raises(MeasureFailed, match="5 laps were run, and the times of 6 asked for"):
        profiled.node_laps(6)
    with pytest.raises(MeasureFailed, match="is profiled already"):
        profiled.profiled()
    profiled.close()
    session.lap()


def test_calls_belong_to_the_layers_of_the_onnx_file(onnx_path: Path, session: TorchSession) -> None:
    profiled = session.profiled()
    profiled.bind({"input": images()})
    for _ in range(3):
        profiled.lap()
    profile = profile_of(profiled.node_laps(3), LayerMap(read_graph(onnx_path)), runtime=profiled.runtime, batch=1)
    profiled.close()
    found = [(node.operator, *node.layers) for node in profile.nodes]
    # The norms went into the convolutions of the ONNX file, and their time belongs there.
    assert found[:3] == [("conv2d", "0"), ("conv2d", "1.conv"), ("batch_norm", "1.conv")]
    assert {layer for layer, work in profile.work.items() if work.macs} == {"0", "1.conv", "2.conv", "5"}
    assert {layers[0] for _, *layers in found} <= set(profile.work)


def test_layers_in_16_bits_keep_the_names_of_the_network(net: nn.Module, tmp_path: Path) -> None:
    write_program(net, torch.zeros(1, 3, 16, 16), tmp_path / "model.pt2", precision="fp16")
    session = TorchTarget(SPEC)._session(tmp_path / "model.pt2")
    profiled = session.profiled()
    profiled.bind({"input": images()})
    profiled.lap()
    nodes = profiled.node_laps(1)
    modules = [node.modules[0] for node in nodes if node.operator in ("conv2d", "linear")]
    assert modules == ["0", "1.conv", "2.conv", "5"]
    profiled.close()
    session.close()


class Ticks:
    """The calls of `torch.cuda` that a session makes, on a machine without a GPU: events count what was recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.captured: list[tuple[int, ...]] = []
        self.replays = 0
        ticks = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing
                self.at = -1.0

            def record(self) -> None:
                ticks.now += 1.0
                self.at = ticks.now

            def elapsed_time(self, ended: "Event") -> float:
                assert 0 < self.at < ended.at
                return ended.at - self.at

        class Graph:
            """What was called while it was captured is called again on replay, into the same output."""

            def replay(self) -> None:
                ticks.replays += 1
                assert self.output is not None
                self.output.copy_(self.network(self.image))

        class Stream:
            def wait_stream(self, other: object) -> None:
                assert isinstance(other, Stream)

        for name, stand_in in (
            ("Event", Event),
            ("CUDAGraph", Graph),
            ("Stream", Stream),
            ("current_stream", Stream),
            ("stream", lambda _: contextlib.nullcontext()),
            ("graph", lambda graph: self._capturing(graph)),
            ("synchronize", lambda: None),
        ):
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())

    @contextlib.contextmanager
    def _capturing(self, graph: Any) -> Iterator[None]:
        call = torch.fx.GraphModule.__call__

        def captured(network: Any, image: torch.Tensor) -> torch.Tensor:
            self.captured.append(tuple(image.shape))
            graph.network, graph.image, graph.output = network, image, call(network, image)
            return graph.output

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.fx.GraphModule, "__call__", captured)
            yield


def opened_as(kind: type[TorchSession], onnx_path: Path, *, way: str) -> Any:
    network, modules = target_torch._read_program(program_path(onnx_path))
    return kind(network, name="x.engine", way=way, modules=modules)


@on_a_cpu
def test_a_cuda_graph_is_captured_once_a_shape_and_replays_what_was_bound_last(
    net: nn.Module, onnx_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = Ticks(monkeypatch)
    session = opened_as(TorchSession, onnx_path, way="cuda-graph")
    for count, seed in ((1, 0), (1, 1), (2, 0)):
        session.bind({"input": images(count, seed=seed)})
        session.lap()
        assert np.array_equal(session.outputs()["output"], of_torch(net, images(count, seed=seed)))
    assert ticks.captured == [(1, 3, 16, 16), (2, 3, 16, 16)]
    assert ticks.replays == 6
    session.close()


@on_a_cpu
def test_a_lap_lies_between_two_events_and_a_round_trip_among_four(
    net: nn.Module, onnx_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ticks(monkeypatch)
    session = opened_as(CudaTorchSession, onnx_path, way="eager")
    assert isinstance(session, DeviceTimer)
    with pytest.raises(MeasureFailed, match="no inputs are bound"):
        session.timed_lap_ms()
    with pytest.raises(MeasureFailed, match="no inputs are bound"):
        session.round_trip()
    session.bind({"input": images()})
    assert session.timed_lap_ms() == 1.0
    # Begun, arrived, executed, ended: the execution is the second of three spans.
    trip = session.round_trip()
    assert (trip.compute_ms, trip.with_transfers_ms) == (1.0, 3.0)
    assert trip.host_ms > 0
    assert np.array_equal(session.outputs()["output"], of_torch(net, images()))
    session.close()


@on_a_cpu
def test_a_profile_on_a_gpu_reads_two_events_a_call(onnx_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ticks(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    network, modules = target_torch._read_program(program_path(onnx_path))
    profiled = CudaProfiledTorchSession(network, name="x.engine", threads=1, modules=modules)
    profiled.bind({"input": images()})
    for _ in range(3):
        profiled.lap()
    assert {tuple(node.laps_ms) for node in profiled.node_laps(2)} == {(1.0, 1.0)}
    assert profiled.runtime == f"torch {torch.__version__}, eager, NVIDIA L4"
    profiled.close()


@on_a_cpu
def test_of_what_compiling_warns_of_only_that_matrix_products_are_not_in_tf32_is_kept_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A stand-in for an absent GPU: only there does torch say this.
    said = "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. Consider setting"

    def compiled(network: Any, **_options: object) -> Any:
        def run(image: torch.Tensor) -> torch.Tensor:
            warnings.warn(network, UserWarning, stacklevel=1)
            return image

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    target_torch._compiled(said, torch.zeros(1))  # pyright: ignore[reportArgumentType]
    with pytest.warns(UserWarning, match="something else"):
        target_torch._compiled("something else", torch.zeros(1))  # pyright: ignore[reportArgumentType]


def test_opening_and_running_are_silent(built: tuple[Path, Engine], capfd: pytest.CaptureFixture[str]) -> None:
    session = TorchTarget(SPEC).open(built[0])
    session.run({"input": images()})
    session.close()
    assert capfd.readouterr() == ("", "")


def test_torch_on_a_cpu_blocks_channels_as_onnxruntime_does() -> None:
    assert width_step(SPEC, "fp32") == width_step(parse_target("ort-cpu"), "fp32")
