"""Recovery within a run: it changes the weights and is told in the report, and what cannot be is refused at once."""

import pytest
import torch
from safetensors.torch import load_file

from chip_deploy.pipeline import prepared
from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.models import build_model
from chip_deploy.pipeline.report import read_report

QUICK = [
    "prune.round_to=1", "prune.min_width=2", "data.size=16", "data.eval_images=8", "tune.epochs=0",
    "tune.recalibrate_images=0", "tune.recover_images=16", "tune.recover_steps=2", "measure.seconds=0.05",
    "measure.laps=20", "measure.openings=1", "measure.warmup_ms=1",
]  # fmt: skip
NET = (
    "from torch import nn\n"
    "def build(num_classes=10):\n"
    "    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()]\n"
    "    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))\n"
)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A small network with drawn weights on labelled digits."""
    folder = tmp_path_factory.mktemp("net")
    (folder / "recovered_net.py").write_text(NET)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        model = build_model("recovered_net:build", num_classes=10, seed=3, size=16).module
        torch.save(model.state_dict(), folder / "weights.pt")
        settings = [word for setting in QUICK for word in ("--set", setting)]
        named = ["--model", "recovered_net:build", "--weights", str(folder / "weights.pt")]
        yield [*named, "--criterion", "l1", "--ratio", "0.5", *settings]


def test_recovery_changes_the_weights_and_is_told_in_the_report(arguments, tmp_path):
    run = ["prune", *arguments, "--data", "digits", "--out"]
    assert main([*run, str(tmp_path / "plain")]) == 0
    assert main([*run, str(tmp_path / "recovered"), "--set", "tune.recover=interactions"]) == 0
    plain, recovered = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "recovered"))
    assert plain.keys() == recovered.keys()
    assert not torch.equal(plain["0.weight"], recovered["0.weight"])
    assert torch.equal(plain["1.running_mean"], recovered["1.running_mean"]), "statistics are not recovered"
    reports = [read_report(tmp_path / name) for name in ("plain", "recovered")]
    assert [report.accuracy.recovered is None for report in reports] == [True, False]
    assert reports[1].accuracy.tuned == reports[1].accuracy.recovered, "nothing was trained after it"
    notes = [
        [note for note in report.notes if note.startswith("recovery took 2 steps on 16 images")] for report in reports
    ]
    assert [len(found) for found in notes] == [0, 1]
    assert "Recovered" in (tmp_path / "recovered" / "report.html").read_text()
    assert "Recovered" not in (tmp_path / "plain" / "report.html").read_text()


@pytest.mark.parametrize(
    ("data", "way", "sentence"),
    [
        ("random:16", "interactions", "tune.recover = 'interactions' needs labels, and the images of 'random:16'"),
        ("digits", "interaction", "unknown recovery 'interaction'. Did you mean 'interactions'?"),
    ],
)
def test_a_recovery_that_cannot_be_is_refused_before_any_work(
    arguments, data, way, sentence, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(prepared, "build_model", lambda *_, **__: pytest.fail("the network was built"))
    out = tmp_path / "out"
    assert main(["prune", *arguments, "--data", data, "--out", str(out), "--set", f"tune.recover={way}"]) == 2
    assert sentence in capsys.readouterr().err
    assert not out.exists()
