"""Whether to build the HIP op library, and for which GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from .environment import Choice, Torch, left_out, listed

DEFAULT_ARCHITECTURES = ["gfx90a", "gfx942", "gfx1100"]


def choose(torch: Torch) -> Choice:
    """CMake options for HIP, and a sentence explaining them. As for CUDA, but it takes ROCm."""
    off = ["-DFLASHDECPP_HIP=OFF"]
    switch = os.environ.get("FLASHDECPP_HIP", "")
    if switch == "0":
        return Choice(off, "hip: not built, FLASHDECPP_HIP=0")
    rocm = find_rocm()
    if rocm is None:
        if switch == "1":
            sys.exit("flashdecpp: FLASHDECPP_HIP=1 but ROCm was not found; install it or set ROCM_PATH")
        return Choice(off, "hip: not built, no ROCm in ROCM_PATH or in /opt/rocm")
    home, compiler = rocm
    asked = listed("PYTORCH_ROCM_ARCH")
    gpus = [] if asked else present_gpus()
    if not (switch == "1" or asked or gpus or torch.hip):
        why = f"no AMD GPU here and torch {torch.version} is without ROCm"
        return Choice(off, f"hip: not built, {why} (FLASHDECPP_HIP=1 builds it nevertheless)")
    if asked:
        targets = [target for target in asked if supported(target)]
        others = [target for target in asked if not supported(target)]
        why = "PYTORCH_ROCM_ARCH" + left_out(others, "which the kernels don't run on")
        if not targets:
            sys.exit(
                f"flashdecpp: PYTORCH_ROCM_ARCH has {', '.join(asked)}; "
                "the kernels need gfx90a, gfx942 or gfx11xx"
            )
    elif gpus:
        targets, why = gpus, "the GPU of this machine"
    else:
        targets = DEFAULT_ARCHITECTURES
        why = "no GPU here and PYTORCH_ROCM_ARCH not set, so the default"
    options = [
        "-DFLASHDECPP_HIP=ON",
        f"-DFLASHDECPP_HIP_COMPILER={compiler}",
        f"-DFLASHDECPP_HIP_FLAGS=--rocm-path={home}",
        f"-DFLASHDECPP_HIP_ARCHITECTURES={';'.join(targets)}",
    ]
    return Choice(options, f"hip: built for {', '.join(targets)} ({why}) with {compiler}", targets)


def find_rocm() -> tuple[Path, str] | None:
    """ROCm's folder and its compiler (clang, or hipcc, which calls it)."""
    homes = [
        os.environ.get("ROCM_PATH"),
        os.environ.get("ROCM_HOME"),
        os.environ.get("HIP_PATH"),
        "/opt/rocm",
    ]
    names = ("bin/amdclang++", "llvm/bin/clang++", "lib/llvm/bin/clang++", "bin/hipcc")
    for home in (Path(home) for home in homes if home):
        if (home / "include" / "hip" / "hip_runtime.h").exists():
            compiler = next((str(home / name) for name in names if (home / name).exists()), None)
            if compiler is not None:
                return home, compiler
    return None


def present_gpus() -> list[str]:
    """Targets of this machine's supported AMD GPUs, such as ["gfx942"]."""
    for name in ("amdgpu-arch", "rocm_agent_enumerator"):
        for program in (name, f"/opt/rocm/bin/{name}", f"/opt/rocm/llvm/bin/{name}"):
            try:
                found = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
            except (OSError, subprocess.CalledProcessError):
                continue
            return sorted({target for target in found if supported(target)})
    return []


def supported(target: str) -> bool:
    """Whether the kernels support the target's matrix instructions (CDNA2, CDNA3, RDNA3)."""
    return re.fullmatch(r"(gfx90a|gfx942|gfx11\d\d)(:\w+[+-])*", target) is not None
