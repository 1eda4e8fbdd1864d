"""The directory that ships: files that appear whole or not at all, and a manifest that notices every change."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import IntegrityError

MANIFEST = "manifest.json"
WORK = ".work"
UNDO = f"{WORK}/undo/undo.json"
"""There while several files of a bundle change together: what they were."""
READ_BYTES = 1 << 20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class FileEntry(BaseModel):
    """One file of a bundle: its path with forward slashes, relative to the bundle, and what it held."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str
    bytes: int


class Manifest(BaseModel):
    """Every file of a bundle with its digest, what the bundle was made from, and with which versions."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["chip-deploy.manifest/1"] = Field(default="chip-deploy.manifest/1", alias="schema")
    created: str
    versions: dict[str, str]
    lineage: dict[str, str]
    files: list[FileEntry]


def onnx_name(network: str, precision: str) -> str:
    """The ONNX file of a bundle for `network` (model or dense) in that precision: `model.onnx`, `dense.fp16.onnx`."""
    return f"{network}.onnx" if precision == "fp32" else f"{network}.{precision}.onnx"


@contextlib.contextmanager
def writing_atomically(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name `path` when the block ends well, and is removed otherwise.

    The name is fixed, so what a killed process left behind is overwritten by the next attempt.
    Raises: OSError with the name `path` where the system gave none, as for a disk that is full.
    """
    unfinished = part_path(path)
    try:
        yield unfinished
        _flush_to_disk(unfinished)
        unfinished.replace(path)
    except OSError as err:
        if err.errno is None or err.filename is not None:
            raise
        advice = "; free space, and run the command again" if err.errno in NO_SPACE else ""
        raise OSError(err.errno, f"{err.strerror}{advice}", str(path)) from err
    finally:
        unfinished.unlink(missing_ok=True)


def part_path(path: Path) -> Path:
    """Where the content of `path` is written before it takes that name."""
    return path.with_name(f".{path.name}.part")


def require_place(path: Path, bundles: Sequence[Path]) -> Path:
    """`path`, where a file about `bundles` may be written.

    Raises: ValueError for a place inside one of them, whose manifest would then not hold, or for what is no file;
    FileNotFoundError when there is no such folder.
    """
    place = path.resolve()
    inside = next((bundle for bundle in bundles if place.is_relative_to(bundle.resolve())), None)
    if inside is not None:
        raise ValueError(
            f"{path}: inside the bundle {inside}, which holds what its manifest names. Write it elsewhere."
        )
    if place.exists() and not place.is_file():
        raise ValueError(f"{path}: no regular file. Give the name of a file to write.")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}. Make it first.")
    return place


def write_atomic(path: Path, data: bytes) -> None:
    """`path` holds `data`, whole: a reader, or a process killed half way, sees the old content or the new."""
    with writing_atomically(path) as unfinished:
        unfinished.write_bytes(data)


def write_json_atomic(path: Path, value: BaseModel | Mapping[str, Any] | list[Any]) -> None:
    """`path` holds `value` as indented UTF-8 JSON; a pydantic model is written under its aliases.

    Raises: ValueError for NaN and infinity, which JSON does not have.
    """
    plain = value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def sha256_file(path: Path) -> str:
    """The SHA-256 digest of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(
    bundle: Path,
    *,
    versions: Mapping[str, str],
    lineage: Mapping[str, str],
    before: Manifest | None = None,
    but: Callable[[str], bool] | None = None,
) -> Manifest:
    """The manifest of `bundle`, written to its manifest.json: every file but the manifest and .work, sorted by path.

    Files that `but` chooses are not read: they stay in it as the manifest `before` has them.
    Raises: IntegrityError for a link, which would ship as nothing.
    """
    entries = [_entry(bundle, path) for path in _shipped_files(bundle) if not (but and but(path))]
    kept = [entry for entry in before.files if but(entry.path)] if before and but else []
    manifest = Manifest(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=dict(versions),
        lineage=dict(lineage),
        files=sorted([*entries, *kept], key=lambda entry: entry.path),
    )
    write_json_atomic(bundle / MANIFEST, manifest)
    return manifest


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of `bundle` as it was written; the files are not looked at.

    Raises: IntegrityError when there is none or it cannot be read as one.
    """
    path = bundle / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise IntegrityError(f"{bundle}: no {MANIFEST}, so this is no finished bundle. Run the build again.") from err
    except UnicodeDecodeError as err:
        raise IntegrityError(f"{path}: not UTF-8 text. Restore the file, or build the bundle again.") from err
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise IntegrityError(
            f"{path}: not a manifest of this version ({where}: {first['msg']}). "
            "Restore the file, or build the bundle again."
        ) from err


