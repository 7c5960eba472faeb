"""The definition of every op of flashdecpp, in plain torch.

Each function takes the arguments of the op of the same name, on any device, and returns the same results:
float32 arithmetic, results rounded once to the op's output dtype, in-place arguments updated as the op
updates them. Nothing here is fast. Needs torch only, no compiled library.

`compute_dtype` is the one argument that the ops lack. They are defined in float32; bfloat16 or float16 gives
the same math in plain low-precision torch (the yardstick of the tolerance), float64 a ground truth for
float32 results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


# ------------------------------------------------------------------------------------------------- attention


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None = None,
    *,
    scale: float | None = None,
    phi: Tensor | None = None,
    softcap: float = 0.0,
    window: int = -1,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int = 0,
    fallback_count: Tensor | None = None,
    carried_phi: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Attention of q_len new tokens per sequence over a KV cache that already holds them.

    `phi`, the value of `carried_phi` and `num_splits` select how an implementation computes, never what, so
    they are unused; `carried_phi` becomes the row maximum of the last token. `fallback_count` is left alone:
    which rows fall back depends on an implementation's safe window around phi. A length beyond the cache is
    clamped to its capacity. A low `compute_dtype` applies to the softmax weights and the values; logits and
    their softmax are never below float32.
    """
    batch, q_len, q_heads, head_dim = q.shape
    group = q_heads // k_cache.size(2)
    scale = head_dim**-0.5 if scale is None else scale
    lengths = seq_lens.clamp(0, capacity(k_cache, block_table)).tolist()
    logit_dtype = torch.promote_types(compute_dtype, torch.float32)

    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    unseen = torch.full((q_heads,), -torch.inf, device=q.device) if sinks is None else sinks
    lse = unseen[:, None].repeat(batch, 1, q_len)  # stays as it is for rows that see no key

    for b, length in enumerate(lengths):
        # [q_heads, length, head_dim]: every query head has its own copy of the KV head that it reads.
        keys = _sequence(k_cache, b, length, block_table, k_scale, logit_dtype)
        values = _sequence(v_cache, b, length, block_table, v_scale, compute_dtype)
        keys, values = (x.transpose(0, 1).repeat_interleave(group, dim=0) for x in (keys, values))

        for i in range(q_len):
            position = length - q_len + i
            first = max(0, position - window + 1) if window > 0 else 0
            if position < 0:
                continue
            visible = slice(first, position + 1)

            x = scale * (keys[:, visible] @ q[b, i].to(logit_dtype).unsqueeze(-1)).squeeze(-1)
            if softcap > 0:
                x = softcap * torch.tanh(x / softcap)
            if alibi_slopes is not None:
                distance = position - torch.arange(first, position + 1, device=q.device)
                x = x - alibi_slopes[:, None].to(logit_dtype) * distance
            # A logit of -inf would silently drop its key, one of +inf all other keys. Both become NaN.
            x = torch.where(x.isfinite().all(dim=-1, keepdim=True), x, torch.nan)
            if carried_phi is not None and i == q_len - 1:
                maximum = x.amax(dim=-1).float()
                carried_phi[b] = torch.where(maximum.isnan(), carried_phi[b], maximum)

            terms = x if sinks is None else torch.cat((x, sinks[:, None].to(logit_dtype)), dim=-1)
            weights = torch.softmax(terms, dim=-1)[:, : x.size(-1)]
            weights = weights.to(compute_dtype)
            out[b, i] = (weights.unsqueeze(1) @ values[:, visible]).squeeze(1).to(q.dtype)
            lse[b, :, i] = torch.logsumexp(terms, dim=-1).float()
    return out, lse


def capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """Tokens of one sequence that a cache can hold, as its block table or its own length allows."""
    return cache.size(1) if block_table is None else cache.size(1) * block_table.size(1)


