"""A bundle that `build` cannot use: one sentence, the documented exit code, and the bundle as it was."""

import contextlib
import importlib.util
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from chip_deploy.export.bundle import read_manifest, verify_bundle, write_manifest
from chip_deploy.export.errors import IntegrityError
from chip_deploy.export.onnx_export import INPUT
from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.report import read_report

NO_RTX = importlib.util.find_spec("tensorrt_rtx") is None
TARGETS = [
    "ort-cpu",
    "torch:eager",
    pytest.param("trt-rtx:sm89", marks=pytest.mark.skipif(NO_RTX, reason="tensorrt-rtx has no wheel here")),
]
on_posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file sizes")
every_target = pytest.mark.parametrize("target", TARGETS)
onnx_targets = pytest.mark.parametrize("target", [target for target in TARGETS if target != "torch:eager"])
NET = """
from torch import nn

def build():
    convolutions = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
"""
# A limit on the size of each file stands in for a full disk: writing fails in the same places.
FULL = """
import resource, sys
from chip_deploy.pipeline.cli import main
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(["build", sys.argv[1], "--target", sys.argv[2]]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine of every target that builds without a GPU."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "net_for_bad_builds.py").write_text(NET)
    arguments = ["prune", "--model", "net_for_bad_builds:build", "--data", "random:16", "--ratio", "0.5"]
    for target in ("ort-cpu", "torch:eager", *(() if NO_RTX else ("trt-rtx:sm89",))):
        arguments += ["--target", target]
    quick = ("data.size=16", "tune.epochs=0", "score.images=8", "measure.seconds=0.05", "measure.laps=20")
    for setting in (*quick, "measure.openings=1"):
        arguments += ["--set", setting]
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
        patch.syspath_prepend(folder)
        code = main([*arguments, "--out", str(folder / "bundle")])
    assert code == 0, err.getvalue()
    return folder / "bundle"


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(made, tmp_path / "bundle")


def reissue(bundle: Path) -> None:
    """The manifest names the files as they are now: a bundle that was made wrong, not one that was changed."""
    manifest = read_manifest(bundle)
    write_manifest(bundle, versions=manifest.versions, lineage=manifest.lineage)


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def refused(bundle: Path, target: str, capsys: pytest.CaptureFixture[str], code: int, *more: str) -> str:
    """The one sentence with which `build` ends; the bundle is what it was."""
    before = contents(bundle)
    assert main(["build", str(bundle), "--target", target, *more]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in errors[0]
    assert errors[0].endswith((".", "?"))
    assert contents(bundle) == before
    return errors[0]


def edit(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Both networks changed as ONNX, with a manifest that agrees."""
    for name in ("model.onnx", "dense.onnx"):
        proto = onnx.load(bundle / name)
        change(proto)
        (bundle / name).write_bytes(proto.SerializeToString())
    reissue(bundle)


