"""What runs on the device, without torch: build an engine from a bundle, measure it beside the dense network."""

from __future__ import annotations

import contextlib
import difflib
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ..export.bundle import WORK, Manifest, onnx_name, part_path, verify_bundle, write_manifest
from ..export.candidates import Check, build_best
from ..export.errors import BuildFailed, IntegrityError, MachineMismatch, MeasureFailed, TargetUnavailable
from ..export.golden import Golden, engine_agreement, read_golden, run_in_batches
from ..export.laps_file import every_laps_file, is_laps_file
from ..export.machine import Machine, read_machine
from ..export.measure import (
    PROTOCOLS,
    BatchRow,
    Laps,
    LatencyProtocol,
    Measured,
    Opener,
    compare_latency,
    laps_path,
    protocol_named,
    write_laps,
)
from ..export.node_times import profile_in_turns
from ..export.precision import QUANTISED
from ..export.profile import LayerComparison, compare_layers
from ..export.protocol import FREE
from ..export.target import (
    PRECISIONS,
    BuildOptions,
    Engine,
    LayerTypes,
    Session,
    Target,
    TargetSpec,
    built_with,
    engine_path,
    left_out_options,
    parse_target,
    read_engine,
    require_effect,
    require_precision,
    require_usable,
    sidecar_path,
    width_step,
)
from ..export.targets import make_target
from ..export.watch import Watch
from .alone import alone_in
from .display import Display
from .report import EngineRow, Report, read_report, render, write_report
from .report_page import pages_unavailable
from .undo import all_or_nothing, undo_interrupted

# The targets that run a network whose rest is in FP16 beside its 8 bits.
TENSORRT = ("trt", "trt-rtx")
REPORT_FILES = ("report.json", "report.md", "report.html")
ENDED_EARLY = "its measurement ended early, and the laps so far are kept; run `chip-deploy measure` again"

Progress = Callable[[float, str], None]
Judge = Callable[[Session], float | None]


def rebuild(
    bundle: Path,
    target: str,
    *,
    precision: str | None = None,
    options: BuildOptions | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Engine]:
    """The engines for that target, built here from the bundle's ONNX files; report and manifest follow each of them.

    An engine's files, its row and the manifest change together, or not at all when its build or the disk fails, or its
    outputs for the golden images are wrong where this machine can run it.
    In `precision`, else in every precision that the bundle holds; `note` is told which of these the target does not
    take. Without `options` the engines are built as the recipe says.
    Raises: IntegrityError when the bundle is not as its manifest says; ValueError for a precision that it does not
    hold; TargetUnavailable; BuildFailed; ParityFailed.
    """
    spec = parse_target(target)
    with _alone_in_whole(bundle), _telling_of_pages(bundle, note):
        held = [precision] if precision is not None else _held(bundle)
        manifest = verify_bundle(bundle, but=_passed_over(bundle, spec, held))
        report = read_report(bundle)
        options = options or _planned_options(report, spec, note)
        made = make_target(spec, threads=_threads(report), options=options)
        require_usable(made)
        names = _precisions(bundle, report, made, precision, note)
        if names != held:
            verify_bundle(bundle, but=_passed_over(bundle, spec, names))
        own, gone = _files_of(spec, names), _gone(bundle)
        others = {entry.path for entry in manifest.files if gone(entry.path) and not own(entry.path)}
        engines = []
        for number, name in enumerate(names, start=1):
            to_come = _either(_files_of(spec, names[number:]), others.__contains__)
            engines.append(_rebuilt(bundle, made, name, manifest, to_come=to_come))
        return engines


