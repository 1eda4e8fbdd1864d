"""Work in progress: a stage's result appears whole or not at all, and serves again while its inputs are the same."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..export.bundle import sha256_file, write_json_atomic
from .display import Display

DONE = "done.json"


class Done(BaseModel):
    """What a finished stage left behind: the digest of its inputs, its seconds, its facts, and its files' digests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: str
    seconds: float
    facts: dict[str, Any]
    files: dict[str, str]


class StageResult:
    """The folder of a finished stage and what it found out."""

    def __init__(self, folder: Path, done: Done) -> None:
        self.folder = folder
        self.facts = done.facts
        self.seconds = done.seconds
        self.digest = digest_of(done.files, done.inputs)

    def file(self, name: str) -> Path:
        """A file that the stage wrote."""
        return self.folder / name


class Journal:
    """Runs stages one after the other in a work folder."""

    def __init__(self, work: Path, display: Display, *, versions: Mapping[str, str]) -> None:
        """versions: of everything that computes; results of other versions are not used again."""
        self.work = work
        self.display = display
        self.versions = dict(versions)
        self.seconds: dict[str, float] = {}

    def stage(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]) -> StageResult:
        """The result of that stage: from an earlier run where its inputs and files are unchanged, else made now.

        `make` writes its files into the folder it is given and returns plain facts; both become visible in one rename.
        """
        folder, key = self.work / name, digest_of(dict(inputs), self.versions)
        self.display.stage(name)
        done = _finished(folder, key)
        if done is None:
            done = self._made(folder, key, make)
        self.seconds[name] = round(done.seconds, 3)
        return StageResult(folder, done)

    def _made(self, folder: Path, key: str, make: Callable[[Path], Mapping[str, Any]]) -> Done:
        unfinished = folder.with_name(f"{folder.name}.part")
        for leftover in (unfinished, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir(parents=True)
        started = time.perf_counter()
        facts = dict(make(unfinished))
        files = {
            path.relative_to(unfinished).as_posix(): sha256_file(path)
            for path in sorted(unfinished.rglob("*"))
            if path.is_file()
        }
        done = Done(inputs=key, seconds=time.perf_counter() - started, facts=facts, files=files)
        write_json_atomic(unfinished / DONE, done)
        unfinished.replace(folder)
        return done


def digest_of(*things: Any) -> str:
    """sha256 of plain values, the same for equal values in any order of keys."""
    return hashlib.sha256(json.dumps(things, sort_keys=True, default=str).encode()).hexdigest()


def _finished(folder: Path, key: str) -> Done | None:
    try:
        done = Done.model_validate_json((folder / DONE).read_text(encoding="utf-8"))
        same = done.inputs == key and all(sha256_file(folder / name) == sha for name, sha in done.files.items())
    except (FileNotFoundError, NotADirectoryError, ValidationError, UnicodeDecodeError):
        return None
    return done if same else None
