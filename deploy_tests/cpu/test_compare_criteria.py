"""`chip-deploy compare-criteria`: every cell is what `prune` finds, and cells are files that serve again."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from chip_deploy.chip.shortcut import ChannelMap
from chip_deploy.export.errors import BuildFailed
from chip_deploy.pipeline import compare_criteria as comparing
from chip_deploy.pipeline import criteria_latency, engine_stages
from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.criteria_result import CriteriaComparison
from chip_deploy.pipeline.data import open_data
from chip_deploy.pipeline.models import build_model
from chip_deploy.pipeline.recipe import DenseSection
from chip_deploy.pipeline.report import read_report
from chip_deploy.pipeline.stages import load_pruned
from chip_deploy.pipeline.tune import train

# Scores on exactly 32 images, so that no stopping rule, and with it no width, decides how many there are.
QUICK = [
    "prune.round_to=1", "prune.min_width=2", "data.size=16", "score.images=32", "tune.recalibrate_images=64",
    "measure.seconds=0.05", "measure.laps=20", "measure.openings=1", "measure.warmup_ms=1",
]  # fmt: skip
TUNED = [
    "tune.recover=interactions", "tune.recover_images=16", "tune.recover_steps=2", "tune.epochs=1",
    "tune.max_images=128", "tune.distill=0.5",
]  # fmt: skip
LISTS = ["--criteria", "chip,l1", "--macs", "0.7,0.4", "--allocation", "uniform,interaction", "--seeds", "0,1"]
NET = (
    "from torch import nn\n"
    "def build(num_classes=10):\n"
    "    body = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.BatchNorm2d(10),\n"
    "            nn.ReLU(), nn.Conv2d(10, 8, 3), nn.ReLU()]\n"
    "    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
    "def unnormed(num_classes=10):\n"
    "    body = [nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]\n"
    "    return nn.Sequential(*body, nn.Flatten(), nn.Linear(8, num_classes))\n"
    "def wordy(model, train_images, test_images, settings):\n"
    "    return 'trained'\n"
    "def bare(num_classes=10):\n"
    "    return nn.Sequential(nn.Flatten(), nn.Linear(768, num_classes))\n"
)


def words(settings):
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """Options that name a small trained network, importable here and in other processes, and its data."""
    folder = tmp_path_factory.mktemp("net")
    (folder / "compared_net.py").write_text(NET)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        model = build_model("compared_net:build", num_classes=10, seed=3, size=16).module
        train(model, open_data("digits", size=16, seed=0), DenseSection(epochs=3), seed=0, work=folder / "work")
        torch.save(model.state_dict(), folder / "weights.pt")
        yield ["--model", "compared_net:build", "--weights", str(folder / "weights.pt"), "--data", "digits"]


def compared(net, out, *more):
    assert main(["compare-criteria", *net, *words(QUICK), *more, "--out", str(out)]) == 0
    return read(out)


def read(out):
    return CriteriaComparison.model_validate_json((out / "criteria.json").read_text())


def without_seconds(cells):
    return [cell.model_copy(update={"seconds": 0}) for cell in cells]


@pytest.fixture(scope="module")
def plain(net, tmp_path_factory):
    """The folder of a comparison of 16 cells."""
    out = tmp_path_factory.mktemp("plain") / "out"
    compared(net, out, *LISTS)
    return out


@pytest.fixture(scope="module")
def tuned(net, tmp_path_factory):
    """A comparison whose cells are recovered and tuned."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    lists = ["--criteria", "chip,l1", "--macs", "0.5", "--allocation", "uniform,interaction", "--seeds", "1"]
    return compared(net, out, *lists, *words(TUNED))


