"""`chip-deploy score`: its table, its file, its processes; and `prune --scores`, which takes the file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from chip_deploy.chip.scores import ChannelScores, LayerEvidence
from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.recipe import ScoreSection
from chip_deploy.pipeline.stages import load_pruned
from chip_deploy.pipeline.tables import score_sentence, score_table

NET = ["--model", "resnet20", "--data", "random:48", "--set", "data.size=16"]
PRUNE = [*NET, "--ratio", "0.5", "--target", "ort-cpu"]
QUICK = ["prune.round_to=4", "tune.epochs=0", "measure.seconds=0.05", "measure.laps=20", "measure.openings=1"]
SETTINGS = [word for setting in QUICK for word in ("--set", setting)]


def _score(out, *more):
    assert main(["score", *NET, "--out", str(out), *more]) == 0
    return ChannelScores.from_file(str(out))


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scores of resnet20 with drawn weights."""
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    _score(path)
    return path


def _error(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_the_table_has_a_row_a_group_with_images_stability_seconds_and_a_chart(tmp_path, capsys):
    found = _score(tmp_path / "scores.safetensors")
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if not line.startswith(("Scores: ", "the dense"))) <= 80
    lines = shown.splitlines()
    head = next(n for n, line in enumerate(lines) if line.startswith("layer "))
    rows = [line.split() for line in lines[head + 2 :] if "█" in line]
    for row, (layer, vector) in zip(rows, found.scores.items(), strict=True):
        assert layer.startswith(row[0])  # a long name goes on in the next line
        assert row[1] == str(len(vector))
        assert row[3] == str(found.layers[layer].images)
        assert row[5] == ("yes" if found.layers[layer].settled else "no")
        assert row[7].startswith("█")
    assert "scores.safetensors" in shown.splitlines()[-1]


