"""NVIDIA's software and boards, read from files and tools laid out as machines lay them out."""

import ctypes
import importlib
import importlib.metadata
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from chip_deploy.export import nvidia
from chip_deploy.export.nvidia import (
    Clocks,
    Gpu,
    ask_smi,
    driver_cuda,
    find_gpu,
    jetpack,
    l4t,
    library_version,
    nvml_device,
    parse_clocks,
    parse_packages,
    read_clocks,
)

ORIN_RELEASE = (
    "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"
    "# KERNEL_VARIANT: oot\n"
)
ORIN_PACKAGES = """cuda-cudart-12-6 12.6.68-1 install ok installed
libcudnn9-cuda-12 9.3.0.75-1 install ok installed
libcudnn8 8.9.4 deinstall ok config-files
libnvinfer10 10.3.0.30-1+cuda12.5 install ok installed
nvidia-jetpack 6.2+b77 install ok installed
"""
UUID, PART = "01020304-0506-0708-090a-0b0c0d0e0f10", "a1a2a3a4-0506-0708-090a-0b0c0d0e0f10"
on_posix = pytest.mark.skipif(os.name != "posix", reason="the stand-in for a tool is a shell script")


@pytest.fixture
def no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any of NVIDIA's wheels, as a Jetson is."""

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is the only one searched for programs, and no nvidia-ml-py."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return tmp_path


def tool(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_a_jetson_tells_its_linux(tmp_path: Path) -> None:
    write(tmp_path, {"etc/nv_tegra_release": ORIN_RELEASE})
    assert l4t(tmp_path) == "36.4.3"


@pytest.mark.parametrize("text", [None, "", "# R36", "no release at all"])
def test_another_machine_has_no_l4t(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        write(tmp_path, {"etc/nv_tegra_release": text})
    assert l4t(tmp_path) is None


@pytest.mark.usefixtures("no_wheels")
def test_a_jetsons_libraries_come_from_its_package_manager(tmp_path: Path) -> None:
    packages = parse_packages(ORIN_PACKAGES)
    found = {name: library_version(name, root=tmp_path, packages=packages) for name in nvidia.DISTRIBUTIONS}
    assert found == {
        "cuda": "12.6.68-1",
        "cudnn": "9.3.0.75-1",
        "tensorrt": "10.3.0.30-1+cuda12.5",
        "tensorrt_rtx": None,
    }
    assert jetpack(packages) == "6.2+b77"


@pytest.mark.usefixtures("no_wheels")
def test_the_toolkits_own_note_goes_before_the_package_manager(tmp_path: Path) -> None:
    write(tmp_path, {"usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}'})
    assert library_version("cuda", root=tmp_path, packages=parse_packages(ORIN_PACKAGES)) == "12.6.11"


@pytest.mark.usefixtures("no_wheels")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"cuda": "12"}', '{"cuda": {}}'])
def test_a_note_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"usr/local/cuda/version.json": text})
    assert library_version("cuda", root=tmp_path, packages={}) is None


def test_a_wheel_goes_first_because_python_uses_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"1.0 of {name}")
    assert library_version("cudnn", root=tmp_path, packages=parse_packages(ORIN_PACKAGES)).startswith("1.0 of nvidia-c")


@pytest.mark.parametrize("text", ["", "\n\n", "dpkg-query: no packages found matching libcudnn*", "one two"])
def test_lines_that_name_no_installed_package_are_none(text: str) -> None:
    assert parse_packages(text) == {}


@on_posix
def test_the_package_manager_is_believed_though_it_fails_for_a_name_it_does_not_know(no_tools: Path) -> None:
    tool(no_tools, "dpkg-query", "echo 'libnvinfer10 10.3.0 install ok installed'; echo nothing >&2; exit 1")
    nvidia.system_packages.cache_clear()
    try:
        assert nvidia.system_packages() == {"libnvinfer10": "10.3.0"}
    finally:
        nvidia.system_packages.cache_clear()


