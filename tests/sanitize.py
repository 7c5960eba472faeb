"""Small cases of every kernel, each against its reference: what to run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py [cuda | cpu]

Without torch's caching allocator every tensor ends where its allocation ends, so reads past it are found.
"""

from __future__ import annotations

import itertools
import sys

import torch
from strategies import Place, attention, every_op, randn, rotary
from tolerance import assert_same, compare

from flashdecpp import ops, reference

SHAPES = [(1, 17, 40), (3, 70, 136), (8, 33, 1032), (20, 130, 264), (70, 129, 72)]  # m, n, k: nothing round


def attention_cases(place: Place) -> int:
    names = ("phi", "carried_phi")
    phis = [{}, *({name: value} for name in names for value in (0.0, 1000.0))]
    layouts = ({"block_size": None}, {"block_size": 1}, {"block_size": 16})
    count = 0
    for phi, layout, splits in itertools.product(phis, layouts, (1, 3)):
        for head_dim, q_len, fp8 in ((64, 1, False), (40, 3, False), (128, 2, True), (256, 1, False)):
            arguments = attention(
                place, [0, 1, 77, 200], q_heads=6, q_len=q_len, head_dim=head_dim, fp8=fp8, **layout
            )
            for name, value in phi.items():
                arguments[name] = torch.full((4, 6), value, device=place.device)
            compare("decode_attention", **arguments, num_splits=splits, window=90, softcap=20.0)
            count += 1
    return count


def linear_cases(place: Place) -> int:
    for m, n, k in SHAPES:
        x, weight, bias = randn(place, m, k), randn(place, n, k, seed=1), randn(place, n, seed=2)
        for op in ("gemv", "flat_gemm", "linear"):
            compare(op, x=x, weight=weight, bias=bias)
    return 3 * len(SHAPES)


def main(device: str = "cuda") -> None:
    count = 0
    for dtype in (torch.float16, torch.bfloat16):
        place = Place(device, dtype)
        ops_with_arguments = every_op(place)
        choice = ops_with_arguments.pop("sample")
        expected = reference.sample(**choice | {"seen": choice["seen"].clone()})
        assert_same(ops.sample(**choice), expected)
        for op, arguments in ops_with_arguments.items():
            compare(op, **arguments)
        count += 1 + len(ops_with_arguments)
        compare("rotary_append", **rotary(place, [5, 33], q_len=2, fp8=True))
        count += 1 + attention_cases(place) + linear_cases(place)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} cases, all within tolerance")


if __name__ == "__main__":
    main(*sys.argv[1:])
