"""A folder that one command works in at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind; two runs in one folder are not kept apart there
    fcntl = None


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold the folder against a second run; the lock goes with the process, however it ends.

    Raises: ValueError when another run holds it.
    """
    if fcntl is None:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(folder)
        raise ValueError(f"another run is working in {out}. Wait for it, or take another folder.") from err
    try:
        yield
    finally:
        os.close(folder)
