"""The command line: options in, exit codes out; what the commands do lives in the other modules, imported on demand."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from ..chip.criteria import CRITERIA

if TYPE_CHECKING:
    from rich.console import Console

    from ..export.gate import GateResult
    from .display import Display
    from .recipe import Recipe
    from .report import Report

EXIT_CODES = (
    "Exit codes: 0 done; 1 a stage failed; 2 usage, recipe or input; 3 the target cannot be used here; "
    "4 requirement not met; 5 inconclusive; 6 integrity; 130 interrupted (143 by SIGTERM)."
)

DEBUG = "CHIP_DEPLOY_DEBUG"

# Which extra brings a package that this install may lack.
EXTRAS = {
    "torch": "prune",
    "torchvision": "prune",
    "torch_pruning": "prune",
    "lightning": "prune",
    "onnx": "prune",
    "onnxscript": "prune",
    "PIL": "prune",
    "safetensors": "prune",
    "sklearn": "prune",
    "scipy": "prune",
    "numba": "fast",
    "onnxruntime": "ort",
    "tensorrt": "trt",
    "tensorrt_rtx": "trt-rtx",
    "cuda": "trt",
    "jinja2": "report",
}

PACKAGE = __name__.removesuffix(".pipeline.cli")
# Foreseen failures of a stage, by module and name: those modules import torch, which not every command needs.
REFUSALS = (
    ("chip.groups", "CannotCut"),
    ("chip.surgery", "SurgeryRefused"),
    ("pipeline.tune", "TrainingDiverged"),
)

Found = TypeVar("Found")

app = typer.Typer(
    name="chip-deploy",
    epilog=EXIT_CODES,
    add_completion=False,
)

RecipeFile = Annotated[Path | None, typer.Argument(metavar="RECIPE.toml", help="What to do; options override it.")]
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that `prune --out` wrote.")]
Model = Annotated[
    str | None, typer.Option(metavar="NAME", help="resnet18, resnet56, timm:NAME, package.module:factory, ...")
]
Weights = Annotated[str | None, typer.Option(metavar="FILE", help="Trained weights: .safetensors, .pt or .pth.")]
Data = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="digits, imagefolder:DIR, cifar10[:DIR], random:N, package.module:factory, ..."),
]
CriterionName = Annotated[
    str | None, typer.Option(metavar="NAME", help=f"What judges the channels: {', '.join(CRITERIA)}.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, e.g. tune.epochs=0. Repeatable.")
]


class Stopped(BaseException):
    """Ctrl-C or SIGTERM. Not a KeyboardInterrupt, which Lightning would turn into exit code 1."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def _print_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        _console().print(f"chip-deploy {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and no more.")
    ] = False,
) -> None:
    """Prune a trained CNN, export it, build engines and measure whether it really became faster."""
    del version  # dealt with before any command


@app.command()
def prune(
    context: typer.Context,
    recipe: RecipeFile = None,
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    criterion: CriterionName = None,
    macs: Annotated[str | None, typer.Option(metavar="KEPT", help="Fraction of the MACs to keep.")] = None,
    params: Annotated[str | None, typer.Option(metavar="KEPT", help="Fraction of the parameters to keep.")] = None,
    ratio: Annotated[str | None, typer.Option(metavar="REMOVED", help="Fraction of the channels to remove.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGET", help="trt, trt-rtx[:sm86,...], ort-cpu, ort-cuda, torch[:compiled]. Repeatable."
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME...]", help="fp32, fp16, bf16, int8, fp8; e.g. fp16,int8.")
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(metavar="POINTS", help="Top-1 that int8 may lose; layers are left out until it holds.")
    ] = None,
    scores: Annotated[
        str | None, typer.Option(metavar="FILE", help="Scores that `chip-deploy score` wrote, used again.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the bundle goes.")] = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run, or begin one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be cut; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout; the rest on stderr.")] = False,
) -> None:
    """Score, cut, tune, export, build, measure, report. Exits 0 whatever the verdict."""
    asked = {
        "model.name": model,
        "model.weights": weights,
        "data.name": data,
        "score.criterion": criterion,
        "score.file": scores,
        "prune.macs": _number(macs),
        "prune.params": _number(params),
        "prune.ratio": _number(ratio),
        "targets": target or None,
        "export.precision": [name.strip() for name in precision.split(",")] if precision else None,
        "quantize.max_drop": _number(max_drop),
    }
    checked = _checked_recipe(recipe, asked, settings)
    if dry_run:
        if resume:
            raise ValueError("--dry-run writes nothing, so there is nothing to --resume. Leave one of them out.")
        _dry_run(checked, as_json=as_json)
        return
    if out is None:
        raise ValueError("no output folder was given. Give --out DIR, for example --out runs/first.")
    command = shlex.join(["chip-deploy", *(context.obj or ())])
    _prune(checked, out, resume=resume, as_json=as_json, command=command)