def remeasure(
    bundle: Path,
    target: str | None,
    display: Display,
    *,
    protocol: str | None = None,
    batches: Sequence[int] = (),
) -> list[EngineRow]:
    """Measure the bundle's engines again on this machine (one target's, or all that can run here).

    Each engine's row, laps and the manifest change together when it is done, or not at all: a disk that fills leaves
    the bundle as it was. An interruption leaves the engine unmeasured, with the laps so far beside it. Without
    `protocol` and `batches` an engine is measured as it was before, or as the recipe says.
    Raises: IntegrityError; ValueError when the bundle has no engine for that target, or the protocol or a batch cannot
    be; MachineMismatch when none of the engines asked for can run here.
    """
    with _alone_in_whole(bundle), _telling_of_pages(bundle, display.note):
        manifest = verify_bundle(bundle)
        report = read_report(bundle)
        wanted = _rows_for(bundle, report, target)
        protocols = {row.file: _protocols(row, report, protocol, batches) for row in wanted}
        runs, refused = _those_that_run(bundle, report, wanted)
        if not runs:
            raise MachineMismatch(f"nothing was measured: {'; '.join(': '.join(pair) for pair in refused.items())}.")
        for row in wanted:
            if row.file in refused:
                old = "; the report keeps the numbers of an earlier measurement" if row.latency_ms else ""
                display.note(f"not measured: {row.file}: {refused[row.file]}{old}.")
        rows = []
        for file, made in runs.items():
            display.stage(f"measure {made.spec}")
            rows.append(_measure_again(bundle, manifest, made, bundle / file, protocols[file], display.progress))
            for sentence in rows[-1].watch.advice if rows[-1].watch else []:
                display.note(sentence)
        return rows


def render_again(bundle: Path) -> list[Path]:
    """The bundle's pages, made again from its report.json and its laps; they and the manifest change together.

    Raises: IntegrityError; ModuleNotFoundError with the package to install when the pages cannot be made here.
    """
    with _alone_in_whole(bundle):
        manifest = verify_bundle(bundle)
        with all_or_nothing(bundle, [bundle / name for name in REPORT_FILES]):
            pages = render(bundle)
            write_manifest(bundle, versions=manifest.versions, lineage=manifest.lineage)
        return pages


def unmeasured_row(engine: Engine, reason: str) -> EngineRow:
    """An engine that exists, with the reason why there is no number of it."""
    return EngineRow(
        target=engine.target,
        precision=engine.precision,
        file=engine.file,
        sha256=engine.sha256,
        bytes=engine.bytes,
        verdict="not measured",
        reason=reason,
        built_for=engine.built_for,
        flags=engine.flags,
        versions=engine.versions,
        build_seconds=engine.build_seconds,
        layer_types=engine.layer_types,
    )


def measured_row(
    target: Target,
    engine_file: Path,
    dense_onnx: Path,
    golden: Golden,
    protocol: LatencyProtocol,
    progress: Progress,
    *,
    laps_file: Path,
    judge: Judge | None = None,
    further_batches: Sequence[int] = (),
) -> EngineRow:
    """An engine measured in turns with the dense network in its precision, its outputs compared with torch's; the laps
    go to `laps_file`, those of each further batch beside it.

    `judge` tells the accuracy of an open engine where evaluation data is at hand. A measurement that is ended early
    leaves the laps so far in the file, marked as incomplete.
    Raises: ParityFailed when the engine's outputs are not torch's; MeasureFailed; ValueError for a batch that the
    network does not take.
    """
    engine = read_engine(engine_file)
    machine = read_machine()
    protocols = [protocol, *(protocol.model_copy(update={"batch": batch}) for batch in further_batches)]
    pruned_onnx = dense_onnx.with_name(onnx_name("model", engine.precision))
    pruned_opener = functools.partial(target.open, engine_file, weights=pruned_onnx)
    with contextlib.closing(pruned_opener()) as pruned:
        agreement = engine_agreement(engine, golden, run_in_batches(pruned, golden.images))
        accuracy = judge(pruned) if judge else None
        _require_batches(pruned, [each.batch for each in protocols], what=engine.file)
        for each in protocols:  # what an engine refuses is found before anything is measured
            pruned.bind({pruned.input_names[0]: _images(golden, each.batch)})
    dense_opener = target.onnx_opener(dense_onnx)
    found: list[Measured] = []
    for number, each in enumerate(protocols):
        path = laps_file if not number else laps_file.with_name(laps_path(engine_file, batch=each.batch).name)
        part = _part_of(progress, number, len(protocols))
        found.append(
            _compared(target, dense_opener, pruned_opener, golden, each, machine=machine, laps_file=path, progress=part)
        )
    comparison = found[0].comparison
    opened = dense_opener, pruned_opener
    layers, missing = _layers(
        target, engine, opened, (dense_onnx, pruned_onnx), _images(golden, protocol.batch), found[0]
    )
    numbers = {
        "latency_ms": comparison.pruned,
        "dense_latency_ms": comparison.dense,
        "speedup": comparison.speedup,
        "accuracy": accuracy,
        "agreement": agreement,
        "verdict": comparison.verdict,
        "protocol": protocol,
        "machine": machine,
        "batch": protocol.batch,
        "control": comparison.control,
        "watch": found[0].watch,
        "times": found[0].times,
        "layers": layers,
        "layer_types": _layer_types(target, engine, engine_file, pruned_onnx),
        "batches": [_batch_row(each, one) for each, one in zip(protocols, found, strict=True)],
    }
    return EngineRow.model_validate(dict(unmeasured_row(engine, f"{comparison.reason}{missing}")) | numbers)


