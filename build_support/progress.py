"""How much a build has to compile, and about how long that takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import environment

# Seconds that one core takes to compile one file, and for GPU kernels one target of it: rounded measurements.
SECONDS = {"isa": 40, "cpp": 7, "cu": 20, "hip": 40}


def steps(build: Path, ninja: str) -> list[str]:
    """The sources that ninja would compile now, in a folder that CMake has just configured."""
    # Under its own name the file would be regenerated first, and a dry run ends there.
    plan = build / "plan.ninja"
    shutil.copyfile(build / "build.ninja", plan)
    command = [ninja, "-C", str(build), "-f", plan.name, "-n"]
    planned = subprocess.run(command, capture_output=True, text=True).stdout
    plan.unlink()
    return re.findall(r"\[\d+/\d+\] (?:Building \w+ object|HIP) (\S+)", planned)


def announce(sources: Sequence[str], gpu_targets: int, jobs: int) -> str:
    """Such as "flashdecpp compiles 15 files, about 2 minutes on 2 cores"."""
    seconds = [_seconds(source, gpu_targets) for source in sources]
    wall = max([sum(seconds) / jobs, *seconds])
    cores = f"{jobs} core{'s' if jobs > 1 else ''}"
    return f"flashdecpp compiles {len(sources)} files, about {_rounded(wall)} on {cores}"


def available_cores() -> int:
    """Those that this process may use, at most MAX_JOBS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, environment.max_jobs() or cores)


def _seconds(source: str, gpu_targets: int) -> int:
    if ".cu" in source:
        return SECONDS["cu"] * gpu_targets
    if ".cpp" not in source:
        return SECONDS["hip"] * gpu_targets
    return SECONDS["isa" if "isa_" in source else "cpp"]


def _rounded(seconds: float) -> str:
    if seconds < 55:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minute{'s' if minutes > 1 else ''}"
