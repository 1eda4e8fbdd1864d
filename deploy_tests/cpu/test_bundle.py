"""A bundle's files are whole or absent, and its manifest notices every change."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from chip_deploy.export.bundle import (
    FileEntry,
    read_manifest,
    sha256_file,
    verify_bundle,
    write_atomic,
    write_json_atomic,
    write_manifest,
    writing_atomically,
)
from chip_deploy.export.errors import IntegrityError

# The digest of "abc" that FIPS 180-4 prints.
ABC_SHA256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
KILLED_HALF_WAY = """
import os, signal, sys
from pathlib import Path
from chip_deploy.export.bundle import writing_atomically
with writing_atomically(Path(sys.argv[1])) as unfinished:
    unfinished.write_text("new but unfin")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "engines").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"abc")
    (tmp_path / "engines" / "ort-cpu.fp32.engine").write_bytes(b"engine")
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work" / "checkpoint").write_bytes(b"half")
    write_manifest(tmp_path, versions={"chip_deploy": "0"}, lineage={"dense": "1234"})
    return tmp_path


def test_the_digest_of_abc_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == ABC_SHA256


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="the oracle is coreutils' sha256sum")
def test_a_file_larger_than_one_read_has_the_digest_that_coreutils_gives(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 10_000)
    theirs = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]
    assert sha256_file(path) == theirs


def test_a_manifest_lists_every_file_but_itself_and_the_work_in_progress(bundle: Path) -> None:
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    assert [file["path"] for file in files] == ["engines/ort-cpu.fp32.engine", "model.onnx"]
    assert files[1] == {"path": "model.onnx", "sha256": ABC_SHA256, "bytes": 3}


def test_a_manifest_names_its_schema_versions_and_lineage(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["schema"] == "chip-deploy.manifest/1"
    assert (manifest["versions"], manifest["lineage"]) == ({"chip_deploy": "0"}, {"dense": "1234"})


def test_an_untouched_bundle_verifies_to_the_manifest_that_was_written(bundle: Path) -> None:
    manifest = verify_bundle(bundle)
    assert manifest == read_manifest(bundle)
    assert FileEntry(path="model.onnx", sha256=ABC_SHA256, bytes=3) in manifest.files


def test_work_in_progress_may_change_without_harm(bundle: Path) -> None:
    (bundle / ".work" / "checkpoint").write_bytes(b"more")
    assert verify_bundle(bundle).files


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    with pytest.raises(IntegrityError, match=r"^model\.onnx: missing"):
        verify_bundle(bundle)


def test_a_file_changed_without_changing_its_size_is_named(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"abd")
    with pytest.raises(IntegrityError, match=r"^model\.onnx: sha256 [0-9a-f]{12}\.\.\. in .*, ba7816bf8f01\.\.\. in"):
        verify_bundle(bundle)


def test_a_file_that_grew_is_named_with_both_sizes(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"abcd")
    with pytest.raises(IntegrityError, match=r"^model\.onnx: 4 bytes in .*, 3 in its manifest\.json"):
        verify_bundle(bundle)


def test_a_file_that_nobody_listed_is_named(bundle: Path) -> None:
    (bundle / "engines" / "more.txt").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"^engines/more\.txt: not in manifest\.json"):
        verify_bundle(bundle)


def test_of_several_faults_the_first_in_path_order_is_named(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    (bundle / "engines" / "ort-cpu.fp32.engine").write_bytes(b"other!")
    with pytest.raises(IntegrityError, match=r"^engines/ort-cpu\.fp32\.engine: sha256"):
        verify_bundle(bundle)


def test_a_link_is_refused_because_it_ships_as_nothing(bundle: Path) -> None:
    (bundle / "linked").symlink_to(bundle / "model.onnx")
    with pytest.raises(IntegrityError, match="linked: a link"):
        write_manifest(bundle, versions={}, lineage={})


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "engines/../../outside", "./model.onnx"])
def test_a_manifest_that_points_outside_the_bundle_is_refused(bundle: Path, path: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][0]["path"] = path
    write_json_atomic(bundle / "manifest.json", manifest)
    with pytest.raises(IntegrityError, match="no path inside the bundle"):
        verify_bundle(bundle)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"no manifest\.json"):
        verify_bundle(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema": "chip-deploy.manifest/2"}', b"\xff\xfe"])
def test_a_manifest_that_cannot_be_read_is_one_sentence(bundle: Path, content: bytes) -> None:
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"manifest\.json: not ") as caught:
        verify_bundle(bundle)
    assert "\n" not in str(caught.value)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def interrupted() -> None:
        with writing_atomically(path) as unfinished:
            unfinished.write_bytes(b"half")
            raise KeyboardInterrupt

    path = tmp_path / "report.json"
    write_atomic(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_a_process_killed_while_writing_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_atomic(path, b"old")
    killed = subprocess.run([sys.executable, "-c", KILLED_HALF_WAY, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2, "the kill was meant to leave an unfinished file behind"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_indented_readable_text_that_ends_in_a_newline(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "x.json", {"name": "Jörg", "kept": [1, 2]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "Jörg", "kept": [1, 2]}
    assert "Jörg" in text
    assert text.endswith("}\n")


def test_a_model_is_written_as_its_json(tmp_path: Path) -> None:
    class Point(BaseModel):
        x: float

    write_json_atomic(tmp_path / "x.json", Point(x=0.5))
    assert json.loads((tmp_path / "x.json").read_text()) == {"x": 0.5}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_json_does_not_have_is_refused_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(tmp_path / "x.json", {"x": value})
    assert not list(tmp_path.iterdir())