def test_a_jetson_with_locked_clocks_says_so(tmp_path: Path) -> None:
    folder = "sys/class/devfreq/17000000.gpu"
    write(tmp_path, {f"{folder}/{name}_freq": "1300500000\n" for name in ("cur", "min", "max")})
    assert read_clocks(tmp_path) == Clocks(sm_mhz=1300.5, sm_max_mhz=1300.5, locked=True)


def test_a_jetson_whose_clocks_may_move_says_so(tmp_path: Path) -> None:
    folder = "sys/class/devfreq/17000000.ga10b"
    write(tmp_path, {f"{folder}/cur_freq": "306000000", f"{folder}/min_freq": "306000000"})
    write(tmp_path, {f"{folder}/max_freq": "1300500000", "sys/class/devfreq/13e00000.host1x/cur_freq": "1"})
    assert read_clocks(tmp_path) == Clocks(sm_mhz=306.0, sm_max_mhz=1300.5, locked=False)


@on_posix
def test_a_desktop_gpus_clocks_come_from_nvidia_smi(no_tools: Path) -> None:
    tool(no_tools, "nvidia-smi", 'echo "210, 2040, 405, 6251"')
    assert read_clocks(no_tools) == Clocks(sm_mhz=210, sm_max_mhz=2040, memory_mhz=405, memory_max_mhz=6251)


@on_posix
@pytest.mark.parametrize("body", ["exit 9", "echo 'NVIDIA-SMI has failed'", "kill -9 $$", ": > /dev/null"])
def test_a_broken_nvidia_smi_tells_nothing_and_ends_nothing(no_tools: Path, body: str) -> None:
    tool(no_tools, "nvidia-smi", body)
    assert read_clocks(no_tools) is None


def test_a_file_in_the_place_of_the_tool_that_is_no_program_tells_nothing(no_tools: Path) -> None:
    (no_tools / "nvidia-smi").write_bytes(b"\x7fELF, but not really")
    (no_tools / "nvidia-smi").chmod(0o755)
    assert read_clocks(no_tools) is None


def test_without_any_tool_there_are_no_clocks(no_tools: Path) -> None:
    assert read_clocks(no_tools) is None


def test_a_clock_that_the_board_hides_is_none() -> None:
    assert parse_clocks("[N/A], [Not Supported], 405, 6251\n") == Clocks(memory_mhz=405, memory_max_mhz=6251)
    assert parse_clocks("") is None
    assert parse_clocks("1, 2") is None
    assert parse_clocks("1" * 200_000) is None  # longer than a field of csv may be


class Nvml:
    """nvidia-ml-py on a driver that goes away before the library is shut down."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception):
        """Derives straight from Exception, as the real one."""

    def nvmlInit(self) -> None:
        """Succeeds."""

    def nvmlShutdown(self) -> None:
        raise self.NVMLError("GPU is lost")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetClockInfo(self, _: int, clock: int) -> int:
        return {1: 210, 2: 405}[clock]

    def nvmlDeviceGetMaxClockInfo(self, _: int, clock: int) -> int:
        raise self.NVMLError(f"Not Supported: {clock}")


def test_a_driver_that_fails_to_shut_down_has_told_its_clocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda _: Nvml())
    assert read_clocks(tmp_path) == Clocks(sm_mhz=210, memory_mhz=405)


class CountedNvml(Nvml):
    """nvidia-ml-py that counts two GPUs, and a part of the second, by its own order."""

    UUIDS = ("GPU-00000000-0000-0000-0000-000000000000", f"GPU-{UUID}", f"MIG-{PART}")

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        if name not in self.UUIDS:
            raise self.NVMLError("Not Found")
        return self.UUIDS.index(name)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, part: int) -> int:
        assert part == 2, "no part of a GPU"
        return 1


@pytest.mark.parametrize(("told", "handle"), [(UUID, 1), (PART, 1), ("", 0), ("11111111-unknown", 0)])
def test_nvml_is_asked_about_the_gpu_that_cuda_counts_first(
    told: str, handle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "find_gpu", lambda: Gpu("NVIDIA H200", "sm90", told))
    assert nvml_device(CountedNvml()) == handle


def test_without_a_gpu_of_cudas_nvml_is_asked_about_its_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "find_gpu", lambda: "no CUDA driver")
    assert nvml_device(CountedNvml()) == 0


@on_posix
@pytest.mark.parametrize(("told", "answer"), [(UUID, "the second"), (PART, "the first\nthe second"), ("", "the first")])
def test_nvidia_smi_is_asked_about_the_gpu_that_cuda_counts_first(
    told: str, answer: str, no_tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "find_gpu", lambda: Gpu("NVIDIA H200", "sm90", told))
    script = f"""test "$1 $2" = "--query-gpu=name --format=csv,noheader,nounits" || exit 1
