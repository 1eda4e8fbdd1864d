"""A bundle passes only with what is required of it: on real files, with laps and figures made by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from chip_deploy.export import gate
from chip_deploy.export.bundle import sha256_file, write_manifest
from chip_deploy.export.gate import GateResult, check_gate, parse_requirement
from chip_deploy.export.golden import read_golden, write_golden
from chip_deploy.export.laps import Measurement
from chip_deploy.export.machine import read_machine
from chip_deploy.export.measure import LatencyProtocol, laps_path, read_laps, write_laps
from chip_deploy.export.target import engine_path, parse_target
from chip_deploy.export.targets import make_target
from chip_deploy.pipeline.report import Accuracy, EngineRow, Report

ORT = "engines/ort-cpu.fp32.engine"
RTX = "engines/trt-rtx-sm86.fp32.engine"
CLASSES = 10
Change = Callable[[dict[str, Any]], object]


def write_network(path: Path, weights: np.ndarray) -> None:
    """A network whose outputs numpy can tell: the mean of each channel times `weights`."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, CLASSES])],
        [numpy_helper.from_array(weights, "weights")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def made_laps(lap_ms: float = 3.0) -> Measurement:
    """Forty blocks of ten laps; the slowest lap of each is a tenth slower than the others."""
    return Measurement(laps_ms=([lap_ms] * 9 + [1.1 * lap_ms]) * 40, blocks=[k // 10 for k in range(400)])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with an engine for this CPU that was found 1.5 times as fast, and one that was never measured."""
    random = np.random.default_rng(0)
    weights = random.standard_normal((3, CLASSES), dtype=np.float32)
    images = random.standard_normal((5, 3, 8, 8), dtype=np.float32)
    write_network(tmp_path / "model.onnx", weights)
    np.savez(tmp_path / "golden.npz", input=images, output=images.mean(axis=(2, 3)) @ weights)
    target = make_target(parse_target("ort-cpu"))
    built = target.build(tmp_path / "model.onnx", engine_path(tmp_path, target.spec, "fp32"))
    (tmp_path / RTX).write_bytes(b"not for this machine" * 100)
    sidecar = built.model_dump() | {"target": "trt-rtx:sm86", "file": RTX, "sha256": sha256_file(tmp_path / RTX)}
    (tmp_path / RTX).with_suffix(".json").write_text(json.dumps(sidecar), "utf-8")
    record_laps(tmp_path, made_laps())
    row = {"precision": "fp32", "latency_ms": None, "speedup": None, "accuracy": None, "agreement": None}
    measured = row | {
        "target": "ort-cpu", "file": ORT, "sha256": built.sha256, "accuracy": 0.975, "verdict": "faster",
        "reason": "a reason.", "speedup": {"estimate": 1.5, "low": 1.4, "high": 1.6, "level": 0.95},
    }  # fmt: skip
    unmeasured = row | {
        "target": "trt-rtx:sm86", "file": RTX, "sha256": sidecar["sha256"], "verdict": "not measured",
        "reason": "built, not measured on this machine: no CUDA driver",
    }  # fmt: skip
    report = {
        "schema": "chip-deploy.report/1",
        "accuracy": {"n": 1000, "dense": 0.98, "onnx": 0.97},
        "engines": [measured, unmeasured],
    }
    (tmp_path / "report.json").write_text(json.dumps(report), "utf-8")
    write_manifest(tmp_path, versions={}, lineage={})
    return tmp_path


def record_laps(bundle: Path, pruned: Measurement, *, complete: bool = True, **machine: Any) -> None:
    here = read_machine().model_copy(update=machine)
    protocol = LatencyProtocol(resamples=500)
    path, dense = laps_path(bundle / ORT), made_laps(4.5)
    write_laps(path, protocol=protocol, machine=here, dense=dense, pruned=pruned, complete=complete)


def change_json(path: Path, change: Change) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def change_engine(bundle: Path, *, number: int = 0, **fields: Any) -> None:
    change_json(bundle / "report.json", lambda report: report["engines"][number].update(fields))
    write_manifest(bundle, versions={}, lineage={})


def gated(bundle: Path, *texts: str, target: str | None = None) -> GateResult:
    return check_gate(bundle, [parse_requirement(text) for text in texts], target=target)


def statuses(result: GateResult, requirement: str) -> dict[str, str]:
    return {row.engine: row.status for row in result.rows if row.requirement == requirement}


@pytest.mark.parametrize(
    ("text", "metric", "limit"),
    [
        ("speedup>=1.3", "speedup", 1.3),
        ("p99<=4ms", "p99", 4.0),
        ("p50<=900us", "p50", 0.9),
        (" p90 <= .5 s ", "p90", 500.0),
        ("top1_drop<=0.5", "top1_drop", 0.5),
        ("top1_drop<=-1", "top1_drop", -1.0),
        ("size<=10MB", "size", 10_000_000),
        ("size<=1.5e3 kB", "size", 1_500_000),
        ("p50<=40\u00b5s", "p50", 0.04),  # the micro sign
        ("p50<=40\u03bcs", "p50", 0.04),  # the Greek letter
    ],
)
def test_a_requirement_is_read_in_the_metrics_own_unit(text: str, metric: str, limit: float) -> None:
    requirement = parse_requirement(text)
    assert (requirement.metric, requirement.limit) == (metric, pytest.approx(limit, rel=1e-12))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no metric in it. Write one or more of 'top1_drop<=0.5', 'size<=10MB', 'speedup>=1.3'"),
        ("speed>=1.3", "unknown metric 'speed'. Did you mean 'speedup'? Available: top1_drop, size, speedup, p50"),
        ("P99<=4ms", "unknown metric 'P99'. Did you mean 'p99'?"),
        ("banana<=4", "unknown metric 'banana'. Available:"),
        ("speed-up>=1.3", "unknown metric 'speed-up'. Did you mean 'speedup'?"),
        ("speedup=>1.3", "speedup takes >=, '=>' given. Write 'speedup>=1.3'"),
        ("speedup≥1.3", "speedup takes >=, '≥' given"),
        ("speedup", "no comparison given (quote the requirement: a shell takes < and > for files)"),
        ("top1_drop<=0,5", "a decimal point expected, a comma given. Write 'top1_drop<=0.5'"),
        ("speedup<=1.3", "speedup takes >=, '<=' given. Write 'speedup>=1.3'"),
        ("p99<4ms", "p99 takes <=, '<' given. Write 'p99<=4ms'"),
        ("p99", "p99 takes <=, no comparison given"),
        ("p99<=", "the number is missing. Write 'p99<=4ms'"),
        ("p99<=fast", "no number in 'fast'"),
        ("speedup>=nan", "no number in 'nan'"),
        ("speedup>=1e999", "a finite number above 0 expected"),
        ("p99<=-4ms", "a finite number above 0 expected"),
        ("size<=0MB", "a finite number above 0 expected"),
        ("p99<=4", "no unit given, one of us, µs, ms, s expected. Write 'p99<=4ms'"),
        ("p99<=4MB", "unit 'MB' given, one of us, µs, ms, s expected"),
        ("size<=4MiB", "unit 'MiB' given, one of B, kB, MB, GB expected"),
        ("speedup>=1.3x", "unit 'x' given, a number without unit expected"),
        ("top1_drop<=0.5%", "a number without unit expected (percentage points)"),
    ],
)
def test_a_requirement_that_cannot_be_read_says_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"^requirement ") as caught:
        parse_requirement(text)
    assert repr(text) in str(caught.value)
    assert complaint in str(caught.value)


