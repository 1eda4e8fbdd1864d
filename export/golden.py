"""A bundle's golden images with the outputs that every engine made from it has to give."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from .agree import LIMITS, Agreement, compare_outputs, require_agreement
from .bundle import onnx_name
from .errors import IntegrityError
from .target import Engine

# Shape letters: N images, K outputs of each.

GOLDEN = "golden.npz"
# How the names of the arrays begin that hold the outputs in other arithmetics: `output.int8`.
OWN = "output."
# Images at once where the network leaves the batch free.
FREE_BATCH = 32


class Golden(NamedTuple):
    """Images (N, 3, H, W) and the tuned network's outputs for them (N, K), both float32.

    by_precision: for each converted file, what onnxruntime on a CPU makes of it, (N, K) by the file's precision; and
    the FP32 file's where it multiplies in TF32, as `tf32`. Bundles of earlier versions hold only those in 8 bits.
    """

    images: np.ndarray
    outputs: np.ndarray
    by_precision: Mapping[str, np.ndarray] = MappingProxyType({})


class Runner(Protocol):
    """What turns inputs into outputs: every session, and every file run as it is written."""

    input_names: list[str]
    output_names: list[str]
    input_shapes: dict[str, tuple[int, ...]]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The outputs for `feeds`, by name."""
        ...


def read_golden(bundle: Path) -> Golden:
    """The golden images and outputs of a bundle. Raises: IntegrityError when they are missing or unreadable."""
    path = bundle / GOLDEN
    try:
        with np.load(path, allow_pickle=False) as arrays:
            own = {name.removeprefix(OWN): arrays[name] for name in arrays.files if name.startswith(OWN)}
            return Golden(arrays["input"], arrays["output"], own)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as err:
        raise IntegrityError(f"{path}: no golden images and outputs there ({err}). Build the bundle again.") from err


def write_golden(path: Path, golden: Golden) -> None:
    """`path` holds the golden images and outputs; the same ones give the same bytes."""
    arrays: dict[str, Any] = {"input": golden.images, "output": golden.outputs}
    arrays |= {f"{OWN}{precision}": outputs for precision, outputs in golden.by_precision.items()}
    with path.open("wb") as file:
        np.savez(file, **arrays)


def engine_agreement(engine: Engine, golden: Golden, outputs: np.ndarray) -> Agreement:
    """An engine's outputs beside torch's, once they are also those of its own ONNX file on another runtime.

    A quantised network is far from torch's outputs by right; it must be near to what its file says. Another may be as
    far off as its own rounding explains: two that round elsewhere are as far from each other as from torch.
    Raises: ParityFailed; ValueError for outputs of another shape.
    """
    own = golden.by_precision.get(engine.precision)
    limits = f"{engine.precision} file"
    if own is not None and engine.from_onnx and limits in LIMITS:
        what = f"{engine.file} against {onnx_name('model', engine.precision)}"
        require_agreement(compare_outputs(own, outputs), what=what, precision=limits)
    agreement = compare_outputs(golden.outputs, outputs)
    rounding = rounding_of(engine.arithmetic, golden)
    require_agreement(agreement, what=engine.file, precision=engine.arithmetic, rounding=rounding)
    return agreement


def rounding_of(arithmetic: str, golden: Golden) -> Agreement | None:
    """What the roundings of 16 bits or of TF32 cost the network; None where the bundle does not tell, and in 8 bits,
    whose steps are no accident of where they are taken."""
    own = golden.by_precision.get(arithmetic)
    return None if own is None or f"{arithmetic} file" in LIMITS else compare_outputs(golden.outputs, own)


def run_in_batches(
    session: Runner, images: np.ndarray, *, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """The session's first output for every image, as many at a time as it takes.

    Shapes: (N, 3, H, W) -> (N, K). Where the batch is fixed, or an engine takes only some batches, the last one is
    filled up by repetition.
    """
    name, output = session.input_names[0], session.output_names[0]
    fixed = getattr(session, "fed_batch", session.input_shapes[name][0])
    size = fixed if fixed > 0 else FREE_BATCH
    rows = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        fed = np.resize(batch, (fixed, *batch.shape[1:])) if fixed > 0 else batch
        rows.append(session.run({name: fed})[output][: len(batch)])
        if progress is not None:
            progress((start + len(batch)) / len(images))
    return np.concatenate(rows)
