"""Measures linear's implementations on a device and derives the inflection points of each shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from flashdecpp import ops
from flashdecpp._library import gpu_library
from flashdecpp._memory import available_bytes, gigabytes
from flashdecpp._progress import progress_bar

from .device import cache_bytes, device_name, environment
from .table import IMPLS, Profile, Shape, Table, TableError
from .timing import graph_median_us, rotation, wall_min_us

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

# A time is the best of this many, one per pass over all numbers of rows and implementations, so that a
# temporary slowdown of the machine does not decide.
ROUNDS = 3

# The relative time, summed over the measured numbers of rows, that one more implementation must save.
# Smaller differences are likely noise.
SWITCH_WORTH = 0.02


def tune(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, rows: Sequence[int] = ROWS
) -> Table:
    """Measures every shape for every number of rows, with a progress bar.

    A GPU is timed by replays of CUDA graphs, a CPU by the wall clock, both rotating through more weights than
    the caches hold. Raises TableError, before measuring anything, for a shape that cannot be measured.
    """
    check_shapes(shapes, dtype, device)
    record = environment(device)
    profiles = []
    with (
        torch.inference_mode(),
        progress_bar(
            total=ROUNDS * len(rows) * sum(len(measured_impls(k, device)) for _, k in shapes),
            desc="tuning",
            unit=" timings",
        ) as bar,
    ):
        for n, k in shapes:
            bar.set_postfix_str(f"[{n}, {k}]", refresh=False)
            us = measure(n, k, dtype, device, rows, bar)
            m1, m2 = inflection_points(rows, us)
            profiles.append(Profile(dtype_name(dtype), n, k, m1, m2, tuple(rows), us, record))
    return Table(device.type, device_name(device), tuple(profiles))


def check_shapes(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> None:
    """Raises TableError for a shape that cannot be measured on the device."""
    if device.type == "cuda" and not gpu_library().loaded:
        raise TableError(
            f"a GPU can't be tuned: its op library is not loaded ({gpu_library().problem}); "
            "`flashdecpp info` shows what was built and why"
        )
    free = available_bytes(device)
    for n, k in shapes:
        need = weights_needed(n, k, dtype, device) * n * k * dtype.itemsize
        if need > free:
            raise TableError(
                f"measuring [{n}, {k}] needs {gigabytes(need)} on {device}, where {gigabytes(free)} are free"
            )


def weights_needed(n: int, k: int, dtype: torch.dtype, device: torch.device) -> int:
    return rotation(n * k * dtype.itemsize, cache_bytes(device))


def measured_impls(k: int, device: torch.device) -> tuple[str, ...]:
    """Those to measure: gemv and flat_gemm are one kernel on a CPU, and need K % 8 == 0 on a GPU."""
    if device.type == "cpu":
        return ("gemv", "blas")
    return IMPLS if k % 8 == 0 else ("blas",)


def measure(
    n: int, k: int, dtype: torch.dtype, device: torch.device, rows: Sequence[int], bar: tqdm
) -> dict[str, tuple[float, ...]]:
    """Microseconds of every implementation per number of rows. Advances `bar` once per measurement."""
    weight = torch.randn(n, k, dtype=dtype, device=device).mul_(k**-0.5)
    weights = [weight, *(weight.clone() for _ in range(weights_needed(n, k, dtype, device) - 1))]
    inputs = [torch.randn(m, k, dtype=dtype, device=device) for m in rows]
    us = {impl: [math.inf] * len(rows) for impl in measured_impls(k, device)}
    for _ in range(ROUNDS):
        for index, x in enumerate(inputs):
            for impl, column in us.items():
                column[index] = min(column[index], _time_us(x, weights, impl))
                bar.update()
    return {impl: tuple(round(time, 2) for time in column) for impl, column in us.items()}


def _time_us(x: Tensor, weights: Sequence[Tensor], impl: str) -> float:
    calls = [partial(ops.linear, x, weight, impl=impl) for weight in weights]
    if x.device.type == "cpu":
        return wall_min_us(calls)
    with torch.cuda.device(x.device):
        return graph_median_us(calls, replays=12)


def inflection_points(rows: Sequence[int], us: Mapping[str, Sequence[float | None]]) -> tuple[int, int]:
    """The m1 and m2 that lose least time: gemv below m1 rows, flat_gemm from m1 to m2, blas from m2 on.

    rows: in ascending order. us: times of each implementation for these rows. Missing implementations and
        times are never chosen; every number of rows needs at least one time.

    The cost of a pair of points is the relative time lost to the fastest implementation, summed over the
    rows, plus SWITCH_WORTH per change of implementation. Hence neither a single wrong time nor noise between
    equals adds a range. Ties go to more blas, then to more flat_gemm. Between two numbers of rows, a point is
    where the straight lines through the times of both implementations intersect.
    """
    count = len(rows)
    fastest = [min(us[impl][i] or math.inf for impl in us) for i in range(count)]
    lost = {
        impl: [((us[impl][i] if impl in us else None) or math.inf) / fastest[i] - 1 for i in range(count)]
        for impl in IMPLS
    }

    def cost(first: int, second: int) -> float:
        ranges = {"gemv": range(first), "flat_gemm": range(first, second), "blas": range(second, count)}
        used = [impl for impl, indices in ranges.items() if indices]
        return sum(lost[impl][i] for impl in used for i in ranges[impl]) + SWITCH_WORTH * (len(used) - 1)

    pairs = [(first, second) for second in range(count + 1) for first in range(second + 1)]
    first, second = min(pairs, key=lambda pair: cost(*pair))
    if first == second:
        m = _switch(rows, us, first, "gemv", "blas")
        return m, m
    return _switch(rows, us, first, "gemv", "flat_gemm"), _switch(rows, us, second, "flat_gemm", "blas")


def _switch(
    rows: Sequence[int], us: Mapping[str, Sequence[float | None]], index: int, before: str, after: str
) -> int:
    """The first number of rows for `after`, interpolated between rows[index - 1] and rows[index]."""
    if index == 0:
        return 1
    if index == len(rows):
        return rows[-1] + 1
    low, high = rows[index - 1], rows[index]
    before_low, after_low = us[before][index - 1], us[after][index - 1]
    before_high, after_high = us[before][index], us[after][index]
    # An implementation is never used for rows that it was not measured for.
    if before_low is None or after_low is None:
        return high
    if before_high is None or after_high is None:
        return low + 1
    loss, gain = after_low - before_low, before_high - after_high
    if loss <= 0:
        return low + 1
    return high if gain <= 0 else low + math.ceil((high - low) * loss / (loss + gain))


def report(table: Table) -> Iterator[str]:
    """Summarizes the measurements, a line per shape."""
    for profile in table.profiles:
        gains = {}
        for index, (m, blas) in enumerate(zip(profile.m, profile.us["blas"], strict=True)):
            time = profile.us[profile.choose(m) or "blas"][index]
            if blas is not None and time is not None:
                gains[m] = blas / time
        best = max(gains, key=lambda m: gains[m])
        mean = math.prod(gains.values()) ** (1 / len(gains))
        yield (
            f"{profile.dtype} [{profile.n}, {profile.k}]: {ranges_text(profile)}; compared with blas alone "
            f"{gains[best]:.2f}x at M = {best}, {mean:.2f}x on average"
        )


def ranges_text(profile: Profile) -> str:
    """The ranges of the implementations, such as "gemv M = 1 to 5, blas M = 6 to 128"."""
    last = profile.m[-1]
    edges = (("gemv", 1, profile.m1), ("flat_gemm", profile.m1, profile.m2), ("blas", profile.m2, last + 1))
    return ", ".join(f"{impl} M = {start} to {end - 1}" for impl, start, end in edges if start < end)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