def test_a_bundle_that_keeps_every_limit_passes(bundle: Path) -> None:
    result = gated(bundle, "p99<=4ms", "speedup>=1.3", "size<=10MB", "top1_drop<=1", "p50<=3100us")
    assert {row.status for row in result.rows} == {"met"}
    assert result.exit_code == 0
    assert json.loads(result.model_dump_json())["exit_code"] == 0


def test_outputs_come_before_accuracy_and_latency_last(bundle: Path) -> None:
    result = gated(bundle, "p99<=4ms", "size<=10MB", "speedup>=1.3", "top1_drop<=1")
    asked = list(dict.fromkeys(row.requirement for row in result.rows))
    assert asked == ["integrity", "parity", "top1_drop<=1", "size<=10MB", "speedup>=1.3", "p99<=4ms"]


@pytest.mark.parametrize(
    ("limit", "status", "bound", "exit_code"),
    [
        (1.3, "met", 1.4, 0),
        (1.4, "met", 1.4, 0),
        (1.45, "inconclusive", 1.4, 5),
        (1.55, "inconclusive", 1.6, 5),
        (1.61, "failed", 1.6, 4),
    ],
)
def test_a_speedup_fails_only_if_its_whole_interval_misses(
    bundle: Path, limit: float, status: str, bound: float, exit_code: int
) -> None:
    result = gated(bundle, f"speedup>={limit}")
    row = result.rows[-1]
    assert (row.engine, row.estimate, row.status, row.bound) == (ORT, 1.5, status, bound)
    assert result.exit_code == exit_code