@app.command()
def score(
    recipe: RecipeFile = None,
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    criterion: CriterionName = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the scores go (.safetensors).")] = None,
) -> None:
    """Judge every channel, and write the scores to a file; nothing is cut.

    Where the criterion reads feature maps, each group sees images until its kept set is stable: --set score.min_images,
    max_images, overlap, confidence; or exactly score.images. Criteria that read only weights look at no image, taylor
    looks at all of them. score.joint=true removes one channel at a time by chip (minutes, not seconds).

    Under `torchrun --no-python --nproc-per-node N chip-deploy score ...` the processes share the images; exit codes are
    torchrun's then.
    """
    asked = {"model.name": model, "model.weights": weights, "data.name": data, "score.criterion": criterion}
    checked = _checked_recipe(recipe, asked, settings, needs_budget=False)
    if out is None:
        raise ValueError("no output file was given. Give --out FILE, for example --out scores.safetensors.")
    console = _console(quiet=os.environ.get("RANK", "0") != "0")
    with _watching(console) as display:
        from .stages import score as score_channels

        found = score_channels(checked, out, display=display)
    from .tables import score_sentence, score_table

    console.print(score_table(found, encoding=console.encoding))
    for line in (score_sentence(found, checked.score), f"Scores: {out}"):
        console.print(line, soft_wrap=line.startswith("Scores"), highlight=False, markup=False)


@app.command()
def build(
    bundle: Bundle,
    target: Annotated[
        str, typer.Option(metavar="TARGET", help="trt, trt-rtx[:sm86,...], ort-cpu, ort-cuda, torch[:compiled].")
    ],
    precision: Annotated[
        str | None, typer.Option(metavar="NAME", help="fp32, fp16, bf16, int8 or fp8; all that the bundle holds.")
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(metavar="SHAPES", help="input:1x3x32x32, or MIN/OPT/MAX of a free batch; one profile each time."),
    ] = None,
    builds: Annotated[
        int | None, typer.Option(metavar="N", help="Build N times and keep the fastest that agrees (trt).")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any build key, e.g. build.tf32=false. Repeatable."),
    ] = None,
) -> None:
    """Build engines from a bundle's ONNX files, on the machine that will run them. Needs no torch."""
    _parsed_target(target)
    _require_bundle(bundle)
    with _watching(_console()) as display:
        display.stage(f"build {target}")
        from .device import build_options, rebuild

        asked = _build_settings({"shapes": shapes or None, "builds": builds}, settings)
        options = build_options(bundle, target, asked, note=display.note) if asked else None
        engines = rebuild(bundle, target, precision=precision, options=options, note=display.note)
        for warning in dict.fromkeys(each for engine in engines for each in engine.flags.get("warnings", [])):
            display.note(warning)
    for engine in engines:
        size = f"{engine.bytes / 1e6:.1f} MB, built in {engine.build_seconds:.1f} s"
        _console().print(f"{bundle / engine.file}: {size}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def measure(
    bundle: Bundle,
    target: Annotated[str | None, typer.Option(metavar="TARGET", help="One target; all of them if left out.")] = None,
    protocol: Annotated[
        str | None, typer.Option(metavar="NAME", help="chip-deploy, mlperf-like (ten minutes a side) or trtexec.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Images a lap, e.g. 1,8,32; the first is the headline.")
    ] = None,
) -> None:
    """Measure a bundle's engines on this machine, dense beside pruned, and update its report. Needs no torch."""
    if target is not None:
        _parsed_target(target)
    batches = _batches(batch)
    _require_bundle(bundle)
    with _watching(_console()) as display:
        from .device import remeasure

        rows = remeasure(bundle, target, display, protocol=protocol, batches=batches)
    from .tables import engine_sentences, engine_table

    _console().print(engine_table(rows))
    for sentence in engine_sentences(rows):
        _console().print(sentence, highlight=False, markup=False)


