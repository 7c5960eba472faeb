"""Whether to build the CUDA op library, and for which GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .environment import Choice, Torch, left_out, listed

# compute_80's PTX as well, which the driver compiles for GPUs that are newer than this build.
DEFAULT_ARCHITECTURES = ["80", "90a-real"]
# GPU generations by name, as torch's own builds define them
GENERATIONS = {
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}


def choose(torch: Torch) -> Choice:
    """CMake options for CUDA, and a sentence explaining them.

    CUDA is built where it can be used: with a GPU, a torch for CUDA, or a list of architectures, and nvcc.
    """
    off = ["-DFLASHDECPP_CUDA=OFF"]
    switch = os.environ.get("FLASHDECPP_CUDA", "")
    if switch == "0":
        return Choice(off, "cuda: not built, FLASHDECPP_CUDA=0")
    nvcc = find_nvcc()
    if nvcc is None:
        if switch == "1":
            sys.exit("flashdecpp: FLASHDECPP_CUDA=1 but nvcc was not found; install it or set CUDA_HOME")
        return Choice(off, "cuda: not built, no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
    asked = capabilities(listed("TORCH_CUDA_ARCH_LIST"))
    gpus = [] if asked else present_gpus()
    if not (switch == "1" or asked or gpus or torch.cuda):
        why = f"no GPU here and torch {torch.version} is without CUDA"
        return Choice(off, f"cuda: not built, {why} (FLASHDECPP_CUDA=1 builds it nevertheless)")
    if asked:
        known = supported(nvcc)
        old, new = [c for c in asked if too_old(c)], [c for c in asked if too_new(c, known)]
        usable = [capability for capability in asked if capability not in (*old, *new)]
        if not usable:
            sys.exit(
                f"flashdecpp: TORCH_CUDA_ARCH_LIST has {', '.join(asked)}; "
                "the kernels need 8.0 (Ampere) or newer"
                + (f", and {nvcc} knows nothing newer than {max_name(known)}" if new else "")
            )
        architectures = cmake_architectures(usable)
        why = "TORCH_CUDA_ARCH_LIST"
        why += left_out(old, "which the kernels don't run on") + left_out(new, "which this nvcc doesn't know")
    elif gpus:
        architectures, why = cmake_architectures(gpus), "the GPU of this machine"
    else:
        architectures = DEFAULT_ARCHITECTURES
        why = "no GPU here and TORCH_CUDA_ARCH_LIST not set, so the default"
    options = [
        "-DFLASHDECPP_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}",
    ]
    reason = f"cuda: built for {', '.join(architectures)} ({why}) with {nvcc}"
    return Choice(options, reason, architectures)


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    return next((str(path) for path in candidates if path.exists()), shutil.which("nvcc"))


def present_gpus() -> list[str]:
    """Compute capabilities of this machine's supported NVIDIA GPUs, such as ["9.0"]."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        return sorted({name for name in found if re.fullmatch(r"\d+\.\d", name) and not too_old(name)})
    except (OSError, subprocess.CalledProcessError):
        return []


def supported(nvcc: str) -> set[tuple[int, int]]:
    """The capabilities that an nvcc compiles for; empty if it doesn't say."""
    try:
        names = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return set()
    return {(int(major), int(minor)) for major, minor in re.findall(r"\bsm_(\d+)(\d)\b", names)}


def capabilities(entries: list[str]) -> list[str]:
    """Expands generation names and checks the notation, which is torch's: "Ampere" -> "8.0", "8.6+PTX"."""
    expanded = [part for entry in entries for part in GENERATIONS.get(entry, entry).split(";")]
    for capability in expanded:
        if re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", capability) is None:
            sys.exit(
                f"flashdecpp: TORCH_CUDA_ARCH_LIST has {capability!r}; write such as '8.0;9.0', '8.6+PTX' "
                "or 'Hopper'"
            )
    return expanded


def number(capability: str) -> tuple[int, int]:
    """As numbers: "8.6+PTX" -> (8, 6)."""
    major, _, rest = capability.partition(".")
    return int(major), int(rest[0])


def too_old(capability: str) -> bool:
    return number(capability) < (8, 0)


def too_new(capability: str, known: set[tuple[int, int]]) -> bool:
    return bool(known) and number(capability) not in known and not too_old(capability)


def max_name(known: set[tuple[int, int]]) -> str:
    return "{}.{}".format(*max(known))


def cmake_architectures(capabilities: list[str]) -> list[str]:
    """CMake's names for torch's notation: "9.0" -> "90a-real"; "8.6+PTX" -> "86-real", "86-virtual"."""
    names = []
    for capability in capabilities:
        major, minor = number(capability)
        specific = capability.removesuffix("+PTX").removeprefix(f"{major}.{minor}")
        names.append(f"{major}{minor}{specific or ('a' if (major, minor) == (9, 0) else '')}-real")
        if capability.endswith("+PTX"):
            names.append(f"{major}{minor}{specific}-virtual")
    return list(dict.fromkeys(names))
