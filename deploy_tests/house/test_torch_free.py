"""The device side works without torch, and asking for help loads nothing heavy."""

import contextlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chip_deploy.pipeline.cli import main

ROOT = Path(__file__).resolve().parents[2]
NO_RTX = importlib.util.find_spec("tensorrt_rtx") is None

# What a Jetson does not have; and the runtimes, each of which must be imported only by the target that needs it.
ABSENT = (
    *("torch", "torchvision", "torch_pruning", "lightning", "pytorch_lightning", "onnx", "onnxscript", "safetensors"),
    *("sklearn", "scipy", "PIL", "jinja2", "timm"),
    *("onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"),
)
# What the device is without when it builds: everything that prunes. The runtime at hand may be imported.
PRUNING = ABSENT[: ABSENT.index("onnxruntime")]
HEAVY = (*ABSENT, "numpy", "tomli_w")


def without(packages: tuple[str, ...]) -> str:
    """Code after which these packages are not installed, whichever way one looks for them."""
    return f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {packages!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


BLOCK = without(ABSENT)
DEVICE_SIDE = [
    *(f"export.{path.stem}" for path in sorted((ROOT / "export").glob("[a-z]*.py")) if path.stem != "onnx_export"),
    *(
        "pipeline.alone",
        "pipeline.cli",
        "pipeline.compare",
        "pipeline.compare_page",
        "pipeline.criteria_chart",
        "pipeline.criteria_grid",
        "pipeline.criteria_page",
        "pipeline.criteria_result",
        "pipeline.device",
        "pipeline.display",
        "pipeline.doctor",
        "pipeline.recipe",
        "pipeline.report",
        "pipeline.tables",
        "pipeline.undo",
    ),
]


NET = """
from torch import nn

def build():
    convolutions = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def import_results() -> dict[str, str]:
    """Module -> what its import said, in a process that has none of the absent packages; nothing is built."""
    names = [*DEVICE_SIDE, "export.onnx_export", "pipeline.stages"]
    code = f"""{BLOCK}
import importlib
for name in {names!r}:
    try:
        importlib.import_module("chip_deploy." + name)
        print(name, "imported", sep="\\t")
    except ModuleNotFoundError as err:
        print(name, "needs " + str(err.name), sep="\\t")
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    return dict(line.split("\t") for line in done.stdout.splitlines())


@pytest.mark.parametrize("module", DEVICE_SIDE)
def test_a_module_of_the_device_side_imports_without_torch(module: str, import_results: dict[str, str]) -> None:
    assert import_results[module] == "imported"


def test_the_stages_do_need_torch_so_the_block_works(import_results: dict[str, str]) -> None:
    assert import_results["pipeline.stages"].startswith("needs ")


def test_doctor_runs_without_torch_and_says_how_to_get_it() -> None:
    done = run_python(f"{BLOCK}\nfrom chip_deploy.pipeline.cli import main\nsys.exit(main(['doctor']))")
    assert (done.returncode, done.stderr) == (0, "")
    assert "onnxruntime is not installed" in " ".join(done.stdout.split())


def test_prune_without_torch_says_which_extra_to_install(tmp_path: Path) -> None:
    arguments = ["prune", "--model", "resnet18", "--data", "digits", "--macs", "0.5", "--out", str(tmp_path / "out")]
    done = run_python(f"{BLOCK}\nfrom chip_deploy.pipeline.cli import main\nsys.exit(main({arguments!r}))")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Install chip-deploy[prune]" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["gate", "--help"]])
def test_asking_for_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from chip_deploy.pipeline.cli import main
code = main({arguments!r})
print("LOADED", *sorted(set({HEAVY!r}) & set(sys.modules)))
sys.exit(code)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_the_probe_for_heavy_imports_sees_one() -> None:
    done = run_python(f"import sys, numpy\nprint('LOADED', *sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert done.stdout.split() == ["LOADED", "numpy"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was made where torch is, for a device that has none."""
    folder = tmp_path_factory.mktemp("device")
    (folder / "net_for_the_device.py").write_text(NET)
    arguments = ["prune", "--model", "net_for_the_device:build", "--data", "digits", "--ratio", "0.5"]
    quick = ("data.size=16", "dense.epochs=1", "tune.epochs=0", "score.images=8", "data.eval_images=64")
    laps = ("measure.seconds=0.05", "measure.laps=20", "measure.openings=1")
    calibration = ("quantize.images=32", "quantize.calibration=min-max", "quantize.sensitivity_images=8")
    for setting in (*quick, *laps, *calibration):
        arguments += ["--set", setting]
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
        patch.syspath_prepend(folder)
        assert main([*arguments, "--precision", "fp32,fp16,int8", "--out", str(folder / "bundle")]) == 0, err.getvalue()
    return folder / "bundle"


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(made, tmp_path / "bundle")


def on_the_device(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own that has none of the packages that prune; what it loaded is its last line."""
    return run_python(f"""{without(PRUNING)}
from chip_deploy.pipeline.cli import main
code = main({list(arguments)!r})
print("LOADED", *sorted(set({ABSENT!r}) & set(sys.modules)))
sys.exit(code)
""")


def loaded(done: subprocess.CompletedProcess[str]) -> set[str]:
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.skipif(NO_RTX, reason="tensorrt-rtx is not installed (it has wheels for x86-64 only)")
def test_an_rtx_engine_is_built_on_a_device_without_torch(bundle: Path) -> None:
    done = on_the_device("build", str(bundle), "--target", "trt-rtx:sm86")
    assert done.returncode == 0, done.stderr
    assert loaded(done) <= {"tensorrt_rtx", "cuda"}
    for precision in ("fp32", "fp16", "int8"):
        engine = bundle / "engines" / f"trt-rtx-sm86.{precision}.engine"
        assert json.loads(engine.with_suffix(".json").read_text())["built_for"]["capabilities"] == "sm86"
        assert engine.stat().st_size > 1000
    # Without jinja2 there is nobody to write the pages again, and the old ones would contradict report.json.
    assert sorted(path.name for path in bundle.glob("report.*")) == ["report.json"]
    done = on_the_device("verify", str(bundle))
    assert (done.returncode, loaded(done)) == (0, set()), done.stderr


def test_a_device_with_onnxruntime_alone_builds_measures_and_judges(bundle: Path) -> None:
    for arguments, code in (
        (["build", str(bundle), "--target", "ort-cpu"], 0),
        (["measure", str(bundle), "--target", "ort-cpu"], 0),
        (["gate", str(bundle), "--require", "size<=1B"], 4),
        (["verify", str(bundle)], 0),
    ):
        done = on_the_device(*arguments)
        assert done.returncode == code, done.stderr
        assert loaded(done) <= {"onnxruntime"}


def test_without_torch_the_target_torch_says_how_to_get_it(bundle: Path) -> None:
    done = on_the_device("build", str(bundle), "--target", "torch:eager")
    assert done.returncode == 3
    assert "torch is not installed. Install chip-deploy[prune]." in done.stderr


def test_doctor_without_torch_is_json_and_names_what_is_missing() -> None:
    done = on_the_device("doctor", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.rpartition("LOADED")[0])
    rows = {row["target"]: row for row in told["targets"]}
    assert rows["torch:eager"]["reason"] == "torch is not installed"
    assert rows["ort-cpu"]["runs"]
