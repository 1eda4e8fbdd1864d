"""The command line answers a mistake with one sentence and the right exit code, and leaves nothing behind."""

import importlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from pydantic import BaseModel

from chip_deploy.export.errors import (
    BuildFailed,
    ExportError,
    ExportFailed,
    IntegrityError,
    MachineMismatch,
    MeasureFailed,
    ParityFailed,
    TargetUnavailable,
)
from chip_deploy.pipeline import cli
from chip_deploy.pipeline.cli import main

ROOT = Path(__file__).resolve().parents[2]
PRUNE = ["prune", "--model", "resnet18", "--data", "digits", "--macs", "0.5", "--out", "out"]
WITHOUT_BUDGET = ["prune", "--model", "resnet18", "--data", "digits", "--out", "out"]

CRITERIA = ["compare-criteria", "--model", "resnet20", "--data", "digits"]

# Arguments of a mistake that needs no torch to be seen, and a part of the sentence it gets.
MISTAKES = {
    "unknown command": (["prun"], "No such command 'prun'"),
    "unknown option": ([*PRUNE, "--modle", "x"], "--modle"),
    "option without a value": (["prune", "--macs"], "'--macs' requires an argument"),
    "two recipes": (["prune", "a.toml", "b.toml"], "unexpected extra argument"),
    "missing recipe": (["prune", "none.toml"], "none.toml: no such recipe"),
    "no model": (["prune", "--data", "digits", "--macs", "0.5", "--out", "out"], "no model was named. Give --model"),
    "no data": (["prune", "--model", "resnet18", "--macs", "0.5", "--out", "out"], "no data was named. Give --data"),
    "no output": (PRUNE[:-2], "no output folder was given. Give --out"),
    "no budget": (WITHOUT_BUDGET, "no budget was given, exactly one is expected"),
    "two budgets": ([*PRUNE, "--ratio", "0.3"], "2 budgets at once, prune.macs and prune.ratio"),
    "budget 0": ([*WITHOUT_BUDGET, "--macs", "0"], "prune.macs = 0: a fraction to keep is expected"),
    "budget 1": ([*WITHOUT_BUDGET, "--params", "1"], "prune.params = 1: a fraction to keep is expected"),
    "negative budget": ([*WITHOUT_BUDGET, "--ratio", "-0.3"], "prune.ratio = -0.3: a fraction of channels to remove"),
    "NaN budget": ([*WITHOUT_BUDGET, "--macs", "nan"], "prune.macs = nan: a fraction to keep is expected"),
    "half": ([*WITHOUT_BUDGET, "--macs", "half"], "prune.macs = 'half': a fraction to keep is expected"),
    "unknown criterion": ([*PRUNE, "--criterion", "chop"], "unknown criterion 'chop'. Did you mean 'chip'?"),
    "unknown target": ([*PRUNE, "--target", "ort-gpu"], "unknown target 'ort-gpu'. Did you mean 'ort-cpu'?"),
    "unknown capability": ([*PRUNE, "--target", "trt-rtx:sm88"], "unknown compute capability 'sm88'"),
    "unknown precision": ([*PRUNE, "--precision", "fp17"], "precision 'fp17' cannot be built. Available: fp32"),
    "unknown key": ([*PRUNE, "--set", "tune.epoch=1"], "unknown key 'tune.epoch'. Did you mean 'tune.epochs'?"),
    "no value": ([*PRUNE, "--set", "tune.epochs"], "KEY=VALUE is expected"),
    "option given twice": ([*PRUNE, "--set", "prune.macs=0.4"], "'prune.macs' is given twice"),
    "key given twice": ([*PRUNE, "--set", "seed=1", "--set", "seed=2"], "'seed' is given twice"),
    "dry run to resume": ([*PRUNE, "--dry-run", "--resume"], "nothing to --resume"),
    "criteria to nowhere": ([*CRITERIA, "--macs", "0.5"], "no output folder was given. Give --out DIR"),
    "criteria at nothing": ([*CRITERIA, "--out", "out"], "no budget was given. Give --macs 0.7,0.5,0.3"),
    "criterion in a list": ([*CRITERIA, "--criteria", "l1,chop"], "unknown criterion 'chop'. Did you mean 'chip'?"),
    "list given twice": (
        [*CRITERIA, "--macs", "0.5", "--set", "prune.macs=0.4"],
        "--set prune.macs=0.4: 'prune.macs' is given twice",
    ),
    "scores to nowhere": (["score", "--model", "resnet18", "--data", "digits"], "no output file was given. Give --out"),
    "build for nothing": (["build", "bundle"], "Missing option '--target'"),
    "build for unknown": (["build", "bundle", "--target", "trx"], "unknown target 'trx'. Did you mean 'trt'?"),
    "build of nothing": (["build", "bundle", "--target", "ort-cpu"], "bundle: no such bundle"),
    "measure nothing": (["measure", "bundle"], "bundle: no such bundle"),
    "verify nothing": (["verify", "bundle"], "bundle: no such bundle"),
    "report on nothing": (["report", "bundle"], "bundle: no such bundle"),
    "gate on nothing": (["gate", "bundle", "--require", "speedup>=1.2"], "bundle: no such bundle"),
    "gate without a limit": (["gate", "bundle"], "Missing option '--require'"),
    "gate on an unknown limit": (["gate", "bundle", "--require", "speed>=1"], "speed"),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("arguments", "part"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_sentence_and_exit_code_2(
    arguments: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert part in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_found_before_torch_is_loaded() -> None:
    code = f"""
import sys
from chip_deploy.pipeline.cli import main
codes = [main(arguments) for arguments in {[arguments for arguments, _ in MISTAKES.values()]!r}]
print(set(codes), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{2} False"


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Usage: chip-deploy" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"chip-deploy {version('chip-deploy')}\n"


def test_the_help_of_every_command_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (
        "prune",
        "score",
        "build",
        "measure",
        "verify",
        "gate",
        "compare",
        "compare-criteria",
        "report",
        "doctor",
    ):
        assert main([name, "--help"]) == 0
        out = capsys.readouterr().out
        assert f"Usage: chip-deploy {name}" in out
        assert max(map(len, out.splitlines())) <= 80


def test_a_folder_that_is_no_bundle_fails_the_integrity_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundle").mkdir()
    assert main(["verify", "bundle"]) == 6
    assert "bundle: no manifest.json" in capsys.readouterr().err


def test_doctor_names_every_target_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    for name in ("ort-cpu", "trt", "trt-rtx", "Python", "CPU", "torch"):
        assert [line for line in lines if line.split()[:1] == [name]], name
    assert max(map(len, lines)) <= 80


class Strict(BaseModel):
    """Something whose construction from text fails."""

    count: int


def broken_model() -> Exception:
    with pytest.raises(ValueError, match="count") as caught:
        Strict.model_validate({"count": "many"})
    return caught.value


FORESEEN = [
    (ValueError("no such channel"), 2, "no such channel."),
    (broken_model(), 2, "count: Input should be a valid integer"),
    (FileNotFoundError("weights.pt: no such file."), 2, "weights.pt: no such file."),
    (FileNotFoundError(2, "No such file or directory", "a.pt"), 2, "a.pt: No such file or directory."),
    (PermissionError(13, "Permission denied", "out"), 2, "out: Permission denied."),
    (NotADirectoryError("out is a file."), 2, "out is a file."),
    (FileExistsError("out holds another recipe's run."), 2, "out holds another recipe's run."),
    (OSError(28, "No space left on device", "out/model.onnx"), 1, "out/model.onnx: No space left on device."),
    (TargetUnavailable("no CUDA driver"), 3, "no CUDA driver."),
    (MachineMismatch("measured on another CPU"), 3, "measured on another CPU."),
    (ExportFailed("operator not known"), 1, "operator not known."),
    (BuildFailed("no engine"), 1, "no engine."),
    (MeasureFailed("no lap"), 1, "no lap."),
    (ParityFailed("outputs differ"), 1, "outputs differ."),
    (ExportError("something else"), 1, "something else."),
    (IntegrityError("plan.json: changed"), 6, "plan.json: changed."),
    (ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"), 2, "Install chip-deploy[prune]."),
    (RuntimeError("a bug\nof ours"), 1, "unexpected RuntimeError: a bug of ours. Set CHIP_DEPLOY_DEBUG=1"),
    (ModuleNotFoundError("No module named 'x'", name="x"), 1, "unexpected ModuleNotFoundError"),
    (KeyError("layer"), 1, "unexpected KeyError: 'layer'."),
]


@pytest.mark.parametrize(("raised", "code", "part"), FORESEEN, ids=lambda part: type(part).__name__)
def test_what_a_command_raises_becomes_an_exit_code_and_one_sentence(
    raised: Exception, code: int, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("chip_deploy.pipeline.recipe.load_recipe", raising(raised))
    assert main(PRUNE) == code
    err = capsys.readouterr().err
    assert part in err
    assert err.count("\n") == 1


def test_every_exception_of_the_library_has_an_exit_code() -> None:
    kinds = list(own_exceptions())
    assert {"ExportError", "CannotCut", "SurgeryRefused"} <= {kind.__name__ for kind in kinds}
    assert [kind for kind in kinds if cli._exit_code(kind("x")) not in (1, 2, 3, 6)] == []


def own_exceptions() -> Iterator[type[Exception]]:
    """Every public exception class that a module of the three folders defines."""
    for path in sorted(path for wing in ("chip", "export", "pipeline") for path in (ROOT / wing).glob("*.py")):
        if re.search(r"^class [A-Z]\w*\(\w*(?:Error|Exception)\):", path.read_text("utf-8"), flags=re.MULTILINE):
            module = importlib.import_module(f"chip_deploy.{path.parent.name}.{path.stem}")
            for kind in vars(module).values():
                if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ == module.__name__:
                    yield kind


@pytest.mark.parametrize(("module", "name"), cli.REFUSALS)
def test_a_refusal_is_a_failed_stage(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = getattr(importlib.import_module(f"chip_deploy.{module}"), name)
    monkeypatch.setattr("chip_deploy.pipeline.recipe.load_recipe", raising(kind("the outputs differ")))
    assert main(PRUNE) == 1
    assert capsys.readouterr().err == "error: the outputs differ.\n"


def test_the_traceback_comes_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHIP_DEPLOY_DEBUG", "1")
    assert main(["verify", "bundle"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def raising(err: BaseException) -> object:
    def raise_it(*_args: object, **_options: object) -> None:
        raise err

    return raise_it


# A process that is killed in the middle of a command, as a person or a scheduler does it.
WAITING = """
import sys, time
from chip_deploy.pipeline import cli, recipe

def wait(*args, **options):
    print("waiting", flush=True)
    time.sleep(60)

recipe.load_recipe = wait
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_prune_says_how_to_continue(number: signal.Signals, code: int) -> None:
    arguments = [*PRUNE, "--set", "model.weights=my net.pt"]
    returncode, err = interrupted(arguments, number)
    again = shlex.join(["chip-deploy", *arguments, "--resume"])
    assert (returncode, err) == (code, f"interrupted; continue with: {again}\n")


def test_an_interrupted_comparison_of_criteria_says_how_to_continue() -> None:
    arguments = [*CRITERIA, "--macs", "0.5", "--out", "out"]
    _, err = interrupted(arguments, signal.SIGINT)
    assert err == f"interrupted; continue with: {shlex.join(['chip-deploy', *arguments, '--resume'])}\n"


def test_resume_is_not_said_twice() -> None:
    _, err = interrupted([*PRUNE, "--resume"], signal.SIGINT)
    assert err.count("--resume") == 1


def test_an_interrupted_command_without_stages_just_says_so() -> None:
    assert interrupted(["score", "--model", "a"], signal.SIGINT) == (130, "interrupted.\n")


def test_an_ignored_signal_stays_ignored() -> None:
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{WAITING.replace('60', '1')}"
    returncode, _ = interrupted(["score", "--model", "a"], signal.SIGINT, code)
    assert returncode not in (130, -signal.SIGINT)


def interrupted(arguments: list[str], number: signal.Signals, code: str = WAITING) -> tuple[int, str]:
    """Exit code and stderr of a command that gets a signal while it works."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err
