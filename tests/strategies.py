"""Builders of op arguments. Anything an op must not read is NaN, or an id outside every cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flashdecpp import ops

NO_BLOCK = 10**9  # in a block table, past the blocks that a sequence uses
E4M3 = torch.float8_e4m3fn
NAN = float("nan")
LAYOUTS = ("NHD", "HND", "two_planes", "halves")


class Place(NamedTuple):
    device: str
    dtype: torch.dtype


def randn(place: Place, *shape: int, seed: int = 0) -> Tensor:
    """Normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(place.device, place.dtype)


def int32(place: Place, values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=place.device)


def make_cache(
    place: Place,
    seq_lens: list[int],
    kv_heads: int,
    head_dim: int,
    *,
    block_size: int | None = 16,
    layout: str = "NHD",
    fp8: bool = False,
    max_len: int | None = None,
    seed: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """k_cache, v_cache and block_table (None if block_size is), with normal values for existing keys.

    Blocks are in random order with spare ones in between. The rest is NaN. Values don't depend on layout.
    """
    max_len = max_len or max(seq_lens, default=0) + 3
    if block_size is None:
        blocks, slots = len(seq_lens), max_len
    else:
        max_blocks = -(-max_len // block_size)
        used = [-(-n // block_size) for n in seq_lens]
        blocks, slots = sum(used) + 3, block_size
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [[order.pop() for _ in range(n)] + [NO_BLOCK] * (max_blocks - n) for n in used]
        table = int32(place, rows).reshape(len(seq_lens), max_blocks)

    dtype = E4M3 if fp8 else place.dtype
    k_cache, v_cache = _empty_pair((blocks, slots, kv_heads, head_dim), layout, dtype, place.device)
    generator = torch.Generator().manual_seed(seed)
    for cache in (k_cache, v_cache):
        for row, length in enumerate(seq_lens):
            values = torch.randn((length, kv_heads, head_dim), generator=generator).to(place.device, dtype)
            token = torch.arange(length, device=place.device)
            block = row if block_size is None else table[row, token // slots].long()
            _raw(cache)[block, token % slots] = _raw(values)
    return k_cache, v_cache, None if block_size is None else table


def _raw(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == E4M3 else x


def _empty_pair(
    shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Two NaN-filled caches, with the strides of a layout."""
    blocks, slots, heads, dim = shape

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, device=device).to(dtype)

    if layout == "NHD":
        return nan(blocks, slots, heads, dim), nan(blocks, slots, heads, dim)
    if layout == "HND":
        return nan(blocks, heads, slots, dim).transpose(1, 2), nan(blocks, heads, slots, dim).transpose(1, 2)
    if layout == "two_planes":  # [blocks, 2, ...], as vLLM stores K and V
        return nan(blocks, 2, slots, heads, dim).unbind(1)
    if layout == "halves":
        return nan(blocks, slots, heads, 2 * dim).split(dim, dim=-1)
    raise ValueError(layout)


def attention(
    place: Place,
    seq_lens: list[int],
    *,
    q_len: int = 1,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    fp8: bool = False,
    seed: int = 0,
    **cache,
) -> dict:
    """The arguments of decode_attention."""
    k_cache, v_cache, block_table = make_cache(
        place, seq_lens, kv_heads, head_dim, fp8=fp8, seed=seed, **cache
    )
    arguments = {
        "q": randn(place, len(seq_lens), q_len, q_heads, head_dim, seed=seed + 1000),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "seq_lens": int32(place, seq_lens),
        "block_table": block_table,
    }
    if fp8:
        arguments["k_scale"] = torch.linspace(0.5, 2, kv_heads, device=place.device)
        arguments["v_scale"] = torch.linspace(3, 0.25, kv_heads, device=place.device)
    return arguments


def rotary(
    place: Place,
    seq_lens: list[int],
    *,
    q_len: int = 1,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    rotary_dim: int | None = None,
    max_positions: int = 512,
    fp8: bool = False,
    seed: int = 0,
    **cache,
) -> dict:
    """The arguments of rotary_append: q, k and v are views of one packed projection."""
    k_cache, v_cache, block_table = make_cache(
        place, seq_lens, kv_heads, head_dim, fp8=fp8, seed=seed, **cache
    )
    packed = randn(place, len(seq_lens), q_len, q_heads + 2 * kv_heads, head_dim, seed=seed + 1000)
    q, k, v = packed.split([q_heads, kv_heads, kv_heads], dim=2)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "seq_lens": int32(place, seq_lens),
        "block_table": block_table,
        "cos_sin": cos_sin(place, max_positions, rotary_dim or head_dim),
    }
    if fp8:
        arguments["k_scale"] = torch.linspace(0.01, 0.02, kv_heads, device=place.device)
        arguments["v_scale"] = torch.linspace(0.02, 0.01, kv_heads, device=place.device)
    return arguments


def cos_sin(place: Place, max_positions: int, rotary_dim: int) -> Tensor:
    """A rotary table: the cosines, then the sines, of each position."""
    frequency = 10000 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angle = torch.arange(max_positions)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(place.device)


def sampling(place: Place, batch: int, vocab: int, *, seed: int = 0, **parameters: float) -> dict:
    """The arguments of sample; each parameter applies to all rows, and no two rows share a random number."""
    dtypes = {"top_k": torch.int32}
    arguments = {
        name: torch.full((batch,), value, dtype=dtypes.get(name, torch.float32), device=place.device)
        for name, value in parameters.items()
    }
    return {
        "logits": randn(place, batch, vocab, seed=seed) * 3,
        **arguments,
        "seed": torch.arange(batch, device=place.device) - batch // 2,
        "position": torch.arange(batch, device=place.device) * (2**33 + 7),
    }


def wrapper(op: str) -> Callable:
    """The flashdecpp.ops function for an op, or for an overload or variant of one."""
    return getattr(ops, op.partition(".")[0])


def every_op(place: Place) -> dict[str, dict]:
    """Valid arguments for each op, with its optional tensors; an overload or variant follows a dot."""
    heads = {name: torch.zeros(4, device=place.device) for name in ("phi", "sinks", "alibi_slopes")}
    decode = attention(place, [5, 33], q_len=2) | heads | {"window": 20, "fallback_count": int32(place, [0])}
    carried = {"carried_phi": torch.tensor([[0.0, NAN, 900.0, 1.0]] * 2, device=place.device)}
    norm = {"norm_weight": randn(place, 64, seed=4), "norm_eps": 1e-5}
    added = {"residual": randn(place, 3, 24, seed=5)}
    stored = {bits: quantized(place, 3, 24, 64, bits=bits, offsets=True, bias=True) for bits in (4, 8)}
    return {
        "decode_attention": decode,
        "decode_attention.carry": {name: x for name, x in decode.items() if name != "phi"} | carried,
        "gemv": _linear(place),
        "flat_gemm": _linear(place),
        "linear": _linear(place) | {"impl": "auto"},
        "linear.plain": _linear(place),
        "linear.gated": _linear(place) | norm | {"gate": "silu", "impl": "auto"},
        "linear.activated": _linear(place) | {"activation": "relu"},
        "linear.residual": _linear(place) | norm | added,
        "quantized_linear.plain": stored[4],
        "quantized_linear.gated": stored[4] | norm | {"gate": "gelu_tanh"},
        "quantized_linear.activated": stored[8] | {"activation": "silu"},
        "quantized_linear.residual": stored[8] | norm | added,
        "rms_norm": {
            "x": randn(place, 3, 64),
            "weight": randn(place, 64),
            "residual": randn(place, 3, 64, seed=1),
        },
        "layer_norm": {
            "x": randn(place, 3, 64),
            "weight": randn(place, 64),
            "bias": randn(place, 64, seed=2),
            "residual": randn(place, 3, 64, seed=1),
        },
        "rotary_append": rotary(place, [5, 33], q_len=2),
        "gated_activation": {"gate_up": randn(place, 3, 64), "activation": "gelu"},
        "sample": sampling(
            place, 3, 50, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3
        )
        | {"seen": torch.zeros(3, 50, dtype=torch.bool, device=place.device)},
    }


def quantized(
    place: Place,
    rows: int,
    n: int,
    k: int,
    *,
    bits: int,
    group: int | None = 32,
    offsets: bool = False,
    bias: bool = False,
    scales_dtype: torch.dtype | None = None,
) -> dict:
    """The arguments of quantized_linear, covering every q; group None means one scale per row."""
    generator = torch.Generator().manual_seed(7)
    low, dtype, width = (0, torch.uint8, k // 2) if bits == 4 else (-128, torch.int8, k)
    weight = torch.randint(low, low + 256, (n, width), generator=generator).to(place.device, dtype)
    scale_place = Place(place.device, scales_dtype or place.dtype)
    shape = (n,) if group is None else (n, k // group)
    return {
        "x": randn(place, rows, k),
        "weight": weight,
        "scales": randn(scale_place, *shape, seed=1) / 2**bits,
        "offsets": randn(scale_place, *shape, seed=2) if offsets else None,
        "bias": randn(place, n, seed=3) if bias else None,
    }


def _linear(place: Place) -> dict:
    return {"x": randn(place, 3, 64), "weight": randn(place, 24, 64), "bias": randn(place, 24, seed=1)}
