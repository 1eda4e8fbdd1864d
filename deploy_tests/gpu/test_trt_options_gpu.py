"""What only a GPU can show of TensorRT: every option and precision of a build, graphs, caches, refusals, endurance."""

import contextlib
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chip_deploy.export import target_trt
from chip_deploy.export.agree import compare_outputs, require_agreement
from chip_deploy.export.candidates import build_best
from chip_deploy.export.errors import ExportError, IntegrityError, MachineMismatch
from chip_deploy.export.golden import run_in_batches
from chip_deploy.export.onnx_export import export_onnx
from chip_deploy.export.precision import Converter, Reference
from chip_deploy.export.target import (
    CAPABILITIES,
    CUDA_GRAPH,
    BuildOptions,
    Engine,
    Session,
    Target,
    engine_path,
    parse_target,
    sidecar_path,
)
from chip_deploy.export.target_trt import Gpu, TensorRTTarget, find_gpu, load_cudart
from chip_deploy.export.targets import make_target
from chip_deploy.export.trt_build import HOST_CODE, build_plan
from chip_deploy.export.trt_caches import FOLDER_VARIABLE
from chip_deploy.export.trt_session import TrtSession

GPU = find_gpu()
pytestmark = pytest.mark.skipif(isinstance(GPU, str), reason=f"needs an NVIDIA GPU: {GPU}")
SM = GPU.sm if isinstance(GPU, Gpu) else ""
TARGETS = ["trt", f"trt-rtx:{SM}"] if SM in CAPABILITIES["trt-rtx"] else ["trt"]
RUNS, WARM_RUNS = 10_000, 200
# What the driver hands out at a time, and a Python process may take for itself.
GPU_GROWTH_MIB, HOST_GROWTH_MIB = 8, 32
# TensorRT multiplies FP32 networks in TF32 unless told otherwise, and an FP16 one with 11 bits.
ARITHMETIC = {"fp32": "tf32", "fp16": "fp16", "bf16": "bf16", "int8": "int8 file"}


class Residual(nn.Module):
    """A convolution, a residual block and a head: what quantisation and fusion treat differently."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.first = nn.Conv2d(32, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        maps = torch.relu(self.stem(image))
        maps = torch.relu(maps + self.second(torch.relu(self.first(maps))))
        return self.head(maps.mean((2, 3)))


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for caches, so that no test leaves anything behind or finds anything there."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "caches"))
    return tmp_path / "caches"


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network in every precision, with a fixed and with a free batch."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks")
    net = Residual().eval()
    export_onnx(net, torch.zeros(1, 3, 32, 32), folder / "fp32.onnx")
    export_onnx(net, torch.zeros(2, 3, 32, 32), folder / "free.onnx", dynamic_batch=True)
    for precision in ("fp16", "bf16", "int8"):
        Converter(folder / "fp32.onnx", images(16), precision=precision).write(folder / f"{precision}.onnx")
    return folder


def images(count: int = 4, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32), dtype=np.float32)


def usable(text: str, **options: Any) -> Target:
    target = make_target(parse_target(text), options=BuildOptions(**options))
    if reason := target.unusable():
        pytest.skip(f"{text}: {reason}")
    return target


def built(target: Target, onnx: Path, bundle: Path, *, precision: str = "fp32") -> tuple[Path, Engine]:
    path = engine_path(bundle, target.spec, precision)
    return path, target.build(onnx, path, precision=precision)


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What opens sessions and closes them when the test ends."""
    sessions: list[TrtSession] = []

    def opening(target: Target, path: Path) -> TrtSession:
        session = target.open(path)
        assert isinstance(session, TrtSession)
        sessions.append(session)
        return session

    yield opening
    for session in sessions:
        session.close()


def expected(onnx: Path, fed: np.ndarray) -> np.ndarray:
    return Reference(onnx).outputs(fed)


def require_same(onnx: Path, session: Session, *, arithmetic: str = "tf32", count: int = 4) -> None:
    agreement = compare_outputs(expected(onnx, images(count)), run_in_batches(session, images(count)))
    require_agreement(agreement, what=str(onnx), precision=arithmetic)


