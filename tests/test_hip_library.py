"""The library for AMD GPUs, tested without one: its machine code, loading, and registered ops.

`make hip` builds it where clang and HIP's headers are available.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import hip_code
import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not hip_code.LIBRARY.exists(), reason="no HIP library: `make hip` builds one")

# Largest head_dim for which decode attention does not spill; the report lists the spills beyond it.
# A warp of 32 has 256 registers per lane, and the output needs head_dim / 2 of them.
NO_SPILLS = {"gfx90a": 128, "gfx942": 128, "gfx1100": 64}
MATRIX = ("decode_attention_kernel", "flat_gemm_kernel", "stream_gemv_kernel")


@pytest.fixture(scope="module")
def kernels() -> list[hip_code.Kernel]:
    return hip_code.kernels()


def head_dim(kernel: hip_code.Kernel) -> int:
    match = re.search(r"AttentionTile<\w+, \w+, (\d+)", kernel.name)
    return int(match[1]) if match else 0


def test_every_target_has_every_kernel(kernels: list[hip_code.Kernel]) -> None:
    by_target = {target: [k.name for k in kernels if k.target == target] for target in hip_code.TARGETS}
    assert by_target["gfx90a"] == by_target["gfx942"] == by_target["gfx1100"]
    assert len(by_target["gfx90a"]) == len(set(by_target["gfx90a"])) > 80


def test_matrix_instructions_are_where_they_belong(kernels: list[hip_code.Kernel]) -> None:
    for kernel in kernels:
        assert (kernel.counts["matrix"] > 0) == (kernel.family in MATRIX), kernel.name


def test_memory_is_read_16_bytes_at_a_time(kernels: list[hip_code.Kernel]) -> None:
    streams = (*MATRIX, "gemv_kernel")
    for kernel in kernels:
        vector = re.search(r", [48]>$", kernel.name) and kernel.family != "gemv_kernel"
        if kernel.family in streams or vector:
            assert kernel.counts["load128"] > 0, kernel.name


def test_registers_are_not_spilled(kernels: list[hip_code.Kernel]) -> None:
    allowed = {("gfx1100", "stream_gemv_kernel"): 4}  # of 256; each lane holds 16 weights of every row
    hot = [k for k in kernels if head_dim(k) <= NO_SPILLS[k.target]]
    spilling = [k for k in hot if k.vgpr_spills > allowed.get((k.target, k.family), 0)]
    assert [(k.target, k.name, k.vgpr_spills) for k in spilling] == []


def test_a_cta_fits_its_gpu(kernels: list[hip_code.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.shared <= 64 << 10, kernel.name
        assert kernel.warps > 0, kernel.name


def test_the_report_is_up_to_date(kernels: list[hip_code.Kernel]) -> None:
    recorded = hip_code.REPORT.read_text()
    if not recorded.startswith(hip_code.compiler() + ";"):
        pytest.skip(f"the report is of another compiler than {hip_code.compiler()}")
    assert hip_code.report(kernels) == recorded, "python tests/hip_code.py writes the new report"


# Stands in for HIP's runtime and the ROCm-only parts of torch that the library needs.
LOAD = """
import ctypes, sys, torch
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[2])
torch.ops.load_library(sys.argv[3])
for op in sorted(torch._C._dispatch_get_all_op_names()):
    if op.startswith("flashdecpp::"):
        key = "CPU" if op == "flashdecpp::_install_linear_table.gpu" else "CUDA"  # its rows are on the CPU
        print(op, torch._C._dispatch_has_kernel_for_dispatch_key(op, key))
"""


def test_it_loads_with_a_hip_runtime_and_registers_every_op(tmp_path: Path) -> None:
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", str(hip_code.LIBRARY)], capture_output=True, text=True, check=True
    ).stdout.split()
    missing = [
        name for name in undefined if re.match(r"(__)?hip[A-Z]\w+$|aoti_torch_get_current_cuda_stream", name)
    ]
    assert "__hipRegisterFatBinary" in missing
    stub = tmp_path / "stub.c"
    stub.write_text("".join(f"void* {name}(void) {{ static long x[64]; return x; }}\n" for name in missing))
    runtime = tmp_path / "libamdhip64.so"
    subprocess.run(["cc", "-w", "-shared", "-fPIC", str(stub), "-o", str(runtime)], check=True)
    cpu = ROOT / "flashdecpp/lib/libflashdecpp_cpu.so"
    command = [sys.executable, "-c", LOAD, str(runtime), str(cpu), str(hip_code.LIBRARY)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ops = dict(line.split() for line in result.stdout.splitlines())
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").rglob("*.cu"))
    expected = {f"flashdecpp::{name}" for name in re.findall(r'm\.impl\("([\w.]+)"', sources)}
    assert {op for op, registered in ops.items() if registered == "True"} == expected
    assert len(expected) > 10
