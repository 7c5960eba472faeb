"""Names and properties of this machine's devices, which identify tables and measurements."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from flashdecpp import _C
from flashdecpp._gpu_support import gfx_target
from flashdecpp._library import cpu_instruction_set

# Memory-side caches beyond the L2 that torch reports.
_MEMORY_CACHES = {"gfx942": 256 << 20, "gfx1100": 96 << 20}


def gpu_properties(device: torch.device) -> _C.DeviceProperties:
    """What the heuristics of the op libraries know about a GPU.

    Only the library itself can tell if it was compiled for less than the GPU can do; here that isn't seen.
    """
    properties = torch.cuda.get_device_properties(device)
    if target := gfx_target(device):
        number = int(target.removeprefix("gfx"), 16)
        return _C.amd_device(target, number, properties.multi_processor_count, properties.warp_size)
    return _C.nvidia_device(
        properties.name,
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
        generic=os.environ.get("FLASHDECPP_GPU_KERNELS") == "generic",
    )


def device_name(device: torch.device) -> str:
    """An NVIDIA GPU's name, an AMD GPU's gfx target, or a CPU's name, instruction set and threads."""
    if device.type == "cuda":
        return gfx_target(device) or torch.cuda.get_device_name(device)
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
    """Size of the last-level cache, which timed inputs must exceed: a model reads weights from memory."""
    if device.type == "cuda":
        level_2 = torch.cuda.get_device_properties(device).L2_cache_size
        return max(level_2, _MEMORY_CACHES.get(gfx_target(device) or "", 0))
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kibibytes = [int(path.read_text().strip().removesuffix("K")) for path in sizes]
    return max(kibibytes, default=32 << 10) << 10


def driver_version() -> str:
    """The version of the GPU's driver, or "" if it is unknown."""
    if torch.version.hip is not None:
        try:
            return Path("/sys/module/amdgpu/version").read_text().strip()
        except OSError:  # the driver in the Linux kernel has no version of its own
            return f"Linux {platform.release()}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0].strip()
    except OSError:
        return ""


def environment(device: torch.device) -> dict[str, str]:
    """The date and the software of a measurement."""
    record = {
        "date": datetime.date.today().isoformat(),
        "flashdecpp": metadata.version("flashdecpp"),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        kind = {"hip": torch.version.hip} if torch.version.hip else {"cuda": str(torch.version.cuda)}
        record |= {**kind, "driver": driver_version()}
    return record
