"""Measuring a bundle again: batches and protocols, an interruption that keeps the laps, a disk that fills."""

import contextlib
import io
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chip_deploy.export.bundle import read_manifest, verify_bundle, write_manifest
from chip_deploy.export.errors import BuildFailed
from chip_deploy.export.golden import Golden
from chip_deploy.export.laps_file import laps_path, read_laps
from chip_deploy.export.ort_session import OrtSession
from chip_deploy.export.protocol import LatencyProtocol
from chip_deploy.export.target import LayerTypes, parse_target, read_engine, sidecar_path
from chip_deploy.export.target_ort import OrtCpuTarget
from chip_deploy.export.target_torch import TorchTarget
from chip_deploy.pipeline import device
from chip_deploy.pipeline.cli import main
from chip_deploy.pipeline.device import remeasure
from chip_deploy.pipeline.display import PlainDisplay
from chip_deploy.pipeline.report import EngineRow, read_report, write_report

NET = """
from torch import nn

def build():
    convolutions = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
"""
SETTINGS = (
    "data.size=16",
    "tune.epochs=0",
    "score.images=8",
    "measure.seconds=0.05",
    "measure.laps=20",
    "measure.openings=2",
)
ENGINE = "engines/ort-cpu.fp32.engine"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest run there is, with a free batch."""
    folder = tmp_path_factory.mktemp("device")
    (folder / "two_convolutions_again.py").write_text(NET)
    arguments = ["prune", "--model", "two_convolutions_again:build", "--data", "random:16", "--ratio", "0.5"]
    for setting in (*SETTINGS, "export.dynamic_batch=true", "measure.warmup_ms=10"):
        arguments += ["--set", setting]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.syspath_prepend(folder)
        assert main([*arguments, "--out", str(folder / "bundle")]) == 0, said.getvalue()
    return folder / "bundle"


@pytest.fixture
def bundle(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(finished, tmp_path / "bundle")


@pytest.fixture
def display() -> PlainDisplay:
    from rich.console import Console

    return PlainDisplay(Console(file=io.StringIO()))


def contents(bundle: Path) -> dict[str, bytes]:
    return {str(path.relative_to(bundle)): path.read_bytes() for path in sorted(bundle.rglob("*")) if path.is_file()}


def row_of(bundle: Path) -> EngineRow:
    (row,) = read_report(bundle).engines
    return row


def test_each_batch_is_measured_and_the_first_is_the_headline(bundle: Path, display: PlainDisplay) -> None:
    (row,) = remeasure(bundle, "ort-cpu", display, batches=[4, 1])
    assert [measured.batch for measured in row.batches] == [4, 1]
    assert (row.batch, row.latency_ms, row.speedup) == (4, row.batches[0].pruned, row.batches[0].speedup)
    assert row.batches[0].pruned.p50 > row.batches[1].pruned.p50
    for measured in row.batches:
        expected = 1e3 * measured.batch / measured.dense.mean
        assert measured.dense.throughput == pytest.approx(expected)
    verify_bundle(bundle)
    assert row_of(bundle) == row
    for file, batch in ((laps_path(bundle / ENGINE), 4), (laps_path(bundle / ENGINE, batch=1), 1)):
        laps = read_laps(file)
        assert laps.protocol.batch == batch
        assert laps.complete


def test_files_of_batches_that_are_no_longer_measured_go(bundle: Path, display: PlainDisplay) -> None:
    remeasure(bundle, None, display, batches=[1, 4])
    assert laps_path(bundle / ENGINE, batch=4).is_file()
    remeasure(bundle, None, display, batches=[1])
    assert not laps_path(bundle / ENGINE, batch=4).exists()
    verify_bundle(bundle)


def test_a_row_holds_control_watch_and_what_its_laps_say(bundle: Path, display: PlainDisplay) -> None:
    (row,) = remeasure(bundle, None, display)
    laps = read_laps(laps_path(bundle / ENGINE))
    assert row.control is not None
    assert (row.control, row.watch) == (laps.control, laps.watch)
    assert row.times is None
    assert len(laps.control_laps_ms) == len(laps.control_blocks) > 0
    assert len(laps.opened) == laps.protocol.openings == 2
    assert row.latency_ms is not None
    assert row.latency_ms.n == len(laps.pruned_laps_ms)


def test_a_protocol_is_asked_for_by_name_and_stays_with_the_row(bundle: Path, display: PlainDisplay) -> None:
    (row,) = remeasure(bundle, None, display, protocol="trtexec", batches=[4])
    assert row.protocol is not None
    assert (row.protocol.id, row.protocol.batch, row.protocol.seconds) == ("trtexec-10/1", 4, 3.0)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [({"protocol": "trtexe"}, "unknown protocol 'trtexe'"), ({"batches": [0]}, "a batch of 0 asked for")],
)
def test_what_cannot_be_measured_is_refused_and_changes_nothing(
    bundle: Path, display: PlainDisplay, asked: dict[str, Any], sentence: str
) -> None:
    before = contents(bundle)
    with pytest.raises(ValueError, match=sentence):
        remeasure(bundle, None, display, **asked)
    assert contents(bundle) == before


def test_a_batch_that_a_network_was_not_exported_for_is_refused_with_the_way_out() -> None:
    session: Any = SimpleNamespace(input_names=["input"], input_shapes={"input": (1, 3, 32, 32)})
    with pytest.raises(ValueError, match=r"x: a batch of 8 asked for, and it takes batches of 1 only\. Export it with"):
        device._require_batches(session, [1, 8], what="x")


def test_the_dense_network_is_compiled_once_for_laps_and_layers(
    bundle: Path, display: PlainDisplay, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener, asked = OrtCpuTarget.onnx_opener, []

    def counted(self: OrtCpuTarget, onnx_path: Path) -> Any:
        asked.append(onnx_path.name)
        return opener(self, onnx_path)

    monkeypatch.setattr(OrtCpuTarget, "onnx_opener", counted)
    (row,) = remeasure(bundle, None, display)
    assert row.layers is not None
    assert asked == ["dense.onnx"]


def test_an_engine_without_weights_is_measured_with_those_of_the_file_it_was_built_from(
    bundle: Path, display: PlainDisplay, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, asked = OrtCpuTarget.open, []

    def told(self: OrtCpuTarget, engine_path: Path, *, weights: Path | None = None) -> Any:
        asked.append(weights)
        return opened(self, engine_path, weights=weights)

    monkeypatch.setattr(OrtCpuTarget, "open", told)
    remeasure(bundle, None, display)
    assert set(asked) == {bundle / "model.onnx"}


def interrupted_at(count: int) -> Callable[..., None]:
    """A display's `progress` that sends this process a real SIGINT when it is called for that time."""
    calls = []

    def progress(self: PlainDisplay, fraction: float, text: str = "") -> None:
        calls.append(fraction)
        if len(calls) == count:
            signal.raise_signal(signal.SIGINT)

    return progress


