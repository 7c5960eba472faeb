"""The one way of timing kernels: each call on inputs that no cache holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Calls = Sequence[Callable[[], object]]


def rotation(bytes_per_call: int, cache_bytes: int) -> int:
    """How many input sets to rotate among so that each call finds its data outside of the cache.

    Before a set's turn comes again, four times the cache have been read; the number of sets ends at 64.
    """
    return 1 + min(63, -(-4 * cache_bytes // bytes_per_call))


def graph_median_us(calls: Calls, replays: int = 30) -> float:
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


def wall_least_us(calls: Calls, seconds: float = 0.01, least: int = 3) -> float:
    """Microseconds of the fastest of calls on the CPU, in turn for so long and at least so often.

    The fastest, for whatever else runs on the machine only ever adds to the time, and with threads that wait
    for each other to more than half of the calls.
    """
    calls[-1]()  # whatever a first call sets up
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        call = calls[len(times) % len(calls)]
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    return min(times)
