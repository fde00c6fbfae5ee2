"""The machine while something is measured on it: who else uses it, and how fast it is clocked."""

import dataclasses
import os
import platform
import re
import subprocess
import time
from collections.abc import Collection
from pathlib import Path

LOADED = 0.05
"""Share of the machine's processor time that others may take; above it a time says nothing."""


def num_cores() -> int:
    """Returns the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> str:
    """Returns a line such as `2 cores of AMD EPYC 7B13, Linux`."""
    found = _search("/proc/cpuinfo", r"^model name\s*: (.*)$")
    name = found[0] if found else platform.machine()
    return f"{num_cores()} cores of {name}, {platform.system()}"


def told(*names: str) -> dict[str, str]:
    """Returns those of these variables of the environment that are set, and their values."""
    return {name: os.environ[name] for name in names if name in os.environ}


def clocks() -> dict[str, str]:
    """Returns the clocks of processor and cards at this moment, and what governs them."""
    found = {}
    if rates := _search("/proc/cpuinfo", r"^cpu MHz\s*: (.*)$"):
        found["processor MHz"] = f"{sum(map(float, rates)) / len(rates):.0f}"
    if governor := _search("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", r"^(.*)$"):
        found["governor"] = governor[0]
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw,driver_version"
    try:
        cards = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        found[f"cards: {fields}"] = cards.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return found


def _search(path: str, pattern: str) -> list[str]:
    try:
        return re.findall(pattern, Path(path).read_text(), re.M)
    except OSError:
        return []


@dataclasses.dataclass(frozen=True)
class Activity:
    """Seconds so far: of the clock, of the processors' work, and of that by those who measure."""

    wall: float
    busy: float | None
    own: float

    @classmethod
    def now(cls, processes: Collection[int]) -> "Activity":
        """Returns those of this moment; `processes` are measuring, beside this one."""
        own = sum(_processor_seconds(process) for process in {*processes, os.getpid()})
        return cls(time.perf_counter(), _busy_seconds(), own)

    def share_of_others(self, since: "Activity") -> float | None:
        """Returns the share of the machine's time that others took; None where none can tell."""
        if self.busy is None or since.busy is None:
            return None
        others = (self.busy - since.busy) - (self.own - since.own)
        total = (self.wall - since.wall) * (os.cpu_count() or 1)
        return max(0.0, others) / max(total, 1e-9)


def _busy_seconds() -> float | None:
    """Returns the seconds that all processors together have worked; None where not on Linux."""
    found = _search("/proc/stat", r"^cpu +(.*)$")
    if not found:
        return None
    user, nice, system, _, _, interrupts, soft, steal, *_ = map(int, found[0].split())
    return (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")


def _processor_seconds(process: int) -> float:
    """Returns the processor time of a process; 0 where it has ended or not on Linux."""
    found = _search(f"/proc/{process}/stat", r"^.*\) (.*)$")
    if not found:
        return 0.0
    user, system = map(int, found[0].split()[11:13])  # fields 14 and 15 of proc_pid_stat(5)
    return (user + system) / os.sysconf("SC_CLK_TCK")
