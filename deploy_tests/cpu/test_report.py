"""The report: its JSON, its numbers, and three writings of it that say the same and nothing else."""

import functools
import io
import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from chip_deploy.export.agree import Agreement
from chip_deploy.export.laps import Control, Quantiles, Speedup
from chip_deploy.export.low_precision import Kept
from chip_deploy.export.machine import Machine
from chip_deploy.export.measure import BatchRow, GpuTimes, PathTimes
from chip_deploy.export.precision import Conversion, LeftOut
from chip_deploy.export.profile import LayerComparison, LayerTime
from chip_deploy.export.protocol import LatencyProtocol
from chip_deploy.export.sensitivity import Sensitivity
from chip_deploy.export.target import LayerTypes
from chip_deploy.export.watch import GpuState, MachineState, MachineWatch
from chip_deploy.pipeline import charts, quantities, report, report_layers, report_page, report_precision, wording
from chip_deploy.pipeline.report import (
    Accuracy,
    Cost,
    EngineRow,
    GroupReport,
    NetworkCost,
    PrecisionRow,
    Report,
    TrainCurve,
    read_report,
    render,
    report_schema,
    summary_table,
    write_report,
)

SCHEMA_FILE = Path(report.__file__).with_name("report.schema.json")
HOSTILE = """<script>alert("x")</script> & 'q' | `tick` <img src=//evil.example/x>"""
VOID = {"meta", "link", "br", "img", "hr", "input", "path", "line", "rect"}


def machine() -> Machine:
    return Machine(
        system="Linux 6.1 x86_64",
        cpu="AMD EPYC 9B14",
        cores=2,
        isa=["avx2", "avx512f"],
        memory_gib=15.6,
        governor=None,
        load=0.31,
        gpu=None,
        sm=None,
        driver=None,
        python="3.11.9",
    )


def group(layer: str, width: int, kept: int, coupled: list[str] | None = None) -> GroupReport:
    draw = random.Random(f"{layer} {width}")
    scores = [draw.expovariate(1.0) for _ in range(width)]
    best = sorted(range(width), key=lambda channel: -scores[channel])[:kept]
    return GroupReport(
        layer=layer, coupled=coupled or [], width_before=width, width_after=kept, scores=scores, kept=sorted(best)
    )


def measured(verdict: str, *, p99: bool, speedup: tuple[float, float, float], reason: str) -> EngineRow:
    return EngineRow(
        target="ort-cpu",
        precision="fp32",
        file="engines/ort-cpu.fp32.engine",
        sha256="ab" * 32,
        bytes=22_401_233,
        latency_ms=quantiles(2.5512, p99=p99),
        dense_latency_ms=quantiles(4.1687, p99=p99),
        speedup=Speedup(estimate=speedup[0], low=speedup[1], high=speedup[2], level=0.95),
        verdict=verdict,  # pyright: ignore[reportArgumentType]
        reason=reason,
        protocol=LatencyProtocol(),
        machine=machine(),
        built_for={"cpu": "AMD EPYC 9B14"},
        versions={"onnxruntime": "1.31.0"},
        build_seconds=0.84,
    )


def quantiles(p50: float, *, p99: bool) -> Quantiles:
    return Quantiles(p50=p50, p90=1.02 * p50, p99=1.1 * p50 if p99 else None, n=700, cv=0.02, mean=1.01 * p50)


UNMEASURED = EngineRow(
    target="trt-rtx:sm86,sm89",
    precision="fp32",
    file="engines/trt-rtx-sm86-sm89.fp32.engine",
    sha256="cd" * 32,
    bytes=25_401_233,
    verdict="not measured",
    reason="built, not measured on this machine: no CUDA driver",
)


@functools.cache
def digits_report() -> Report:
    """resnet18 on digits: faster on the CPU, and an engine that nothing here can run."""
    reason = "speed-up 1.634 (95 % interval 1.602 to 1.655), p50 2.551 ms against 4.169 ms of dense."
    engine = measured("faster", p99=True, speedup=(1.634, 1.602, 1.655), reason=reason)
    return Report(
        title="resnet18 on digits, half of the MACs kept",
        created="2026-05-04T09:31:22+00:00",
        model="resnet18",
        data="digits",
        criterion="chip",
        budget="half of the MACs were to stay; 49.4 % did",
        input_shape=[3, 32, 32],
        classes=10,
        accuracy=Accuracy(
            n=360, dense=355 / 360, pruned=166 / 360, recalibrated=323 / 360, tuned=0.975, onnx=352 / 360
        ),
        cost=Cost(
            dense=NetworkCost(macs=37_222_400, params=11_181_642, onnx_bytes=44_731_201),
            pruned=NetworkCost(macs=18_402_112, params=5_402_117, onnx_bytes=21_642_119),
        ),
        agreement=Agreement(n=360, largest_relative_difference=3e-7, snr_db=128.4, top1_agreement=1.0),
        engines=[engine.model_copy(update={"accuracy": 351 / 360}), UNMEASURED],
        groups=[
            group("conv1", 64, 64, ["layer1.0.conv2"]),
            group("layer1.0.conv1", 64, 32),
            group("layer4", 512, 208),
        ],
        score_images=640,
        dense_training=TrainCurve(epochs=3, seconds=13.2, loss=[1.31, 0.42, 0.05], lr=[0.05, 0.03, 0.001]),
        tuning=TrainCurve(epochs=2, seconds=3.1, loss=[0.61, 0.31]),
        stages_s={"dense": 13.9, "score": 4.21, "tune": 125.0},
        machine=machine(),
        versions={"chip-deploy": "0.1.0", "torch": "2.15.0"},
        recipe={"seed": 0, "model": {"name": "resnet18", "weights": None}, "targets": ["ort-cpu"]},
        notes=["the dense model was trained first, because no weights were given for digits"],
    )


