"""What this machine is: the names that tables are kept under, and what a measurement depends on."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from flashdecpp._library import cpu_instruction_set


def device_name(device: torch.device) -> str:
    """A GPU as torch and the driver name it; a CPU with the kernels and the threads that it runs with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {cpu_instruction_set()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory: inputs must be read past it to be timed as a model reads its weights."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kibibytes = [int(path.read_text().strip().removesuffix("K")) for path in sizes]
    return max(kibibytes, default=32 << 10) << 10


def driver_version() -> str:
    """NVIDIA's driver, or "" where nvidia-smi doesn't say."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0].strip()
    except OSError:
        return ""


def environment(device: torch.device) -> dict[str, str]:
    """When something is measured, and with what."""
    record = {
        "date": datetime.date.today().isoformat(),
        "flashdecpp": metadata.version("flashdecpp"),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        record |= {"cuda": str(torch.version.cuda), "driver": driver_version()}
    return record
