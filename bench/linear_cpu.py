"""Linear layers on a CPU compared with torch's: time, GB/s of weights, and speedup.

    python bench/linear_cpu.py [--threads N] [--rows 1 2 4 8] [--output bench/results/linear_cpu.json]

Every contestant rotates through copies of its weights that total 256 MB, so that each call reads them from
memory. Contestants take turns, so that drift in the machine's speed affects all of them alike; each time is
the median of all calls.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import measure
import torch
import torch.nn.functional as F
from tqdm import tqdm

from flashdecpp import ops
from flashdecpp._library import cpu_instruction_set

# [N, K] of Llama-2-7B's attention and feed-forward layers, then the demo model's
SHAPES = [(4096, 4096), (22016, 4096), (3072, 576), (576, 1536)]
ROWS = (1, 2, 4, 8)
FORMATS = {"int8": (8, None), "int8 g32": (8, 32), "int4 g32": (4, 32), "int4 g128": (4, 128)}
ROTATION_BYTES = 256 << 20
ROUNDS = 7  # after a warm-up round

Call = Callable[[torch.Tensor], torch.Tensor]


def dense(n: int, k: int, dtype: torch.dtype, linear: Callable) -> tuple[Call, int]:
    weight = torch.randn(n, k, dtype=torch.bfloat16).to(dtype)
    return lambda x: linear(x, weight), weight.nbytes


def quantized(n: int, k: int, bits: int, group: int | None) -> tuple[Call, int]:
    weight = torch.randint(0, 127, (n, k * bits // 8), dtype=torch.uint8 if bits == 4 else torch.int8)
    scales = torch.rand((n,) if group is None else (n, k // group)).half()
    return lambda x: ops.quantized_linear(x, weight, scales), weight.nbytes + scales.nbytes


def contestants(n: int, k: int) -> dict[str, Callable[[], tuple[Call, int]]]:
    makers = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        makers[name] = lambda dtype=dtype: dense(n, k, dtype, ops.linear)
        makers["torch " + name] = lambda dtype=dtype: dense(n, k, dtype, F.linear)
    for name, (bits, group) in FORMATS.items():
        if group is None or k % group == 0:
            makers[name] = lambda bits=bits, group=group: quantized(n, k, bits, group)
    return makers


def measure_shape(n: int, k: int, rows: list[int]) -> list[dict]:
    calls: dict[str, list[Call]] = {}
    nbytes = {}
    for name, make in contestants(n, k).items():
        call, nbytes[name] = make()
        sets = max(1, min(64, ROTATION_BYTES // nbytes[name]))
        calls[name] = [call] + [make()[0] for _ in range(sets - 1)]
    results = []
    for m in rows:
        x = torch.randn(m, k, dtype=torch.bfloat16)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(ROUNDS + 1):
            for name, own in calls.items():
                argument = x.float() if name.endswith("float32") else x
                for call in own:
                    begin = time.perf_counter()
                    call(argument)
                    if turn:
                        times[name].append(time.perf_counter() - begin)
        seconds = {name: statistics.median(taken) for name, taken in times.items()}
        results.append(
            {
                "n": n,
                "k": k,
                "m": m,
                "us": {name: round(value * 1e6, 1) for name, value in seconds.items()},
                "gbs": {name: round(nbytes[name] / value / 1e9, 1) for name, value in seconds.items()},
                "over_torch": {
                    name: round(seconds["torch " + name] / seconds[name], 2)
                    for name in ("float32", "bfloat16")
                },
                "over_bfloat16": {
                    name: round(seconds["bfloat16"] / seconds[name], 2) for name in FORMATS if name in seconds
                },
            }
        )
        print(results[-1], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--output", default="bench/results/linear_cpu.json")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with torch.inference_mode():
        shapes = [row for shape in tqdm(SHAPES, disable=None) for row in measure_shape(*shape, options.rows)]
    measure.save(options.output, {"instruction_set": cpu_instruction_set(), "shapes": shapes})


if __name__ == "__main__":
    main()
