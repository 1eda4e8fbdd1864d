"""The device side works without torch, and asking for help loads nothing heavy."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What a Jetson does not have; and the runtimes, each of which must be imported only by the target that needs it.
ABSENT = (
    *("torch", "torchvision", "torch_pruning", "lightning", "pytorch_lightning", "onnx", "onnxscript", "safetensors"),
    *("sklearn", "scipy", "PIL", "jinja2", "timm"),
    *("onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"),
)
HEAVY = (*ABSENT, "numpy", "tomli_w")

BLOCK = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""

DEVICE_SIDE = [
    *(f"export.{path.stem}" for path in sorted((ROOT / "export").glob("[a-z]*.py")) if path.stem != "onnx_export"),
    *(
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
    ),
]


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
