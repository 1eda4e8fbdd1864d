"""onnxruntime's CUDA provider without a GPU: what it refuses and why, and its sessions with the CPU in its place."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from chip_deploy.export import ort_session, target_ort, target_trt
from chip_deploy.export.errors import BuildFailed, MachineMismatch, MeasureFailed, TargetUnavailable
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.ort_session import OrtCudaSession, ProfiledOrtCudaSession, nodes_of_provider, read_kernels
from chip_deploy.export.target import BuildOptions, DeviceTimer, Engine, engine_path, parse_target
from chip_deploy.export.target_ort import OrtCudaTarget
from chip_deploy.export.target_trt import Gpu, find_gpu

SPEC = parse_target("ort-cuda")
needs_no_gpu = pytest.mark.skipif(
    isinstance(find_gpu(), Gpu), reason="this machine has a GPU; this is about having none"
)
Opens = Callable[..., onnxruntime.InferenceSession]


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(net, torch.zeros(2, 3, 16, 16), path, dynamic_batch=True)
    return path


class StandIn:
    """The CPU provider in the place of the CUDA one: remembers what it was asked, and can refuse a CUDA graph."""

    def __init__(self, open_session: Opens) -> None:
        self._open = open_session
        self.settings: list[dict[str, str]] = []
        self.refuses_graphs = False

    def __call__(self, path: Path, options: Any, *, provider: tuple[str, dict[str, str]]) -> Any:
        name, settings = provider
        assert name == "CPUExecutionProvider"
        self.settings.append(settings)
        if self.refuses_graphs and settings["enable_cuda_graph"] == "1":
            raise BuildFailed("this session cannot use the graph capture feature")
        return self._open(path, options)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A machine that seems to have an L4; sessions run on the CPU, with buffers bound as on a GPU."""
    stand_in = StandIn(ort_session.open_session)
    monkeypatch.setattr(target_trt, "find_gpu", lambda: Gpu("NVIDIA L4", "sm89"))
    monkeypatch.setattr(target_ort, "CUDA", "CPUExecutionProvider")
    monkeypatch.setattr(target_ort, "CPU", "none")  # no node is on it, because all of them are on the stand-in
    monkeypatch.setattr(target_ort, "open_session", stand_in)
    monkeypatch.setattr(target_ort, "_cuda_mismatch", lambda: None)
    monkeypatch.setattr(OrtCudaSession, "_place", ("cpu", 0))
    return stand_in


