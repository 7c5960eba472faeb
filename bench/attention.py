"""decode_attention beside torch's SDPA (flash, cuDNN) on one GPU: contiguous and paged, online and unified.

python bench/attention.py [--output bench/results/attention_h100.json]
"""

from __future__ import annotations

import argparse

import measure
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashdecpp import ops

HEADS = {"mha 32/32": (32, 32), "gqa 32/8": (32, 8), "gqa 64/8": (64, 8), "gqa 28/4": (28, 4)}
LENGTHS = [
    (1, 1024),
    (1, 8192),
    (1, 32768),
    (1, 131072),
    (8, 1024),
    (8, 8192),
    (32, 1024),
    (32, 4096),
    (64, 2048),
    (128, 1024),
]
HEAD_DIM, BLOCK_SIZE = 128, 16


def measure_shape(q_heads: int, kv_heads: int, batch: int, length: int, dtype: torch.dtype) -> dict:
    kv_bytes = 2 * 2 * batch * length * kv_heads * HEAD_DIM
    caches = [
        torch.randn(2, batch, length, kv_heads, HEAD_DIM, dtype=dtype, device="cuda")
        for _ in range(measure.rotation(kv_bytes))
    ]
    q = torch.randn(batch, 1, q_heads, HEAD_DIM, dtype=dtype, device="cuda")
    seq_lens = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    blocks = batch * length // BLOCK_SIZE
    table = torch.randperm(blocks, device="cuda").to(torch.int32).view(batch, -1)
    # Random normal q and k give logits of unit variance, whose row maxima are near 4.
    phi = torch.full((q_heads,), 4.0, dtype=torch.float32, device="cuda")

    def ours(cache: torch.Tensor, paged: bool, unified: bool) -> torch.Tensor:
        if paged:
            cache = cache.view(2, blocks, BLOCK_SIZE, kv_heads, HEAD_DIM)
        return ops.decode_attention(
            q, cache[0], cache[1], seq_lens, table if paged else None, phi=phi if unified else None
        )

    def sdpa(cache: torch.Tensor) -> torch.Tensor:
        k, v = cache.transpose(2, 3)
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=q_heads != kv_heads)

    times = {
        "contiguous online": measure.graph_median_us([lambda c=c: ours(c, False, False) for c in caches]),
        "contiguous unified": measure.graph_median_us([lambda c=c: ours(c, False, True) for c in caches]),
        "paged online": measure.graph_median_us([lambda c=c: ours(c, True, False) for c in caches]),
        "paged unified": measure.graph_median_us([lambda c=c: ours(c, True, True) for c in caches]),
    }
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            name = "sdpa " + backend.name.split("_")[0].lower()
            try:
                times[name] = measure.graph_median_us([lambda c=c: sdpa(c) for c in caches])
            except RuntimeError as error:
                print(f"{name} refused: {str(error).splitlines()[0]}", flush=True)
    best_peer = min((us for name, us in times.items() if name.startswith("sdpa")), default=None)
    return {
        "batch": batch,
        "length": length,
        "us": {name: round(us, 2) for name, us in times.items()},
        "paged_unified_gbs": round(kv_bytes / times["paged unified"] / 1e3),
        "over_best_sdpa": round(best_peer / times["paged unified"], 3) if best_peer else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--output", default="bench/results/attention_h100.json")
    arguments = parser.parse_args()
    rows = []
    for heads, (q_heads, kv_heads) in HEADS.items():
        for batch, length in LENGTHS:
            row = measure_shape(q_heads, kv_heads, batch, length, getattr(torch, arguments.dtype))
            rows.append({"heads": heads, **row})
            print(rows[-1], flush=True)
    ceiling = round(measure.read_ceiling_gbs())
    measure.save(arguments.output, {"dtype": arguments.dtype, "read_ceiling_gbs": ceiling, "shapes": rows})


if __name__ == "__main__":
    main()