def test_an_interruption_keeps_the_laps_so_far_and_the_next_measurement_starts_anew(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PlainDisplay, "progress", interrupted_at(3))
        assert main(["measure", str(bundle)]) == 130
    laps = read_laps(laps_path(bundle / ENGINE))
    assert not laps.complete
    assert laps.dense_laps_ms
    assert laps.pruned_laps_ms
    assert (row_of(bundle).verdict, row_of(bundle).latency_ms) == ("not measured", None)
    assert "the laps so far are kept" in row_of(bundle).reason
    assert not (bundle / ".work").exists()
    verify_bundle(bundle)
    assert main(["measure", str(bundle)]) == 0
    again = read_laps(laps_path(bundle / ENGINE))
    assert again.complete
    assert again.dense_laps_ms[: len(laps.dense_laps_ms)] != laps.dense_laps_ms
    assert row_of(bundle).verdict != "not measured"


FULL = """
import resource, sys
from chip_deploy.pipeline.cli import main
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(["measure", sys.argv[1]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file sizes")
@pytest.mark.parametrize("fits", ["nothing", "all but report.html"])
def test_a_disk_that_fills_is_one_sentence_and_leaves_the_bundle_as_it_was(bundle: Path, fits: str) -> None:
    before = contents(bundle)
    # A limit on the size of each file stands in for a full disk: writing fails in the same places.
    limit = 16 if fits == "nothing" else max(map(len, (before["report.json"], before["report.md"]))) + 20_000
    assert limit < len(before["report.html"])
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(bundle), str(limit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "File too large" in said
    assert "Traceback" not in done.stderr
    assert contents(bundle) == before
    verify_bundle(bundle)


def test_an_interrupted_measurement_keeps_what_belongs_to_the_engine(
    bundle: Path, display: PlainDisplay, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, manifest = read_report(bundle), verify_bundle(bundle)
    known = row_of(bundle).model_copy(update={"accuracy": 0.5})
    write_report(report.model_copy(update={"engines": [known]}), bundle)
    write_manifest(bundle, versions=manifest.versions, lineage=manifest.lineage)
    with monkeypatch.context() as patch:
        patch.setattr(device, "_layers", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            remeasure(bundle, None, display)
    assert row_of(bundle).verdict == "not measured"
    (again,) = remeasure(bundle, None, display)
    assert again.accuracy == row_of(bundle).accuracy == 0.5
    assert again.verdict != "not measured"


def test_a_batch_that_the_engine_refuses_is_found_before_anything_is_measured(
    bundle: Path, display: PlainDisplay, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind = OrtSession.bind

    def picky(self: OrtSession, feeds: dict[str, Any]) -> None:
        if next(iter(feeds.values())).shape[0] == 64:
            raise ValueError("a batch of 64 is outside the profile")
        bind(self, feeds)

    before = contents(bundle)
    monkeypatch.setattr(OrtSession, "bind", picky)
    monkeypatch.setattr(device, "compare_latency", _interrupted)
    with pytest.raises(ValueError, match="outside the profile"):
        remeasure(bundle, None, display, batches=[1, 64])
    assert contents(bundle) == before


def test_laps_stay_where_the_layers_cannot_be_timed(
    bundle: Path, display: PlainDisplay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(*_args: object, **_options: object) -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryDirectory", nowhere)
    (row,) = remeasure(bundle, None, display)
    assert row.layers is None
    assert row.latency_ms is not None
    assert "No layer was timed" in row.reason


@pytest.mark.parametrize("way", ["compiled", "eager"])
def test_a_network_that_is_compiled_when_it_is_bound_is_compiled_before_others_are_watched(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[str] = []
    session: Any = SimpleNamespace(
        input_names=["input"], bind=lambda feeds: done.append("bound"), close=lambda: done.append("closed")
    )

    def opener() -> Any:
        return session

    monkeypatch.setattr(device, "Watch", lambda *, gpu: done.append("watched"))
    monkeypatch.setattr(device, "compare_latency", _interrupted)
    golden = Golden(images=np.zeros((1, 3, 4, 4), np.float32), outputs=np.zeros((1, 10), np.float32))
    machine: Any = None
    target = TorchTarget(parse_target(f"torch:{way}"))
    with pytest.raises(KeyboardInterrupt):
        device._compared(
            target, opener, opener, golden, LatencyProtocol(), machine=machine, laps_file=tmp_path / "x",
            progress=lambda fraction, text: None,
        )  # fmt: skip
    assert done == (["bound", "closed", "watched"] if way == "compiled" else ["watched"])


def told_by_the_graph(bundle: Path) -> LayerTypes:
    """What the sidecar says of the engine's types after this: what one says that was built where no GPU was."""
    engine, was = read_engine(bundle / ENGINE), read_manifest(bundle)
    assert engine.layer_types is not None
    types = engine.layer_types.model_copy(update={"source": "graph"})
    sidecar_path(bundle / ENGINE).write_text(engine.model_copy(update={"layer_types": types}).model_dump_json())
    write_manifest(bundle, versions=was.versions, lineage=was.lineage)
    return types


