"""The run as a whole: interrupted anywhere it ends the same, and what it leaves behind can be trusted."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from chip_deploy.export.bundle import verify_bundle
from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.recipe import load_recipe, recipe_toml
from chip_deploy.pipeline.report import read_report
from chip_deploy.pipeline.run_folder import require_own_folder

SAME = ("plan.json", "scores.safetensors", "model.safetensors", "model.onnx", "dense.onnx", "golden.npz", "recipe.toml")
QUICK = [
    "--model", "resnet20", "--data", "digits", "--macs", "0.6", "--target", "ort-cpu",
    "--set", "prune.round_to=4", "--set", "score.images=32", "--set", "dense.epochs=2", "--set", "tune.epochs=3",
    "--set", "tune.max_images=256", "--set", "tune.distill=0.5", "--set", "dense.max_images=256",
    "--set", "measure.seconds=0.05", "--set", "measure.laps=20", "--set", "measure.openings=1",
    "--set", "measure.warmup_ms=1",
]  # fmt: skip


def _command(out: Path, *more: str) -> list[str]:
    start = "import sys; from chip_deploy.pipeline.cli import main; sys.exit(main())"
    return [sys.executable, "-c", start, "prune", *QUICK, "--out", str(out), *more]


def _environment(cache: Path) -> dict[str, str]:
    return os.environ | {"CHIP_DEPLOY_CACHE_DIR": str(cache)}


def _run(out: Path, cache: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(_command(out, *more), env=_environment(cache), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    done = _run(folder / "bundle", folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "bundle"


def _killed_when(pattern: str, out: Path, cache: Path) -> None:
    """Start or resume the run and kill it with SIGKILL as soon as a path of that pattern exists in the folder."""
    process = subprocess.Popen(
        _command(out, "--resume"), env=_environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not any(out.glob(pattern)):
        assert process.poll() is None, f"the run ended before {pattern} appeared"
        assert time.monotonic() < deadline, f"{pattern} never appeared"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX's")
def test_a_run_killed_again_and_again_ends_bit_for_bit_the_same(finished, tmp_path):
    out, cache = tmp_path / "bundle", tmp_path / "cache"
    for moment in (
        ".work/dense.epochs/*.ckpt",
        ".work/score.part",
        ".work/cut.part",
        ".work/tune.epochs/*.ckpt",
        ".work/export.part/model.onnx",
        "plan.json",
    ):
        _killed_when(moment, out, cache)
        assert not (out / "manifest.json").exists()
    done = _run(out, cache, "--resume")
    assert done.returncode == 0, done.stderr
    for name in SAME:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    verify_bundle(out)
    assert not (out / ".work").exists()


def test_the_bundle_is_as_its_manifest_says_and_holds_what_it_must(finished):
    manifest = verify_bundle(finished)
    files = {entry.path for entry in manifest.files}
    assert {*SAME, "report.json", "report.md", "report.html"} <= files
    assert {"engines/ort-cpu.fp32.engine", "engines/ort-cpu.fp32.json", "engines/ort-cpu.fp32.latency.json.gz"} <= files
    assert not (finished / ".work").exists()


def test_the_report_says_what_was_done(finished):
    report = read_report(finished)
    raw = json.loads((finished / "report.json").read_text())
    assert list(raw["stages_s"]) == ["dense", "score", "plan", "cut", "tune", "export", "agree", "build", "measure"]
    assert any("trained first" in note for note in report.notes)
    assert report.accuracy.n == 355
    assert None not in (report.accuracy.dense, report.accuracy.pruned, report.accuracy.recalibrated)
    assert report.accuracy.tuned == pytest.approx(report.accuracy.onnx, abs=1 / 355)
    assert report.cost.pruned.macs <= 0.6 * report.cost.dense.macs
    (engine,) = report.engines
    assert engine.accuracy == report.accuracy.onnx
    assert engine.verdict in ("faster", "not faster", "unstable")
    laps = json.loads(gzip.decompress((finished / "engines/ort-cpu.fp32.latency.json.gz").read_bytes()))
    assert len(laps["pruned_laps_ms"]) == engine.latency_ms.n


def test_a_pruned_network_is_rebuilt_in_a_new_process_bit_for_bit(finished):
    code = (
        "import sys, numpy as np, torch\n"
        "from pathlib import Path\n"
        "from chip_deploy.pipeline.stages import load_pruned\n"
        "bundle = Path(sys.argv[1])\n"
        "golden = np.load(bundle / 'golden.npz')\n"
        "with torch.no_grad():\n"
        "    out = torch.cat([load_pruned(bundle)(i) for i in torch.from_numpy(golden['input']).split(1)])\n"
        "assert np.array_equal(out.numpy(), golden['output']), abs(out.numpy() - golden['output']).max()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(finished)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_golden_outputs_are_not_all_alike(finished):
    golden = np.load(finished / "golden.npz")
    assert golden["input"].shape[1:] == (3, 32, 32)
    assert np.ptp(golden["output"]) > 0.1


def test_resuming_a_finished_run_changes_nothing(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    done = _run(finished, finished.parent / "cache", "--resume")
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_folder_is_ones_own_whose_recipe_is_older_than_some_settings(tmp_path):
    recipe = load_recipe(None, {"model.name": "resnet20", "data.name": "digits", "prune.macs": 0.5})
    text = recipe_toml(recipe)
    (tmp_path / "recipe.toml").write_text(text[: text.index("[build]")] + text[text.index("[measure]") :], "utf-8")
    require_own_folder(tmp_path, recipe)
    with pytest.raises(ValueError, match="another recipe"):
        require_own_folder(tmp_path, recipe.model_copy(update={"seed": 1}))


def test_another_recipe_does_not_touch_a_finished_run(finished, capsys):
    before = sorted(path.read_bytes() for path in finished.rglob("*") if path.is_file())
    assert main(["prune", *QUICK, "--out", str(finished), "--set", "seed=1"]) == 2
    assert "another recipe" in capsys.readouterr().err
    assert sorted(path.read_bytes() for path in finished.rglob("*") if path.is_file()) == before


def test_a_run_killed_before_it_wrote_its_recipe_can_be_resumed(tmp_path):
    from chip_deploy.pipeline.recipe import load_recipe
    from chip_deploy.pipeline.run_folder import require_own_folder

    recipe = load_recipe(None, {"model.name": "resnet20", "data.name": "digits", "prune.macs": 0.5})
    (tmp_path / ".work").mkdir()
    require_own_folder(tmp_path, recipe)
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="not empty"):
        require_own_folder(tmp_path, recipe)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no advisory folder locks")
def test_two_runs_cannot_share_a_folder(tmp_path):
    from chip_deploy.pipeline.alone import alone_in

    with alone_in(tmp_path), pytest.raises(ValueError, match="another run is working"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_a_damaged_cache_is_not_used(tmp_path):
    from chip_deploy.pipeline.dense import filled_from
    from chip_deploy.pipeline.models import build_model

    model = build_model("resnet20", num_classes=10, seed=0).module
    (tmp_path / "dense.safetensors").write_bytes(b"not tensors")
    assert not filled_from(tmp_path / "dense.safetensors", model)
    assert not filled_from(tmp_path / "missing.safetensors", model)


def test_a_finished_run_is_used_again_only_while_its_inputs_are_the_same(tmp_path, monkeypatch, capsys):
    from chip_deploy.pipeline.models import build_model

    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "weights.pt"
    quick = [
        "prune", "--model", "resnet20", "--data", "random:8", "--macs", "0.6", "--target", "ort-cpu", "--weights",
        str(weights), "--set", "prune.round_to=4", "--set", "score.images=4", "--set", "tune.epochs=0", "--set",
        "measure.seconds=0.05", "--set", "measure.laps=20", "--set", "measure.openings=1",
        "--set", "measure.warmup_ms=1", "--out", "bundle", "--resume",
    ]  # fmt: skip
    torch.save(build_model("resnet20", num_classes=None, seed=1).module.state_dict(), weights)
    assert main(quick) == 0
    first = (tmp_path / "bundle" / "model.safetensors").read_bytes()
    assert main(quick) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    torch.save(build_model("resnet20", num_classes=None, seed=2).module.state_dict(), weights)
    assert main(quick) == 0
    assert "nothing is left to do" not in capsys.readouterr().out
    assert (tmp_path / "bundle" / "model.safetensors").read_bytes() != first


def test_code_of_the_user_that_changed_is_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = (
        "from torch import nn\n"
        "def build(num_classes=10):\n"
        "    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(16, num_classes))\n"
    )
    quick = [
        "prune", "--model", "usernet_a:build", "--data", "random:8", "--ratio", "0.5", "--target", "ort-cpu",
        "--set", "data.size=16", "--set", "prune.round_to=1", "--set", "tune.epochs=0", "--set", "score.images=4",
        "--set", "measure.seconds=0.05", "--set", "measure.laps=20", "--set", "measure.openings=1",
        "--out", "bundle", "--resume",
    ]  # fmt: skip
    (tmp_path / "usernet_a.py").write_text(net)
    assert main(quick) == 0
    (tmp_path / "usernet_a.py").write_text(net.replace("nn.ReLU()", "nn.SiLU()"))
    sys.modules.pop("usernet_a")
    assert main(quick) == 0
    assert "nothing is left to do" not in capsys.readouterr().out


def test_a_large_loss_of_accuracy_is_said_aloud():
    from chip_deploy.pipeline.report import Accuracy
    from chip_deploy.pipeline.run_report import collapse_warnings

    (warning,) = collapse_warnings(Accuracy(n=100, dense=0.95, onnx=0.71))
    assert "95.0% to 71.0%" in warning
    assert collapse_warnings(Accuracy(n=100, dense=0.95, onnx=0.94)) == []
    assert collapse_warnings(Accuracy()) == []


def test_a_changed_file_is_found(finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    with (copy / "model.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"x")
    assert main(["verify", str(copy)]) == 6
    assert "model.onnx" in capsys.readouterr().err


def test_an_engine_is_built_and_measured_again_without_torch(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'torchvision', 'torch_pruning', 'lightning', 'onnx'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from chip_deploy.pipeline.cli import main\n"
        "for arguments in (['build', sys.argv[1], '--target', 'ort-cpu'], ['measure', sys.argv[1]],\n"
        "                  ['verify', sys.argv[1]]):\n"
        "    code = main(arguments)\n"
        "    assert code == 0, (arguments, code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (engine,) = read_report(copy).engines
    assert engine.latency_ms is not None
    assert engine.agreement.top1_agreement == 1.0
    assert engine.accuracy is None  # this engine's file is new, and there is no evaluation data on the device


def test_ctrl_c_exits_130_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "bundle"
    process = subprocess.Popen(
        _command(out), env=_environment(tmp_path / "cache"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not any(out.glob(".work/dense.epochs/*.ckpt")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume" in err
    assert "Traceback" not in err


def test_a_dry_run_shows_the_widths_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["prune", *QUICK, "--dry-run", "--out", str(tmp_path / "bundle"), "--json"]) == 0
    preview = json.loads(capsys.readouterr().out)
    assert preview["macs_after"] <= 0.6 * preview["macs_before"]
    assert any(row["after"] < row["before"] for row in preview["rows"])
    assert list(tmp_path.iterdir()) == []


def test_scores_are_written_and_name_what_was_scored(tmp_path, monkeypatch):
    from chip_deploy.chip.scores import ChannelScores

    monkeypatch.setenv("CHIP_DEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    out = tmp_path / "scores.safetensors"
    arguments = ["--model", "resnet20", "--data", "random:8", "--set", "score.images=4", "--out", str(out)]
    assert main(["score", *arguments]) == 0
    found = ChannelScores.from_file(str(out))
    assert found.images == 4
    assert found.scores["layer3.0.conv2"].shape == (64,)
    assert all(torch.isfinite(scores).all() for scores in found.scores.values())
