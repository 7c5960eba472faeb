"""quantized_linear on the CPU beside the bfloat16 linear of the same shape: time and GB/s of weights.

    python bench/quantized_cpu.py [--output bench/results/quantized_cpu.json]

Weights rotate among sets of 256 MB together, so that every call reads them from memory; the median call of
five rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import measure
import torch

from flashdecpp import ops

# [N, K]: Llama-2-7B's attention and FFN, and the demo model's
SHAPES = [(4096, 4096), (4096, 11008), (3072, 576), (576, 1536)]
FORMATS = {"int8": (8, None), "int8 g32": (8, 32), "int4 g32": (4, 32), "int4 g128": (4, 128)}
ROWS = (1, 2, 4, 8, 512)
ROTATION_BYTES = 256 << 20
ROUNDS = 5


def dense(n: int, k: int, dtype: torch.dtype) -> tuple[Callable, int]:
    weight = torch.randn(n, k, dtype=torch.bfloat16).to(dtype)
    return lambda x: ops.linear(x, weight), weight.nbytes


def quantized(n: int, k: int, bits: int, group: int | None, offsets: bool) -> tuple[Callable, int]:
    weight = torch.randint(0, 127, (n, k * bits // 8), dtype=torch.uint8 if bits == 4 else torch.int8)
    scales = torch.rand((n,) if group is None else (n, k // group)).half()
    minima = scales.clone() if offsets else None
    nbytes = weight.nbytes + scales.nbytes * (2 if offsets else 1)
    return lambda x: ops.quantized_linear(x, weight, scales, minima), nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--output", default="bench/results/quantized_cpu.json")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    results = []
    for n, k in SHAPES:
        makers = {options.dtype: partial(dense, n, k, dtype)}
        for name, (bits, group) in FORMATS.items():
            if group is not None and k % group:
                continue
            for offsets in (False, True) if bits == 4 else (False,):
                label = name + (" offsets" if offsets else "")
                makers[label] = partial(quantized, n, k, bits, group, offsets)
        times: dict[str, dict[int, float]] = {}
        nbytes = {}
        for name, make in makers.items():
            call, nbytes[name] = make()
            sets = max(1, min(64, ROTATION_BYTES // nbytes[name]))
            calls = [call] + [make()[0] for _ in range(sets - 1)]
            inputs = {rows: torch.randn(rows, k).to(dtype) for rows in options.rows}
            times[name] = {rows: median_seconds(calls, x) for rows, x in inputs.items()}
            del calls
        for name, by_rows in times.items():
            for rows, seconds in by_rows.items():
                results.append(
                    {
                        "n": n,
                        "k": k,
                        "weight": name,
                        "rows": rows,
                        "microseconds": round(seconds * 1e6, 1),
                        "weight_gb_per_s": round(nbytes[name] / seconds / 1e9, 1),
                        "times_as_fast": round(times[options.dtype][rows] / seconds, 2),
                    }
                )
                print(results[-1], flush=True)
    workload = {"x": options.dtype, "scales": "float16", "rounds": ROUNDS}
    measure.save(options.output, {"workload": workload, "shapes": results})


def median_seconds(calls: list[Callable], x: torch.Tensor) -> float:
    """Of one call, over rounds of all; each on its own weights."""
    times = []
    for turn in range(ROUNDS + 1):
        for call in calls:
            begin = time.perf_counter()
            call(x)
            if turn:  # the first round warms up
                times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main()
