"""A run in several precisions: the files of the bundle, engines beside their own dense control, and what is refused."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from chip_deploy.export.bundle import read_manifest, verify_bundle, write_manifest
from chip_deploy.export.errors import ParityFailed
from chip_deploy.export.gate import check_gate, parse_requirement
from chip_deploy.export.golden import engine_agreement, read_golden, write_golden
from chip_deploy.export.precision import Reference
from chip_deploy.export.target import read_engine
from chip_deploy.export.target_ort import OrtCpuTarget
from chip_deploy.pipeline import device, engine_stages, stages
from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.convert import Attempts
from chip_deploy.pipeline.models import build_model
from chip_deploy.pipeline.report import read_report, write_report
from chip_deploy.pipeline.report_precision import doubts, over_bound
from chip_deploy.pipeline.run_report import precision_warnings

NET = (
    "from torch import nn\n"
    "class Block(nn.Module):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.inner, self.outer = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)\n"
    "    def forward(self, maps):\n"
    "        return (maps + self.outer(self.inner(maps).relu())).relu()\n"
    "def build(num_classes=10):\n"
    "    parts = dict(stem=nn.Conv2d(3, 8, 3), act=nn.ReLU(), block=Block(), pool=nn.AdaptiveAvgPool2d(1),\n"
    "                 flat=nn.Flatten(), head=nn.Linear(8, num_classes))\n"
    "    net = nn.Sequential()\n"
    "    for name, part in parts.items():\n"
    "        net.add_module(name, part)\n"
    "    return net\n"
)
QUICK = [
    "prune.round_to=2", "prune.min_width=2", "data.size=16", "data.eval_images=30", "tune.epochs=0",
    "tune.recalibrate_images=0", "score.images=8", "measure.seconds=0.05", "measure.laps=20", "measure.openings=1",
    "measure.warmup_ms=1", "quantize.images=8", "quantize.sensitivity_images=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A small residual network with drawn weights on labelled digits."""
    folder = tmp_path_factory.mktemp("net")
    (folder / "converted_net.py").write_text(NET)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        model = build_model("converted_net:build", num_classes=10, seed=3, size=16).module
        torch.save(model.state_dict(), folder / "weights.pt")
        settings = [word for setting in QUICK for word in ("--set", setting)]
        named = ["--model", "converted_net:build", "--weights", str(folder / "weights.pt"), "--data", "digits"]
        yield ["prune", *named, "--criterion", "l1", "--ratio", "0.5", *settings]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "bundle"
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([*arguments, "--precision", "fp32,fp16,int8", "--target", "ort-cpu", "--out", str(out)])
    assert code == 0, said.getvalue()
    return out


@pytest.fixture
def bundle(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "bundle")


def test_the_bundle_holds_both_networks_in_every_precision_and_the_manifest_knows(finished) -> None:
    files = {entry.path for entry in verify_bundle(finished).files}
    assert {f"{name}{kind}.onnx" for name in ("model", "dense") for kind in ("", ".fp16", ".int8")} <= files
    assert {f"engines/ort-cpu.{precision}.engine" for precision in ("fp32", "fp16", "int8")} <= files


def test_the_report_has_a_row_for_each_precision_and_an_engine_in_each(finished) -> None:
    report = read_report(finished)
    assert [row.precision for row in report.precisions] == ["fp16", "int8"]
    assert [engine.precision for engine in report.engines] == ["fp32", "fp16", "int8"]
    assert list(json.loads((finished / "report.json").read_text())["stages_s"])[-4:] == [
        "agree",
        "convert",
        "build",
        "measure",
    ]
    fp16, int8 = report.precisions
    assert fp16.agreement.snr_db > 40
    assert fp16.accuracy == pytest.approx(report.accuracy.onnx, abs=1 / 30)
    assert (int8.conversion.layers, int8.conversion.quantised, int8.conversion.images) == (5, 5, 8)
    assert len(int8.sensitivities) == 5
    assert int8.onnx_bytes == (finished / "model.int8.onnx").stat().st_size
    assert int8.dense_onnx_bytes == (finished / "dense.int8.onnx").stat().st_size


