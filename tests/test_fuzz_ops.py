"""A short run of tests/fuzz_ops.py, which makes thousands of calls when run on its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_ops.py")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_random_calls(device: str) -> None:
    """Ops compute or refuse a call, but never crash or return a wrong result."""
    command = [sys.executable, str(SCRIPT), "--count", "600", "--seed", "2026", "--device", device]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert "600 calls" in result.stdout
