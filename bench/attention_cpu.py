"""decode_attention compared with torch's SDPA on a CPU, and with a plain read of the same caches.

Every round runs each contestant once, including a plain read of the keys and values (torch.amax), so that
drift in the machine's speed affects all of them alike. Results are medians over the rounds; "of_read" is the
median of the ratios to the read in the same round.

    python bench/attention_cpu.py [--rounds 9] [--output bench/results/attention_cpu.json]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from flashdecpp import ops
from flashdecpp._library import cpu_instruction_set

HEADS = {"mha 32/32": (32, 32), "gqa 32/8": (32, 8)}
BATCHES = {"1 x 32k": [32768], "8 x 4k": [4096] * 8, "ragged": [24576] + [1024] * 7}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIM = 128


def contestants(
    q_heads: int, kv_heads: int, lengths: list[int], dtype: torch.dtype
) -> tuple[dict[str, Callable[[], object]], int]:
    """The contestants by name, and the bytes of keys and values that each one reads."""
    tokens, batch = sum(lengths), len(lengths)
    cache = torch.randn(2, tokens, kv_heads, HEAD_DIM, dtype=dtype)
    q = torch.randn(batch, 1, q_heads, HEAD_DIM, dtype=dtype)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    # Random normal q and k give logits of unit variance, whose row maxima are near 4.
    phi = torch.full((q_heads,), 4.0)
    words = cache.view(torch.int32).flatten()
    turns: dict[str, Callable[[], object]] = {"read": lambda: words.amax()}

    for block_size in (16, 64):
        k, v = cache.view(2, -1, block_size, kv_heads, HEAD_DIM)
        blocks = torch.randperm(tokens // block_size).to(torch.int32)
        table = torch.zeros(batch, max(lengths) // block_size, dtype=torch.int32)
        for row, own in zip(table, blocks.split([n // block_size for n in lengths]), strict=True):
            row[: len(own)] = own

        def paged(k: Tensor = k, v: Tensor = v, table: Tensor = table, phi: Tensor | None = None) -> object:
            return ops.decode_attention(q, k, v, seq_lens, table, phi=phi)

        turns[f"paged {block_size}"] = paged
    turns["paged 16 unified"] = lambda paged=turns["paged 16"]: paged(phi=phi)

    if len(set(lengths)) == 1:
        k, v = cache.view(2, batch, lengths[0], kv_heads, HEAD_DIM)
        turns["contiguous"] = lambda: ops.decode_attention(q, k, v, seq_lens)
        turns["sdpa"] = lambda: F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=q_heads != kv_heads
        )
    else:  # SDPA does not support ragged batches: one call per sequence
        sequences = cache.split(lengths, dim=1)
        turns["sdpa"] = lambda: [
            F.scaled_dot_product_attention(
                row.transpose(0, 1), *own.transpose(1, 2), enable_gqa=q_heads != kv_heads
            )
            for row, own in zip(q, sequences, strict=True)
        ]
    return turns, cache.numel() * cache.element_size()


def measure_shape(turns: dict[str, Callable[[], object]], kv_bytes: int, rounds: int) -> dict[str, object]:
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(rounds + 1):
        for name, call in turns.items():
            start = time.perf_counter()
            call()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {
        "gbs": {name: round(kv_bytes / statistics.median(s) / 1e9, 1) for name, s in seconds.items()},
        "of_read": {
            name: round(statistics.median(r / s for r, s in zip(seconds["read"], own, strict=True)), 3)
            for name, own in seconds.items()
            if name != "read"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", default="bench/results/attention_cpu.json")
    options = parser.parse_args()
    rows = []
    for heads, (q_heads, kv_heads) in HEADS.items():
        for batch, lengths in BATCHES.items():
            for dtype in DTYPES:
                turns, kv_bytes = contestants(q_heads, kv_heads, lengths, dtype)
                shape = {"heads": heads, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
                rows.append({**shape, **measure_shape(turns, kv_bytes, options.rounds)})
                print(rows[-1], flush=True)
    measure.save(options.output, {"instruction_set": cpu_instruction_set(), "shapes": rows})


if __name__ == "__main__":
    main()
