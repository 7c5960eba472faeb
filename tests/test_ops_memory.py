"""Calls leak no memory, refuse to write where arguments overlap, and say how much they failed to allocate."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from op_calls import CPU, OPS, refused, written
from strategies import LAYOUTS, attention, every_op, quantized, randn, rotary, wrapper
from tolerance import compare, overload_for
from torch import Tensor

from flashdecpp import ops

# ------------------------------------------------------------------------------------------------------ leaks


class Mallinfo(ctypes.Structure):
    """glibc's mallinfo2: uordblks and hblkhd are the bytes in use."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@pytest.fixture
def kept() -> Iterator[Callable]:
    """kept(call): the bytes that one call leaks."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc's mallinfo2")
    libc.mallinfo2.restype = Mallinfo

    def bytes_in_use() -> int:
        gc.collect()
        info = libc.mallinfo2()
        return info.uordblks + info.hblkhd

    def measure(call: Callable[[], object], calls: int = 200) -> float:
        for _ in range(50):
            call()
        before = bytes_in_use()
        for _ in range(calls):
            call()
        return (bytes_in_use() - before) / calls

    yield measure


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """Without this, collecting the objects left by other tests takes longer than the calls."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


LEFT_OVER = 24  # bytes per call, for the rest of the process; the shortest string takes 48


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("through", ["wrapper", "op"])
def test_calls_leak_nothing(kept, op, through):
    arguments = every_op(CPU)[op]
    function = wrapper(op) if through == "wrapper" else overload_for(op, arguments)
    assert kept(lambda: function(**arguments)) < LEFT_OVER


X, WEIGHT, BIAS, SUMS = randn(CPU, 3, 64), randn(CPU, 24, 64), randn(CPU, 24), randn(CPU, 3, 24)
STORED = quantized(CPU, 3, 24, 64, bits=8)
LONG = "an implementation whose name is longer than what a string holds in itself"
WITH_STRINGS = {
    "gemv": lambda: ops.linear(X, WEIGHT, impl="gemv"),
    "blas": lambda: ops.linear(X, WEIGHT, BIAS, impl="blas"),
    "gated": lambda: ops.linear(X, WEIGHT, gate="gelu_tanh", impl="blas"),
    "activated": lambda: ops.linear(X, WEIGHT, activation="gelu_tanh", impl="blas"),
    "added": lambda: ops.linear(X, WEIGHT, residual=SUMS, impl="blas"),
    "quantized": lambda: ops.quantized_linear(**STORED, gate="relu"),
    "activation": lambda: ops.gated_activation(X, activation="gelu_tanh"),
    "choice": lambda: ops.linear_choice(X, WEIGHT),
    "choice of the op": lambda: torch.ops.flashdecpp.linear_choice(X, WEIGHT),
}
REFUSED = {
    "impl": lambda: ops.linear(X, WEIGHT, impl=LONG),
    "shape": lambda: ops.linear(X, WEIGHT[:, :32], impl=LONG),
    "none": lambda: ops.linear(X, None, impl=LONG),
    "type": lambda: ops.linear(X, 1.5, impl=LONG),
    "gate": lambda: ops.linear(X, WEIGHT, gate=LONG, impl=LONG),
    "gate and activation": lambda: ops.linear(X, WEIGHT, gate="silu", activation=LONG),
    "norm": lambda: ops.linear(X, WEIGHT, gate="silu", norm_weight=X),
    "gated": lambda: ops.gated_activation(X, activation=LONG),
    "choice": lambda: ops.linear_choice(X, WEIGHT.double()),
    "memory": lambda: ops.linear(X, WEIGHT[:1].expand(1 << 40, 64), impl="blas"),
}


@pytest.mark.parametrize("call", WITH_STRINGS)
def test_strings_leak_nothing(kept, call):
    assert kept(WITH_STRINGS[call]) < LEFT_OVER


@pytest.mark.parametrize("call", REFUSED)
def test_refusals_leak_nothing(kept, call):
    def fail() -> None:
        with pytest.raises((ValueError, TypeError, torch.OutOfMemoryError)):
            REFUSED[call]()

    assert kept(fail) < LEFT_OVER


# ---------------------------------------------------------------------------------------------- shared memory


def overlapping(x: Tensor) -> Tensor:
    """Like x, but all the elements of the first dimension are the same memory."""
    return x[:1].expand(x.shape)


SELF = [
    (op, name) for op in OPS for name in written(op, every_op(CPU)[op]) if every_op(CPU)[op][name].size(0) > 1
]


@pytest.mark.parametrize(("op", "name"), SELF)
def test_self_overlapping_in_place_arguments(one_place, op, name):
    arguments = every_op(one_place)[op]
    arguments[name] = overlapping(arguments[name])
    refused(op, arguments, rf": {name} must (not overlap itself|be contiguous), got strides")


def test_overlapping_rows(one_place):
    arguments = every_op(one_place)["decode_attention.carry"]
    line = torch.zeros(7, device=one_place.device)
    refused(
        "decode_attention.carry",
        arguments | {"carried_phi": line.as_strided((2, 4), (3, 1))},
        "carried_phi must",
    )
    arguments = rotary(one_place, [5, 33], q_len=2)
    heads = randn(one_place, 2 * 2 * 4 * 64)
    refused(
        "rotary_append", arguments | {"q": heads.as_strided((2, 2, 4, 64), (512, 256, 32, 1))}, "q must not"
    )


