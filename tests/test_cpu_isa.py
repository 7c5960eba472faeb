"""Every instruction set that the CPU kernels are built for, not only the best that this processor has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashdecpp._library import cpu_instruction_set


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_small_cases_of_every_op(isa: str) -> None:
    environment = {**os.environ, "FLASHDECPP_CPU_ISA": isa}
    ask = "from flashdecpp._library import cpu_instruction_set; print(cpu_instruction_set())"
    chosen = subprocess.run(
        [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    if chosen != isa:
        pytest.skip(f"this processor has no {isa}, its best is {cpu_instruction_set()}")
    script = Path(__file__).parent / "sanitize.py"
    result = subprocess.run(
        [sys.executable, str(script), "cpu"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "all within tolerance" in result.stdout
