"""The doctor: every target with reason and remedy, and nothing that is broken ends it."""

import importlib.metadata
import json
import subprocess
from collections.abc import Callable

import pytest

from chip_deploy.export import nvidia, target_trt
from chip_deploy.export.errors import TargetUnavailable
from chip_deploy.export.nvidia import Clocks
from chip_deploy.export.target import CAPABILITIES, PRECISIONS, Target, TargetSpec
from chip_deploy.export.target_trt import Gpu
from chip_deploy.export.targets import make_target
from chip_deploy.pipeline import doctor
from chip_deploy.pipeline.cli import EXTRAS, main
from chip_deploy.pipeline.doctor import (
    Diagnosis,
    diagnose,
    machine_table,
    package_table,
    reason_and_remedy,
    target_table,
)
from chip_deploy.pipeline.tables import plain_table

PROBES = {
    "the machine": (doctor, "read_machine"),
    "the driver": (nvidia, "driver_cuda"),
    "the libraries": (nvidia, "library_version"),
    "JetPack": (nvidia, "jetpack"),
    "L4T": (nvidia, "l4t"),
    "the power mode": (doctor, "power_mode"),
    "the clocks": (nvidia, "read_clocks"),
    "the versions": (importlib.metadata, "version"),
    "the targets": (doctor, "make_target"),
    "the GPU": (target_trt, "find_gpu"),
}


class Foreign(Exception):
    """What derives straight from Exception, as NVML's errors and those of onnxruntime's bindings do."""


FAULTS = [
    Foreign("Driver/library version mismatch"),
    ImportError("libcudart.so.13: cannot open shared object file. Reinstall."),
    OSError(5, "Input/output error"),
    RuntimeError("module compiled against ABI version 0x1000009"),
    AttributeError("module 'onnxruntime' has no attribute 'get_available_providers'"),
    SystemError("initialization of _pybind11 failed"),
    ValueError(""),
    subprocess.TimeoutExpired("nvidia-smi", 10),
    KeyError("cuda"),
    TargetUnavailable("the Python package 'tensorrt' does not load (x). Install it again."),
]


def rendered(table_of: Callable[[Diagnosis], object], diagnosis: Diagnosis, capsys: pytest.CaptureFixture[str]) -> str:
    from rich.console import Console

    Console().print(table_of(diagnosis))
    return " ".join(capsys.readouterr().out.split())


def test_json_is_the_diagnosis_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "chip-deploy.doctor/1"
    assert Diagnosis.model_validate(told).targets
    assert {row["package"] for row in told["packages"]} >= {"torch", "onnxruntime-gpu", "tensorrt"}


def test_every_target_is_told_with_what_it_can_do_or_why_not() -> None:
    rows = {row.target: row for row in diagnose(EXTRAS).targets}
    ways = [f"torch:{way}" for way in CAPABILITIES["torch"]]
    assert list(rows) == ["ort-cpu", "ort-cuda", *ways, "trt", "trt-rtx"]
    for row in rows.values():
        assert set(row.precisions) <= set(PRECISIONS)
        assert row.precisions[0] == "fp32"
        assert bool(row.reason) == (not row.runs)
        assert bool(row.remedy) == (not row.runs)
        assert row.builds or not row.runs
    assert rows["ort-cpu"].runs


def test_reason_and_remedy_are_those_of_the_target() -> None:
    rows = {row.target: row for row in diagnose({}).targets}
    for spec in doctor._specs():
        if said := make_target(spec).unusable():
            assert f"{rows[str(spec)].reason}. {rows[str(spec)].remedy}" == said


