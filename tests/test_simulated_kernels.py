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
    include = [f"-I{csrc}", f"-I{simulator}"]
    command = ["c++", *FLAGS, *flags, *include, str(simulator / f"{source}.cpp"), "-o", str(binary)]
    subprocess.run(command, check=True, timeout=300)
    return subprocess.run([str(binary)], capture_output=True, text=True, timeout=300)


MACHINES = {
    # a seam of the simulator's own, with the warps and matrix tiles of NVIDIA
    "simulated": ("-DFLASHDECPP_SIMULATED", "-DFLASHDECPP_SIMULATED_WARP=32"),
    # csrc/hip/arch_amd.h: warps of 64 with MFMA, warps of 32 with WMMA
    "gfx942": ("-DUSE_ROCM", "-D__gfx942__", "-DFLASHDECPP_SIMULATED_WARP=64"),
    "gfx1100": ("-DUSE_ROCM", "-D__GFX11__", "-DFLASHDECPP_SIMULATED_WARP=32"),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("source", ["attention", "linear", "quantized", "fused"])
def test_kernels_agree_with_their_definition(source: str, machine: str, tmp_path: Path) -> None:
    result = run(source, ROOT / "csrc", tmp_path / source, "-O2", *MACHINES[machine])
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith(" cases, 0 failures\n")


def test_matrix_units(tmp_path: Path) -> None:
    """Kernels that are NVIDIA's alone."""
    result = run("linear_units", ROOT / "csrc", tmp_path / "linear_units", "-O2", *MACHINES["simulated"])
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith(" cases, 0 failures\n")


# What is planted: which test must notice it, the file (of csrc/cuda; of csrc/hip after a machine), the text
# and what takes its place.
FAULTS = {
    "wrong mask at the ragged edge": (
        "attention",
        "attention/compute.cuh",
        "key <= last_[s]",
        "key < last_[s]",
    ),
    "no barrier before the warps' parts are read": (
        "attention",
        "attention/combine.cuh",
        "= state; });\n  __syncthreads();",
        "= state; });",
    ),
    "a barrier that only one warp reaches": (
        "attention",
        "attention/combine.cuh",
        "      return;\n    }\n  }\n  __syncthreads();",
        "      return;\n    }\n  }\n  if (arch::warp() == 0) __syncthreads();",
    ),
    "the wrong lanes in a scan": (
        "attention",
        "arch.h",
        "if (lane() & mask) before",
        "if (!(lane() & mask)) before",
    ),
    "a stage read before it has arrived": (
        "attention",
        "attention/pipeline.cuh",
        "arch::copy_wait<Tile::kStages - 1>();\n    arch::warp_sync();",
        "arch::copy_wait<Tile::kStages>();\n    arch::warp_sync();",
    ),
    "a part in the slot of another": (
        "attention",
        "attention/decode_attention_kernel.cuh",
        "slot = schedule.first_slot + 1;",
        "slot = schedule.first_slot;",
    ),
    "a part that is not merged": (
        "attention",
        "attention/scheduler.cuh",
        "begin + work_tiles, work_tiles, parts};",
        "begin + work_tiles, work_tiles, parts - 1};",
    ),
    "a team whose blocks do not wait for each other": (
        "attention",
        "attention/combine.cuh",
        "arch::cluster_sync();\n      combine_partials",
        "combine_partials",
    ),
    "one block's part for all of its team": (
        "attention",
        "attention/combine.cuh",
        "memory.part_of(i);",
        "memory.part_of(0);",
    ),
    "groups that two blocks of a team take": (
        "attention",
        "attention/scheduler.cuh",
        "cluster_rank(launch) * block_warps + arch::warp()",
        "cluster_rank(launch) + arch::warp()",
    ),
    "row_phi the wrong way round": (
        "attention",
        "attention/softmax.cuh",
        "(ref - whole) * kLog2E",
        "(whole - ref) * kLog2E",
    ),
    "a buffer that is filled while it is read": (
        "linear",
        "linear/flat_gemm_kernel.cuh",
        "copy_wait<G::kStages - 2>();",
        "copy_wait<G::kStages - 1>();",
    ),
    "another row's sums": (
        "linear",
        "linear/gemv_kernel.cuh",
        "mine += partials[warp() + other]",
        "mine += partials[other]",
    ),
    "a gate that goes with another row": (
        "linear",
        "linear/gemv_kernel.cuh",
        "shfl_xor(mine, rows / 2)",
        "shfl_xor(mine, 1)",
    ),
    "an activation that is left out": (
        "linear",
        "linear/epilogue.cuh",
        "    value = activate(p.fusion.activation, value);\n    if",
        "    if",
    ),
    "a part that is not added": (
        "linear",
        "linear/flat_gemm_kernel.cuh",
        "for (int s = 0; s < others; ++s)",
        "for (int s = 0; s < others - 1; ++s)",
    ),
    "words of weights that go to the wrong lanes": (
        "quantized",
        "nvidia/quantized_gemv.cuh",
        "exchange_words<1>(b)",
        "exchange_words<2>(b)",
    ),
    "words of weights that go to the wrong lanes, AMD": (
        "quantized",
        "gfx942:stream_gemv_amd.h",
        "exchange_words<16>(b)",
        "exchange_words<8>(b)",
    ),
    "another group's scale": (
        "quantized",
        "gfx1100:stream_gemv_amd.h",
        "step * G::kStepK + i * 32, k - 1)",
        "step * G::kStepK, k - 1)",
    ),
    "weights that the wrong half of a warp has": (
        "attention",
        "gfx1100:arch_amd.h",
        "even_k = odd ? other : mine",
        "even_k = odd ? mine : other",
    ),
    "a group that replaces the one that is read": (
        "attention",
        "gfx942:attention_pipeline_amd.h",
        "    arch::warp_sync();\n  }\n\n  __device__ __forceinline__ Rows keys",
        "  }\n\n  __device__ __forceinline__ Rows keys",
    ),
    "a write before a tensor": (
        "linear",
        "linear/gemv_kernel.cuh",
        "write_output<T, fused>(p, lane() / rows, first_row + r, mine)",
        "write_output<T, fused>(p, lane() / rows, first_row + r - 1, mine)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault: str, tmp_path: Path) -> None:
    source, file, text, replacement = FAULTS[fault]
    machine, _, file = file.rpartition(":")
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    path = csrc / ("hip" if machine else "cuda") / file
    kernel = path.read_text()
    assert kernel.count(text) == 1
    path.write_text(kernel.replace(text, replacement))
    flags = ("-O1", "-DFLASHDECPP_SIMULATED_FEW", *MACHINES[machine or "simulated"])
    assert run(source, csrc, tmp_path / source, *flags).returncode != 0
