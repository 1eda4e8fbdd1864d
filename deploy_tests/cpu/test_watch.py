"""The machine before and after: counters laid out as Linux lays them out, doubts on states made by hand."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from chip_deploy.export import watch
from chip_deploy.export.watch import (
    SMI_FIELDS,
    GpuState,
    MachineState,
    MachineWatch,
    Watch,
    busy_seconds,
    clock_reasons,
    judge,
    parse_gpu_state,
    power_mode,
    quota_seconds,
    read_gpu_state,
    throttle_count,
)

STEADY = MachineState(cpu="a CPU", governor="performance", load=0.5, others_share=0.0, waited_share=0.0, throttled=3)
H200 = GpuState(name="NVIDIA H200", sm="sm90", sm_mhz=1980, power_limit_w=700, temperature_c=41, reasons=["idle"])


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubts about cores are judged for a machine with two of them."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def judged(*, seconds: float = 10.0, before: dict[str, Any] | None = None, **after: Any) -> MachineWatch:
    return judge(STEADY.model_copy(update=before or {}), STEADY.model_copy(update=after), seconds=seconds)


def test_a_steady_machine_gives_no_doubt_and_needs_no_advice() -> None:
    found = judged(load=0.6)
    assert (found.doubt, found.advice, found.seconds) == ("", [], 10.0)


@pytest.mark.parametrize(
    ("after", "doubt"),
    [
        ({"others_share": 0.4}, "other processes used 0.8 of 2 cores meanwhile"),
        ({"waited_share": 0.2}, "the laps waited 20% of the time for a core that other processes had"),
        ({"load": 2.5}, "other processes kept the load up (0.5 before, 2.5 after)"),
        ({"throttled": 5}, "the CPU was slowed down by heat 2 times"),
        ({"governor": "powersave"}, "the governor of the CPU's clock changed from performance to powersave"),
        ({"quota_s": 0.4}, "the container's CPU quota held the laps back for 0.4 s"),
        ({"power_mode": "15W"}, "the power mode changed from None to 15W"),
        ({"gpu": H200.model_copy(update={"reasons": ["power cap"]})}, "the GPU's clocks were held down (power cap)"),
    ],
)  # fmt: skip
def test_what_disturbs_laps_is_a_doubt(after: dict[str, Any], doubt: str) -> None:
    assert judged(**after).doubt == doubt


@pytest.mark.parametrize("after", [{"others_share": 0.05}, {"waited_share": 0.01}, {"gpu": H200}, {"load": 0.9}])
def test_what_any_machine_does_is_none(after: dict[str, Any]) -> None:
    assert judged(**after).doubt == ""


def test_a_large_machine_bears_more_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # One core in use: half of two cores, a hundredth of a hundred.
    assert judged(others_share=0.5).doubt
    monkeypatch.setattr(os, "cpu_count", lambda: 100)
    assert not judged(others_share=0.01).doubt


def test_the_load_of_the_measurement_itself_is_no_doubt() -> None:
    # After ten minutes of one busy thread the load is 1, whatever it was; without it, 1.6 would be somebody else.
    assert judged(seconds=600, load=1.05, before={"load": 0.0}).doubt == ""
    assert "load" in judged(seconds=600, load=1.6, before={"load": 0.0}).doubt


def test_a_load_that_fades_is_no_doubt() -> None:
    assert judged(load=6.0, before={"load": 8.0}).doubt == ""


def test_doubts_add_up_to_one_phrase_and_tell_what_to_do() -> None:
    found = judged(others_share=0.4, throttled=4, before={"governor": "powersave"}, governor="powersave")
    assert found.doubt.count(" and ") == 1
    assert found.advice == [
        "Stop other work on this machine, and measure again.",
        "The CPU's governor is powersave; `sudo cpupower frequency-set -g performance` steadies it.",
    ]


def test_a_machine_that_slept_meanwhile_is_a_doubt() -> None:
    assert judge(STEADY, STEADY, seconds=5, slept_s=3.0).doubt == "the machine was asleep for 3.0 s"


def test_a_gpu_that_is_slowed_down_only_in_the_midst_of_the_laps_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter([["idle"], ["power cap", "idle"], ["idle"], ["idle"]])
    monkeypatch.setattr(watch, "read_gpu_state", lambda: H200.model_copy(update={"reasons": next(states)}))
    begun = Watch(gpu=True)
    begun.look()
    begun.look()
    found = begun.stop()
    assert "the GPU's clocks were held down (power cap)" in found.doubt
    assert (found.before.gpu, found.after.gpu.reasons) == (H200, ["idle", "power cap"])


def test_what_a_gpu_was_held_down_by_while_nobody_looked_is_a_doubt() -> None:
    begun = H200.model_copy(update={"power_held_s": 3.0, "thermal_held_s": 0.5})
    before = {"gpu": begun}
    a_moment = begun.model_copy(update={"power_held_s": 3.001})
    assert judged(before=before, gpu=begun).doubt == judged(before=before, gpu=a_moment).doubt == ""
    for name, doubt in (("power_held_s", "by its power limit for 0.25 s"), ("thermal_held_s", "by heat for 2.8 s")):
        found = judged(before=before, gpu=begun.model_copy(update={name: 3.25}))
        assert found.doubt == f"the GPU's clocks were held down ({doubt})"
        assert found.advice == ["Cool the GPU, or lock its clocks lower with `sudo nvidia-smi -lgc MHZ`."]


@pytest.mark.parametrize("first", [None, 1.0])
def test_a_counter_that_a_gpu_has_not_at_both_looks_says_nothing(first: float | None) -> None:
    before = {"gpu": H200.model_copy(update={"power_held_s": first})}
    assert (
        judged(before=before, gpu=H200.model_copy(update={"power_held_s": 5.0 if first is None else None})).doubt == ""
    )


def test_advice_for_a_gpu_names_its_clock_and_for_a_jetson_its_own_tool() -> None:
    assert judged(gpu=H200).advice == ["`sudo nvidia-smi -lgc 1980` would lock the GPU's clock where it was."]
    jetson = judged(before={"power_mode": "15W"}, power_mode="15W", gpu=H200).advice
    assert jetson == ["The power mode is 15W; `sudo jetson_clocks` locks its clocks."]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to a core")
def test_the_cores_that_the_process_may_use_are_recorded() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {max(allowed)})
        assert Watch().before.affinity == [max(allowed)]
    finally:
        os.sched_setaffinity(0, allowed)


def test_busy_time_is_all_but_idle_and_waiting(tmp_path: Path) -> None:
    # user nice system idle iowait irq softirq steal guest guest_nice, in ticks; a guest's time is in user's already.
    (tmp_path / "stat").write_text("cpu  100 20 30 9999 999 4 5 6 50 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n", "utf-8")
    assert busy_seconds(tmp_path) == pytest.approx(165 / os.sysconf("SC_CLK_TCK"))
    assert busy_seconds(tmp_path / "nowhere") is None


def test_throttle_counters_add_up(tmp_path: Path) -> None:
    assert throttle_count(tmp_path) is None
    for core, (name, count) in enumerate([("core", 2), ("package", 5), ("core", 0)]):
        folder = tmp_path / "devices" / "system" / "cpu" / f"cpu{core}" / "thermal_throttle"
        folder.mkdir(parents=True)
        (folder / f"{name}_throttle_count").write_text(f"{count}\n", "utf-8")
        (folder / f"{name}_throttle_max_time_ms").write_text("999\n", "utf-8")
    assert throttle_count(tmp_path) == 7


def test_time_held_back_by_a_quota_is_read_from_either_kind_of_control_group(tmp_path: Path) -> None:
    assert quota_seconds(tmp_path) is None
    group = tmp_path / "fs" / "cgroup"
    (group / "cpu").mkdir(parents=True)
    (group / "cpu" / "cpu.stat").write_text("nr_periods 9\nnr_throttled 2\nthrottled_time 1500000000\n", "utf-8")
    assert quota_seconds(tmp_path) == 1.5
    (group / "cpu.stat").write_text("usage_usec 100\nthrottled_usec 250000\n", "utf-8")
    assert quota_seconds(tmp_path) == 0.25


def test_clock_reasons_are_told_in_words() -> None:
    # The bits of NVML's nvmlClocksEventReason constants.
    assert clock_reasons(0) == []
    assert clock_reasons(0x1) == ["idle"]
    assert clock_reasons(0x8 | 0x20 | 0x80) == ["hardware slowdown", "thermal slowdown (software)", "power brake"]


SMI_LINE = "NVIDIA L4, 8.9, 2040, 6251, 72.00, 31.55, 48, 0x0000000000000004"


def test_a_gpu_is_read_from_what_nvidia_smi_prints() -> None:
    assert parse_gpu_state(f"{SMI_LINE}\nanother\n") == GpuState(
        name="NVIDIA L4", sm="sm89", sm_mhz=2040, memory_mhz=6251, power_limit_w=72, power_w=31.55, temperature_c=48,
        reasons=["power cap"],
    )  # fmt: skip
    assert parse_gpu_state("Orin (nvgpu), [N/A], [N/A], [N/A], [N/A], [N/A], [N/A], [N/A]") == GpuState(
        name="Orin (nvgpu)"
    )
    for nothing in ("", "No devices were found\n", "9" * 200_000):  # the last one: more than csv takes as a field
        assert parse_gpu_state(nothing) is None


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    path.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in programs are shell scripts")
def test_nvidia_smi_and_nvpmodel_are_asked_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stand-ins for absent hardware: whatever GPU is here does not count.
    monkeypatch.setattr("chip_deploy.export.watch._state_from_nvml", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (read_gpu_state(), power_mode()) == (None, None)
    program(tmp_path, "nvidia-smi", f'test "$1" = "--query-gpu={",".join(SMI_FIELDS)}" && echo "{SMI_LINE}"')
    program(tmp_path, "nvpmodel", 'echo "NV Power Mode: MAXN"; echo 0')
    state = read_gpu_state()
    assert state is not None
    assert (state.sm_mhz, power_mode()) == (2040, "MAXN")
    for broken in ("exit 9", r"printf '\377'"):  # a failure, and what is not text
        for name in ("nvidia-smi", "nvpmodel"):
            program(tmp_path, name, broken)
        assert (read_gpu_state(), power_mode()) == (None, None)


NVML = """
class NVMLError(Exception): pass
class Violation: violationTime = 1_500_000_000
NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
NVML_PERF_POLICY_POWER, NVML_PERF_POLICY_THERMAL = 0, 1
def nvmlInit(): pass
def nvmlShutdown(): print("shut down")
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetCudaComputeCapability(device): return (9, 0)
def nvmlDeviceGetName(device): return b"NVIDIA H200"
def nvmlDeviceGetClockInfo(device, which): return {1: 1980, 2: 3201}[which]
def nvmlDeviceGetEnforcedPowerLimit(device): return 700000
def nvmlDeviceGetPowerUsage(device): raise NVMLError
def nvmlDeviceGetTemperature(device, sensor): return 41
def nvmlDeviceGetCurrentClocksThrottleReasons(device): return 0x44
def nvmlDeviceGetViolationStatus(device, policy):
    if policy == 1: raise NVMLError
    return Violation
