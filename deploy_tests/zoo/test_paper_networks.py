"""Every network of the pruning papers, and every criterion, once through scoring, cut, proof, ONNX and engine."""

from itertools import cycle

import pytest

from chip_deploy.chip.criteria import CRITERIA
from chip_deploy.pipeline.cifar_nets import OWN_NETS

NETWORKS = (*OWN_NETS, "alexnet")  # and resnet50, which test_every_stage.py takes
# Batch norms are what one of these criteria judges by, and the other runs the network hundreds of times.
PLACES = {"vgg16_bn_cifar": "bn-scale", "resnet20": "interactions"}


def _pairs() -> list[tuple[str, str]]:
    """Every network with a criterion: its own place's, else the next of the table."""
    rest = cycle(name for name in CRITERIA if name not in PLACES.values())
    placed = {network: criterion for network, criterion in PLACES.items() if criterion in CRITERIA}
    return [(network, placed.get(network) or next(rest)) for network in NETWORKS]


def test_every_network_and_every_criterion_has_its_turn():
    networks, criteria = zip(*_pairs(), strict=True)
    assert networks == NETWORKS
    assert {*criteria} == {*CRITERIA}


@pytest.mark.parametrize(("network", "criterion"), _pairs())
def test_half_the_macs_go(network, criterion, half_by, whole):
    assert half_by(network, criterion) == 0
    report = whole()
    assert report.criterion == criterion
    assert report.accuracy.n == 8, "the exported network was judged on the images asked for"
