"""What this machine can do, as tables: its hardware, the packages it has, and each target with its reason."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping

from rich.table import Table
from rich.text import Text

from .. import __version__
from ..export.machine import Machine, read_machine
from ..export.target import CAPABILITIES, TargetSpec
from ..export.targets import make_target
from .tables import plain_table

# Where the distribution's name is not the module's, or where one of several may hold the module.
DISTRIBUTIONS = {
    "PIL": ("pillow",),
    "cuda": ("cuda-python", "cuda-bindings"),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "sklearn": ("scikit-learn",),
    "tensorrt_rtx": ("tensorrt-rtx",),
    "torch_pruning": ("torch-pruning",),
}


def machine_table() -> Table:
    """This machine, and the Python and chip-deploy that run on it."""
    machine = read_machine()
    table = plain_table("this machine", last="")
    for name, value in (
        ("chip-deploy", __version__),
        ("Python", platform.python_version()),
        ("system", machine.system),
        ("CPU", f"{machine.cpu}, {machine.cores} cores, {' '.join(machine.isa) or 'no vector unit known'}"),
        ("memory", f"{machine.memory_gib:.1f} GiB"),
        ("GPU", _gpu(machine)),
    ):
        table.add_row(Text(name), Text(value))
    return table


def package_table(extras: Mapping[str, str]) -> Table:
    """Each package of `extras` (module -> the extra that brings it): its version, or how to get it. Imports none."""
    table = plain_table("package", last="version")
    for module, extra in extras.items():
        names = DISTRIBUTIONS.get(module, (module,))
        version = _first_version(names)
        table.add_row(Text(names[0]), Text(version or f"not installed; comes with chip-deploy[{extra}]"))
    return table


def target_table() -> Table:
    """Each target with what it can do here, and why not where it cannot."""
    table = plain_table("target", last="here")
    for name in CAPABILITIES:
        table.add_row(Text(name), Text(_usability(name)))
    return table


def _usability(name: str) -> str:
    reason = make_target(TargetSpec(name=name)).unusable()
    if reason:
        return f"cannot be used: {reason}"
    if name == "ort-cpu":
        return "builds and measures here"
    from ..export.target_trt import find_gpu

    gpu = find_gpu()
    return f"builds here; measures on a GPU only: {gpu}" if isinstance(gpu, str) else f"builds here, runs on {gpu.name}"


def _gpu(machine: Machine) -> str:
    if not machine.gpu:
        return "none that NVIDIA's driver names"
    return f"{machine.gpu}, {machine.sm or 'compute capability unknown'}, driver {machine.driver or 'unknown'}"


def _first_version(names: Iterable[str]) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