def error(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def cell_of(comparison, criterion, allocation, value, seed):
    (found,) = [
        each
        for each in comparison.cells
        if (each.cell.criterion, each.cell.allocation, each.cell.budget.value, each.cell.seed)
        == (criterion, allocation, value, seed)
    ]
    return found


@pytest.mark.parametrize(("criterion", "allocation"), [("chip", "uniform"), ("l1", "interaction")])
def test_a_tuned_cell_is_what_prune_finds_with_that_seed(net, tuned, criterion, allocation, tmp_path):
    cell = cell_of(tuned, criterion, allocation, 0.5, 1)
    asked = [*words([*QUICK, *TUNED, f"prune.allocation={allocation}", "seed=1"])]
    out = tmp_path / "bundle"
    assert main(["prune", *net, "--criterion", criterion, "--macs", "0.5", *asked, "--out", str(out)]) == 0
    report, plan = read_report(out), json.loads((out / "plan.json").read_text())
    accuracy = report.accuracy
    expected = (accuracy.pruned, accuracy.recalibrated, accuracy.recovered, accuracy.tuned, accuracy.n)
    found = cell.accuracy
    assert (found.cut, found.recalibrated, found.recovered, found.tuned, found.n) == expected
    assert (cell.macs, cell.params) == (plan["macs_after"], plan["params_after"])
    assert {group["layer"]: group["width_after"] for group in plan["groups"]}.items() <= cell.widths.items()
    assert tuned.dense.accuracy == accuracy.dense
    assert f"{cell.recovery['gap_after']:.2f} after" in " ".join(report.notes)


def test_rows_hold_the_mean_and_the_range_of_every_seed(plain):
    result = json.loads((plain / "criteria.json").read_text())
    cells = [json.loads(path.read_text()) for path in (plain / "cells").iterdir()]
    assert len(cells) == 16
    assert len(result["rows"]) == 8
    for row in result["rows"]:
        names = ("criterion", "allocation", "budget")
        same = [cell for cell in cells if all(cell["cell"][name] == row[name] for name in names)]
        assert [cell["cell"]["seed"] for cell in sorted(same, key=lambda cell: cell["cell"]["seed"])] == [0, 1]
        for stage in ("cut", "recalibrated"):
            values = [cell["accuracy"][stage] for cell in same]
            assert row[stage]["mean"] == pytest.approx(statistics.fmean(values), rel=1e-12)
            assert (row[stage]["low"], row[stage]["high"]) == (min(values), max(values))
        assert max(cell["macs"] for cell in same) <= row["budget"]["value"] * result["dense"]["macs"]


def test_allocations_are_compared_seed_by_seed(plain):
    result = read(plain)
    assert len(result.paired) == 4
    for row in result.paired:
        ours, theirs = (
            [cell_of(result, row.criterion, way, row.budget.value, seed).accuracy for seed in (0, 1)]
            for way in ("interaction", "uniform")
        )
        right = [[round(each.recalibrated * each.n) for each in side] for side in (ours, theirs)]
        gaps = [more - less for more, less in zip(*right, strict=True)]
        n = ours[0].n
        assert row.difference.mean == statistics.mean(gaps) / n
        assert (row.difference.low, row.difference.high) == (min(gaps) / n, max(gaps) / n)
        counts = [sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps), gaps.count(0)]
        assert [row.better, row.worse, row.equal] == counts


def test_a_cell_does_not_depend_on_what_else_was_asked(net, plain, tmp_path):
    alone = compared(net, tmp_path / "out", "--criteria", "chip", "--macs", "0.4", "--seeds", "1")
    (cell,) = without_seconds(alone.cells)
    assert cell in without_seconds(read(plain).cells)


