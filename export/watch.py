"""The machine before and after a measurement: who else used it, what slowed it down, and whether to trust the laps."""

from __future__ import annotations

import contextlib
import csv
import importlib
import math
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from .machine import PROC, SYSFS, cpu_name, governor, load
from .nvidia import ask_smi, nvml_device

PROGRAM_SECONDS = 10
# So long the CPU is looked at before anything runs, to see who uses it already.
LOOK_SECONDS = 0.2
# Others may use so many cores, or this part of all of them, whichever is more: the interleaving and the medians bear
# it. Beyond it, caches, memory and clock are shared with somebody.
OTHERS_CORES = 0.2
OTHERS_SHARE = 0.05
# The measuring thread may wait so much of the time for a core that it could have used at once.
WAITED_SHARE = 0.03
# A GPU may be held down for so much of the time, as it counts: a moment of that moves no median.
HELD_SHARE = 0.01
# The load may exceed what the measurement itself explains by so many processes, or by this part of the cores.
LOAD_MOVED = 0.5
LOAD_MOVED_SHARE = 0.1
# The kernel's load is an average that forgets with this time constant.
LOAD_SECONDS = 60.0
SLEPT_SECONDS = 0.05
# NVML's bits for why the clocks of a GPU are not higher; those that a steady measurement must not see come first.
SLOWDOWNS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown (software)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake",
}
REASONS = {0x01: "idle", 0x02: "application clocks", 0x10: "sync boost", 0x100: "display clocks"}
SMI_FIELDS = (
    *("name", "compute_cap", "clocks.sm", "clocks.mem", "power.limit", "power.draw"),
    *("temperature.gpu", "clocks_throttle_reasons.active"),
)


class GpuState(BaseModel):
    """The GPU that CUDA counts first at one moment; what it does not tell is None."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    sm: str | None = None
    sm_mhz: float | None = None
    memory_mhz: float | None = None
    power_limit_w: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    reasons: list[str] = []
    """Why the clocks are not higher: `idle`, `power cap`, `thermal slowdown (hardware)`, ...; after a measurement also
    what held them down when it was looked at. It is looked at between laps, when the GPU has come to rest: what a
    slowdown leaves behind in the times below is surer."""
    power_held_s: float | None = None
    """How long its power limit has held the clocks down so far; only some boards count it, and only NVML tells."""
    thermal_held_s: float | None = None
    """The same of its temperature."""


class MachineState(BaseModel):
    """A machine at one moment; what it does not tell is None."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    cpu: str
    affinity: list[int] | None = None
    """The cores that the measuring thread may use, by number."""
    governor: str | None = None
    load: float | None = None
    """Processes that wanted a core during the last minute, on average."""
    others_share: float | None = None
    """The part of all cores that other processes, and other guests of the host, used: a moment before, or since."""
    waited_share: float | None = None
    """The part of the time that the measuring thread was ready and no core was free for it."""
    throttled: int | None = None
    """How often a core or package was slowed down by its temperature, since the machine was started."""
    quota_s: float | None = None
    """How long this container was held back because its quota of CPU time was used up."""
    gpu: GpuState | None = None
    power_mode: str | None = None
    """Of a Jetson: `MAXN`, `15W`, ..."""


class MachineWatch(BaseModel):
    """The machine around a measurement, and what speaks against the laps."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    before: MachineState
    after: MachineState
    seconds: float
    """From one to the other."""
    doubt: str = ""
    """Why the machine was not steady, as a phrase; empty when it was."""
    advice: list[str] = []
    """What would make the next measurement steadier, one sentence each; nothing is ever changed."""


class Watch:
    """A look at the machine that has begun; `stop` ends it."""

    def __init__(self, *, gpu: bool = False, proc: Path = PROC, sysfs: Path = SYSFS) -> None:
        self._gpu, self._proc, self._sysfs = gpu, proc, sysfs
        looked = _Counters(proc)
        time.sleep(LOOK_SECONDS)
        self.before = read_state(looked, gpu=gpu, proc=proc, sysfs=sysfs)
        self._slowed: set[str] = set()
        self._begun = _Counters(proc)

    def look(self) -> None:
        """Remember what holds the GPU's clocks down at this moment, right after laps: none runs meanwhile."""
        gpu = read_gpu_state() if self._gpu else None
        self._slowed |= {reason for reason in (gpu.reasons if gpu else []) if reason in SLOWDOWNS.values()}

    def stop(self, *, threads: int = 1) -> MachineWatch:
        """The machine now, beside what it was; `threads` is how many the measurement itself kept busy."""
        after = read_state(self._begun, gpu=self._gpu, proc=self._proc, sysfs=self._sysfs)
        if after.gpu is not None:
            reasons = sorted({*after.gpu.reasons, *self._slowed})
            after = after.model_copy(update={"gpu": after.gpu.model_copy(update={"reasons": reasons})})
        now = _Counters(self._proc)
        return judge(
            self.before,
            after,
            seconds=now.time_s - self._begun.time_s,
            slept_s=now.slept_s - self._begun.slept_s,
            threads=threads,
        )


