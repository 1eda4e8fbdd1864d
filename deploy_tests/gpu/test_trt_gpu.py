"""TensorRT on a real GPU: engines open, agree with onnxruntime, and time their laps."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from chip_deploy.export.agree import compare_outputs, require_agreement
from chip_deploy.export.bundle import sha256_file
from chip_deploy.export.errors import BuildFailed
from chip_deploy.export.layers import LayerMap
from chip_deploy.export.node_times import profile_of
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.onnx_graph import read_graph
from chip_deploy.export.shapes import DYNAMIC_BATCH
from chip_deploy.export.target import CAPABILITIES, Engine, Target, engine_path, parse_target, sidecar_path
from chip_deploy.export.target_trt import Gpu, find_gpu
from chip_deploy.export.targets import make_target
from chip_deploy.export.trt_session import TrtSession

GPU = find_gpu()
pytestmark = pytest.mark.skipif(isinstance(GPU, str), reason=f"needs an NVIDIA GPU: {GPU}")
# The standard target, and the ahead-of-time one for the GPU at hand where TensorRT-RTX knows it.
TARGETS = ["trt"]
if isinstance(GPU, Gpu) and GPU.sm in CAPABILITIES["trt-rtx"]:
    TARGETS.append(f"trt-rtx:{GPU.sm}")


@pytest.fixture(scope="module", params=[False, True], ids=["static", "free batch"])
def onnx_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 40, 3), nn.ReLU()]
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10))
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(net, torch.zeros(1, 3, 64, 64), path, dynamic_batch=request.param)
    return path


@pytest.fixture(scope="module", params=TARGETS)
def built(request: pytest.FixtureRequest, onnx_path: Path) -> tuple[Target, Path, Engine]:
    spec = parse_target(request.param)
    target = make_target(spec)
    if reason := target.unusable():
        pytest.skip(f"{spec}: {reason}")
    path = engine_path(onnx_path.parent, spec, "fp32")
    return target, path, target.build(onnx_path, path)


@pytest.fixture
def session(built: tuple[Target, Path, Engine]) -> Iterator[TrtSession]:
    target, path, engine = built
    assert target.cannot_run(engine) is None
    session = target.open(path)
    assert isinstance(session, TrtSession)
    yield session
    session.close()


def image(seed: int = 0, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 3, 64, 64), dtype=np.float32)


def reference(onnx_path: Path, images: np.ndarray) -> np.ndarray:
    control = make_target(parse_target("ort-cpu")).open_onnx(onnx_path)
    return np.concatenate([control.run({"input": images[k : k + 1]})["output"] for k in range(len(images))])


def test_an_engine_agrees_with_onnxruntime(
    onnx_path: Path, built: tuple[Target, Path, Engine], session: TrtSession
) -> None:
    images = image(batch=4)
    outputs = np.concatenate([session.run({"input": images[k : k + 1]})["output"] for k in range(4)])
    agreement = compare_outputs(reference(onnx_path, images), outputs)
    require_agreement(agreement, what=str(built[0].spec), precision=built[2].arithmetic)


def test_the_dense_control_agrees_as_well(onnx_path: Path, built: tuple[Target, Path, Engine]) -> None:
    control = built[0].open_onnx(onnx_path)
    agreement = compare_outputs(reference(onnx_path, image()), control.run({"input": image()})["output"])
    require_agreement(agreement, what="the control", precision=built[2].arithmetic)
    control.close()


def test_a_free_batch_runs_up_to_its_largest_and_no_further(onnx_path: Path, session: TrtSession) -> None:
    if session.input_shapes["input"][0] != -1:
        pytest.skip("this engine has a fixed batch")
    largest = DYNAMIC_BATCH[-1]
    images = image(batch=largest)
    agreement = compare_outputs(reference(onnx_path, images), session.run({"input": images})["output"])
    require_agreement(agreement, what="the largest batch", precision="tf32")
    with pytest.raises(ValueError, match="expected"):
        session.run({"input": image(batch=largest + 1)})


def test_laps_run_on_the_inputs_that_were_bound(session: TrtSession) -> None:
    array = image()
    expected = session.run({"input": array})["output"]
    session.bind({"input": array})
    array[:] = 0
    for _ in range(10):
        session.lap()
    assert np.array_equal(session.outputs()["output"], expected)


def test_a_lap_takes_time_that_a_clock_can_see(session: TrtSession) -> None:
    session.bind({"input": image()})
    session.lap()
    started = time.perf_counter()
    session.lap()
    assert 1e-6 < time.perf_counter() - started < 1.0


def test_a_profile_finds_every_layer_of_the_network_and_some_time_in_it(onnx_path: Path, session: TrtSession) -> None:
    profiled = session.profiled()
    profiled.bind({"input": image()})
    for _ in range(20):
        profiled.lap()
    layer_map = LayerMap(read_graph(onnx_path))
    profile = profile_of(profiled.node_laps(10), layer_map, runtime=profiled.runtime, batch=1)
    profiled.close()
    timed = {layer for node in profile.nodes for layer in node.layers if node.ms > 0}
    assert {layer for layer, work in layer_map.work.items() if work.macs} <= timed
    assert 1e-3 < profile.total_ms < 1e3


def test_a_truncated_plan_is_refused_with_the_runtimes_words(
    built: tuple[Target, Path, Engine], tmp_path: Path
) -> None:
    target, path, engine = built
    broken = tmp_path / "broken.engine"
    broken.write_bytes(path.read_bytes()[:1000])
    # As if it had been built so: what was cut later is found by its digest.
    cut = engine.model_copy(update={"sha256": sha256_file(broken), "bytes": 1000})
    sidecar_path(broken).write_text(cut.model_dump_json())
    with pytest.raises(BuildFailed, match=r"broken\.engine: tensorrt.* cannot read the engine"):
        target.open(broken)


def test_events_time_the_execution_and_the_transfers_around_it(session: TrtSession) -> None:
    session.bind({session.input_names[0]: image()})
    laps_ms = [session.timed_lap_ms() for _ in range(50)]
    trips = [session.round_trip() for _ in range(50)]
    assert min(laps_ms) > 0
    for trip in trips:
        # Events tick in half microseconds.
        assert trip.compute_ms <= trip.with_transfers_ms + 0.001 <= trip.host_ms + 0.05
    # The same execution, with warm and with freshly written inputs.
    assert 0.2 < np.median([trip.compute_ms for trip in trips]) / np.median(laps_ms) < 5