# Precisions and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TARGETS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_each_precision_agrees_with_its_own_file_and_the_engine_tells_its_types(
    text: str, precision: str, networks: Path, tmp_path: Path, opened: Any
) -> None:
    target = usable(text)
    onnx = networks / f"{precision}.onnx"
    path, engine = built(target, onnx, tmp_path, precision=precision)
    require_same(onnx, opened(target, path), arithmetic=ARITHMETIC[precision])
    assert engine.layer_types is not None
    print(f"{text} {precision}: {engine.bytes} bytes, {engine.build_seconds} s. {engine.layer_types.sentence}")
    assert engine.layer_types.source == "engine"
    # Where all products are fused into one layer, no type of theirs is told.
    assert engine.layer_types.multiplying.keys() & {precision, "unknown"}, engine.layer_types.sentence


@pytest.mark.parametrize("text", TARGETS)
def test_without_tf32_an_engine_agrees_as_fp32_does(text: str, networks: Path, tmp_path: Path, opened: Any) -> None:
    target = usable(text, tf32=False)
    path, engine = built(target, networks / "fp32.onnx", tmp_path)
    assert engine.arithmetic == "fp32"
    require_same(networks / "fp32.onnx", opened(target, path), arithmetic="fp32")


@pytest.mark.parametrize("text", TARGETS)
def test_each_profile_runs_its_batches_and_others_are_refused(
    text: str, networks: Path, tmp_path: Path, opened: Any
) -> None:
    shapes = ("input:1x3x32x32", "input:4x3x32x32/8x3x32x32/16x3x32x32")
    target = usable(text, shapes=shapes)
    path, _ = built(target, networks / "free.onnx", tmp_path)
    session = opened(target, path)
    for batch in (1, 8, 4, 1, 16):
        outputs = session.run({"input": images(batch)})["output"]
        agreement = compare_outputs(expected(networks / "free.onnx", images(batch)), outputs)
        require_agreement(agreement, what=f"batch {batch}", precision="tf32")
    with pytest.raises(ValueError, match=r"between \(1, 3, 32, 32\) and .* or between \(4, 3, 32, 32\) and"):
        session.run({"input": images(2)})
    require_same(networks / "free.onnx", session, count=21)


@pytest.mark.parametrize("level", ["ampere-plus", "same-compute-capability"])
def test_a_compatible_engine_is_for_more_gpus_and_runs_on_this_one(
    level: Any, networks: Path, tmp_path: Path, opened: Any
) -> None:
    target = usable("trt", hardware_compatibility=level)
    try:
        path, engine = built(target, networks / "fp32.onnx", tmp_path)
    except ExportError as err:
        pytest.skip(f"this TensorRT does not build for {level}: {err}")
    assert "gpu" not in engine.built_for
    require_same(networks / "fp32.onnx", opened(target, path))


def test_a_version_compatible_engine_warns_and_is_opened_with_host_code(
    networks: Path, tmp_path: Path, opened: Any
) -> None:
    target = usable("trt", version_compatible=True)
    path, engine = built(target, networks / "fp32.onnx", tmp_path)
    assert HOST_CODE in engine.flags["warnings"]
    session = opened(target, path)
    assert session._runtime.engine_host_code_allowed
    require_same(networks / "fp32.onnx", session)


@pytest.mark.parametrize("text", TARGETS)
def test_an_engine_without_weights_is_small_and_takes_them_from_its_file(
    text: str, networks: Path, tmp_path: Path, opened: Any
) -> None:
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes((networks / "fp32.onnx").read_bytes())
    whole, stripped = usable(text), usable(text, strip=True, refit=True)
    _, with_weights = built(whole, onnx, tmp_path)
    path, without = built(stripped, onnx, tmp_path)
    assert without.bytes < with_weights.bytes
    require_same(onnx, opened(stripped, path))


def test_several_builds_without_weights_take_them_from_the_file_they_are_built_from(
    networks: Path, tmp_path: Path
) -> None:
    target, onnx = usable("trt", strip=True, refit=True, builds=2), networks / "fp32.onnx"
    path = engine_path(tmp_path, target.spec, "fp32")
    engine = build_best(target, onnx, path, check=lambda session, _: require_same(onnx, session))
    assert engine.flags["options"] == {"strip": True, "refit": True, "builds": 2}
    with contextlib.closing(target.open(path, weights=onnx)) as session:
        require_same(onnx, session)


def test_the_best_of_three_builds_is_kept_with_the_spread_of_all(networks: Path, tmp_path: Path, opened: Any) -> None:
    target = usable("trt", builds=3)
    path = engine_path(tmp_path, target.spec, "fp32")
    engine = build_best(
        target, networks / "fp32.onnx", path, check=lambda session, _: require_same(networks / "fp32.onnx", session)
    )
    told = engine.flags["builds"]
    print(f"three builds of one file: {told}")
    times_ms = [each["p50_ms"] for each in told["candidates"]]
    assert times_ms[told["kept"]] == min(times_ms)
    require_same(networks / "fp32.onnx", opened(target, path))


