"""The GPU kernels' source on a simulated GPU (tests/simulator), through three implementations of the seam.

Faults planted into the source must make the same test programs fail.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Kernels access bytes as other types, which nvcc allows and C++ does not. Half precision is fast with this
# processor's own instructions. A fortified longjmp refuses to change stacks, as fibers do.
FLAGS = ["-std=c++20", "-O1", "-march=native", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-w"]


def run(source: str, csrc: Path, binary: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Compiles tests/simulator/`source`.cpp against the kernels in `csrc` and runs it."""
    simulator = ROOT / "tests/simulator"
    include = [f"-I{csrc}", f"-I{simulator}"]
    command = ["c++", *FLAGS, *flags, *include, str(simulator / f"{source}.cpp"), "-o", str(binary)]
    subprocess.run(command, check=True, timeout=300)
    return subprocess.run([str(binary)], capture_output=True, text=True, timeout=300)


SEAMS = {
    # tests/simulator/arch_simulated.h: warps and matrix tiles as on NVIDIA
    "simulated": ("-DFLASHDECPP_SIMULATED", "-DFLASHDECPP_SIMULATED_WARP=32"),
    # csrc/hip/arch_amd.h: warps of 64 with MFMA, warps of 32 with WMMA
    "gfx942": ("-DUSE_ROCM", "-D__gfx942__", "-DFLASHDECPP_SIMULATED_WARP=64"),
    "gfx1100": ("-DUSE_ROCM", "-D__GFX11__", "-DFLASHDECPP_SIMULATED_WARP=32"),
}


@pytest.mark.parametrize("seam", SEAMS)
@pytest.mark.parametrize("source", ["attention", "linear", "quantized", "elementwise"])
def test_kernels_agree_with_their_definition(source: str, seam: str, tmp_path: Path) -> None:
    result = run(source, ROOT / "csrc", tmp_path / source, *SEAMS[seam])
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith(" cases, 0 failures\n")


def test_nvidia_tensor_core_gemvs(tmp_path: Path) -> None:
    result = run("linear_mma", ROOT / "csrc", tmp_path / "linear_mma", *SEAMS["simulated"])
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith(" cases, 0 failures\n")


# Label: the test program that must fail, the file in csrc/cuda (or "seam:" and the file in csrc/hip), the
# original text and its replacement.
FAULTS = {
    "off-by-one causal mask": (
        "attention",
        "attention/compute.cuh",
        "key <= last_key_[s]",
        "key < last_key_[s]",
    ),
    "missing barrier before warp partials are combined": (
        "attention",
        "attention/combine.cuh",
        "= state; });\n  __syncthreads();",
        "= state; });",
    ),
    "divergent barrier": (
        "attention",
        "attention/combine.cuh",
        "      return;\n    }\n  }\n  __syncthreads();",
        "      return;\n    }\n  }\n  if (arch::warp() == 0) __syncthreads();",
    ),
    "wrong lanes in a prefix sum": (
        "attention",
        "arch.h",
        "if (lane() & mask) before",
        "if (!(lane() & mask)) before",
    ),
    "stage read before its copies arrive": (
        "attention",
        "attention/pipeline.cuh",
        "arch::copy_wait<Tile::kStages - 1>();\n    arch::warp_sync();",
        "arch::copy_wait<Tile::kStages>();\n    arch::warp_sync();",
    ),
    "partial written to the wrong slot": (
        "attention",
        "attention/decode_attention_kernel.cuh",
        "slot = schedule.first_slot + 1;",
        "slot = schedule.first_slot;",
    ),
    "last partial not combined": (
        "attention",
        "attention/scheduler.cuh",
        "begin + work_tiles, work_tiles, splits};",
        "begin + work_tiles, work_tiles, splits - 1};",
    ),
    "missing cluster barrier": (
        "attention",
        "attention/combine.cuh",
        "arch::cluster_sync();\n      combine_partials",
        "combine_partials",
    ),
    "one CTA's partial used for the whole cluster": (
        "attention",
        "attention/combine.cuh",
        "memory.partial_of(i);",
        "memory.partial_of(0);",
    ),
    "KV tiles processed by two CTAs of a cluster": (
        "attention",
        "attention/scheduler.cuh",
        "cluster_rank(launch) * cta_warps + arch::warp()",
        "cluster_rank(launch) + arch::warp()",
    ),
    "inverted rescale factor": (
        "attention",
        "attention/softmax.cuh",
        "(ref - new_ref) * kLog2E",
        "(new_ref - ref) * kLog2E",
    ),
    "a stage refilled while it is read": (
        "linear",
        "linear/flat_gemm_kernel.cuh",
        "copy_wait<G::kStages - 2>();",
        "copy_wait<G::kStages - 1>();",
    ),
    "the partial of the wrong warp": (
        "linear",
        "linear/gemv_kernel.cuh",
        "mine += partials[warp() + other]",
        "mine += partials[other]",
    ),
    "a gate paired with the wrong row": (
        "linear",
        "linear/gemv_kernel.cuh",
        "shfl_xor(mine, rows / 2)",
        "shfl_xor(mine, 1)",
    ),
    "an activation left out": (
        "linear",
        "linear/epilogue.cuh",
        "    value = activate(p.fusion.activation, value);\n    if",
        "    if",
    ),
    "a split whose partial is not added": (
        "linear",
        "linear/flat_gemm_kernel.cuh",
        "for (int s = 0; s < num_partials; ++s)",
        "for (int s = 0; s < num_partials - 1; ++s)",
    ),
    "weight words sent to the wrong lanes": (
        "quantized",
        "nvidia/quantized_gemv.cuh",
        "exchange_words<1>(b)",
        "exchange_words<2>(b)",
    ),
    "weight words sent to the wrong lanes, AMD": (
        "quantized",
        "gfx942:stream_gemv_amd.h",
        "exchange_words<16>(b)",
        "exchange_words<8>(b)",
    ),
    "the scale of the wrong group": (
        "quantized",
        "gfx1100:stream_gemv_amd.h",
        "step * G::kStepK + i * 32, k - 1)",
        "step * G::kStepK, k - 1)",
    ),
    "softmax weights in the wrong half of a warp": (
        "attention",
        "gfx1100:arch_amd.h",
        "even_k = odd ? other : mine",
        "even_k = odd ? mine : other",
    ),
    "stage overwritten while it is read": (
        "attention",
        "gfx942:attention_pipeline_amd.h",
        "    arch::warp_sync();\n  }\n\n  __device__ __forceinline__ Rows keys",
        "  }\n\n  __device__ __forceinline__ Rows keys",
    ),
    "a store before the start of a tensor": (
        "linear",
        "linear/gemv_kernel.cuh",
        "write_output<T, fused>(p, lane() / rows, first_row + r, mine)",
        "write_output<T, fused>(p, lane() / rows, first_row + r - 1, mine)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault: str, tmp_path: Path) -> None:
    source, file, text, replacement = FAULTS[fault]
    seam, _, file = file.rpartition(":")
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    path = csrc / ("hip" if seam else "cuda") / file
    kernel = path.read_text()
    assert kernel.count(text) == 1
    path.write_text(kernel.replace(text, replacement))
    flags = ("-DFLASHDECPP_SIMULATED_FEW", *SEAMS[seam or "simulated"])
    assert run(source, csrc, tmp_path / source, *flags).returncode != 0