"""


def test_nvml_is_asked_where_it_can_be_imported_and_may_not_tell_everything(tmp_path: Path) -> None:
    # A stand-in for absent hardware, in a process of its own, where it leaves nothing behind.
    (tmp_path / "pynvml.py").write_text(NVML, "utf-8")
    code = "from chip_deploy.export.watch import read_gpu_state; print(read_gpu_state().model_dump_json())"
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    shut_down, told = done.stdout.splitlines()
    assert shut_down == "shut down"
    assert GpuState.model_validate_json(told) == GpuState(
        name="NVIDIA H200", sm="sm90", sm_mhz=1980, memory_mhz=3201, power_limit_w=700, temperature_c=41,
        reasons=["power cap", "thermal slowdown (hardware)"], power_held_s=1.5,
    )  # fmt: skip


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells what all cores did")
def test_what_this_process_does_is_not_counted_as_others() -> None:
    def cpu_s() -> tuple[float, float, float]:
        fields = Path("/proc/stat").read_text("utf-8").split("\n")[0].split()[1:]
        busy = sum(int(field) for place, field in enumerate(fields[:8]) if place not in (3, 4))
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()

    watch, begun = Watch(), cpu_s()
    while cpu_s()[0] < begun[0] + 1.5:
        pass
    found = watch.stop().after.others_share
    passed_s, busy_s, own_s = (now - then for now, then in zip(cpu_s(), begun, strict=True))
    assert found is not None
    # Our own core would be half of the two if it had a core to itself; a twentieth is for the kernel's ticks.
    assert found == pytest.approx(max(busy_s - own_s, 0) / passed_s / 2, abs=0.05)
    assert found < busy_s / passed_s / 2 - 0.1


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells what all cores did")
def test_a_real_process_beside_us_is_counted() -> None:
    watch = Watch()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(2.0)
        other.kill()
    found = watch.stop()
    # Somebody used at least a good part of a core of the two, whoever else was there.
    assert found.after.others_share is not None
    assert found.after.others_share > 0.15
    assert "other processes used" in found.doubt
    assert MachineWatch.model_validate_json(found.model_dump_json()) == found
