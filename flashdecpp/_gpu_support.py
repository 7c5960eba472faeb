"""Whether the GPU op library can run on a GPU, and what to do if it can't."""

from __future__ import annotations

import re
from typing import Literal

import torch

from flashdecpp import _C
from flashdecpp._library import gpu_library

# "compiled": machine code for this GPU; "jit": PTX only, which the driver compiles on first use.
Code = Literal["compiled", "jit", "none"]


def gfx_target(device: torch.device) -> str | None:
    """An AMD GPU's target, such as "gfx90a" of "gfx90a:sramecc+:xnack-"; None for other devices."""
    if device.type != "cuda" or torch.version.hip is None:
        return None
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]


def cuda_code(architectures: str, capability: tuple[int, int]) -> Code:
    """What a library built for CMake's list of architectures, such as "80-real;90a", has for an NVIDIA GPU.

    Machine code runs on later minor versions of its major version; PTX on everything later. With the suffix a
    both run on that very version only, and with f on its family: the later minor versions.
    """
    found: Code = "none"
    for entry in filter(None, architectures.split(";")):
        parsed = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", entry)
        if parsed is None:  # "all" or "native", given to CMake itself: what they stood for is not known here
            return "compiled"
        version, suffix, kind = (int(parsed[1]), int(parsed[2])), parsed[3], parsed[4]
        same_major = version[0] == capability[0] and version[1] <= capability[1]
        runs_code = version == capability if suffix == "a" else same_major
        runs_ptx = runs_code if suffix else version <= capability
        if runs_code and kind != "-virtual":
            return "compiled"
        if runs_ptx and kind != "-real":
            found = "jit"
    return found


def hip_code(architectures: str, target: str) -> Code:
    """The same for an AMD GPU of a target such as "gfx90a", which runs its own machine code only."""
    # An entry may restrict features, as in "gfx942:xnack-".
    built = {entry.partition(":")[0] for entry in architectures.split(";")}
    return "compiled" if target in built else "none"


def gpu_code(index: int) -> Code:
    """What the GPU op library has for the GPU of this index."""
    build = _C.build_info()
    if target := gfx_target(torch.device("cuda", index)):
        return hip_code(build["hip_architectures"], target)
    properties = torch.cuda.get_device_properties(index)
    return cuda_code(build["cuda_architectures"], (properties.major, properties.minor))


def gpu_problem(index: int) -> str | None:
    """Why the ops can't run on the GPU of this index and what to do about it; None if they can."""
    library = gpu_library()
    if not library.loaded:
        return f"the {library.name} op library is not loaded ({library.problem}); see `flashdecpp info`"
    if gpu_code(index) != "none":
        return None
    properties, build = torch.cuda.get_device_properties(index), _C.build_info()
    if target := gfx_target(torch.device("cuda", index)):
        kind, built, variable = target, build["hip_architectures"], f'PYTORCH_ROCM_ARCH="{target}"'
    else:
        capability = (properties.major, properties.minor)
        kind, built = f"compute capability {capability[0]}.{capability[1]}", build["cuda_architectures"]
        if capability < (8, 0):
            return f"{properties.name} has {kind}, and the CUDA kernels need 8.0"
        variable = f'TORCH_CUDA_ARCH_LIST="{capability[0]}.{capability[1]}"'
    return (
        f"the {library.name} op library has no code for {properties.name} ({kind}), only for "
        f"{built.replace(';', ', ')}; rebuild it with "
        f"`{variable} pip install --force-reinstall --no-deps .` in flashdecpp's sources"
    )