class _Counters:
    """What only ever grows: the time, CPU time of all and of this process, time asleep."""

    def __init__(self, proc: Path) -> None:
        self.time_s = time.monotonic()
        self.busy_s = busy_seconds(proc)
        self.own_s = time.process_time()
        self.waited_s = _waited_seconds(proc)
        self.slept_s = time.clock_gettime(time.CLOCK_BOOTTIME) - self.time_s if hasattr(time, "CLOCK_BOOTTIME") else 0.0

    def others_share(self, since: _Counters) -> float | None:
        """The part of all cores that others used since then."""
        passed_s = self.time_s - since.time_s
        if self.busy_s is None or since.busy_s is None or passed_s <= 0:
            return None
        others_s = (self.busy_s - since.busy_s) - (self.own_s - since.own_s)
        return round(min(max(others_s / passed_s / _cores(), 0.0), 1.0), 4)

    def waited_share(self, since: _Counters) -> float | None:
        """The part of the time since then that this thread waited for a core."""
        passed_s = self.time_s - since.time_s
        if self.waited_s is None or since.waited_s is None or passed_s <= 0:
            return None
        return round(min(max((self.waited_s - since.waited_s) / passed_s, 0.0), 1.0), 4)


def read_state(since: _Counters, *, gpu: bool = False, proc: Path = PROC, sysfs: Path = SYSFS) -> MachineState:
    """The machine now; shares are those since the counters given, and the GPU is asked only where it is wanted."""
    now = _Counters(proc)
    return MachineState(
        cpu=cpu_name(proc),
        affinity=sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        governor=governor(sysfs),
        load=load(),
        others_share=now.others_share(since),
        waited_share=now.waited_share(since),
        throttled=throttle_count(sysfs),
        quota_s=quota_seconds(sysfs),
        gpu=read_gpu_state() if gpu else None,
        power_mode=power_mode(),
    )


def judge(
    before: MachineState, after: MachineState, *, seconds: float, threads: int = 1, slept_s: float = 0.0
) -> MachineWatch:
    """Both states with what speaks against laps run between them, and what would help."""
    slow = _gpu_slowdowns(before.gpu, after.gpu, most_s=HELD_SHARE * seconds)
    doubts = [*_cpu_doubts(before, after, seconds, threads), *_slowdowns(before, after)]
    if slow:
        doubts.append(f"the GPU's clocks were held down ({', '.join(slow)})")
    if slept_s > SLEPT_SECONDS:
        doubts.append(f"the machine was asleep for {slept_s:.1f} s")
    return MachineWatch(
        before=before,
        after=after,
        seconds=round(seconds, 3),
        doubt=" and ".join(doubts),
        advice=_advice(after, busy=any("processes" in doubt for doubt in doubts), slow=bool(slow)),
    )


