"""The benchmarks of channel independence run in their smallest form, and their figures have the promised shape."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chip_deploy.chip.groups import ChannelGraph

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def _run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *words]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def _figures(tmp_path: Path, script: str, *words: str) -> tuple[str, Any]:
    """What it prints, and the figures of its record."""
    path = tmp_path / "figures.json"
    done = _run(script, *words, "--json", str(path))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text("utf-8"))["figures"]


def _rows(printed: str, title: str) -> list[list[str]]:
    """The cells of the table below that title; two spaces or more part them."""
    lines = printed[printed.index(title) :].split("\n\n")[0].splitlines()
    return [re.split(r" {2,}", line.strip()) for line in lines[3:]]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """What four small shapes print and record."""
    words = ("--shapes", "4x9", "9x4", "8x40", "130x2", "--seconds", "0")
    return _figures(tmp_path_factory.mktemp("shapes"), "ci_scoring.py", *words)


def test_each_shape_has_a_row_whose_ratio_is_judged_by_what_is_required(shapes: tuple[str, Any]) -> None:
    printed, figures = shapes
    rows = _rows(printed, "Channel independence")
    assert [row[0] for row in rows] == ["4x9", "9x4", "8x40", "130x2"]
    assert [row[7] for row in rows] == ["150", "150", "150", "200"]  # above 128 channels more is required
    for figure, row in zip(figures, rows, strict=True):
        assert float(row[5]) == pytest.approx(figure["ratio"], abs=0.051)
        assert figure["rounds"] >= 2
        assert figure["ratio_low"] <= figure["ratio"] <= figure["ratio_high"]
        assert figure["met"] == (figure["ratio"] >= figure["required"]) == (row[8] == "yes")
        assert min(figure["published_ms"], figure["ours_ms"]) > 0


def test_both_sides_of_a_ratio_compute_the_same_scores(shapes: tuple[str, Any]) -> None:
    _, figures = shapes
    assert all(figure["largest_gap"] < 1e-4 for figure in figures)  # a float32 nuclear norm's differences: 1e-5


def test_random_maps_have_the_zeros_of_a_relu(benchmark_modules: None) -> None:
    maps = importlib.import_module("ci_scoring").correlated_maps(3, 24, 500, seed=1)
    assert maps.shape == (3, 24, 500)
    assert float((maps == 0).float().mean()) == pytest.approx(0.4, abs=0.02)  # 36,000 draws
    assert bool((maps >= 0).all())
    correlations = torch.corrcoef(maps[0]).fill_diagonal_(0).abs()
    assert float(correlations.max()) > 0.5  # of 500 independent draws the largest is below 0.2


def test_a_network_is_profiled_by_the_shapes_that_its_consumers_read(tmp_path: Path) -> None:
    words = ("--network", "resnet56", "--images", "4", "--batch", "2", "--rounds", "2", "--profile")
    printed, figures = _figures(tmp_path, "ci_scoring.py", *words)
    network = figures["network"]
    assert (network["images"], network["batch"], network["size"], network["rounds"]) == (4, 2, 32, 2)
    assert network["met"] == (network["ratio"] <= network["required"] == 1.0)
    assert network["ratio_low"] <= network["ratio"] <= network["ratio_high"]
    profile = figures["profile"]
    assert {(row["channels"], row["pixels"]) for row in profile} == {(16, 1024), (32, 256), (64, 64)}
    assert sum(row["consumers"] for row in profile) == 55  # the stem and 2 x 27 convolutions feed 55 readers
    assert [row["ms"] for row in profile] == sorted((row["ms"] for row in profile), reverse=True)
    shown = _rows(printed, "Where scoring's time goes")
    assert [row[0] for row in shown[-2:]] == ["hooks, sums", "forward pass"]
    assert len(shown) == len(profile) + 2


def test_memory_is_the_difference_of_two_processes(tmp_path: Path) -> None:
    words = ("--network", "resnet56", "--memory", "--batch", "2")
    printed, figures = _figures(tmp_path, "ci_scoring.py", *words)
    assert figures["forward_bytes"] > 50 * 2**20  # torch alone is larger
    assert figures["above_bytes"] == figures["scoring_bytes"] - figures["forward_bytes"]
    assert figures["met"] == (figures["above_bytes"] <= 2**30)
    assert _rows(printed, "Peak resident memory")[0][0] == "resnet56"


def test_a_record_says_where_its_figures_are_from_and_names_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert _run("ci_scoring.py", "--shapes", "2x3", "--seconds", "0", "--json", str(path)).returncode == 0
    record = json.loads(path.read_text("utf-8"))
    words = ["ci_scoring.py", "--shapes", "2x3", "--seconds", "0", "--json", "figures.json"]
    assert record["command"] == words
    assert record["machine"]["cores"] == os.cpu_count()
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["threads"] == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--shapes", "16by64"), "'16by64' is no shape; CHANNELSxPIXELS is expected"),
        (("--profile",), "--profile and --memory need a --network"),
        (("--network", "resnet56", "--images", "0"), "'0' is no count"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: tuple[str, ...],
    sentence: str,
    benchmark_modules: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["ci_scoring.py", *words])
    with pytest.raises(SystemExit) as refused:
        importlib.import_module("ci_scoring").main()
    assert refused.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_the_ablation_has_a_row_for_each_criterion_and_a_range_for_chance(tmp_path: Path) -> None:
    words = ("--model", "resnet20", "--data", "digits", "--eval-images", "40", "--score-images", "32", "--cuts", "50")
    printed, figures = _figures(tmp_path, "ci_ablation.py", *words)
    rows = figures["rows"]
    assert [row["criterion"] for row in rows] == ["chip", "chip joint", "l1", "random"]
    assert [row["draws"] for row in rows] == [1, 1, 1, 3]
    assert [row[1] for row in _rows(printed, "Top-1")] == ["chip", "chip joint", "l1", "random"]
    for row in rows:
        assert 0.45 < row["macs_left"] <= 0.5  # one step too far at most; the smallest network steps by 2 %
        for what in ("after_cut", "recalibrated"):
            assert 0 <= row[f"{what}_low"] <= row[what] <= row[f"{what}_high"] <= 1
            right = 40 * row["draws"] * row[what]
            assert right == pytest.approx(round(right))


def test_filter_norms_are_means_over_the_layers_that_produce_a_channel(benchmark_modules: None) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(3, 2, 1, bias=False)
            self.head = nn.Conv2d(2, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.left(x) + self.right(x)).relu()).mean((2, 3))

    net = Sum()
    with torch.no_grad():
        net.left.weight.copy_(torch.tensor([[1.0, -2, 3], [0, 0, 1]])[..., None, None])
        net.right.weight.copy_(torch.tensor([[4.0, 0, 0], [-1, -1, -1]])[..., None, None])
    graph = ChannelGraph(net, torch.zeros(1, 3, 4, 4))
    (scores,) = importlib.import_module("ci_ablation").filter_norms(net, graph, []).values()
    assert scores.tolist() == [5.0, 2.0]  # (6 + 4) / 2 and (1 + 3) / 2


def test_images_and_overlap_are_given_for_the_rule_and_for_each_fixed_number(tmp_path: Path) -> None:
    sizes = ("--gold", "96", "--fixed", "48", "32", "--most", "64", "--batch", "16", "--cuts", "50")
    printed, figures = _figures(tmp_path, "ci_images.py", "--model", "resnet20", "--data", "digits", *sizes)
    rule, *fixed = figures["runs"]
    assert rule["run"] == "stopping rule"
    assert [(row["run"], row["images_mean"], row["images_most"]) for row in fixed] == [
        ("fixed 32", 32, 32),
        ("fixed 48", 48, 48),
    ]
    assert 32 <= rule["images_mean"] <= rule["images_most"] <= 64
    assert len(figures["groups"]) == rule["groups"] == 13
    for row in figures["groups"]:
        assert 32 <= row["images"] <= 64
        assert row["kept"] * row["overlap"] == pytest.approx(round(row["kept"] * row["overlap"]))
        assert row["settled"] or row["images"] == 64
    assert len(_rows(printed, "Group by group")) == 13


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_every_engine_has_a_row_dense_and_pruned_in_each_precision(tmp_path: Path) -> None:
    words = ("--networks", "resnet20", "--precisions", "fp32", "int8", "--capabilities", "sm89", "--rounds", "2")
    printed, figures = _figures(tmp_path, "engine_builds.py", *words)
    rows = figures["rows"]
    assert [(row["pruned"], row["precision"]) for row in rows] == [
        *((False, "fp32"), (False, "int8"), (True, "fp32"), (True, "int8"))
    ]
    assert all(row["identical"] and 0 < row["build_seconds"] <= row["slowest_seconds"] for row in rows)
    assert [row["multiplying"] for row in rows] == [{"fp32": 20}, {"int8": 20}] * 2
    assert rows[2]["macs"] <= 0.5 * rows[0]["macs"]
    assert rows[2]["engine_bytes"] < rows[0]["engine_bytes"]
    assert [row[0] for row in _rows(printed, "Engines that")] == [*["resnet20"] * 2, *["resnet20 pruned"] * 2]


def test_int8_has_a_row_for_each_rule_with_and_without_a_bound(tmp_path: Path) -> None:
    sizes = ("--images", "16", "--sensitivity-images", "1", "--eval-images", "40", "--max-drop", "100")
    words = ("--model", "resnet20", "--data", "digits", "--methods", "min-max", "entropy", *sizes)
    printed, figures = _figures(tmp_path, "int8_accuracy.py", *words)
    rows = figures["rows"]
    assert [(row["calibration"], row["bound"]) for row in rows] == [
        (rule, bound) for rule in ("min-max", "entropy") for bound in (None, 100.0)
    ]
    assert (figures["eval_images"], figures["calibration_images"]) == (40, 16)
    for row in rows:
        assert (row["layers"], row["left_out"]) == (29, [])  # 19 convolutions, 9 sums, the classifier
        assert row["drop"] == pytest.approx(100 * (figures["fp32"] - row["top1"]))
        assert 0 < row["snr_db"] < 60
    assert [row[0] for row in _rows(printed, "Top-1")] == ["min-max", "min-max", "entropy", "entropy"]


@pytest.fixture
def benchmark_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts as modules, as they see each other when they are run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("record", "ci_scoring", "ci_ablation"):
        monkeypatch.delitem(sys.modules, name, raising=False)