# Launches, arrays on the device, several sessions --------------------------------------------------------------------


@pytest.mark.parametrize("text", TARGETS)
def test_a_graph_gives_the_outputs_of_kernels_launched_one_by_one(
    text: str, networks: Path, tmp_path: Path, opened: Any
) -> None:
    target = usable(text)
    path, _ = built(target, networks / "fp32.onnx", tmp_path)
    with_graph = opened(target, path)
    without = opened(usable(text, cuda_graph=False), path)
    for seed in range(5):
        fed = {"input": images(1, seed=seed)}
        assert np.array_equal(with_graph.run(fed)["output"], without.run(fed)["output"])
    assert with_graph.launch == CUDA_GRAPH
    assert without.launch.startswith("kernel by kernel")
    graph_ms = np.median([with_graph.timed_lap_ms() for _ in range(200)])
    plain_ms = np.median([with_graph.plain_lap_ms() for _ in range(200)])
    print(f"{text}: {graph_ms:.4f} ms as a graph, {plain_ms:.4f} ms kernel by kernel")
    assert 0 < graph_ms < 3 * plain_ms


@pytest.mark.parametrize("text", TARGETS)
def test_a_tensor_on_the_gpu_is_read_where_it_lies(text: str, networks: Path, tmp_path: Path, opened: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    target = usable(text)
    path, _ = built(target, networks / "fp32.onnx", tmp_path)
    session = opened(target, path)
    on_host = session.run({"input": images(1)})["output"]
    tensor = torch.from_numpy(images(1)).cuda()
    session.bind({"input": tensor})
    assert session._addresses["input"] == tensor.data_ptr()
    session.lap()
    assert np.array_equal(session.outputs()["output"], on_host)
    tensor.mul_(2)
    torch.cuda.synchronize()
    session.lap()
    assert np.array_equal(session.outputs()["output"], opened(target, path).run({"input": 2 * images(1)})["output"])
    with pytest.raises(ValueError, match="Make it contiguous first"):
        session.bind({"input": tensor.transpose(2, 3)})


@pytest.mark.parametrize("text", TARGETS)
def test_two_sessions_run_at_once_and_do_not_disturb_each_other(
    text: str, networks: Path, tmp_path: Path, opened: Any
) -> None:
    target = usable(text)
    path, _ = built(target, networks / "fp32.onnx", tmp_path)
    sessions = [opened(target, path) for _ in range(2)]
    right = [session.run({"input": images(1, seed=seed)})["output"] for seed, session in enumerate(sessions)]
    wrong: list[str] = []

    def work(place: int) -> None:
        for _ in range(300):
            if not np.array_equal(sessions[place].run({"input": images(1, seed=place)})["output"], right[place]):
                wrong.append(f"session {place}")

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Caches -------------------------------------------------------------------------------------------------------------


def test_kernel_timings_are_used_by_the_next_build_and_written_anew_when_damaged(
    networks: Path, tmp_path: Path, caches: Path
) -> None:
    target = usable("trt")
    words, seconds = [], []
    for damage in (False, False, True):
        if damage:
            (kept,) = (caches / "timing").glob("*.timing")
            kept.write_bytes(b"damaged")
        _, engine = built(target, networks / "fp16.onnx", tmp_path, precision="fp16")
        words.append(engine.flags["timing_cache"])
        seconds.append(engine.build_seconds)
    print(f"build seconds without, with and again without kernel timings: {seconds}")
    assert words == ["new", "used", "new"]


def test_compiled_kernels_are_used_by_the_next_session(
    networks: Path, tmp_path: Path, caches: Path, opened: Any
) -> None:
    if len(TARGETS) < 2:
        pytest.skip(f"TensorRT-RTX is not for {SM}")
    target = usable(TARGETS[1])
    path, _ = built(target, networks / "fp32.onnx", tmp_path)
    outputs = []
    for known in (False, True):
        session = target.open(path)
        assert isinstance(session, TrtSession)
        assert (session._cached is not None) is known
        outputs.append(session.run({"input": images(1)})["output"])
        session.close()
        assert list((caches / "runtime").glob("*.runtime"))
    assert np.array_equal(*outputs)


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TARGETS)
def test_an_engine_of_another_machine_is_refused_with_what_to_do(text: str, networks: Path, tmp_path: Path) -> None:
    target = usable(text)
    path, engine = built(target, networks / "fp32.onnx", tmp_path)
    foreign = engine.model_copy(update={"built_for": {"gpu": "Tesla K80", "capabilities": "sm37"}})
    sidecar_path(path).write_text(foreign.model_dump_json())
    sentence = (
        r"built for SM 3\.7 \(Tesla K80\) with TensorRT\S* \S+; this machine has SM .*: rebuild with `chip-deploy"
    )
    with pytest.raises(MachineMismatch, match=sentence):
        target.open(path)


