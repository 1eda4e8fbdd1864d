"""What this machine can do: its hardware and libraries, the packages it has, and each target with reason and remedy.

No probe may end the command: what cannot be found out is None, whatever a broken driver, tool or package does.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..export import nvidia
from ..export.errors import TargetUnavailable
from ..export.machine import Machine, read_machine
from ..export.nvidia import Clocks
from ..export.target import CAPABILITIES, PRECISIONS, TargetSpec
from ..export.targets import make_target
from ..export.watch import power_mode
from .cli import attempted
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

Told = TypeVar("Told")


class TargetRow(BaseModel):
    """What one target can do here: build engines, run them, or neither, with the reason and what would help."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    builds: bool
    runs: bool
    reason: str = ""
    """Why not more; empty for a target that builds and runs."""
    remedy: str = ""
    precisions: list[str]
    """Those that it takes, whether or not it can be used here."""


class PackageRow(BaseModel):
    """A package that some command needs, its version where it is installed, and the extra that brings it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    package: str
    version: str | None
    extra: str


class Nvidia(BaseModel):
    """What NVIDIA's driver and libraries are here; what is not there, or does not tell, is None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    driver_cuda: str | None
    """The newest CUDA that the driver serves."""
    cuda: str | None
    cudnn: str | None
    tensorrt: str | None
    tensorrt_rtx: str | None
    jetpack: str | None
    l4t: str | None
    power_mode: str | None
    clocks: Clocks | None


