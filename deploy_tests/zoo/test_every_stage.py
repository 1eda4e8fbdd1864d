"""Networks of other families go through every stage: cut, proved, exported, compared, built and measured."""

import importlib.util
import json

import pytest

from chip_deploy.export.bundle import verify_bundle
from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.report import read_report

RTX = importlib.util.find_spec("tensorrt_rtx") is not None
NETWORKS = [
    "resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "densenet121", "efficientnet_b0", "regnet_y_400mf",
    "resnext50_32x4d", "googlenet", "squeezenet1_1", "convnext_tiny",
]  # fmt: skip
SIZE = 64  # small images keep this under half a minute a network; the structure is that of 224


@pytest.mark.parametrize("name", NETWORKS)
def test_every_stage_passes_on(name, tmp_path):
    out = tmp_path / "bundle"
    targets = ["--target", "ort-cpu", *(["--target", "trt-rtx:sm86,sm89"] if RTX else [])]
    settings = {
        "tune.epochs": 0, "data.size": SIZE, "score.images": 4, "tune.recalibrate_images": 8, "data.eval_images": 8,
        "measure.seconds": 0.05, "measure.laps": 20, "measure.openings": 1, "measure.warmup_ms": 1,
    }  # fmt: skip
    arguments = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert (
        main(
            ["prune", "--model", name, "--data", "random:64", "--macs", "0.5", *targets, *arguments, "--out", str(out)]
        )
        == 0
    )
    report = read_report(out)
    assert report.cost.pruned.macs <= 0.5 * report.cost.dense.macs
    assert report.accuracy.n == 0
    assert report.accuracy.onnx is None
    assert report.agreement.largest_relative_difference < 1e-4
    verdicts = {engine.target: engine.verdict for engine in report.engines}
    assert verdicts["ort-cpu"] in ("faster", "not faster", "unstable")
    if RTX:
        rtx = next(engine for engine in report.engines if engine.target == "trt-rtx:sm86,sm89")
        assert rtx.bytes > 10_000
        assert json.loads((out / rtx.file).with_suffix(".json").read_text())["sha256"] == rtx.sha256
    verify_bundle(out)
