"""How this folder measures: one way of timing, one way of recording."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

L2_BYTES = 50 << 20


def rotation(bytes_per_call: int) -> int:
    """How many input sets to rotate among so that each call finds its data outside of L2.

    Before a set's turn comes again, four times L2 have been read; at least twice L2 are in the sets together
    where the number of sets ends at 64 (from 1.6 MB a call on).
    """
    return 1 + min(63, -(-4 * L2_BYTES // bytes_per_call))


def graph_median_us(calls: Sequence[Callable[[], object]], replays: int = 30) -> float:
    """Median microseconds of one call, from graph replays of all `calls` (each on its own inputs) in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may still be writing the inputs
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def read_ceiling_gbs() -> float:
    """GB/s of a plain read on this GPU, measured now: the sum of 2 GiB, of two sets in turn."""
    sets = [torch.empty(1 << 29, dtype=torch.int32, device="cuda").random_() for _ in range(2)]
    microseconds = graph_median_us([partial(data.sum, dtype=torch.int32) for data in sets], replays=10)
    return sets[0].nbytes / microseconds / 1e3


def environment() -> dict[str, object]:
    """Where and when a result was measured, and the command that measures it again."""
    record: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        # A copy without .git is told what it is a copy of.
        "commit": os.environ.get("FLASHDECPP_COMMIT")
        or _git("describe", "--always", "--dirty", "--abbrev=40"),
        "command": f"python {shlex.join(_without_output(sys.argv))}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
        record |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": driver.stdout.split("\n")[0].strip(),
        }
    return record


def save(path: str | Path, results: object) -> None:
    """Writes results with their environment as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment(), "results": results}
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)


def _without_output(arguments: list[str]) -> list[str]:
    """The command line without `--output FILE`: where a result went is no part of how it was measured."""
    if "--output" not in arguments:
        return arguments
    at = arguments.index("--output")
    return arguments[:at] + arguments[at + 2 :]


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    return result.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
