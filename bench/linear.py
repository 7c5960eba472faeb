"""The linear implementations compared with cuBLAS on one GPU.

python bench/linear.py             time as a function of M for the weight shapes of decoding
python bench/linear.py --chain     also all 128 linears of a decode step of Llama-2-7B in one graph
python bench/linear.py --fused     also the same with norms, gates and residual sums, fused and unfused
python bench/linear.py --quantized also int8 and int4 weights compared with float16

[--skip-shapes] [--dtypes float16,bfloat16] [--output bench/results/linear_h100.json]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from flashdecpp import ops
from flashdecpp.quantization import QuantizedWeight, quantize

# [N, K]: Llama-2-7B's four, Llama-3-8B's, Llama-2-13B's QKV, two small ones
SHAPES = [
    (12288, 4096),
    (4096, 4096),
    (22016, 4096),
    (4096, 11008),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (128256, 4096),
    (15360, 5120),
    (1536, 1536),
    (8192, 1024),
]
ROWS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
GEMV_ROWS = 16  # gemv is timed up to this M
ROUNDS = 2  # each time is the best of this many medians, taken in turns
LAYERS, LAYER = 32, [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]  # Llama-2-7B
CHAIN_ROWS = [1, 8, 32]
FUSED_ROWS = [1, 2, 4, 8, 12, 16, 32, 64]
FORMATS = {  # of quantized weights
    "int8": {"bits": 8},
    "int8 g128": {"bits": 8, "group_size": 128},
    "int4 g32": {"bits": 4, "group_size": 32},
    "int4 g128": {"bits": 4, "group_size": 128},
    "int4 g32 offsets": {"bits": 4, "group_size": 32, "symmetric": False},
}
QUANTIZED_ROWS = [1, 8, 16]

Linear = Callable[[Tensor, Tensor], Tensor]


def best_us(calls: dict[str, list[Callable[[], object]]], replays: int) -> dict[str, float]:
    times = dict.fromkeys(calls, math.inf)
    for _ in range(ROUNDS):
        for name, sets in calls.items():
            times[name] = min(times[name], measure.graph_median_us(sets, replays))
    return times


def measure_shape(n: int, k: int, dtype: torch.dtype) -> list[dict]:
    sets = measure.rotation(2 * n * k)
    weights = [torch.randn(n, k, dtype=dtype, device="cuda") * k**-0.5 for _ in range(sets)]
    results = []
    for m in ROWS:
        x = torch.randn(m, k, dtype=dtype, device="cuda")
        contestants: dict[str, Linear] = {"blas": F.linear, "auto": ops.linear, "flat_gemm": ops.flat_gemm}
        if m <= GEMV_ROWS:
            contestants["gemv"] = ops.gemv
        times = best_us(
            {name: [partial(linear, x, w) for w in weights] for name, linear in contestants.items()}, 10
        )
        results.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "n": n,
                "k": k,
                "m": m,
                "auto": ops.linear_choice(x, weights[0]),
                "us": {name: round(us, 2) for name, us in times.items()},
                "auto_gbs": round(2 * (n * k + m * k + m * n) / times["auto"] / 1e3),
                "auto_over_blas": round(times["blas"] / times["auto"], 3),
            }
        )
    return results


def measure_chain(dtype: torch.dtype) -> list[dict]:
    """All linear layers of a decode step, each applied to the previous one's output."""
    weights = [
        torch.randn(n, k, dtype=dtype, device="cuda") * k**-0.5 for _ in range(LAYERS) for n, k in LAYER
    ]
    weight_bytes = sum(w.nbytes for w in weights)

    def run(linear: Linear, x: Tensor) -> None:
        for w in weights:
            x = linear(x[:, : w.size(1)], w)

    results = []
    for m in CHAIN_ROWS:
        x = torch.randn(m, LAYER[0][1], dtype=dtype, device="cuda")
        times = best_us({"blas": [partial(run, F.linear, x)], "auto": [partial(run, ops.linear, x)]}, 10)
        results.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "m": m,
                "us": {name: round(us, 1) for name, us in times.items()},
                "auto_gbs": round(weight_bytes / times["auto"] / 1e3),
                "blas_gbs": round(weight_bytes / times["blas"] / 1e3),
            }
        )
    return results


