"""Free memory and peak memory of a device."""

import resource
import sys
from pathlib import Path

import psutil
import torch


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # torch's allocator also hands out what it has reserved and not yet allocated.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, _cgroup_available())


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process in bytes: allocated by torch on a GPU, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _cgroup_available() -> float:
    """Bytes left below the container's memory limit; infinite without a limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        reclaimable = [
            line for line in (root / "memory.stat").read_text().splitlines() if line[:5] == "file "
        ]
    except (OSError, ValueError):
        return float("inf")
    if limit == "max":
        return float("inf")
    return int(limit) - used + sum(int(line.split()[1]) for line in reclaimable)
