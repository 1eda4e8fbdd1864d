"""Each command does on a real bundle what its help says, and says so on the right stream with the right exit code."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from chip_deploy.export.gate import GateResult, GateRow
from chip_deploy.pipeline.cli import main


class Run(NamedTuple):
    """A finished `prune --json`: where it went and what it printed."""

    bundle: Path
    code: int
    out: str
    err: str


NET = """
from torch import nn

def build():
    convolutions = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The smallest run there is: a user's net of two convolutions with drawn weights, on noise, untuned, a few laps."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "two_convolutions.py").write_text(NET)
    arguments = ["prune", "--model", "two_convolutions:build", "--data", "random:16", "--ratio", "0.5"]
    quick = ("data.size=16", "tune.epochs=0", "score.images=8", "measure.seconds=0.05", "measure.laps=20")
    for setting in (*quick, "measure.openings=1"):
        arguments += ["--set", setting]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.syspath_prepend(folder)
        code = main([*arguments, "--out", str(folder / "bundle"), "--json"])
    return Run(folder / "bundle", code, out.getvalue(), err.getvalue())


@pytest.fixture
def bundle(run: Run, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(run.bundle, tmp_path / "bundle")


def test_prune_with_json_prints_the_report_alone_on_stdout(run: Run) -> None:
    assert run.code == 0, run.err
    assert json.loads(run.out) == json.loads((run.bundle / "report.json").read_text("utf-8"))


def test_prune_with_json_shows_stages_table_and_report_on_stderr(run: Run) -> None:
    lines = run.err.splitlines()
    for stage in ("dense", "score", "plan", "cut", "tune", "export", "agree", "build", "measure", "report"):
        assert [line for line in lines if line.split()[:1] == [stage] and line.endswith(" s")], stage
    assert any("Speed-up" in line for line in lines)
    assert lines[-1] == f"Report: {run.bundle / 'report.html'}"


def test_verify_counts_the_files(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run.bundle)]) == 0
    listed = json.loads((run.bundle / "manifest.json").read_text("utf-8"))["files"]
    assert capsys.readouterr().out == f"{len(listed)} files, each as the manifest says.\n"


def test_report_writes_the_pages_again_and_keeps_the_manifest_true(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (bundle / "report.md").read_text("utf-8")
    assert main(["report", str(bundle)]) == 0
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted([str(bundle / "report.md"), str(bundle / "report.html")])
    assert (bundle / "report.md").read_text("utf-8") == before
    assert main(["verify", str(bundle)]) == 0


def test_report_does_not_bless_a_changed_file(bundle: Path) -> None:
    with (bundle / "plan.json").open("a") as file:
        file.write(" ")
    assert main(["report", str(bundle)]) == 6
    assert main(["verify", str(bundle)]) == 6


def test_build_and_measure_bring_the_bundle_up_to_date(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(bundle), "--target", "ort-cpu"]) == 0
    assert "engines/ort-cpu.fp32.engine: " in capsys.readouterr().out
    assert main(["measure", str(bundle), "--target", "ort-cpu"]) == 0
    assert "ort-cpu fp32" in capsys.readouterr().out
    assert main(["verify", str(bundle)]) == 0


def test_a_target_that_cannot_be_used_exits_3_with_the_way_out(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from chip_deploy.export.target import parse_target
    from chip_deploy.export.targets import make_target

    if make_target(parse_target("trt")).unusable() is None:
        pytest.skip("TensorRT can be used on this machine")
    assert main(["build", str(bundle), "--target", "trt"]) == 3
    assert "--target trt-rtx:sm89" in capsys.readouterr().err
    out = tmp_path / "other"
    assert main(["prune", "--model", "a", "--data", "b", "--ratio", "0.5", "--target", "trt", "--out", str(out)]) == 3
    assert "--target trt-rtx:sm89" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(("limit", "code", "status"), [("size<=1GB", 0, "met"), ("size<=1B", 4, "failed")])
def test_gate_exits_by_what_the_bundle_meets(
    run: Run, limit: str, code: int, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gate", str(run.bundle), "--require", limit]) == code
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{status}: engines/ort-cpu.fp32.engine: size")


def test_gate_is_inconclusive_about_an_accuracy_that_does_not_exist(run: Run) -> None:
    assert main(["gate", str(run.bundle), "--require", "size<=1GB", "--require", "top1_drop<=1"]) == 5


def test_gate_with_json_prints_its_rows_alone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", str(run.bundle), "--require", "size<=1B", "--json"]) == 4
    result = json.loads(capsys.readouterr().out)
    assert result["exit_code"] == 4
    assert GateRow.model_validate(result["rows"][-1]).status == "failed"
    assert GateResult.model_validate({"rows": result["rows"]}).exit_code == 4


def test_gate_fails_a_bundle_whose_outputs_are_others(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = GateRow(
        requirement="parity",
        engine="model.onnx",
        estimate=None,
        bound=None,
        status="failed",
        sentence="outputs differ.",
    )
    monkeypatch.setattr("chip_deploy.export.gate.check_gate", lambda *_args, **_options: GateResult(rows=[wrong]))
    assert main(["gate", str(run.bundle), "--require", "size<=1GB"]) == 4
    assert "failed: outputs differ." in capsys.readouterr().out
