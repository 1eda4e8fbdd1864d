"""The machine, read from files laid out as machines lay them out."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from chip_deploy.export.machine import (
    GpuFacts,
    Machine,
    cpu_name,
    differences,
    fingerprint,
    governor,
    memory_gib,
    parse_nvidia_smi,
    read_gpu,
    read_machine,
)
from chip_deploy.export.nvidia import Gpu

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model\t\t: 143
model name\t: Intel(R) Xeon(R)  Platinum 8488C
flags\t\t: fpu avx avx2 avx512f

processor\t: 1
model name\t: another
"""
ARM = "processor\t: 0\nBogoMIPS\t: 62.50\nFeatures\t: fp asimd\n"
OTHER = {
    "system": "Linux aarch64",
    "cpu": "another",
    "cores": 1000,
    "isa": ["sve"],
    "gpu": "another",
    "sm": "sm999",
    "driver": "another",
}


@pytest.fixture(scope="module")
def here() -> Machine:
    return read_machine()


def test_this_machine_is_read(here: Machine) -> None:
    assert here.cores == os.cpu_count()
    assert here.system == f"{platform.system()} {platform.machine()}"
    assert here.python == ".".join(map(str, sys.version_info[:3]))
    assert here.cpu
    assert Machine.model_validate_json(here.model_dump_json()) == here


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the other implementation asks Linux")
def test_memory_is_what_the_c_library_says(here: Machine) -> None:
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    # Both count what the kernel can use; a twentieth of a GiB is left for what it may count apart.
    assert here.memory_gib == pytest.approx(pages * page_bytes / 2**30, abs=0.05)