@pytest.mark.parametrize(
    ("sentences", "parts"),
    [
        ("no CUDA driver. Use --target ort-cpu here.", ("no CUDA driver", "Use --target ort-cpu here.")),
        (
            "it breaks (no a.so. Or is it?). Do this. Then that.",
            ("it breaks (no a.so. Or is it?)", "Do this. Then that."),
        ),
        ("no way out.", ("no way out", "")),
        ("", ("", "")),
    ],
)
def test_the_remedy_begins_behind_the_first_full_stop_outside_brackets(sentences: str, parts: tuple[str, str]) -> None:
    assert reason_and_remedy(sentences) == parts


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("probe", PROBES)
def test_a_broken_probe_ends_nothing(
    probe: str, fault: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise fault

    module, name = PROBES[probe]
    monkeypatch.setattr(module, name, fail)
    assert main(["doctor", "--json"]) == 0
    assert Diagnosis.model_validate_json(capsys.readouterr().out).targets


def test_everything_broken_at_once_still_makes_the_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("broken")

    for module, name in PROBES.values():
        monkeypatch.setattr(module, name, fail)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "its runtime is broken (RuntimeError: broken). Install its package again." in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80


def test_an_interruption_is_none_of_the_breakages() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        doctor.told(interrupted)


def test_a_broken_runtime_is_told_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, spec: TargetSpec) -> None:
            self.spec = spec

        def refuses(self, precision: str) -> None:
            del precision

        def unusable(self) -> str:
            raise SystemError("bad  ABI\nof numpy. It is too new")

    monkeypatch.setattr(doctor, "make_target", Broken)
    row = diagnose({}).targets[0]
    assert (row.builds, row.runs) == (False, False)
    assert row.reason == "its runtime is broken (SystemError: bad ABI of numpy. It is too new)"
    assert row.remedy == "Install its package again."


def test_a_target_that_builds_without_the_gpu_that_runs_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx has no wheel for this platform")
    monkeypatch.setattr(target_trt, "find_gpu", lambda: "no CUDA driver")
    row = next(row for row in diagnose({}).targets if row.target == "trt-rtx")
    assert (row.builds, row.runs) == (True, False)
    assert row.reason == "measures on a GPU only: no CUDA driver"


def test_with_a_gpu_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx has no wheel for this platform")
    monkeypatch.setattr(target_trt, "find_gpu", lambda: Gpu("NVIDIA L4", "sm89"))
    monkeypatch.setattr(target_trt, "no_cudart", lambda: None)
    diagnosis = diagnose({})
    assert next(row for row in diagnosis.targets if row.target == "trt-rtx").runs
    assert "trt-rtx builds and measures here (fp32" in rendered(target_table, diagnosis, capsys)


def test_what_cannot_run_for_want_of_cuda_python_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A Jetson: JetPack has its TensorRT, and pip's would stand before it.
    monkeypatch.setattr(target_trt, "find_gpu", lambda: Gpu("Orin", "sm87"))
    monkeypatch.setattr(target_trt, "driver_cuda", lambda: (12, 6))
    monkeypatch.setattr(target_trt, "_installed", lambda name: name == "tensorrt")
    monkeypatch.setattr(target_trt, "_import", lambda _: None)
    diagnosis = diagnose({"cuda": "trt"})
    row = next(row for row in diagnosis.targets if row.target == "trt")
    assert (row.builds, row.runs) == (True, False)
    assert row.reason == "cuda-python is not installed, and TensorRT engines run through it"
    assert row.remedy == "Install it with `pip install 'cuda-python<12.7'`."
    found = diagnosis.nvidia.model_copy(update={"tensorrt": "10.3.0.30-1+cuda12.5"})
    packages = [row.model_copy(update={"version": None}) for row in diagnosis.packages]
    shown = rendered(package_table, diagnosis.model_copy(update={"nvidia": found, "packages": packages}), capsys)
    assert "`pip install cuda-python`" in shown
    assert "chip-deploy[trt]" not in shown