def test_cells_of_another_folder_serve_and_nothing_is_scored_or_cut_again(net, plain, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(plain / "cells", out / "cells")
    for name in ("scored_by", "apply_plan", "evaluate"):
        monkeypatch.setattr(comparing, name, lambda *_, **__: pytest.fail("a cell was made again"))
    found = compared(net, out, "--criteria", "l1", "--macs", "0.4,0.7", "--seeds", "1", "--resume")
    theirs = read(plain).cells
    assert [cell.cell.budget.value for cell in found.cells] == [0.4, 0.7]
    assert all(cell in theirs for cell in found.cells)


def test_a_resumed_comparison_makes_what_is_missing_or_damaged_from_the_scores_that_it_kept(
    net, plain, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    shutil.copytree(plain, out)
    first, second, third, *_ = sorted((out / "cells").glob("chip-*.json"))
    first.unlink()
    second.write_text(second.read_text()[:-20])
    third.write_text(sorted((out / "cells").glob("l1-*.json"))[0].read_text())
    (out / "criteria.json").unlink()
    monkeypatch.setattr(comparing, "scored_by", lambda *_, **__: pytest.fail("scored again"))
    found = compared(net, out, *LISTS, "--resume")
    assert without_seconds(found.cells) == without_seconds(read(plain).cells)
    assert "13 of 16 cells are there already" in capsys.readouterr().out


def test_damaged_scores_are_made_again(net, plain, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(plain, out)
    for path in (*(out / "cells").glob("chip-uniform-macs0.4-seed1*"), *(out / "scores").glob("chip-seed1*")):
        path.write_bytes(path.read_bytes()[:100])
    assert without_seconds(compared(net, out, *LISTS, "--resume").cells) == without_seconds(read(plain).cells)


@pytest.mark.parametrize("setting", ["tune.recalibrate_images=32", "score.images=16", "prune.min_width=3"])
def test_cells_made_in_another_way_do_not_serve(net, plain, setting, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(plain / "cells", out / "cells")
    name = setting.partition("=")[0]
    settings = [each for each in QUICK if not each.startswith(name)]
    lists = ["--criteria", "l1", "--macs", "0.7", "--seeds", "0"]
    asked = ["compare-criteria", *net, *lists, *words([*settings, setting]), "--resume", "--out", str(out)]
    assert main(asked) == 0
    assert len(list((out / "cells").iterdir())) == 17


def test_the_same_command_again_begins_anew_and_other_lists_are_refused_unless_resumed(net, plain, tmp_path, capsys):
    out = tmp_path / "out"
    lists = ["--criteria", "l1", "--macs", "0.7", "--seeds", "0"]
    first = compared(net, out, *lists)
    old = next((out / "cells").iterdir())
    old.rename(out / "cells" / "left-over.json")
    again = compared(net, out, *lists)
    assert [path.name for path in (out / "cells").iterdir()] == [old.name]
    assert without_seconds(again.cells) == without_seconds(first.cells)
    more = ["--criteria", "l1,l2", *lists[2:]]
    assert main(["compare-criteria", *net, *words(QUICK), *more, "--out", str(out)]) == 2
    assert "Add --resume" in error(capsys)
    assert [cell.cell.criterion for cell in compared(net, out, *more, "--resume").cells] == ["l1", "l2"]
    other = words([*QUICK, "seed=4"])
    assert main(["compare-criteria", *net, *other, *more, "--resume", "--out", str(out)]) == 2
    assert "another recipe" in error(capsys)


def test_a_comparison_goes_on_that_was_begun_before_the_recipe_had_all_its_sections(net, tmp_path):
    out = tmp_path / "out"
    lists = ["--criteria", "l1", "--macs", "0.7", "--seeds", "0"]
    first = compared(net, out, *lists)
    asked = json.loads((out / "asked.json").read_text("utf-8"))
    del asked["recipe"]["export"]
    (out / "asked.json").write_text(json.dumps(asked), "utf-8")
    assert compared(net, out, *lists, "--resume").cells == first.cells


def test_cells_besides_those_asked_for_are_not_lost_without_a_word(net, plain, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(plain, out)
    fewer = ["--criteria", "chip", "--macs", "0.4", "--seeds", "0,1"]
    compared(net, out, *fewer, "--resume")
    capsys.readouterr()
    assert main(["compare-criteria", *net, *words(QUICK), *fewer, "--out", str(out)]) == 2
    assert "holds 14 cells of other criteria" in error(capsys)
    assert len(list((out / "cells").iterdir())) == 16


def test_targets_that_ask_for_other_widths_are_refused_with_the_multiple_that_keeps_the_cells(
    net, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    asked = ["--criteria", "l1", "--macs", "0.5", "--seeds", "0", *words([*QUICK[1:], "prune.round_to=4"])]
    assert main(["compare-criteria", *net, *asked, "--out", str(out)]) == 0
    made = read(out)
    monkeypatch.setattr("chip_deploy.pipeline.recipe_values.width_step", lambda *_: 2)
    capsys.readouterr()
    again = [*asked[:-2], "--resume", "--out", str(out)]
    assert main(["compare-criteria", *net, *again, "--target", "ort-cpu"]) == 2
    sentence = error(capsys)
    assert "widths are multiples of 4, and multiples of 2 are asked for now" in sentence
    assert "Set prune.round_to=4" in sentence
    monkeypatch.setattr("chip_deploy.pipeline.recipe_values.width_step", lambda *_: 4)
    assert main(["compare-criteria", *net, *again]) == 0
    assert read(out).cells == made.cells


@pytest.mark.parametrize(
    ("settings", "code", "part"),
    [
        (["tune.epochs=1", "tune.train=compared_net:wordy"], 2, "tune.train 'compared_net:wordy' returned a str"),
        (["tune.epochs=1", "tune.max_images=512", "tune.lr=1e30"], 1, "loss"),
    ],
)
def test_a_cell_that_fails_is_named(net, plain, settings, code, part, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(plain / "scores", out / "scores")
    lists = ["--criteria", "l1", "--macs", "0.7", "--seeds", "1", "--resume"]
    assert main(["compare-criteria", *net, *words([*QUICK, *settings]), *lists, "--out", str(out)]) == code
    sentence = error(capsys)
    assert "error: l1, uniform, 70 % of the MACs kept, seed 1: " in sentence
    assert part in sentence


def test_what_was_not_recalibrated_has_no_accuracy_after_it(net, tmp_path):
    without = ["tune.recalibrate_images=0", *(each for each in QUICK if "recalibrate" not in each)]
    lists = ["--criteria", "l1", "--macs", "0.5", "--seeds", "0"]
    assert main(["compare-criteria", *net, *words(without), *lists, "--out", str(tmp_path / "zero")]) == 0
    bare = ["--model", "compared_net:unnormed", *net[4:], "--set", "dense.epochs=0"]
    compared(bare, tmp_path / "bare", *lists)
    for name in ("zero", "bare"):
        result = read(tmp_path / name)
        assert [each.accuracy.recalibrated for each in result.cells] == [None]
        assert result.stages == ["cut"]
        assert any(note.startswith("nothing was recalibrated") for note in result.notes)


def test_the_notes_say_which_allocation_leaves_how_much_of_a_group(plain):
    notes = " ".join(read(plain).notes)
    assert "never below 2, and at least 10 % of its width by interaction, while uniform may go down to that" in notes


@pytest.mark.parametrize("changed", ["torchvision", "pillow", "flip"])
def test_cells_of_other_packages_or_images_do_not_serve(net, plain, changed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(plain / "cells", out / "cells")
    if changed == "flip":
        prepare = comparing.prepare

        def flipped(*args, **more):
            ready = prepare(*args, **more)
            return replace(ready, data=replace(ready.data, flip=not ready.data.flip))

        monkeypatch.setattr(comparing, "prepare", flipped)
    else:
        known = comparing.versions()
        monkeypatch.setattr(comparing, "versions", lambda: known | {changed: "0.0"})
    compared(net, out, "--criteria", "l1", "--macs", "0.7", "--seeds", "0", "--resume")
    assert len(list((out / "cells").iterdir())) == 17


def test_a_folder_with_other_things_is_left_alone(net, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for more in ([], ["--resume"]):
        assert main(["compare-criteria", *net, *words(QUICK), *LISTS, *more, "--out", str(tmp_path / "out")]) == 2
        assert "not empty and holds no comparison" in error(capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


# What is asked besides, and parts of the sentence.
MISTAKES = {
    "no budget": (["--criteria", "l1"], ["no budget was given. Give --macs"]),
    "empty list": (["--macs", "0.5", "--criteria", ""], ["--criteria '': a value is missing", "chip,l1"]),
    "empty value": (["--macs", "0.5,,0.3"], ["--macs '0.5,,0.3': a value is missing"]),
    "unknown criterion": (["--macs", "0.5", "--criteria", "l1,chop"], ["unknown criterion 'chop'", "Did you mean"]),
    "criterion twice": (["--macs", "0.5", "--criteria", "l1,l1"], ["l1 is named twice"]),
    "budget twice": (["--macs", "0.5,0.50"], ["0.50 is named twice"]),
    "no fraction": (["--macs", "0.5,nan"], ["'nan' is no fraction of the MACs to keep"]),
    "seed twice": (["--macs", "0.5", "--seeds", "1,1"], ["1 is named twice"]),
    "no seed": (["--macs", "0.5", "--seeds", "-1"], ["'-1' is no seed"]),
    "list allocation": (["--macs", "0.5", "--allocation", "list"], ["unknown allocation 'list'", "isomorphic"]),
    "score file": (["--macs", "0.5", "--set", "score.file=a"], ["score.file = 'a'", "Leave it out"]),
    "joint of many": (["--macs", "0.5", "--set", "score.joint=true"], ["score.joint", "Give --criteria chip"]),
    "precision": (
        ["--macs", "0.5", "--set", 'export.precision=["int8"]'],
        ["export.precision = int8", "times fp32 alone"],
    ),
    "layer ratios": (["--set", "prune.layer_ratios.conv=0.5"], ["prune.layer_ratios", "Give --macs"]),
    "out of reach": (
        ["--macs", "0.5,0.001", "--criteria", "l1"],
        ["--macs 0.001 cannot be reached", "the smallest reachable is"],
    ),
    "too few images": (["--macs", "0.5", "--set", "score.images=99999"], ["score.images asks for 99999 images"]),
}


@pytest.mark.parametrize(("more", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_before_any_work(net, more, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparing, "dense_stage", lambda *_, **__: pytest.fail("work began"))
    out = tmp_path / "out"
    settings = [each for each in QUICK if "score.images" not in " ".join(more) or "score.images" not in each]
    assert main(["compare-criteria", *net, *words(settings), *more, "--out", str(out)]) == 2
    sentence = error(capsys)
    assert all(part in sentence for part in parts), sentence
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ([], ["criteria 'interactions', 'taylor' need labels", "--criteria chip,cpmc,capacity,l1"]),
        (["--criteria", "l1,taylor"], ["criterion 'taylor' needs labels", "'random:16' have none"]),
        (["--criteria", "l1", "--allocation", "interaction"], ["allocation 'interaction' needs labels"]),
        (["--criteria", "l1", "--set", "tune.epochs=1"], ["tune.epochs = 1 needs labels"]),
        (["--criteria", "l1", "--set", "tune.recover=interactions"], ["tune.recover = 'interactions' needs labels"]),
    ],
)
def test_what_needs_labels_is_refused_where_there_are_none(net, more, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("chip_deploy.pipeline.prepared.build_model", lambda *_, **__: pytest.fail("work began"))
    out = tmp_path / "out"
    unlabelled = [*net[:4], "--data", "random:16", "--macs", "0.5", "--set", "data.size=16"]
    assert main(["compare-criteria", *unlabelled, *more, "--out", str(out)]) == 2
    sentence = error(capsys)
    assert all(part in sentence for part in parts), sentence
    assert not out.exists()


def test_a_network_without_a_group_to_cut_says_why(net, tmp_path, capsys):
    out = tmp_path / "out"
    asked = ["--model", "compared_net:bare", "--data", "digits", "--set", "data.size=16", "--macs", "0.5"]
    assert main(["compare-criteria", *asked, "--criteria", "l1", "--out", str(out)]) == 2
    sentence = error(capsys)
    assert "nothing of this network can be cut ('1':" in sentence
    assert "output" in sentence
    assert not out.exists()


def test_without_labels_there_is_a_comparison_without_accuracy(net, tmp_path):
    asked = [*net[:2], "--data", "random:16", "--criteria", "l1,chip", "--macs", "0.5", "--seeds", "0"]
    assert main(["compare-criteria", *asked, *words(["data.size=16", *QUICK[:2]]), "--out", str(tmp_path / "o")]) == 0
    result = read(tmp_path / "o")
    assert {cell.accuracy.n for cell in result.cells} == {0}
    assert {row.recalibrated for row in result.rows} == {None}
    assert (result.dense.accuracy, result.paired) == (None, [])
    assert any("no accuracy exists" in note for note in result.notes)


def test_a_criterion_that_cannot_judge_a_group_leaves_it_and_the_result_says_so(net, tmp_path):
    result = compared(net, tmp_path / "out", "--criteria", "l1,bn-scale", "--macs", "0.7", "--seeds", "0")
    l1, scales = result.cells
    assert (l1.widths["6"] < 8, scales.widths["6"]) == (True, 8)
    assert any(note == "left as they are by bn-scale, which cannot judge them: 6." for note in result.notes)
    assert max(cell.macs for cell in result.cells) <= 0.7 * result.dense.macs


def test_latency_is_measured_once_for_each_structure_and_kept(net, plain, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(plain, out)
    lists = ["--criteria", "chip,l1", "--macs", "0.4", "--seeds", "0,1", "--target", "ort-cpu", "--resume"]
    found = compared(net, out, *lists)
    assert len({cell.structure for cell in found.cells}) == 1
    (latency,) = found.latencies
    assert "latency has not been measured yet." not in found.notes
    assert latency.structure == found.cells[0].structure
    assert latency.pruned_ms.p50 > 0
    assert latency.verdict in ("faster", "not faster", "unstable")
    assert (out / latency.laps).is_file()
    assert not list(out.rglob("*.onnx"))
    monkeypatch.setattr("chip_deploy.pipeline.criteria_latency.measured_row", lambda *_, **__: pytest.fail("again"))
    assert compared(net, out, *lists).latencies == [latency]


def test_what_is_measured_is_the_network_that_prune_would_ship(tmp_path, monkeypatch):
    exported = []

    def keep(model, *_, **__):
        exported.append(model)
        raise BuildFailed("the network is kept.")

    settings = words(["tune.epochs=0", *(each for each in QUICK if not each.startswith("score.images"))])
    asked = ["--model", "resnet20", "--data", "random:8", "--macs", "0.5", *settings, "--target", "ort-cpu", "--out"]
    # Both seeds end with the same widths; the random scores of the first keep channels that the other's do not.
    with monkeypatch.context() as patch:
        patch.setattr(engine_stages, "export_onnx", keep)
        lists = ["--criteria", "random", "--seeds", "0,1"]
        assert main(["compare-criteria", *lists, *asked, str(tmp_path / "out")]) == 1
    assert main(["prune", "--criterion", "random", *asked, str(tmp_path / "bundle")]) == 0
    (measured,) = exported
    assert structure(measured) == structure(load_pruned(tmp_path / "bundle"))
    groups = json.loads((tmp_path / "bundle" / "plan.json").read_text())["groups"]
    assert all(max(group["kept"]) >= group["width_after"] for group in groups)  # never just the first channels


def structure(model):
    """Every tensor of the network, and which channels its shortcuts copy."""
    shortcuts = {name: module.source for name, module in model.named_modules() if isinstance(module, ChannelMap)}
    return {name: tensor.tolist() for name, tensor in (model.state_dict() | shortcuts).items()}


def test_a_latency_that_fails_leaves_the_pages_of_the_accuracies(net, plain, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise BuildFailed("the engine could not be built.")

    out = tmp_path / "out"
    shutil.copytree(plain, out)
    for name in ("criteria.json", "criteria.md", "criteria.html", "criteria.svg"):
        (out / name).unlink()
    monkeypatch.setattr(criteria_latency, "measured_row", fail)
    lists = ["--criteria", "l1", "--macs", "0.4", "--seeds", "0", "--target", "ort-cpu", "--resume"]
    assert main(["compare-criteria", *net, *words(QUICK), *lists, "--out", str(out)]) == 1
    assert "could not be built" in error(capsys)
    left = read(out)
    assert (left.cells, left.latencies) == ([cell_of(read(plain), "l1", "uniform", 0.4, 0)], [])
    assert "latency has not been measured yet." in left.notes
    assert all((out / name).is_file() for name in ("criteria.md", "criteria.html", "criteria.svg"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which might run the engine")
def test_a_target_that_cannot_run_here_gives_its_reason(net, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    lists = ["--criteria", "l1", "--macs", "0.5", "--seeds", "0", "--target", "trt-rtx:sm86"]
    (latency,) = compared(net, tmp_path / "out", *lists).latencies
    assert (latency.verdict, latency.speedup, latency.laps) == ("not measured", None, None)
    assert "no CUDA driver" in latency.reason


def test_json_alone_goes_to_stdout(net, plain, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(plain / "cells", out / "cells")
    compared(net, out, "--criteria", "l1", "--macs", "0.4", "--seeds", "0", "--resume", "--json")
    assert json.loads(capsys.readouterr().out) == json.loads((out / "criteria.json").read_text())


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT to another process is POSIX's")
def test_ctrl_c_leaves_finished_cells_and_says_how_to_go_on(net, plain, tmp_path):
    out = tmp_path / "out"
    code = "import sys; from chip_deploy.pipeline.cli import main; sys.exit(main())"
    lists = ["--criteria", "l1,l2,fpgm,lamp,random", "--macs", "0.7,0.5,0.4", "--seeds", "0,1,2,3"]
    command = [sys.executable, "-c", code, "compare-criteria", *net, *words(QUICK), *lists, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(out.glob("cells/*.json")):
        assert process.poll() is None, "it ended before a cell was there"
        assert time.monotonic() < deadline, "no cell appeared"
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted; continue with: chip-deploy compare-criteria" in err
    assert err.rstrip().endswith("--resume")
    cells = [json.loads(path.read_text()) for path in (out / "cells").glob("*.json")]
    assert 1 <= len(cells) < 60


def test_torchrun_is_refused(net, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["compare-criteria", *net, *words(QUICK), *LISTS, "--out", str(tmp_path / "out")]) == 2
    assert "without torchrun" in error(capsys)