case "$3" in
  --id=GPU-{UUID}) echo "the second";;
  "") echo "the first"; echo "the second";;
  *) echo "No devices were found"; exit 6;;
esac"""
    tool(no_tools, "nvidia-smi", script)
    assert ask_smi("name").startswith(answer)


class DriverOfOne:
    """A CUDA driver with one GPU; which calls about its UUID it has, differs."""

    def __init__(self, **uuids: bytes) -> None:
        for name, told in uuids.items():
            setattr(self, name, lambda pointer, _, told=told: self._tell(pointer, told))

    def _tell(self, pointer: object, told: bytes) -> int:
        pointer._obj[:] = list(told)  # pyright: ignore[reportAttributeAccessIssue]
        return 0

    def cuInit(self, flags: int) -> int:
        return flags

    def cuDeviceGet(self, pointer: object, index: int) -> int:
        return index

    def cuDeviceGetName(self, name: object, size: int, device: object) -> int:
        name.value = b"NVIDIA H200"  # pyright: ignore[reportAttributeAccessIssue]
        return 0

    def cuDeviceGetAttribute(self, pointer: object, attribute: int, device: object) -> int:
        pointer._obj.value = {75: 9, 76: 0}[attribute]  # pyright: ignore[reportAttributeAccessIssue]
        return 0


@pytest.mark.parametrize(
    ("calls", "told"),
    [
        (("cuDeviceGetUuid", "cuDeviceGetUuid_v2"), UUID),  # of the whole GPU, where there is a part as well
        (("cuDeviceGetUuid_v2",), PART),
        ((), ""),
    ],
)
def test_the_driver_tells_the_gpu_with_its_uuid(
    calls: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"cuDeviceGetUuid": UUID, "cuDeviceGetUuid_v2": PART}
    driver = DriverOfOne(**{name: bytes.fromhex(known[name].replace("-", "")) for name in calls})
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    find_gpu.cache_clear()
    try:
        assert find_gpu() == Gpu("NVIDIA H200", "sm90", told)
    finally:
        find_gpu.cache_clear()


class Driver:
    """A CUDA driver that answers one question."""

    def __init__(self, code: int, version: int) -> None:
        self._code, self._version = code, version

    def cuDriverGetVersion(self, pointer: object) -> int:
        pointer._obj.value = self._version  # pyright: ignore[reportAttributeAccessIssue]
        return self._code


@pytest.mark.parametrize(("code", "version", "found"), [(0, 13020, (13, 2)), (0, 12080, (12, 8)), (3, 13020, None)])
def test_the_driver_tells_the_newest_cuda_it_serves(
    monkeypatch: pytest.MonkeyPatch, code: int, version: int, found: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver(code, version))
    assert driver_cuda() == found


@pytest.mark.parametrize("library", [SimpleNamespace(), None], ids=["a library without the call", "no library"])
def test_what_is_no_driver_serves_no_cuda(monkeypatch: pytest.MonkeyPatch, library: object) -> None:
    def load(_: str) -> object:
        if library is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert driver_cuda() is None
