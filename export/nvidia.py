"""What NVIDIA's driver, libraries and boards tell about themselves, read without importing any of their packages."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import functools
import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

ROOT = Path("/")
PROGRAM_SECONDS = 10
# Where a version is found, in this order: the distribution of an installed wheel, then the system's own package.
DISTRIBUTIONS = {
    "cuda": ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12"),
    "cudnn": ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
    "tensorrt": ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
    "tensorrt_rtx": ("tensorrt-rtx",),
}
SYSTEM_PACKAGES = {
    "cuda": r"cuda-cudart-\d+-\d+",
    "cudnn": r"libcudnn\d+(-cuda-\d+)?",
    "tensorrt": r"libnvinfer\d+",
    "jetpack": r"nvidia-jetpack",
}
# The folders under which Linux keeps a Jetson's GPU clock: by the chip, or plainly.
JETSON_GPUS = re.compile(r".*(gpu|ga10b|gv11b|gp10b|gb10b)(-gpc-0)?$")
SMI_CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem")
CU_COMPUTE_CAPABILITY_MAJOR = 75
CU_COMPUTE_CAPABILITY_MINOR = 76


class Gpu(NamedTuple):
    """The first CUDA device: its name, its compute capability, written `sm89`, and its UUID where the driver tells."""

    name: str
    sm: str
    uuid: str = ""


class Clocks(BaseModel):
    """The GPU's clocks at one moment, in MHz; what it does not tell is None."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    sm_mhz: float | None = None
    sm_max_mhz: float | None = None
    memory_mhz: float | None = None
    memory_max_mhz: float | None = None
    locked: bool | None = None
    """Whether the clock can neither rise nor fall; only a Jetson tells."""


@functools.cache
def find_gpu() -> Gpu | str:
    """The first CUDA device, asked from the driver alone; or, where there is none, the reason as a phrase."""
    try:
        driver = _driver()
    except OSError:
        return "no CUDA driver"
    if code := driver.cuInit(0):
        return f"no CUDA device that the driver can use (cuInit gives error {code})"
    device, major, minor, name = (
        ctypes.c_int(),
        ctypes.c_int(),
        ctypes.c_int(),
        ctypes.create_string_buffer(256),
    )
    codes = [
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), CU_COMPUTE_CAPABILITY_MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), CU_COMPUTE_CAPABILITY_MINOR, device),
    ]
    if any(codes):
        return f"no CUDA device that the driver can describe (errors {codes})"
    return Gpu(name.value.decode(), f"sm{major.value}{minor.value}", _uuid(driver, device))


def nvml_device(nvml: Any) -> Any:
    """NVML's handle of the GPU that CUDA counts first, by its UUID: NVML counts by slot, and sees hidden ones as well.

    Of a part of a GPU (MIG) the handle of the whole, which has the clocks; without a UUID that of the first GPU.
    """
    known = _first_uuid()
    for kind in ("GPU", "MIG") if known else ():
        with contextlib.suppress(nvml.NVMLError):
            device = nvml.nvmlDeviceGetHandleByUUID(f"{kind}-{known}")
            return device if kind == "GPU" else nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device)
    return nvml.nvmlDeviceGetHandleByIndex(0)


def ask_smi(*fields: str) -> str:
    """What nvidia-smi tells of the GPU that CUDA counts first, as csv,noheader,nounits; empty where it fails.

    Where it knows no such UUID, it tells of all GPUs.
    """
    known = _first_uuid()
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    told = _printed("nvidia-smi", *query, f"--id=GPU-{known}", check=True) if known else ""
    return told or _printed("nvidia-smi", *query, check=True)


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver can serve, (13, 2); None without a driver."""
    with contextlib.suppress(OSError, AttributeError):
        driver = _driver()
        version = ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value > 0:
            return version.value // 1000, version.value % 1000 // 10
    return None


def library_version(name: str, *, root: Path = ROOT, packages: Mapping[str, str] | None = None) -> str | None:
    """The version of `cuda`, `cudnn`, `tensorrt` or `tensorrt_rtx`; None where none is found.

    An installed wheel goes first, because Python uses it, then the toolkit's own note, then the system's packages.
    """
    for distribution in DISTRIBUTIONS[name]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    if name == "cuda" and (version := _toolkit(root)):
        return version
    return _system_version(name, system_packages() if packages is None else packages)


def jetpack(packages: Mapping[str, str] | None = None) -> str | None:
    """The version of a Jetson's JetPack, `6.2+b77`; None elsewhere, and where only parts of it are installed."""
    return _system_version("jetpack", system_packages() if packages is None else packages)


def l4t(root: Path = ROOT) -> str | None:
    """The version of a Jetson's Linux, `36.4.3`; None elsewhere."""
    text = _text(root / "etc" / "nv_tegra_release")
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None


