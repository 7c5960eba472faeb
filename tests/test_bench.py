"""Dry or short runs of the benches that work without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_engines_dry_run(tmp_path):
    output = tmp_path / "engines.json"
    command = [sys.executable, BENCH / "engines.py", "--dry-run", "--engines", "flashdecpp,transformers"]
    done = subprocess.run([*command, "--output", output], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())["results"]
    for engine, figure in (("flashdecpp", "decode_ms"), ("transformers", "eager_decode_ms")):
        assert [row["sequences"] for row in results[engine]["results"]] == [1, 2]
        assert all(row[figure] > 0 and row["prefill_ms"] > 0 for row in results[engine]["results"])


@pytest.mark.demo
def test_short_run_on_a_busy_cpu(tmp_path):
    output, policies = tmp_path / "busy.json", ["command line", "passive, 1 thread"]
    command = [sys.executable, BENCH / "busy.py", "--rounds", "1", "--seconds", "0.1", "--output", output]
    command += ["--policies", ";".join(policies)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())["results"]
    assert results["passive, 1 thread"]["threads"] == 1
    for policy in policies:
        row = results[policy]
        assert row["alone_tokens_per_second"] > 0 and row["busy_tokens_per_second"] > 0
        ratio = row["alone_tokens_per_second"] / row["busy_tokens_per_second"]
        assert row["alone_over_busy"] == pytest.approx(ratio, rel=0.1)
