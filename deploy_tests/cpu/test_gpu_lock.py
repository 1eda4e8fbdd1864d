"""The tests that need a GPU have it to themselves, in however many processes they run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "gpu" / "conftest.py"
USES = """
import os, time
from pathlib import Path

def note(word):
    with (Path(__file__).parent / "notes").open("a") as notes:
        notes.write(f"{os.getpid()} {word}\\n")

def test_it():
    note("begun")
    time.sleep(0.5)
    note("ended")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no advisory locks of this kind")
def test_two_files_of_gpu_tests_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist runs the tests in several processes")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    shutil.copyfile(CONFTEST, tmp_path / "conftest.py")
    for name in ("test_one.py", "test_other.py"):
        (tmp_path / name).write_text(USES)
    arguments = ["-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *arguments, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert [word for _, word in notes] == ["begun", "ended"] * 2
    assert len({process for process, _ in notes}) == 2