def agreement_check(golden: Callable[[], Golden]) -> Check:
    """What raises ParityFailed for an open engine whose outputs for the golden images are wrong."""
    return lambda session, engine: engine_agreement(engine, made := golden(), run_in_batches(session, made.images))


def _rebuilt(
    bundle: Path, target: Target, precision: str, manifest: Manifest, *, to_come: Callable[[str], bool]
) -> Engine:
    """The engine in one precision, in the place of the one before; the manifest keeps what it says of files `to_come`,
    which may be damaged."""
    path = engine_path(bundle, target.spec, precision)
    laps = every_laps_file(path)
    changed = [path, sidecar_path(path), *laps, *(bundle / name for name in REPORT_FILES)]
    check = agreement_check(lambda: read_golden(bundle))
    with all_or_nothing(bundle, changed):
        engine = build_best(target, bundle / onnx_name("model", precision), path, precision=precision, check=check)
        for laps_file in laps:
            laps_file.unlink()
        reason = target.cannot_run(engine)
        if reason is None and target.options.builds == 1:  # of several, each was checked
            with contextlib.closing(target.open(path)) as session:
                check(session, engine)
        unmeasured = reason or "built, and not measured since; run `chip-deploy measure`"
        _replace_rows(bundle, [unmeasured_row(engine, unmeasured)])
        write_manifest(bundle, versions=manifest.versions, lineage=manifest.lineage, before=manifest, but=to_come)
    return engine


def _passed_over(bundle: Path, spec: TargetSpec, precisions: Sequence[str]) -> Callable[[str], bool]:
    """Whether a path in a bundle may be damaged before engines are built: those of `spec` in `precisions` are made
    anew, and other engines may be gone, so that each target's can be built in its turn."""
    return _either(_files_of(spec, precisions), _gone(bundle))


def _gone(bundle: Path) -> Callable[[str], bool]:
    """Whether a path in a bundle is that of an engine, and nothing is there."""
    return lambda path: path.startswith("engines/") and not (bundle / path).exists()


