"""Small cases of every kernel, each against its reference, to run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py --quick
    compute-sanitizer --tool initcheck python tests/sanitize.py --quick --warm
    FLASHDECPP_GPU_KERNELS=generic python tests/sanitize.py    # pre-Hopper kernels, on any GPU
    python tests/sanitize.py [cuda | cpu] [--only attention,linear,fused] [--quick] [--warm]

Without torch's caching allocator, every tensor ends where its allocation ends, so reads past it are found.
Arguments and references are computed on the CPU; only the kernels themselves run on the device, because a
sanitizer slows down everything there.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from unittest import mock

import tolerance
import torch
from strategies import Place, attention, every_op, quantized, randn, rotary
from tolerance import assert_same, compare
from torch import Tensor

from flashdecpp import ops, reference

SHAPES = [(1, 17, 40), (3, 70, 136), (8, 33, 1032), (20, 130, 264), (70, 129, 72)]  # m, n, k: none round
LENGTHS = [0, 1, 77, 200]
LINEARS = ("gemv", "flat_gemm", "linear", "quantized_linear")
GROUP_OF = dict.fromkeys(LINEARS, "linear")
GROUP_OF["decode_attention"] = "attention"

Cases = Iterator[tuple[str, dict]]  # op, arguments


class OpsOn:
    """flashdecpp.ops for CPU arguments, run on a device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __getattr__(self, op: str) -> Callable:
        def run(**arguments: object) -> object:
            storages: dict[int, tuple[Tensor, Tensor]] = {}  # address -> its bytes on the CPU and the device
            moved = {
                name: self._moved(x, storages) if isinstance(x, Tensor) else x
                for name, x in arguments.items()
            }
            result = getattr(ops, op)(**moved)
            for here, there in storages.values():
                here.copy_(there)
            if isinstance(result, tuple):
                return tuple(x.cpu() for x in result)
            return None if result is None else result.cpu()

        return run

    def _moved(self, x: Tensor, storages: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """x on the device with the same strides; tensors that share memory here share it there."""
        storage = x.untyped_storage()
        if storage.data_ptr() not in storages:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            storages[storage.data_ptr()] = here, here.to(self.device, copy=True)
        there = storages[storage.data_ptr()][1].untyped_storage()
        empty = torch.empty(0, dtype=x.dtype, device=self.device)
        return empty.set_(there, x.storage_offset(), x.size(), x.stride())


def attention_cases(place: Place) -> Cases:
    names = ("phi", "carried_phi")
    phis = [{}, *({name: value} for name in names for value in (0.0, 1000.0))]
    layouts = ({"block_size": None}, {"block_size": 1}, {"block_size": 16})
    for phi, layout, splits in itertools.product(phis, layouts, (1, 3)):
        for head_dim, q_len, fp8 in ((64, 1, False), (40, 3, False), (128, 2, True), (256, 1, False)):
            arguments = attention(
                place, LENGTHS, q_heads=6, q_len=q_len, head_dim=head_dim, fp8=fp8, **layout
            )
            for name, value in phi.items():
                arguments[name] = torch.full((4, 6), value)
            yield "decode_attention", arguments | {"num_splits": splits, "window": 90, "softcap": 20.0}


def quick_attention_cases(place: Place, generic: bool) -> Cases:
    """Each compiled head_dim with both softmax policies; other options alternate.

    Each combination of head_dim, policy and dtype gets a 16-bit cache with one set of kernels and an fp8 one
    with the other. The last head's phi is hopeless, so every unified case recomputes rows.
    """
    low = place.dtype == torch.bfloat16
    for i, (head_dim, unified) in enumerate(itertools.product((64, 96, 128, 192, 256), (False, True))):
        arguments = attention(
            place,
            LENGTHS,
            q_heads=8,
            q_len=5 if (i + i // 4 + low) % 2 else 1,  # 20 rows per KV head: more than one matrix tile
            head_dim=head_dim,
            fp8=(i + i // 2 + low + generic) % 2 == 0,
            block_size=(None, 1, 16)[i % 3],
        )
        if unified:
            arguments["phi"] = torch.tensor([0.0] * 7 + [1000.0])
        arguments["num_splits"] = 3 if (i // 2 + low) % 2 else 0
        yield "decode_attention", arguments | ({"window": 90, "softcap": 20.0} if i % 4 == 0 else {})


def linear_cases(place: Place, quick: bool) -> Cases:
    for m, n, k in SHAPES[::2] if quick else SHAPES:
        arguments = {
            "x": randn(place, m, k),
            "weight": randn(place, n, k, seed=1),
            "bias": randn(place, n, seed=2),
        }
        for op in ("gemv", "flat_gemm", "linear"):
            yield op, arguments
        norm = {"norm_weight": randn(place, k, seed=3)}
        gated = {"x": arguments["x"], "weight": randn(place, 2 * n, k, seed=1) / k**0.5, "gate": "silu"}
        for impl in ("gemv", "flat_gemm", "blas"):
            yield "linear", gated | norm | {"bias": randn(place, 2 * n, seed=2), "impl": impl}
            yield "linear", arguments | {"activation": "gelu", "impl": impl}
            yield "linear", arguments | {"residual": randn(place, m, n, seed=5), "impl": impl}


def quantized_cases(place: Place) -> Cases:
    for rows, n, k in ((1, 17, 384), (3, 70, 160), (8, 33, 1056), (20, 130, 5120), (70, 129, 96)):
        for bits, group in ((8, None), (8, 32), (4, 32)):
            arguments = quantized(place, rows, n, k, bits=bits, group=group, offsets=True)
            yield "quantized_linear", arguments
            arguments["norm_weight"] = randn(place, k, seed=3)
            yield "quantized_linear", arguments | {"residual": randn(place, rows, n, seed=5)}
            yield "quantized_linear", arguments | {"activation": "relu"}
            if n % 2 == 0:
                yield "quantized_linear", arguments | {"gate": "gelu"}
    yield "quantized_linear", quantized(place, 3, 17, 77, bits=8, group=None)
    yield "quantized_linear", quantized(place, 3, 17, 192, bits=4, group=64, bias=True)
    yield "quantized_linear", quantized(place, 3, 17, 384, bits=4, group=128)


def cases(place: Place, quick: bool) -> Cases:
    yield from every_op(place).items()
    yield "rotary_append", rotary(place, [5, 33], q_len=2, fp8=True)
    yield from linear_cases(place, quick)
    yield from quantized_cases(place)
    yield from quick_attention_cases(place, generic=False) if quick else attention_cases(place)


def check(op: str, arguments: dict, device: str) -> None:
    with mock.patch.object(tolerance, "ops", OpsOn(device)):
        if op == "sample":
            expected = reference.sample(**arguments | {"seen": arguments["seen"].clone()})
            assert_same(tolerance.ops.sample(**arguments), expected)
        else:
            compare(op, **arguments)


def generic_cases(place: Place, quick: bool) -> Cases:
    """Cases for ops with separate pre-Hopper kernels."""
    yield from linear_cases(place, quick)
    if quick:
        yield from quick_attention_cases(place, generic=True)
    else:
        yield from attention_cases(place)


def warm_allocator() -> None:
    """Leaves written memory in torch's caching allocator, for initcheck.

    The flags in decode_attention's workspace are compared with a number unique to the launch, so by design
    they may be read before they are written. Later allocations come from these written blocks, so anything
    that initcheck still reports is another read.
    """
    # Up to 1 MiB comes from one set of segments, larger sizes from another.
    blocks = [torch.full((n,), 0xA5, dtype=torch.uint8, device="cuda") for n in [1 << 20] * 64 + [256 << 20]]
    torch.cuda.synchronize()
    del blocks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("device", nargs="?", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", default="attention,linear,fused", help="which of these")
    parser.add_argument("--quick", action="store_true", help="every template once instead of every case")
    parser.add_argument("--warm", action="store_true", help="give the allocator written memory first")
    options = parser.parse_args()
    only = set(options.only.split(","))
    if not only <= {"attention", "linear", "fused"}:
        parser.error(f"--only must be among attention, linear, fused; got {options.only}")
    if options.warm and options.device == "cuda":
        warm_allocator()

    count = 0
    # The library, too, reads it once per process.
    chosen = generic_cases if os.environ.get("FLASHDECPP_GPU_KERNELS") == "generic" else cases
    for place in [Place("cpu", dtype) for dtype in (torch.float16, torch.bfloat16)]:
        for op, arguments in chosen(place, options.quick):
            if GROUP_OF.get(op.partition(".")[0], "fused") in only:
                check(op, arguments, options.device)
                count += 1
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} cases, all within tolerance")


if __name__ == "__main__":
    main()
