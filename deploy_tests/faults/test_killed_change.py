"""A bundle whose change was cut off, shared or damaged: the next command brings it to its right state."""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chip_deploy.export.bundle import read_manifest, verify_bundle, write_manifest
from chip_deploy.export.errors import BuildFailed, IntegrityError
from chip_deploy.export.target import read_engine, sidecar_path
from chip_deploy.export.target_ort import OrtCpuTarget
from chip_deploy.pipeline.alone import alone_in
from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.report import read_report, write_report

on_posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL and no advisory folder locks")
ENGINE = "engines/ort-cpu.fp32.engine"
FP16 = "engines/ort-cpu.fp16.engine"
NET = """
from torch import nn

def build():
    convolutions = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
"""
KILLED = """
import os, sys
from chip_deploy.pipeline.cli import main
{place}
sys.exit(main(sys.argv[1:]))
"""
# Where the process ends itself: as a SIGKILL does, no clean-up of Python's runs.
PLACES = {
    "the engine is written under another name": "import chip_deploy.export.target as module\n"
    "module.sha256_file = lambda path: os.kill(os.getpid(), 9)",
    "engine and sidecar are new": "import chip_deploy.pipeline.device as module\n"
    "module.agreement_check = lambda golden: lambda session, engine: os.kill(os.getpid(), 9)",
    "the report is new": "import chip_deploy.pipeline.device as module\n"
    "module.write_manifest = lambda *_, **__: os.kill(os.getpid(), 9)",
    "the manifest is new": "import chip_deploy.pipeline.device as module\n"
    "whole = module.write_manifest\n"
    "module.write_manifest = lambda *given, **named: (whole(*given, **named), os.kill(os.getpid(), 9))",
    "the old files are being put back": "import chip_deploy.pipeline.device as module\n"
    "import chip_deploy.pipeline.undo as undo\n"
    "module.write_manifest = lambda *_, **__: 1 / 0\n"
    "put_back = undo.Path.replace\n"
    "def once(path, to):\n"
    "    put_back(path, to)\n"
    "    if path.name.isdigit():\n"
    "        os.kill(os.getpid(), 9)\n"
    "undo.Path.replace = once",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine in two precisions."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "net_for_killed_builds.py").write_text(NET)
    arguments = ["prune", "--model", "net_for_killed_builds:build", "--data", "random:16", "--ratio", "0.5"]
    quick = ("data.size=16", "tune.epochs=0", "score.images=8", "measure.seconds=0.05", "measure.laps=20")
    for setting in (*quick, "measure.openings=1", "measure.warmup_ms=10"):
        arguments += ["--set", setting]
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
        patch.syspath_prepend(folder)
        code = main([*arguments, "--precision", "fp32,fp16", "--target", "ort-cpu", "--out", str(folder / "bundle")])
    assert code == 0, err.getvalue()
    return folder / "bundle"


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(made, tmp_path / "bundle")


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def kill(place: str, *command: str) -> None:
    """The command, killed at that place."""
    code = KILLED.format(place=PLACES[place])
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def said_by(capsys: pytest.CaptureFixture[str]) -> str:
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return said


@on_posix
@pytest.mark.parametrize("place", PLACES)
def test_after_a_killed_build_the_next_one_works(bundle: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    kill(place, "build", str(bundle), "--target", "ort-cpu", "--precision", "fp32")
    if place != "the manifest is new":  # there the bundle is whole
        assert main(["verify", str(bundle)]) == 6
        assert "run `chip-deploy build` or `chip-deploy measure`" in said_by(capsys)
    assert main(["build", str(bundle), "--target", "ort-cpu"]) == 0
    verify_bundle(bundle)
    assert not [path for path in contents(bundle) if Path(path).name.startswith(".") or path.startswith(".work")]


@on_posix
@pytest.mark.parametrize("place", PLACES)
def test_what_a_killed_build_changed_is_undone_to_the_last_byte(bundle: Path, place: str) -> None:
    before = contents(bundle)
    kill(place, "build", str(bundle), "--target", "ort-cpu", "--precision", "fp32")
    assert main(["build", str(bundle), "--target", "ort-cpu", "--precision", "int8"]) == 2  # which it does not hold
    assert contents(bundle) == before


@on_posix
def test_a_target_that_had_no_engine_has_none_after_a_killed_build(bundle: Path) -> None:
    shutil.rmtree(bundle / "engines")
    report, manifest = read_report(bundle), read_manifest(bundle)
    write_report(report.model_copy(update={"engines": []}), bundle)
    write_manifest(bundle, versions=manifest.versions, lineage=manifest.lineage)
    before = contents(bundle)
    kill("the report is new", "build", str(bundle), "--target", "ort-cpu", "--precision", "fp32")
    assert contents(bundle) != before
    assert main(["build", str(bundle), "--target", "ort-cpu", "--precision", "int8"]) == 2
    assert contents(bundle) == before


@on_posix
@pytest.mark.parametrize("command", ["measure", "report"])
def test_after_a_command_killed_before_the_manifest_every_command_works(bundle: Path, command: str) -> None:
    before = contents(bundle)
    (bundle / "report.md").write_text("an older page")
    manifest = read_manifest(bundle)
    write_manifest(bundle, versions=manifest.versions, lineage=manifest.lineage)
    kill("the report is new", command, str(bundle))
    assert main(["verify", str(bundle)]) == 6
    assert main([command, str(bundle)]) == 0
    verify_bundle(bundle)
    assert contents(bundle).keys() == before.keys()
    assert contents(bundle)["report.md"] != b"an older page"


def test_a_record_that_points_outside_the_bundle_is_not_followed(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("dear")
    (bundle / ".work" / "undo").mkdir(parents=True)
    (bundle / ".work" / "undo" / "undo.json").write_text('{"before": {"../mine": null}}')
    assert main(["build", str(bundle), "--target", "ort-cpu"]) == 6
    assert (tmp_path / "mine").read_text() == "dear"


@on_posix
@pytest.mark.parametrize(
    "command",
    [
        ["build", "--target", "ort-cpu"],
        ["build", "--target", "trt", "--set", "build.tf32=false"],
        ["measure"],
        ["report"],
    ],
)
def test_one_command_at_a_time_changes_a_bundle(
    bundle: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(bundle)
    with alone_in(bundle):
        assert main([command[0], str(bundle), *command[1:]]) == 2
    assert "another run is working in" in said_by(capsys)
    assert contents(bundle) == before


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("damage", [cut_off, Path.unlink], ids=["cut off", "missing"])
@pytest.mark.parametrize("suffix", [".engine", ".json", ".latency.json.gz"])
def test_damaged_files_of_an_engine_are_made_anew_by_build(
    bundle: Path, suffix: str, damage: Callable[[Path], Any]
) -> None:
    damage((bundle / ENGINE).with_suffix("").with_name(f"ort-cpu.fp32{suffix}"))
    with pytest.raises(IntegrityError, match=r"run `chip-deploy build`\."):
        verify_bundle(bundle)
    assert main(["build", str(bundle), "--target", "ort-cpu", "--precision", "fp32"]) == 0
    verify_bundle(bundle)


def _swap_pairs(bundle: Path) -> None:
    for suffix in (".engine", ".json"):
        one, other = ((bundle / name).with_suffix(suffix) for name in (ENGINE, FP16))
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)


def _say_int8(bundle: Path) -> None:
    sidecar = sidecar_path(bundle / ENGINE)
    sidecar.write_text(read_engine(bundle / ENGINE).model_copy(update={"precision": "int8"}).model_dump_json())


def _put_another_engine(bundle: Path) -> None:
    engine = read_engine(bundle / ENGINE)
    data = (bundle / ENGINE).read_bytes() + b"\0"
    (bundle / ENGINE).write_bytes(data)
    other = engine.model_copy(update={"sha256": hashlib.sha256(data).hexdigest()})
    sidecar_path(bundle / ENGINE).write_text(other.model_dump_json())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_swap_pairs, "its file is engines/ort-cpu.fp16.engine, and the report says engines/ort-cpu.fp32.engine"),
        (_say_int8, "its precision is int8, and the report says fp32"),
        (_put_another_engine, "its sha256 is "),
    ],
)
def test_an_engine_that_is_not_the_one_of_the_report_is_not_measured_even_if_the_manifest_was_written_again(
    bundle: Path, change: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(bundle)
    was = read_manifest(bundle)
    write_manifest(bundle, versions=was.versions, lineage=was.lineage)
    before = contents(bundle)
    assert main(["measure", str(bundle)]) == 6
    said = said_by(capsys)
    assert f"engines/ort-cpu.fp32.json: {words}" in said
    assert said.rstrip().endswith("it belongs to another engine. Build the engine again.")
    assert contents(bundle) == before


def test_what_is_left_of_writing_an_engine_does_not_stop_its_build(bundle: Path) -> None:
    (bundle / "engines" / ".ort-cpu.fp32.engine.part").write_bytes(b"half")
    assert main(["build", str(bundle), "--target", "ort-cpu"]) == 0
    verify_bundle(bundle)


def test_a_damaged_engine_of_another_precision_stops_a_build(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut_off(bundle / FP16)
    before = contents(bundle)
    assert main(["build", str(bundle), "--target", "ort-cpu", "--precision", "fp32"]) == 6
    assert "ort-cpu.fp16.engine" in said_by(capsys)
    assert contents(bundle) == before


def test_a_damaged_engine_whose_own_build_failed_is_still_damaged_by_the_manifest(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off((bundle / FP16).with_suffix(".json"))
    build = OrtCpuTarget._build

    def only_fp32(self: OrtCpuTarget, onnx_path: Path, engine_path: Path) -> Any:
        if "fp16" in onnx_path.name:
            raise BuildFailed("no fp16 today")
        return build(self, onnx_path, engine_path)

    monkeypatch.setattr(OrtCpuTarget, "_build", only_fp32)
    assert main(["build", str(bundle), "--target", "ort-cpu"]) == 1
    built = next(row for row in read_report(bundle).engines if row.file == ENGINE)
    assert "built, and not measured since" in built.reason
    with pytest.raises(IntegrityError, match=r"ort-cpu\.fp16\.json"):
        verify_bundle(bundle)


def test_engines_that_cannot_run_here_are_told_of_with_the_age_of_their_numbers(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cannot_run = OrtCpuTarget._cannot_run

    def not_in_fp16(self: OrtCpuTarget, engine: Any) -> str | None:
        return "made for another onnxruntime" if engine.precision == "fp16" else cannot_run(self, engine)

    monkeypatch.setattr(OrtCpuTarget, "_cannot_run", not_in_fp16)
    assert main(["measure", str(bundle)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"not measured: {FP16}: made for another onnxruntime; the report keeps the numbers of an earlier" in said
    assert f"not measured: {ENGINE}" not in said
    assert main(["build", str(bundle), "--target", "ort-cpu", "--precision", "fp16"]) == 0
    capsys.readouterr()
    assert main(["measure", str(bundle)]) == 0
    assert f"not measured: {FP16}: made for another onnxruntime." in " ".join(capsys.readouterr().out.split())


def test_a_full_disk_is_told_with_the_file_and_what_to_do(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name == ".report.md.part":
            raise OSError(28, os.strerror(28))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["build", str(bundle), "--target", "ort-cpu", "--precision", "fp32"]) == 1
    said = said_by(capsys)
    assert said.endswith(f"{bundle / 'report.md'}: {os.strerror(28)}; free space, and run the command again.")
    verify_bundle(bundle)