def test_residual_shares_memory(one_place):
    for op in ("rms_norm", "layer_norm"):
        arguments = every_op(one_place)[op]
        rows = randn(one_place, 4, 64)
        refused(op, arguments | {"x": rows[:3], "residual": rows[1:]}, "residual must share no memory with x")
        refused(op, arguments | {"x": rows[:3], "residual": rows[:3]}, "residual must share no memory with x")
        refused(
            op,
            arguments | {"residual": rows[:3], "weight": rows[1]},
            "residual must share no memory with weight",
        )
    for op in ("linear.residual", "quantized_linear.residual"):
        arguments = every_op(one_place)[op]
        for name in ("bias", "norm_weight"):
            row = arguments[name]
            sums = torch.cat((row, randn(one_place, 72 - len(row))))
            changed = {"residual": sums.view(3, 24), name: sums[: len(row)]}
            refused(op, arguments | changed, f"residual must share no memory with {name}")
    arguments = every_op(one_place)["linear.residual"]
    weight = arguments["weight"]
    refused(
        "linear.residual",
        arguments | {"residual": weight.view(-1)[5 * 8 : 5 * 8 + 72].view(3, 24)},
        "residual must share no memory with weight",
    )
    arguments = every_op(one_place)["quantized_linear.residual"]
    size = arguments["x"].element_size()
    refused(
        "quantized_linear.residual",
        arguments | {"residual": arguments["weight"].view(-1)[: 72 * size].view(one_place.dtype).view(3, 24)},
        "residual must share no memory with weight",
    )


def test_keys_values_and_caches_share_memory(one_place):
    arguments = rotary(one_place, [5, 33], q_len=2)
    for names in (("q", "k"), ("q", "v"), ("k", "v"), ("k_cache", "v_cache")):
        shared = {names[1]: arguments[names[0]][:, :, : arguments[names[1]].size(2)]}
        refused("rotary_append", arguments | shared, f"{names[0]} must share no memory with {names[1]}")
    flat_cache = arguments["k_cache"].view(-1)
    inside = flat_cache[: arguments["v"].numel()].view(arguments["v"].shape)
    refused("rotary_append", arguments | {"v": inside}, r"k_cache must share no memory with v|v must")
    table = arguments["block_table"]
    codes = table.new_zeros(4096)
    wide = codes.view(one_place.dtype).view(-1)[: arguments["k"].numel()].view(arguments["k"].shape)
    refused(
        "rotary_append",
        arguments | {"k": wide, "seq_lens": codes[:2]},
        "k must share no memory with seq_lens",
    )


def test_counts_and_marks_share_memory(one_place):
    arguments = every_op(one_place)["decode_attention"]
    refused(
        "decode_attention",
        arguments | {"fallback_count": arguments["seq_lens"][1:]},
        "fallback_count must share no memory with seq_lens",
    )
    arguments = every_op(one_place)["decode_attention.carry"]
    carried = arguments["carried_phi"]
    refused(
        "decode_attention.carry",
        arguments | {"sinks": carried[1]},
        "carried_phi must share no memory with sinks",
    )
    arguments = every_op(one_place)["sample"]
    marks = torch.zeros(3 * 50 + 24, dtype=torch.uint8, device=one_place.device)
    seen, top_k = marks[:150].view(torch.bool).view(3, 50), marks[148:160].view(torch.int32)
    refused("sample", arguments | {"seen": seen, "top_k": top_k}, "seen must share no memory with top_k")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [8, None])
def test_interleaved_views(one_place, layout, block_size):
    """K and V as planes or halves of one cache; q, k and v of one projection, tokens or heads first."""
    arguments = rotary(one_place, [5, 33, 1], q_len=2, block_size=block_size, layout=layout)
    compare("rotary_append", **arguments)
    heads_first = randn(one_place, 3, 8, 2, 64).transpose(1, 2)
    q, k, v = heads_first.split([4, 2, 2], dim=2)
    compare("rotary_append", **rotary(one_place, [5, 33, 1], q_len=2) | {"q": q, "k": k, "v": v})
    carried = torch.full((2, 8), 3.0, device=one_place.device)
    attended = attention(one_place, [5, 33])
    compare("decode_attention", **attended, carried_phi=carried[:, :4], sinks=carried[0, 4:])


def test_residual_interleaved_with_x(one_place):
    """Alternating rows of one tensor."""
    rows = randn(one_place, 3, 2, 64)
    one, wide = rows[:, 0], torch.cat((rows[:, 1], rows[:, 1]), dim=0)[:3]
    compare("rms_norm", x=one, weight=randn(one_place, 64), residual=wide)
    packed = randn(one_place, 1, 128)
    compare("rms_norm", x=packed[:, :64], weight=randn(one_place, 64), residual=packed[:, 64:])


# ---------------------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize("impl", ["gemv", "flat_gemm", "blas"])
def test_result_too_large(impl):
    """The error gives the size and its purpose, with the type that torch uses for GPU memory."""
    wide = torch.ones(1, 8).expand(1 << 40, 8)
    message = r"^flashdecpp: out of memory: 17\.6 TB .* on cpu for a result of shape \[4, 1099511627776\] in "
    with pytest.raises(torch.OutOfMemoryError, match=message):
        ops.linear(torch.ones(4, 8), wide, impl=impl)


def test_workspace_too_large():
    rows = torch.ones(1, 8).expand(1 << 44, 8)
    for call in (lambda: ops.gemv(rows, torch.ones(0, 8)), lambda: ops.gemv(rows[:, ::2], torch.ones(0, 4))):
        with pytest.raises(
            torch.OutOfMemoryError, match=r"^flashdecpp: out of memory: .+ could not be allocated on "
        ):
            call()