@pytest.mark.parametrize(
    ("gpu", "reason", "remedy"),
    [
        (Gpu("NVIDIA H200", "sm90"), "this GPU has SM 9.0 (NVIDIA H200)", "Use --target trt."),
        (Gpu("Orin", "sm87"), "this GPU has SM 8.7 (Orin)", "Use --target trt."),
        (Gpu("Tesla T4", "sm75"), "this GPU has SM 7.5 (Tesla T4)", "Use --target trt-rtx:sm75."),
    ],
)
def test_a_gpu_that_the_portable_engine_is_not_for_measures_nothing(
    gpu: Gpu, reason: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx has no wheel for this platform")
    monkeypatch.setattr(target_trt, "find_gpu", lambda: gpu)
    monkeypatch.setattr(target_trt, "load_cudart", lambda: None)
    row = next(row for row in diagnose({}).targets if row.target == "trt-rtx")
    assert (row.builds, row.runs, row.remedy) == (True, False, remedy)
    assert row.reason == f"its engines are for SM 8.0, 8.6, 8.9, 12.0+, and {reason}"


def test_without_cuda_python_nothing_is_measured_by_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_trt, "find_gpu", lambda: Gpu("NVIDIA L4", "sm89"))
    monkeypatch.setattr(target_trt, "_installed", lambda name: name.startswith("tensorrt"))
    monkeypatch.setattr(target_trt, "driver_cuda", lambda: (13, 0))
    monkeypatch.setattr(target_trt, "_import", lambda _: None)
    for row in diagnose({}).targets:
        if row.target in ("trt", "trt-rtx"):
            assert (row.builds, row.runs, row.remedy) == (
                True,
                False,
                "Install it with `pip install 'cuda-python<13.1'`.",
            )
            assert row.reason.startswith("cuda-python is not installed")


@pytest.mark.parametrize("gpu", [Gpu("NVIDIA L4", "sm89"), "no CUDA driver"])
def test_a_tensorrt_that_does_not_load_builds_nothing(gpu: Gpu | str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise TargetUnavailable(
            f"the Python package '{name}' does not load (libnvinfer.so.10: gone). Install it again."
        )

    monkeypatch.setattr(target_trt, "find_gpu", lambda: gpu)
    monkeypatch.setattr(target_trt, "_installed", lambda _: True)
    monkeypatch.setattr(target_trt, "_import", broken)
    row = next(row for row in diagnose({}).targets if row.target == "trt-rtx")
    assert (row.builds, row.runs, row.remedy) == (False, False, "Install it again.")
    assert row.reason == "the Python package 'tensorrt_rtx' does not load (libnvinfer.so.10: gone)"


def test_a_jetson_is_shown_with_its_system_and_its_clocks(capsys: pytest.CaptureFixture[str]) -> None:
    diagnosis = diagnose({})
    found = diagnosis.nvidia.model_copy(
        update={
            "jetpack": "6.2+b77",
            "l4t": "36.4.3",
            "power_mode": "MAXN",
            "driver_cuda": "12.6",
            "clocks": Clocks(sm_mhz=1300.5, sm_max_mhz=1300.5, locked=True),
        }
    )
    shown = rendered(machine_table, diagnosis.model_copy(update={"nvidia": found}), capsys)
    for part in ("JetPack 6.2+b77", "L4T 36.4.3", "power mode MAXN", "SM 1300 of 1300 MHz, locked", "CUDA 12.6"):
        assert part in shown, part


@pytest.mark.parametrize(
    ("clocks", "text"),
    [
        (
            Clocks(sm_mhz=210, sm_max_mhz=2040, memory_mhz=405),
            "SM 210 of 2040 MHz, memory 405 MHz, locked or not: the driver does not tell",
        ),
        (Clocks(sm_mhz=306, sm_max_mhz=1300, locked=False), "SM 306 of 1300 MHz, not locked"),
        (None, None),
    ],
)
def test_clocks_are_told_as_far_as_they_are_known(clocks: Clocks | None, text: str | None) -> None:
    assert doctor._clocks(clocks) == text


def test_what_is_not_known_is_left_out_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    diagnosis = diagnose({}).model_copy(update={"machine": None})
    shown = rendered(machine_table, diagnosis, capsys)
    assert "GPU none that NVIDIA's driver names" in shown
    assert "memory" not in shown
    assert plain_table("x").row_count == 0


def test_the_doctor_asks_every_target_there_is() -> None:
    asked = doctor._specs()
    assert {spec.name for spec in asked} == set(CAPABILITIES)
    assert all(isinstance(doctor.make_target(spec), Target) for spec in asked)