def _sequence(
    cache: Tensor, b: int, length: int, block_table: Tensor | None, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The first `length` keys (or values) of sequence b: [length, kv_heads, head_dim], dequantized."""
    if block_table is None:
        tokens = cache[b, :length]
    else:
        block_size = cache.size(1)
        blocks = block_table[b, : -(-length // block_size)].long()
        tokens = _raw(cache)[blocks].view(cache.dtype).flatten(0, 1)[:length]
    tokens = tokens.to(dtype)
    return tokens if scale is None else tokens * scale[:, None].to(dtype)


def _raw(cache: Tensor) -> Tensor:
    """The cache as torch can index it: an fp8 cache as bytes, since not every device can index fp8."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


# ---------------------------------------------------------------------------------------------------- linear


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: str | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    impl: str = "auto",
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """h @ weight^T + bias for h = x or its norm; then gated, activated or added to the residual.

    Nothing is rounded in between. `impl` selects how an implementation computes, never what, so it is unused.
    """
    h = x.to(compute_dtype)
    if norm_weight is not None:
        h = rms_norm(h, norm_weight, eps=norm_eps, compute_dtype=compute_dtype)
    y = h @ weight.to(compute_dtype).T
    if bias is not None:
        y = y + bias.to(compute_dtype)
    if gate is not None:
        y = gated_activation(y, activation=gate, compute_dtype=compute_dtype)
    if activation is not None:
        y = _ACTIVATIONS[activation](y)
    if residual is None:
        return y.to(x.dtype)
    _add_residual(y, residual, compute_dtype)
    return None


def gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """`linear`: the two differ in speed alone."""
    return cast("Tensor", linear(x, weight, bias, compute_dtype=compute_dtype))


def flat_gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """`linear`: the two differ in speed alone."""
    return cast("Tensor", linear(x, weight, bias, compute_dtype=compute_dtype))


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: str | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """`linear` with the weight that `dequantize` returns."""
    return linear(
        x,
        dequantize(weight, scales, offsets, compute_dtype=compute_dtype),
        bias,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        gate=gate,
        activation=activation,
        residual=residual,
        compute_dtype=compute_dtype,
    )


def dequantize(
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight [N, K] that the arguments of `quantized_linear` encode: scale * q + offset per group."""
    # In float32 at least: a low precision rounds the weight itself, not the steps that lead to it.
    exact = torch.promote_types(compute_dtype, torch.float32)
    scales = scales.to(exact).view(weight.size(0), -1)
    if weight.dtype == torch.uint8:
        q = unpack_int4(weight)
        offsets = -8 * scales if offsets is None else offsets
    else:
        q = weight
    grouped = q.to(exact).unflatten(1, (scales.size(1), -1)) * scales[:, :, None]
    if offsets is not None:
        grouped = grouped + offsets.to(exact).view(scales.shape)[:, :, None]
    return grouped.flatten(1).to(compute_dtype)


def unpack_int4(packed: Tensor) -> Tensor:
    """[N, K / 2] uint8 -> [N, K] from 0 to 15. In 16 bytes the low nibbles are the first 16 of 32 numbers."""
    blocks = packed.unflatten(1, (-1, 16))
    return torch.cat((blocks & 15, blocks >> 4), dim=2).flatten(1)


def pack_int4(q: Tensor) -> Tensor:
    """The inverse of `unpack_int4`: [N, K] uint8 from 0 to 15 -> [N, K / 2]. K is a multiple of 32."""
    low, high = q.unflatten(1, (-1, 2, 16)).unbind(2)
    return (low | high << 4).flatten(1)


# ----------------------------------------------------------------------------------------------- elementwise


def rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x / rms(x) * weight. With a residual: residual += x, and the norm is that of the new residual."""
    h = _add_residual(x, residual, compute_dtype)
    h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
    return (h * weight.to(compute_dtype)).to(x.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(x - mean) / std * weight + bias. A residual acts as in `rms_norm`."""
    h = _add_residual(x, residual, compute_dtype)
    h = h - h.mean(dim=-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        h = h * weight.to(compute_dtype)
    if bias is not None:
        h = h + bias.to(compute_dtype)
    return h.to(x.dtype)


def _add_residual(x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The tensor to normalize: x, or the updated residual as it is stored, rounded."""
    if residual is None:
        return x.to(dtype)
    residual.copy_(residual.to(dtype) + x.to(dtype))
    return residual.to(dtype)


def rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None = None,
    *,
    cos_sin: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Rotates q and k in place by their tokens' positions, then stores k and v in the caches."""
    q_len = q.size(1)
    # seq_lens includes the new tokens; a negative position is left padding.
    positions = seq_lens.long()[:, None] - q_len + torch.arange(q_len, device=q.device)
    if cos_sin is not None:
        _rotate(q, positions, cos_sin, interleaved, compute_dtype)
        _rotate(k, positions, cos_sin, interleaved, compute_dtype)
    _append(k, k_cache, positions, block_table, k_scale)
    _append(v, v_cache, positions, block_table, v_scale)


def _rotate(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool, dtype: torch.dtype) -> None:
    """Turns the first rotary_dim entries of every head of x [batch, q_len, heads, head_dim], in place."""
    max_positions, rotary_dim = cos_sin.shape
    in_table = (positions >= 0) & (positions < max_positions)
    angles = cos_sin[positions.clamp(0, max_positions - 1)].to(dtype)
    cos, sin = angles.unsqueeze(2).chunk(2, dim=-1)  # each [batch, q_len, 1, rotary_dim / 2]

    head = x[..., :rotary_dim]
    first, second = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    a, b = first.to(dtype), second.to(dtype)
    turned_first, turned_second = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
    in_table = in_table[:, :, None, None]
    first.copy_(torch.where(in_table, turned_first, first))
    second.copy_(torch.where(in_table, turned_second, second))


def _append(
    x: Tensor, cache: Tensor, positions: Tensor, block_table: Tensor | None, scale: Tensor | None
) -> None:
    """Stores x [batch, q_len, kv_heads, head_dim] at its tokens' positions, as far as the cache has them."""
    block_size = cache.size(1)
    held = (positions >= 0) & (positions < capacity(cache, block_table))
    x, positions, sequences = x[held], positions[held], held.nonzero()[:, 0]
    if block_table is None:
        blocks, slots = sequences, positions
    else:
        blocks, slots = block_table.long()[sequences, positions // block_size], positions % block_size
    known = (blocks >= 0) & (blocks < cache.size(0))

    if cache.dtype == torch.float8_e4m3fn:
        x = x.float() if scale is None else x.float() / scale[:, None]
        x = x.clamp(-E4M3_MAX, E4M3_MAX)
    _raw(cache)[blocks[known], slots[known]] = _raw(x[known].to(cache.dtype))


def gated_activation(
    gate_up: Tensor, *, activation: str = "silu", compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """act(gate) * up, where gate and up are the two halves of the last dim."""
    gate, up = gate_up.to(compute_dtype).chunk(2, dim=-1)
    return (_ACTIVATIONS[activation](gate) * up).to(gate_up.dtype)


# -------------------------------------------------------------------------------------------------- sampling


def sample(
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    seen: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One token id per row of logits [batch, vocab]: the largest logit, or a draw if temperature > 0.

    The draw depends on the row, seed and position alone; seed and position default to 0. A row without a
    logit above -inf gives -1, and nothing is marked as seen.
    """
    batch = logits.size(0)
    weights = kept_weights(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seen=seen,
        compute_dtype=compute_dtype,
    )
    zeros = torch.zeros(batch, dtype=torch.int64, device=logits.device)
    u = uniform(zeros if seed is None else seed, zeros if position is None else position).to(compute_dtype)

    cumulative = weights.cumsum(dim=-1)
    beyond = cumulative > (u * cumulative[:, -1])[:, None]
    # argmax gives the first True. Rounding can leave none, which selects the last kept token.
    last_kept = weights.size(-1) - 1 - (weights > 0).flip(-1).int().argmax(dim=-1)
    drawn = torch.where(beyond.any(dim=-1), beyond.int().argmax(dim=-1), last_kept)

    drawing = zeros > 0 if temperature is None else temperature > 0
    token = torch.where(drawing, drawn, weights.argmax(dim=-1))  # argmax gives the first of several
    token = torch.where((weights > 0).any(dim=-1), token, -1)
    if seen is not None:
        row = (token >= 0).nonzero()[:, 0]
        seen[row, token[row]] = True
    return token


def kept_weights(
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    seen: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The distribution that `sample` draws from, [batch, vocab], not normalized.

    1 for the most likely token, which passes every filter, 0 for tokens that a filter removed. Filters apply
    in transformers' order and keep every tie at their threshold. A parameter that is NaN is off, and so is a
    penalty that is infinite or not above 0.
    """
    x = logits.to(compute_dtype)
    x = torch.where(x.isnan(), -torch.inf, x)
    if repetition_penalty is not None and seen is not None:
        usable = (repetition_penalty > 0) & repetition_penalty.isfinite()
        r = torch.where(usable, repetition_penalty, 1.0)[:, None].to(compute_dtype)
        x = torch.where(seen, torch.where(x > 0, x / r, x * r), x)

    largest = x.amax(dim=-1, keepdim=True)
    distance = x - largest
    if temperature is not None:
        # A greedy row only needs its largest logit to stay the largest. -inf / inf would be NaN.
        t = torch.where(temperature > 0, temperature, 1.0).clamp(max=torch.finfo(torch.float32).max)
        distance = distance / t[:, None].to(compute_dtype)
    # The largest has weight 1 by definition: inf - inf would be NaN.
    weights = torch.where(x == largest, 1.0, torch.exp(distance)).masked_fill(x == -torch.inf, 0.0)

    if top_k is not None:
        descending = x.sort(dim=-1, descending=True).values
        k = torch.where(top_k > 0, top_k, x.size(-1)).clamp(max=x.size(-1)).long()
        weights = weights.masked_fill(x < descending.gather(-1, k[:, None] - 1), 0.0)
    if top_p is not None:
        descending = weights.sort(dim=-1, descending=True).values
        total = descending.sum(dim=-1, keepdim=True)
        before = descending.cumsum(dim=-1) - descending
        needed = (before < top_p[:, None].to(compute_dtype) * total).sum(dim=-1, keepdim=True).clamp(min=1)
        threshold = torch.where(top_p[:, None] < 1, descending.gather(-1, needed - 1), 0.0)
        weights = weights.masked_fill(weights < threshold, 0.0)
    if min_p is not None:
        weights = weights.masked_fill(weights < min_p[:, None].to(compute_dtype).clamp(max=1), 0.0)
    return weights


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """The u of each draw in [0, 1): 24 bits of the first Philox word, [batch] float32."""
    zero = torch.zeros_like(position)
    words = philox(torch.stack((*_halves(position), zero, zero)), torch.stack(_halves(seed)))
    return (words[0] >> 8).float() * 2.0**-24


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox-4x32-10 (Salmon et al., SC 2011): counter [4, n], key [2, n] -> [4, n], words held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _halves(c0 * 0xD2511F53)[::-1]
        high1, low1 = _halves(c2 * 0xCD9E8D57)[::-1]
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return torch.stack((c0, c1, c2, c3))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The low and high 32 bits of int64, which are correct even for a product that wrapped around."""
    return x & 0xFFFFFFFF, (x >> 32) & 0xFFFFFFFF