def test_a_chart_falls_from_the_best_channel_to_the_worst():
    vector = torch.tensor([0.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    found = ChannelScores({"conv": vector}, "chip", 9, "0" * 64, {"conv": LayerEvidence(9, 0.5, settled=False)})
    assert str(score_table(found).columns[-1]._cells[0]) == "█▄▂ "
    assert str(score_table(found, encoding="ascii").columns[-1]._cells[0]) == "#=: "
    assert str(score_table(found).columns[2]._cells[0]) == "1"  # one dead channel
    assert "1 have not settled" in score_sentence(found, ScoreSection())
    assert "There are no more images" in score_sentence(found, ScoreSection())
    assert "score.max_images=N" in score_sentence(found, ScoreSection(images=9))


def test_scores_below_zero_have_no_bar():
    vector = torch.tensor([2.0, -1.0, 1.0, -3.0], dtype=torch.float64)
    found = ChannelScores({"conv": vector}, "interactions", 9, "0" * 64)
    assert str(score_table(found).columns[-1]._cells[0]) == "█▄  "
    assert str(score_table(ChannelScores({"conv": -vector.abs()}, "x", 9, "0" * 64)).columns[-1]._cells[0]) == "    "


def test_scores_without_images_say_so_and_judge_no_stability():
    layers = {"conv": LayerEvidence(0, None, settled=False)}
    found = ChannelScores({"conv": torch.ones(2, dtype=torch.float64)}, "l1", 0, "0" * 64, layers)
    asked = ScoreSection(criterion="l1")
    assert score_sentence(found, asked) == "1 groups scored by l1 without any image."
    played = ChannelScores(found.scores, "taylor", 9, "0" * 64, {"conv": LayerEvidence(9, None, settled=False)})
    assert "is not judged by this criterion" in score_sentence(played, asked)
    assert "is not judged in joint mode" in score_sentence(played, ScoreSection(joint=True))


def test_strengths_are_read_back_and_a_file_without_them_stays_as_it_was(tmp_path):
    plain = ChannelScores({"conv": torch.ones(2, dtype=torch.float64)}, "chip", 9, "0" * 64)
    assert b"strengths" not in plain.to_bytes()
    file = tmp_path / "scores.safetensors"
    file.write_bytes(plain.to_bytes())
    assert ChannelScores.from_file(str(file)).strengths == {}
    strong = ChannelScores(plain.scores, "chip", 9, "0" * 64, strengths={"conv": 0.25})
    file.write_bytes(strong.to_bytes())
    assert ChannelScores.from_file(str(file)).strengths == {"conv": 0.25}
    for strengths in ({"conv": -1.0}, {"conv": float("nan")}, {"other": 1.0}):
        file.write_bytes(ChannelScores(plain.scores, "chip", 9, "0" * 64, strengths=strengths).to_bytes())
        with pytest.raises(ValueError, match="a finite one of a scored group is expected"):
            ChannelScores.from_file(str(file))


def test_a_group_of_dead_channels_has_an_empty_chart():
    found = ChannelScores({"conv": torch.zeros(3, dtype=torch.float64)}, "chip", 9, "0" * 64)
    assert str(score_table(found).columns[-1]._cells[0]) == "   "


def test_the_file_keeps_what_the_scores_rest_on_but_no_seconds(scores, tmp_path):
    found = ChannelScores.from_file(str(scores))
    assert set(found.layers) == set(found.scores)
    assert all(
        layer.seconds == 0 and layer.images >= 32 and layer.stability is not None for layer in found.layers.values()
    )
    again = tmp_path / "again.safetensors"
    _score(again)
    assert again.read_bytes() == scores.read_bytes()


def test_prune_takes_the_scores_and_keeps_the_best_channels_by_them(scores, tmp_path):
    found = ChannelScores.from_file(str(scores))
    flipped = ChannelScores(
        {layer: vector.max() - vector for layer, vector in found.scores.items()},
        found.criterion, found.images, found.weights_sha256, found.layers,
    )  # fmt: skip
    for name, kind in (("as_they_are", found), ("upside_down", flipped)):
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(kind.to_bytes())
        assert main(["prune", *PRUNE, *SETTINGS, "--scores", str(file), "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name / "scores.safetensors").read_bytes() == file.read_bytes()
    first, second = ((tmp_path / name / "plan.json").read_text() for name in ("as_they_are", "upside_down"))
    assert first != second
    assert load_pruned(tmp_path / "as_they_are")(torch.randn(1, 3, 16, 16)).shape == (1, 10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--model", "resnet32"], ["another model", "no such group", "chip-deploy score"]),
        (["--set", "seed=1"], ["another model", "other weights", "chip-deploy score"]),
        (["--set", "score.joint=true"], ["by 'chip'", "'chip joint'", "Set score.joint=false"]),
        (["--criterion", "l1"], ["by 'chip'", "asks for 'l1'", "Give --criterion chip"]),
        (
            ["--set", "prune.allocation=interaction"],
            ["does not say how strongly", "prune.allocation=interaction --out"],
        ),
    ],
)
def test_scores_of_another_model_are_refused_before_any_work(scores, change, words, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = dict(zip(PRUNE[::2], PRUNE[1::2], strict=True)) if change[0] == "--model" else {}
    options = (
        [*PRUNE] if not arguments else [w for k, v in (arguments | {"--model": "resnet32"}).items() for w in (k, v)]
    )
    more = [] if change[0] == "--model" else change
    assert main(["prune", *options, *more, *SETTINGS, "--scores", str(scores), "--out", str(out)]) == 2
    error = _error(capsys)
    assert all(word in error for word in words), error
    assert not out.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage" * 40,
        save({"conv1": torch.zeros(3)}),
        save({"conv1": torch.zeros(3)}, {"scores": "[]"}),
    ],
)
def test_what_is_no_score_file_is_refused(content, tmp_path, capsys):
    file = tmp_path / "scores.safetensors"
    file.write_bytes(content)
    assert main(["prune", *PRUNE, *SETTINGS, "--scores", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "no score file" in _error(capsys)


def test_scores_that_are_no_numbers_are_refused(scores, tmp_path, capsys):
    found = ChannelScores.from_file(str(scores))
    broken = {**found.scores, "conv1": found.scores["conv1"] * torch.nan}
    file = tmp_path / "scores.safetensors"
    file.write_bytes(ChannelScores(broken, found.criterion, found.images, found.weights_sha256).to_bytes())
    assert main(["prune", *PRUNE, *SETTINGS, "--scores", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "'conv1' are no vector of finite numbers" in _error(capsys)


def test_a_score_file_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["prune", *PRUNE, "--scores", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 2
    assert "no such score file" in _error(capsys)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("score.min_images=31", ["score.min_images", "32"]),
        ("score.max_images=40 score.min_images=50", ["min_images", "max_images"]),
        ("score.overlap=1.5", ["score.overlap"]),
        ("score.confidence=1", ["score.confidence"]),
        ("score.device=gpu", ["unknown device 'gpu'", "cuda"]),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting, words, tmp_path, capsys):
    more = [word for part in setting.split() for word in ("--set", part)]
    assert main(["score", *NET, *more, "--out", str(tmp_path / "scores.safetensors")]) == 2
    error = _error(capsys)
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path, capsys):
    out = tmp_path / "scores.safetensors"
    assert main(["score", *NET, "--set", "score.device=cuda", "--out", str(out)]) == 2
    assert "torch sees no usable GPU" in _error(capsys)
    assert not out.exists()


def test_a_resumed_run_that_is_finished_notices_other_scores(scores, tmp_path, capsys):
    file, out = tmp_path / "scores.safetensors", tmp_path / "bundle"
    file.write_bytes(scores.read_bytes())
    command = ["prune", *PRUNE, *SETTINGS, "--scores", str(file), "--out", str(out), "--resume"]
    assert main(command) == 0
    before = (out / "plan.json").read_text()
    capsys.readouterr()
    assert main(command) == 0
    assert "nothing is left to do" in " ".join(capsys.readouterr().out.split())
    found = ChannelScores.from_file(str(file))
    flipped = {layer: vector.max() - vector for layer, vector in found.scores.items()}
    file.write_bytes(ChannelScores(flipped, "chip", found.images, found.weights_sha256, found.layers).to_bytes())
    assert main(command) == 0
    assert (out / "plan.json").read_text() != before


def test_scores_go_through_a_link_and_never_over_what_is_no_file(tmp_path, capsys):
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    _score(tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink()
    assert (tmp_path / "real.safetensors").is_file()
    os.mkfifo(tmp_path / "pipe")
    capsys.readouterr()
    for place in (tmp_path / "pipe", tmp_path):
        assert main(["score", *NET, "--out", str(place)]) == 2
        assert "no regular file" in _error(capsys)
    assert (tmp_path / "pipe").is_fifo()
    assert main(["score", *NET, "--out", str(tmp_path / "nowhere" / "s.safetensors")]) == 2
    assert "there is no folder" in _error(capsys)


def test_score_takes_no_scores(scores, tmp_path, capsys):
    assert main(["score", *NET, "--set", f"score.file={scores}", "--out", str(tmp_path / "s")]) == 2
    assert "score.file is for" in _error(capsys)


def _torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    tool = Path(sys.executable).with_name("chip-deploy")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(tool), *arguments], capture_output=True, text=True, env=environment, timeout=300
    )


def test_two_processes_write_the_scores_that_one_writes(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = _score(tmp_path / "alone.safetensors", "--set", "score.batch=8")
    finally:
        torch.set_num_threads(threads)
    out = tmp_path / "together.safetensors"
    run = _torchrun("score", *NET, "--set", "score.batch=8", "--out", str(out))
    assert run.returncode == 0, run.stderr
    together = ChannelScores.from_file(str(out))
    assert together.layers == alone.layers
    for layer, vector in alone.scores.items():
        assert torch.allclose(together.scores[layer], vector, rtol=1e-12, atol=0)
    assert run.stdout.count("Scores: ") == 1  # one process speaks for both


def test_prune_under_torchrun_says_what_to_run_instead(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["prune", *PRUNE, *SETTINGS, "--out", str(tmp_path / "out")]) == 2
    assert "prune --scores" in _error(capsys)
    assert not (tmp_path / "out").exists()