def test_the_accuracy_of_a_precision_is_that_of_its_file_on_the_evaluation_images(finished) -> None:
    report = read_report(finished)
    assert report.accuracy.n == 30
    for row in report.precisions:
        assert row.agreement.n == 30
        assert row.accuracy * 30 == pytest.approx(round(row.accuracy * 30))


def test_golden_outputs_hold_those_of_every_other_file_as_it_is_written_and_those_in_tf32(finished) -> None:
    golden = read_golden(finished)
    assert golden.by_precision.keys() == {"tf32", "fp16", "int8"}
    for precision in ("fp16", "int8"):
        again = Reference(finished / f"model.{precision}.onnx").outputs(golden.images)
        np.testing.assert_array_equal(golden.by_precision[precision], again)
    for outputs in golden.by_precision.values():
        assert not np.array_equal(outputs, golden.outputs)


def test_an_engine_that_is_not_its_own_file_is_found_however_wide_the_limits_of_int8_are(bundle) -> None:
    report = read_report(bundle)
    golden = read_golden(bundle)
    (engine,) = [row for row in report.engines if row.precision == "int8"]
    record = read_engine(bundle / engine.file)
    engine_agreement(record, golden, golden.by_precision["int8"])
    shifted = golden.by_precision["int8"] + 0.3 * np.abs(golden.outputs).max()
    with pytest.raises(ParityFailed, match=r"engines/ort-cpu.int8.engine against model.int8.onnx"):
        engine_agreement(record, golden, shifted.astype(np.float32))


def test_a_gate_compares_an_engine_with_its_own_file_too(bundle) -> None:
    golden = read_golden(bundle)
    shifted = golden.by_precision["int8"] + np.float32(0.3) * np.abs(golden.outputs).max()
    write_golden(bundle / "golden.npz", golden._replace(by_precision={"int8": shifted}))
    signed_again(bundle)
    result = check_gate(bundle, [parse_requirement("size<=10MB")])
    failed = {row.engine for row in result.rows if row.requirement == "parity" and row.status == "failed"}
    assert failed == {"engines/ort-cpu.int8.engine"}


def test_a_gate_takes_the_accuracy_of_the_file_that_an_engine_was_built_from(bundle) -> None:
    report = read_report(bundle)
    accuracy = report.accuracy.model_copy(update={"dense": 0.9, "onnx": 0.9})
    rows = [row.model_copy(update={"accuracy": top1}) for row, top1 in zip(report.precisions, (0.9, 0.5), strict=True)]
    engines = [engine.model_copy(update={"accuracy": None}) for engine in report.engines]
    write_report(report.model_copy(update={"accuracy": accuracy, "precisions": rows, "engines": engines}), bundle)
    signed_again(bundle)
    result = check_gate(bundle, [parse_requirement("top1_drop<=1")])
    found = {row.engine: row.status for row in result.rows if row.requirement.startswith("top1_drop")}
    assert found == {
        "engines/ort-cpu.fp32.engine": "met",
        "engines/ort-cpu.fp16.engine": "met",
        "engines/ort-cpu.int8.engine": "failed",
    }


def signed_again(bundle: Path) -> None:
    """The manifest of a bundle in which a test has changed a file."""
    was = read_manifest(bundle)
    write_manifest(bundle, versions=was.versions, lineage=was.lineage)


def test_what_a_builder_warns_of_is_said_while_the_engine_is_built(arguments, tmp_path, monkeypatch, capsys) -> None:
    real = OrtCpuTarget._build

    def warned(self, *files):
        made = real(self, *files)
        return made._replace(flags=made.flags | {"warnings": ["it holds code for the host"]})

    monkeypatch.setattr(OrtCpuTarget, "_build", warned)
    assert main([*arguments, "--target", "ort-cpu", "--out", str(tmp_path / "bundle")]) == 0
    assert "it holds code for the host" in " ".join("".join(capsys.readouterr()).split())


def test_the_dense_control_of_an_engine_is_the_dense_network_in_its_precision(bundle, monkeypatch) -> None:
    asked = []
    real = device.measured_row

    def noted(target, engine_file, dense_onnx, *rest, **more):
        asked.append((engine_file.name, dense_onnx.name))
        return real(target, engine_file, dense_onnx, *rest, **more)

    monkeypatch.setattr(device, "measured_row", noted)
    assert main(["measure", str(bundle)]) == 0
    assert dict(asked) == {
        "ort-cpu.fp32.engine": "dense.onnx",
        "ort-cpu.fp16.engine": "dense.fp16.onnx",
        "ort-cpu.int8.engine": "dense.int8.onnx",
    }


