"""How many threads torch computes with on the CPU, and how they wait for each other.

Imports no torch: OpenMP reads its environment once, when torch is loaded.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

# Any of these means that the user has decided.
WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

# By default, GNU's OpenMP (in torch's own wheels for Linux) spins for milliseconds before it sleeps, and
# Intel's and LLVM's for 200 ms. A token takes hundreds of short parallel regions; where another process has a
# core, each of them may spin until the scheduler takes the core away. bench/busy.py compares the choices.
SHORT_WAITS = {"GOMP_SPINCOUNT": "10", "KMP_BLOCKTIME": "0"}

_MAX_THREADS = 1024


def choose_waiting_policy() -> None:
    """Lets OpenMP's threads sleep soon when they wait, unless the user has set how they wait.

    Has an effect only before torch is imported.
    """
    if not any(variable in os.environ for variable in WAITING_VARIABLES):
        os.environ.update(SHORT_WAITS)


def use_threads(count: int | None) -> None:
    """Makes torch compute with `count` threads, by default as many as this process can run at once.

    OMP_NUM_THREADS overrides the default. Raises ValueError for a count out of range.
    """
    import torch

    if count is None:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(usable_threads(torch.get_num_threads()))
    elif 1 <= count <= _MAX_THREADS:
        torch.set_num_threads(count)
    else:
        raise ValueError(f"the number of threads must be from 1 to {_MAX_THREADS}, got {count}")


def usable_threads(physical_cores: int) -> int:
    """The smallest of the cores, the CPUs that this process may use, and its cgroup's CPU quota."""
    quota = cgroup_cpus()
    limits = [physical_cores, allowed_cpus()] + ([] if quota is None else [int(quota)])
    return max(1, min(limits))


def allowed_cpus() -> int:
    """The CPUs in this process's affinity mask."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cgroup_cpus(root: Path = Path("/")) -> float | None:
    """The CPUs' worth of time that the cgroups of this process allow (containers set it), if limited."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return None
    quotas = []
    for membership in memberships:
        _, controllers, group = membership.split(":", 2)
        if not controllers:
            mounts, read = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read = [f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"], _quota_v1
        else:
            continue
        path = PurePosixPath(group.lstrip("/"))
        # A quota holds for all groups below. In a container, the path may be the host's, and
        # only the top exists.
        for folder in (root / mount / part for mount in mounts for part in (path, *path.parents)):
            quotas.append(read(folder))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = map(int, (folder / "cpu.max").read_text().split())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    return quota / period


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 else None


def explanation() -> str:
    """What may determine the number of threads, such as "OMP_NUM_THREADS=2"."""
    if "OMP_NUM_THREADS" in os.environ:
        return f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"
    quota = cgroup_cpus()
    limits = "no CPU quota" if quota is None else f"a CPU quota of {quota:g}"
    return f"at most one per physical core; {allowed_cpus()} CPUs allowed, {limits}"


def waiting_policy() -> str:
    """How OpenMP's threads wait, as the environment has it."""
    given = [f"{name}={os.environ[name]}" for name in WAITING_VARIABLES if name in os.environ]
    return ", ".join(given) if given else "OpenMP's default, which spins"
