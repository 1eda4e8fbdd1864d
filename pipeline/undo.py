"""Changes to a bundle that happen together or not at all, even when the process is killed between two of them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ..export.bundle import MANIFEST, UNDO, WORK, part_path, safe_path, write_json_atomic
from ..export.errors import IntegrityError


class Undo(BaseModel):
    """By path in the bundle: the name of the copy that was kept of the file, or None where there was none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    before: dict[str, str | None]


@contextlib.contextmanager
def all_or_nothing(bundle: Path, paths: Sequence[Path]) -> Iterator[None]:
    """When the block fails, `paths` and the manifest are the files that they were; `undo_interrupted` makes them so
    when the process was killed in it.

    Copies are kept as links, which fill no disk.
    """
    store = (bundle / UNDO).parent
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir(parents=True)
    try:
        names = sorted({path.relative_to(bundle).as_posix() for path in paths} | {MANIFEST})
        before = {name: _kept(bundle / name, store / f"{number}") for number, name in enumerate(names)}
        write_json_atomic(bundle / UNDO, Undo(before=before))
        yield
    except BaseException:
        undo_interrupted(bundle)
        raise
    (bundle / UNDO).unlink()  # from here on the new files count
    _clear(bundle)


def undo_interrupted(bundle: Path) -> None:
    """The bundle as it was before a change that did not come to its end; as it is, where there was none.

    Killed in the middle, this can be run again. Raises: IntegrityError for a record that cannot be followed.
    """
    if (bundle / UNDO).is_file():
        store = (bundle / UNDO).parent
        for name, kept in _read(bundle).before.items():
            path = bundle / name
            part_path(path).unlink(missing_ok=True)
            if kept is None:
                path.unlink(missing_ok=True)
            elif (store / kept).exists():  # else it was put back by an earlier attempt
                (store / kept).replace(path)
        (bundle / UNDO).unlink()
    _clear(bundle)


def _kept(path: Path, copy: Path) -> str | None:
    """The name of the copy made of `path`; None when there is no such file."""
    if not path.is_file():
        return None
    try:
        os.link(path, copy)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, copy)
    return copy.name


def _read(bundle: Path) -> Undo:
    """The record, once its names are found to lie inside the bundle: it may come from elsewhere."""
    try:
        undo = Undo.model_validate_json((bundle / UNDO).read_bytes())
    except ValidationError as err:
        raise IntegrityError(
            f"{bundle / UNDO}: no record of an interrupted change. Restore the bundle, or prune again."
        ) from err
    for name, kept in undo.before.items():
        inside = (bundle / safe_path(name)).parent.resolve().is_relative_to(bundle.resolve())
        if not inside or (kept is not None and Path(kept).name != kept):
            raise IntegrityError(f"{bundle / UNDO}: {name!r} is no path inside the bundle. Do not use this bundle.")
    return undo


def _clear(bundle: Path) -> None:
    """No copy is left, nor an empty work folder."""
    shutil.rmtree((bundle / UNDO).parent, ignore_errors=True)
    with contextlib.suppress(OSError):  # there is none, or a run's stages are in it
        (bundle / WORK).rmdir()