def test_every_precision_is_built_again_without_torch_or_onnx(bundle) -> None:
    for engine in (bundle / "engines").glob("*.engine"):
        engine.write_bytes(b"old")
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'torchvision', 'torch_pruning', 'lightning', 'onnx'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from chip_deploy.export.bundle import read_manifest, write_manifest\n"
        "from pathlib import Path\n"
        "bundle = Path(sys.argv[1])\n"
        "was = read_manifest(bundle)\n"
        "write_manifest(bundle, versions=was.versions, lineage=was.lineage)\n"
        "from chip_deploy.pipeline.cli import main\n"
        "sys.exit(main(['build', sys.argv[1], '--target', 'ort-cpu']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(engine.stat().st_size > 1000 for engine in (bundle / "engines").glob("*.engine"))
    verify_bundle(bundle)


def test_one_precision_is_built_where_it_is_asked_for(bundle, capsys) -> None:
    before = (bundle / "engines" / "ort-cpu.fp32.json").read_bytes()
    assert main(["build", str(bundle), "--target", "ort-cpu", "--precision", "int8"]) == 0
    assert "ort-cpu.int8.engine" in capsys.readouterr().out
    assert (bundle / "engines" / "ort-cpu.fp32.json").read_bytes() == before


@pytest.mark.parametrize(
    ("precision", "code", "sentence"),
    [
        ("bf16", 3, "target 'ort-cpu' takes no bf16"),
        ("int9", 2, "precision 'int9' cannot be built. Available: fp32, fp16, bf16, int8, fp8"),
    ],
)
def test_a_precision_that_cannot_be_is_refused(bundle, capsys, precision, code, sentence) -> None:
    assert main(["build", str(bundle), "--target", "ort-cpu", "--precision", precision]) == code
    assert sentence in capsys.readouterr().err


def test_an_int8_file_whose_rest_is_fp16_is_built_by_tensorrt_alone(bundle, capsys) -> None:
    report = read_report(bundle)
    rows = [
        row.model_copy(update={"conversion": row.conversion.model_copy(update={"rest": "fp16"})})
        if row.precision == "int8"
        else row
        for row in report.precisions
    ]
    write_report(report.model_copy(update={"precisions": rows}), bundle)
    signed_again(bundle)
    assert main(["build", str(bundle), "--target", "ort-cpu", "--precision", "int8"]) == 3
    assert "what is not quantised of model.int8.onnx is in fp16" in capsys.readouterr().err
    assert main(["build", str(bundle), "--target", "ort-cpu"]) == 0
    told = capsys.readouterr()
    assert "int8 is left out for target 'ort-cpu'" in told.out + told.err
    assert "ort-cpu.fp16.engine" in told.out


def test_an_engine_built_here_whose_outputs_are_wrong_leaves_the_bundle_as_it_was(bundle, capsys) -> None:
    golden = read_golden(bundle)
    others = {name: -outputs for name, outputs in golden.by_precision.items()}
    write_golden(bundle / "golden.npz", golden._replace(outputs=-golden.outputs, by_precision=others))
    signed_again(bundle)
    before = {path: path.read_bytes() for path in sorted(bundle.rglob("*")) if path.is_file()}
    assert main(["build", str(bundle), "--target", "ort-cpu", "--precision", "fp16"]) != 0
    assert "engines/ort-cpu.fp16.engine: outputs differ from the reference" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in sorted(bundle.rglob("*")) if path.is_file()} == before