@functools.cache
def system_packages() -> Mapping[str, str]:
    """Name and version of the NVIDIA libraries that Debian's package manager installed; empty without one."""
    patterns = ("cuda-cudart-*", "libcudnn*", "libnvinfer*", "nvidia-jetpack")
    return parse_packages(_printed("dpkg-query", "-W", "-f", r"${Package} ${Version} ${Status}\n", *patterns))


def parse_packages(text: str) -> dict[str, str]:
    """Name -> version of what dpkg-query lists as installed.

    >>> parse_packages("libnvinfer10 10.3.0.30-1+cuda12.5 install ok installed")
    {'libnvinfer10': '10.3.0.30-1+cuda12.5'}
    """
    rows = [line.split(maxsplit=2) for line in text.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 3 and row[2] == "install ok installed"}


def read_clocks(root: Path = ROOT) -> Clocks | None:
    """The first GPU's clocks now: of a Jetson from its kernel, else from nvidia-ml-py or nvidia-smi; None without."""
    return _jetson_clocks(root) or _nvml_clocks() or parse_clocks(ask_smi(*SMI_CLOCKS))


def parse_clocks(text: str) -> Clocks | None:
    """The first GPU of nvidia-smi's answer about SMI_CLOCKS in csv,noheader,nounits.

    >>> parse_clocks("210, 2040, 405, [N/A]")
    Clocks(sm_mhz=210.0, sm_max_mhz=2040.0, memory_mhz=405.0, memory_max_mhz=None, locked=None)
    """
    try:
        row = [field.strip() for field in next(csv.reader(text.splitlines()), [])]
    except csv.Error:
        return None
    if len(row) != len(SMI_CLOCKS):
        return None
    numbers = [float(field) if re.fullmatch(r"\d+(\.\d+)?", field) else None for field in row]
    return Clocks(**dict(zip(("sm_mhz", "sm_max_mhz", "memory_mhz", "memory_max_mhz"), numbers, strict=True)))


def _jetson_clocks(root: Path) -> Clocks | None:
    """A Jetson's GPU has a frequency governor like a CPU's; jetson_clocks makes its bounds one."""
    for folder in sorted((root / "sys" / "class" / "devfreq").glob("*")):
        if not JETSON_GPUS.fullmatch(folder.name):
            continue
        texts = [_text(folder / name).strip() for name in ("cur_freq", "min_freq", "max_freq")]
        if all(text.isdigit() for text in texts):
            current, lowest, highest = (int(text) / 1e6 for text in texts)
            return Clocks(sm_mhz=current, sm_max_mhz=highest, locked=lowest == highest)
    return None


def _nvml_clocks() -> Clocks | None:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None

    def told(function: str, clock: int) -> float | None:
        try:
            return float(getattr(nvml, function)(device, clock))
        except nvml.NVMLError:
            return None

    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        device = nvml_device(nvml)
        sm, memory = nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM
        return Clocks(
            sm_mhz=told("nvmlDeviceGetClockInfo", sm),
            sm_max_mhz=told("nvmlDeviceGetMaxClockInfo", sm),
            memory_mhz=told("nvmlDeviceGetClockInfo", memory),
            memory_max_mhz=told("nvmlDeviceGetMaxClockInfo", memory),
        )
    except nvml.NVMLError:
        return None
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _toolkit(root: Path) -> str | None:
    """What the CUDA toolkit notes about itself."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(_text(root / "usr" / "local" / "cuda" / "version.json"))["cuda"]["version"])
    return None


def _system_version(name: str, packages: Mapping[str, str]) -> str | None:
    pattern = SYSTEM_PACKAGES.get(name)
    found = [version for package, version in packages.items() if pattern and re.fullmatch(pattern, package)]
    return found[-1] if found else None


def _driver() -> ctypes.CDLL:
    """Raises: OSError without a driver."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _first_uuid() -> str:
    gpu = find_gpu()
    return "" if isinstance(gpu, str) else gpu.uuid


def _uuid(driver: ctypes.CDLL, device: ctypes.c_int) -> str:
    """As NVML writes it, without its prefix; empty where the driver does not tell.

    The first version of the call tells that of the whole GPU; the second, that of a part of it (MIG).
    """
    found = (ctypes.c_ubyte * 16)()
    for name in ("cuDeviceGetUuid", "cuDeviceGetUuid_v2"):
        ask = getattr(driver, name, None)
        if ask is not None and ask(ctypes.byref(found), device) == 0:
            return str(uuid.UUID(bytes=bytes(found)))
    return ""


def _printed(program: str, *arguments: str, check: bool = False) -> str:
    """What a program prints, unless `check` also when it fails, as dpkg-query does where one of several names is
    unknown."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=check)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _text(path: Path) -> str:
    """The file's text; empty where there is no such file or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
