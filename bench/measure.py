"""Timing and recording shared by all benchmarks in this folder."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from flashdecpp.tuning import device, timing
from flashdecpp.tuning.timing import graph_median_us as graph_median_us

L2_BYTES = 50 << 20  # of an H100; used for every GPU, so that results are comparable


def rotation(bytes_per_call: int) -> int:
    """How many input sets to rotate among so that each call finds its data outside of L2."""
    return timing.rotation(bytes_per_call, L2_BYTES)


def read_ceiling_gbs() -> float:
    """Measures this GPU's read bandwidth in GB/s by summing 2 GiB, alternating between two sets."""
    sets = [torch.empty(1 << 29, dtype=torch.int32, device="cuda").random_() for _ in range(2)]
    microseconds = graph_median_us([partial(data.sum, dtype=torch.int32) for data in sets], replays=10)
    return sets[0].nbytes / microseconds / 1e3


def environment() -> dict[str, object]:
    """Where and when a result was measured, and the command that reproduces it."""
    record: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        # Copies without .git get their commit from the environment.
        "commit": os.environ.get("FLASHDECPP_COMMIT")
        or _git("describe", "--always", "--dirty", "--abbrev=40"),
        "command": f"python {shlex.join(_without_output(sys.argv))}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": device.cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        record |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": device.driver_version(),
        }
    return record


def save(path: str | Path, results: object) -> None:
    """Writes results and their environment as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment(), "results": results}
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)


def _without_output(arguments: list[str]) -> list[str]:
    """The command line without `--output FILE`, which does not affect the measurement."""
    if "--output" not in arguments:
        return arguments
    at = arguments.index("--output")
    return arguments[:at] + arguments[at + 2 :]


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    return result.stdout.strip()