def test_an_engine_that_loses_more_than_its_file_was_allowed_to_is_warned_of(finished) -> None:
    report = read_report(finished)
    (int8,) = [row for row in report.engines if row.precision == "int8"]
    worse = int8.model_copy(update={"accuracy": 0.90})

    def said(row, *, most):
        recipe = report.recipe | {"quantize": {"max_drop": most}}
        accuracy = report.accuracy.model_copy(update={"onnx": 0.95})
        return over_bound(report.model_copy(update={"recipe": recipe, "accuracy": accuracy}), row)

    assert "engines/ort-cpu.int8.engine loses 5.00 points of top-1" in said(worse, most=4.9)
    assert "at most 4.9 may be lost" in said(worse, most=4.9)
    assert said(worse, most=5.0) == ""
    assert said(worse.model_copy(update={"precision": "fp16"}), most=1.0) == ""
    assert said(worse, most=None) == ""


def test_an_engine_whose_network_magnifies_rounding_is_warned_of_by_its_arithmetic(finished) -> None:
    report = read_report(finished)
    fp32, fp16, _ = report.engines
    far = fp16.agreement.model_copy(update={"snr_db": 29.9})
    assert doubts(report, fp16.model_copy(update={"agreement": None})) == []
    assert doubts(report, fp16) == []
    (said,) = doubts(report, fp16.model_copy(update={"agreement": far, "accuracy": 0.5}))
    assert "this network magnifies rounding in fp16 (SNR 29.9 dB" in said
    assert f"top-1 from {report.accuracy.onnx:.1%} to 50.0%" in said
    tf32 = fp32.model_copy(update={"flags": {"tf32": True}, "agreement": far})
    assert "build.tf32=false" in doubts(report, tf32)[0]
    assert doubts(report, tf32.model_copy(update={"agreement": far.model_copy(update={"snr_db": 40.0})})) == []


@pytest.mark.parametrize(("snr_db", "told"), [(29.9, True), (30.0, False)])
def test_a_16_bit_file_whose_network_magnifies_rounding_is_told_of(finished, snr_db, told) -> None:
    row = read_report(finished).precisions[0].model_dump(mode="json")
    row |= {"accuracy": None, "agreement": row["agreement"] | {"snr_db": snr_db}}
    said = precision_warnings([row], None)
    assert len(said) == told
    assert all(f"in fp16 (SNR {snr_db} dB" in each and "on your own data" in each for each in said)


def test_the_report_of_a_run_carries_that_warning_and_a_later_measurement_keeps_it(
    arguments, tmp_path, monkeypatch, capsys
) -> None:
    out = tmp_path / "bundle"
    real = engine_stages.measured_row

    def worse(*given, **more):
        return real(*given, **more).model_copy(update={"accuracy": 0.0})

    monkeypatch.setattr(engine_stages, "measured_row", worse)
    bound = ["--precision", "int8", "--max-drop", "1", "--target", "ort-cpu"]
    monkeypatch.setattr(engine_stages, "top1", lambda *_: 0.5)
    assert main([*arguments, *bound, "--out", str(out)]) == 0
    (note,) = [note for note in read_report(out).notes if "the engine does not" in note]
    assert note.startswith("WARNING: engines/ort-cpu.int8.engine loses 50.00 points of top-1")
    assert "loses 50.00 points" in " ".join(capsys.readouterr().out.split())
    assert (out / "report.html").read_text().count("loses 50.00 points") == 2  # a note, and the engine's card
    assert main(["measure", str(out)]) == 0
    assert (out / "report.html").read_text().count("loses 50.00 points") == 2


def test_a_precision_that_the_bundle_does_not_hold_is_refused_with_how_to_get_it(bundle, capsys) -> None:
    for name in ("model.int8.onnx", "dense.int8.onnx"):
        (bundle / name).unlink()
    signed_again(bundle)
    assert main(["build", str(bundle), "--target", "ort-cpu", "--precision", "int8"]) == 2
    err = capsys.readouterr().err
    assert "holds no model.int8.onnx: it was pruned for fp32, fp16." in err
    assert "--precision fp32,fp16,int8" in err


def test_the_pages_rank_the_precisions_and_say_what_was_quantised(finished) -> None:
    markdown, page = ((finished / name).read_text() for name in ("report.md", "report.html"))
    for text in ("ort-cpu, the fastest first", "5 of 5 layers are quantised", "ONNX in int8"):
        assert text in markdown
        assert text in page


