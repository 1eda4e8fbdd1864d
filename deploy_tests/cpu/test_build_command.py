"""`chip-deploy build` with its options: what reaches the sidecar, and what is refused with the bundle left alone."""

import contextlib
import importlib.util
import io
import shutil
from pathlib import Path

import pytest

from chip_deploy.export.bundle import read_manifest, verify_bundle, write_manifest
from chip_deploy.export.nvidia import Gpu, find_gpu
from chip_deploy.export.target import BuildOptions, built_with, read_engine
from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.device import build_options
from chip_deploy.pipeline.report import read_report, write_report

NO_RTX = importlib.util.find_spec("tensorrt_rtx") is None
needs_rtx = pytest.mark.skipif(NO_RTX, reason="tensorrt-rtx is not installed (it has wheels for x86-64 only)")
needs_no_gpu = pytest.mark.skipif(
    isinstance(find_gpu(), Gpu), reason="this machine has a GPU; this is about having none"
)
NET = """
from torch import nn

def build():
    convolutions = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
"""
SETTINGS = (
    *("data.size=16", "tune.epochs=0", "score.images=8", "export.dynamic_batch=true"),
    *("measure.seconds=0.05", "measure.laps=20", "measure.openings=1", "measure.warmup_ms=10"),
)
PLANNED = {"workspace_mib": 512, "optimization_level": 2, "builds": 3}
RTX = "engines/trt-rtx-sm89.fp32.engine"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest run there is, with a free batch and a recipe that says how engines are built."""
    folder = tmp_path_factory.mktemp("build")
    (folder / "two_convolutions_to_build.py").write_text(NET)
    arguments = ["prune", "--model", "two_convolutions_to_build:build", "--data", "random:16", "--ratio", "0.5"]
    for setting in SETTINGS:
        arguments += ["--set", setting]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.syspath_prepend(folder)
        assert main([*arguments, "--out", str(folder / "bundle")]) == 0, said.getvalue()
    _plan_engines(folder / "bundle")
    return folder / "bundle"


def _plan_engines(bundle: Path) -> None:
    """The bundle's recipe as of a run that had a TensorRT target as well, which not every machine has."""
    report, was = read_report(bundle), read_manifest(bundle)
    planned = report.recipe | {"build": report.recipe["build"] | PLANNED}
    write_report(report.model_copy(update={"recipe": planned}), bundle)
    write_manifest(bundle, versions=was.versions, lineage=was.lineage)


