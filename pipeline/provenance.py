"""Where a result comes from: the packages that computed it, and the user's own code."""

from __future__ import annotations

import contextlib
import inspect
from importlib import metadata
from pathlib import Path

from .. import __version__
from ..export.bundle import sha256_file
from .models import import_object

PACKAGES = (
    "torch", "torchvision", "torch-pruning", "lightning", "onnx", "onnxscript", "numpy", "onnxruntime",
    "onnxruntime-gpu", "numba", "scipy", "tensorrt", "tensorrt-rtx", "safetensors", "pillow", "scikit-learn", "timm",
)  # fmt: skip


def versions() -> dict[str, str]:
    """This package, and the others that a result may depend on, with their versions where they are installed."""
    found = {"chip-deploy": __version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def source_digest(name: str) -> str:
    """sha256 of the source file behind a `package.module:name` of the user's; of nothing for any other name."""
    if ":" not in name or name.partition(":")[0] in ("torchvision", "timm"):
        return ""
    file = inspect.getsourcefile(inspect.unwrap(import_object(name, what="code")))
    return sha256_file(Path(file)) if file else ""
