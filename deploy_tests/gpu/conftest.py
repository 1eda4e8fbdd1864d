"""One process at a time uses the GPU: free memory and times are those of the test alone."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind; there, run the files one after another
    fcntl = None


@pytest.fixture(scope="module", autouse=True)
def _gpu_to_itself() -> Iterator[None]:
    """Held for a file of tests, with the engines and bundles that its tests share; skipped tests never ask for it."""
    with contextlib.ExitStack() as held:
        if fcntl is not None:
            file = held.enter_context((Path(tempfile.gettempdir()) / "chip-deploy-gpu.lock").open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
