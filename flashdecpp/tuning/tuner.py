"""Measures linear's implementations on this machine and derives the inflection points of each shape."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from flashdecpp import ops
from flashdecpp._library import gpu_library
from flashdecpp._memory import available_bytes, gigabytes

from .device import cache_bytes, device_name, environment
from .table import IMPLS, Profile, Shape, Table, TableError
from .timing import graph_median_us, rotation, wall_least_us

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

# Every time is the best of so many, each taken in its turn among all numbers of rows and implementations:
# what slows the machine for a while must not decide.
ROUNDS = 3

# The relative time that a further implementation must save, summed over the numbers of rows measured: less is
# as likely noise as a difference.
SWITCH_WORTH = 0.02


def tune(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, rows: Sequence[int] = ROWS
) -> Table:
    """Measures every shape for every number of rows; a progress bar on stderr.

    A GPU is timed by replays of CUDA graphs, a CPU by the clock, both with as many weights in turn as no
    cache holds. Raises TableError before anything is measured where a shape can't be.
    """
    check_shapes(shapes, dtype, device)
    record = environment(device)
    profiles = []
    with (
        torch.inference_mode(),
        tqdm(
            total=ROUNDS * len(rows) * sum(len(measured_impls(k, device)) for _, k in shapes),
            desc="tuning",
            file=sys.stderr,
            leave=False,
            disable=None,
        ) as bar,
    ):
        for n, k in shapes:
            bar.set_postfix_str(f"[{n}, {k}]", refresh=False)
            us = measure(n, k, dtype, device, rows, bar)
            m1, m2 = inflection_points(rows, us)
            profiles.append(Profile(dtype_name(dtype), n, k, m1, m2, tuple(rows), us, record))
    return Table(device.type, device_name(device), tuple(profiles))


def check_shapes(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> None:
    """Raises TableError for a shape that can't be measured here."""
    if device.type == "cuda" and not gpu_library().loaded:
        raise TableError(
            f"a GPU can't be tuned: its op library is not there ({gpu_library().problem}); "
            "`flashdecpp info` says what was built and why"
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
    """On a CPU gemv and flat_gemm are one kernel; on a GPU they need a K that is a multiple of 8."""
    if device.type == "cpu":
        return ("gemv", "blas")
    return IMPLS if k % 8 == 0 else ("blas",)


def measure(
    n: int, k: int, dtype: torch.dtype, device: torch.device, rows: Sequence[int], bar: tqdm
) -> dict[str, tuple[float, ...]]:
    """Microseconds of every implementation, for each number of rows; `bar` counts every time taken."""
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
        return wall_least_us(calls)
    with torch.cuda.device(x.device):
        return graph_median_us(calls, replays=12)


def inflection_points(rows: Sequence[int], us: Mapping[str, Sequence[float | None]]) -> tuple[int, int]:
    """m1 and m2 that lose the least: gemv below m1 rows, flat_gemm from m1 to m2, blas from m2 on.

    rows: rising. us: times of each implementation for these rows; an implementation or a time that is missing
        is never chosen, and some time must be there for each.

    Of all pairs of points among the rows (and beyond the last), the one with the smallest sum over the rows
    of how much longer the chosen implementation takes than the fastest, in proportion, and of SWITCH_WORTH
    for each change of implementation. So neither a single wrong time nor noise between two equals adds a
    range. Of equals: the one with more blas, then with more flat_gemm. Between two numbers of rows a point
    lies where the straight lines through the two times of both implementations meet.
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
    """The first number of rows for `after`, above rows[index - 1] and at most rows[index]."""
    if index == 0:
        return 1
    if index == len(rows):
        return rows[-1] + 1
    low, high = rows[index - 1], rows[index]
    if us[after][index - 1] is None:  # neither is taken where it was not measured
        return high
    if us[before][index] is None:
        return low + 1
    behind, ahead = us[after][index - 1] - us[before][index - 1], us[before][index] - us[after][index]
    if behind <= 0:
        return low + 1
    return high if ahead <= 0 else low + math.ceil((high - low) * behind / (behind + ahead))


def report(table: Table) -> Iterator[str]:
    """What was measured, a line for each shape."""
    for profile in table.profiles:
        gains = []
        for m, blas in zip(profile.m, profile.us["blas"], strict=True):
            gains.append(blas / profile.us[profile.choose(m)][profile.m.index(m)])
        mean = math.prod(gains) ** (1 / len(gains))
        yield (
            f"{profile.dtype} [{profile.n}, {profile.k}]: {ranges_text(profile)}; beside blas alone "
            f"{max(gains):.2f}x at M = {profile.m[gains.index(max(gains))]}, {mean:.2f}x in the mean"
        )


def ranges_text(profile: Profile) -> str:
    """Such as "gemv M = 1 to 5, blas M = 6 to 128"."""
    last = profile.m[-1]
    edges = (("gemv", 1, profile.m1), ("flat_gemm", profile.m1, profile.m2), ("blas", profile.m2, last + 1))
    return ", ".join(f"{impl} M = {start} to {end - 1}" for impl, start, end in edges if start < end)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
