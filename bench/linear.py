"""The linear implementations beside cuBLAS on one GPU: time over M for decode's weight shapes.

python bench/linear.py [--output bench/results/linear_h100.json]
"""

from __future__ import annotations

import argparse
from functools import partial

import measure
import torch
import torch.nn.functional as F

from flashdecpp import ops

# [N, K]: Llama-2-7B's four, Llama-3-8B's gate-up and lm_head, a small model's
SHAPES = [
    (12288, 4096),
    (4096, 4096),
    (22016, 4096),
    (4096, 11008),
    (28672, 4096),
    (128256, 4096),
    (1536, 1536),
]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128]


def measure_shape(n: int, k: int, dtype: torch.dtype) -> list[dict]:
    sets = measure.rotation(2 * n * k)
    weights = [torch.randn(n, k, dtype=dtype, device="cuda") * 0.02 for _ in range(sets)]
    rows = []
    for m in BATCHES:
        x = torch.randn(m, k, dtype=dtype, device="cuda")
        times = {
            "blas": measure.graph_median_us([partial(F.linear, x, w) for w in weights]),
            "auto": measure.graph_median_us([partial(ops.linear, x, w) for w in weights]),
            "flat_gemm": measure.graph_median_us([partial(ops.flat_gemm, x, w) for w in weights]),
        }
        if m <= 8:
            times["gemv"] = measure.graph_median_us([partial(ops.gemv, x, w) for w in weights])
        rows.append(
            {
                "n": n,
                "k": k,
                "m": m,
                "us": {name: round(us, 2) for name, us in times.items()},
                "auto_gbs": round(2 * (n * k + m * k + m * n) / times["auto"] / 1e3),
                "auto_over_blas": round(times["blas"] / times["auto"], 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--output", default="bench/results/linear_h100.json")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    rows = [row for n, k in SHAPES for row in measure_shape(n, k, dtype)]
    ceiling = round(measure.read_ceiling_gbs())
    measure.save(arguments.output, {"dtype": arguments.dtype, "read_ceiling_gbs": ceiling, "shapes": rows})


if __name__ == "__main__":
    main()