@every_target
def test_what_is_no_network(bundle: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model.onnx", "model.pt2"):
        (bundle / name).write_bytes(b"hello\n")
    reissue(bundle)
    assert "model." in refused(bundle, target, capsys, 1)


@every_target
def test_an_empty_network(bundle: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model.onnx", "model.pt2"):
        (bundle / name).write_bytes(b"")
    reissue(bundle)
    assert "model." in refused(bundle, target, capsys, 1)


@every_target
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_network_that_was_cut_off(bundle: Path, target: str, kept: float, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model.onnx", "model.pt2"):
        whole = (bundle / name).read_bytes()
        (bundle / name).write_bytes(whole[: int(kept * len(whole))])
    reissue(bundle)
    assert "model." in refused(bundle, target, capsys, 1)


@every_target
def test_a_network_that_was_changed_after_it_was_made_is_an_integrity_error(
    bundle: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b" ")
    assert "model.onnx" in refused(bundle, target, capsys, 6)


@onnx_targets
def test_an_operator_that_nobody_knows_is_named_with_its_node(
    bundle: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def strange(proto: onnx.ModelProto) -> None:
        relu = next(node for node in proto.graph.node if node.op_type == "Relu")
        relu.op_type, relu.name = "Frobnicate", "the_strange_one"

    edit(bundle, strange)
    said = refused(bundle, target, capsys, 1)
    assert "the_strange_one" in said
    assert "Frobnicate" in said


@onnx_targets
def test_an_opset_that_is_too_new_is_named(bundle: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    def from_the_future(proto: onnx.ModelProto) -> None:
        for entry in proto.opset_import:
            entry.version = 99

    edit(bundle, from_the_future)
    said = refused(bundle, target, capsys, 1)
    assert "99" in said
    assert "pset" in said


@onnx_targets
def test_a_network_of_another_input_is_refused_or_named(
    bundle: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_channels(proto: onnx.ModelProto) -> None:
        axes = next(value for value in proto.graph.input if value.name == INPUT).type.tensor_type.shape.dim
        axes[1].dim_value = 5

    edit(bundle, other_channels)
    assert "model.onnx" in refused(bundle, target, capsys, 1)


def test_a_bundle_without_its_engines_gets_them_back_target_by_target(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(bundle / "engines")
    targets = list(dict.fromkeys(row.target for row in read_report(bundle).engines))
    assert len(targets) > 1
    for target in targets:
        with pytest.raises(IntegrityError, match=r"missing from .* run `chip-deploy build`\."):
            verify_bundle(bundle)
        assert main(["build", str(bundle), "--target", target]) == 0, capsys.readouterr().err
    lost = {entry.path for entry in read_manifest(bundle).files if not (bundle / entry.path).exists()}
    assert lost == set()
    verify_bundle(bundle)


@every_target
def test_a_bundle_without_the_network(bundle: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model.onnx", "model.pt2"):
        (bundle / name).unlink()
    reissue(bundle)
    assert "model.onnx" in refused(bundle, target, capsys, 2)


def test_a_bundle_that_was_not_made_for_torch_says_how_to_get_its_program(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "model.pt2").unlink()
    reissue(bundle)
    said = refused(bundle, "torch:eager", capsys, 2)
    assert "model.pt2: no such torch program" in said
    assert "--target torch" in said


@every_target
def test_a_precision_that_the_bundle_does_not_hold_is_told_with_the_way_to_get_it(
    bundle: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(bundle, target, capsys, 2, "--precision", "fp16")
    assert "model.fp16.onnx" in said
    assert "--precision fp32,fp16" in said


def test_a_precision_that_the_target_refuses(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "takes no int8" in refused(bundle, "torch:eager", capsys, 3, "--precision", "int8")


def test_a_precision_that_there_is_not(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "int9" in refused(bundle, "ort-cpu", capsys, 2, "--precision", "int9")


@pytest.mark.skipif(NO_RTX, reason="tensorrt-rtx has no wheel here")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shapes", "image:1x3x16x16"], ["image", "input"]),
        (["--shapes", "input:1x3x32x32"], ["input", "32"]),
        (["--shapes", "input:1x3x16"], ["input", "1x3x16"]),
        (["--shapes", "input:1x3x16x16/2x3x16x16/4x3x16x16"], ["input"]),
        (["--shapes", "input"], ["input"]),
        (["--shapes", "input:0x3x16x16"], ["0x3x16x16"]),
        (["--builds", "2"], ["builds"]),
        (["--set", "build.optimisation_level=3"], ["optimisation_level", "optimization_level"]),
        (["--set", "build.optimization_level=9"], ["optimization_level"]),
    ],
)
def test_options_that_the_network_or_the_builder_cannot_have(
    bundle: Path, options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(bundle, "trt-rtx:sm89", capsys, 2, *options)
    for word in words:
        assert word in said, said


@on_posix
@every_target
@pytest.mark.parametrize("fits", ["nothing", "half of the engine"])
def test_a_disk_that_is_full_of_an_engine_leaves_the_bundle_as_it_was(bundle: Path, target: str, fits: str) -> None:
    engine = bundle / "engines" / f"{target.replace(':', '-')}.fp32.engine"
    limit = 16 if fits == "nothing" else engine.stat().st_size // 2
    build_on_a_full_disk(bundle, target, limit)


@on_posix
@pytest.mark.parametrize("target", ["ort-cpu", "torch:eager"])
def test_a_disk_that_is_full_behind_the_engine_leaves_the_bundle_as_it_was(bundle: Path, target: str) -> None:
    assert main(["build", str(bundle), "--target", target]) == 0
    pages = {path.suffix: path.stat().st_size for path in bundle.glob("report.*")}
    engine = bundle / "engines" / f"{target.replace(':', '-')}.fp32.engine"
    limit = pages[".html"] - 100  # the same page is written again: its last bytes do not fit
    assert limit > max(engine.stat().st_size, pages[".json"], pages[".md"])
    build_on_a_full_disk(bundle, target, limit)


def build_on_a_full_disk(bundle: Path, target: str, limit: int) -> None:
    """One sentence, exit code 1, and not a byte of the bundle is another one."""
    before = contents(bundle)
    command = [sys.executable, "-c", FULL, str(bundle), target, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said.endswith(".")
    assert "Traceback" not in done.stderr
    assert contents(bundle) == before
    verify_bundle(bundle)
