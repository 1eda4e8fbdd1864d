"""onnxruntime's CUDA provider and PyTorch on a real GPU: they run there, agree, and replay what was bound last."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from chip_deploy.export.agree import compare_outputs, require_agreement
from chip_deploy.export.errors import MeasureFailed
from chip_deploy.export.layers import LayerMap
from chip_deploy.export.node_times import profile_of
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.onnx_graph import read_graph
from chip_deploy.export.ort_session import OrtCudaSession, ProfiledOrtCudaSession
from chip_deploy.export.target import BuildOptions, DeviceTimer, Engine, Session, Target, engine_path, parse_target
from chip_deploy.export.target_torch import program_path, write_program
from chip_deploy.export.target_trt import Gpu, find_gpu
from chip_deploy.export.targets import make_target

GPU = find_gpu()
pytestmark = pytest.mark.skipif(isinstance(GPU, str), reason=f"needs an NVIDIA GPU: {GPU}")
TARGETS = ["ort-cuda", "torch:eager", "torch:compiled", "torch:cuda-graph"]
TORCH = [target for target in TARGETS if target.startswith("torch")]
needs_cuda_torch = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="asks torch for the free memory, and this one sees no GPU"
)


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 40, 3), nn.ReLU()]
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10))
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(net, torch.zeros(2, 3, 64, 64), path, dynamic_batch=True)
    write_program(net, torch.zeros(2, 3, 64, 64), program_path(path), dynamic_batch=True)
    return path


@pytest.fixture(scope="module", params=TARGETS)
def built(request: pytest.FixtureRequest, onnx_path: Path) -> tuple[Target, Path, Engine]:
    target = usable(request.param)
    path = engine_path(onnx_path.parent, target.spec, "fp32")
    return target, path, target.build(onnx_path, path)


@pytest.fixture
def session(built: tuple[Target, Path, Engine]) -> Iterator[Session]:
    target, path, engine = built
    assert target.cannot_run(engine) is None
    with contextlib.closing(target.open(path)) as session:
        yield session


def usable(text: str, options: BuildOptions | None = None) -> Target:
    target = make_target(parse_target(text), options=options)
    if text in TORCH and not torch.cuda.is_available():
        pytest.skip(f"{text}: this torch sees no GPU, and runs on the CPU")
    if reason := target.unusable():
        pytest.skip(f"{text}: {reason}")
    return target


def images(count: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 64, 64), dtype=np.float32)


def reference(onnx_path: Path, batch: np.ndarray) -> np.ndarray:
    with contextlib.closing(make_target(parse_target("ort-cpu")).open_onnx(onnx_path)) as control:
        return control.run({"input": batch})["output"]


def test_an_engine_is_built_for_this_gpu(built: tuple[Target, Path, Engine]) -> None:
    assert isinstance(GPU, Gpu)
    assert (built[2].built_for["gpu"], built[2].built_for["capabilities"]) == (GPU.name, GPU.sm)
    assert built[0].on_gpu


@pytest.mark.parametrize("count", [1, 5])
def test_an_engine_agrees_with_onnxruntime_on_the_cpu(
    onnx_path: Path, built: tuple[Target, Path, Engine], session: Session, count: int
) -> None:
    agreement = compare_outputs(reference(onnx_path, images(count)), session.run({"input": images(count)})["output"])
    require_agreement(agreement, what=str(built[0].spec), precision=built[2].arithmetic)


def test_laps_replay_what_was_bound_last(onnx_path: Path, session: Session) -> None:
    for seed in (0, 1, 2):
        batch = images(seed=seed)
        session.bind({"input": batch})
        batch[:] = 0
        for _ in range(3):
            session.lap()
        agreement = compare_outputs(reference(onnx_path, images(seed=seed)), session.outputs()["output"])  # pyright: ignore[reportAttributeAccessIssue]
        require_agreement(agreement, what=f"images {seed}", precision="tf32")


def test_two_sessions_do_not_disturb_each_other(built: tuple[Target, Path, Engine], session: Session) -> None:
    with contextlib.closing(built[0].open(built[1])) as other:
        expected = [session.run({"input": images(seed=0)}), other.run({"input": images(seed=1)})]
        for _ in range(5):
            session.lap()
            other.lap()
        again = [session.run({"input": images(seed=0)}), other.run({"input": images(seed=1)})]
    for before, after in zip(expected, again, strict=True):
        np.testing.assert_allclose(after["output"], before["output"], rtol=1e-5, atol=1e-6)


@needs_cuda_torch
def test_ten_thousand_laps_take_no_more_memory_than_a_hundred(session: Session) -> None:
    session.bind({"input": images()})
    for _ in range(100):
        session.lap()
    torch.cuda.synchronize()
    free_before, _ = torch.cuda.mem_get_info()
    for _ in range(10_000):
        session.lap()
    torch.cuda.synchronize()
    free_after, _ = torch.cuda.mem_get_info()
    # Allocators take memory by the 2 MiB; 64 of them are no leak of 10,000 laps, which would be 13 kB each.
    assert free_before - free_after < 64 * 2**21


@needs_cuda_torch
def test_binding_again_and_again_takes_no_more_memory(session: Session) -> None:
    for seed in range(20):
        session.bind({"input": images(seed=seed)})
        session.lap()
    free_before, _ = torch.cuda.mem_get_info()
    for seed in range(500):
        session.bind({"input": images(seed=seed)})
        session.lap()
    free_after, _ = torch.cuda.mem_get_info()
    assert free_before - free_after < 64 * 2**21


def test_onnxruntime_runs_the_whole_network_on_the_gpu_as_one_graph(onnx_path: Path) -> None:
    target = usable("ort-cuda")
    engine = target.build(onnx_path, engine_path(onnx_path.parent, target.spec, "fp32"))
    assert engine.flags["nodes_on_cpu"] == []
    assert engine.flags["cuda_graph"] is True
    assert engine.arithmetic == "tf32"


def test_a_cuda_graph_changes_no_output(onnx_path: Path) -> None:
    outputs = []
    for cuda_graph in (True, False):
        target = usable("ort-cuda", BuildOptions(cuda_graph=cuda_graph))
        with contextlib.closing(target.open_onnx(onnx_path)) as session:
            assert isinstance(session, OrtCudaSession)
            assert session.uses_graph is cuda_graph
            session.bind({"input": images()})
            session.lap()
            outputs.append(session.outputs()["output"])
    # Each session chooses its convolutions by time, and TF32 keeps 10 bits of a factor: by that much of the largest.
    np.testing.assert_allclose(*outputs, rtol=0, atol=2**-10 * np.abs(outputs[0]).max())


def test_onnxruntime_times_kernels_or_says_that_it_cannot(onnx_path: Path) -> None:
    with (
        contextlib.closing(usable("ort-cuda").open_onnx(onnx_path)) as session,
        contextlib.closing(session.profiled()) as profiled,
    ):
        profiled.bind({"input": images()})
        for _ in range(5):
            profiled.lap()
        assert isinstance(profiled, ProfiledOrtCudaSession)
        if not any(event.get("cat") == "Kernel" for event in profiled.trace()):
            with pytest.raises(MeasureFailed, match="built without CUDA profiling"):
                profiled.node_laps(3)
            return
        assert sum(sum(node.laps_ms) for node in profiled.node_laps(3)) > 0


@pytest.mark.parametrize("text", TORCH)
def test_torch_times_its_laps_by_the_gpus_clock(text: str, onnx_path: Path) -> None:
    with contextlib.closing(usable(text).open_onnx(onnx_path)) as session:
        assert isinstance(session, DeviceTimer)
        session.bind({"input": images()})
        laps_ms = [session.timed_lap_ms() for _ in range(50)]
        trips = [session.round_trip() for _ in range(50)]
    assert min(laps_ms) > 0
    for trip in trips:
        # Events tick in half microseconds.
        assert trip.compute_ms <= trip.with_transfers_ms + 0.001 <= trip.host_ms + 0.05


def test_torch_takes_a_tensor_that_lies_on_the_gpu(onnx_path: Path) -> None:
    with contextlib.closing(usable("torch:eager").open_onnx(onnx_path)) as session:
        expected = session.run({"input": images()})["output"]
        given = session.run({"input": torch.from_numpy(images()).cuda()})["output"]
    np.testing.assert_array_equal(given, expected)


def test_a_profile_of_torch_finds_every_layer_and_some_time_in_it(onnx_path: Path) -> None:
    with (
        contextlib.closing(usable("torch:eager").open_onnx(onnx_path)) as session,
        contextlib.closing(session.profiled()) as profiled,
    ):
        profiled.bind({"input": images()})
        for _ in range(20):
            profiled.lap()
        layer_map = LayerMap(read_graph(onnx_path))
        profile = profile_of(profiled.node_laps(10), layer_map, runtime=profiled.runtime, batch=1)
    timed = {layer for node in profile.nodes for layer in node.layers if node.ms > 0}
    assert {layer for layer, work in layer_map.work.items() if work.macs} <= timed
    assert 1e-3 < profile.total_ms < 1e3


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("text", TORCH)
def test_torch_in_16_bits_agrees(text: str, precision: str, onnx_path: Path, tmp_path: Path) -> None:
    target = usable(text)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    half = tmp_path / f"model.{precision}.onnx"
    half.write_bytes(onnx_path.read_bytes())
    write_program(net, torch.zeros(1, 3, 64, 64), program_path(half), precision=precision)
    path = engine_path(tmp_path, target.spec, precision)
    target.build(half, path, precision=precision)
    with contextlib.closing(target.open(path)) as session, torch.no_grad():
        agreement = compare_outputs(net(torch.from_numpy(images())).numpy(), session.run({"input": images()})["output"])
    require_agreement(agreement, what=text, precision=precision)
