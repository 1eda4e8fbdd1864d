"""Laws about the repository: what lies in it, what the wheel holds, and that its papers tell the truth."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomli
import typer

from chip_deploy.pipeline.cli import app
from chip_deploy.pipeline.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
WINGS = ("chip", "export", "pipeline")
LEFT_OUT = (".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
DEMO = (
    "chip-deploy prune --model resnet18 --data digits --criterion chip --macs 0.5 "
    "--target ort-cpu --target trt-rtx:sm86,sm89 --out runs/demo"
)
# A path that only the writer's machine has: a home, or the folder that the work was done in.
PRIVATE_PATH = re.compile(r"(?<![\w.\-/])/(?:home|root|Users|work)/\w")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in the wheel of a copy of the repository that has a stray package and a stray file in its root."""
    copy = tmp_path_factory.mktemp("wheel") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (copy / "stray.json").write_text("{}\n")
    (copy / "notes").mkdir()
    (copy / "notes" / "__init__.py").write_text("x = 1\n")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return [name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name]


def test_the_wheel_holds_the_modules_and_their_data_and_nothing_else(wheel: list[str]) -> None:
    shipped = [path for wing in WINGS for kind in ("*.py", "*.j2", "*.json") for path in (ROOT / wing).glob(kind)]
    expected = ["__init__.py", "py.typed", *(path.relative_to(ROOT).as_posix() for path in shipped)]
    assert sorted(wheel) == sorted(f"chip_deploy/{name}" for name in expected)


def test_the_wheel_has_the_report_templates_and_schema(wheel: list[str]) -> None:
    names = {"report.html.j2", "report.md.j2", "report.schema.json"}
    assert {f"chip_deploy/pipeline/{name}" for name in names} <= set(wheel)


def test_the_wings_are_flat() -> None:
    folders = [path for wing in WINGS for path in (ROOT / wing).iterdir() if path.is_dir()]
    assert {path.name for path in folders} <= {"__pycache__"}


def test_no_module_strays_in_the_root() -> None:
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


def test_no_file_of_the_repository_names_a_private_path() -> None:
    found = [
        f"{path}: {match.group()}"
        for path in repository_files()
        if (match := PRIVATE_PATH.search((ROOT / path).read_text("utf-8", errors="ignore")))
    ]
    assert not found


@pytest.mark.parametrize("start", ["home", "root", "Users", "work"])
def test_a_planted_private_path_is_found(start: str) -> None:
    assert PRIVATE_PATH.search(f"cache = '/{start}/me/models'")


@pytest.mark.parametrize("start", ["runs/demo/.{}", "DIR/{}", "https://pages.org/{}"])
@pytest.mark.parametrize("name", ["home", "work"])
def test_folders_of_the_same_name_elsewhere_are_no_private_ones(start: str, name: str) -> None:
    assert not PRIVATE_PATH.search(f"{start.format(name)}/x")


def test_make_demo_runs_the_command_that_was_promised() -> None:
    lines = " ".join(make_dry_run("demo").replace("\\\n", " ").split())
    with_rtx = re.search(r"rtx='([^']+)'", lines)
    command = re.search(r"chip-deploy prune .*?--out \S+", lines)
    assert with_rtx
    assert command
    assert command.group().replace("$rtx", with_rtx.group(1)) == DEMO


def test_the_readme_shows_the_demo_as_make_runs_it() -> None:
    assert DEMO in commands_in(ROOT / "README.md")


def test_every_command_in_the_readme_is_understood_by_the_command_line() -> None:
    commands = [line for line in commands_in(ROOT / "README.md") if line.startswith("chip-deploy ")]
    assert len(commands) >= 7
    for line in commands:
        words = shlex.split(line)[1:]
        command = typer.main.get_command(app).commands[words[0]]  # pyright: ignore[reportAttributeAccessIssue]
        command.make_context(words[0], words[1:])


def test_the_recipe_in_the_readme_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), flags=re.DOTALL)
    (tmp_path / "recipe.toml").write_text(block)
    assert load_recipe(tmp_path / "recipe.toml").prune.round_to == 16


def test_the_readme_lists_every_command_and_exit_code() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    assert [name for name in commands if f"`{name}" not in text] == []
    assert [code for code in (0, 1, 2, 3, 4, 5, 6, 130) if f"| {code} |" not in text] == []


def test_every_pin_is_of_a_package_that_can_be_pulled_in_and_names_no_host() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.+]+", line) for line in pins)
    assert not [line for line in pins if line.startswith(("nvidia-", "cuda-", "triton"))]
    assert len({line.split("==")[0] for line in pins}) == len(pins)


def test_every_direct_requirement_has_a_tested_pin() -> None:
    project = tomli.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + [line for name in extras if name != "trt" for line in extras[name]]
    names = {re.split(r"[<>=;\s]", line)[0] for line in asked}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    # cuda-python follows the driver's generation; the plain onnxruntime is for platforms the pins were not tested on.
    assert names - pinned == {"cuda-python", "onnxruntime"}


def test_ci_runs_make_test_in_a_new_environment() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert script.index("rm -rf .venv") < script.index("make test")


def repository_files() -> list[str]:
    """Every file that git tracks or would track; outside a clone, every file that is not a build product."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        return [name for name in listed if name and (ROOT / name).is_file()]
    skipped = re.compile(r"(^|/)(\.venv|build|dist|runs|__pycache__|\.\w+_cache|\.hypothesis|[\w.]+\.egg-info)/")
    every = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()]
    return [name for name in every if not skipped.search(name)]


def make_dry_run(goal: str) -> str:
    command = ["make", "--no-print-directory", "-n", goal]
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "VENV")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def commands_in(path: Path) -> list[str]:
    """Every line of the shell blocks in a Markdown file; a backslash at the end of a line joins it to the next."""
    blocks = re.findall(r"```(?:sh|bash|shell)\n(.*?)```", path.read_text("utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("  #")[0].split()) for line in lines if line.strip()]