def test_the_two_ends_are_left_out_where_the_recipe_says_so(arguments, tmp_path) -> None:
    out = tmp_path / "bundle"
    more = ["--precision", "int8", "--max-drop", "100", "--set", "quantize.first_last=true", "--target", "ort-cpu"]
    assert main([*arguments, *more, "--out", str(out)]) == 0
    (row,) = read_report(out).precisions
    found = {each.layer: each.reason for each in row.conversion.left_out}
    assert found == {"stem": "it is the first layer", "head": "it is the last layer"}
    assert "2 layers are not quantised in int8" in (out / "report.html").read_text()


def test_a_bound_that_cannot_be_kept_ends_the_run_and_keeps_what_was_done(
    arguments, tmp_path, monkeypatch, capsys
) -> None:
    out = tmp_path / "bundle"
    run = [*arguments, "--precision", "int8", "--max-drop", "0.5", "--target", "ort-cpu", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(Attempts, "drop", lambda *_: 50.0)
        assert main(run) == 1
    assert "model.int8.onnx: int8 loses 50.00 points of top-1" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()
    assert (out / ".work" / "export" / "model.onnx").is_file()
    assert not (out / ".work" / "convert").exists()


REFUSED = [
    (["--precision", "int8", "--data", "random:16"], 2, "INT8 asked without data: its ranges come from real images"),
    (["--precision", "fp16,bf16"], 3, "target 'ort-cpu' takes no bf16"),
    (["--precision", "fp16", "--max-drop", "0.5"], 2, "quantize.max_drop = 0.5 bounds what int8 or fp8 may lose"),
    (["--precision", "int8", "--max-drop", "-1"], 2, "quantize.max_drop = -1: it should be greater than or equal to 0"),
    (
        ["--precision", "int8", "--set", "quantize.exclude=['stam']"],
        2,
        "no layer that can be quantised is named 'stam'",
    ),
    (["--precision", "int8", "--set", "quantize.exclude=['act']"], 2, "no layer that can be quantised is named 'act'"),
    (["--precision", "int8", "--set", "quantize.exclude=['*']"], 2, "no layer is left to quantise"),
    (["--precision", "int8", "--set", "quantize.rest=fp16"], 3, "with quantize.rest = 'fp16'"),
    (["--precision", "int8", "--set", "quantize.calibration=mean"], 2, "quantize.calibration = 'mean'"),
    (["--precision", "int8,fp12"], 2, "precision 'fp12' cannot be built"),
]


@pytest.mark.parametrize(("more", "code", "sentence"), REFUSED, ids=[case[2][:30] for case in REFUSED])
def test_what_cannot_be_is_refused_before_any_work(
    arguments, tmp_path, capsys, monkeypatch, more, code, sentence
) -> None:
    monkeypatch.setattr(stages, "_run", lambda *_: pytest.fail("work was begun"))
    asked = [word for word in arguments if word not in ("--data", "digits")] if "--data" in more else arguments
    assert main([*asked, "--target", "ort-cpu", *more, "--out", str(tmp_path / "out")]) == code
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_rest_of_an_int8_network_is_in_fp16_where_tensorrt_alone_runs_it() -> None:
    from chip_deploy.pipeline.recipe import load_recipe
    from chip_deploy.pipeline.recipe_values import rest_of

    def rest(*targets: str, asked: str = "auto") -> str:
        named = {"model.name": "resnet20", "data.name": "digits", "prune.macs": 0.5}
        return rest_of(load_recipe(None, {**named, "targets": list(targets), "quantize.rest": asked}))

    assert [rest("trt"), rest("trt", "trt-rtx:sm89"), rest("trt", "ort-cpu")] == ["fp16", "fp16", "fp32"]
    assert rest("trt", asked="fp32") == "fp32"


def test_images_for_the_ranges_are_training_images(arguments, tmp_path, monkeypatch) -> None:
    from chip_deploy.pipeline.data import Images

    drawn = []
    real = Images.sample

    def noted(self, n, *, seed, what):
        drawn.append((what, self))
        return real(self, n, seed=seed, what=what)

    monkeypatch.setattr(Images, "sample", noted)
    assert main([*arguments, "--precision", "int8", "--target", "ort-cpu", "--out", str(tmp_path / "out")]) == 0
    of = dict(drawn)
    assert of["quantize.images"] is of["score.images"]
    assert of["quantize.images"] is not of["data.eval_images"]