def verify_bundle(bundle: Path, *, but: Callable[[str], bool] | None = None) -> Manifest:
    """The manifest of `bundle`, once every file has been found to be the one it names; `but` chooses files by their
    path that are not looked at.

    Cost: reads every file of the bundle once.
    Raises: IntegrityError naming the first file, in path order, that is missing, changed or not in the manifest; or
    telling what restores a bundle that a command was killed in.
    """
    manifest = read_manifest(bundle)
    try:
        _require_files(bundle, manifest, but)
    except IntegrityError as err:
        if not (bundle / UNDO).is_file():
            raise
        raise IntegrityError(
            f"{bundle}: a command is changing it, or was killed while it did. Wait for it; or run `chip-deploy build` "
            "or `chip-deploy measure` again, which restores it first."
        ) from err
    return manifest


def safe_path(path: str) -> str:
    """`path`, if it stays inside the bundle. Raises: IntegrityError for an absolute path or one with `..`."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or pure.as_posix() != path:
        raise IntegrityError(f"{MANIFEST}: {path!r} is no path inside the bundle. Do not use this bundle.")
    return path


def _require_files(bundle: Path, manifest: Manifest, but: Callable[[str], bool] | None) -> None:
    """Raises IntegrityError for the first file, in path order, that is not as the manifest says."""
    named = {safe_path(entry.path): entry for entry in manifest.files}
    found = set(_shipped_files(bundle))
    for path in sorted(found | named.keys()):
        if but is not None and but(path):
            continue
        if path not in named:
            raise IntegrityError(f"{path}: not in {MANIFEST} of {bundle}. Remove it, or write the manifest again.")
        if path not in found:
            raise IntegrityError(f"{path}: missing from {bundle}, but named by its {MANIFEST}. {_way_back(path)}")
        _require_unchanged(bundle, named[path])


def _way_back(path: str) -> str:
    """How a damaged file comes back: an engine can be built again."""
    return "Restore the file, or run `chip-deploy build`." if path.startswith("engines/") else "Restore the file."


def _entry(bundle: Path, path: str) -> FileEntry:
    file = bundle / path
    return FileEntry(path=path, sha256=sha256_file(file), bytes=file.stat().st_size)


def _require_unchanged(bundle: Path, expected: FileEntry) -> None:
    """Raises IntegrityError when the file's size or digest is another one than the manifest's."""
    size = (bundle / expected.path).stat().st_size
    if size != expected.bytes:
        raise IntegrityError(
            f"{expected.path}: {size} bytes in {bundle}, {expected.bytes} in its {MANIFEST}. {_way_back(expected.path)}"
        )
    digest = sha256_file(bundle / expected.path)
    if digest != expected.sha256:
        raise IntegrityError(
            f"{expected.path}: sha256 {digest[:12]}... in {bundle}, {expected.sha256[:12]}... in its {MANIFEST}. "
            f"{_way_back(expected.path)}"
        )


def _shipped_files(bundle: Path) -> list[str]:
    """Paths of what ships, relative and with forward slashes, sorted; the manifest and .work are left out."""
    paths = []
    for path in bundle.rglob("*"):
        relative = path.relative_to(bundle)
        if relative.parts[0] in (MANIFEST, WORK):
            continue
        if path.is_symlink():
            raise IntegrityError(
                f"{relative.as_posix()}: a link in {bundle}; a bundle holds files only. Copy the file."
            )
        if path.is_file():
            paths.append(relative.as_posix())
    return sorted(paths)


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