@dataclass
class Layer:
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    attention_norm: Tensor
    ffn_norm: Tensor


def run_unfused(layers: list[Layer], residual: Tensor, linear: Linear) -> None:
    """A decode step without attention, with one launch per op: 7 per layer."""
    x = torch.zeros_like(residual)
    for layer in layers:
        qkv = linear(ops.rms_norm(x, layer.attention_norm, residual), layer.qkv)
        x = linear(qkv[:, : layer.out.size(1)], layer.out)
        gate_up = linear(ops.rms_norm(x, layer.ffn_norm, residual), layer.gate_up)
        x = linear(ops.gated_activation(gate_up), layer.down)


def run_fused(layers: list[Layer], residual: Tensor) -> None:
    """The same step with gates and residual sums fused into `linear`: 6 launches per layer."""
    for layer in layers:
        qkv = ops.linear(residual, layer.qkv, norm_weight=layer.attention_norm)
        ops.linear(qkv[:, : layer.out.size(1)], layer.out, residual=residual)
        gated = ops.linear(residual, layer.gate_up, norm_weight=layer.ffn_norm, gate="silu")
        ops.linear(gated, layer.down, residual=residual)


def measure_fused(dtype: torch.dtype) -> list[dict]:
    """Llama-2-7B's decode step without attention, norms and gates included."""
    hidden = LAYER[0][1]
    layers = [
        Layer(
            *(torch.randn(n, k, dtype=dtype, device="cuda") * k**-0.5 for n, k in LAYER),
            *(torch.ones(hidden, dtype=dtype, device="cuda") for _ in range(2)),
        )
        for _ in range(LAYERS)
    ]
    weight_bytes = 2 * LAYERS * sum(n * k for n, k in LAYER)
    results = []
    for m in FUSED_ROWS:
        residual = torch.randn(m, hidden, dtype=dtype, device="cuda")
        times = best_us(
            {
                "blas": [partial(run_unfused, layers, residual, F.linear)],
                "unfused": [partial(run_unfused, layers, residual, ops.linear)],
                "fused": [partial(run_fused, layers, residual)],
            },
            10,
        )
        results.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "m": m,
                "us": {name: round(us, 1) for name, us in times.items()},
                "gbs": {name: round(weight_bytes / us / 1e3) for name, us in times.items()},
            }
        )
    return results


def measure_quantized(n: int, k: int, dtype: torch.dtype) -> list[dict]:
    """Compares every format with linear on the same weight in `dtype`."""
    dense = torch.randn(n, k, dtype=dtype, device="cuda") * k**-0.5
    weights = {
        name: quantize(dense, **arguments, scales_dtype=torch.float16) for name, arguments in FORMATS.items()
    }
    copies = {name: [_copy(w) for _ in range(measure.rotation(w.nbytes))] for name, w in weights.items()}
    denses = [dense.clone() for _ in range(measure.rotation(dense.nbytes))]
    results = []
    for m in QUANTIZED_ROWS:
        x = torch.randn(m, k, dtype=dtype, device="cuda")
        calls = {name: [partial(w.linear, x) for w in sets] for name, sets in copies.items()}
        times = best_us({"dense": [partial(ops.linear, x, w) for w in denses], **calls}, 10)
        results.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "n": n,
                "k": k,
                "m": m,
                "us": {name: round(us, 2) for name, us in times.items()},
                "over_dense": {name: round(times["dense"] / times[name], 2) for name in weights},
                "gbs": {name: round(w.nbytes / times[name] / 1e3) for name, w in weights.items()},
            }
        )
    return results


def _copy(weight: QuantizedWeight) -> QuantizedWeight:
    offsets = None if weight.offsets is None else weight.offsets.clone()
    return QuantizedWeight(weight.weight.clone(), weight.scales.clone(), offsets)