def test_types_that_only_the_graph_told_are_asked_from_the_engine_where_it_is_measured(
    bundle: Path, display: PlainDisplay, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = told_by_the_graph(bundle).model_copy(
        update={"source": "engine", "other_type": ["conv"], "sentence": "conv runs in FP32."}
    )
    asked = []

    def inspected(_: OrtCpuTarget, engine_path: Path, onnx_path: Path) -> LayerTypes:
        asked.append((engine_path, onnx_path))
        return told

    monkeypatch.setattr(OrtCpuTarget, "engine_layer_types", inspected)
    (row,) = remeasure(bundle, None, display)
    assert asked == [(bundle / ENGINE, bundle / "model.onnx")]
    assert row.layer_types == row_of(bundle).layer_types == told
    assert "conv runs in FP32." in (bundle / "report.md").read_text()


def test_a_measurement_stays_where_the_engine_does_not_tell_its_types(
    bundle: Path, display: PlainDisplay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> LayerTypes:
        raise BuildFailed("the inspector fails")

    before = told_by_the_graph(bundle)
    monkeypatch.setattr(OrtCpuTarget, "engine_layer_types", broken)
    (row,) = remeasure(bundle, None, display)
    assert row.latency_ms is not None
    assert row.layer_types == before


def _interrupted(*_args: object, **_options: object) -> None:
    raise KeyboardInterrupt


def test_a_batch_that_no_memory_holds_is_refused_with_its_size() -> None:
    golden = Golden(images=np.zeros((2, 3, 32, 32), np.float32), outputs=np.zeros((2, 10), np.float32))
    with pytest.raises(ValueError, match=r"a batch of 1000000000000 needs 1\.23e\+07 GB for its images alone"):
        device._images(golden, 10**12)