@functools.cache
def random_report() -> Report:
    """A deep network with random data that did not become faster, with names as long as they come."""
    reason = "no difference to be seen: speed-up 0.978 (95 % interval 0.951 to 1.004)."
    widths = [64, 256, 1024, 2048]
    layers = [f"backbone.features.denseblock{i // 30}.denselayer{i}.bottleneck.convolution" for i in range(120)]
    return digits_report().model_copy(
        update={
            "title": "timm:an_extremely_long_model_name_without_a_break.in1k_ft_in12k_384 on random:64",
            "data": "random:64",
            "accuracy": Accuracy(),
            "engines": [measured("not faster", p99=False, speedup=(0.978, 0.951, 1.004), reason=reason)],
            "groups": [group(layer, widths[i // 30], widths[i // 30] * 3 // 4) for i, layer in enumerate(layers)],
            "dense_training": None,
            "tuning": None,
            "agreement": None,
        }
    )


@functools.cache
def rich_report() -> Report:
    """The digits report with everything that can be known about a measured engine and its scores."""
    base = digits_report()
    found = {
        "control": Control(speedup=Speedup(estimate=1.002, low=0.994, high=1.008), noise=0.008),
        "watch": MachineWatch(
            before=state(load=0.5, others=0.01, celsius=41.0),
            after=state(load=2.6, others=0.27, celsius=63.0),
            seconds=6.4,
            doubt="other processes used 27 % of the CPU",
            advice=["Close what else runs; `cpupower frequency-set -g performance` keeps the clock up."],
        ),
        "layers": layers([f"layer{n}.0.conv1" for n in range(1, 5)]),
        "times": GpuTimes(dense=paths(4.0), pruned=paths(2.5)),
        "batches": [
            batch(1, 1.634, verdict="faster", reason="speed-up 1.634"),
            batch(8, 1.021, verdict="unstable", reason="the machine ran at two speeds"),
        ],
    }
    known = {"images": 640, "score_seconds": 0.4}
    groups = [
        group.model_copy(update=known | {"stability": stability, "settled": stability > 0.9})
        for group, stability in zip(base.groups, (1.0, 0.97, 0.8125), strict=True)
    ]
    engines = [base.engines[0].model_copy(update=found), *base.engines[1:]]
    more = {"command": "chip-deploy prune --model resnet18", "digests": {"plan": "ef" * 32}}
    return base.model_copy(update={"engines": engines, "groups": groups, **more})


@functools.cache
def deep_report() -> Report:
    """The deep network, each of its 120 layers timed and each of its groups tested for stability."""
    base = random_report()
    groups = [
        group.model_copy(update={"images": 64, "stability": 1 - n / 200, "settled": n < 100})
        for n, group in enumerate(base.groups)
    ]
    engine = base.engines[0].model_copy(update={"layers": layers([group.layer for group in groups])})
    return base.model_copy(update={"engines": [engine], "groups": groups})


def state(*, load: float, others: float, celsius: float) -> MachineState:
    gpu = GpuState(name="NVIDIA L4", sm="sm89", sm_mhz=2040.0, power_limit_w=72.0, temperature_c=celsius)
    return MachineState(cpu="AMD EPYC 9B14", load=load, others_share=others, throttled=0, gpu=gpu)


def layers(names: list[str]) -> LayerComparison:
    """Each layer takes a microsecond longer than the one before it; the third is held up by memory."""
    rows = [
        LayerTime(
            layer=name,
            operators=["Conv", "Relu"],
            dense_ms=0.010 + 0.001 * n,
            pruned_ms=0.009 + 0.001 * n,
            dense_macs=2_000_000,
            pruned_macs=1_000_000,
            widths="64 -> 48",
            predicted_ms=(0.010 + 0.001 * n) / 2,
            why="memory-bound" if n == 2 else "",
        )
        for n, name in enumerate(names)
    ]
    added = rows[0].model_copy(
        update={"layer": "runtime: reorder", "dense_macs": 0, "pruned_macs": 0, "predicted_ms": None, "why": "overhead"}
    )
    return LayerComparison(
        rows=[*rows, added],
        profiled_on="onnxruntime's profiler, batch 1, median of 100 laps",
        efficiency=0.81,
        sentences=["MACs fell 2.02 times and the speed-up is 1.63: an efficiency of 81%."],
    )


def paths(device_ms: float) -> PathTimes:
    """A network that needs a millisecond for its copies and another one on the host."""
    times = (quantiles(device_ms + n, p99=True) for n in range(3))
    return PathTimes(**dict(zip(PathTimes.model_fields, times, strict=False)))


def batch(images: int, speedup: float, *, verdict: str, reason: str) -> BatchRow:
    return BatchRow(
        batch=images,
        dense=quantiles(4.0 * images, p99=True),
        pruned=quantiles(2.5 * images, p99=True),
        speedup=Speedup(estimate=speedup, low=speedup - 0.03, high=speedup + 0.03),
        verdict=verdict,  # pyright: ignore[reportArgumentType]
        reason=reason,
    )


@functools.cache
def precise_report() -> Report:
    """The digits report in three precisions: int8 is fastest on the CPU, and was kept within a bound."""
    base = digits_report()
    fp32 = base.engines[0]
    engines = [
        fp32,
        in_precision("fp16", pruned_ms=2.9, dense_ms=4.4, accuracy=352 / 360, speedup=1.517),
        in_precision("int8", pruned_ms=1.7, dense_ms=2.4, accuracy=349 / 360, speedup=1.412),
        UNMEASURED,
        UNMEASURED.model_copy(update={"precision": "int8", "file": "engines/trt-rtx-sm86-sm89.int8.engine"}),
    ]
    return base.model_copy(update={"engines": engines, "precisions": [fp16_row(), int8_row()]})


def in_precision(precision: str, *, pruned_ms: float, dense_ms: float, accuracy: float, speedup: float) -> EngineRow:
    types = LayerTypes(
        source="graph",
        layers={precision: 20},
        multiplying={precision: 9},
        other_type=[],
        unfused=[],
        reformats=None,
        sentence=f"All 9 multiplying layers run in {precision}.",
    )
    found = {
        "precision": precision,
        "file": f"engines/ort-cpu.{precision}.engine",
        "latency_ms": quantiles(pruned_ms, p99=True),
        "dense_latency_ms": quantiles(dense_ms, p99=True),
        "speedup": Speedup(estimate=speedup, low=speedup - 0.02, high=speedup + 0.02, level=0.95),
        "accuracy": accuracy,
        "layer_types": types,
    }
    return digits_report().engines[0].model_copy(update=found)


def fp16_row() -> PrecisionRow:
    kept = [Kept(layer="head.pool", operator="GlobalAveragePool", reason="it adds up 1024 numbers")]
    return PrecisionRow(
        precision="fp16",
        onnx_bytes=10_821_119,
        dense_onnx_bytes=22_365_601,
        accuracy=352 / 360,
        agreement=Agreement(n=360, largest_relative_difference=6e-4, snr_db=66.1, top1_agreement=1.0),
        conversion=Conversion(precision="fp16", opset=18, bytes=10_821_119, images=512, kept=kept),
        emulated=True,
    )


def int8_row() -> PrecisionRow:
    names = [f"layer{n}.0.conv1" for n in range(1, 15)]
    reason = "left out with the others, so that the file loses at most 0.5 points of top-1 on the evaluation images"
    return PrecisionRow(
        precision="int8",
        onnx_bytes=21_732_419,
        dense_onnx_bytes=44_821_301,
        accuracy=351 / 360,
        agreement=Agreement(n=360, largest_relative_difference=0.11, snr_db=24.4, top1_agreement=0.99),
        conversion=Conversion(
            precision="int8",
            opset=18,
            bytes=21_732_419,
            images=512,
            calibration="entropy",
            layers=14,
            left_out=[LeftOut(layer=names[0], operator="Conv", reason=reason)],
        ),
        left_out_by_bound=1,
        sensitivities=[
            Sensitivity(layer=name, operator="Conv", snr_db=20.0 + 2 * n if n < 13 else None)
            for n, name in enumerate(names)
        ],
    )


def hostile_report() -> Report:
    """Every free text of a report says what an attacker, or an unlucky layer name, would."""
    engine = UNMEASURED.model_copy(
        update={
            "reason": HOSTILE,
            "built_for": {HOSTILE: HOSTILE},
            "flags": {"f": HOSTILE},
            "versions": {HOSTILE: HOSTILE},
        }
    )
    texts = dict.fromkeys(("title", "created", "model", "data", "criterion", "budget", "macs_convention"), HOSTILE)
    return digits_report().model_copy(
        update={
            **texts,
            "engines": [engine],
            "groups": [group(HOSTILE, 8, 4, [HOSTILE])],
            "command": HOSTILE,
            "digests": {HOSTILE: HOSTILE},
            "stages_s": {HOSTILE: 1.0},
            "machine": machine().model_copy(update={"cpu": HOSTILE}),
            "versions": {HOSTILE: HOSTILE},
            "recipe": {"model": {"name": HOSTILE}},
            "notes": [HOSTILE],
        }
    )


def hostile_measured_report() -> Report:
    """What was measured says what an attacker would, too."""
    rich = rich_report()
    engine = rich.engines[0]
    assert engine.watch is not None
    assert engine.layers is not None
    watch = engine.watch.model_copy(
        update={"doubt": HOSTILE, "advice": [HOSTILE], "before": state(load=0, others=0, celsius=0)}
    )
    row = engine.layers.rows[0].model_copy(update={"layer": HOSTILE, "operators": [HOSTILE], "widths": HOSTILE})
    layered = engine.layers.model_copy(update={"rows": [row], "profiled_on": HOSTILE, "sentences": [HOSTILE]})
    found = {"reason": HOSTILE, "target": HOSTILE, "precision": HOSTILE, "watch": watch, "layers": layered}
    found["batches"] = [batch(images, 1.0, verdict="unstable", reason=HOSTILE) for images in (1, 8)]
    int8 = int8_row()
    out, layer = int8.conversion.left_out[0], int8.sensitivities[0]
    texts = {"layer": HOSTILE, "operator": HOSTILE}
    done = {
        "calibration": HOSTILE,
        "kept": [Kept(**texts, reason=HOSTILE)],
        "left_out": [out.model_copy(update={**texts, "reason": HOSTILE})],
    }
    row = {"conversion": int8.conversion.model_copy(update=done), "precision": HOSTILE}
    row["sensitivities"] = [layer.model_copy(update=texts)]
    found["layer_types"] = LayerTypes(
        source="graph", layers={}, multiplying={}, other_type=[], unfused=[], reformats=None, sentence=HOSTILE
    )
    precisions = [int8.model_copy(update=row)]
    return rich.model_copy(update={"engines": [engine.model_copy(update=found)], "precisions": precisions})


def with_laps(folder: Path) -> Path:
    """`folder`, with laps of the ort-cpu engine beside where the report goes."""
    draw = random.Random(0)
    laps = {
        side: [p50 * draw.uniform(0.98, 1.05) for _ in range(700)] for side, p50 in (("dense", 4.17), ("pruned", 2.55))
    }
    path = folder / "engines" / "ort-cpu.fp32.latency.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps(
            {
                "protocol": LatencyProtocol().model_dump(),
                "machine": machine().model_dump(),
                "dense_laps_ms": laps["dense"],
                "dense_blocks": [index // 10 for index in range(700)],
                "pruned_laps_ms": laps["pruned"],
                "pruned_blocks": [index // 10 for index in range(700)],
            }
        )
    )
    return folder


class Page(HTMLParser):
    """What a browser would see of a page; fails on a tag that is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(value: Report) -> str:
    return report_page.html_page(value, {})


def text_of(value: Report) -> str:
    return Page(page_of(value)).text


def terminal(value: Report) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(summary_table(value))
    return out.getvalue()


REPORTS = pytest.mark.parametrize(
    "make",
    [digits_report, rich_report, precise_report, random_report, deep_report, hostile_report, hostile_measured_report],
)


# report.json


def test_the_json_has_the_names_that_other_people_read(tmp_path: Path) -> None:
    write_report(digits_report(), tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert {"accuracy", "cost", "engines", "stages_s", "machine", "versions", "recipe"} <= found.keys()
    assert found["schema"] == "chip-deploy.report/1"
    assert found["accuracy"].keys() == {"n", "dense", "pruned", "recalibrated", "recovered", "tuned", "onnx"}
    assert found["cost"]["dense"] == {"macs": 37_222_400, "params": 11_181_642, "onnx_bytes": 44_731_201}
    first, second = found["engines"]
    assert {"target", "precision", "file", "sha256", "accuracy", "verdict", "reason"} <= first.keys()
    assert {"p50", "p90", "p99", "n"} <= first["latency_ms"].keys()
    assert {"estimate", "low", "high"} <= first["speedup"].keys()
    assert [second[name] for name in ("latency_ms", "dense_latency_ms", "speedup", "accuracy")] == [None] * 4


@REPORTS
def test_a_report_comes_back_as_it_was_written(make: Any, tmp_path: Path) -> None:
    write_report(make(), tmp_path)
    assert read_report(tmp_path) == make()
    assert read_report(tmp_path / "report.json") == make()


def test_numbers_of_a_list_share_a_line_and_texts_stay_as_they_are(tmp_path: Path) -> None:
    tricky = digits_report().model_copy(update={"notes": ["[\n 1,\n 2\n]", "[ 3, 4 ]"]})
    write_report(tricky, tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text) == tricky.model_dump(mode="json", by_alias=True)
    assert max(len(line) for line in text.splitlines()) > 1000
    assert not re.search(r"^\s*[\d.e+-]+,?$", text, re.M)


def test_the_schema_in_the_package_is_current() -> None:
    assert SCHEMA_FILE.read_text() == report.schema_text(), (
        "write it again: python -c 'from chip_deploy.pipeline import report; "
        'open("pipeline/report.schema.json", "w").write(report.schema_text())\''
    )


def test_the_schema_asks_for_every_field_that_is_written() -> None:
    schema = report_schema()
    written = digits_report().model_dump(mode="json", by_alias=True)
    assert set(schema["required"]) == written.keys() == schema["properties"].keys()
    assert set(schema["$defs"]["EngineRow"]["required"]) == written["engines"][0].keys()


def test_a_report_from_before_these_were_recorded_reads_as_one_without_them(tmp_path: Path) -> None:
    write_report(digits_report(), tmp_path)
    path = tmp_path / "report.json"
    old = json.loads(path.read_text())
    del old["digests"], old["command"], old["precisions"]
    for engine in old["engines"]:
        for name in ("batch", "control", "watch", "layers", "times", "batches", "layer_types"):
            del engine[name]
        for quantiles_of in filter(None, (engine["latency_ms"], engine["dense_latency_ms"])):
            del quantiles_of["throughput"], quantiles_of["early_stopping_p90"]
    for channels in old["groups"]:
        for name in ("images", "stability", "settled", "score_seconds"):
            del channels[name]
    path.write_text(json.dumps(old))
    assert read_report(tmp_path) == digits_report()


def test_a_missing_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"report\.json: no report here\. Give the directory"):
        read_report(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": "chip-deploy.report/9"}, "schema"),
        ({"classes": "many"}, "classes"),
        ({"surprise": 1}, "surprise"),
        ({"cost": {}}, "cost.dense"),
    ],
)
def test_a_report_that_cannot_be_read_names_the_field(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    write_report(digits_report(), tmp_path)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"not a report of this version \({re.escape(named)}: "):
        read_report(path)


def test_a_broken_file_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema": ')
    with pytest.raises(ValueError, match="not a report of this version"):
        read_report(tmp_path)


# What a report refuses to say


@pytest.mark.parametrize("number", ["latency_ms", "dense_latency_ms", "speedup"])
def test_an_engine_that_was_not_measured_has_no_number(number: str) -> None:
    faster = digits_report().engines[0]
    with pytest.raises(ValidationError, match="not measured cannot have"):
        EngineRow.model_validate(UNMEASURED.model_dump() | {number: getattr(faster, number)})


@pytest.mark.parametrize("finding", ["control", "layers", "times", "batches"])
def test_nothing_is_found_about_an_engine_that_was_not_measured(finding: str) -> None:
    rich = rich_report().engines[0]
    with pytest.raises(ValidationError, match="not measured cannot have"):
        EngineRow.model_validate(UNMEASURED.model_dump() | {finding: getattr(rich, finding)})


@pytest.mark.parametrize("verdict", ["faster", "not faster"])
def test_a_verdict_needs_what_it_rests_on(verdict: str) -> None:
    with pytest.raises(ValidationError, match="needs both latencies and the speed-up"):
        EngineRow.model_validate(UNMEASURED.model_dump() | {"verdict": verdict})


@pytest.mark.parametrize(("verdict", "low"), [("faster", 0.999), ("faster", 1.0), ("not faster", 1.001)])
def test_a_verdict_that_contradicts_its_interval_is_refused(verdict: str, low: float) -> None:
    interval = Speedup(estimate=1.2, low=low, high=1.3, level=0.95)
    with pytest.raises(ValidationError, match="contradicts a speed-up"):
        EngineRow.model_validate(dict(digits_report().engines[0]) | {"verdict": verdict, "speedup": interval})


def test_a_copy_that_contradicts_itself_is_not_written(tmp_path: Path) -> None:
    # A model's copy is not validated; only writing stands between it and the reader.
    smuggled = digits_report().engines[0].model_copy(update={"verdict": "not measured"})
    with pytest.raises(ValueError, match="not measured cannot have"):
        write_report(digits_report().model_copy(update={"engines": [smuggled]}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_accuracy_needs_its_number_of_images() -> None:
    with pytest.raises(ValidationError, match="number of images"):
        Accuracy(dense=0.9)


@pytest.mark.parametrize("value", [-0.1, 1.1, 97.8, math.nan])
def test_an_accuracy_is_a_fraction(value: float) -> None:
    with pytest.raises(ValidationError):
        Accuracy(n=10, dense=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0]}, "1 scores for 8 channels"),
        ({"kept": [0, 1]}, "do not make the width 3"),
        ({"kept": [0, 1, 1]}, "do not make the width 3"),
        ({"kept": [0, 1, 8]}, "none of its 8"),
        ({"scores": [math.inf] * 8}, "finite"),
    ],
)
def test_a_group_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    sound = {"layer": "conv1", "width_before": 8, "width_after": 3, "kept": [5, 0, 2], "scores": [1.0] * 8}
    GroupReport.model_validate(sound)
    with pytest.raises(ValidationError, match=message):
        GroupReport.model_validate(sound | change)


# Three writings, one truth


def test_all_three_writings_show_the_same_comparison() -> None:
    value = digits_report()
    markdown, html, table = report_page.markdown_page(value), text_of(value), terminal(value)
    for text in ("98.6 %", "97.8 %", "37.2 M", "18.4 M", "11.2 M", "5.40 M", "44.7 MB", "21.6 MB"):
        assert text in markdown
        assert text in html
        assert text in table
    for text in ("4.17 ms", "2.55 ms", "4.25 ms", "2.60 ms", "4.59 ms", "2.81 ms", "1.63×", "1.60–1.66×"):
        assert text in markdown
        assert text in html
        assert text in table


def test_accuracy_is_told_at_every_stage() -> None:
    value = digits_report()
    for text in (report_page.markdown_page(value), text_of(value)):
        for percent in ("98.6 %", "46.1 %", "89.7 %", "97.5 %", "97.8 %"):
            assert percent in text
        assert "Engine trt-rtx:sm86,sm89 fp32" in text
        assert "not evaluated" in text


def test_efficiency_is_the_speed_up_over_the_reduction_of_macs() -> None:
    # 37 222 400 / 18 402 112 = 2.0227; 1.634 / 2.0227 = 0.8078.
    for text in (report_page.markdown_page(digits_report()), text_of(digits_report())):
        assert "0.81 (speed-up 1.63×, MACs ÷ 2.02)" in text.replace("\u00a0", " ")


@pytest.mark.parametrize("write", [text_of, report_page.markdown_page, terminal])
def test_an_unmeasured_engine_is_said_in_words_only(write: Any) -> None:
    only = digits_report().model_copy(update={"engines": [UNMEASURED]})
    text = write(only).lower()
    assert "built, not measured on this machine: no cuda driver." in " ".join(text.split())
    assert not re.search(r"\d ms\b|\d×(?!\d)", text)


@pytest.mark.parametrize("write", [text_of, report_page.markdown_page])
def test_random_data_have_no_accuracy_and_the_report_says_so(write: Any) -> None:
    text = write(random_report())
    assert "No accuracy exists: random:64 has no labels that mean anything." in text
    assert "points" not in text
    assert "Top-1 on" not in text


@pytest.mark.parametrize("write", [text_of, report_page.markdown_page, terminal])
def test_a_percentile_that_the_laps_cannot_support_is_left_out(write: Any) -> None:
    assert "Latency p99" in write(digits_report())
    assert "Latency p90" in write(random_report())
    assert "Latency p99" not in write(random_report())


@pytest.mark.parametrize("write", [text_of, report_page.markdown_page])
def test_precisions_are_ranked_by_latency_with_what_they_cost(write: Any) -> None:
    text = " ".join(write(precise_report()).replace("\\", "").split())
    ranked = text[text.index("ort-cpu, the fastest first") :]
    assert ranked.index("int8") < ranked.index("fp32") < ranked.index("fp16")
    assert "ort-cpu: by median latency int8 1.70 ms, fp32 2.55 ms, fp16 2.90 ms. int8 is fastest," in text
    assert "2.45× faster than the dense fp32 network" in text  # 4.1687 / 1.7
    assert "and top-1 −0.8 points to fp32." in text  # 349 against 352 of 360
    assert "1.44×" in text  # fp16: 4.1687 / 2.9


@pytest.mark.parametrize(("other_ms", "noise", "named"), [(1.74, 0.0, False), (1.76, 0.0, True), (1.80, 0.08, False)])
def test_medians_closer_than_can_be_told_apart_name_no_winner(other_ms: float, noise: float, named: bool) -> None:
    value = precise_report()
    control = Control(speedup=Speedup(estimate=1.0, low=1 - noise, high=1 + noise), noise=noise)
    engines = [
        engine.model_copy(update={"latency_ms": quantiles(other_ms, p99=True), "control": control})
        if engine.precision == "fp32" and engine.latency_ms
        else engine
        for engine in value.engines
    ]
    (sentence,) = report_precision.ranking_sentences(value.model_copy(update={"engines": engines}))
    assert ("int8 is fastest" in sentence) == named
    assert ("int8 and fp32 are too close to say which is fastest." in sentence) != named


def test_the_terminal_says_which_precision_is_fastest_too() -> None:
    assert "int8 is fastest, 2.45× faster than the dense fp32 network and top-1 -0.8 points to fp32." in " ".join(
        terminal(precise_report()).split()
    )


def test_an_order_that_rests_on_an_unstable_measurement_is_called_chance() -> None:
    value = precise_report()
    engines = [value.engines[0].model_copy(update={"verdict": "unstable"}), *value.engines[1:]]
    (sentence,) = report_precision.ranking_sentences(value.model_copy(update={"engines": engines}))
    assert sentence.endswith("At least one of these measurements is unstable: the order may be chance.")


def test_one_precision_alone_is_not_ranked() -> None:
    assert report_precision.rankings(digits_report()) == []
    assert "The network was written in FP32 alone." in text_of(digits_report())


def test_without_an_engine_in_fp32_nothing_is_compared_with_one() -> None:
    value = precise_report()
    only = value.model_copy(update={"engines": value.engines[1:3]})
    (ranking,) = report_precision.rankings(only)
    assert [row.to_dense for row in ranking.rows] == ["", ""]
    assert "dense fp32" not in ranking.sentence


@pytest.mark.parametrize("write", [text_of, report_page.markdown_page])
def test_what_was_quantised_and_what_was_left_out_is_told(write: Any) -> None:
    text = " ".join(write(precise_report()).split())
    for said in (
        "13 of 14 layers are quantised, with ranges by entropy from 512 training images;",
        "what is not quantised is in fp32.",
        "Top-1 of the ONNX file is 97.5 %, −0.3 points to fp32.",
        "left out with the others, so that the file loses at most 0.5 points of top-1 on the evaluation images",
        "To keep the bound on top-1, 1 layer was left out. How many was chosen on the evaluation images:",
        "in float32, each tensor rounded to fp16, as onnxruntime's CPU has no fp16 convolutions: SNR 66.1 dB",
        "Looked for overflow on 512 images: none.",
        "1 node stays in fp32, in head.pool.",
        "it adds up 1024 numbers",
        "All 9 multiplying layers run in int8.",
    ):
        assert said in text, said


@pytest.mark.parametrize("write", [text_of, report_page.markdown_page])
def test_the_layer_that_costs_most_comes_first_with_its_error(write: Any) -> None:
    text = write(precise_report())
    order = [text.index(f"{db:.1f} dB") for db in (20.0, 22.0, 44.0)]
    assert order == sorted(order)
    assert "10 %" in text  # 20 dB: a tenth of the outputs
    assert "no change" in text


def test_of_many_layers_the_most_sensitive_are_shown_and_the_others_on_request() -> None:
    (_, view) = report_precision.precision_views(precise_report())
    assert (len(view.first), len(view.rest)) == (12, 2)
    assert (view.first[0].quantised, view.first[1].quantised) == ("left out", "yes")
    assert (view.first[0].bar, view.rest[-1].bar) == (100.0, 0.0)


def test_an_engine_that_was_not_measured_is_ranked_last_with_the_accuracy_of_its_file() -> None:
    ranking = report_precision.rankings(precise_report())[1]
    assert [row.median for row in ranking.rows] == ["not measured", "not measured"]
    assert [row.accuracy for row in ranking.rows] == ["97.8 % (ONNX file)", "97.5 % (ONNX file)"]


def card_of(value: Report) -> str:
    """The first card of the page."""
    html = page_of(value)
    start = html.index('<li class="card')
    return html[start : html.index("</li>", start)]


def test_not_faster_is_as_large_as_faster() -> None:
    cards = [card_of(make()) for make in (digits_report, random_report)]
    assert '<p class="word">Not faster 0.98×</p>' in cards[1]
    shown = [re.sub(r'<p class="reason">.*?</p>', "", re.sub(r"not-faster|faster", "VERDICT", card)) for card in cards]
    # The same elements in the same classes; only where a label stands depends on the numbers.
    tags = [re.findall(r"<\w+", card) + re.findall(r'<p class="[^"]+"', card) for card in shown]
    assert tags[0] == tags[1]
    sizes = re.findall(r"\.card[^{]*\{[^}]*font-size", page_of(random_report()))
    assert not [rule for rule in sizes if "faster" in rule]


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("speed-up 1.634 (95 % interval 1.602 to 1.655), p50 2.551 ms against 4.169 ms of dense.", []),
        ("slower than dense: speed-up 0.978 (95 % interval 0.951 to 0.99).", ["Slower than dense."]),
        (
            "no verdict, because it was hot; speed-up 1.2 (95 % interval 1.1 to 1.3).",
            ["No verdict, because it was hot."],
        ),
        ("as measured", ["As measured."]),
    ],
)
def test_the_card_tells_each_number_once(reason: str, said: list[str]) -> None:
    engine = digits_report().engines[0].model_copy(update={"reason": reason})
    card = card_of(digits_report().model_copy(update={"engines": [engine]}))
    assert re.findall(r'<p class="reason">(.*?)</p>', card) == said
    assert card.count("interval 1.60–1.66×") == card.count("Median 4.17 ms dense, 2.55 ms pruned") == 1


def test_the_card_says_whether_the_machine_was_steady() -> None:
    assert "Noise floor 0.80 %; machine not steady." in card_of(rich_report())
    assert "trust" not in card_of(digits_report())


def test_the_verdict_stands_before_everything_else() -> None:
    html = page_of(digits_report())
    assert html.index('class="card faster"') < html.index("<nav") < html.index("<table")
    assert "faster 1.63× on ort-cpu fp32" in html[: html.index("</title>")]


@pytest.mark.parametrize("write", [text_of, report_page.markdown_page])
def test_the_noise_floor_and_both_states_of_the_machine_are_told(write: Any) -> None:
    text = write(rich_report()).replace("\u00a0", " ").replace("\\", "")
    assert "came out at 1.002× (95 % interval 0.994× to 1.008×): a difference below 0.80 % is noise" in text
    assert "Other processes used 27 % of the CPU." in text
    for before, after in (("1.0 %", "27 %"), ("0.5", "2.6"), ("41 °C", "63 °C")):
        assert re.search(rf"{before}[ |]+{after}", text)
    assert "not measured against itself" in write(digits_report())


@pytest.mark.parametrize("write", [text_of, report_page.markdown_page])
def test_gpu_times_and_batch_sizes_are_kept_apart(write: Any) -> None:
    text = re.sub(r"[ |]+", " ", write(rich_report()))
    for row in (
        "Device compute 4.00 ms 2.50 ms 1.60×",
        "With transfers 5.00 ms 3.50 ms 1.43×",
        "Host, end to end 6.00 ms 4.50 ms 1.33×",
    ):
        assert row in text
    assert re.search(r"8 32\.0 ms 20\.0 ms 1\.02× \(0\.99–1\.05×\) .*unstable", text)
    assert "Device compute" not in write(digits_report())


def test_one_batch_size_alone_is_no_table() -> None:
    rich = rich_report()
    engine = rich.engines[0].model_copy(update={"batches": rich.engines[0].batches[:1]})
    assert "Batch sizes of" in page_of(rich)
    assert "Batch sizes of" not in page_of(rich.model_copy(update={"engines": [engine]}))


@pytest.mark.parametrize("write", [text_of, report_page.markdown_page])
def test_every_layer_stands_beside_what_its_macs_promised(write: Any) -> None:
    text = re.sub(r"[ |]+", " ", write(rich_report()).replace("\\", ""))
    # 12 µs dense, 11 µs pruned, and half of the MACs are left: 1.09 times faster where 2 times was promised.
    assert re.search(r"3 layer3\.0\.conv1 .*64 → 48 12\.0 11\.0 1\.09× 2\.00× memory-bound", text)
    assert "an efficiency of 81%" in text
    assert "No layer was timed on its own." in write(digits_report())


def test_of_a_deep_network_the_slowest_layers_come_first_and_none_is_lost() -> None:
    (view,) = report_layers.layers_views(deep_report().engines)
    # The last layer is the slowest, by how they were made; the one that the runtime added is as fast as the first.
    assert [layer.number for layer in view.first] == list(range(101, 121))
    assert sorted(layer.number for layer in view.first + view.rest) == list(range(1, 122))
    shown = {layer.number for layer in report_layers.layers_views(rich_report().engines)[0].first}
    assert shown == set(range(1, 6))


@pytest.mark.parametrize("write", [text_of, report_page.markdown_page])
def test_the_stability_of_the_scores_is_told_for_every_group(write: Any) -> None:
    text = re.sub(r"[ |]+", " ", write(rich_report()).replace("\\", ""))
    assert "2 of 3 groups settled; the least stable is group 3 with 81.2 % of its kept channels" in text
    assert "from 640 images; scored in 1.20 s." in text
    assert "3 layer4 640 81.2 % no 0.40 s" in text
    assert "settled;" not in write(digits_report())


def test_of_many_groups_the_least_stable_are_shown_and_the_others_on_request() -> None:
    html = page_of(deep_report())
    section = html[html.index('<section id="scores"') : html.index('<section id="tuning"')]
    first, rest = section.split("<summary>The other 110 groups</summary>")
    assert re.findall(r'href="#group-(\d+)"', first) == [str(number) for number in range(120, 110, -1)]
    assert len(re.findall(r'href="#group-(\d+)"', rest)) == 110
    assert "<details>\n<summary>The scores of 120 groups</summary>" in section


def test_a_share_is_never_rounded_up_to_the_whole() -> None:
    nearly = rich_report().groups[0].model_copy(update={"stability": 0.9999})
    text = text_of(rich_report().model_copy(update={"groups": [nearly]}))
    assert "99.9 %" in text
    assert "100.0 % of its kept channels" not in text


def test_engines_of_one_name_have_anchors_of_their_own() -> None:
    engine = digits_report().engines[0]
    other = engine.model_copy(update={"file": "engines/other.engine"})
    html = page_of(digits_report().model_copy(update={"engines": [engine, other]}))
    assert re.findall(r'id="engine-(\S+)"', html) == ["ort-cpu-fp32", "ort-cpu-fp32-2"]


@pytest.mark.parametrize("write", [text_of, report_page.markdown_page])
def test_the_report_says_how_to_check_it_and_to_make_it_again(write: Any) -> None:
    text = write(rich_report()).replace("\\", "")
    for command in (
        "chip-deploy prune --model resnet18",
        "chip-deploy verify BUNDLE",
        "chip-deploy measure BUNDLE --target ort-cpu",
        "ef" * 32,
    ):
        assert command in text
    assert "--target trt-rtx" not in text


def test_a_report_without_engines_says_that_nothing_was_measured() -> None:
    bare = digits_report().model_copy(update={"engines": [], "groups": [], "notes": [], "stages_s": {}, "tuning": None})
    assert "Not measured No engine was asked for." in text_of(bare)
    assert "The pruned network was not tuned." in text_of(bare)
    assert "no engine was asked for" in report_page.markdown_page(bare)
    assert "Network" in terminal(bare)


def test_the_recipe_is_shown_as_toml() -> None:
    assert '[model] name = "resnet18"' in text_of(digits_report())
    assert "```toml\nseed = 0\n" in report_page.markdown_page(digits_report())


# The terminal


@REPORTS
def test_the_table_fits_eighty_columns(make: Any) -> None:
    assert max(len(line) for line in terminal(make()).splitlines()) <= 80


def test_the_table_says_verdict_and_reason() -> None:
    text = " ".join(terminal(random_report()).split())
    assert "Verdict not faster" in text
    assert "ort-cpu fp32: not faster. No difference to be seen: speed-up 0.978" in text


# The HTML page


@REPORTS
def test_the_page_needs_nothing_but_itself(make: Any, tmp_path: Path) -> None:
    html = page_of(make())
    page = Page(html)
    assert not {"script", "iframe", "object", "img"} & {tag for tag, _ in page.elements}
    assert all(link.startswith("#") or link == "data:," for link in page.attributes("href"))
    assert page.attributes("src") == []
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


@REPORTS
def test_every_link_and_label_of_the_page_leads_somewhere(make: Any) -> None:
    page = Page(page_of(make()))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    targets = [link[1:] for link in page.attributes("href") if link.startswith("#")]
    labels = [name for names in page.attributes("aria-labelledby") for name in names.split()]
    assert set(targets) | set(labels) <= set(ids)
    assert len(targets) > 20


@REPORTS
def test_drawings_have_names_and_tables_have_headers(make: Any, tmp_path: Path) -> None:
    write_report(make(), with_laps(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.all("svg")) > 1
    assert all(svg.get("role") == "img" for svg in page.all("svg"))
    assert all(svg.get("aria-label") or svg.get("aria-labelledby") for svg in page.all("svg"))
    assert all(cell.get("scope") for cell in page.all("th"))


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    page = Page(page_of(hostile_report()))
    tags, measured_tags = (
        {tag for tag, _ in Page(page_of(make())).elements} for make in (hostile_report, hostile_measured_report)
    )
    assert tags | measured_tags <= {tag for tag, _ in Page(page_of(rich_report())).elements}
    assert page.text.count("""<script>alert("x")</script> & 'q' | `tick`""") > 12


def test_hostile_text_breaks_no_markdown_table() -> None:
    lines = report_page.markdown_page(hostile_report()).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    rows = [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in tables]
    assert set(rows) == {2, 3, 4, 7}
    measured_lines = report_page.markdown_page(hostile_measured_report()).splitlines()
    measured_rows = [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in measured_lines if line.startswith("|")]
    assert set(measured_rows) == {2, 3, 4, 5, 6, 7, 8}
    outside_code = re.sub(r"(?s)^(`{3,})toml.*?^\1$", "", "\n".join(lines), flags=re.M)
    assert not re.search(r"(?<!\\)<", outside_code)


def test_the_page_of_a_deep_network_draws_every_group() -> None:
    page = Page(page_of(random_report()))
    assert len([name for name in page.attributes("id") if re.fullmatch(r"group-\d+", name)]) == 120
    assert len(page_of(random_report())) < 1_000_000


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    folders = [with_laps(tmp_path / name) for name in "ab"]
    for folder in folders:
        write_report(digits_report(), folder)
    for name in ("report.json", "report.md", "report.html"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_the_pages_are_made_again_from_the_json_and_the_laps(tmp_path: Path) -> None:
    written = write_report(digits_report(), with_laps(tmp_path))
    assert [path.name for path in written] == ["report.json", "report.md", "report.html"]
    before = [path.read_bytes() for path in written]
    (tmp_path / "report.md").unlink()
    (tmp_path / "report.html").unlink()
    assert [path.name for path in render(tmp_path)] == ["report.md", "report.html"]
    assert [path.read_bytes() for path in written] == before
    assert not list(tmp_path.glob(".*"))


def test_the_distribution_is_drawn_from_the_laps_or_missed_in_words(tmp_path: Path) -> None:
    write_report(digits_report(), with_laps(tmp_path))
    drawn = (tmp_path / "report.html").read_text()
    assert drawn.count('class="hist"') == 2
    assert drawn.count('class="line dense"') == drawn.count('class="line pruned"') - 3 == 1
    assert "700 laps dense, 700 laps pruned, 1 image a lap" in Page(drawn).text
    assert 'class="hist"' not in page_of(digits_report())
    assert "The laps of ort-cpu fp32 are not beside this report" in text_of(digits_report())


def test_without_the_template_library_no_page_is_left_that_contradicts_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(digits_report(), tmp_path)
    monkeypatch.setattr(report, "pages_unavailable", lambda: "report.html needs jinja2.")
    assert [path.name for path in write_report(random_report(), tmp_path)] == ["report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]
    with pytest.raises(ModuleNotFoundError, match="jinja2"):
        render(tmp_path)


# Colours


def schemes() -> dict[str, dict[str, str]]:
    """The colours of the page by name, in the light and in the dark scheme."""
    style = page_of(digits_report())
    blocks = re.findall(r":root \{(.*?)\}", style, re.S)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks)
    return {"light": light, "dark": dark}


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.1 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(scheme: str) -> None:
    colours = schemes()[scheme]
    assert colours.keys() == schemes()["light"].keys()
    pairs = [(text, ground) for text in ("ink", "soft", "link") for ground in ("page", "panel")]
    for verdict in ("faster", "slower", "unstable", "unmeasured"):
        pairs += [(verdict, f"{verdict}-panel"), ("ink", f"{verdict}-panel"), (verdict, "page")]
    for text, ground in pairs:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_marks_stand_out_from_the_page(scheme: str) -> None:
    colours = schemes()[scheme]
    for mark in ("pruned", "cut", "dense"):
        assert contrast(colours[mark], colours["page"]) >= 3, mark


# A real browser, where there is one


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a screen, driven through playwright; neither is needed by anything but these tests."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("chromium is not installed; the page is not looked at")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; no page is looked at")
    with driver.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def look(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens the page of a report; `log` of what it returns holds whatever the browser complained about or asked for."""
    contexts = []

    def open_page(value: Report, *, width: int = 1280, height: int = 800, at: str = "", **settings: Any) -> Any:
        write_report(value, tmp_path if (tmp_path / "engines").exists() else with_laps(tmp_path))
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **settings))
        page = contexts[-1].new_page()
        page.log = []
        page.on("console", lambda message: page.log.append(message.text))
        page.on("pageerror", lambda error: page.log.append(str(error)))
        page.on("request", lambda request: page.log.append(request.url))
        page.goto((tmp_path / "report.html").as_uri() + at)
        return page

    yield open_page
    for context in contexts:
        context.close()


def axe_of(page: Any) -> Any:
    """What axe-core finds on a page with all its details open: rule -> number of elements, violated and passed."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed").Axe()
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    found = axe.run(page, options={"resultTypes": ["violations", "passes"]}).response
    told = [
        f"{rule['id']}: {node['target']} {node['failureSummary']}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]
    return told, {rule["id"]: len(rule["nodes"]) for rule in found["passes"]}


SIDEWAYS = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
# A4 less the margins of 14 mm, at 96 dots an inch.
PAPER = {"width": 688, "height": 1017}


@REPORTS
def test_the_browser_has_nothing_to_complain_about_and_nothing_to_fetch(make: Any, look: Any) -> None:
    page = look(make())
    assert page.log == [page.url]


@REPORTS
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_does_not_scroll_sideways(make: Any, width: int, look: Any) -> None:
    page = look(make(), width=width)
    assert page.evaluate(SIDEWAYS) == [width, width]
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate(SIDEWAYS) == [width, width]


@pytest.mark.parametrize(
    ("make", "scheme"),
    [*itertools.product([digits_report, rich_report], ["light", "dark"]), (deep_report, "dark")],
)
def test_axe_finds_no_fault(make: Any, scheme: str, look: Any) -> None:
    faults, passed = axe_of(look(make(), color_scheme=scheme))
    assert faults == []
    # The contrast of text was judged, and not passed over because the background could not be told.
    assert passed["color-contrast"] > 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_sees_text_that_is_too_faint(scheme: str, look: Any) -> None:
    page = look(rich_report(), color_scheme=scheme)
    page.add_style_tag(content=":root { --soft: #808080 !important; --page: #6a6a6a !important }")
    faults, _ = axe_of(page)
    assert any(fault.startswith("color-contrast") for fault in faults)


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (360, 780)])
@pytest.mark.parametrize("make", [rich_report, deep_report])
def test_the_verdict_is_in_the_first_screen(make: Any, width: int, height: int, look: Any) -> None:
    page = look(make(), width=width, height=height)
    seen = page.locator(".card .word").first.bounding_box()
    assert seen["y"] + seen["height"] < height / 2


@pytest.mark.parametrize("make", [rich_report, deep_report, hostile_measured_report])
def test_on_paper_no_table_is_cut_and_nothing_stays_folded(make: Any, look: Any) -> None:
    page = look(make(), **PAPER, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate(SIDEWAYS) == [688, 688]
    cut = "one => one.getBoundingClientRect().right > 689 || one.scrollWidth > one.clientWidth + 1"
    tables = "[...document.querySelectorAll('.wide, .wide > table, .names, pre')]"
    assert page.evaluate(f"{tables}.filter({cut}).map(one => one.closest('section').id)") == []
    folded = (
        "[...document.querySelectorAll('details > :not(summary)')].filter(one => !one.getBoundingClientRect().height)"
    )
    assert page.evaluate(f"{folded}.length") == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()


def test_paper_gets_a_pdf_of_a_few_pages(look: Any) -> None:
    pdf = look(rich_report()).pdf(format="A4", prefer_css_page_size=True)
    assert 4 < len(re.findall(rb"/Type\s*/Page\b", pdf)) < 15


def test_everything_works_without_javascript(look: Any) -> None:
    page = look(deep_report(), java_script_enabled=False)
    hidden = page.get_by_role("region", name="Widths of every group")
    assert not hidden.is_visible()
    page.get_by_text("The 120 groups as a table").click()
    assert hidden.is_visible()


@pytest.mark.parametrize("anchor", ["layers", "latency-ort-cpu-fp32", "digests", "group-3"])
def test_a_link_leads_to_its_section(anchor: str, look: Any) -> None:
    page = look(rich_report(), at=f"#{anchor}", reduced_motion="reduce")
    # A reader lands with the section in sight; the last ones of a page cannot be scrolled to its top.
    place = page.locator(f"#{anchor}").bounding_box()
    assert 0 <= place["y"] < 800


def test_a_link_into_what_is_folded_opens_it(look: Any) -> None:
    page = look(deep_report(), at="#group-77", reduced_motion="reduce")
    assert 0 <= page.locator("#group-77").bounding_box()["y"] < 800


# Numbers as people read them


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (quantities.count(999), "999"),
        (quantities.count(271_098), "271 k"),
        (quantities.count(999_960), "1.00 M"),
        (quantities.count(37_240_000), "37.2 M"),
        (quantities.count(4_089_184_256), "4.09 G"),
        (quantities.size(512), "512 B"),
        (quantities.size(44_731_201), "44.7 MB"),
        (quantities.size(9_999), "10.0 kB"),
        (quantities.milliseconds(4.2069), "4.21 ms"),
        (quantities.milliseconds(0.086249), "0.0862 ms"),
        (quantities.milliseconds(9.999), "10.0 ms"),
        (quantities.milliseconds(1342.4), "1340 ms"),
        (quantities.seconds(0.42), "0.42 s"),
        (quantities.seconds(13.14), "13.1 s"),
        (quantities.seconds(59.96), "1 min 00 s"),
        (quantities.seconds(125.2), "2 min 05 s"),
        (quantities.seconds(3840), "1 h 04 min"),
        (quantities.factor(1.634), "1.63×"),
        (quantities.factor(12.34), "12.3×"),
        (quantities.factor_interval(0.951, 1.004), "0.95–1.00×"),
        (quantities.percent(0.98611, 360), "98.6 %"),
        (quantities.percent(0.9173, 10_000), "91.73 %"),
        (quantities.points(-0.0083, 360), "−0.8 points"),
        (quantities.points(0.0001, 360), "±0.0 points"),
        (quantities.change(37.2, 18.4), "−50.5 %"),
        (quantities.change(10, 11), "+10.0 %"),
        (quantities.change(0, 0), "none"),
        (quantities.fine_factor(1.0024), "1.002×"),
        (quantities.fraction(0.0062), "0.62 %"),
        (quantities.fraction(0.12), "12 %"),
        (quantities.fraction(0), "0 %"),
        (quantities.significant(0), "0"),
        (quantities.significant(-0.5), "−0.500"),
    ],
)
def test_numbers_have_sensible_digits_and_their_unit(text: str, expected: str) -> None:
    assert text == expected


@given(st.floats(min_value=1e-5, max_value=1e12))
def test_three_digits_are_never_off_by_more_than_half_of_the_last(value: float) -> None:
    # Rounding to three digits moves a number by at most 5 in the fourth: 0.5 % of 1.00.
    assert float(quantities.significant(value)) == pytest.approx(value, rel=0.005 + 1e-9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (wording.plural(1, "lap"), "1 lap"),
        (wording.plural(0, "lap"), "0 laps"),
        (wording.sentence(" no verdict "), "No verdict."),
        (wording.sentence(""), ""),
        (wording.plain({"a": 1.5, "b": {}, "c": [True, None], "d": None}), "a 1.5; c yes, None"),
        (wording.moment("2026-05-04T09:31:22.5+00:00"), "2026-05-04 09:31 UTC"),
        (wording.moment("yesterday"), "yesterday"),
        (wording.slug("trt-rtx:sm86,sm89 fp32"), "trt-rtx-sm86-sm89-fp32"),
        (wording.slug("§"), ""),
    ],
)
def test_values_become_words(text: str, expected: str) -> None:
    assert text == expected


# The geometry of the charts


def shoelace(path: str) -> float:
    """The area of a path of M, H, V and Z, by the surveyor's formula; an oracle that knows no bars."""
    total = 0.0
    for piece in filter(None, path.split("M")):
        x, y = map(float, re.match(r"([-\d.e]+) ([-\d.e]+)", piece).groups())  # type: ignore[union-attr]
        corners = [(x, y)]
        for axis, number in re.findall(r"([HV])([-\d.e]+)", piece):
            x, y = (float(number), y) if axis == "H" else (x, float(number))
            corners.append((x, y))
        following = corners[1:] + corners[:1]
        total += sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(corners, following, strict=True)) / 2
    return abs(total)