# Blocks whose laps are all as slow as their number: the median lies at 2.95 ms, resampled anywhere around.
UNEVEN = Measurement(laps_ms=[1 + 0.1 * (k // 10) for k in range(400)], blocks=[k // 10 for k in range(400)])


@pytest.mark.parametrize(
    ("limit", "status"), [("5ms", "met"), ("3100us", "inconclusive"), ("2800us", "inconclusive"), ("1ms", "failed")]
)
def test_a_percentile_is_judged_by_the_interval_of_the_recorded_laps(bundle: Path, limit: str, status: str) -> None:
    record_laps(bundle, UNEVEN)
    write_manifest(bundle, versions={}, lineage={})
    row = gated(bundle, f"p50<={limit}").rows[-1]
    assert row.estimate == pytest.approx(2.95)
    assert row.status == status
    # 40 blocks with a standard deviation of 1.15: the median's own is about 1.25 times 1.15 / sqrt(40) = 0.23.
    assert row.bound is not None
    assert 0.2 < abs(row.bound - 2.95) < 0.8
    assert f"p50 2.95 ms (95 % interval {'' if row.bound > 2.95 else f'{row.bound:.4g} to'}" in row.sentence


@pytest.mark.parametrize(("text", "needed"), [("p99<=4ms", 200), ("p90<=4ms", 20)])
def test_a_percentile_that_the_laps_cannot_tell_is_inconclusive(bundle: Path, text: str, needed: int) -> None:
    record_laps(bundle, Measurement(laps_ms=[1.0] * 10, blocks=[0] * 10))
    write_manifest(bundle, versions={}, lineage={})
    result = gated(bundle, text)
    assert result.exit_code == 5
    assert f"needs {needed} laps, 10 were recorded" in result.rows[-1].sentence


def test_an_unstable_measurement_decides_no_latency_but_accuracy_and_size(bundle: Path) -> None:
    change_engine(bundle, verdict="unstable", reason="no verdict, because dense did not settle.")
    for text in ("speedup>=1.3", "p99<=4ms"):
        result = gated(bundle, text)
        assert (result.exit_code, result.rows[-1].status) == (5, "inconclusive")
        assert "unstable: no verdict, because dense did not settle" in result.rows[-1].sentence
    assert gated(bundle, "size<=1MB", "top1_drop<=1").exit_code == 0


@pytest.mark.parametrize("text", ["speedup>=1.3", "size<=1B", "top1_drop<=1", "p99<=4ms"])
def test_every_measured_engine_is_judged_and_the_others_are_named(bundle: Path, text: str) -> None:
    result = gated(bundle, text)
    assert statuses(result, text).keys() == {ORT}
    assert statuses(result, "parity").keys() == {"model.onnx", ORT}
    assert result.left_out == [RTX]
    assert [engine.name for engine in result.engines] == ["ort-cpu fp32"]


def test_where_nothing_was_measured_every_engine_is_judged(bundle: Path) -> None:
    change_engine(bundle, verdict="not measured", speedup=None)
    size = (bundle / RTX).stat().st_size
    result = gated(bundle, f"size<={size - 1}B", "speedup>=1.3")
    assert statuses(result, f"size<={size - 1}B") == {ORT: "met", RTX: "failed"}
    assert statuses(result, "speedup>=1.3") == {ORT: "inconclusive", RTX: "inconclusive"}
    assert (result.exit_code, result.left_out) == (4, [])


def test_a_target_that_is_named_is_judged_alone(bundle: Path) -> None:
    assert statuses(gated(bundle, "size<=1kB", target="ort-cpu"), "size<=1kB").keys() == {ORT}
    result = gated(bundle, "speedup>=1.3", target="trt-rtx:sm86")
    assert statuses(result, "speedup>=1.3") == {RTX: "inconclusive"}
    assert "not measured: built, not measured on this machine: no CUDA driver." in result.rows[-1].sentence
    assert result.exit_code == 5


def test_a_target_may_be_named_without_its_capabilities(bundle: Path) -> None:
    assert statuses(gated(bundle, "size<=1MB", target="trt-rtx"), "size<=1MB").keys() == {RTX}


def test_an_engine_that_cannot_run_here_and_was_never_compared_is_inconclusive(bundle: Path) -> None:
    result = gated(bundle, "size<=1MB", target="trt-rtx:sm86")
    assert statuses(result, "parity") == {"model.onnx": "met", RTX: "inconclusive"}
    assert result.exit_code == 5


def test_a_bundle_without_any_measured_engine_passes_no_latency(bundle: Path) -> None:
    change_engine(bundle, verdict="not measured", speedup=None)
    result = gated(bundle, "speedup>=1.3")
    assert statuses(result, "speedup>=1.3") == {ORT: "inconclusive", RTX: "inconclusive"}
    assert result.exit_code == 5


@pytest.mark.parametrize(
    ("target", "complaint"),
    [("trt", "no engine for target 'trt' (it has: ort-cpu, trt-rtx:sm86)"), ("ort-cp", "Did you mean 'ort-cpu'?")],
)
def test_a_target_without_engine_is_refused(bundle: Path, target: str, complaint: str) -> None:
    with pytest.raises(ValueError, match="target") as caught:
        gated(bundle, "speedup>=1.3", target=target)
    assert complaint in str(caught.value)


def test_a_bundle_without_engines_and_a_gate_without_requirements_are_refused(bundle: Path) -> None:
    with pytest.raises(ValueError, match="nothing is required"):
        gated(bundle)
    change_json(bundle / "report.json", lambda report: report.update(engines=[]))
    write_manifest(bundle, versions={}, lineage={})
    with pytest.raises(ValueError, match="no engine to judge"):
        gated(bundle, "size<=1MB")


def test_one_failure_outweighs_what_is_inconclusive(bundle: Path) -> None:
    result = gated(bundle, "speedup>=1.45", "size<=1B")
    assert {row.status for row in result.rows} == {"met", "inconclusive", "failed"}
    assert result.exit_code == 4


def test_the_verdict_names_what_it_hangs_on(bundle: Path) -> None:
    assert gated(bundle, "size<=1MB").verdict == "passed: all 4 checks are met."
    mixed = gated(bundle, "speedup>=1.45", "size<=1B", "p99<=1ms")
    assert mixed.verdict == "failed: size<=1B, p99<=1ms (3 of 6 checks met)."
    assert gated(bundle, "speedup>=1.45").verdict == "inconclusive: speedup>=1.45 (3 of 4 checks met)."
    assert GateResult(rows=[]).verdict == "inconclusive: nothing was judged (0 of 0 checks met)."


@pytest.mark.parametrize(
    ("limit", "status"), [(0.5, "met"), (0.49, "failed")]  # 98.0 % dense, 97.5 % the engine
)  # fmt: skip
def test_the_drop_is_in_points_from_the_dense_network_to_the_engine(bundle: Path, limit: float, status: str) -> None:
    row = next(row for row in gated(bundle, f"top1_drop<={limit}").rows if row.engine == ORT and row.estimate == 0.5)
    assert (row.status, row.bound) == (status, None)


def test_an_engine_without_accuracy_of_its_own_has_the_onnx_files(bundle: Path) -> None:
    # 98 % dense, 97 % the ONNX file.
    change_engine(bundle, accuracy=None)
    result = gated(bundle, "top1_drop<=2")
    assert (result.rows[-1].estimate, result.engines[0].top1) == (1.0, 0.97)


def test_without_accuracy_a_drop_is_inconclusive(bundle: Path) -> None:
    change_json(bundle / "report.json", lambda report: report["accuracy"].update(dense=None))
    write_manifest(bundle, versions={}, lineage={})
    result = gated(bundle, "top1_drop<=2")
    assert (result.exit_code, result.rows[-1].status) == (5, "inconclusive")
    assert "no accuracy was recorded" in result.rows[-1].sentence


def broken(result: GateResult) -> str:
    """What is broken, of a gate that judged nothing else."""
    assert [(row.requirement, row.status) for row in result.rows] == [("integrity", "broken")]
    assert (result.exit_code, result.verdict) == (6, "failed: the bundle is broken.")
    return result.rows[0].sentence


@pytest.mark.parametrize("file", ["model.onnx", "report.json", ORT, laps_path(Path(ORT)).as_posix()])
def test_a_changed_file_ends_the_gate_before_anything_is_judged(bundle: Path, file: str) -> None:
    (bundle / file).write_bytes((bundle / file).read_bytes() + b" ")
    assert broken(gated(bundle, "speedup>=1000")).startswith(file)


def test_a_bundle_without_manifest_ends_the_gate(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    assert "this is no finished bundle" in broken(gated(bundle, "speedup>=1.3"))


def test_a_report_about_another_build_of_the_engine_ends_the_gate(bundle: Path) -> None:
    change_engine(bundle, sha256="0" * 64)
    assert "tells of another build" in broken(gated(bundle, "speedup>=1.3"))


@pytest.mark.parametrize("text", ["{", '{"engines": []}'])
def test_a_report_that_cannot_be_read_ends_the_gate(bundle: Path, text: str) -> None:
    (bundle / "report.json").write_text(text, "utf-8")
    write_manifest(bundle, versions={}, lineage={})
    assert "report.json: not a report" in broken(gated(bundle, "speedup>=1.3"))


@pytest.mark.parametrize("file", ["report.json", "golden.npz"])
def test_a_bundle_that_was_shipped_without_a_needed_file_ends_the_gate(bundle: Path, file: str) -> None:
    (bundle / file).unlink()
    write_manifest(bundle, versions={}, lineage={})
    assert file in broken(gated(bundle, "speedup>=1.3"))


def test_what_is_required_twice_is_judged_once(bundle: Path) -> None:
    assert [row.requirement for row in gated(bundle, "size<=1MB", "size<=1MB").rows].count("size<=1MB") == 1


@pytest.mark.parametrize("shape", [(5, CLASSES), (5, CLASSES + 1)])
def test_nothing_is_judged_of_an_onnx_file_with_other_outputs(bundle: Path, shape: tuple[int, int]) -> None:
    with np.load(bundle / "golden.npz") as golden:
        images = golden["input"]
    np.savez(bundle / "golden.npz", input=images, output=np.ones(shape, np.float32))
    write_manifest(bundle, versions={}, lineage={})
    result = gated(bundle, "speedup>=1.3", "size<=1MB")
    assert statuses(result, "parity")["model.onnx"] == "failed"
    assert result.rows[1].sentence.startswith("model.onnx: ")
    for requirement in ("speedup>=1.3", "size<=1MB"):
        assert statuses(result, requirement) == {ORT: "inconclusive"}
    assert "the outputs of model.onnx are not the network's" in result.rows[-1].sentence
    assert result.exit_code == 4


def test_an_engine_of_another_network_has_not_met_what_is_required(
    bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "other.onnx"
    write_network(other, np.ones((3, CLASSES), np.float32))
    target = make_target(parse_target("ort-cpu"))
    built = target.build(other, bundle / ORT)
    change_engine(bundle, sha256=built.sha256)
    result = gated(bundle, "speedup>=1.3")
    assert statuses(result, "parity") == {"model.onnx": "met", ORT: "failed"}
    assert result.rows[2].sentence.startswith(f"{ORT}: outputs differ")
    assert statuses(result, "speedup>=1.3") == {ORT: "inconclusive"}
    assert (result.exit_code, result.verdict) == (4, "failed: parity (2 of 4 checks met).")


def test_an_engine_whose_outputs_are_no_numbers_has_not_met_what_is_required(bundle: Path) -> None:
    with np.load(bundle / "golden.npz") as golden:
        images, outputs = golden["input"], golden["output"]
    write_network(bundle / "model.onnx", np.full((3, CLASSES), np.nan, np.float32))
    np.savez(bundle / "golden.npz", input=images, output=outputs)
    write_manifest(bundle, versions={}, lineage={})
    row = gated(bundle, "size<=1MB").rows[1]
    assert (row.engine, row.status) == ("model.onnx", "failed")
    assert row.sentence.startswith("model.onnx: ")


RECORDED = {"n": 5, "largest_relative_difference": 1e-6, "snr_db": 120.0, "top1_agreement": 1.0}


@pytest.mark.parametrize(("difference", "passes"), [(1e-6, True), (0.5, False)])
def test_the_recorded_agreement_counts_where_the_engine_cannot_run(
    bundle: Path, difference: float, passes: bool
) -> None:
    sidecar = (bundle / ORT).with_suffix(".json")
    change_json(sidecar, lambda engine: engine["versions"].update(onnxruntime="0.1"))
    change_engine(bundle, agreement=RECORDED | {"largest_relative_difference": difference})
    result = gated(bundle, "size<=1MB")
    assert statuses(result, "parity")[ORT] == ("met" if passes else "failed")
    assert result.exit_code == (0 if passes else 4)
    if passes:
        assert result.rows[2].estimate == 1e-6
        assert "as recorded (it was optimised by onnxruntime 0.1" in result.rows[2].sentence


@pytest.mark.parametrize("text", ["speedup>=1.3", "p99<=4ms"])
def test_latency_from_another_machine_decides_nothing_here(bundle: Path, text: str) -> None:
    record_laps(bundle, made_laps(), cpu="another CPU")
    write_manifest(bundle, versions={}, lineage={})
    result = gated(bundle, text, "size<=1MB")
    assert statuses(result, text) == {ORT: "another machine"}
    assert "measured on another machine (cpu 'another CPU' there" in result.rows[-1].sentence
    assert result.exit_code == 3
    assert result.verdict == f"cannot be judged here: {text}, measured on another machine (4 of 5 checks met)."
    assert gated(bundle, "size<=1MB", "top1_drop<=1").exit_code == 0


def test_what_failed_before_latency_outweighs_another_machine(bundle: Path) -> None:
    record_laps(bundle, made_laps(), cpu="another CPU")
    write_manifest(bundle, versions={}, lineage={})
    assert gated(bundle, "speedup>=1.3", "size<=1B").exit_code == 4


def test_laps_of_an_older_bundle_are_read_where_they_lie(bundle: Path) -> None:
    laps = read_laps(laps_path(bundle / ORT))
    fields = ("machine", "dense_laps_ms", "dense_blocks", "pruned_laps_ms", "pruned_blocks")
    old = {"protocol": {"id": "chip-deploy.latency/1"}} | {name: laps.model_dump(mode="json")[name] for name in fields}
    laps_path(bundle / ORT).unlink()
    (bundle / ORT).with_suffix(".latency.json").write_text(json.dumps(old), "utf-8")
    write_manifest(bundle, versions={}, lineage={})
    assert gated(bundle, "speedup>=1.3", "p99<=4ms").exit_code == 0


def test_an_interrupted_measurement_decides_no_latency(bundle: Path) -> None:
    record_laps(bundle, made_laps(), complete=False)
    write_manifest(bundle, versions={}, lineage={})
    for text in ("speedup>=1.3", "p99<=4ms"):
        result = gated(bundle, text)
        assert (result.exit_code, result.rows[-1].status) == (5, "inconclusive")
        assert "its measurement was interrupted" in result.rows[-1].sentence


def test_latency_whose_laps_are_gone_is_inconclusive(bundle: Path) -> None:
    laps_path(bundle / ORT).unlink()
    write_manifest(bundle, versions={}, lineage={})
    result = gated(bundle, "speedup>=1.3")
    assert (result.exit_code, result.rows[-1].status) == (5, "inconclusive")
    assert "its laps are missing" in result.rows[-1].sentence


def test_a_gate_reads_fields_that_the_report_has() -> None:
    # The gate goes to devices without the pipeline, so it has a small reader of its own.
    for read, written in ((gate._Engine, EngineRow), (gate._Accuracy, Accuracy), (gate._Report, Report)):
        assert read.model_fields.keys() <= written.model_fields.keys()


def test_a_recorded_agreement_is_held_against_what_rounding_costs_the_network(bundle: Path) -> None:
    sidecar = (bundle / ORT).with_suffix(".json")
    change_json(sidecar, lambda engine: engine["versions"].update(onnxruntime="0.1"))
    change_json(sidecar, lambda engine: engine["flags"].update(tf32=True))
    change_engine(bundle, agreement=RECORDED | {"largest_relative_difference": 0.2, "snr_db": 20.0})
    assert statuses(gated(bundle, "size<=1MB"), "parity")[ORT] == "failed"
    golden = read_golden(bundle)
    rounded = golden.outputs + np.float32(0.1) * np.abs(golden.outputs).max()
    write_golden(bundle / "golden.npz", golden._replace(by_precision={"tf32": rounded}))
    write_manifest(bundle, versions={}, lineage={})
    assert statuses(gated(bundle, "size<=1MB"), "parity")[ORT] == "met"
