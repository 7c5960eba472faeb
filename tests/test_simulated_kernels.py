"""GPU kernels' own source on a simulated GPU (tests/simulator), through the seams of three machines.

The same tests must notice faults that are planted into the source: else they would prove nothing.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Kernels look at bytes as other types, which nvcc allows and C++ does not.
FLAGS = ["-std=c++20", "-fno-strict-aliasing", "-w"]


def run(source: str, csrc: Path, binary: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Compiles tests/simulator/`source`.cpp with the kernels of `csrc`, and runs it."""
    simulator = ROOT / "tests/simulator"
    include = [f"-I{csrc}", f"-I{csrc / 'cuda'}", f"-I{simulator}"]
    command = ["c++", *FLAGS, *flags, *include, str(simulator / f"{source}.cpp"), "-o", str(binary)]
    subprocess.run(command, check=True, timeout=300)
    return subprocess.run([str(binary)], capture_output=True, text=True, timeout=300)


MACHINES = {
    # a seam of the simulator's own, with the waves and matrix tiles of NVIDIA
    "simulated": ("-DFLASHDECPP_SIMULATED", "-DFLASHDECPP_SIMULATED_WAVE=32"),
    # csrc/hip/arch_amd.h: waves of 64 with MFMA, waves of 32 with WMMA
    "gfx942": ("-DUSE_ROCM", "-D__gfx942__", "-DFLASHDECPP_SIMULATED_WAVE=64"),
    "gfx1100": ("-DUSE_ROCM", "-D__GFX11__", "-DFLASHDECPP_SIMULATED_WAVE=32"),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("source", ["attention", "linear", "fused"])
def test_kernels_agree_with_their_definition(source: str, machine: str, tmp_path: Path) -> None:
    result = run(source, ROOT / "csrc", tmp_path / source, "-O2", *MACHINES[machine])
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith(" cases, 0 failures\n")


def test_matrix_units(tmp_path: Path) -> None:
    """Kernels that are NVIDIA's alone."""
    result = run("linear_units", ROOT / "csrc", tmp_path / "linear_units", "-O2", *MACHINES["simulated"])
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith(" cases, 0 failures\n")


# What is planted: which test must notice it, the file, the text and what takes its place.
FAULTS = {
    "wrong mask at the ragged edge": (
        "attention",
        "attention_walk.cuh",
        "key <= last_[r][s]",
        "key < last_[r][s]",
    ),
    "no barrier before the waves' parts are read": (
        "attention",
        "attention_merge.cuh",
        "= state; });\n  __syncthreads();",
        "= state; });",
    ),
    "a barrier that only one wave reaches": (
        "attention",
        "decode_attention_kernel.cuh",
        "merge_memory);\n    __syncthreads();",
        "merge_memory);\n    if (arch::wave() == 0) __syncthreads();",
    ),
    "the wrong lanes in a scan": (
        "attention",
        "arch.h",
        "if (lane() & mask) before",
        "if (!(lane() & mask)) before",
    ),
    "a stage read before it has arrived": (
        "attention",
        "attention_ring.cuh",
        "arch::copy_wait<Tile::kStages - 1>();\n    arch::wave_sync();",
        "arch::copy_wait<Tile::kStages>();\n    arch::wave_sync();",
    ),
    "a part in the slot of another": (
        "attention",
        "decode_attention_kernel.cuh",
        "slot = schedule.first_slot + 1;",
        "slot = schedule.first_slot;",
    ),
    "a part that is not merged": (
        "attention",
        "attention_schedule.cuh",
        "kv_heads, kv_heads, parts};",
        "kv_heads, kv_heads, parts - 1};",
    ),
    "references the wrong way round": (
        "attention",
        "softmax.cuh",
        "(ref - whole) * kLog2E",
        "(whole - ref) * kLog2E",
    ),
    "a buffer that is filled while it is read": (
        "linear",
        "flat_gemm_kernel.cuh",
        "copy_wait<G::kStages - 2>();",
        "copy_wait<G::kStages - 1>();",
    ),
    "another row's sums": (
        "linear",
        "gemv_kernel.cuh",
        "mine += parts[wave() + other]",
        "mine += parts[other]",
    ),
    "a gate that goes with another row": (
        "linear",
        "gemv_kernel.cuh",
        "exchange_xor(mine, rows / 2)",
        "exchange_xor(mine, 1)",
    ),
    "a norm of another row": ("linear", "gemv_kernel.cuh", "v, factors[i],", "v, factors[0],"),
    "a part that is not added": (
        "linear",
        "flat_gemm_kernel.cuh",
        "for (int s = 0; s < others; ++s)",
        "for (int s = 0; s < others - 1; ++s)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault: str, tmp_path: Path) -> None:
    source, file, text, replacement = FAULTS[fault]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    path = csrc / "cuda" / file
    kernel = path.read_text()
    assert kernel.count(text) == 1
    path.write_text(kernel.replace(text, replacement))
    flags = ("-O1", "-DFLASHDECPP_SIMULATED_FEW", *MACHINES["simulated"])
    assert run(source, csrc, tmp_path / source, *flags).returncode != 0