def host_us(call: Callable[[], object], calls: int = 2000) -> float:
    """The host's cost per call outside of graphs. The GPU's work must take less time than that."""
    best = math.inf
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - begin)
    return best / calls * 1e6


def measure_host() -> dict[str, float]:
    x = torch.randn(1, 1024, dtype=torch.float16, device="cuda")
    weight = torch.randn(256, 1024, dtype=torch.float16, device="cuda")
    calls = {
        "torch.nn.functional.linear": partial(F.linear, x, weight),
        "ops.linear": partial(ops.linear, x, weight),
        "torch.ops.flashdecpp.linear": partial(torch.ops.flashdecpp.linear, x, weight),
        "torch.ops.flashdecpp.linear, impl gemv": partial(
            torch.ops.flashdecpp.linear, x, weight, impl="gemv"
        ),
        "torch.ops.flashdecpp.linear, impl flat_gemm": partial(
            torch.ops.flashdecpp.linear, x, weight, impl="flat_gemm"
        ),
    }
    with torch.inference_mode():
        return {name: round(host_us(call), 2) for name, call in calls.items()}


def summary(rows: list[dict], ceiling: float) -> dict:
    """Geometric means and worst cases of `rows`."""
    flat = [row for row in rows if row["m"] <= 64]
    worst = min(rows, key=lambda row: row["auto_over_blas"])
    large = [row for row in flat if 2 * row["n"] * row["k"] > 80e6]
    slowest = min(large, key=lambda row: row["auto_gbs"])

    def mean(values: list[float]) -> float:
        return round(math.exp(sum(map(math.log, values)) / len(values)), 3)

    return {
        "auto_over_blas, geometric mean over M <= 64": mean([row["auto_over_blas"] for row in flat]),
        "by shape": {
            f"[{n}, {k}]": mean([row["auto_over_blas"] for row in flat if (row["n"], row["k"]) == (n, k)])
            for n, k in SHAPES
        },
        "by rows": {str(m): mean([row["auto_over_blas"] for row in rows if row["m"] == m]) for m in ROWS},
        "worst": worst,
        "weights over 80 MB, M <= 64, of the read ceiling": {
            "mean": mean([row["auto_gbs"] / ceiling for row in large]),
            "least": {"of_ceiling": round(slowest["auto_gbs"] / ceiling, 3)} | slowest,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", default="float16,bfloat16")
    parser.add_argument("--chain", action="store_true")
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--quantized", action="store_true")
    parser.add_argument("--skip-shapes", action="store_true", help="only what the other options ask for")
    parser.add_argument("--output", default="bench/results/linear_h100.json")
    arguments = parser.parse_args()
    dtypes = [getattr(torch, name) for name in arguments.dtypes.split(",")]
    ceiling = measure.read_ceiling_gbs()
    results: dict[str, object] = {"read_ceiling_gbs": round(ceiling)}
    rows = []
    for dtype in [] if arguments.skip_shapes else dtypes:
        for n, k in SHAPES:
            rows += measure_shape(n, k, dtype)
            for row in rows[-len(ROWS) :]:
                print(
                    f"{row['dtype']} [{n}, {k}] M {row['m']}: {row['auto']} {row['us']} "
                    f"{row['auto_gbs']} GB/s, {row['auto_over_blas']}",
                    flush=True,
                )
    if rows:
        results |= {"summary": summary(rows, ceiling), "host_us": measure_host(), "shapes": rows}
        print(results["summary"], results["host_us"])
    if arguments.chain:
        results["chain"] = [row for dtype in dtypes for row in measure_chain(dtype)]
        for row in results["chain"]:
            print(row)
    if arguments.fused:
        results["fused"] = [row for dtype in dtypes for row in measure_fused(dtype)]
        for row in results["fused"]:
            print(row)
    if arguments.quantized:
        large = [(n, k) for n, k in SHAPES if 2 * n * k > 80e6 and 2 * n * k < 500e6]
        results["quantized"] = [row for n, k in large for row in measure_quantized(n, k, dtypes[0])]
        for row in results["quantized"]:
            print(row)
    measure.save(arguments.output, results)


if __name__ == "__main__":
    main()
