"""Runs by every criterion and allocation: widths that follow from scores, and what is refused before any work."""

import json

import pytest
import torch

from chip_deploy.chip.criteria import CRITERIA, make_criterion
from chip_deploy.chip.scores import ChannelScores
from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.models import build_model
from chip_deploy.pipeline.report import read_report

QUICK = [
    "prune.round_to=1", "prune.min_width=2", "score.images=8", "data.eval_images=8", "tune.epochs=0",
    "tune.recalibrate_images=0", "measure.seconds=0.05", "measure.laps=20", "measure.openings=1", "measure.warmup_ms=1",
]  # fmt: skip
SETTINGS = [word for setting in QUICK for word in ("--set", setting)]
SMALL_NET = (
    "from torch import nn\n"
    "def build(num_classes=10):\n"
    "    body = []\n"
    "    for before, after in ((3, 8), (8, 12), (12, 6)):\n"
    "        body += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]\n"
    "    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))\n"
)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Arguments for a small network with drawn weights on labelled digits."""
    folder = tmp_path_factory.mktemp("net")
    (folder / "chosen_net.py").write_text(SMALL_NET)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        model = build_model("chosen_net:build", num_classes=10, seed=3, size=16).module
        torch.save(model.state_dict(), folder / "weights.pt")
        yield [
            "--model", "chosen_net:build", "--weights", str(folder / "weights.pt"), "--data", "digits", "--set",
            "data.size=16", *SETTINGS,
        ]  # fmt: skip


def _preview(capsys, *arguments):
    capsys.readouterr()
    assert main(["prune", *arguments, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return {row["layer"]: row["after"] for row in found["rows"]}, found["macs_after"] / found["macs_before"]


def _error(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_writes_scores_and_the_table_shows_them(labelled, criterion, tmp_path, capsys):
    out = tmp_path / "scores.safetensors"
    assert main(["score", *labelled, "--criterion", criterion, "--out", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    found = ChannelScores.from_file(str(out))
    assert f"3 groups scored by {criterion}" in shown
    assert {layer: len(vector) for layer, vector in found.scores.items()} == {"0": 8, "3": 12, "6": 6}
    needs = make_criterion(criterion).needs
    assert found.images == (8 if needs & {"maps", "gradients", "masked runs"} else 0)
    assert bool(found.strengths) == ("masked runs" in needs)


def test_scores_of_the_file_decide_the_widths(labelled, tmp_path, capsys):
    out = tmp_path / "scores.safetensors"
    assert main(["score", *labelled, "--criterion", "l1", "--out", str(out)]) == 0
    found = ChannelScores.from_file(str(out))
    favoured = {layer: vector + (10 if layer == "3" else 0) for layer, vector in found.scores.items()}
    out.write_bytes(ChannelScores(favoured, "l1", 0, found.weights_sha256, found.layers).to_bytes())
    common = [*labelled, "--criterion", "l1", "--ratio", "0.25", "--scores", str(out)]
    widths, _ = _preview(capsys, *common, "--set", "prune.allocation=global")
    assert widths["3"] == 12
    assert sum(widths.values()) == 26 - 7  # a quarter of 26 channels, up to the next whole one
    uniform, _ = _preview(capsys, *common)
    assert uniform == {"0": 6, "3": 9, "6": 5}


def test_a_dry_run_scores_where_the_widths_follow_from_scores_and_the_run_cuts_the_same(labelled, tmp_path, capsys):
    asked = [*labelled, "--criterion", "cpmc", "--macs", "0.5", "--set", "prune.allocation=global"]
    widths, fraction = _preview(capsys, *asked)
    assert fraction <= 0.5
    out = tmp_path / "bundle"
    assert main(["prune", *asked, "--out", str(out)]) == 0
    plan = json.loads((out / "plan.json").read_text())
    assert {cut["layer"]: cut["width_after"] for cut in plan["groups"]} == widths
    report = read_report(out)
    assert report.criterion == "cpmc"
    assert report.budget.startswith("keep at most 50% of the MACs, global allocation; ")
    assert report.budget.endswith("criterion cpmc (after the abstract)")
    assert any("'cpmc' is built after the abstract of its paper" in note for note in report.notes)


def test_interaction_goes_by_the_strengths_that_are_found_beside_the_scores(labelled, tmp_path, capsys):
    out, alone = tmp_path / "scores.safetensors", tmp_path / "interactions.safetensors"
    way = ["--set", "prune.allocation=interaction"]
    assert main(["score", *labelled, *way, "--criterion", "l1", "--out", str(out)]) == 0
    assert main(["score", *labelled, "--criterion", "interactions", "--out", str(alone)]) == 0
    found, played = (ChannelScores.from_file(str(file)) for file in (out, alone))
    assert found.criterion == "l1"
    assert found.images == played.images == 8
    assert found.strengths == played.strengths
    common = [*labelled, *way, "--macs", "0.5"]
    by_file, _ = _preview(capsys, *common, "--criterion", "l1", "--scores", str(out))
    by_itself, _ = _preview(capsys, *common, "--criterion", "interactions")
    assert by_file == by_itself  # the widths are the strengths', whoever ranks the channels
    weakest = min(found.strengths, key=found.strengths.__getitem__)
    strengths = {layer: 0.01 if layer == weakest else 1.0 for layer in found.strengths}
    out.write_bytes(ChannelScores(found.scores, "l1", 0, found.weights_sha256, found.layers, strengths).to_bytes())
    skewed, _ = _preview(capsys, *common[:-2], "--ratio", "0.1", "--criterion", "l1", "--scores", str(out))
    dense = {"0": 8, "3": 12, "6": 6}
    assert {layer for layer, width in skewed.items() if width < dense[layer]} == {weakest}


def test_the_joint_mode_goes_with_an_allocation_by_strengths(labelled, tmp_path):
    out = tmp_path / "scores.safetensors"
    joint = ["--set", "score.joint=true", "--set", "prune.allocation=interaction"]
    assert main(["score", *labelled, *joint, "--out", str(out)]) == 0
    found = ChannelScores.from_file(str(out))
    assert found.criterion == "chip joint"
    assert set(found.strengths) == set(found.scores)


def test_a_killed_run_whose_widths_follow_from_scores_goes_on(labelled, tmp_path, monkeypatch):
    from chip_deploy.pipeline import stages

    asked = [*labelled, "--criterion", "taylor", "--params", "0.5", "--set", "prune.allocation=isomorphic"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["prune", *asked, "--out", str(whole)]) == 0

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "_cut_stage", killed)
        assert main(["prune", *asked, "--out", str(broken)]) == 130
    monkeypatch.setattr(stages, "scored", lambda *_: pytest.fail("the scores were made a second time"))
    assert main(["prune", *asked, "--out", str(broken), "--resume"]) == 0
    assert (broken / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()


REFUSED = {
    "labels": (["--criterion", "taylor"], "criterion 'taylor' needs labels, and the images of 'random:8' have none."),
    "labels for strengths": (
        ["--criterion", "l1", "--set", "prune.allocation=interaction"],
        "criterion 'interactions', which prune.allocation = 'interaction' goes by, needs labels",
    ),
}


@pytest.mark.parametrize(("options", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_criterion_that_needs_labels_is_refused_on_images_without(options, sentence, tmp_path, capsys):
    common = ["--model", "resnet20", "--data", "random:8", *options]
    for command in (["prune", *common, "--macs", "0.5"], ["score", *common]):
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        assert sentence in _error(capsys)
        assert not list(tmp_path.iterdir())


def test_a_criterion_that_can_judge_no_group_says_so_before_any_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "bare_net.py").write_text(
        "from torch import nn\n"
        "def build(num_classes=10):\n"
        "    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(16, num_classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    common = ["--model", "bare_net:build", "--data", "random:8", "--set", "data.size=8", "--criterion", "bn-scale"]
    for command in (["prune", *common, "--macs", "0.5"], ["score", *common]):
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        error = _error(capsys)
        assert "'0': 'bn-scale' cannot judge it: it has no batch norm" in error
        assert "Take another criterion" in error
        assert not (tmp_path / "out").exists()


def test_a_budget_out_of_reach_is_refused_before_any_scoring(labelled, tmp_path, monkeypatch, capsys):
    from chip_deploy.pipeline import stages

    monkeypatch.setattr(stages, "scored", lambda *_: pytest.fail("channels were scored"))
    asked = [*labelled, "--macs", "0.001", "--set", "prune.allocation=global"]
    assert main(["prune", *asked, "--out", str(tmp_path / "out")]) == 2
    assert "cannot be reached" in _error(capsys)
    assert not (tmp_path / "out").exists()


def test_one_ranking_empties_no_group_unless_it_is_allowed_to(labelled, tmp_path, capsys):
    out = tmp_path / "scores.safetensors"
    assert main(["score", *labelled, "--criterion", "l1", "--out", str(out)]) == 0
    found = ChannelScores.from_file(str(out))
    hated = {layer: vector * (0 if layer == "3" else 1) for layer, vector in found.scores.items()}
    out.write_bytes(ChannelScores(hated, "l1", 0, found.weights_sha256, found.layers).to_bytes())
    common = [*labelled, "--criterion", "l1", "--ratio", "0.4", "--scores", str(out)]
    common += ["--set", "prune.allocation=global"]
    for more, left in ([], 2), (["--set", "prune.max_ratio=0.5"], 6):
        widths, _ = _preview(capsys, *common, *more)
        assert widths["3"] == left


def test_a_dry_run_trains_no_network_to_find_its_widths(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CHIP_DEPLOY_CACHE_DIR", str(tmp_path))
    asked = ["--model", "resnet20", "--data", "digits", "--macs", "0.5", "--set", "prune.allocation=global"]
    assert main(["prune", *asked, "--dry-run"]) == 2
    assert "a dry run trains none" in _error(capsys)