@pytest.fixture
def bundle(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(finished, tmp_path / "bundle")


def contents(bundle: Path) -> dict[str, bytes]:
    return {str(path.relative_to(bundle)): path.read_bytes() for path in sorted(bundle.rglob("*")) if path.is_file()}


@needs_rtx
def test_shapes_and_settings_reach_the_engine_on_top_of_the_recipe(bundle: Path) -> None:
    shapes = ["--shapes", "input:1x3x16x16", "--shapes", "input:2x3x16x16/4x3x16x16/8x3x16x16"]
    assert main(["build", str(bundle), "--target", "trt-rtx:sm89", *shapes, "--set", "build.tf32=false"]) == 0
    engine = read_engine(bundle / RTX)
    assert [profile["input"][2][0] for profile in engine.flags["profiles"]] == [1, 8]
    assert built_with(engine) == BuildOptions(shapes=tuple(shapes[1::2]), tf32=False, workspace_mib=512)
    verify_bundle(bundle)


@needs_rtx
@pytest.mark.parametrize("options", [[], ["--set", "build.cuda_graph=true"]], ids=["no options", "one"])
def test_an_engine_is_built_as_the_recipe_says_without_what_the_recipe_has_for_other_targets(
    bundle: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(bundle), "--target", "trt-rtx:sm89", *options]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    left_out = "without effect on target 'trt-rtx:sm89', and left out there: build.optimization_level, build.builds"
    assert said.count(left_out) == 1
    assert read_engine(bundle / RTX).flags["options"] == {"workspace_mib": 512}
    assert {name: read_report(bundle).recipe["build"][name] for name in PLANNED} == PLANNED
    verify_bundle(bundle)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--shapes", "input=1x3x16x16"], "NAME:SHAPE or NAME:MIN/OPT/MAX expected"),
        (["--shapes", "image:1x3x16x16"], "no input 'image'. The network has: input."),
        (["--shapes", "input:1x3x32x32"], "axis 2 of (any, 3, 16, 16) is fixed"),
        (
            ["--builds", "3"],
            "build.builds has no effect: TensorRT-RTX times no kernels, so two builds differ in the names",
        ),
        (["--set", "build.optimization_level=2"], "build.optimization_level has no effect on target 'trt-rtx:sm89'."),
        (["--set", "build.version_compatible=true"], "TensorRT-RTX comes without the lean runtime that it takes."),
        (["--builds", "0"], "build.builds: Input should be greater than or equal to 1. Give another value."),
        (["--set", "build.tf23=false"], "unknown key 'build.tf23'. Did you mean 'build.tf32'?"),
        (["--set", "build.tf32=perhaps"], "build.tf32: Input should be a valid boolean"),
        (["--set", "build.builds=2", "--builds", "2"], "'build.builds' is given twice. Give it once."),
        (["--set", "measure.laps=20"], "only the keys of the section build decide how an engine is built."),
        (["--set", "build.hardware_compatibility=ampere-plus"], "is standard TensorRT's. Name the GPUs instead"),
    ],
)
@needs_rtx
def test_a_mistake_is_one_sentence_and_leaves_the_bundle_as_it_was(
    bundle: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(bundle)
    assert main(["build", str(bundle), "--target", "trt-rtx:sm89", *options]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence in said
    assert contents(bundle) == before


@needs_rtx
def test_an_option_that_the_builder_fails_with_leaves_the_bundle_as_it_was(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(bundle)
    assert main(["build", str(bundle), "--target", "trt-rtx:sm89", "--set", "build.workspace_mib=1"]) == 1
    assert "(with workspace_mib=1): " in capsys.readouterr().err
    assert contents(bundle) == before


@needs_rtx
@needs_no_gpu
@pytest.mark.parametrize("option", ["refit", "strip"])
def test_what_is_built_on_a_gpu_alone_is_refused_without_one(
    bundle: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(bundle)
    assert main(["build", str(bundle), "--target", "trt-rtx:sm89", "--set", f"build.{option}=true"]) == 3
    said = f"target 'trt-rtx:sm89' cannot be used here: TensorRT-RTX needs a GPU to build with build.{option}"
    assert said in capsys.readouterr().err
    assert contents(bundle) == before


def test_options_are_those_of_the_recipe_with_what_is_asked_for_on_top(bundle: Path) -> None:
    assert build_options(bundle, "trt", {}) == BuildOptions.model_validate(PLANNED)
    asked = {"builds": 5, "optimization_level": 5}
    assert build_options(bundle, "trt", asked) == BuildOptions.model_validate(PLANNED | asked)


@pytest.mark.parametrize(
    ("target", "options", "sentence"),
    [
        ("ort-cpu", ["--set", "build.tf32=false"], "build.tf32 has no effect on target 'ort-cpu'. It takes none."),
        ("ort-cpu", ["--builds", "3"], "build.builds has no effect on target 'ort-cpu'. It takes none."),
        ("torch:eager", ["--shapes", "input:1x3x16x16"], "build.shapes has no effect on target 'torch:eager'."),
        ("ort-cuda", ["--set", "build.refit=true"], "on target 'ort-cuda'. It takes: tf32, cuda_graph. Leave it out."),
        ("trt", ["--set", "build.runtime_cache=false"], "build.runtime_cache has no effect on target 'trt'."),
        ("trt-rtx:sm89", ["--set", "build.timing_cache=false"], "build.timing_cache has no effect on target 'trt-rtx"),
    ],
)
def test_an_option_that_the_target_would_ignore_is_refused(
    bundle: Path, target: str, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(bundle)
    assert main(["build", str(bundle), "--target", target, *options]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence in said
    assert contents(bundle) == before


def test_an_option_at_its_default_ignores_nothing_and_is_taken_by_every_target(bundle: Path) -> None:
    taken = {
        "ort-cpu": BuildOptions(),
        "torch:eager": BuildOptions(),
        "ort-cuda": BuildOptions(),
        "trt": BuildOptions(workspace_mib=512, optimization_level=2),
        "trt-rtx:sm89": BuildOptions(workspace_mib=512),
    }
    assert {target: build_options(bundle, target, {"builds": 1}) for target in taken} == taken


def test_options_of_the_recipe_that_a_target_ignores_are_not_in_its_sidecar(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(bundle), "--target", "ort-cpu"]) == 0
    assert "options" not in read_engine(bundle / "engines/ort-cpu.fp32.engine").flags
    assert "left out there: build.workspace_mib" in " ".join("".join(capsys.readouterr()).split())


def test_a_build_where_no_pages_can_be_made_tells_that_the_old_ones_are_gone(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("report", "device"):
        monkeypatch.setattr(f"chip_deploy.pipeline.{place}.pages_unavailable", lambda: "They need jinja2.")
    told = "removed, because they no longer agreed with the report: report.md, report.html. They need jinja2."
    for times in (1, 0):
        assert main(["build", str(bundle), "--target", "ort-cpu"]) == 0
        assert " ".join("".join(capsys.readouterr()).split()).count(told) == times
    verify_bundle(bundle)


def test_a_changed_bundle_is_an_integrity_error_before_its_report_is_read(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "report.json").write_text("no report any more")
    assert main(["build", str(bundle), "--target", "ort-cpu", "--set", "build.no_such_key=1"]) == 6
    assert "report.json" in capsys.readouterr().err