def _either(one: Callable[[str], bool], other: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda path: one(path) or other(path)


def _files_of(spec: TargetSpec, precisions: Sequence[str]) -> Callable[[str], bool]:
    """Whether a path in a bundle belongs to an engine for `spec` in one of `precisions`: the engine, its sidecar and
    its laps, and what is left of writing them."""
    engines = [engine_path(Path(), spec, precision) for precision in precisions]
    whole = {path.as_posix() for engine in engines for path in (engine, sidecar_path(engine))}
    parts = {part_path(Path(path)).as_posix() for path in whole}

    def chosen(path: str) -> bool:
        return path in whole | parts or any(is_laps_file(Path(path), engine) for engine in engines)

    return chosen


def _rows_for(bundle: Path, report: Report, target: str | None) -> list[EngineRow]:
    """The engines of that target, or all there are. Raises: ValueError when there is none."""
    wanted = [row for row in report.engines if target is None or row.target == str(parse_target(target))]
    if not wanted:
        have = ", ".join(sorted({row.target for row in report.engines})) or "none"
        raise ValueError(
            f"{bundle} has no engine for target '{target}' (it has: {have}). Build one with `chip-deploy build`."
        )
    return wanted


def _those_that_run(
    bundle: Path, report: Report, wanted: Sequence[EngineRow]
) -> tuple[dict[str, Target], dict[str, str]]:
    """By engine file: the target of each that can run here, and why each of the others cannot.

    Raises: IntegrityError where an engine is not the one that the report tells of.
    """
    runs, refused = {}, {}
    for row in wanted:
        engine = read_engine(bundle / row.file)
        _require_reported(bundle, engine, row)
        bare = make_target(parse_target(row.target))
        # The dense control is built when it is measured, and has to be built as the engine was.
        made = make_target(bare.spec, threads=_threads(report), options=bare.taken(built_with(engine)))
        reason = made.cannot_run(engine)
        if reason is None:
            runs[row.file] = made
        else:
            refused[row.file] = reason
    return runs, refused


def _require_reported(bundle: Path, engine: Engine, row: EngineRow) -> None:
    """Raises: IntegrityError where numbers of `engine` would stand in a row of another, whatever the manifest says."""
    for name in ("file", "target", "precision", "sha256"):
        here, told = getattr(engine, name), getattr(row, name)
        if here != told:
            raise IntegrityError(
                f"{sidecar_path(bundle / row.file)}: its {name} is {here}, and the report says {told}: it belongs to "
                "another engine. Build the engine again."
            )


def _measure_again(
    bundle: Path, manifest: Manifest, target: Target, engine: Path, protocols: list[LatencyProtocol], progress: Progress
) -> EngineRow:
    """The engine's new row, which report and manifest have as well; ended early, the laps so far and no numbers."""
    with _work_folder(bundle) as made:
        first, *further = protocols
        try:
            row = measured_row(
                target,
                engine,
                bundle / onnx_name("dense", read_engine(engine).precision),
                read_golden(bundle),
                first,
                progress,
                laps_file=made / laps_path(engine).name,
                further_batches=[each.batch for each in further],
            )
        except BaseException:
            if any(made.iterdir()):
                _place(bundle, manifest, engine, made, unmeasured_row(read_engine(engine), ENDED_EARLY))
            raise
        return _place(bundle, manifest, engine, made, row)


def _place(bundle: Path, manifest: Manifest, engine: Path, made: Path, row: EngineRow) -> EngineRow:
    """The row, once it is in the report, the laps in `made` have taken the place of the old ones, and the manifest
    tells of both; or nothing has changed."""
    laps = sorted(made.iterdir())
    old = every_laps_file(engine)
    changed = {*old, *(engine.parent / path.name for path in laps), *(bundle / name for name in REPORT_FILES)}
    with all_or_nothing(bundle, sorted(changed)):
        for path in old:
            path.unlink()
        for path in laps:
            path.replace(engine.parent / path.name)
        report = _replace_rows(bundle, [row])
        write_manifest(bundle, versions=manifest.versions, lineage=manifest.lineage)
    return next(each for each in report.engines if each.file == row.file)


def _part_of(progress: Progress, done: int, parts: int) -> Progress:
    """What moves `progress` through one of so many parts, after those that are done."""
    return lambda fraction, text: progress((done + fraction) / parts, text)


@contextlib.contextmanager
def _work_folder(bundle: Path) -> Iterator[Path]:
    """An empty folder that is no part of what ships; it goes when the block ends."""
    folder = bundle / WORK / "measure"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # a run's stages are in it
            folder.parent.rmdir()


@contextlib.contextmanager
def _alone_in_whole(bundle: Path) -> Iterator[None]:
    """No other command changes the bundle meanwhile, and what one was killed in is undone."""
    with alone_in(bundle):
        undo_interrupted(bundle)
        yield


@contextlib.contextmanager
def _telling_of_pages(bundle: Path, note: Callable[[str], None] | None) -> Iterator[None]:
    """`note` is told, however the block ends, when the report's pages went because they can only be made elsewhere."""
    had = [name for name in REPORT_FILES if (bundle / name).is_file()]
    try:
        yield
    finally:
        went = [name for name in had if not (bundle / name).is_file()]
        reason = pages_unavailable()
        if went and reason is not None and note is not None:
            note(f"removed, because they no longer agreed with the report: {', '.join(went)}. {reason}")


def _compared(
    target: Target,
    dense_opener: Opener,
    pruned_opener: Opener,
    golden: Golden,
    protocol: LatencyProtocol,
    *,
    machine: Machine,
    laps_file: Path,
    progress: Progress,
) -> Measured:
    """Both networks at the protocol's batch, with all laps in `laps_file`; ended early, with those so far."""
    feeds = _images(golden, protocol.batch)
    text = f"{target.spec} batch {protocol.batch}"
    if target.compiles:  # once, now: the processes that compile would be taken for somebody else's
        _bound(dense_opener, feeds)().close()

    def keep(laps: Laps) -> None:
        write_laps(
            laps_file, protocol=protocol, machine=machine, dense=laps.dense, pruned=laps.pruned,
            control_laps=laps.control, round_trips_ms=laps.round_trips_ms, complete=False,
        )  # fmt: skip

    measured = compare_latency(
        _bound(dense_opener, feeds),
        _bound(pruned_opener, feeds),
        protocol,
        watch=Watch(gpu=target.on_gpu),
        progress=lambda fraction: progress(fraction, text),
        keep=keep,
    )
    laps = measured.laps
    write_laps(
        laps_file, protocol=protocol, machine=machine, dense=laps.dense, pruned=laps.pruned, control_laps=laps.control,
        control=measured.comparison.control, watch=measured.watch, round_trips_ms=laps.round_trips_ms,
    )  # fmt: skip
    return measured


def _layers(
    target: Target,
    engine: Engine,
    openers: tuple[Opener, Opener],
    onnx_paths: tuple[Path, Path],
    feeds: np.ndarray,
    measured: Measured,
) -> tuple[LayerComparison | None, str]:
    """The times of every layer of both networks, dense and pruned, in sessions of their own; or None, and why.

    The laps are there already, and a runtime that cannot tell its layers' times does not take them away.
    """
    open_dense, open_pruned = (_bound(opener, feeds) for opener in openers)
    dense_onnx, pruned_onnx = onnx_paths
    try:
        with contextlib.closing(open_dense()) as dense, contextlib.closing(open_pruned()) as pruned:
            profiles = profile_in_turns(dense, pruned, feeds, dense_onnx=dense_onnx, pruned_onnx=pruned_onnx)
    except (BuildFailed, IntegrityError, MeasureFailed, OSError) as err:
        return None, f" No layer was timed: {err}"
    step = width_step(target.spec, engine.precision)
    return compare_layers(*profiles, speedup=measured.comparison.speedup.estimate, width_step=step), ""


def _layer_types(target: Target, engine: Engine, engine_file: Path, onnx_path: Path) -> LayerTypes | None:
    """In which types the layers run: as the engine tells, which may have been built where it could not be asked."""
    known = engine.layer_types
    if known is None or known.source == "engine":
        return known
    try:
        return target.engine_layer_types(engine_file, onnx_path) or known
    except (BuildFailed, IntegrityError, OSError):  # it has just been measured, and its numbers stay
        return known


def _images(golden: Golden, batch: int) -> np.ndarray:
    """The golden images, again and again, as many as a batch holds. Raises: ValueError when memory cannot hold them."""
    try:
        return np.resize(golden.images, (batch, *golden.images.shape[1:]))
    except MemoryError as err:
        gigabytes = batch * golden.images[0].nbytes / 1e9
        raise ValueError(
            f"a batch of {batch} needs {gigabytes:.3g} GB for its images alone, more than there is. Measure a smaller "
            "one."
        ) from err


def _bound(opener: Opener, feeds: np.ndarray) -> Opener:
    """`opener`, with `feeds` bound to the one input of what it opens."""

    def opened() -> Session:
        session = opener()
        try:
            session.bind({session.input_names[0]: feeds})
        except BaseException:
            session.close()
            raise
        return session

    return opened


def _require_batches(session: Session, batches: Sequence[int], *, what: str) -> None:
    """Raises: ValueError for a batch that the network does not take."""
    fixed = session.input_shapes[session.input_names[0]][0]
    for batch in batches:
        if batch < 1 or fixed not in (-1, batch):
            takes = "batches of at least 1" if fixed == -1 else f"batches of {fixed} only"
            raise ValueError(
                f"{what}: a batch of {batch} asked for, and it takes {takes}. "
                "Export it with --set export.dynamic_batch=true to measure others."
            )


def _batch_row(protocol: LatencyProtocol, measured: Measured) -> BatchRow:
    comparison = measured.comparison
    return BatchRow(
        batch=protocol.batch,
        dense=comparison.dense,
        pruned=comparison.pruned,
        speedup=comparison.speedup,
        verdict=comparison.verdict,
        reason=comparison.reason,
    )


def _protocols(row: EngineRow, report: Report, name: str | None, batches: Sequence[int]) -> list[LatencyProtocol]:
    """How to measure an engine, once for each batch: as asked for, else as it was, else as the recipe says.

    Raises: ValueError for a protocol that there is not.
    """
    asked = _measure(report)
    if name is None:
        protocol = row.protocol or LatencyProtocol.model_validate(asked)
        if "openings" not in asked:  # an older record was made with fewer openings than are made now
            protocol = protocol.model_copy(update={"openings": PROTOCOLS[protocol.kind].openings})
    else:
        ours = name == "chip-deploy"
        protocol = protocol_named(name, **{key: value for key, value in asked.items() if ours or key in FREE})
    sizes = dict.fromkeys(batches or [measured.batch for measured in row.batches] or [protocol.batch])
    return [protocol.model_copy(update={"batch": batch}) for batch in sizes]


def _measure(report: Report) -> dict[str, Any]:
    """How the recipe wants measurements made."""
    return {**report.recipe["measure"], "seed": report.recipe["seed"]}


def _precisions(
    bundle: Path, report: Report, target: Target, asked: str | None, note: Callable[[str], None] | None
) -> list[str]:
    """The precision asked for, or those that the bundle holds and the target takes.

    Raises: ValueError for one that the bundle does not hold; TargetUnavailable when the target takes none of them.
    """
    held = _held(bundle)
    if not held:
        raise FileNotFoundError(f"{bundle}: it holds no model.onnx to build from. Prune again, or restore the file.")
    if asked is not None:
        require_precision(target, asked)
        if asked not in held:
            raise ValueError(
                f"{bundle} holds no {onnx_name('model', asked)}: it was pruned for {', '.join(held)}. Prune again with "
                f"--precision {','.join([*held, asked])}."
            )
        if reason := _refuses_rest(report, target, asked):
            raise TargetUnavailable(f"target '{target.spec}' takes no {asked} of {bundle}: {reason}")
        return [asked]
    refused = {name: target.refuses(name) or _refuses_rest(report, target, name) for name in held}
    reasons = {name: reason for name, reason in refused.items() if reason}
    if len(reasons) == len(held):
        raise TargetUnavailable(f"target '{target.spec}' takes no precision of {bundle}: {' '.join(reasons.values())}")
    for name, reason in reasons.items():
        if note is not None:
            note(f"{name} is left out for target '{target.spec}': {reason}")
    return [name for name in held if name not in reasons]


def _held(bundle: Path) -> list[str]:
    """The precisions in which the bundle holds the pruned network."""
    return [name for name in PRECISIONS if (bundle / onnx_name("model", name)).is_file()]


def _refuses_rest(report: Report, target: Target, precision: str) -> str:
    """Why the target cannot run the bundle's file in 8 bits rightly, with the way out; empty where it can."""
    in_fp16 = any(row.precision == precision and row.conversion.rest == "fp16" for row in report.precisions)
    if not in_fp16 or precision not in QUANTISED or target.spec.name in TENSORRT:
        return ""
    return (
        f"what is not quantised of {onnx_name('model', precision)} is in fp16, of which its runtime makes int32 "
        "biases with scales that FP16 cannot hold. Prune again with --set quantize.rest=fp32."
    )


def build_options(
    bundle: Path, target: str, asked: Mapping[str, Any], *, note: Callable[[str], None] | None = None
) -> BuildOptions:
    """How the bundle's recipe wants engines built, with what is `asked` for on top.

    What is asked for has to have an effect on the target. What the recipe says may be for other targets than this one:
    it is left out where it has none, and `note` is told.
    Raises: IntegrityError when the bundle is not as its manifest says; ValueError naming an option that there is not,
    one whose value cannot be, or one that has no effect on the target.
    """
    spec = parse_target(target)
    with _alone_in_whole(bundle):
        verify_bundle(bundle, but=_passed_over(bundle, spec, PRECISIONS))  # `rebuild` looks at those it leaves
        report = read_report(bundle)
    known = list(BuildOptions.model_fields)
    unknown = next((key for key in asked if key not in known), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.4)
        mean = f" Did you mean 'build.{near[0]}'?" if near else ""
        raise ValueError(f"unknown key 'build.{unknown}'.{mean} Available: {', '.join(known)}.")
    try:
        wanted = BuildOptions.model_validate(asked)
    except ValidationError as err:
        first = err.errors()[0]
        raise ValueError(f"build.{first['loc'][0]}: {first['msg']}. Give another value.") from err
    require_effect([make_target(spec)], wanted)
    return _planned_options(report, spec, note, on_top=wanted.model_dump(include=set(asked)))


def _planned_options(
    report: Report, spec: TargetSpec, note: Callable[[str], None] | None, *, on_top: Mapping[str, Any] | None = None
) -> BuildOptions:
    """How the recipe wants engines built, with what is `on_top` instead, as far as it has an effect on the target;
    `note` is told what has none. A bundle of an older version says nothing about it."""
    options = BuildOptions.model_validate(report.recipe.get("build", {}) | dict(on_top or {}))
    target = make_target(spec)
    for sentence in left_out_options(target, options):
        if note is not None:
            note(sentence)
    return target.taken(options)


def _threads(report: Report) -> int:
    return int(report.recipe["measure"]["threads"])


def _with_what_is_known(row: EngineRow, before: EngineRow | None) -> EngineRow:
    """The row, with the accuracy and the agreement that were found for the very same engine before."""
    if before is None:
        return row
    lasting = {name: getattr(before, name) for name in ("accuracy", "agreement") if getattr(row, name) is None}
    return row.model_copy(update=lasting)


def _replace_rows(bundle: Path, rows: list[EngineRow]) -> Report:
    report = read_report(bundle)
    files = {row.file for row in rows}
    kept = [row for row in report.engines if row.file not in files]
    known = {(row.file, row.sha256): row for row in report.engines}
    fresh = [_with_what_is_known(row, known.get((row.file, row.sha256))) for row in rows]
    order = {row.file: place for place, row in enumerate(report.engines)}
    engines = sorted([*kept, *fresh], key=lambda row: order.get(row.file, len(order)))
    updated = report.model_copy(update={"engines": engines})
    write_report(updated, bundle)
    return updated