@pytest.fixture
def graph_ids(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CUDA graph that each run asked for, in turn."""
    asked: list[str] = []

    class Options(onnxruntime.RunOptions):
        def add_run_config_entry(self, key: str, value: str) -> None:
            assert key == "gpu_graph_id"
            asked.append(value)
            super().add_run_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "RunOptions", Options)
    return asked


@pytest.fixture
def session(stand_in: StandIn, onnx_path: Path) -> Iterator[OrtCudaSession]:
    session = OrtCudaTarget(SPEC).open_onnx(onnx_path)
    assert isinstance(session, OrtCudaSession)
    yield session
    session.close()


def images(count: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 16, 16), dtype=np.float32)


def reference(onnx_path: Path, batch: np.ndarray) -> np.ndarray:
    plain = onnxruntime.InferenceSession(str(onnx_path), providers=["CPUExecutionProvider"])
    return np.asarray(plain.run(None, {"input": batch})[0])


@needs_no_gpu
def test_without_a_driver_the_reason_and_two_ways_out_are_named() -> None:
    assert OrtCudaTarget(SPEC).unusable() == (
        "no CUDA driver. Use --target ort-cpu here, or run `chip-deploy build DIR --target ort-cuda` on the device."
    )


def test_an_onnxruntime_without_the_cuda_provider_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert OrtCudaTarget(SPEC).unusable() == (
        "this onnxruntime has no CUDA provider. Install onnxruntime-gpu in place of onnxruntime."
    )


@pytest.mark.parametrize(
    ("driver", "built_for", "missing", "reason"),
    [
        ((12, 8), "13", None, r"needs CUDA 13, and the driver is for CUDA 12\.8 at most: update the driver\. Use"),
        (
            (13, 0),
            "13",
            "libcublasLt.so.13",
            r"finds no libcublasLt\.so\.13: install onnxruntime-gpu\[cuda,cudnn\], or CUDA 13",
        ),
        ((13, 0), "13", None, None),
        ((13, 2), "12", None, None),
        ((12, 8), "", None, None),
    ],
)
def test_a_driver_or_library_that_does_not_fit_is_told(
    monkeypatch: pytest.MonkeyPatch, driver: tuple[int, int], built_for: str, missing: str | None, reason: str | None
) -> None:
    monkeypatch.setattr(target_trt, "find_gpu", lambda: Gpu("NVIDIA L4", "sm89"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(target_ort, "driver_cuda", lambda: driver)
    monkeypatch.setattr(target_ort, "_cuda_built_for", lambda: built_for)
    monkeypatch.setattr(target_ort, "_missing_library", lambda _: missing)
    monkeypatch.setattr(target_ort, "sys", SimpleNamespace(platform="linux"))
    found = OrtCudaTarget(SPEC).unusable()
    assert (found is None) == (reason is None)
    assert reason is None or re.search(reason, str(found))


def test_a_library_that_is_nowhere_is_found_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(target_ort, "CUDA_LIBRARIES", ("libm.so.6", "libnowhere.so.{}"))
    target_ort._missing_library.cache_clear()
    assert target_ort._missing_library("13") == "libnowhere.so.13"
    target_ort._missing_library.cache_clear()
    assert capfd.readouterr() == ("", "")


@needs_no_gpu
def test_a_session_that_fell_back_to_the_cpu_is_refused(onnx_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """onnxruntime itself opens one without a word but in its log."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is the one without CUDA")
    with pytest.raises(TargetUnavailable, match=r"model\.onnx: onnxruntime .* fell back to the CPU: .*cuDNN 9\. Inst"):
        OrtCudaTarget(SPEC)._open_onnx(onnx_path)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_what_cuda_has_no_convolution_for_is_refused(precision: str) -> None:
    assert "Use --target trt." in (OrtCudaTarget(SPEC).refuses(precision) or "")


def test_the_engine_is_the_onnx_file_and_its_sidecar_names_the_gpu(
    stand_in: StandIn, onnx_path: Path, tmp_path: Path
) -> None:
    path = engine_path(tmp_path, SPEC, "fp32")
    engine = OrtCudaTarget(SPEC).build(onnx_path, path)
    assert path.read_bytes() == onnx_path.read_bytes()
    assert engine.built_for == {"gpu": "NVIDIA L4", "capabilities": "sm89"}
    assert engine.flags == {"tf32": True, "cuda_graph": True, "nodes_on_cpu": []}
    assert engine.arithmetic == "tf32"
    assert engine.versions["onnxruntime"] == onnxruntime.__version__
    assert stand_in.settings[0] == {"device_id": "0", "use_tf32": "1", "enable_cuda_graph": "1"}


def test_options_reach_the_provider(stand_in: StandIn, onnx_path: Path, tmp_path: Path) -> None:
    target = OrtCudaTarget(SPEC, options=BuildOptions(tf32=False, cuda_graph=False))
    engine = target.build(onnx_path, engine_path(tmp_path, SPEC, "fp32"))
    assert (engine.arithmetic, engine.flags["cuda_graph"]) == ("fp32", False)
    assert {settings["use_tf32"] + settings["enable_cuda_graph"] for settings in stand_in.settings} == {"00"}


def test_a_network_that_cannot_be_captured_runs_without_a_graph_and_the_sidecar_says_so(
    stand_in: StandIn, onnx_path: Path, tmp_path: Path
) -> None:
    stand_in.refuses_graphs = True
    engine = OrtCudaTarget(SPEC).build(onnx_path, engine_path(tmp_path, SPEC, "fp32"))
    assert engine.flags["cuda_graph"] is False