@app.command()
def verify(bundle: Bundle) -> None:
    """Compare every file of a bundle with its manifest."""
    _require_bundle(bundle)
    from ..export.bundle import verify_bundle

    files = verify_bundle(bundle).files
    _console().print(f"{len(files)} files, each as the manifest says.", highlight=False)


@app.command()
def gate(
    bundle: Bundle,
    require: Annotated[
        list[str], typer.Option(metavar="LIMIT", help='"speedup>=1.3", "p99<=4ms", "top1_drop<=0.5", "size<=10MB".')
    ],
    target: Annotated[
        str | None, typer.Option(metavar="TARGET", help="The engine that must comply; every measured one if left out.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the rows as a JUnit test report (XML).")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a summary for a pull request (Markdown).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The rows as JSON on stdout.")] = False,
) -> None:
    """Let a bundle pass only if it meets what is required of it: exits 0, 4 (not met), 5 (inconclusive), 3 or 6."""
    from ..export.gate import check_gate, parse_requirement
    from ..export.verdict_files import clear_verdicts, write_verdicts

    requirements = [parse_requirement(text) for text in require]
    if target is not None:
        _parsed_target(target)
    _require_bundle(bundle)
    clear_verdicts([path for path in (junit, markdown) if path is not None], bundle)
    result = check_gate(bundle, requirements, target=target)
    write_verdicts(result, junit=junit, markdown=markdown)
    _show_gate(result, as_json=as_json)
    raise typer.Exit(result.exit_code)


@app.command()
def compare(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Two or more folders of `prune --out`.")],
    target: Annotated[
        str | None, typer.Option(metavar="TARGET", help="One target; all that the bundles share if left out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it as one file: .html, .svg (the plot), .md or .json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The comparison as JSON on stdout.")] = False,
) -> None:
    """Show bundles side by side, and which are on the Pareto front of accuracy against latency. Needs no torch."""
    from .compare import compare_bundles
    from .compare_page import comparison_json, comparison_tables, require_comparison_place, write_comparison

    if target is not None:
        _parsed_target(target)
    for bundle in bundles:
        _require_bundle(bundle)
    if out is not None:
        require_comparison_place(out, bundles)
    comparison = compare_bundles(bundles, target=target)
    if out is not None:
        write_comparison(comparison, out)
    if as_json:
        _print_json(comparison_json(comparison))
    else:
        _console().print(comparison_tables(comparison))


@app.command("compare-criteria")
def compare_criteria(
    context: typer.Context,
    recipe: RecipeFile = None,
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    criteria: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME...]", help="Which criteria; every one there is if left out.")
    ] = None,
    macs: Annotated[
        str | None, typer.Option(metavar="KEPT[,KEPT...]", help="Fractions of the MACs to keep, e.g. 0.7,0.5,0.3.")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME...]", help="uniform, interaction, global, isomorphic.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Of scoring images, draws, tuning; 0,1,2 if left out.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="TARGET", help="Where latency is measured; nowhere if left out.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where cells, tables and the plot go.")] = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Use the cells that are there, make the others.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout; the rest on stderr.")] = False,
) -> None:
    """Cut one network by several criteria, at several budgets, with several seeds: accuracy at each step, and latency.

    Means and ranges over seeds, never the best of them. Nothing is tuned unless tune.epochs is set. Every cell is a
    file: the same command with --resume goes on, and lists may grow then.
    """
    from .criteria_grid import make_grid, parse_lists

    lists = parse_lists(criteria=criteria, macs=macs, allocation=allocation, seeds=seeds)
    asked = {
        "model.name": model,
        "model.weights": weights,
        "data.name": data,
        "targets": target or None,
        **lists.overrides,
    }
    grid = make_grid(_checked_recipe(recipe, asked, settings, needs_budget=False), lists)
    if out is None:
        raise ValueError("no output folder was given. Give --out DIR, for example --out runs/criteria.")
    command = shlex.join(["chip-deploy", *(context.obj or ())])
    console = _console(stderr=as_json)
    with _stdout_elsewhere(as_json=as_json), _watching(console) as display:
        from .compare_criteria import compare_criteria as compare_all

        comparison = compare_all(grid, out, resume=resume, display=display, command=command)
    from .criteria_page import criteria_tables

    if as_json:
        _print_json((out / "criteria.json").read_text(encoding="utf-8"))
    console.print(criteria_tables(comparison))
    console.print(f"Page: {out / 'criteria.html'}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def report(bundle: Bundle) -> None:
    """Write a bundle's Markdown and HTML report again, from its report.json and its laps."""
    _require_bundle(bundle)
    from .device import render_again

    for path in render_again(bundle):
        _console().print(str(path), soft_wrap=True, highlight=False, markup=False)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON on stdout.")] = False,
) -> None:
    """Say what this machine can do: hardware, versions, and each target, or why not and what would help."""
    from .doctor import diagnose, machine_table, package_table, target_table

    with _stdout_elsewhere(as_json=as_json):
        diagnosis = diagnose(EXTRAS)
    if as_json:
        _print_json(diagnosis.model_dump_json(indent=2, by_alias=True))
        return
    tables = (machine_table(diagnosis), package_table(diagnosis), target_table(diagnosis))
    _console().print(tables[0], "", tables[1], "", tables[2], sep="\n")


