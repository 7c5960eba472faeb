"""Times kernels on inputs that are not in any cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Calls = Sequence[Callable[[], object]]


def rotation(bytes_per_call: int, cache_bytes: int) -> int:
    """The number of input sets to rotate through so that each call reads its data from memory.

    Four times the cache is read before a set is used again. There are at most 64 sets.
    """
    return 1 + min(63, -(-4 * cache_bytes // bytes_per_call))


def graph_median_us(calls: Calls, replays: int = 30) -> float:
    """Median microseconds per call, from replays of a graph of all `calls`, each on its own inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # it may still be writing the inputs
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


def wall_min_us(calls: Calls, seconds: float = 0.01, least: int = 3) -> float:
    """Microseconds of the fastest call on the CPU, over `seconds` and at least `least` calls in rotation.

    The minimum rather than the median, because other load only adds time and, with threads that wait for each
    other, does so in more than half of the calls.
    """
    calls[-1]()  # warm up
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        call = calls[len(times) % len(calls)]
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    return min(times)
