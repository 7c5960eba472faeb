"""Every instruction set that the CPU kernels are built for, not only the best one of this processor."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flashdecpp import _C
from flashdecpp._library import cpu_instruction_set

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "avx512_amx", "neon"])
def test_small_cases_of_every_op(isa: str) -> None:
    if isa not in _C.build_info()["cpu_isas"].split(", "):  # from source: this processor's and the baseline
        pytest.skip(f"{isa} was not compiled; FLASHDECPP_CPU_ISAS=all compiles every instruction set")
    environment = {**os.environ, "FLASHDECPP_CPU_ISA": isa}
    ask = "from flashdecpp._library import cpu_instruction_set; print(cpu_instruction_set())"
    asked = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
    if "CPU lacks" in asked.stderr:
        pytest.skip(f"this processor lacks {isa}; its best is {cpu_instruction_set()}")
    assert asked.stdout.strip() == isa, asked.stderr
    script = Path(__file__).parent / "sanitize.py"
    result = subprocess.run(
        [sys.executable, str(script), "cpu"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "all within tolerance" in result.stdout


DEFINITIONS = {"best": [], "portable": ["-DFLASHDECPP_PORTABLE"], "tiles": ["-DFLASHDECPP_SIMULATED_TILES"]}


@pytest.mark.parametrize("define", DEFINITIONS.values(), ids=DEFINITIONS)
@pytest.mark.parametrize("arch", sorted({platform.machine(), "aarch64"}))
def test_kernels_without_torch(tmp_path: Path, arch: str, define: list[str]) -> None:
    """Compiled for the architecture and run natively or emulated (Debian: g++-aarch64-linux-gnu, qemu-user).

    AMX tile registers are simulated, because emulators lack them.
    """
    native = arch == platform.machine()
    compiler, emulator = ("c++", None) if native else (f"{arch}-linux-gnu-g++", f"qemu-{arch}")
    for program in filter(None, (compiler, emulator)):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    binary = str(tmp_path / "cpu_kernels")
    flags = ["-std=c++20", "-O1", "-fno-math-errno", "-ffp-contract=fast", "-static", *define]
    source = str(ROOT / "tests/cpu_kernels.cpp")
    subprocess.run([compiler, *flags, "-I", str(ROOT / "csrc"), source, "-o", binary], check=True)
    result = subprocess.run([*filter(None, (emulator,)), binary], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith(" lanes, 0 failures\n")