def busy_seconds(proc: Path = PROC) -> float | None:
    """CPU time that all cores together spent on anything, in s; None where the system does not tell.

    Time that a host took away from this guest counts, because somebody else had it.
    """
    found = re.search(r"^cpu +(.*)$", _text(proc / "stat"), re.MULTILINE)
    ticks = [int(field) for field in found[1].split()] if found else []
    if len(ticks) < 8 or not hasattr(os, "sysconf"):
        return None
    user, nice, system, _, _, irq, softirq, steal = ticks[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def throttle_count(sysfs: Path = SYSFS) -> int | None:
    """How often cores and packages were slowed down by heat so far; None where the system does not count it."""
    files = list((sysfs / "devices" / "system" / "cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count"))
    counts = [int(text) for text in (_text(file).strip() for file in files) if text.isdigit()]
    return sum(counts) if counts else None


def quota_seconds(sysfs: Path = SYSFS) -> float | None:
    """How long this control group was held back by its CPU quota so far, in s; None where nothing counts it."""
    root = sysfs / "fs" / "cgroup"
    for path, pattern, unit in (
        (root / "cpu.stat", r"^throttled_usec (\d+)$", 1e6),
        (root / "cpu" / "cpu.stat", r"^throttled_time (\d+)$", 1e9),
    ):
        if found := re.search(pattern, _text(path), re.MULTILINE):
            return int(found[1]) / unit
    return None


def power_mode() -> str | None:
    """A Jetson's power mode, as nvpmodel tells it; None where there is no nvpmodel."""
    printed = _printed("nvpmodel", "-q")
    found = re.search(r"^NV Power Mode:\s*(\S.*)$", printed, re.MULTILINE)
    return found[1].strip() if found else None


def read_gpu_state() -> GpuState | None:
    """The GPU that CUDA counts first, now: from nvidia-ml-py where it can be imported, else nvidia-smi; None without.

    Of a part of a GPU (MIG) it is the whole, which has the clocks.
    """
    return _state_from_nvml() or parse_gpu_state(ask_smi(*SMI_FIELDS))


def parse_gpu_state(text: str) -> GpuState | None:
    """The first GPU of nvidia-smi's answer about SMI_FIELDS in csv,noheader,nounits; a field it has not is None.

    None for any other answer.
    """
    try:
        row = [field.strip() for field in next(csv.reader(text.splitlines()), [])]
    except csv.Error:
        return None
    if len(row) != len(SMI_FIELDS):
        return None
    name, capability, *numbers, bits = row
    sm_mhz, memory_mhz, power_limit_w, power_w, temperature_c = map(_number, numbers)
    return GpuState(
        name=name,
        sm=f"sm{capability.replace('.', '')}" if re.fullmatch(r"\d+\.\d", capability) else None,
        sm_mhz=sm_mhz,
        memory_mhz=memory_mhz,
        power_limit_w=power_limit_w,
        power_w=power_w,
        temperature_c=temperature_c,
        reasons=clock_reasons(int(bits, 16)) if re.fullmatch(r"0x[0-9a-fA-F]+", bits) else [],
    )


def clock_reasons(bits: int) -> list[str]:
    """NVML's bit mask of why the clocks are not higher, in words.

    >>> clock_reasons(0x44)
    ['power cap', 'thermal slowdown (hardware)']
    """
    return [name for bit, name in {**SLOWDOWNS, **REASONS}.items() if bits & bit]


def _state_from_nvml() -> GpuState | None:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        return _nvml_state(nvml, nvml_device(nvml))
    except nvml.NVMLError:
        return None
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _nvml_state(nvml: Any, device: Any) -> GpuState:
    """Each number is asked for by itself, because boards differ in what they tell."""

    def told(function: str, *arguments: int, scale: float = 1.0) -> float | None:
        try:
            return round(getattr(nvml, function)(device, *arguments) * scale, 3)
        except nvml.NVMLError:
            return None

    def held_s(policy: int) -> float | None:
        try:
            return round(nvml.nvmlDeviceGetViolationStatus(device, policy).violationTime * 1e-9, 6)
        except nvml.NVMLError:
            return None

    # Renamed in 2023; older versions have the second name only.
    names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
    bits = told(next(name for name in names if hasattr(nvml, name)))
    name, (major, minor) = nvml.nvmlDeviceGetName(device), nvml.nvmlDeviceGetCudaComputeCapability(device)
    return GpuState(
        name=name.decode() if isinstance(name, bytes) else name,
        sm=f"sm{major}{minor}",
        sm_mhz=told("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        memory_mhz=told("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        power_limit_w=told("nvmlDeviceGetEnforcedPowerLimit", scale=1e-3),
        power_w=told("nvmlDeviceGetPowerUsage", scale=1e-3),
        temperature_c=told("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        reasons=[] if bits is None else clock_reasons(int(bits)),
        power_held_s=held_s(nvml.NVML_PERF_POLICY_POWER),
        thermal_held_s=held_s(nvml.NVML_PERF_POLICY_THERMAL),
    )


def _cpu_doubts(before: MachineState, after: MachineState, seconds: float, threads: int) -> list[str]:
    """What other processes did to the CPU meanwhile."""
    doubts = []
    cores = _cores()
    others = (after.others_share or 0.0) * cores
    if others > max(OTHERS_CORES, OTHERS_SHARE * cores):
        doubts.append(f"other processes used {others:.2g} of {cores} cores meanwhile")
    if (after.waited_share or 0.0) > WAITED_SHARE:
        doubts.append(f"the laps waited {after.waited_share:.0%} of the time for a core that other processes had")
    # Downwards it moves when the work before the measurement fades, which is no news.
    if before.load is not None and after.load is not None:
        kept = math.exp(-seconds / LOAD_SECONDS)
        excess = after.load - (before.load * kept + threads * (1 - kept))
        if excess > max(LOAD_MOVED, LOAD_MOVED_SHARE * cores):
            doubts.append(f"other processes kept the load up ({before.load:g} before, {after.load:g} after)")
    if before.governor != after.governor:
        doubts.append(f"the governor of the CPU's clock changed from {before.governor} to {after.governor}")
    return doubts


def _slowdowns(before: MachineState, after: MachineState) -> list[str]:
    """What kept the CPU, or all of the machine, from its speed meanwhile."""
    doubts = []
    if (after.throttled or 0) > (before.throttled or 0):
        doubts.append(f"the CPU was slowed down by heat {(after.throttled or 0) - (before.throttled or 0)} times")
    if (held_s := (after.quota_s or 0.0) - (before.quota_s or 0.0)) > 0:
        doubts.append(f"the container's CPU quota held the laps back for {held_s:.2g} s")
    if before.power_mode != after.power_mode:
        doubts.append(f"the power mode changed from {before.power_mode} to {after.power_mode}")
    return doubts


def _gpu_slowdowns(before: GpuState | None, after: GpuState | None, *, most_s: float) -> list[str]:
    """What held the GPU's clocks down: what was seen, and what its own counters grew by if that is more than `most_s`,
    as between two looks."""
    if after is None:
        return []
    seen = [reason for reason in after.reasons if reason in SLOWDOWNS.values()]
    if before is None:
        return seen
    counted = {
        "by its power limit": (before.power_held_s, after.power_held_s),
        "by heat": (before.thermal_held_s, after.thermal_held_s),
    }
    return seen + [
        f"{name} for {last - first:.2g} s"
        for name, (first, last) in counted.items()
        if first is not None and last is not None and last - first > most_s
    ]


def _advice(state: MachineState, *, busy: bool, slow: bool) -> list[str]:
    """What would make the next measurement steadier, as sentences for a person who may do it."""
    advice = []
    if busy:
        advice.append("Stop other work on this machine, and measure again.")
    if state.governor is not None and state.governor != "performance":
        advice.append(
            f"The CPU's governor is {state.governor}; `sudo cpupower frequency-set -g performance` steadies it."
        )
    if state.power_mode is not None:
        advice.append(f"The power mode is {state.power_mode}; `sudo jetson_clocks` locks its clocks.")
    elif slow:
        advice.append("Cool the GPU, or lock its clocks lower with `sudo nvidia-smi -lgc MHZ`.")
    elif state.gpu is not None and state.gpu.sm_mhz is not None:
        advice.append(f"`sudo nvidia-smi -lgc {state.gpu.sm_mhz:.0f}` would lock the GPU's clock where it was.")
    return advice


def _waited_seconds(proc: Path) -> float | None:
    """How long the calling thread has waited for a core, in s; None where the kernel does not tell."""
    fields = _text(proc / "thread-self" / "schedstat").split()
    return int(fields[1]) / 1e9 if len(fields) == 3 else None


def _cores() -> int:
    return os.cpu_count() or 1


def _printed(program: str, *arguments: str) -> str:
    """What a program prints; empty where there is none or it fails."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):  # ValueError: it prints what is not text
        return ""
    return done.stdout


def _number(text: str) -> float | None:
    """`text` as a number; None for nvidia-smi's `[N/A]` and its like."""
    return float(text) if re.fullmatch(r"-?\d+(\.\d+)?", text) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
