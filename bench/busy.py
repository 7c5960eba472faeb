"""Decode tokens/s of the demo model on a CPU, alone and beside processes that keep every core busy.

Each waiting policy of OpenMP runs in a process of its own, since OpenMP reads its environment once. They
take turns, so that drift in the machine's speed affects them alike. Keep the machine otherwise idle.

    python bench/busy.py [--rounds 5] [--output FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from flashdecpp import _threads

PROMPT_TOKENS, DECODE_TOKENS = 32, 32
# Name -> environment and threads.
POLICIES: dict[str, tuple[dict[str, str], int | None]] = {
    "command line": (_threads.SHORT_WAITS, None),
    "OpenMP's default": ({}, None),
    "OMP_WAIT_POLICY=passive": ({"OMP_WAIT_POLICY": "passive"}, None),
    "GOMP_SPINCOUNT=10": ({"GOMP_SPINCOUNT": "10"}, None),
    "GOMP_SPINCOUNT=100": ({"GOMP_SPINCOUNT": "100"}, None),
    "GOMP_SPINCOUNT=1000": ({"GOMP_SPINCOUNT": "1000"}, None),
    "GOMP_SPINCOUNT=10000": ({"GOMP_SPINCOUNT": "10000"}, None),
    "passive, 1 thread": ({"OMP_WAIT_POLICY": "passive"}, 1),
}


def child(policy: str, seconds: float) -> None:
    """Prints tokens/s for every line of standard input."""
    import torch

    from flashdecpp import LLM, SamplingParams

    _threads.use_threads(POLICIES[policy][1])
    llm = LLM("demo", device="cpu", prefix_cache=False)
    prompt = torch.randint(100, 40_000, (PROMPT_TOKENS,)).tolist()
    params = SamplingParams(max_tokens=DECODE_TOKENS + 1, ignore_eos=True)
    print(torch.get_num_threads(), flush=True)
    for _ in sys.stdin:
        pieces = llm.stream(prompt, params)
        next(pieces)
        first = last = time.perf_counter()
        tokens = 0
        while tokens < DECODE_TOKENS and (tokens < 2 or last - first < seconds):
            tokens += next(pieces).token_id is not None
            last = time.perf_counter()
        pieces.close()
        print(tokens / (last - first), flush=True)


class Contestant:
    """A process that decodes under one policy when it is asked to."""

    def __init__(self, policy: str, seconds: float) -> None:
        environment = {name: v for name, v in os.environ.items() if name not in _threads.WAITING_VARIABLES}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", policy, "--seconds", str(seconds)],
            env={**environment, **POLICIES[policy][0]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.threads = int(self._answer())

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def tokens_per_second(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@contextmanager
def every_core_busy() -> Iterator[None]:
    # They end with this process, however it ends.
    loop = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10_000))"
    loops = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(_threads.allowed_cpus())]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in loops:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="most time for one answer")
    parser.add_argument("--policies", help="some of them, separated by semicolons")
    parser.add_argument("--output", default="bench/results/busy_cpu.json")
    parser.add_argument("--child", choices=list(POLICIES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.seconds)
        return

    import measure

    names = options.policies.split(";") if options.policies else list(POLICIES)
    load = os.getloadavg()[0]
    alone: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        contestants = {name: stack.enter_context(Contestant(name, options.seconds)) for name in names}
        for contestant in contestants.values():  # warms up
            contestant.tokens_per_second()
        for _ in range(options.rounds):
            for name, contestant in contestants.items():
                alone[name].append(contestant.tokens_per_second())
            with every_core_busy():
                for name, contestant in contestants.items():
                    busy[name].append(contestant.tokens_per_second())

    results: dict[str, object] = {}
    print(f"{'tokens/s':24} threads  alone   busy  alone / busy")
    for name, contestant in contestants.items():
        quiet, loaded = statistics.median(alone[name]), statistics.median(busy[name])
        print(f"{name:24} {contestant.threads:7} {quiet:6.1f} {loaded:6.1f} {quiet / loaded:13.1f}")
        results[name] = {
            "threads": contestant.threads,
            "alone_tokens_per_second": round(quiet, 2),
            "alone_range": [round(min(alone[name]), 2), round(max(alone[name]), 2)],
            "busy_tokens_per_second": round(loaded, 2),
            "busy_range": [round(min(busy[name]), 2), round(max(busy[name]), 2)],
            "alone_over_busy": round(quiet / loaded, 2),
        }
    workload = {
        "model": "SmolLM2-135M-Instruct (demo), bfloat16, weights as stored",
        "decode": f"{DECODE_TOKENS} tokens after {PROMPT_TOKENS}, or {options.seconds:g} s, batch 1, "
        f"median of {options.rounds}",
        "busy": f"beside {_threads.allowed_cpus()} processes that loop in Python, one per CPU",
        "load average before": round(load, 2),
    }
    measure.save(options.output, {"workload": workload, **results})


if __name__ == "__main__":
    main()
