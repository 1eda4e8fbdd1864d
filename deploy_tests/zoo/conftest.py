"""How every test of the zoo takes a network through the pipeline: by the command line, with very few images."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from chip_deploy.export.bundle import verify_bundle
from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.models import input_size
from chip_deploy.pipeline.report import Report, read_report

RTX = importlib.util.find_spec("tensorrt_rtx") is not None
LARGEST_SIDE = 64  # pixels: the structure is that of 224
RTX_TARGET = "trt-rtx:sm86,sm89"
QUICK = {
    "tune.epochs": 0, "dense.epochs": 0, "score.images": 4, "tune.recalibrate_images": 8, "data.eval_images": 8,
    "measure.seconds": 0.05, "measure.laps": 20, "measure.openings": 1, "measure.warmup_ms": 1,
}  # fmt: skip

HalfTheMacs = Callable[..., int]  # -> the exit code
Whole = Callable[[], Report]


@pytest.fixture
def targets() -> list[str]:
    """Both kinds of engines where TensorRT-RTX is installed."""
    return ["ort-cpu", *([RTX_TARGET] if RTX else [])]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Where the run puts what it makes."""
    return tmp_path / "bundle"


@pytest.fixture
def half_the_macs(bundle: Path) -> HalfTheMacs:
    """Prunes a network to half its MACs, through every stage, from random weights; the exit code comes back."""

    def run(
        network: str, *, targets: Sequence[str], data: str = "random:64", criterion: str = "chip", **settings: object
    ) -> int:
        named = {key.replace("__", "."): value for key, value in settings.items()}
        words = ["prune", "--model", network, "--data", data, "--criterion", criterion, "--macs", "0.5"]
        words += [word for target in targets for word in ("--target", target)]
        words += [word for key, value in (QUICK | named).items() for word in ("--set", f"{key}={value}")]
        return main([*words, "--out", str(bundle)])

    return run


@pytest.fixture
def half_by(half_the_macs: HalfTheMacs, targets: list[str]) -> HalfTheMacs:
    """Prunes a network of the papers by a criterion, widths unrounded; one engine, not timed if it can be.

    The digits have labels, which some criteria need; nothing is trained on them.
    """

    def run(network: str, criterion: str) -> int:
        side = min(input_size(network), LARGEST_SIDE)
        return half_the_macs(
            network, criterion=criterion, data="digits", targets=targets[-1:], data__size=side, prune__round_to=1
        )

    return run


@pytest.fixture
def whole(bundle: Path, targets: list[str]) -> Whole:
    """The report of a run that kept its promises: the budget holds, ONNX agrees, every engine and file is in place."""

    def read() -> Report:
        report = read_report(bundle)
        assert report.cost.pruned.macs <= 0.5 * report.cost.dense.macs
        assert report.agreement.largest_relative_difference < 1e-4
        assert [engine.target for engine in report.engines][-1] == targets[-1]
        for engine in (engine for engine in report.engines if engine.target == RTX_TARGET):
            assert engine.bytes > 10_000
            assert json.loads((bundle / engine.file).with_suffix(".json").read_text())["sha256"] == engine.sha256
        verify_bundle(bundle)
        return report

    return read
