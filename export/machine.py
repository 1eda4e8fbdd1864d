"""The machine that a number was measured on, read without any package beyond the standard library."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib
import json
import os
import platform
import re
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from .nvidia import ask_smi, find_gpu, nvml_device
from .target import cpu_isa

PROC = Path("/proc")
SYSFS = Path("/sys")
SMI_FIELDS = ("name", "compute_cap", "driver_version")
# What makes two machines one for a latency. Load, governor and memory in use change from minute to minute, and
# the kernel and Python from update to update; all of these are recorded, none of them decides.
IDENTITY = ("system", "cpu", "cores", "isa", "gpu", "sm", "driver")


class Machine(BaseModel):
    """A machine as it was when something was measured on it; what it does not tell is None."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    system: str
    """Operating system and architecture: `Linux x86_64`."""
    kernel: str = ""
    cpu: str
    cores: int
    """Logical cores."""
    isa: list[str]
    """The vector instruction sets that decide how a runtime lays out channels: `avx2`, `avx512f`, `neon`."""
    memory_gib: float
    governor: str | None
    """How the CPU's clock is governed; several, separated by commas, where the cores differ."""
    load: float | None
    """Processes that wanted a core during the last minute, on average."""
    gpu: str | None
    sm: str | None
    """The GPU's compute capability: `sm89`."""
    driver: str | None
    python: str


class GpuFacts(NamedTuple):
    """The GPU that CUDA counts first, as far as the machine tells."""

    name: str | None = None
    sm: str | None = None
    driver: str | None = None


def read_machine() -> Machine:
    """This machine, now.

    Cost: a few files, and up to a tenth of a second for NVIDIA's driver where there is one.
    """
    gpu = read_gpu()
    return Machine(
        system=f"{platform.system()} {platform.machine()}".strip(),
        kernel=platform.release(),
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        isa=list(cpu_isa()),
        memory_gib=memory_gib(),
        governor=governor(),
        load=load(),
        gpu=gpu.name,
        sm=gpu.sm,
        driver=gpu.driver,
        python=platform.python_version(),
    )


def load() -> float | None:
    """Processes that wanted a core during the last minute, on average; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def fingerprint(machine: Machine) -> str:
    """Sixteen hexadecimal digits that are equal for machines whose latencies may be compared.

    They cover system, CPU, cores, instruction sets, GPU, compute capability and driver, and nothing that changes by
    itself.
    """
    identity = {name: getattr(machine, name) for name in IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def differences(recorded: Machine, here: Machine, *, there: str = "there", here_is: str = "here") -> str:
    """What tells two machines apart, as a phrase: `cpu 'A' there, 'B' here`; empty when their fingerprints agree."""
    return "; ".join(
        f"{name} {_shown(getattr(recorded, name))} {there}, {_shown(getattr(here, name))} {here_is}"
        for name in IDENTITY
        if getattr(recorded, name) != getattr(here, name)
    )


def cpu_name(proc: Path = PROC) -> str:
    """The CPU's model, or the board's where the CPU does not tell (ARM), or the architecture."""
    found = re.search(r"^model name\s*:\s*(\S.*)$", _text(proc / "cpuinfo"), re.MULTILINE)
    board = _text(proc / "device-tree" / "model").strip("\0 \n")
    name = board or (found[1].strip() if found else "")
    return " ".join(name.split()) or platform.processor() or platform.machine() or "unknown"


def memory_gib(proc: Path = PROC) -> float:
    """Memory of the machine in GiB, to two decimals; 0 where the system does not tell."""
    found = re.search(r"^MemTotal:\s*(\d+) kB$", _text(proc / "meminfo"), re.MULTILINE)
    if found:
        return round(int(found[1]) / 2**20, 2)
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 2)
    return 0.0


def governor(sysfs: Path = SYSFS) -> str | None:
    """The governors of the cores' clocks, sorted; None where the system hides them, as virtual machines do."""
    files = (sysfs / "devices" / "system" / "cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    names = {_text(file).strip() for file in files} - {""}
    return ",".join(sorted(names)) or None


def read_gpu() -> GpuFacts:
    """The GPU that CUDA counts first: name and compute capability as the CUDA driver tells them, which a Jetson's
    nvidia-smi does not, and the version of the driver from nvidia-ml-py where it can be imported, else nvidia-smi.

    Where CUDA has no GPU, all of it is theirs.
    """
    told = _gpu_from_nvml() or parse_nvidia_smi(ask_smi(*SMI_FIELDS)) or GpuFacts()
    gpu = find_gpu()
    return told if isinstance(gpu, str) else told._replace(name=gpu.name, sm=gpu.sm)


def _gpu_from_nvml() -> GpuFacts | None:
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        device = nvml_device(pynvml)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(device)
        name, driver = pynvml.nvmlDeviceGetName(device), pynvml.nvmlSystemGetDriverVersion()
        return GpuFacts(_decoded(name), f"sm{major}{minor}", _decoded(driver))
    except pynvml.NVMLError:
        return None
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def parse_nvidia_smi(text: str) -> GpuFacts | None:
    """The first GPU of nvidia-smi's answer about SMI_FIELDS in csv,noheader,nounits.

    >>> parse_nvidia_smi("NVIDIA L4, 8.9, 580.65.06")
    GpuFacts(name='NVIDIA L4', sm='sm89', driver='580.65.06')
    """
    try:
        row = next(csv.reader(text.splitlines(), skipinitialspace=True), [])
    except csv.Error:
        return None
    if len(row) != len(SMI_FIELDS):
        return None
    name, capability, driver = (field.strip() for field in row)
    sm = f"sm{capability.replace('.', '')}" if re.fullmatch(r"\d+\.\d", capability) else None
    return GpuFacts(name, sm, driver if driver[:1].isdigit() else None)


def _text(path: Path) -> str:
    """The file's text; empty where there is no such file or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _decoded(value: str | bytes) -> str:
    """A string from NVML, which older versions give as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _shown(value: str | int | list[str] | None) -> str:
    if value is None:
        return "none"
    return " ".join(value) if isinstance(value, list) else f"'{value}'"
