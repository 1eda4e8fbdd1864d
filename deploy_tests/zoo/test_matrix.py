"""Every network of the pruning papers by every criterion: `make test-matrix`, an hour of one core, one test a pair.

`make test-matrix ONLY=densenet40` takes a part, and with PYTEST_ADDOPTS=--lf the pairs that failed last time.
"""

import pytest

from chip_deploy.chip.criteria import CRITERIA
from chip_deploy.pipeline.cifar_nets import OWN_NETS

pytestmark = pytest.mark.matrix

NETWORKS = (*OWN_NETS, "alexnet", "resnet50")
WITHOUT_NORMS = ("alexnet", "alexnet_cifar")
PAIRS = [(network, criterion) for network in NETWORKS for criterion in CRITERIA]
REFUSED = [(network, "bn-scale") for network in WITHOUT_NORMS if "bn-scale" in CRITERIA]


@pytest.mark.parametrize(("network", "criterion"), [pair for pair in PAIRS if pair not in REFUSED])
def test_half_the_macs_go(network, criterion, half_by, whole):
    assert half_by(network, criterion) == 0
    assert whole().criterion == criterion


@pytest.mark.parametrize(("network", "criterion"), REFUSED)
def test_what_a_criterion_cannot_judge_is_refused_in_a_sentence(network, criterion, half_by, bundle, capsys):
    assert half_by(network, criterion) == 2
    said = capsys.readouterr().err
    assert criterion in said
    assert "batch norm" in said
    assert not bundle.exists()
