"""Caches of TensorRT: what is of another key, damaged or half written is as good as nothing."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chip_deploy.export import trt_caches
from chip_deploy.export.trt_caches import (
    FOLDER_VARIABLE,
    CacheFile,
    cache_folder,
    runtime_cache_file,
    timing_cache_file,
)

KEY = {"version": "11.4.0.106", "gpu": "NVIDIA L4", "sm": "sm89"}


@pytest.fixture
def file(tmp_path: Path) -> CacheFile:
    return CacheFile(tmp_path / "new" / "x.timing", KEY)


def test_what_was_written_is_read(file: CacheFile) -> None:
    assert file.read() is None
    assert file.write(b"timings") is None
    assert file.read() == b"timings"
    assert file.write(b"more") is None
    assert file.read() == b"more"


def test_a_description_tells_whose_it_is(file: CacheFile) -> None:
    file.write(b"timings")
    told = json.loads(file.path.with_name("x.timing.json").read_text())
    assert (told["key"], told["bytes"]) == (KEY, 7)


@pytest.mark.parametrize("part", list(KEY))
def test_nothing_of_another_key_is_read(file: CacheFile, part: str) -> None:
    file.write(b"timings")
    assert CacheFile(file.path, {**KEY, part: "another"}).read() is None


@pytest.mark.parametrize("damage", ["content", "no description", "no JSON", "not UTF-8"])
def test_a_damaged_cache_is_as_good_as_none(file: CacheFile, damage: str) -> None:
    file.write(b"timings")
    description = file.path.with_name("x.timing.json")
    match damage:
        case "content":
            file.path.write_bytes(b"timinga")
        case "no description":
            description.unlink()
        case "no JSON":
            description.write_text("{")
        case _:
            description.write_bytes(b"\xff\xfe")
    assert file.read() is None
    assert file.write(b"anew") is None
    assert file.read() == b"anew"


def test_a_folder_that_cannot_be_made_is_a_reason_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    reason = CacheFile(tmp_path / "taken" / "x.timing", KEY).write(b"timings")
    assert reason is not None
    assert reason.startswith(f"{tmp_path / 'taken'}: ")


def test_many_writers_at_once_leave_one_whole_cache_and_nothing_else(file: CacheFile) -> None:
    contents = [bytes([number]) * 10_000 for number in range(20)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(file.write, contents)) == [None] * 20
    left = file.read()
    assert left is None or left in contents  # two writers may mix content and description, which then fit no more
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["x.timing", "x.timing.json"]


def test_the_folder_is_the_one_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "ours"))
    assert cache_folder() == tmp_path / "ours"
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "chip-deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "chip-deploy"


def test_a_user_without_a_folder_has_a_cache_for_as_long_as_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in (FOLDER_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "home", homeless)
    trt_caches._home.cache_clear()
    file = CacheFile(cache_folder() / "x.timing", {"gpu": "Orin"})
    assert file.write(b"timed") is None
    assert file.path.is_relative_to(tmp_path)
    assert CacheFile(cache_folder() / "x.timing", {"gpu": "Orin"}).read() == b"timed"
    trt_caches._home.cache_clear()


def test_every_part_of_the_key_is_in_the_name_which_is_fit_for_any_file_system() -> None:
    timing = timing_cache_file(package="tensorrt", version="11.4.0.106", gpu="NVIDIA L4/24 GB", sm="sm89")
    assert timing.path.name == "tensorrt-11.4.0.106-nvidia-l4-24-gb-sm89.timing"
    runtime = runtime_cache_file(package="tensorrt_rtx", version="1.7", gpu="L4", sm="sm89", engine_sha256="ab" * 32)
    assert runtime.path.name == "tensorrt-rtx-1.7-l4-sm89-abababababababab.runtime"
    assert runtime.key["engine"] == "ab" * 32
