"""A run for the target torch: its programs ship with the bundle in every precision, are measured and built again."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from chip_deploy.export.bundle import verify_bundle
from chip_deploy.export.program_file import require_plain_program
from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.report import EngineRow, Report, read_report

NET = """
from torch import nn

def build():
    convolutions = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
"""
PRECISIONS = ("fp32", "fp16", "bf16")


def run(out: Path, *more: str) -> tuple[int, str]:
    """The smallest run there is: drawn weights, noise for images, a few laps. Its exit code and its errors."""
    (out.parent / "net_for_torch.py").write_text(NET)
    arguments = ["prune", "--model", "net_for_torch:build", "--data", "random:16", "--ratio", "0.5", *more]
    quick = ("data.size=16", "tune.epochs=0", "score.images=8", "measure.seconds=0.05", "measure.laps=20")
    for setting in (*quick, "measure.openings=1"):
        arguments += ["--set", setting]
    err = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(err),
    ):
        patch.syspath_prepend(out.parent)
        return main([*arguments, "--out", str(out)]), err.getvalue()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("torch") / "bundle"
    code, err = run(out, "--target", "torch", "--target", "ort-cpu", "--precision", "fp32")
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def in_16_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("torch") / "bundle"
    code, err = run(out, "--target", "torch:eager", "--precision", ",".join(PRECISIONS))
    assert code == 0, err
    return out


def rows(report: Report) -> dict[str, EngineRow]:
    return {row.file.removeprefix("engines/").removesuffix(".engine"): row for row in report.engines}


def test_the_programs_ship_with_the_bundle_and_are_plain(bundle: Path) -> None:
    assert sorted(path.name for path in bundle.glob("*.pt2")) == ["dense.pt2", "model.pt2"]
    for path in bundle.glob("*.pt2"):
        require_plain_program(path)
    assert (bundle / "engines" / "torch.fp32.engine").read_bytes() == (bundle / "model.pt2").read_bytes()
    verify_bundle(bundle)


def test_torch_is_measured_beside_onnxruntime_and_its_layers_are_named(bundle: Path) -> None:
    found = rows(read_report(bundle))
    for row in (found["torch.fp32"], found["ort-cpu.fp32"]):
        assert row.latency_ms is not None
        assert row.agreement is not None
        assert row.layers is not None
        # The batch norm lies in the convolution before it, in the ONNX file and so in both tables.
        assert [each.layer for each in row.layers.rows if each.dense_macs] == ["0", "3", "7"]
    first = next(each for each in found["torch.fp32"].layers.rows if each.layer == "0")  # pyright: ignore
    assert first.operators == ["conv2d", "batch_norm"]


def test_each_precision_has_programs_of_its_own(in_16_bits: Path) -> None:
    assert sorted(path.name for path in in_16_bits.glob("*.pt2")) == sorted(
        f"{network}{'' if precision == 'fp32' else f'.{precision}'}.pt2"
        for network in ("model", "dense")
        for precision in PRECISIONS
    )
    found = rows(read_report(in_16_bits))
    for precision in PRECISIONS:
        row = found[f"torch-eager.{precision}"]
        assert row.latency_ms is not None
        assert row.layer_types is not None
        assert row.layer_types.multiplying == {precision: 3}
    verify_bundle(in_16_bits)


def test_a_bundle_is_built_and_measured_again(in_16_bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sidecar = in_16_bits / "engines" / "torch-eager.fp16.json"
    before = json.loads(sidecar.read_text())["sha256"]
    assert main(["build", str(in_16_bits), "--target", "torch:eager"]) == 0
    assert json.loads(sidecar.read_text())["sha256"] == before
    assert main(["measure", str(in_16_bits), "--target", "torch:eager"]) == 0
    assert main(["verify", str(in_16_bits)]) == 0
    assert "torch:eager fp16" in capsys.readouterr().out


def test_a_precision_without_a_program_stops_the_run_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    code, err = run(out, "--target", "torch", "--precision", "fp8")
    assert (code, out.exists()) == (3, False)
    assert "target 'torch' takes no fp8: its programs are floating-point throughout." in err


def test_a_precision_that_one_of_two_targets_takes_is_left_out_for_the_other_aloud(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    code, err = run(out, "--target", "ort-cpu", "--target", "torch", "--precision", "fp32,bf16")
    assert code == 0, err
    report = read_report(out)
    made = [(row.target, row.precision) for row in report.engines]
    assert made == [("ort-cpu", "fp32"), ("torch", "fp32"), ("torch", "bf16")]
    (note,) = [note for note in report.notes if "left out" in note]
    assert note.startswith("bf16 is left out for target 'ort-cpu': ")


def test_without_a_torch_target_no_program_is_written(tmp_path: Path) -> None:
    code, err = run(tmp_path / "bundle", "--target", "ort-cpu")
    assert code == 0, err
    assert list((tmp_path / "bundle").glob("*.pt2")) == []
    assert main(["build", str(tmp_path / "bundle"), "--target", "torch"]) == 2
