"""The file with every lap: compressed, the same bytes for the same laps, and older ones still read."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest

from chip_deploy.export.laps import Control, Measurement, Speedup
from chip_deploy.export.laps_file import every_laps_file, find_laps, laps_path, read_laps, write_laps
from chip_deploy.export.machine import read_machine
from chip_deploy.export.protocol import LatencyProtocol

DENSE = Measurement(laps_ms=[1.234567, 2.5], blocks=[0, 1], opened=[0, 1])
PRUNED = Measurement(laps_ms=[0.1, 0.2, 0.3], blocks=[0, 0, 1], opened=[0, 1])
CONTROL = Control(speedup=Speedup(estimate=1.0, low=0.99, high=1.02), noise=0.02)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return tmp_path / "ort-cpu.fp32.engine"


def write(path: Path, **more: Any) -> Path:
    write_laps(path, protocol=LatencyProtocol(), machine=read_machine(), dense=DENSE, pruned=PRUNED, **more)
    return path


def plain(path: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress(path.read_bytes()))


def test_laps_are_read_back_as_they_were(engine: Path) -> None:
    path = write(
        laps_path(engine), control_laps=DENSE, control=CONTROL, round_trips_ms={"dense host end to end": [3.0]}
    )
    laps = read_laps(path)
    assert path.name == "ort-cpu.fp32.latency.json.gz"
    assert (laps.dense, laps.pruned, laps.control) == (DENSE, PRUNED, CONTROL)
    assert (laps.control_laps_ms, laps.control_blocks) == (DENSE.laps_ms, DENSE.blocks)
    assert laps.round_trips_ms == {"dense host end to end": [3.0]}
    assert laps.protocol == LatencyProtocol()
    assert laps.complete


def test_the_compressed_text_is_json_with_a_line_for_each_list(engine: Path) -> None:
    path = write(laps_path(engine), complete=False)
    text = gzip.decompress(path.read_bytes()).decode()
    assert len(text.splitlines()) == len(plain(path)) + 2
    assert plain(path)["dense_laps_ms"] == [1.234567, 2.5]
    assert plain(path)["complete"] is False


def test_the_same_laps_are_the_same_bytes_at_any_time(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = read_machine()
    first, second = (laps_path(engine.with_name(f"{name}.engine")) for name in "ab")
    for path in (first, second):
        write_laps(path, protocol=LatencyProtocol(), machine=machine, dense=DENSE, pruned=PRUNED)
        monkeypatch.setattr(time, "time", lambda: 1e9)
    assert first.read_bytes() == second.read_bytes()


def test_an_uncompressed_file_of_an_older_bundle_is_still_read(engine: Path) -> None:
    path = write(laps_path(engine))
    new = ("watch", "control", "complete", "opened", "control_laps_ms", "control_blocks", "round_trips_ms")
    old = {key: value for key, value in plain(path).items() if key not in new}
    for key in ("kind", "openings"):
        del old["protocol"][key]
    path.unlink()
    engine.with_suffix(".latency.json").write_text(json.dumps(old), "utf-8")
    found = find_laps(engine)
    assert found.name == "ort-cpu.fp32.latency.json"
    laps = read_laps(found)
    assert laps.dense_laps_ms == DENSE.laps_ms
    assert laps.dense.opened == [0]
    assert laps.protocol.openings == 1
    assert (laps.control, laps.watch, laps.complete) == (None, None, True)


def test_the_compressed_file_is_the_one_that_counts(engine: Path) -> None:
    assert find_laps(engine) == laps_path(engine)
    old = engine.with_suffix(".latency.json")
    old.write_text("{}", "utf-8")
    assert find_laps(engine) == old
    write(laps_path(engine))
    assert find_laps(engine) == laps_path(engine)


def test_every_file_with_laps_of_an_engine_is_found_and_none_of_another(engine: Path) -> None:
    wanted = [laps_path(engine), engine.with_suffix(".latency.json"), laps_path(engine, batch=8)]
    others = [laps_path(engine.with_name("trt.fp32.engine")), engine.with_suffix(".json"), engine]
    for path in (*wanted, *others):
        path.write_text("", "utf-8")
    assert every_laps_file(engine) == wanted


def test_a_file_that_holds_no_laps_is_refused_by_name(engine: Path) -> None:
    path = write(laps_path(engine))
    path.write_text(json.dumps(plain(path) | {"dense_laps_ms": [1.0, -1.0]}), "utf-8")
    with pytest.raises(ValueError, match=r"ort-cpu.fp32.latency.json.gz: no laps of this version \(dense_laps_ms.1"):
        read_laps(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no laps here"):
        read_laps(path)


@pytest.mark.parametrize("keep", [-1, 40, 3])
def test_a_file_that_was_cut_off_is_refused_in_a_sentence(engine: Path, keep: int) -> None:
    path = write(laps_path(engine))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cannot be decompressed \(.*\)\. Measure again\."):
        read_laps(path)