class Diagnosis(BaseModel):
    """This machine, all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["chip-deploy.doctor/1"] = Field(default="chip-deploy.doctor/1", alias="schema")
    chip_deploy: str
    python: str
    machine: Machine | None
    nvidia: Nvidia
    packages: list[PackageRow]
    targets: list[TargetRow]


def diagnose(extras: Mapping[str, str]) -> Diagnosis:
    """What this machine can do; `extras` says for each module which extra brings it. Never fails, changes nothing.

    Cost: some seconds where torch has to be imported, and up to ten for each of NVIDIA's tools that does not answer.
    """
    return Diagnosis(
        chip_deploy=__version__,
        python=platform.python_version(),
        machine=told(read_machine),
        nvidia=_nvidia(),
        packages=[_package(module, extra) for module, extra in extras.items()],
        targets=[_target(spec) for spec in _specs()],
    )


def told(probe: Callable[[], Told]) -> Told | None:
    """What `probe` finds out; None when it breaks."""
    found = attempted(probe)
    return None if isinstance(found, Exception) else found


def reason_and_remedy(sentences: str) -> tuple[str, str]:
    """What a target says against itself, parted behind its first sentence; a full stop in brackets ends none.

    >>> reason_and_remedy("no driver (libcuda.so: not found. It is needed). Install one.")
    ('no driver (libcuda.so: not found. It is needed)', 'Install one.')
    """
    depth = 0
    for place, letter in enumerate(sentences):
        depth += (letter == "(") - (letter == ")")
        if not depth and sentences[place : place + 2] == ". ":
            return sentences[:place], sentences[place + 2 :]
    return sentences.removesuffix("."), ""


def machine_table(diagnosis: Diagnosis) -> Table:
    """This machine, and the Python and chip-deploy that run on it."""
    table = plain_table("this machine", last="")
    for name, value in _machine_rows(diagnosis):
        if value is not None:
            table.add_row(Text(name), Text(value))
    return table


def package_table(diagnosis: Diagnosis) -> Table:
    """Each package: its version, or how to get it."""
    table = plain_table("package", last="version")
    for row in diagnosis.packages:
        # A Jetson has a TensorRT of its own, which the one of the extra would stand before.
        by_itself = row.package == "cuda-python" and diagnosis.nvidia.tensorrt
        missing = (
            f"not installed; {'`pip install cuda-python`' if by_itself else f'comes with chip-deploy[{row.extra}]'}"
        )
        table.add_row(Text(row.package), Text(row.version or missing))
    return table


def target_table(diagnosis: Diagnosis) -> Table:
    """Each target with what it can do here, and where it cannot, why not and what would help."""
    table = plain_table("target", last="here")
    for row in diagnosis.targets:
        table.add_row(Text(row.target), Text(_usability(row)))
    return table


def _specs() -> list[TargetSpec]:
    """Every target, and torch once for each way in which it runs a network."""
    specs = []
    for name in CAPABILITIES:
        ways = CAPABILITIES[name] if name == "torch" else ()
        specs += [TargetSpec(name=name, capabilities=(way,)) for way in ways] or [TargetSpec(name=name)]
    return specs


def _target(spec: TargetSpec) -> TargetRow:
    takes = told(lambda: [precision for precision in PRECISIONS if not make_target(spec).refuses(precision)]) or []
    found = attempted(lambda: _uses(spec))
    if isinstance(found, Exception):
        broken = " ".join(str(found).split()) or "no reason given"
        found = False, False, f"its runtime is broken ({type(found).__name__}: {broken}). Install its package again."
    builds, runs, reason = found
    why, remedy = reason_and_remedy(reason)
    return TargetRow(target=str(spec), builds=builds, runs=runs, reason=why, remedy=remedy, precisions=takes)


def _uses(spec: TargetSpec) -> tuple[bool, bool, str]:
    """Whether the target builds here, whether it runs, and where either is not so, why."""
    target = make_target(spec)
    if reason := target.unusable():
        return False, False, reason
    try:
        obstacle = target.cannot_run_own()
    except TargetUnavailable as err:
        return False, False, str(err)
    if target.on_gpu and (gpu := _no_gpu()):
        return True, False, f"measures on a GPU only: {gpu}. Copy the bundle to the device and measure it there."
    return (True, False, obstacle) if obstacle else (True, True, "")


def _no_gpu() -> str | None:
    """Why there is no GPU to run on, as a phrase; None where there is one."""
    from ..export.target_trt import find_gpu

    gpu = find_gpu()
    return gpu if isinstance(gpu, str) else None


def _nvidia() -> Nvidia:
    driver = told(nvidia.driver_cuda)
    libraries = {name: told(partial(nvidia.library_version, name)) for name in nvidia.DISTRIBUTIONS}
    return Nvidia(
        driver_cuda=f"{driver[0]}.{driver[1]}" if driver else None,
        jetpack=told(nvidia.jetpack),
        l4t=told(nvidia.l4t),
        power_mode=told(power_mode),
        clocks=told(nvidia.read_clocks),
        **libraries,
    )


def _package(module: str, extra: str) -> PackageRow:
    names = DISTRIBUTIONS.get(module, (module,))
    return PackageRow(package=names[0], version=_first_version(names), extra=extra)


def _machine_rows(diagnosis: Diagnosis) -> Iterable[tuple[str, str | None]]:
    """Names and values in the order of the table; without a value, the row is left out."""
    machine, found = diagnosis.machine, diagnosis.nvidia
    yield "chip-deploy", diagnosis.chip_deploy
    yield "Python", diagnosis.python
    if machine is not None:
        yield "system", machine.system
        yield "CPU", f"{machine.cpu}, {machine.cores} cores, {' '.join(machine.isa) or 'no vector unit known'}"
        yield "memory", f"{machine.memory_gib:.1f} GiB"
        yield "governor", machine.governor
    yield "GPU", _gpu(machine)
    yield "driver's CUDA", found.driver_cuda
    for name, version in (
        ("CUDA", found.cuda),
        ("cuDNN", found.cudnn),
        ("TensorRT", found.tensorrt),
        ("TensorRT-RTX", found.tensorrt_rtx),
    ):
        yield name, version or "not found"
    yield "JetPack", found.jetpack
    yield "L4T", found.l4t
    yield "power mode", found.power_mode
    yield "clocks", _clocks(found.clocks)


def _usability(row: TargetRow) -> str:
    if row.runs:
        return f"builds and measures here ({', '.join(row.precisions)})"
    begun = "builds here; " if row.builds else "cannot be used: "
    return " ".join(filter(None, [f"{begun}{row.reason}.", row.remedy]))


def _gpu(machine: Machine | None) -> str:
    if machine is None or not machine.gpu:
        return "none that NVIDIA's driver names"
    return f"{machine.gpu}, {machine.sm or 'compute capability unknown'}, driver {machine.driver or 'unknown'}"


def _clocks(clocks: Clocks | None) -> str | None:
    """`SM 210 of 2040 MHz, memory 405 of 6251 MHz, locked`, as far as it is known."""
    if clocks is None:
        return None
    parts = [
        f"{name} {now:.0f}{f' of {most:.0f}' if most is not None else ''} MHz"
        for name, now, most in (
            ("SM", clocks.sm_mhz, clocks.sm_max_mhz),
            ("memory", clocks.memory_mhz, clocks.memory_max_mhz),
        )
        if now is not None
    ]
    lock = {True: "locked", False: "not locked", None: "locked or not: the driver does not tell"}[clocks.locked]
    return ", ".join([*parts, lock])


def _first_version(names: Iterable[str]) -> str | None:
    for name in names:
        version: Any = told(lambda name=name: importlib.metadata.version(name))
        if version is not None:
            return str(version)
    return None