def attempted(probe: Callable[[], Found]) -> Found | Exception:
    """What `probe` finds, or what ends it; interruptions pass.

    For the doctor, whose probes meet exceptions of packages that this one does not know.
    """
    try:
        return probe()
    except Exception as err:
        return err


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; whatever goes wrong is one sentence on stderr, never a traceback."""
    arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    command = typer.main.get_command(app)
    try:
        with _stopping_at_signals():
            code = command.main(
                args=list(arguments), prog_name="chip-deploy", standalone_mode=False, obj=list(arguments)
            )
    except (Stopped, KeyboardInterrupt, typer.Abort) as err:
        _say(_how_to_continue(arguments))
        return err.exit_code if isinstance(err, Stopped) else 130
    except Exception as err:
        if os.environ.get(DEBUG) == "1":
            traceback.print_exc()
        code, sentence = _explained(err)
        _say(sentence)
    return code if isinstance(code, int) else 0


def _prune(recipe: Recipe, out: Path, *, resume: bool, as_json: bool, command: str) -> None:
    console = _console(stderr=as_json)
    with _stdout_elsewhere(as_json=as_json), _watching(console) as display:
        from .stages import prune as run_stages

        result = run_stages(recipe, out, resume=resume, display=display, command=command)
    if as_json:
        _print_json((out / "report.json").read_text(encoding="utf-8"))
    _show_report(result, out, console)


def _show_report(result: Report, out: Path, console: Console) -> None:
    from .report import summary_table

    console.print(summary_table(result))
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True, highlight=False, markup=False)


def _dry_run(recipe: Recipe, *, as_json: bool) -> None:
    console = _console(stderr=as_json)
    with _stdout_elsewhere(as_json=as_json), _watching(console) as display:
        from .stages import dry_run

        preview = dry_run(recipe, display)
    if as_json:
        _print_json(json.dumps(dataclasses.asdict(preview), indent=2))
    else:
        from .tables import preview_table

        console.print(preview_table(preview))


def _show_gate(result: GateResult, *, as_json: bool) -> None:
    if as_json:
        from ..export.verdict_files import result_json

        _print_json(result_json(result))
        return
    left_out = [f"left out: {file}: not measured, and so not judged." for file in result.left_out]
    rows = [f"{row.status}: {row.sentence}" for row in result.rows]
    for line in [result.verdict, *left_out, *rows]:
        _console().print(line, soft_wrap=True, highlight=False, markup=False)


def _checked_recipe(
    path: Path | None, asked: dict[str, Any], settings: list[str] | None, *, needs_budget: bool = True
) -> Recipe:
    """The recipe with the options and `--set` on top. Raises: ValueError for a key that is given twice."""
    from .recipe import load_recipe, parse_setting

    overrides = {key: value for key, value in asked.items() if value is not None}
    for text in settings or []:
        key, value = parse_setting(text)
        if key in overrides:
            raise ValueError(f"--set {text}: '{key}' is given twice. Give it once.")
        overrides[key] = value
    return load_recipe(path, overrides, needs_budget=needs_budget)


def _build_settings(asked: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    """The keys of the section `build` that were given. Raises: ValueError for another section, or a key given twice."""
    from .recipe import parse_setting

    found = {key: value for key, value in asked.items() if value is not None}
    for text in settings or []:
        path, value = parse_setting(text)
        section, _, key = path.partition(".")
        if section != "build" or not key:
            raise ValueError(f"--set {text}: only the keys of the section build decide how an engine is built.")
        if key in found:
            raise ValueError(f"--set {text}: 'build.{key}' is given twice. Give it once.")
        found[key] = value
    return found


def _batches(text: str | None) -> list[int]:
    """The whole numbers above 0 in `1,8,32`. Raises: ValueError."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--batch {text}: whole numbers above 0 are expected, for example --batch 1,8,32.")
    return list(dict.fromkeys(int(part) for part in parts))


