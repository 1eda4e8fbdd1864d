"""What TensorRT may keep from one time to the next: kernel timings of a builder, compiled kernels of an engine.

A cache is only ever a shortcut: one that is missing, damaged or of another machine is ignored and written anew, and a
folder that cannot be written to costs time, never the result. Its key (exact version, GPU, compute capability) stands
in a JSON file beside it, with its digest.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "CHIP_DEPLOY_CACHE_DIR"


@dataclass(frozen=True)
class CacheFile:
    """A cache on disk that belongs to one `key`; nothing of another key is ever read from it."""

    path: Path
    key: Mapping[str, str]

    def read(self) -> bytes | None:
        """Its content; None where there is none that was written whole, and for this key."""
        try:
            data = self.path.read_bytes()
            told = json.loads(self._sidecar.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return data if told == self._description(data) else None

    def write(self, data: bytes) -> str | None:
        """Keep `data`; or the reason why it could not be kept, as a phrase."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The description goes last: it does not fit the old content, so a reader never mixes the two.
            _replace(self.path, data)
            _replace(self._sidecar, (json.dumps(self._description(data), indent=2) + "\n").encode())
        except OSError as err:
            return f"{self.path.parent}: {err.strerror or err}"
        return None

    @property
    def _sidecar(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def _description(self, data: bytes) -> dict[str, Any]:
        return {"key": dict(self.key), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def timing_cache_file(*, package: str, version: str, gpu: str, sm: str) -> CacheFile:
    """Where kernel timings are kept: those of one exact version of TensorRT on one model of GPU."""
    key = {"package": package, "version": version, "gpu": gpu, "sm": sm}
    return CacheFile(cache_folder() / "timing" / f"{_file_name(key)}.timing", key)


def runtime_cache_file(*, package: str, version: str, gpu: str, sm: str, engine_sha256: str) -> CacheFile:
    """Where the kernels are kept that TensorRT-RTX compiled for one engine on one model of GPU."""
    key = {"package": package, "version": version, "gpu": gpu, "sm": sm, "engine": engine_sha256}
    return CacheFile(cache_folder() / "runtime" / f"{_file_name({**key, 'engine': engine_sha256[:16]})}.runtime", key)


def cache_folder() -> Path:
    """CHIP_DEPLOY_CACHE_DIR, or `chip-deploy` in the user's folder for caches."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "chip-deploy"
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "chip-deploy"


def _file_name(key: Mapping[str, str]) -> str:
    """The key as a part of a file name; two keys that look alike are told apart by the file's description."""
    return "-".join(re.sub(r"[^a-z0-9.]+", "-", value.lower()).strip("-") for value in key.values())


@functools.cache
def _home() -> Path:
    """The user's folder; one for this process alone where the user has none, as in a container under a free number."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.mkdtemp(prefix="chip-deploy-"))


def _replace(path: Path, data: bytes) -> None:
    """`path` holds `data`, whole, whoever else writes it at the same time."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    unfinished = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        unfinished.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