def test_a_lap_that_fails_only_with_a_graph_says_how_to_go_without(
    stand_in: StandIn, onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(session: OrtCudaSession) -> None:
        raise MeasureFailed(f"{session._name}: onnxruntime cannot run it: CUDA error 900")

    monkeypatch.setattr(OrtCudaSession, "lap", fail)
    with pytest.raises(BuildFailed, match=r"CUDA error 900\. Build without a CUDA graph: --set build\.cuda_graph=fal"):
        OrtCudaTarget(SPEC).build(onnx_path, engine_path(tmp_path, SPEC, "fp32"))
    assert list(tmp_path.iterdir()) == []


def test_a_convolution_on_the_cpu_is_no_engine(
    stand_in: StandIn, onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_ort, "CPU", "CPUExecutionProvider")
    with pytest.raises(BuildFailed, match=r"computes .*linear on the CPU, because its CUDA provider cannot\. Use --ta"):
        OrtCudaTarget(SPEC).build(onnx_path, engine_path(tmp_path, SPEC, "fp32"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"built_for": {"gpu": "Orin", "capabilities": "sm87"}}, "checked on gpu 'Orin', and this machine has 'NVIDIA"),
        ({"versions": {"onnxruntime": "1.0"}}, r"checked by onnxruntime 1\.0, and this one is 1\.\d+"),
    ],
)
def test_an_engine_of_another_gpu_or_onnxruntime_is_refused(
    stand_in: StandIn, onnx_path: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    path = engine_path(tmp_path, SPEC, "fp32")
    engine = OrtCudaTarget(SPEC).build(onnx_path, path)
    path.with_suffix(".json").write_text(engine.model_copy(update=changes).model_dump_json())
    with pytest.raises(MachineMismatch, match=reason):
        OrtCudaTarget(SPEC).open(path)


@needs_no_gpu
def test_an_engine_without_a_gpu_cannot_run_and_the_phrase_has_no_advice() -> None:
    engine = Engine(
        target="ort-cuda", precision="fp32", file="engines/x.engine", sha256="0" * 64, bytes=1, built_for={}, flags={},
        versions={}, build_seconds=1.0,
    )  # fmt: skip
    assert OrtCudaTarget(SPEC).cannot_run(engine) == "no CUDA driver"


@pytest.mark.parametrize("count", [1, 3])
def test_a_session_computes_what_onnxruntime_computes(session: OrtCudaSession, onnx_path: Path, count: int) -> None:
    given = session.run({"input": images(count)})["output"]
    assert np.array_equal(given, reference(onnx_path, images(count)))


def test_inputs_of_the_same_shape_are_written_where_the_graph_reads_them(
    session: OrtCudaSession, onnx_path: Path
) -> None:
    session.bind({"input": images(seed=0)})
    held, address = session._inputs["input"], session._inputs["input"].data_ptr()
    session.bind({"input": images(seed=1)})
    assert (session._inputs["input"], session._inputs["input"].data_ptr()) == (held, address)
    session.lap()
    assert np.array_equal(session.outputs()["output"], reference(onnx_path, images(seed=1)))


def test_laps_replay_the_graph_of_their_shape_and_nothing_else_does(
    stand_in: StandIn, onnx_path: Path, graph_ids: list[str]
) -> None:
    with contextlib.closing(OrtCudaTarget(SPEC).open_onnx(onnx_path)) as session:
        for seed in (0, 1):
            session.bind({"input": images(1, seed=seed)})
            session.lap()
        session.bind({"input": images(2)})
        session.lap()
    assert graph_ids == ["-1", "1", "-1", "1", "-1", "2"]


def test_without_a_graph_no_lap_asks_for_one(stand_in: StandIn, onnx_path: Path, graph_ids: list[str]) -> None:
    target = OrtCudaTarget(SPEC, options=BuildOptions(cuda_graph=False))
    with contextlib.closing(target.open_onnx(onnx_path)) as session:
        session.bind({"input": images()})
        session.lap()
    assert graph_ids == ["-1", "-1"]


def test_a_closed_session_is_refused(session: OrtCudaSession) -> None:
    session.close()
    with pytest.raises(MeasureFailed, match="the session is closed"):
        session.run({"input": images()})
    with pytest.raises(MeasureFailed, match="no inputs are bound"):
        session.lap()


def test_laps_are_timed_on_the_host(session: OrtCudaSession) -> None:
    assert not isinstance(session, DeviceTimer)


def test_a_build_without_cuda_profiling_times_no_layer_and_says_why(session: OrtCudaSession) -> None:
    profiled = session.profiled()
    assert isinstance(profiled, ProfiledOrtCudaSession)
    assert profiled.runtime.endswith(", NVIDIA L4")
    profiled.run({"input": images()})
    with pytest.raises(
        MeasureFailed, match=r"built without CUDA profiling, .* to start, not to run\. Profile --target"
    ):
        profiled.node_laps(1)
    profiled.close()
    profiled.close()


def test_a_profile_may_be_read_again_once_it_has_ended(session: OrtCudaSession) -> None:
    with contextlib.closing(session.profiled()) as profiled:
        assert isinstance(profiled, ProfiledOrtCudaSession)
        profiled.run({"input": images()})
        events = profiled.trace()
        assert events
        assert profiled.trace() == events
        with pytest.raises(MeasureFailed, match="built without CUDA profiling"):
            profiled.node_laps(1)


def test_a_profile_leaves_no_file_behind(
    stand_in: StandIn, onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_session.tempfile, "tempdir", str(tmp_path))
    OrtCudaTarget(SPEC).build(onnx_path, engine_path(onnx_path.parent, SPEC, "fp32"))
    assert list(tmp_path.iterdir()) == []


# What an onnxruntime with CUDA profiling writes: each node, right behind it the kernels that it started.
TRACE = [
    {"cat": "Session", "name": "model_run", "ts": 100, "dur": 50, "args": {}},
    {"cat": "Node", "name": "conv_kernel_time", "ts": 110, "dur": 5, "args": {"op_name": "Conv", "provider": "CUDA"}},
    {"cat": "Kernel", "name": "winograd", "ts": 130, "dur": 300, "args": {"stream": "7"}},
    {"cat": "Kernel", "name": "add_bias", "ts": 431, "dur": 20, "args": {"stream": "7"}},
    {"cat": "Node", "name": "shape_kernel_time", "ts": 120, "dur": 1, "args": {"op_name": "Shape", "provider": "CPU"}},
    {"cat": "Session", "name": "model_run", "ts": 200, "dur": 60, "args": {}},
    {"cat": "Node", "name": "conv_kernel_time", "ts": 210, "dur": 5, "args": {"op_name": "Conv", "provider": "CUDA"}},
    {"cat": "Kernel", "name": "winograd", "ts": 500, "dur": 310, "args": {"stream": "7"}},
    {"cat": "Node", "name": "shape_kernel_time", "ts": 220, "dur": 1, "args": {"op_name": "Shape", "provider": "CPU"}},
]


def test_kernels_count_for_the_node_and_the_lap_that_started_them() -> None:
    nodes = read_kernels(TRACE, laps=2)
    assert [(node.name, node.operator, node.laps_ms) for node in nodes] == [
        ("conv", "Conv", [0.32, 0.31]),
        ("shape", "Shape", [0.0, 0.0]),
    ]


def test_only_the_latest_laps_count() -> None:
    assert [node.laps_ms for node in read_kernels(TRACE, laps=1)] == [[0.31], [0.0]]


def test_fewer_laps_than_asked_for_are_told() -> None:
    with pytest.raises(ValueError, match="2 laps instead of 3"):
        read_kernels(TRACE, laps=3)


def test_the_nodes_of_a_provider_are_named_with_their_operators() -> None:
    assert nodes_of_provider(TRACE, "CPU") == {"shape": "Shape"}
    assert nodes_of_provider(TRACE, "CUDA") == {"conv": "Conv"}
    assert nodes_of_provider(TRACE, "TPU") == {}


def test_onnxruntime_notes_the_provider_of_every_node(stand_in: StandIn, onnx_path: Path) -> None:
    with contextlib.closing(OrtCudaTarget(SPEC)._profiled(onnx_path)) as session:
        session.run(session.random_feeds())
        on_cpu = nodes_of_provider(session.trace(), "CPUExecutionProvider")
    assert any("Conv" in operator for operator in on_cpu.values())
    assert len(on_cpu) <= len(onnx.load(onnx_path).graph.node) + 2  # and two reorderings for the blocked layout