def _number(text: str | None) -> int | float | str | None:
    """The number that `text` spells, or `text` itself, which the recipe then refuses with its own sentence."""
    if text is None:
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _parsed_target(text: str) -> None:
    from ..export.target import parse_target

    parse_target(text)


def _require_bundle(bundle: Path) -> None:
    if not bundle.is_dir():
        raise FileNotFoundError(f"{bundle}: no such bundle. Give the folder that `chip-deploy prune --out` wrote.")


def _console(*, stderr: bool = False, quiet: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, file=io.StringIO() if quiet else None)


@contextlib.contextmanager
def _watching(console: Console) -> Iterator[Display]:
    """A display for the block, taken off the screen however the block ends."""
    from .display import make_display

    display = make_display(console)
    try:
        yield display
        display.done()
    finally:
        display.stop()


@contextlib.contextmanager
def _stdout_elsewhere(*, as_json: bool) -> Iterator[None]:
    """With `--json`, what a library prints goes to stderr, so that stdout holds JSON alone."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _stopping_at_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise `Stopped` inside the block; a signal that the parent has us ignore stays ignored."""

    def stop(number: int, _frame: object) -> NoReturn:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _how_to_continue(arguments: list[str]) -> str:
    if arguments[:1] == ["measure"]:
        return (
            "interrupted; the laps so far are kept, and the engine counts as not measured. Measure it again with: "
            f"{shlex.join(['chip-deploy', *arguments])}"
        )
    if arguments[:1] not in (["prune"], ["compare-criteria"]) or "--dry-run" in arguments:
        return "interrupted."
    again = arguments if "--resume" in arguments else [*arguments, "--resume"]
    return f"interrupted; continue with: {shlex.join(['chip-deploy', *again])}"


def _explained(err: Exception) -> tuple[int, str]:
    """The exit code and the sentence for what a command raised."""
    if hasattr(err, "format_message"):  # what typer raises for bad usage; its class moved between versions
        return 2, f"{_sentence(err)} See chip-deploy --help."
    if isinstance(err, ModuleNotFoundError) and (err.name or "").partition(".")[0] in EXTRAS:
        package = str(err.name).partition(".")[0]
        return 2, f"the Python package '{package}' is not installed. Install chip-deploy[{EXTRAS[package]}]."
    code = _exit_code(err)
    if code is not None:
        return code, _sentence(err)
    return 1, f"unexpected {type(err).__name__}: {_sentence(err)} Set {DEBUG}=1 to see the traceback."


def _exit_code(err: Exception) -> int | None:
    """The exit code for an error that was foreseen; None for one that was not."""
    from ..export.errors import ExportError, IntegrityError, MachineMismatch, TargetUnavailable

    match err:
        case TargetUnavailable() | MachineMismatch():
            return 3
        case IntegrityError():
            return 6
        case ExportError():
            return 1
        case ValueError() | FileNotFoundError() | NotADirectoryError() | IsADirectoryError() | PermissionError():
            return 2
        case FileExistsError():
            return 2
        case OSError():
            return 1
    return 1 if _is_refusal(err) else None


def _is_refusal(err: Exception) -> bool:
    """Whether `err` is one of REFUSALS; a module that was never loaded can have raised nothing."""
    loaded = [(sys.modules.get(f"{PACKAGE}.{module}"), name) for module, name in REFUSALS]
    return isinstance(err, tuple(getattr(module, name) for module, name in loaded if module))


def _sentence(err: Exception) -> str:
    """What went wrong, on one line, ending in a full stop."""
    if hasattr(err, "format_message"):
        text = err.format_message()  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(err, OSError) and err.errno is not None:
        text = f"{err.filename}: {err.strerror}" if err.filename else str(err.strerror)
    elif type(err).__name__ == "ValidationError" and hasattr(err, "errors"):
        first = err.errors()[0]  # pyright: ignore[reportAttributeAccessIssue]
        text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    else:
        text = str(err) or type(err).__name__
    text = " ".join(text.split())
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _say(sentence: str) -> None:
    print(f"error: {sentence}" if not sentence.startswith("interrupted") else sentence, file=sys.stderr)


def _print_json(text: str) -> None:
    print(text.rstrip("\n"), file=sys.stdout)
