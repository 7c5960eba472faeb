"""The benches that can be tried without a GPU hold together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"


def test_runner_dry_run():
    models = "llama-2-7b,opt-6.7b,chatglm2-6b"
    command = [sys.executable, BENCH / "runner.py", "--dry-run", "--models", models]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for part in ("decode", "prefill", "engine", "ablations", "quantized", "transformers"):
        assert f"llama-2-7b {part} " in done.stdout
    ratios = ("eager / drop-in eager", "generate / drop-in generate")
    assert all(f"'{ratio}': " in done.stdout for ratio in ratios)
    assert "'drop_in_attention_calls': {'prefill': " in done.stdout and "'errors': {}" in done.stdout
    assert "opt-6.7b decode " in done.stdout and "chatglm2-6b prefill " in done.stdout
