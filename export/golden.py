"""A bundle's golden images with the outputs that every engine made from it has to give."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import IntegrityError
from .target import Session

# Shape letters: N images, K outputs of each.

GOLDEN = "golden.npz"
# Images at once where the network leaves the batch free.
FREE_BATCH = 32


class Golden(NamedTuple):
    """Images (N, 3, H, W) and the tuned network's outputs for them (N, K), both float32."""

    images: np.ndarray
    outputs: np.ndarray


def read_golden(bundle: Path) -> Golden:
    """The golden images and outputs of a bundle. Raises: IntegrityError when they are missing or unreadable."""
    path = bundle / GOLDEN
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Golden(arrays["input"], arrays["output"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as err:
        raise IntegrityError(f"{path}: no golden images and outputs there ({err}). Build the bundle again.") from err


def run_in_batches(
    session: Session, images: np.ndarray, *, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """The session's first output for every image, as many at a time as it takes.

    Shapes: (N, 3, H, W) -> (N, K). Where the batch is fixed, the last one is filled up by repetition.
    """
    name, output = session.input_names[0], session.output_names[0]
    fixed = session.input_shapes[name][0]
    size = fixed if fixed > 0 else FREE_BATCH
    rows = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        fed = np.resize(batch, (fixed, *batch.shape[1:])) if fixed > 0 else batch
        rows.append(session.run({name: fed})[output][: len(batch)])
        if progress is not None:
            progress((start + len(batch)) / len(images))
    return np.concatenate(rows)