@pytest.mark.parametrize("channels", [1, 5, 64, 65, 100, 2048])
def test_the_areas_of_a_profile_are_the_sums_of_its_scores(channels: int) -> None:
    draw = random.Random(channels)
    scores = [draw.expovariate(1.0) for _ in range(channels)]
    kept = draw.sample(range(channels), max(1, channels // 2))
    profile = charts.score_profile(scores, kept)
    unit = charts.WIDTH * charts.HEIGHT / (channels * max(scores))
    cut = set(range(channels)) - set(kept)
    # Coordinates are written with one decimal: at most 0.05 off in height over the whole width, and in each edge.
    off = 0.05 * charts.WIDTH + 0.1 * charts.HEIGHT * 2 * charts.PROFILE_BARS
    assert shoelace(profile.kept) == pytest.approx(unit * sum(scores[c] for c in kept), abs=off)
    assert shoelace(profile.cut) == pytest.approx(unit * sum(scores[c] for c in cut), abs=off)
    assert (profile.low, profile.high) == (min(scores), max(scores))


def test_a_cut_channel_that_scored_high_is_seen_where_it_ranks() -> None:
    profile = charts.score_profile([4.0, 3.0, 2.0, 1.0], kept=[0, 2])
    assert profile.kept == "M0 100V0H250V100ZM500 100V50H750V100Z"
    assert profile.cut == "M250 100V25H500V100ZM750 100V75H1000V100Z"


def test_scores_below_zero_hang_from_the_baseline() -> None:
    profile = charts.score_profile([3.0, -1.0], kept=[0])
    assert profile.kept == "M0 75V0H500V75Z"
    assert profile.cut == "M500 75V100H1000V75Z"


@pytest.mark.parametrize("scores", [[0.0, 0.0], [-1.0, -1.0], [2.0]])
def test_scores_without_a_spread_are_drawn(scores: list[float]) -> None:
    assert "nan" not in "".join(charts.score_profile(scores, kept=[0])[:2])


def test_columns_are_as_high_as_layers_are_wide() -> None:
    first, second = charts.width_columns([(512, 128), (256, 256)])
    assert (first.kept, first.cut) == (25, 75)
    assert (second.kept, second.cut) == (50, 0)
    assert second.x > first.x + first.breadth


@given(st.lists(st.floats(min_value=0.01, max_value=1e3), min_size=1, max_size=300))
def test_every_lap_is_drawn_or_counted_as_beyond_the_axis(laps_ms: list[float]) -> None:
    axis = charts.latency_axis(laps_ms, [lap * 2 for lap in laps_ms])
    outside = sum(not axis.low <= lap < axis.high for lap in laps_ms)
    drawn = charts.histogram(laps_ms, axis)
    assert drawn.beyond == outside
    assert drawn.beyond <= len(laps_ms) // 100
    heights = [float(height) for height in re.findall(r"V([\d.]+)H", drawn.path)]
    assert min(heights) == 0


def test_a_histogram_counts_by_height() -> None:
    drawn = charts.histogram([0.5, 0.5, 1.5], charts.Axis(low=0.0, high=float(charts.HISTOGRAM_BINS)))
    assert drawn.path == "M0 100V0H13.9V50H27.8V100Z"


def test_an_interval_lies_where_its_ends_are() -> None:
    assert charts.span(1.0, 1.5, 2.0, charts.Axis(0.0, 4.0)) == charts.Span(left=25.0, length=25.0, point=37.5)


@given(st.lists(st.tuples(st.floats(0.05, 20), st.floats(0, 5)), max_size=5))
def test_an_axis_of_factors_shows_one_and_every_interval(pairs: list[tuple[float, float]]) -> None:
    intervals = [(low, low + width) for low, width in pairs]
    axis = charts.factor_axis(intervals)
    for end in (1.0, *itertools.chain(*intervals)):
        assert 0 <= axis.percent(end) <= 100
    assert axis.high - axis.low >= 0.1


def test_drift_is_what_each_block_is_off_the_median_of_all_laps() -> None:
    # Medians of blocks 1, 1 and 1.2, of all laps 1: level, then 20 % up; the axis reaches 5 % further than that.
    drawn = charts.drift([[1.0, 1.0], [1.0, 1.0], [1.2, 1.2]], [[5.0]])
    assert drawn.dense == "M0 50L500 50L1000 2.4"
    assert drawn.pruned == "M0 50L1000 50"
    assert [tick.value for tick in drawn.ticks] == [-20, 0, 20]


def test_a_long_run_joins_neighbouring_blocks() -> None:
    drawn = charts.drift([[1.0]] * 10_000, [[2.0]] * 10_000)
    assert drawn.dense.count("L") == charts.DRIFT_POINTS - 1


def test_a_curve_starts_at_its_first_value_and_ends_at_its_last() -> None:
    drawn = charts.curve([2.0, 1.0, 0.5])
    assert drawn.path == "M0 0L500 50L1000 75"
    assert [(tick.value, tick.percent) for tick in drawn.ticks] == [(0, 0), (0.5, 25), (1.0, 50), (1.5, 75), (2.0, 100)]


def test_one_epoch_is_a_level_line() -> None:
    assert charts.curve([2.0]).path == "M0 0L1000 0"
    assert charts.curve([0.0]).path == "M0 0L1000 0"


@given(st.floats(min_value=-1e6, max_value=1e6), st.floats(min_value=1e-3, max_value=1e6), st.integers(2, 9))
def test_axes_are_marked_at_round_values_inside(low: float, span: float, most: int) -> None:
    ticks = charts.axis_ticks(low, low + span, most=most)
    assert len(ticks) <= most + 1
    assert all(-0.01 <= tick.percent <= 100.01 for tick in ticks)
    steps = {round(b.value - a.value, 9) for a, b in itertools.pairwise(ticks)}
    assert all(f"{step:.0e}"[0] in "125" for step in steps)