def test_the_cpu_is_named_by_its_model(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(X86, "utf-8")
    assert cpu_name(tmp_path) == "Intel(R) Xeon(R) Platinum 8488C"


def test_an_arm_board_names_itself(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(ARM, "utf-8")
    (tmp_path / "device-tree").mkdir()
    # The kernel ends the string with a zero byte.
    (tmp_path / "device-tree" / "model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    assert cpu_name(tmp_path) == "NVIDIA Jetson AGX Orin Developer Kit"


def test_a_cpu_that_tells_nothing_is_named_by_its_architecture(tmp_path: Path) -> None:
    assert cpu_name(tmp_path) in (platform.processor(), platform.machine())


def test_memory_is_told_in_gib(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       16777216 kB\nMemFree:         1024 kB\n", "utf-8")
    assert memory_gib(tmp_path) == 16.0


def test_governors_are_told_once_each(tmp_path: Path) -> None:
    for core, name in enumerate(("powersave", "performance", "powersave")):
        folder = tmp_path / "devices" / "system" / "cpu" / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(f"{name}\n", "utf-8")
    assert governor(tmp_path) == "performance,powersave"


def test_a_machine_that_hides_its_governors_has_none(tmp_path: Path) -> None:
    assert governor(tmp_path) is None


@pytest.mark.parametrize(
    ("printed", "gpu"),
    [
        ("NVIDIA H200, 9.0, 570.86.15\n", GpuFacts("NVIDIA H200", "sm90", "570.86.15")),
        ("NVIDIA GeForce RTX 5090, 12.0, 576.02\nNVIDIA L4, 8.9, 576.02\n",
         GpuFacts("NVIDIA GeForce RTX 5090", "sm120", "576.02")),
        ("Orin (nvgpu), [N/A], 540.4.0\n", GpuFacts("Orin (nvgpu)", None, "540.4.0")),
        ("Orin (nvgpu), [N/A], [N/A]\n", GpuFacts("Orin (nvgpu)", None, None)),
        ("No devices were found\n", None),
        ("x" * 200_000, None),  # longer than a field of csv may be
        ("", None),
    ],
)  # fmt: skip
def test_the_first_gpu_is_read_from_what_nvidia_smi_prints(printed: str, gpu: GpuFacts | None) -> None:
    assert parse_nvidia_smi(printed) == gpu


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in program is a shell script")
@pytest.mark.parametrize(
    ("script", "gpu"),
    [
        ('echo "NVIDIA L4, 8.9, 580.65.06"', GpuFacts("NVIDIA L4", "sm89", "580.65.06")),
        ('echo "NVIDIA-SMI has failed" >&2; exit 9', GpuFacts()),
        ("printf '\\377\\376, 8.9, 580'", GpuFacts()),  # no UTF-8
    ],
)
def test_nvidia_smi_is_asked_where_it_is_on_the_path(
    script: str, gpu: GpuFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stand-in for absent hardware: whatever GPU is here does not count.
    monkeypatch.setattr("chip_deploy.export.machine._gpu_from_nvml", lambda: None)
    monkeypatch.setattr("chip_deploy.export.machine.find_gpu", lambda: "no CUDA driver")
    monkeypatch.setattr("chip_deploy.export.nvidia.find_gpu", lambda: "no CUDA driver")
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert read_gpu() == gpu


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in program is a shell script")
def test_name_and_capability_are_those_that_cuda_tells_and_the_driver_is_that_of_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A Jetson with JetPack 6: its nvidia-smi knows neither.
    monkeypatch.setattr("chip_deploy.export.machine._gpu_from_nvml", lambda: None)
    for module in ("machine", "nvidia"):
        monkeypatch.setattr(f"chip_deploy.export.{module}.find_gpu", lambda: Gpu("Orin", "sm87"))
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "[N/A], [N/A], 540.4.0"\n', "utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert read_gpu() == GpuFacts("Orin", "sm87", "540.4.0")


def test_two_gpus_of_one_board_are_two_machines_by_the_one_that_cuda_counts_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prints = set()
    for name in ("NVIDIA RTX A6000", "NVIDIA RTX A5000"):
        monkeypatch.setattr("chip_deploy.export.machine._gpu_from_nvml", lambda: GpuFacts("slot 0", "sm86", "580.65"))
        monkeypatch.setattr("chip_deploy.export.machine.find_gpu", lambda name=name: Gpu(name, "sm86"))
        prints.add(fingerprint(read_machine()))
    assert len(prints) == 2


NVML = """
class NVMLError(Exception): pass
def nvmlInit(): {init}
def nvmlShutdown(): {shutdown}
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetCudaComputeCapability(device): return (8, 7)
def nvmlDeviceGetName(device): return b"Orin"
def nvmlSystemGetDriverVersion(): return "540.4.0"
"""


@pytest.mark.parametrize(
    ("init", "shutdown", "printed"),
    [
        ("pass", "print('shut down')", "shut down\nGpuFacts(name='Orin', sm='sm87', driver='540.4.0')\n"),
        ("pass", "raise NVMLError", "GpuFacts(name='Orin', sm='sm87', driver='540.4.0')\n"),
        ("raise NVMLError", "print('shut down')", "None\n"),
    ],
)
def test_nvml_is_asked_where_it_can_be_imported(init: str, shutdown: str, printed: str, tmp_path: Path) -> None:
    # A stand-in for absent hardware, in a process of its own, where it leaves nothing behind.
    (tmp_path / "pynvml.py").write_text(NVML.format(init=init, shutdown=shutdown), "utf-8")
    code = "from chip_deploy.export.machine import _gpu_from_nvml; print(_gpu_from_nvml())"
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout == printed


@pytest.mark.parametrize(
    "change", [{"load": 7.5}, {"governor": "powersave"}, {"memory_gib": 1.0}, {"python": "3.10.1"}, {"kernel": "1"}]
)
def test_what_changes_by_itself_makes_no_other_machine(here: Machine, change: dict[str, object]) -> None:
    changed = here.model_copy(update=change)
    assert changed != here
    assert fingerprint(changed) == fingerprint(here)
    assert differences(here, changed) == ""


@pytest.mark.parametrize("field", OTHER)
def test_what_decides_speed_makes_another_machine(here: Machine, field: str) -> None:
    changed = here.model_copy(update={field: OTHER[field]})
    assert fingerprint(changed) != fingerprint(here)
    assert differences(here, changed).startswith(f"{field} ")


def test_a_fingerprint_is_the_same_in_another_process(here: Machine) -> None:
    code = "from chip_deploy.export.machine import *; print(fingerprint(read_machine()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(here)


def test_differences_are_told_as_a_phrase() -> None:
    there = Machine(
        system="Linux x86_64", cpu="AMD EPYC", cores=2, isa=["avx2"], memory_gib=8, governor=None, load=None, gpu=None,
        sm=None, driver=None, python="3.11.7",
    )  # fmt: skip
    here = there.model_copy(update={"cpu": "Xeon", "gpu": "NVIDIA L4"})
    assert differences(there, here) == "cpu 'AMD EPYC' there, 'Xeon' here; gpu none there, 'NVIDIA L4' here"
