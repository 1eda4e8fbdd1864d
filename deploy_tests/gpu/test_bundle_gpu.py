"""A whole run on a GPU: pruned, built in three precisions, measured beside dense, profiled, rebuilt and judged."""

import contextlib
import io
import shutil
from pathlib import Path

import pytest

from chip_deploy.export.bundle import verify_bundle
from chip_deploy.export.target import CAPABILITIES, CUDA_GRAPH, parse_target
from chip_deploy.export.target_trt import Gpu, find_gpu
from chip_deploy.export.targets import make_target
from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.report import EngineRow, read_report

GPU = find_gpu()
pytestmark = pytest.mark.skipif(isinstance(GPU, str), reason=f"needs an NVIDIA GPU: {GPU}")
SM = GPU.sm if isinstance(GPU, Gpu) else ""
TARGETS = ["trt", f"trt-rtx:{SM}"] if SM in CAPABILITIES["trt-rtx"] else ["trt"]
PRECISIONS = ("fp32", "fp16", "int8")
# Of 360 digits, what an engine may judge otherwise than its ONNX file does: near ties.
ACCURACY_TOLERANCE = 0.02
# Ten digits by chance: 0.1, and a deviation of 0.016 for 360 of them. The short training reaches about 0.5.
BEYOND_CHANCE = 0.25
NET = """
from torch import nn

def build():
    convolutions = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    convolutions += [nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    convolutions += [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.fixture(scope="module", params=TARGETS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A bundle of a network that knows digits, with an engine in each precision."""
    if reason := make_target(parse_target(request.param)).unusable():
        pytest.skip(f"{request.param}: {reason}")
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "digits_on_a_gpu.py").write_text(NET)
    arguments = ["prune", "--model", "digits_on_a_gpu:build", "--data", "digits", "--macs", "0.5"]
    arguments += ["--target", request.param, "--precision", ",".join(PRECISIONS)]
    for setting in ("data.size=32", "tune.epochs=3", "measure.seconds=1.0"):
        arguments += ["--set", setting]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.syspath_prepend(folder)
        assert main([*arguments, "--out", str(folder / "bundle")]) == 0, said.getvalue()
    print(said.getvalue())
    return request.param, folder / "bundle"


@pytest.fixture
def bundle(finished: tuple[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(finished[1], tmp_path / "bundle")


def rows(bundle: Path) -> dict[str, EngineRow]:
    return {row.precision: row for row in read_report(bundle).engines}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_is_measured_beside_its_dense_twin(finished: tuple[str, Path], precision: str) -> None:
    row = rows(finished[1])[precision]
    assert row.verdict in ("faster", "not faster", "unstable"), row.reason
    assert row.latency_ms is not None
    assert row.latency_ms.n >= 200
    assert row.control is not None
    assert row.agreement is not None


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_knows_what_its_onnx_file_knows(finished: tuple[str, Path], precision: str) -> None:
    report = read_report(finished[1])
    files = {row.precision: row.accuracy for row in report.precisions} | {"fp32": report.accuracy.onnx}
    assert rows(finished[1])[precision].accuracy == pytest.approx(files[precision], abs=ACCURACY_TOLERANCE)
    assert files[precision] > BEYOND_CHANCE


@pytest.mark.parametrize("precision", PRECISIONS)
def test_times_are_told_apart_with_and_without_transfers_and_graph(finished: tuple[str, Path], precision: str) -> None:
    times = rows(finished[1])[precision].times
    assert times is not None
    assert times.launch == CUDA_GRAPH
    for side in (times.dense, times.pruned):
        assert side.kernel_by_kernel is not None
        assert side.device_compute.p50 <= side.with_transfers.p50 <= side.host_end_to_end.p50


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_layer_is_timed_dense_beside_pruned(finished: tuple[str, Path], precision: str) -> None:
    row = rows(finished[1])[precision]
    assert row.layers is not None, row.reason


def test_engines_are_rebuilt_on_the_device_and_measured_again(finished: tuple[str, Path], bundle: Path) -> None:
    target, _ = finished
    assert main(["build", str(bundle), "--target", target]) == 0
    assert {row.verdict for row in rows(bundle).values()} == {"not measured"}
    assert main(["measure", str(bundle)]) == 0
    assert all(row.latency_ms is not None for row in rows(bundle).values())
    verify_bundle(bundle)


def test_a_gate_judges_the_engines_of_this_machine(bundle: Path) -> None:
    assert main(["gate", str(bundle), "--require", "p50<=1000ms"]) in (0, 5)
    assert main(["gate", str(bundle), "--require", "p50<=0.000001ms"]) in (4, 5)


def test_doctor_knows_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert isinstance(GPU, Gpu)
    assert GPU.name.split()[-1] in capsys.readouterr().out