@pytest.mark.parametrize("text", TARGETS)
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_a_changed_plan_never_reaches_the_runtime(
    text: str, place: float, networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = usable(text)
    path, _ = built(target, networks / "fp32.onnx", tmp_path)
    data = bytearray(path.read_bytes())
    data[int(place * len(data)) if place >= 0 else -1] ^= 0xFF
    path.write_bytes(bytes(data))

    def never(*_args: object, **_options: object) -> None:
        raise AssertionError("the changed plan was given to the runtime")

    monkeypatch.setattr(target_trt, "TrtSession", never)
    with pytest.raises(IntegrityError, match="its sidecar says"):
        target.open(path)


# Endurance ----------------------------------------------------------------------------------------------------------


def free_gpu_mib() -> float:
    error, free, _ = load_cudart().cudaMemGetInfo()
    assert int(error) == 0
    return free / 2**20


def host_mib() -> float:
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("this system does not tell the memory of a process")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@pytest.mark.parametrize("text", TARGETS)
def test_ten_thousand_runs_take_no_more_memory(text: str, networks: Path, tmp_path: Path, opened: Any) -> None:
    target = usable(text)
    path, _ = built(target, networks / "fp32.onnx", tmp_path)
    session = opened(target, path)
    fed = {"input": images(1)}
    first = session.run(fed)["output"]
    for _ in range(WARM_RUNS):
        session.run(fed)
    gc.collect()
    before = free_gpu_mib(), host_mib()
    for _ in range(RUNS):
        outputs = session.run(fed)["output"]
    gc.collect()
    grown = before[0] - free_gpu_mib(), host_mib() - before[1]
    print(f"{text}: {RUNS} runs took {grown[0]:.1f} MiB of the GPU and {grown[1]:.1f} MiB of the host")
    assert grown[0] <= GPU_GROWTH_MIB
    assert grown[1] <= HOST_GROWTH_MIB
    assert np.array_equal(outputs, first)


@pytest.mark.parametrize("text", TARGETS)
def test_sessions_give_back_what_they_took(text: str, networks: Path, tmp_path: Path) -> None:
    target = usable(text)
    path, _ = built(target, networks / "fp32.onnx", tmp_path)

    def open_and_close(times: int) -> None:
        for _ in range(times):
            session = target.open(path)
            session.run({"input": images(1)})
            session.close()

    open_and_close(5)
    gc.collect()
    before = free_gpu_mib()
    open_and_close(30)
    gc.collect()
    assert before - free_gpu_mib() <= GPU_GROWTH_MIB


# TensorRT-RTX where it is not documented ------------------------------------------------------------------------------


def test_tensorrt_rtx_runs_on_this_gpu_exactly_where_we_say_so(networks: Path, tmp_path: Path) -> None:
    target = usable("trt-rtx")
    assert isinstance(target, TensorRTTarget)
    assert isinstance(GPU, Gpu)
    trt = target._runtime()
    found = []
    for name, capabilities in (("portable", ()), ("current", ("current",))):
        try:
            plan = build_plan(trt, networks / "fp32.onnx", BuildOptions(), capabilities=capabilities)
            session = TrtSession(trt, load_cudart(), plan.data, name=name)
            require_same(networks / "fp32.onnx", session)
            session.close()
            found.append(f"{name}: runs")
        except ExportError as err:
            found.append(f"{name}: {err}")
    print(f"TensorRT-RTX {trt.__version__} on {GPU.name} ({GPU.sm}): {'; '.join(found)}")
    runs = any(line.endswith(": runs") for line in found)
    says = GPU.sm in CAPABILITIES["trt-rtx"] or target._fits(target._built_for(), GPU)
    assert runs == says, f"CAPABILITIES and PORTABLE say {says} for {GPU.sm}: {found}"
