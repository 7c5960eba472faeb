"""Kernels compiled for AMD machines: that they build, and with which instructions. No such machine is needed.

Needs clang with an AMDGPU backend (FLASHDECPP_HIP_CLANG, else clang++-19 or amdclang++) and the headers and
device libraries of HIP (FLASHDECPP_HIP_ROOT, which holds include/hip, else ROCM_PATH or /opt/rocm).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MATRIX = {
    "gfx90a": r"v_mfma_f32_16x16x16_?b?f16",
    "gfx942": r"v_mfma_f32_16x16x16_b?f16",
    "gfx1100": r"v_wmma_f32",
}


def toolchain() -> tuple[str, str, list[str]]:
    """Compiler, disassembler, flags; skips where there are none."""
    compilers = [os.environ.get("FLASHDECPP_HIP_CLANG"), "clang++-19", "amdclang++"]
    compiler = next((path for name in compilers if name and (path := shutil.which(name))), None)
    roots = [os.environ.get("FLASHDECPP_HIP_ROOT"), os.environ.get("ROCM_PATH"), "/opt/rocm"]
    root = next((Path(r) for r in roots if r and (Path(r) / "include/hip/hip_runtime.h").exists()), None)
    if compiler is None or root is None:
        pytest.skip("there is no clang with HIP's headers")
    bitcode = next(root.glob("**/amdgcn/bitcode"), None)
    if bitcode is None:
        pytest.skip(f"there are no device libraries below {root}")
    objdump = shutil.which("llvm-objdump-19") or shutil.which(str(Path(compiler).parent / "llvm-objdump"))
    if objdump is None:
        pytest.skip("there is no llvm-objdump")
    return (
        compiler,
        objdump,
        [f"-isystem{root}/include", f"--rocm-path={root}", f"--rocm-device-lib-path={bitcode}"],
    )


@pytest.mark.parametrize("target", MATRIX)
def test_kernels_have_matrix_instructions_and_wide_loads(target: str, tmp_path: Path) -> None:
    compiler, objdump, flags = toolchain()
    code = tmp_path / f"{target}.co"
    defines = ["-D__HIP_PLATFORM_AMD__=1", "-DUSE_ROCM=1", "-DHIP_ENABLE_WARP_SYNC_BUILTINS=1"]
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}"]
    command = [
        compiler,
        "-x",
        "hip",
        f"--offload-arch={target}",
        "-O3",
        "-std=c++20",
        *defines,
        *flags,
        *include,
    ]
    command += ["--cuda-device-only", "--no-gpu-bundle-output", "-c", str(ROOT / "tests/hip_kernels.cpp")]
    subprocess.run([*command, "-o", str(code)], check=True)
    listing = subprocess.run(
        [objdump, "-d", f"--mcpu={target}", str(code)], capture_output=True, text=True, check=True
    )
    kernels = re.split(r"\n[0-9a-f]{16} <(\w+)>:\n", listing.stdout)
    bodies = dict(zip(kernels[1::2], kernels[2::2], strict=True))
    assert len(bodies) == 10
    for name, body in bodies.items():
        assert bool(re.search(r"global_load_(dwordx4|b128)", body)) == ("sample" not in name), name
        multiplies = "attention" in name or "flat_gemm" in name
        assert bool(re.search(MATRIX[target], body)) == multiplies, name
