"""Networks of other families go through every stage: cut, proved, exported, compared, built and measured."""

import pytest

NETWORKS = [
    "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf", "resnext50_32x4d", "googlenet",
    "squeezenet1_1", "convnext_tiny",
    *(pytest.param(slow, marks=pytest.mark.matrix) for slow in ("vgg16_bn", "densenet121")),
]  # fmt: skip
SIZE = 64  # small images keep this at half a minute a network; the structure is that of 224


@pytest.mark.parametrize("name", NETWORKS)
def test_every_stage_passes_on(name, half_the_macs, whole, targets):
    assert half_the_macs(name, targets=targets, data__size=SIZE) == 0
    report = whole()
    assert report.accuracy.n == 0
    assert report.accuracy.onnx is None
    verdicts = {engine.target: engine.verdict for engine in report.engines}
    assert [*verdicts] == targets
    assert verdicts["ort-cpu"] in ("faster", "not faster", "unstable")
